//! A host with memory to give, and TDs at every stage of their lives.
#![allow(
    dead_code,
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "each program uses a part, and a panic is the message"
)]

use std::sync::atomic::{AtomicU64, Ordering};

use premap_tdx_module::{
    Class, Config, EntryState, Failure, Gpa, Hkid, Hpa, HpaRange, Level, LogicalProcessor, Module, Operand,
    Outcome, Package, PageInfo, Status, TDCS_PAGES, TDVPS_PAGES, TdParams,
};

pub(crate) const LP: LogicalProcessor = LogicalProcessor(0);
pub(crate) const OTHER_LP: LogicalProcessor = LogicalProcessor(1);

/// Memory that no TD can have: sources, TD_PARAMS.
const LOW: u64 = 1 << 20;
/// Memory that TDs can have.
pub(crate) const TDMR: u64 = 1 << 30;
const TDMR_BYTES: u64 = 64 << 20;
/// A page of the TDMR that is reserved.
pub(crate) const RESERVED: Hpa = Hpa::new(TDMR + TDMR_BYTES - 0x1000);

/// A machine, its module, and memory that was not given away yet.
pub(crate) struct Host {
    pub(crate) module: Module,
    next: AtomicU64,
    hkid: AtomicU64,
}

/// A TD, by the addresses of its roots.
#[derive(Clone, Debug)]
pub(crate) struct Td {
    pub(crate) tdr: Hpa,
    pub(crate) vcpus: Vec<Hpa>,
    pub(crate) hkid: Hkid,
}

/// How far a TD is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Created,
    Keyed,
    Allocated,
    Initialized,
    WithVcpu,
    Runnable,
}

pub(crate) fn range(start: u64, bytes: u64) -> HpaRange {
    HpaRange::new(Hpa::new(start), bytes).unwrap()
}

impl Host {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut Config)) -> Self {
        let tdmr = range(TDMR, TDMR_BYTES);
        let mut config = Config::new(tdmr);
        config.memory.push(range(0, LOW));
        config.reserved.push(range(RESERVED.raw(), 0x1000));
        change(&mut config);
        Self { module: Module::new(&config).unwrap(), next: AtomicU64::new(TDMR), hkid: AtomicU64::new(32) }
    }

    /// A free page.
    pub(crate) fn page(&self) -> Hpa {
        Hpa::new(self.next.fetch_add(0x1000, Ordering::Relaxed))
    }

    /// Free memory of 2 MiB.
    pub(crate) fn large(&self) -> Hpa {
        let take = |next: u64| Some(next.next_multiple_of(2 << 20) + (2 << 20));
        self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).unwrap();
        Hpa::new(self.next.load(Ordering::Relaxed) - (2 << 20))
    }

    /// A page of the host's, outside of TDMRs, filled with a byte.
    pub(crate) fn source(&self, byte: u8) -> Hpa {
        let hpa = Hpa::new(0x1_0000 + u64::from(byte) * 0x1000 % 0x8_0000);
        self.module.host_write(hpa, &[byte; 4096]).unwrap();
        hpa
    }

    /// Builds a TD up to a stage.
    pub(crate) fn td(&self, stage: Stage) -> Td {
        self.td_with(stage, &TdParams::default())
    }

    pub(crate) fn td_with(&self, stage: Stage, params: &TdParams) -> Td {
        let module = &self.module;
        let tdr = self.page();
        let hkid = Hkid(u16::try_from(self.hkid.fetch_add(1, Ordering::Relaxed)).unwrap());
        module.mng_create(tdr, hkid).unwrap();
        let mut td = Td { tdr, vcpus: Vec::new(), hkid };
        if stage >= Stage::Keyed {
            for package in 0..module.packages() {
                module.mng_key_config(tdr, Package(package)).unwrap();
            }
        }
        if stage >= Stage::Allocated {
            (0..TDCS_PAGES).for_each(|_| module.mng_addcx(self.page(), tdr).unwrap());
        }
        if stage >= Stage::Initialized {
            let address = Hpa::new(0x400);
            module.host_write(address, &params.to_bytes()).unwrap();
            module.mng_init(tdr, address).unwrap();
        }
        if stage >= Stage::WithVcpu {
            td.vcpus.push(self.vcpu(tdr, LP));
        }
        if stage >= Stage::Runnable {
            module.mr_finalize(tdr).unwrap();
        }
        td
    }

    /// Gives a TD a vCPU that is ready.
    pub(crate) fn vcpu(&self, tdr: Hpa, here: LogicalProcessor) -> Hpa {
        let tdvpr = self.page();
        self.module.vp_create(tdvpr, tdr).unwrap();
        (1..TDVPS_PAGES).for_each(|_| self.module.vp_addcx(self.page(), tdvpr).unwrap());
        self.module.vp_init(here, tdvpr, 0x1234, 7).unwrap();
        tdvpr
    }

    /// Links the tables over an address, down to the entry of a level; those that are there are left alone.
    pub(crate) fn tables(&self, tdr: Hpa, gpa: u64, level: Level) {
        for above in [Level::PML4, Level::PDPT, Level::PD] {
            if above > level
                && self.module.mem_sept_rd(at(gpa, above), tdr).unwrap().state == EntryState::Free
            {
                self.module.mem_sept_add(at(gpa, above), tdr, self.page()).unwrap();
            }
        }
    }

    /// Gives a TD a page with content, with the tables that it takes.
    pub(crate) fn add(&self, tdr: Hpa, gpa: u64, byte: u8) -> Hpa {
        self.tables(tdr, gpa, Level::PT);
        let page = self.page();
        self.module.mem_page_add(at(gpa, Level::PT), tdr, page, self.source(byte)).unwrap();
        page
    }

    /// Gives a TD a pending page, with the tables that it takes.
    pub(crate) fn aug(&self, tdr: Hpa, gpa: u64, level: Level) -> Hpa {
        self.tables(tdr, gpa, level);
        let memory = if level == Level::PT { self.page() } else { self.large() };
        self.module.mem_page_aug(at(gpa, level), tdr, memory).unwrap();
        memory
    }

    pub(crate) fn state(&self, tdr: Hpa, gpa: u64, level: Level) -> EntryState {
        self.module.mem_sept_rd(at(gpa, level), tdr).unwrap().state
    }

    /// Blocks an entry and starts the next epoch.
    pub(crate) fn block_and_track(&self, tdr: Hpa, gpa: u64, level: Level) {
        self.module.mem_range_block(at(gpa, level), tdr).unwrap();
        self.module.mem_track(tdr).unwrap();
    }
}

/// The page of a level at an address that is aligned down to it.
pub(crate) fn at(gpa: u64, level: Level) -> PageInfo {
    PageInfo::new(Gpa::new(gpa & !(level.bytes() - 1)), level)
}

/// The status of a call that was refused.
#[track_caller]
pub(crate) fn status<T: std::fmt::Debug>(outcome: Outcome<T>) -> Status {
    outcome.unwrap_err().status
}

#[track_caller]
pub(crate) fn failure<T: std::fmt::Debug>(outcome: Outcome<T>) -> Failure {
    outcome.unwrap_err()
}

pub(crate) const fn rcx(class: Class) -> Status {
    class.on(Operand::RCX)
}
