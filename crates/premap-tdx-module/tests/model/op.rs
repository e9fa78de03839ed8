//! What a sequence is made of.

/// A call. Numbers are taken modulo what there is.
#[derive(Clone, Debug)]
#[cfg_attr(fuzzing, derive(arbitrary::Arbitrary))]
pub(crate) enum Op {
    Create {
        td: u8,
    },
    KeyConfig {
        td: u8,
    },
    Addcx {
        td: u8,
        page: u16,
    },
    Init {
        td: u8,
    },
    VpCreate {
        td: u8,
        page: u16,
    },
    VpAddcx {
        vcpu: u8,
        page: u16,
    },
    VpInit {
        vcpu: u8,
        processor: u8,
    },
    VpFlush {
        vcpu: u8,
        processor: u8,
    },
    Enter {
        vcpu: u8,
        processor: u8,
        act: Act,
    },
    SeptAdd {
        td: u8,
        gpa: u16,
        level: u8,
        page: u16,
    },
    SeptRemove {
        td: u8,
        gpa: u16,
        level: u8,
    },
    Add {
        td: u8,
        gpa: u16,
        page: u16,
    },
    Aug {
        td: u8,
        gpa: u16,
        level: u8,
        page: u16,
    },
    Relocate {
        td: u8,
        gpa: u16,
        page: u16,
    },
    Promote {
        td: u8,
        gpa: u16,
        level: u8,
    },
    Demote {
        td: u8,
        gpa: u16,
        level: u8,
        page: u16,
    },
    Remove {
        td: u8,
        gpa: u16,
        level: u8,
    },
    Block {
        td: u8,
        gpa: u16,
        level: u8,
    },
    Unblock {
        td: u8,
        gpa: u16,
        level: u8,
    },
    Track {
        td: u8,
    },
    Extend {
        td: u8,
        gpa: u16,
    },
    Finalize {
        td: u8,
    },
    VpFlushDone {
        td: u8,
    },
    FreeId {
        td: u8,
    },
    Reclaim {
        page: u16,
    },
    /// Fills a table with the pages of a large one.
    Fill {
        td: u8,
        gpa: u16,
        page: u16,
    },
    /// Builds a TD as far as it goes.
    Build {
        td: u8,
    },
    /// Blocks and tracks.
    Quiet {
        td: u8,
        gpa: u16,
        level: u8,
    },
    /// Ends a TD and reclaims all that it has.
    End {
        td: u8,
    },
}

/// What a guest does.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(fuzzing, derive(arbitrary::Arbitrary))]
pub(crate) enum Act {
    Accept {
        gpa: u16,
        level: u8,
    },
    Write {
        gpa: u16,
    },
    /// The host blocks, tracks and removes while the guest runs.
    Removed {
        gpa: u16,
    },
}
