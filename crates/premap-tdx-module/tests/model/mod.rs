//! Any sequence of calls, and what must hold after each: PAMT, Secure-EPT and child counts agree.
//!
//! Used by a property test and by a fuzz target. Nothing is foretold of a call's status here; what is checked is what no call,
//! made or refused, may break.
#![allow(
    dead_code,
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is the message"
)]

mod check;
mod op;

use std::collections::BTreeMap;

use premap_tdx_module::{
    Config, Gpa, Hkid, Hpa, HpaRange, Level, LogicalProcessor, Module, Package, PageInfo, TDVPS_PAGES,
    TdParams,
};

pub(crate) use op::{Act, Op};

const TDMR: u64 = 1 << 21;
/// 2 MiB of single pages, and a few large ones.
const PAGES: u64 = 512 * (1 + LARGE);
const LARGE: u64 = 3;
const SOURCE: Hpa = Hpa::new(0x1000);
const PARAMS: Hpa = Hpa::new(0x400);
const TDS: u8 = 2;

pub(crate) struct Model {
    module: Module,
    vcpus: Vec<Hpa>,
    fresh: u64,
    /// What a guest wrote where, by its TD's root.
    written: BTreeMap<(Hpa, u64), u64>,
    stamp: u64,
}

fn page(number: u16) -> Hpa {
    // Half of the numbers are large pages' beginnings.
    let number = u64::from(number);
    let frame = if number.is_multiple_of(2) { number / 2 % 512 } else { 512 * (1 + number / 2 % LARGE) };
    Hpa::new(TDMR + frame * 4096)
}

/// Few addresses, so that calls meet: two pages of each of two tables, in two directories.
fn gpa(number: u16) -> u64 {
    let number = u64::from(number);
    (number & 1) << 39 | (number >> 1 & 1) << 21 | (number >> 2 & 1) << 12
}

fn at(number: u16, level: u8) -> PageInfo {
    let level = Level::new(level % 4).expect("below 4");
    PageInfo::new(Gpa::new(gpa(number) & !(level.bytes() - 1)), level)
}

impl Model {
    pub(crate) fn new() -> Self {
        let range = |start, bytes| HpaRange::new(Hpa::new(start), bytes).expect("a range");
        let mut config = Config::new(range(TDMR, PAGES * 4096));
        config.memory.push(range(0, 1 << 20));
        let module = Module::new(&config).expect("a machine");
        module.host_write(PARAMS, &TdParams::default().to_bytes()).expect("memory");
        module.host_write(SOURCE, &[7; 4096]).expect("memory");
        Self { module, vcpus: Vec::new(), fresh: 256, written: BTreeMap::new(), stamp: 0 }
    }

    /// The root of a TD: one of the first pages.
    fn tdr(td: u8) -> Hpa {
        Hpa::new(TDMR + u64::from(td % TDS) * 4096)
    }

    fn vcpu(&self, number: u8) -> Hpa {
        if self.vcpus.is_empty() {
            Hpa::new(TDMR)
        } else {
            self.vcpus[usize::from(number) % self.vcpus.len()]
        }
    }

    /// A page that was perhaps not used before.
    fn fresh(&mut self) -> Hpa {
        self.fresh = if self.fresh == 511 { 256 } else { self.fresh + 1 };
        Hpa::new(TDMR + self.fresh * 4096)
    }

    /// Makes a call, and checks what must hold.
    pub(crate) fn apply(&mut self, op: &Op) {
        self.call(op);
        self.check();
    }

    fn call(&mut self, op: &Op) {
        let module = &self.module;
        let tdr = Self::tdr;
        match *op {
            Op::Create { td } => ignore(module.mng_create(tdr(td), Hkid(40 + u16::from(td % TDS)))),
            Op::KeyConfig { td } => ignore(module.mng_key_config(tdr(td), Package(0))),
            Op::Addcx { td, page: with } => ignore(module.mng_addcx(page(with), tdr(td))),
            Op::Init { td } => ignore(module.mng_init(tdr(td), PARAMS)),
            Op::VpCreate { td, page: with } => {
                if module.vp_create(page(with), tdr(td)).is_ok() {
                    self.vcpus.push(page(with));
                }
            }
            Op::VpAddcx { vcpu, page: with } => ignore(module.vp_addcx(page(with), self.vcpu(vcpu))),
            Op::VpInit { vcpu, processor } => ignore(module.vp_init(lp(processor), self.vcpu(vcpu), 0, 0)),
            Op::VpFlush { vcpu, processor } => ignore(module.vp_flush(lp(processor), self.vcpu(vcpu))),
            Op::Enter { vcpu, processor, act } => self.enter(self.vcpu(vcpu), lp(processor), act),
            Op::SeptAdd { td, gpa, level, page: with } => {
                ignore(module.mem_sept_add(at(gpa, level), tdr(td), page(with)));
            }
            Op::SeptRemove { td, gpa, level } => ignore(module.mem_sept_remove(at(gpa, level), tdr(td))),
            Op::Add { td, gpa, page: with } => {
                ignore(module.mem_page_add(at(gpa, 0), tdr(td), page(with), SOURCE));
            }
            Op::Aug { td, gpa, level, page: with } => {
                ignore(module.mem_page_aug(at(gpa, level % 2), tdr(td), page(with)));
            }
            Op::Relocate { td, gpa, page: with } => {
                ignore(module.mem_page_relocate(at(gpa, 0), tdr(td), page(with)));
            }
            Op::Promote { td, gpa, level } => ignore(module.mem_page_promote(at(gpa, level), tdr(td))),
            Op::Demote { td, gpa, level, page: with } => {
                ignore(module.mem_page_demote(at(gpa, level), tdr(td), page(with)));
            }
            Op::Remove { td, gpa, level } => self.remove(tdr(td), at(gpa, level)),
            Op::Block { td, gpa, level } => ignore(module.mem_range_block(at(gpa, level), tdr(td))),
            Op::Unblock { td, gpa, level } => ignore(module.mem_range_unblock(at(gpa, level), tdr(td))),
            Op::Track { td } => ignore(module.mem_track(tdr(td))),
            Op::Extend { td, gpa: of } => ignore(module.mr_extend(Gpa::new(gpa(of)), tdr(td))),
            Op::Finalize { td } => ignore(module.mr_finalize(tdr(td))),
            Op::VpFlushDone { td } => ignore(module.mng_vpflushdone(tdr(td))),
            Op::FreeId { td } => ignore(module.mng_key_freeid(tdr(td))),
            Op::Reclaim { page: of } => {
                if module.phymem_page_reclaim(page(of)).is_ok() {
                    self.written.retain(|(root, _), _| *root != page(of));
                    self.vcpus.retain(|vcpu| *vcpu != page(of));
                }
            }
            Op::Fill { td, gpa: of, page: with } => self.fill(tdr(td), gpa(of), page(with | 1)),
            Op::Build { td } => self.build(td),
            Op::Quiet { td, gpa, level } => {
                ignore(module.mem_range_block(at(gpa, level), tdr(td)));
                ignore(module.mem_track(tdr(td)));
            }
            Op::End { td } => self.end(tdr(td)),
        }
    }

    fn remove(&mut self, tdr: Hpa, page: PageInfo) {
        if self.module.mem_page_remove(page, tdr).is_ok() {
            let level = Level::new(u8::try_from(page.raw() & 7).expect("a level")).expect("a level");
            let first = page.raw() & !7;
            self.written.retain(|(root, gpa), _| {
                *root != tdr || !(first..first + level.bytes()).contains(&(gpa & !0xfff))
            });
        }
    }

    fn fill(&mut self, tdr: Hpa, gpa: u64, first: Hpa) {
        self.tables(tdr, gpa);
        let table = gpa & !(Level::PD.bytes() - 1);
        for index in 0..512 {
            let page = PageInfo::page(Gpa::new(table + (index << 12)));
            if self.module.mem_page_aug(page, tdr, first.wrapping_add(index << 12)).is_err() {
                break;
            }
        }
    }

    fn tables(&mut self, tdr: Hpa, gpa: u64) {
        for level in [Level::PML4, Level::PDPT, Level::PD] {
            let page = PageInfo::new(Gpa::new(gpa & !(level.bytes() - 1)), level);
            for _ in 0..8 {
                let table = self.fresh();
                if self.module.mem_sept_add(page, tdr, table).is_ok() {
                    break;
                }
            }
        }
    }

    fn build(&mut self, td: u8) {
        self.call(&Op::Create { td });
        self.call(&Op::KeyConfig { td });
        for _ in 0..16 {
            let page = self.fresh();
            if self.module.mng_init(Self::tdr(td), PARAMS).is_ok() {
                break;
            }
            ignore(self.module.mng_addcx(page, Self::tdr(td)));
        }
        let tdvpr = self.fresh();
        if self.module.vp_create(tdvpr, Self::tdr(td)).is_ok() {
            self.vcpus.push(tdvpr);
            for _ in 0..2 * TDVPS_PAGES {
                let page = self.fresh();
                ignore(self.module.vp_addcx(page, tdvpr));
                if self.module.vp_init(lp(0), tdvpr, 0, 0).is_ok() {
                    break;
                }
            }
        }
        self.tables(Self::tdr(td), 0);
        self.tables(Self::tdr(td), 1 << 39);
    }

    fn end(&mut self, tdr: Hpa) {
        for vcpu in &self.vcpus {
            if self.module.page_record(vcpu.frame()).and_then(|record| record.owner) == Some(tdr.frame()) {
                (0..2).for_each(|processor| ignore(self.module.vp_flush(lp(processor), *vcpu)));
            }
        }
        ignore(self.module.mng_vpflushdone(tdr));
        if self.module.mng_key_freeid(tdr).is_err() {
            return;
        }
        for page in (0..PAGES).map(|page| Hpa::new(TDMR + page * 4096)) {
            if self.module.page_record(page.frame()).and_then(|record| record.owner) == Some(tdr.frame()) {
                let reclaimed = self.module.phymem_page_reclaim(page).expect("a page of a TD in teardown");
                assert_eq!(reclaimed.owner, Some(tdr.frame()));
                self.vcpus.retain(|vcpu| *vcpu != page);
            }
        }
        self.module.phymem_page_reclaim(tdr).expect("a TDR without children");
        self.written.retain(|(root, _), _| *root != tdr);
    }

    fn enter(&mut self, tdvpr: Hpa, processor: LogicalProcessor, act: Act) {
        let Some(owner) = self.module.page_record(tdvpr.frame()).and_then(|record| record.owner) else {
            return;
        };
        let tdr = owner.address();
        let (module, written) = (&self.module, &mut self.written);
        self.stamp += 1;
        let stamp = self.stamp;
        let mut removed = None;
        ignore(module.vp_enter(processor, tdvpr, |guest| match act {
            Act::Accept { gpa, level } => ignore(guest.accept(at(gpa, level % 2))),
            Act::Write { gpa: to } => {
                if guest.write(Gpa::new(gpa(to)), &stamp.to_le_bytes()).is_ok() {
                    written.insert((tdr, gpa(to)), stamp);
                }
                // All that this guest ever wrote and that is still there is there.
                for ((_, gpa), expected) in written.range((tdr, 0)..=(tdr, u64::MAX)) {
                    let mut bytes = [0; 8];
                    if guest.read(Gpa::new(*gpa), &mut bytes).is_ok() {
                        assert_eq!(u64::from_le_bytes(bytes), *expected, "{gpa:#x}");
                    }
                }
            }
            Act::Removed { gpa } => {
                ignore(module.mem_range_block(at(gpa, 0), tdr));
                ignore(module.mem_track(tdr));
                removed = module.mem_page_remove(at(gpa, 0), tdr).ok();
            }
        }));
        if let (Some(_), Act::Removed { gpa: of }) = (removed, act) {
            self.written.remove(&(tdr, gpa(of)));
        }
    }
}

/// Whether a call is refused is other tests' affair.
fn ignore<T>(_: T) {}

fn lp(processor: u8) -> LogicalProcessor {
    LogicalProcessor(u32::from(processor % 2))
}
