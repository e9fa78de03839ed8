//! A TD's beginning and the end of its building: the commands on the VM.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use kvm_bindings::kvm_cpuid_entry2;
use premap_address::Hpa;
use premap_kvm::Errno;
use premap_kvm::tdx::{TdxError, kvm_tdx_init_vm};
use premap_mmu::{Levels, PageTable, SecureEpt};
use premap_tdx::Digest;
use premap_tdx_module::seamcall::Package;
use premap_tdx_module::{Class, Hkid, TDCS_PAGES, TdParams};

use super::errors::{insist, refused};
use super::host::TdxHost;
use super::mirror::Secure;
use super::reservations::Reservations;
use super::{PAGE_BYTES, lock};
use crate::frames::Frames;

/// The mirror of a Secure-EPT.
pub(super) type Table = PageTable<SecureEpt, Arc<Frames>, Secure>;

/// What KVM keeps of a TD.
#[derive(Debug)]
pub(crate) struct Td {
    pub(super) host: Arc<TdxHost>,
    pub(super) built: OnceLock<Built>,
    pub(super) reservations: Reservations,
    /// Held by commands that change what the TD is: KVM's `tdx_vm_state_guard`.
    state: Mutex<()>,
}

/// A TD that the module knows.
#[derive(Debug)]
pub(super) struct Built {
    pub(super) tdr: Hpa,
    pub(super) key: Hkid,
    pub(super) table: Table,
    /// CPUID as the VMM set it.
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    /// Pages of the TD's and its vCPUs' control structures, the TDR left out.
    pub(super) control: Mutex<Vec<Hpa>>,
}

impl Built {
    pub(super) fn keep(&self, page: Hpa) {
        lock(&self.control).push(page);
    }

    pub(super) fn secure(&self) -> &Secure {
        self.table.mirror()
    }
}

impl Td {
    pub(crate) fn new(host: Arc<TdxHost>) -> Self {
        Self { host, built: OnceLock::new(), reservations: Reservations::default(), state: Mutex::default() }
    }

    pub(super) fn guard(&self) -> MutexGuard<'_, ()> {
        lock(&self.state)
    }

    /// The TD, once `KVM_TDX_INIT_VM` made it.
    pub(super) fn built(&self) -> Result<&Built, Errno> {
        self.built.get().ok_or(Errno::INVAL)
    }

    /// Whether `KVM_TDX_INIT_VM` was done.
    pub(crate) fn is_initialised(&self) -> bool {
        self.built.get().is_some()
    }

    /// Whether the TD can run.
    pub(crate) fn is_runnable(&self) -> bool {
        self.built.get().is_some_and(|built| built.secure().is_runnable())
    }

    /// Pages that the mirror maps.
    pub(crate) fn pages(&self) -> u64 {
        self.built.get().map_or(0, |built| built.table.leaves().pages())
    }

    /// The measurement so far, or for good once the TD is finalized.
    pub(crate) fn mrtd(&self) -> Result<Digest, Errno> {
        let built = self.built()?;
        insist(|| self.host.module.mng_rd_mrtd(built.tdr)).map_err(|_| Errno::IO)
    }

    /// `KVM_TDX_INIT_VM`.
    pub(super) fn init_vm(&self, init: &kvm_tdx_init_vm, most_vcpus: u16) -> Result<(), TdxError> {
        let _changing = self.guard();
        if self.is_initialised() || init.reserved != [0; 12] {
            return Err(Errno::INVAL.into());
        }
        if init.cpuid.nent as usize > init.cpuid.entries.len() {
            return Err(Errno::TOOBIG.into());
        }
        let bytes =
            |words: [u64; 6]| -> [u8; 48] { std::array::from_fn(|at| words[at / 8].to_le_bytes()[at % 8]) };
        let params = TdParams {
            attributes: init.attributes,
            xfam: init.xfam,
            max_vcpus: most_vcpus,
            mrconfigid: bytes(init.mrconfigid),
            mrowner: bytes(init.mrowner),
            mrownerconfig: bytes(init.mrownerconfig),
            ..TdParams::default()
        };
        let mut built = self.create(&params)?;
        built.cpuid.extend(init.cpuid.entries.iter().take(init.cpuid.nent as usize));
        self.built.set(built).map_err(|_| Errno::INVAL.into())
    }

    /// A TD with a key, configured; or nothing of it is left.
    fn create(&self, params: &TdParams) -> Result<Built, TdxError> {
        let host = &self.host;
        let key = host.take_key()?;
        let tdr = host.allocate().inspect_err(|_| host.return_key(key))?;
        let secure = Secure::new(Arc::clone(host), tdr);
        let table = Table::with_mirror(Arc::default(), Levels::Four, secure);
        let created = insist(|| host.module.mng_create(tdr, key));
        let (Ok(table), Ok(())) = (table, created) else {
            host.free(tdr);
            host.return_key(key);
            return Err(created.map_or_else(|failure| refused(&failure), |()| Errno::NOMEM.into()));
        };
        let built = Built { tdr, key, table, cpuid: Vec::new(), control: Mutex::default() };
        match self.configure(&built, params) {
            Ok(()) => Ok(built),
            Err(error) => {
                self.take_apart(built);
                Err(error)
            }
        }
    }

    /// KEY.CONFIG, ADDCX, INIT.
    fn configure(&self, built: &Built, params: &TdParams) -> Result<(), TdxError> {
        let (host, module, tdr) = (&self.host, &self.host.module, built.tdr);
        for package in 0..module.packages() {
            insist(|| module.mng_key_config(tdr, Package(package))).map_err(|failure| refused(&failure))?;
        }
        for _ in 0..TDCS_PAGES {
            let page = host.allocate()?;
            let added = insist(|| module.mng_addcx(page, tdr)).inspect_err(|_| host.free(page));
            added.map_err(|failure| refused(&failure))?;
            built.keep(page);
        }
        let source = host.allocate()?;
        let mut page = [0; PAGE_BYTES];
        page[..TdParams::BYTES].copy_from_slice(&params.to_bytes());
        module.host_write(source, &page).map_err(|_| Errno::IO)?;
        let initialised = insist(|| module.mng_init(tdr, source));
        host.free(source);
        initialised.map_err(|failure| {
            let errno = if failure.class() == Class::OPERAND_INVALID { Errno::INVAL } else { Errno::IO };
            TdxError { errno, hw_error: failure.status.raw() }
        })
    }

    /// `KVM_TDX_FINALIZE_VM`.
    pub(super) fn finalize(&self) -> Result<(), TdxError> {
        let _changing = self.guard();
        let built = self.built()?;
        if built.secure().is_runnable() || self.reservations.count() > 0 {
            return Err(Errno::INVAL.into());
        }
        match self.host.module.mr_finalize(built.tdr) {
            Ok(()) => {
                built.secure().set_runnable();
                Ok(())
            }
            // No vCPU was initialised: not ready.
            Err(failure) if failure.class() == Class::NO_VCPUS => {
                Err(TdxError { errno: Errno::INVAL, hw_error: failure.status.raw() })
            }
            Err(failure) => Err(refused(&failure)),
        }
    }
}
