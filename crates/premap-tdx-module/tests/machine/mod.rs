//! A machine small enough for a model: 32 pages, tables of four entries.
#![allow(clippy::allow_attributes, clippy::unwrap_used, reason = "in a test the panic is the message")]

use loom::sync::Arc;
use loom::thread;
use premap_tdx_module::{
    Class, Config, Gpa, Hkid, Hpa, HpaRange, Level, LogicalProcessor, Module, Operand, Outcome, Package,
    PageInfo, PageType, Status, TDCS_PAGES, TDVPS_PAGES, TdParams,
};

pub(crate) const TDMR: u64 = 0x10_0000;
pub(crate) const LP: LogicalProcessor = LogicalProcessor(0);

/// A machine with one TD, initialised, with tables down to the first pages.
pub(crate) struct Machine {
    pub(crate) module: Module,
    pub(crate) next: u64,
}

pub(crate) const TDR: Hpa = Hpa::new(TDMR);

pub(crate) fn at(gpa: u64, level: Level) -> PageInfo {
    PageInfo::new(Gpa::new(gpa), level)
}

pub(crate) fn page(gpa: u64) -> PageInfo {
    at(gpa, Level::PT)
}

impl Machine {
    pub(crate) fn new() -> Self {
        let range = |start, bytes| HpaRange::new(Hpa::new(start), bytes).unwrap();
        let mut config = Config::new(range(TDMR, 32 << 12));
        config.memory.push(range(0, 2 << 12));
        let mut machine = Self { module: Module::new(&config).unwrap(), next: TDMR };
        machine.td(40);
        machine
    }

    pub(crate) fn page(&mut self) -> Hpa {
        self.next += 0x1000;
        Hpa::new(self.next - 0x1000)
    }

    pub(crate) fn td(&mut self, hkid: u16) -> Hpa {
        let tdr = self.page();
        self.module.mng_create(tdr, Hkid(hkid)).unwrap();
        self.module.mng_key_config(tdr, Package(0)).unwrap();
        for _ in 0..TDCS_PAGES {
            let page = self.page();
            self.module.mng_addcx(page, tdr).unwrap();
        }
        self.module.host_write(Hpa::new(0), &TdParams::default().to_bytes()).unwrap();
        self.module.mng_init(tdr, Hpa::new(0)).unwrap();
        for level in [Level::PML4, Level::PDPT, Level::PD] {
            let table = self.page();
            self.module.mem_sept_add(at(0, level), tdr, table).unwrap();
        }
        tdr
    }

    pub(crate) fn vcpu(&mut self) -> Hpa {
        let tdvpr = self.page();
        self.module.vp_create(tdvpr, TDR).unwrap();
        for _ in 1..TDVPS_PAGES {
            let page = self.page();
            self.module.vp_addcx(page, tdvpr).unwrap();
        }
        self.module.vp_init(LP, tdvpr, 0, 0).unwrap();
        tdvpr
    }
}

pub(crate) fn model(run: impl Fn() + Sync + Send + 'static) {
    model_with(3, run);
}

/// A model with fewer preemptions, for more threads.
pub(crate) fn model_with(preemptions: usize, run: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 100_000;
    builder.preemption_bound = Some(builder.preemption_bound.unwrap_or(preemptions).min(preemptions));
    builder.check(run);
}

/// Makes two calls side by side.
pub(crate) fn both<A: Send + 'static, B>(
    module: &Arc<Module>,
    one: impl FnOnce(&Module) -> A + Send + 'static,
    other: impl FnOnce(&Module) -> B,
) -> (A, B) {
    let shared = module.clone();
    let thread = thread::spawn(move || one(&shared));
    let second = other(module);
    (thread.join().unwrap(), second)
}

pub(crate) fn status<T>(outcome: Outcome<T>) -> Result<T, Status> {
    outcome.map_err(|failure| failure.status)
}

pub(crate) fn busy(operand: Operand) -> Status {
    Class::OPERAND_BUSY.on(operand)
}

pub(crate) fn kind(module: &Module, page: Hpa) -> PageType {
    module.page_record(page.frame()).unwrap().kind
}

/// The TD's pages, counted one by one, are as many as it says.
pub(crate) fn check_count(module: &Module) {
    let owned = |frame: &u64| {
        let record = module.page_record(premap_tdx_module::Pfn::new(*frame)).unwrap();
        record.owner == Some(TDR.frame())
    };
    let pages = (TDMR >> 12..(TDMR >> 12) + 32).filter(owned).count() as u64;
    assert_eq!(module.child_count(TDR), Ok(pages));
}
