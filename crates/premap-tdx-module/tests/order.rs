//! The order of checks: where several things are wrong, the earliest is told.
#![expect(clippy::unwrap_used, reason = "in a test the panic is the message")]

mod common;

use common::{Host, RESERVED, Stage, TDMR, at, rcx, status};
use premap_tdx_module::{
    Class, EntryState, Gpa, Hkid, Hpa, Level, Lifecycle, OpState, Operand, Package, PageInfo, PageType,
    Status, TdField, TdParams,
};

const GPA: u64 = 0x4000_0000;
/// Shared where the shared bit is 47.
const SHARED: u64 = 1 << 47;

/// The operands of PAGE.ADD, and what is wrong with the TD.
#[derive(Clone, Copy)]
struct Add {
    tdr: Hpa,
    page: PageInfo,
    memory: Hpa,
    source: Hpa,
}

/// What a fault is in. There can be one fault in each of these at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Tdr,
    Fatal,
    Lifecycle,
    Tdcs,
    OpState,
    Page,
    Entry,
    Source,
    Memory,
}

/// Makes a TD or an operand wrong in one way.
type Fault = fn(&Host, &mut Add);

const fn on(class: Class, operand: Operand) -> Status {
    class.on(operand)
}

const INVALID: Class = Class::OPERAND_INVALID;

/// Everything that can be wrong with PAGE.ADD, in the order in which it is found.
const FAULTS: [(Part, Fault, Status); 17] = [
    (Part::Tdr, |_, add| add.tdr = add.tdr.wrapping_add(8), on(INVALID, Operand::RDX)),
    (
        Part::Tdr,
        |host, add| add.tdr = host.module.keys().address(add.tdr, Hkid(3)),
        on(INVALID, Operand::RDX),
    ),
    (Part::Tdr, |_, add| add.tdr = Hpa::new(0x1000), on(Class::OPERAND_ADDR_RANGE_ERROR, Operand::RDX)),
    (Part::Tdr, |host, add| add.tdr = host.page(), on(Class::PAGE_METADATA_INCORRECT, Operand::RDX)),
    (Part::Fatal, |host, add| host.module.put_fatal(add.tdr).unwrap(), Class::TD_FATAL.status()),
    (
        Part::Lifecycle,
        |host, add| host.module.put_lifecycle(add.tdr, Lifecycle::Blocked).unwrap(),
        Class::TD_KEYS_NOT_CONFIGURED.status(),
    ),
    (Part::Tdcs, |host, add| add.tdr = host.td(Stage::Keyed).tdr, Class::TDCS_NOT_ALLOCATED.status()),
    (
        Part::OpState,
        |host, add| host.module.put_op_state(add.tdr, OpState::Runnable).unwrap(),
        Class::OP_STATE_INCORRECT.with(2),
    ),
    (Part::Page, |_, add| add.page = PageInfo::from_raw(GPA | 8), rcx(INVALID)),
    (Part::Page, |_, add| add.page = PageInfo::from_raw(GPA | 1), rcx(INVALID)),
    (Part::Page, |_, add| add.page = PageInfo::from_raw(SHARED | GPA), rcx(INVALID)),
    (Part::Page, |_, add| add.page = at(1 << 39, Level::PT), rcx(Class::EPT_WALK_FAILED)),
    (
        Part::Entry,
        |host, add| host.module.put_entry_state(add.page, add.tdr, EntryState::Pending).unwrap(),
        rcx(Class::EPT_ENTRY_STATE_INCORRECT),
    ),
    (Part::Source, |_, add| add.source = Hpa::new(0x1_0100), on(INVALID, Operand::R9)),
    (
        Part::Source,
        |host, add| add.source = host.module.keys().address(Hpa::new(0x1_0000), Hkid(40)),
        on(INVALID, Operand::R9),
    ),
    (Part::Memory, |_, add| add.memory = Hpa::new(TDMR + 8), on(INVALID, Operand::R8)),
    (Part::Memory, |_, add| add.memory = RESERVED, on(Class::PAGE_METADATA_INCORRECT, Operand::R8)),
];

fn good(host: &Host) -> Add {
    let tdr = host.td(Stage::Initialized).tdr;
    host.tables(tdr, GPA, Level::PT);
    Add { tdr, page: at(GPA, Level::PT), memory: host.page(), source: host.source(1) }
}

fn add(host: &Host, add: Add) -> Result<(), Status> {
    host.module.mem_page_add(add.page, add.tdr, add.memory, add.source).map_err(|failure| failure.status)
}

#[test]
fn page_add_tells_each_fault() {
    let host = Host::new();
    assert_eq!(add(&host, good(&host)), Ok(()));
    for (number, (part, fault, expected)) in FAULTS.into_iter().enumerate() {
        let host = Host::new();
        let mut operands = good(&host);
        fault(&host, &mut operands);
        assert_eq!(add(&host, operands), Err(expected), "fault {number}, in {part:?}");
    }
}

#[test]
fn page_add_tells_the_earlier_of_two_faults() {
    for (early, (part, first, expected)) in FAULTS.into_iter().enumerate() {
        for (late, (other, second, _)) in FAULTS.into_iter().enumerate().skip(early + 1) {
            if part == other {
                continue;
            }
            let host = Host::new();
            let mut operands = good(&host);
            // The later one is made first, while the TD and its operands still let it be made.
            second(&host, &mut operands);
            first(&host, &mut operands);
            assert_eq!(
                add(&host, operands),
                Err(expected),
                "fault {early} in {part:?}, then {late} in {other:?}"
            );
        }
    }
}

#[test]
fn a_source_beyond_memory_and_memory_beyond_tdmrs_are_told() {
    let host = Host::new();
    let operands = good(&host);
    let nowhere = Add { source: Hpa::new(1 << 40), ..operands };
    assert_eq!(add(&host, nowhere), Err(Class::OPERAND_INVALID.on(Operand::R9)));
    let low = Add { memory: Hpa::new(0x2000), ..operands };
    assert_eq!(add(&host, low), Err(Class::OPERAND_ADDR_RANGE_ERROR.on(Operand::R8)));
    let taken = Add { memory: operands.tdr, ..operands };
    assert_eq!(add(&host, taken), Err(Class::PAGE_METADATA_INCORRECT.on(Operand::R8)));
    // Source and memory may be one page.
    let same = Add { source: operands.memory, ..operands };
    host.module.host_write(operands.memory, &[7; 16]).unwrap();
    assert_eq!(add(&host, same), Ok(()));
}

#[test]
fn mr_extend_tells_each_fault_in_its_order() {
    let host = Host::new();
    let module = &host.module;
    let tdr = host.td(Stage::Initialized).tdr;
    let extend = |gpa: u64, tdr: Hpa| module.mr_extend(Gpa::new(gpa), tdr).map_err(|failure| failure.status);
    host.add(tdr, GPA, 1);
    assert_eq!(extend(GPA + 0x100, tdr), Ok(()));
    // Nothing but the TDR is right in the first, and one more thing in each that follows.
    assert_eq!(extend(SHARED | 1, tdr.wrapping_add(1)), Err(Class::OPERAND_INVALID.on(Operand::RDX)));
    assert_eq!(extend(SHARED | 1, Hpa::new(0)), Err(Class::OPERAND_ADDR_RANGE_ERROR.on(Operand::RDX)));
    assert_eq!(extend(SHARED | 1, host.page()), Err(Class::PAGE_METADATA_INCORRECT.on(Operand::RDX)));
    let early = host.td(Stage::Keyed).tdr;
    assert_eq!(extend(SHARED | 1, early), Err(Class::TDCS_NOT_ALLOCATED.status()));
    let late = host.td(Stage::Runnable).tdr;
    assert_eq!(extend(SHARED | 1, late), Err(Class::OP_STATE_INCORRECT.with(2)));
    assert_eq!(extend(GPA + 0x80, tdr), Err(rcx(Class::OPERAND_INVALID)));
    assert_eq!(extend(SHARED, tdr), Err(rcx(Class::OPERAND_INVALID)));
    assert_eq!(extend(1 << 39, tdr), Err(rcx(Class::EPT_ENTRY_NOT_PRESENT)));
    assert_eq!(extend(GPA + 0x1000, tdr), Err(rcx(Class::EPT_ENTRY_NOT_PRESENT)));
    // A page that is pending or blocked is not walked to; one that is there but not as it should be has no operand.
    host.module.put_entry_state(at(GPA, Level::PT), tdr, EntryState::Blocked).unwrap();
    assert_eq!(extend(GPA, tdr), Err(rcx(Class::EPT_ENTRY_NOT_PRESENT)));
    host.module.put_entry_state(at(GPA, Level::PT), tdr, EntryState::BlockedForWriting).unwrap();
    assert_eq!(extend(GPA, tdr), Err(Class::EPT_ENTRY_NOT_PRESENT.status()));
}

#[test]
fn calls_of_a_tds_beginning_tell_their_faults() {
    let host = Host::with(|config| config.packages = 2);
    let module = &host.module;
    assert_eq!(status(module.mng_create(host.page(), Hkid(31))), Class::OPERAND_INVALID.on(Operand::RDX));
    assert_eq!(status(module.mng_create(host.page(), Hkid(64))), Class::OPERAND_INVALID.on(Operand::RDX));
    assert_eq!(status(module.mng_create(Hpa::new(0), Hkid(63))), rcx(Class::OPERAND_ADDR_RANGE_ERROR));
    let tdr = host.page();
    module.mng_create(tdr, Hkid(63)).unwrap();
    assert_eq!(module.page_record(tdr.frame()).unwrap().kind, PageType::Tdr);
    assert_eq!(status(module.mng_create(tdr, Hkid(62))), rcx(Class::PAGE_METADATA_INCORRECT));
    assert_eq!(status(module.mng_create(host.page(), Hkid(63))), Class::HKID_NOT_FREE.status());

    assert_eq!(status(module.mng_addcx(host.page(), tdr)), Class::TD_KEYS_NOT_CONFIGURED.status());
    module.mng_key_config(tdr, Package(0)).unwrap();
    assert_eq!(status(module.mng_key_config(tdr, Package(0))), Class::KEY_CONFIGURED.status());
    assert_eq!(status(module.mng_addcx(host.page(), tdr)), Class::TD_KEYS_NOT_CONFIGURED.status());
    module.mng_key_config(tdr, Package(1)).unwrap();
    assert_eq!(status(module.mng_key_config(tdr, Package(1))), Class::LIFECYCLE_STATE_INCORRECT.status());

    let params = Hpa::new(0x800);
    module.host_write(params, &TdParams::default().to_bytes()).unwrap();
    for page in 0..6 {
        assert_eq!(status(module.mng_init(tdr, params)), Class::TDCS_NOT_ALLOCATED.status(), "{page} pages");
        module.mng_addcx(host.page(), tdr).unwrap();
    }
    (6..9).for_each(|_| module.mng_addcx(host.page(), tdr).unwrap());
    assert_eq!(status(module.mng_addcx(host.page(), tdr)), Class::TDCX_NUM_INCORRECT.status());
    assert_eq!(status(module.mng_init(tdr, Hpa::new(0x200))), Class::OPERAND_INVALID.on(Operand::RDX));
    let private = module.keys().address(params, Hkid(33));
    assert_eq!(status(module.mng_init(tdr, private)), Class::OPERAND_INVALID.on(Operand::RDX));
    let wrong = TdParams { max_vcpus: 0, ..TdParams::default() };
    module.host_write(params, &wrong.to_bytes()).unwrap();
    assert_eq!(status(module.mng_init(tdr, params)), Class::OPERAND_INVALID.on(Operand::MAX_VCPUS));
    let one = TdParams { max_vcpus: 1, ..TdParams::default() };
    module.host_write(params, &one.to_bytes()).unwrap();
    assert_eq!(status(module.mng_rd(tdr, TdField::Epoch)), Class::OP_STATE_INCORRECT.with(0));
    module.mng_init(tdr, params).unwrap();
    assert_eq!(module.mng_rd(tdr, TdField::MaxVcpus), Ok(1));
    assert_eq!(module.mng_rd(tdr, TdField::ChildCount), Ok(9));
    assert_eq!(status(module.mr_finalize(tdr)), Class::NO_VCPUS.status());
}

#[test]
fn vcpus_tell_their_faults() {
    let host = Host::new();
    let module = &host.module;
    let (here, there) = (common::LP, common::OTHER_LP);
    let params = TdParams { max_vcpus: 1, ..TdParams::default() };
    let td = host.td_with(Stage::Initialized, &params);
    let tdvpr = host.page();
    assert_eq!(status(module.vp_addcx(host.page(), tdvpr)), Class::PAGE_METADATA_INCORRECT.on(Operand::RDX));
    module.vp_create(tdvpr, td.tdr).unwrap();
    assert_eq!(status(module.vp_init(here, tdvpr, 0, 0)), Class::TDCX_NUM_INCORRECT.status());
    assert_eq!(status(module.vp_flush(here, tdvpr)), Class::TDCX_NUM_INCORRECT.status());
    (1..15).for_each(|_| module.vp_addcx(host.page(), tdvpr).unwrap());
    assert_eq!(status(module.vp_addcx(host.page(), tdvpr)), Class::TDCX_NUM_INCORRECT.status());
    assert_eq!(status(module.vp_flush(here, tdvpr)), Class::VCPU_NOT_ASSOCIATED.status());
    module.vp_init(here, tdvpr, 42, 9).unwrap();
    assert_eq!(status(module.vp_init(here, tdvpr, 42, 9)), Class::VCPU_STATE_INCORRECT.status());
    assert_eq!(status(module.vp_addcx(host.page(), tdvpr)), Class::VCPU_STATE_INCORRECT.status());

    let second = host.page();
    module.vp_create(second, td.tdr).unwrap();
    (1..6).for_each(|_| module.vp_addcx(host.page(), second).unwrap());
    assert_eq!(status(module.vp_init(here, second, 0, 0)), Class::MAX_VCPUS_EXCEEDED.status());

    assert_eq!(status(module.vp_enter(here, tdvpr, |_| ())), Class::OP_STATE_INCORRECT.with(1));
    module.mr_finalize(td.tdr).unwrap();
    assert_eq!(status(module.vp_enter(here, second, |_| ())), Class::VCPU_STATE_INCORRECT.status());
    assert_eq!(status(module.vp_enter(there, tdvpr, |_| ())), Class::VCPU_ASSOCIATED.status());
    let seen = module.vp_enter(here, tdvpr, |guest| {
        // A running vCPU is busy, and keeps its TD from ending.
        assert_eq!(status(module.vp_flush(here, tdvpr)), rcx(Class::OPERAND_BUSY));
        assert_eq!(status(module.mng_vpflushdone(td.tdr)), rcx(Class::OPERAND_BUSY));
        (guest.initial_rcx(), guest.x2apic_id(), guest.vcpu_index())
    });
    assert_eq!(seen, Ok((42, 9, 0)));
    assert_eq!(module.mng_rd(td.tdr, TdField::AssociatedVcpus), Ok(1));
    module.vp_flush(here, tdvpr).unwrap();
    assert_eq!(module.mng_rd(td.tdr, TdField::AssociatedVcpus), Ok(0));
    module.vp_enter(there, tdvpr, |_| ()).unwrap();
}
