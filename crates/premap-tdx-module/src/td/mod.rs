//! A TD and its vCPUs: what their control structures say.
//!
//! ```text
//!  life cycle:  HKID assigned --KEY.CONFIG on every package--> keys configured --VPFLUSHDONE--> blocked --KEY.FREEID--> teardown
//!  OP_STATE:                     uninitialized --MNG.INIT--> initialized --MR.FINALIZE--> runnable
//! ```
//!
//! A `Td` belongs to the page that is its TDR, a `Vcpu` to its TDVPR: each such page keeps one for good, and a new TD
//! or vCPU in it starts it over. So finding a TD is finding its page.

mod admit;
mod params;
mod state;
mod vcpu;

use std::sync::{Mutex, OnceLock};

use premap_address::Pfn;
use premap_tdx::{Digest, Mrtd};

use crate::locks::Sharex;
use crate::operand::Level;
use crate::status::{Class, Status};
use crate::stripes::Striped;
use crate::sync::{Field, Ordering};
use crate::tlb::Epochs;

pub(crate) use admit::{Admitted, unclaimable};
pub use params::{BadParams, TdParams};
pub use state::{Lifecycle, OpState, OpStates};
pub(crate) use vcpu::{NO_PROCESSOR, Vcpu};

/// How many TDCX pages a TD needs at least (TDCS_BASE_SIZE in 4 KiB pages).
pub const TDCS_PAGES: u64 = 6;
/// How many it may have.
pub(crate) const MAX_TDCS_PAGES: u64 = 9;
/// Which TDCX page is the Secure-EPT's root.
pub(crate) const ROOT_TDCX: u64 = 3;
/// How many pages a vCPU needs at least, its TDVPR included (TDVPS_BASE_SIZE in 4 KiB pages).
pub const TDVPS_PAGES: u64 = 6;
/// How many it may have.
pub(crate) const MAX_TDVPS_PAGES: u64 = 15;

/// What a page is the root of, once it ever was.
#[derive(Debug, Default)]
pub(crate) struct Control {
    td: OnceLock<Box<Td>>,
    vcpu: OnceLock<Box<Vcpu>>,
}

impl Control {
    /// The TD of a page that is a TDR.
    #[inline]
    pub(crate) fn td(&self) -> Option<&Td> {
        self.td.get().map(|td| &**td)
    }

    /// The TD of a page that becomes a TDR.
    pub(crate) fn td_to_be(&self) -> &Td {
        self.td.get_or_init(|| Box::new(Td::new()))
    }

    /// The vCPU of a page that is a TDVPR.
    pub(crate) fn vcpu(&self) -> Option<&Vcpu> {
        self.vcpu.get().map(|vcpu| &**vcpu)
    }

    /// The vCPU of a page that becomes a TDVPR.
    pub(crate) fn vcpu_to_be(&self) -> &Vcpu {
        self.vcpu.get_or_init(|| Box::new(Vcpu::new()))
    }
}

/// The measurement of what is added.
#[derive(Debug, Default)]
pub(crate) enum Measured {
    #[default]
    Not,
    Running(Box<Mrtd>),
    Final(Digest),
}

/// A TD. Fields other than locks and counters change only under the TDR's lock held alone.
#[derive(Debug)]
pub(crate) struct Td {
    /// The TDR's lock.
    pub(crate) lock: Sharex,
    pub(crate) op_state_lock: Sharex,
    /// The lock of the Secure-EPT as a whole.
    pub(crate) tree: Sharex,
    /// Walks by hosts that are under way.
    pub(crate) walks: Striped,
    /// CHLDCNT: 4 KiB pages that the TD has, its TDR left out.
    pub(crate) children: Striped,
    pub(crate) epochs: Epochs,
    lifecycle: Field,
    op_state: Field,
    fatal: Field,
    pub(crate) hkid: Field,
    /// A bit for each package on which the key is configured.
    pub(crate) packages: Field,
    pub(crate) tdcx: Field,
    root: Field,
    pub(crate) vcpus: Field,
    /// vCPUs that are associated with a logical processor.
    pub(crate) associated: Field,
    /// PWL, as the level of the root's entries.
    top: Field,
    wide: Field,
    pub(crate) params: Mutex<TdParams>,
    pub(crate) measured: Mutex<Measured>,
}

impl Td {
    fn new() -> Self {
        let field = || Field::new(0);
        Self {
            lock: Sharex::new(),
            op_state_lock: Sharex::new(),
            tree: Sharex::new(),
            walks: Striped::new(),
            children: Striped::new(),
            epochs: Epochs::new(),
            lifecycle: field(),
            op_state: field(),
            fatal: field(),
            hkid: field(),
            packages: field(),
            tdcx: field(),
            root: field(),
            vcpus: field(),
            associated: field(),
            top: field(),
            wide: field(),
            params: Mutex::default(),
            measured: Mutex::default(),
        }
    }

    /// Starts over as a new TD with this key. The caller has the lock alone.
    pub(crate) fn restart(&self, hkid: u16) {
        self.children.reset();
        self.epochs.reset();
        for field in [&self.fatal, &self.packages, &self.tdcx, &self.root, &self.vcpus, &self.associated] {
            field.store(0, Ordering::Relaxed);
        }
        self.hkid.store(hkid.into(), Ordering::Relaxed);
        self.set_lifecycle(Lifecycle::HkidAssigned);
        self.set_op_state(OpState::Uninitialized);
        *exclusive(&self.measured) = Measured::Not;
    }

    pub(crate) fn lifecycle(&self) -> Lifecycle {
        Lifecycle::from_raw(self.lifecycle.load(Ordering::Acquire))
    }

    pub(crate) fn set_lifecycle(&self, lifecycle: Lifecycle) {
        self.lifecycle.store(lifecycle as u64, Ordering::Release);
    }

    #[inline]
    pub(crate) fn op_state(&self) -> OpState {
        OpState::from_raw(self.op_state.load(Ordering::Acquire))
    }

    pub(crate) fn set_op_state(&self, state: OpState) {
        self.op_state.store(state as u64, Ordering::Release);
    }

    pub(crate) fn is_fatal(&self) -> bool {
        self.fatal.load(Ordering::Acquire) != 0
    }

    #[cfg(feature = "inject")]
    pub(crate) fn set_fatal(&self) {
        self.fatal.store(1, Ordering::Release);
    }

    pub(crate) fn set_root(&self, root: Pfn) {
        self.root.store(root.number(), Ordering::Release);
    }

    /// The Secure-EPT's root.
    #[inline]
    pub(crate) fn root(&self) -> Pfn {
        Pfn::new(self.root.load(Ordering::Acquire))
    }

    /// Takes over what MNG.INIT read.
    pub(crate) fn configure(&self, params: TdParams) {
        self.top.store(params.top_level().raw().into(), Ordering::Release);
        self.wide.store(params.gpaw.into(), Ordering::Release);
        *exclusive(&self.params) = params;
    }

    /// The level of the root's entries.
    #[inline]
    pub(crate) fn top_level(&self) -> Level {
        if self.top.load(Ordering::Acquire) == u64::from(Level::PML5.raw()) {
            Level::PML5
        } else {
            Level::PML4
        }
    }

    /// Whether the address is a private one: neither the shared bit nor one above it set.
    #[inline]
    pub(crate) fn is_private(&self, gpa: premap_address::Gpa) -> bool {
        let shared_bit = if self.wide.load(Ordering::Acquire) == 0 { 47 } else { 51 };
        gpa.raw() >> shared_bit == 0
    }

    /// Whether the TD is alive and has its keys.
    ///
    /// # Errors
    /// TD_FATAL; TD_KEYS_NOT_CONFIGURED.
    #[inline]
    pub(crate) fn check_keys(&self) -> Result<(), Status> {
        if self.is_fatal() {
            Err(Class::TD_FATAL.status())
        } else if self.lifecycle() != Lifecycle::KeysConfigured {
            Err(Class::TD_KEYS_NOT_CONFIGURED.status())
        } else {
            Ok(())
        }
    }

    /// Whether the TD has its control pages too.
    ///
    /// # Errors
    /// As for [`check_keys`](Self::check_keys); TDCS_NOT_ALLOCATED.
    #[inline]
    pub(crate) fn check_built(&self) -> Result<(), Status> {
        self.check_keys()?;
        if self.tdcx.load(Ordering::Acquire) < TDCS_PAGES {
            return Err(Class::TDCS_NOT_ALLOCATED.status());
        }
        Ok(())
    }

    /// The MRTD: what it is so far, or for good.
    pub(crate) fn mrtd(&self) -> Digest {
        match &*exclusive(&self.measured) {
            Measured::Not => Digest([0; Digest::LEN]),
            Measured::Running(mrtd) => mrtd.so_far().mrtd,
            Measured::Final(digest) => *digest,
        }
    }
}

/// What a mutex holds. Its holder never panics, and where one did, the value is whole: it is replaced, never edited in part.
pub(crate) fn exclusive<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
