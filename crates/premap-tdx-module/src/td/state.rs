//! Life cycle and OP_STATE.

macro_rules! states {
    ($(#[$doc:meta])* $type:ident { $($(#[$state:meta])* $name:ident = $value:literal,)* } else $default:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum $type {
            $($(#[$state])* $name = $value,)*
        }

        impl $type {
            /// Every state, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            pub(crate) const fn from_raw(raw: u64) -> Self {
                match raw {
                    $($value => Self::$name,)*
                    _ => Self::$default,
                }
            }
        }
    };
}

states! {
    /// Where a TD is between its creation and its end (TDR.LIFECYCLE_STATE).
    Lifecycle {
        /// It has an HKID.
        HkidAssigned = 0,
        /// Its key is configured on every package: the only state in which it is built and runs.
        KeysConfigured = 1,
        /// No vCPU can run any more; caches may still hold its data.
        Blocked = 2,
        /// Its HKID is free, and its pages can be reclaimed.
        Teardown = 3,
    } else Teardown
}

states! {
    /// What a TD is ready for (TDCS.OP_STATE).
    OpState {
        /// MNG.INIT was not called.
        Uninitialized = 0,
        /// Pages are added and measured.
        Initialized = 1,
        /// It can run.
        Runnable = 2,
        /// It runs while it is exported.
        LiveExport = 3,
        /// It is paused for the export.
        PausedExport = 4,
        /// It was exported.
        PostExport = 5,
        /// Its memory is imported.
        MemoryImport = 6,
        /// Its state is imported.
        StateImport = 7,
        /// It was imported.
        PostImport = 8,
        /// It runs while it is imported.
        LiveImport = 9,
        /// Its import failed.
        FailedImport = 10,
    } else Uninitialized
}

impl OpState {
    /// Whether vCPUs may be running, so that what is removed must be blocked and tracked first.
    pub(crate) const fn needs_tracking(self) -> bool {
        matches!(self, Self::Runnable | Self::LiveExport | Self::LiveImport)
    }
}

/// A set of OP_STATEs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpStates(u16);

impl OpStates {
    /// The states of these numbers.
    pub(crate) const fn of(numbers: &[u8]) -> Self {
        let (mut set, mut rest) = (0, numbers);
        while let [first, tail @ ..] = rest {
            set |= 1 << *first;
            rest = tail;
        }
        Self(set)
    }

    /// Whether the state is one of the set.
    #[must_use]
    pub const fn contain(self, state: OpState) -> bool {
        self.0 >> state as u8 & 1 != 0
    }
}
