//! A TD's vCPUs: made, entered, left at every EPT violation, and flushed when they go.

use std::ops::AddAssign;
use std::sync::Arc;

use premap_address::{Gfn, Gpa, GpaRange, Hpa, PAGE_SIZE};
use premap_kvm::Errno;
use premap_kvm::tdx::TdxError;
use premap_tdx_module::{Class, Guest, LogicalProcessor, PageInfo, Stop, TDVPS_PAGES};

use super::build::Td;
use super::errors::{insist, is_busy, refused};
use super::host::TdxHost;
use crate::private::Kind;
use crate::vcpu::{GuestFault, SoftVcpu};

/// The shared bit of a guest-physical address, as GPAW 0 has it: without it, an address is private.
pub(crate) const SHARED_BIT: u32 = 47;

/// Whether no address of a range has the shared bit, or one above.
pub(super) fn is_private(range: GpaRange) -> bool {
    range.end().raw() <= 1 << SHARED_BIT
}

/// What the module has of a vCPU.
#[derive(Debug)]
pub(crate) struct TdCpu {
    host: Arc<TdxHost>,
    tdvpr: Hpa,
    /// The processor that it runs on, which is its own.
    here: LogicalProcessor,
}

/// What a guest's ACCEPT of a range came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Pages that it accepted.
    pub pages: u64,
    /// Pages that were the TD's already, added before it started.
    pub already: u64,
}

impl AddAssign for Accepted {
    fn add_assign(&mut self, other: Self) {
        self.pages += other.pages;
        self.already += other.already;
    }
}

impl Td {
    /// VP.CREATE, ADDCX, INIT: `KVM_TDX_INIT_VCPU`.
    pub(super) fn create_vcpu(&self, id: u32, rcx: u64) -> Result<TdCpu, TdxError> {
        let _changing = self.guard();
        let built = self.built()?;
        if built.secure().is_runnable() {
            return Err(Errno::INVAL.into());
        }
        let module = &self.host.module;
        let tdvpr = self.host.allocate()?;
        let created = insist(|| module.vp_create(tdvpr, built.tdr)).inspect_err(|_| self.host.free(tdvpr));
        created.map_err(|failure| refused(&failure))?;
        built.keep(tdvpr);
        for _ in 1..TDVPS_PAGES {
            let page = self.host.allocate()?;
            let added = insist(|| module.vp_addcx(page, tdvpr)).inspect_err(|_| self.host.free(page));
            added.map_err(|failure| refused(&failure))?;
            built.keep(page);
        }
        let here = LogicalProcessor(id);
        insist(|| module.vp_init(here, tdvpr, rcx, id)).map_err(|failure| refused(&failure))?;
        Ok(TdCpu { host: Arc::clone(&self.host), tdvpr, here })
    }
}

impl Drop for TdCpu {
    fn drop(&mut self) {
        let flushed = insist(|| self.host.module.vp_flush(self.here, self.tdvpr));
        debug_assert!(flushed.is_ok(), "{flushed:?}");
    }
}

impl SoftVcpu {
    /// The TD's guest accepts every page of a range, 4 KiB at a time: TDG.MEM.PAGE.ACCEPT. Each page that the host has not
    /// given yet costs an exit.
    ///
    /// # Errors
    /// No TD, one that can't run, an address that is not private, or memory that the host can't give.
    pub fn accept(&mut self, range: GpaRange) -> Result<Accepted, GuestFault> {
        let mut accepted = Accepted::default();
        let mut next = range.start();
        self.run_td(range.start(), |guest, leave| {
            while next < range.end() && !leave() {
                match guest.accept(PageInfo::page(next)) {
                    Ok(()) => accepted.pages += 1,
                    Err(Stop::Status(status)) if status.class() == Class::PAGE_ALREADY_ACCEPTED => {
                        accepted.already += 1;
                    }
                    Err(stop) => return Err(stop),
                }
                next = next.wrapping_add(PAGE_SIZE);
            }
            Ok((next >= range.end()).then_some(()))
        })?;
        Ok(accepted)
    }

    /// The TD's guest reads or writes a word of private memory; gives the word as it is then.
    pub(crate) fn access_private(&mut self, gpa: Gpa, write: Option<u64>) -> Result<u64, GuestFault> {
        self.run_td(gpa, |guest, _| {
            let mut bytes = [0; 8];
            match write {
                Some(value) => {
                    bytes = value.to_le_bytes();
                    guest.write(gpa, &bytes)?;
                }
                None => guest.read(gpa, &mut bytes)?,
            }
            Ok(Some(u64::from_le_bytes(bytes)))
        })
    }

    /// Runs the guest's program, which gives `None` where it left early, until it is done; serves its exits. `gpa` is where
    /// errors are told of.
    fn run_td<R>(
        &mut self,
        gpa: Gpa,
        mut program: impl FnMut(&Guest<'_>, &dyn Fn() -> bool) -> Result<Option<R>, Stop>,
    ) -> Result<R, GuestFault> {
        let machine = Arc::clone(&self.machine);
        let failed = |errno| GuestFault::Failed { gpa, errno };
        let td = machine.td().map_err(failed)?;
        let secure = td.built().map_err(failed)?.secure();
        self.clear_memory_fault();
        loop {
            machine.check_alive().map_err(failed)?;
            let cpu = self.td.as_ref().ok_or(failed(Errno::INVAL))?;
            let leave = || secure.wants_exits();
            let entered = cpu.host.module.vp_enter(cpu.here, cpu.tdvpr, |guest| program(guest, &leave));
            match entered {
                Ok(Ok(Some(result))) => return Ok(result),
                // It left for a change that waits for it.
                Ok(Ok(None)) => std::thread::yield_now(),
                Ok(Err(Stop::Exit(violation))) => {
                    self.counters.exits += 1;
                    self.counters.pf_taken += 1;
                    let at = violation.gpa;
                    self.give_page(at.frame()).map_err(|errno| GuestFault::Failed { gpa: at, errno })?;
                }
                // Another vCPU or the host has the entry: a guest tries again.
                Ok(Err(Stop::Status(status)))
                    if matches!(status.class(), Class::OPERAND_BUSY | Class::OPERAND_BUSY_HOST_PRIORITY) =>
                {
                    std::thread::yield_now();
                }
                Ok(Err(Stop::Status(_))) => return Err(failed(Errno::INVAL)),
                Err(failure) if is_busy(&failure) => std::thread::yield_now(),
                Err(failure) => return Err(failed(refused(&failure).errno)),
            }
        }
    }

    /// Gives the TD the page that its guest touched.
    fn give_page(&mut self, gfn: Gfn) -> Result<(), Errno> {
        let machine = Arc::clone(&self.machine);
        let td = machine.td()?;
        loop {
            let _reading = machine.slots.enter();
            let slots = machine.slots.current();
            let sequence = machine.invalidations.snapshot();
            let slot = slots.find(self.space(), gfn).filter(|_| machine.kind_of(gfn, 1).0 == Kind::Private);
            let private = slot.and_then(|slot| slot.private.as_ref()).filter(|private| !private.is_closed());
            if private.is_none() {
                return self.exit_for(gfn, Kind::Private, Errno::FAULT);
            }
            let page = gfn..Gfn::new(gfn.number() + 1);
            if td.augment(gfn, 1, || machine.invalidations.allows(sequence, &page))? > 0 {
                self.counters.pf_fixed += 1;
                return Ok(());
            }
            std::thread::yield_now();
        }
    }
}
