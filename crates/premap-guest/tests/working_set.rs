//! Working sets: recorded of a guest's run, they are what it touched, and mapped first they save its faults.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use premap::working_set::{Identity, Recorder, Touched, WorkingSet};
use premap::{Budget, Engine, Plan, Region};
use premap_address::{Gpa, GpaRange, PAGE_SIZE};
use premap_guest::{Access, Backing, Kernel, Linux, Machine, Memory, Order, SlotFlags, Soft, Touch};
use premap_kvm::probe;

const BASE: Gpa = Gpa::new(4 << 30);
const PAGES: u64 = 256;
const IMAGE: Identity = Identity([3; 32]);

fn region(memory: &Memory) -> Region {
    memory.region(BASE, premap::Touch::Write)
}

fn touched(page: u64, pages: u64, touch: premap::Touch) -> Touched {
    let start = BASE.checked_add(page * PAGE_SIZE).unwrap();
    Touched { range: GpaRange::new(start, pages * PAGE_SIZE), touch }
}

#[test]
fn pages_are_in_the_order_of_the_looks_and_then_of_their_addresses() {
    use premap::Touch::{Read, Write};
    let memory = Memory::new(PAGES * PAGE_SIZE, Backing::Anonymous).unwrap();
    memory.write_word(7 * PAGE_SIZE, 1);
    let mut recorder = Recorder::new(&[region(&memory)]).unwrap();
    memory.write_word(9 * PAGE_SIZE, 1);
    let _ = memory.read_word(2 * PAGE_SIZE);
    recorder.look().unwrap();
    for page in [3, 1, 2] {
        memory.write_word(page * PAGE_SIZE, 1);
    }
    let _ = memory.read_word(4 * PAGE_SIZE);
    recorder.look().unwrap();
    let set = recorder.finish(IMAGE).unwrap();
    let expected = [
        touched(7, 1, Write),
        touched(2, 1, Write),
        touched(9, 1, Write),
        touched(1, 1, Write),
        touched(3, 1, Write),
        touched(4, 1, Read),
    ];
    assert_eq!(set.touched(), expected);
}

/// A machine with a slot, and its memory as the engine wants it described.
fn machine<K: Kernel>(kernel: &K, memory: Memory) -> (Machine<K>, Region) {
    let mut machine = Machine::new(kernel, 1).unwrap();
    let region = region(&memory);
    machine.slots().add(BASE, memory, SlotFlags::NONE).unwrap();
    machine.map_own_memory(region.range).unwrap();
    (machine, region)
}

/// The guest touches the second half of the memory: recorded, read back from its file, and mapped for another guest.
fn a_recorded_run_is_saved_its_faults<K: Kernel>(kernel: &K, backing: Backing, access: Access) {
    // At least two pages, of whatever size.
    let pages = if backing == Backing::Hugetlb { 1024 } else { PAGES };
    let memory = || Memory::new(pages * PAGE_SIZE, backing);
    let own = match memory() {
        Ok(own) => own,
        Err(error) => return skip(&error.to_string()),
    };
    let half = touched(pages / 2, pages / 2, premap::Touch::Write).range;
    let touch = Touch { range: half, access, order: Order::Random };
    let (mut first, region) = machine(kernel, own);
    let mut recorder = Recorder::new(&[region]).unwrap();
    let run = recorder.watch(Duration::from_millis(1), || first.touch(&touch)).unwrap().unwrap();
    let set = recorder.finish(IMAGE).unwrap();
    let inside = set.touched().iter().filter_map(|touched| touched.range.intersection(half));
    assert_eq!(inside.map(GpaRange::bytes).sum::<u64>(), half.bytes(), "{backing} {access}");
    // Around a read of the page cache, Linux maps what it has nearby.
    let around = (backing, access) == (Backing::File, Access::Read);
    if !around {
        assert_eq!(set.bytes(), half.bytes(), "{backing} {access}");
    }
    for touched in set.touched() {
        let written = access == Access::Write || matches!(backing, Backing::Memfd | Backing::Hugetlb);
        assert_eq!(touched.touch == premap::Touch::Write, written, "{backing} {access}");
    }

    let set = WorkingSet::decode(&set.encode()).unwrap();
    drop(first);
    let (mut second, region) = machine(kernel, memory().unwrap());
    let lent = second.lend();
    if !probe::pre_fault(lent.vm, &mut lent.vcpus[0]).is_supported() {
        eprintln!("skipped: {} can't pre-fault", K::NAME);
        return;
    }
    let budget = Budget { bytes: Some(set.bytes()), ..Budget::default() };
    let plan = Plan::new(set.first(&IMAGE, &[region]).unwrap()).unwrap();
    let report = Engine::new().vm(lent.vm).budget(budget).run(&plan, lent.vcpus).unwrap();
    assert_eq!((report.asked, report.second.mapped), (region.range.bytes(), set.bytes()));
    let faults = second.touch(&touch).unwrap().faults;
    assert!(faults <= run.faults / 10, "{backing} {access}: {faults} faults of {}", run.faults);
}

fn each_backing<K: Kernel>(kernel: &K) {
    for backing in [Backing::Anonymous, Backing::Memfd, Backing::File, Backing::Hugetlb] {
        for access in [Access::Write, Access::Read] {
            a_recorded_run_is_saved_its_faults(kernel, backing, access);
        }
    }
}

#[test]
fn a_recorded_run_on_the_software_kvm_is_saved_its_faults() {
    each_backing(&Soft::new(premap_softkvm::Profile::default()));
}

#[test]
fn a_recorded_run_on_linux_is_saved_its_faults() {
    match Linux::open() {
        Ok(linux) => each_backing(&linux),
        Err(error) => skip(&error.to_string()),
    }
}

/// Says why something does not run here. In the lab (`PREMAP_LAB=1`), which exists so that it can, that is a failure.
fn skip(why: &str) {
    assert!(std::env::var_os("PREMAP_LAB").is_none_or(|value| value != "1"), "must run in the lab: {why}");
    eprintln!("skipped: {why}");
}
