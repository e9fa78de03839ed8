//! What a SEAMCALL or TDCALL says in RAX.
//!
//! ```text
//!  63    62              61           32 31              0
//! +-----+---------------+---------------+-----------------+
//! | err | unrecoverable |     class     |   operand id    |
//! +-----+---------------+---------------+-----------------+
//! ```
//!
//! Numbers from the Intel TDX Module 1.5 ABI specification, interface function completion status codes and operand ids.

use std::fmt;

/// A completion status other than success.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(u64);

/// The upper 32 bits of a [`Status`]: what happened.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Class(u32);

/// The lower 32 bits of a [`Status`]: to which operand. A register for one that the caller gave, or a structure that the
/// call used by itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Operand(u32);

macro_rules! named {
    ($type:ident { $($(#[$doc:meta])* $name:ident = $value:literal,)* }) => {
        impl $type {
            $($(#[$doc])* pub const $name: Self = Self($value);)*

            /// The name, for those that have one here.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some(stringify!($name)),)*
                    _ => None,
                }
            }

            /// The number.
            #[must_use]
            pub const fn raw(self) -> u32 {
                self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.name() {
                    Some(name) => f.pad(name),
                    None => write!(f, "{:#x}", self.0),
                }
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

named!(Class {
    /// Resume the call to go on.
    INTERRUPTED_RESUMABLE = 0x8000_0003,
    /// Make the call again from the start.
    INTERRUPTED_RESTARTABLE = 0x8000_0004,
    /// The operand's value can't be right.
    OPERAND_INVALID = 0xc000_0100,
    /// The address lies in no TDMR.
    OPERAND_ADDR_RANGE_ERROR = 0xc000_0101,
    /// Someone else has the operand's lock.
    OPERAND_BUSY = 0x8000_0200,
    /// A vCPU still runs with translations of the epoch before.
    PREVIOUS_TLB_EPOCH_BUSY = 0x8000_0201,
    /// The module is busy as a whole.
    SYS_BUSY = 0x8000_0202,
    /// The processor had no random number.
    RND_NO_ENTROPY = 0x8000_0203,
    /// The host wants the operand's lock, so the guest stands back.
    OPERAND_BUSY_HOST_PRIORITY = 0x8000_0204,
    /// The page's type in the PAMT is another than the call needs.
    PAGE_METADATA_INCORRECT = 0xc000_0300,
    /// The TD still has pages.
    TD_ASSOCIATED_PAGES_EXIST = 0xc000_0400,
    /// The TD met a fatal error; it can only be torn down.
    TD_FATAL = 0xe000_0604,
    /// The TD has too few TDCX pages.
    TDCS_NOT_ALLOCATED = 0xc000_0606,
    /// The call does not fit the TD's life cycle.
    LIFECYCLE_STATE_INCORRECT = 0xc000_0607,
    /// The call does not fit the TD's OP_STATE, which is in the operand's place.
    OP_STATE_INCORRECT = 0xc000_0608,
    /// The TD has no vCPU.
    NO_VCPUS = 0xc000_0609,
    /// Too few or too many TDCX pages.
    TDCX_NUM_INCORRECT = 0xc000_0610,
    /// The call does not fit the vCPU's state.
    VCPU_STATE_INCORRECT = 0xc000_0700,
    /// The vCPU is associated with another logical processor.
    VCPU_ASSOCIATED = 0x8000_0701,
    /// The vCPU is not associated with this logical processor.
    VCPU_NOT_ASSOCIATED = 0x8000_0702,
    /// The TD has as many vCPUs as it may.
    MAX_VCPUS_EXCEEDED = 0xc000_0705,
    /// The TD's keys are not configured, or no more.
    TD_KEYS_NOT_CONFIGURED = 0x8000_0810,
    /// The key is in another state than the call needs.
    KEY_STATE_INCORRECT = 0xc000_0811,
    /// The key was configured on this package before.
    KEY_CONFIGURED = 0x0000_0815,
    /// The HKID has a TD.
    HKID_NOT_FREE = 0xc000_0820,
    /// A vCPU was not flushed.
    FLUSHVP_NOT_DONE = 0x8000_0824,
    /// The Secure-EPT leads not as far as the level asked for.
    EPT_WALK_FAILED = 0xc000_0b00,
    /// The Secure-EPT maps nothing there.
    EPT_ENTRY_NOT_PRESENT = 0xc000_0b03,
    /// Block the range first.
    GPA_RANGE_NOT_BLOCKED = 0xc000_0b06,
    /// The range is blocked.
    GPA_RANGE_ALREADY_BLOCKED = 0x0000_0b07,
    /// A vCPU may still use the translation.
    TLB_TRACKING_NOT_DONE = 0xc000_0b08,
    /// The entries make no larger page.
    EPT_INVALID_PROMOTE_CONDITIONS = 0xc000_0b09,
    /// The guest accepted the page before; the level is in the operand's place.
    PAGE_ALREADY_ACCEPTED = 0x0000_0b0a,
    /// The guest asked for a larger page than is mapped; the level is in the operand's place.
    PAGE_SIZE_MISMATCH = 0xc000_0b0b,
    /// The range is blocked.
    GPA_RANGE_BLOCKED = 0xc000_0b0c,
    /// The entry's state does not allow the call.
    EPT_ENTRY_STATE_INCORRECT = 0xc000_0b0d,
    /// The table still has entries.
    EPT_PAGE_NOT_FREE = 0xc000_0b0e,
});

named!(Operand {
    /// The first operand of most calls: GPA and level.
    RCX = 1,
    /// The second: the TDR.
    RDX = 2,
    /// The third: a page.
    R8 = 8,
    /// The fourth: PAGE.ADD's source.
    R9 = 9,
    /// TD_PARAMS.ATTRIBUTES.
    ATTRIBUTES = 64,
    /// TD_PARAMS.XFAM.
    XFAM = 65,
    /// TD_PARAMS.CONFIG_FLAGS.
    EXEC_CONTROLS = 66,
    /// TD_PARAMS.EPTP_CONTROLS.
    EPTP_CONTROLS = 67,
    /// TD_PARAMS.MAX_VCPUS.
    MAX_VCPUS = 68,
    /// The TDR, where no register gave it.
    TDR = 0x80,
    /// The TD's Secure-EPT as a whole.
    SEPT_TREE = 0x92,
    /// One Secure-EPT entry.
    SEPT_ENTRY = 0x93,
    /// The TD's epoch.
    TD_EPOCH = 0xa9,
    /// The TD's OP_STATE.
    OP_STATE = 0xac,
    /// A field's code.
    METADATA_FIELD = 0xb0,
    /// The table of HKIDs.
    KOT = 0xba,
});

impl Class {
    /// The status without an operand.
    #[must_use]
    pub const fn status(self) -> Status {
        self.with(0)
    }

    /// The status about an operand.
    #[must_use]
    pub const fn on(self, operand: Operand) -> Status {
        self.with(operand.0)
    }

    /// The status with a level or an OP_STATE in the operand's place.
    #[must_use]
    pub const fn with(self, detail: u32) -> Status {
        Status((self.0 as u64) << 32 | detail as u64)
    }
}

impl Status {
    /// The status that RAX holds, or `None` if that is success.
    #[must_use]
    pub const fn from_raw(rax: u64) -> Option<Self> {
        if rax == 0 { None } else { Some(Self(rax)) }
    }

    /// What RAX holds.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// What happened.
    #[must_use]
    pub const fn class(self) -> Class {
        Class((self.0 >> 32) as u32)
    }

    /// The lower 32 bits, whatever they mean for the class.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
    pub const fn detail(self) -> u32 {
        self.0 as u32
    }

    /// To which operand it happened.
    #[must_use]
    pub const fn operand(self) -> Operand {
        Operand(self.detail())
    }

    /// Whether the call did not do its work (bit 63). Without it the status is a remark, such as GPA_RANGE_ALREADY_BLOCKED.
    #[must_use]
    pub const fn is_error(self) -> bool {
        self.0 >> 63 != 0
    }

    /// Whether the same call may succeed later (an error without bit 62).
    #[must_use]
    pub const fn is_recoverable(self) -> bool {
        self.0 >> 62 & 1 == 0
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.class())?;
        match self.detail() {
            0 => Ok(()),
            detail if matches!(self.class(), Class::OP_STATE_INCORRECT) => write!(f, " (op state {detail})"),
            detail if matches!(self.class(), Class::PAGE_ALREADY_ACCEPTED | Class::PAGE_SIZE_MISMATCH) => {
                write!(f, " (level {detail})")
            }
            _ => write!(f, " ({})", self.operand()),
        }
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Status {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_whole_convert_both_ways() {
        let busy = Class::OPERAND_BUSY.on(Operand::SEPT_TREE);
        assert_eq!(busy.raw(), 0x8000_0200_0000_0092);
        assert_eq!((busy.class(), busy.operand()), (Class::OPERAND_BUSY, Operand::SEPT_TREE));
        assert!(busy.is_error() && busy.is_recoverable());
        assert_eq!(busy.to_string(), "OPERAND_BUSY (SEPT_TREE)");
        let fatal = Class::TD_FATAL.status();
        assert!(fatal.is_error() && !fatal.is_recoverable());
        assert!(!Class::GPA_RANGE_ALREADY_BLOCKED.on(Operand::RCX).is_error());
        assert_eq!(Class::OP_STATE_INCORRECT.with(2).to_string(), "OP_STATE_INCORRECT (op state 2)");
        assert_eq!(Status::from_raw(busy.raw()), Some(busy));
        assert_eq!(Status::from_raw(0), None);
        assert_eq!(Class(0x1234).to_string(), "0x1234");
    }
}
