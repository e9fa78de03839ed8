//! The table of faults measured on real kernels, reproduced: a guest writes each page of memory that was prepared in
//! different ways. Real kernels count up to four faults more, all MMIO of the VMM that was measured.

mod guest;

use guest::{HUGE, Memory, attach, mapped, pre_fault_all, read_each, stat, vm, write_each};
use premap_address::PAGE_SIZE;
use premap_softkvm::{Profile, SoftVcpu};
use rustix::mm::MapFlags;

const PAGES: u64 = 8000;
const GPA: u64 = 1 << 32;

struct Row {
    before: &'static str,
    prepare: fn(&mut SoftVcpu, &Memory),
    /// Faults a page of 4 KiB, in each profile.
    faults_a_page: u64,
}

const ROWS: [Row; 4] = [
    Row { before: "nothing (demand)", prepare: |_, _| {}, faults_a_page: 1 },
    Row {
        before: "KVM_PRE_FAULT_MEMORY alone",
        prepare: |vcpu, memory| pre_fault_all(vcpu, GPA, memory.pages()),
        faults_a_page: 2,
    },
    Row {
        before: "MADV_POPULATE_WRITE alone",
        prepare: |_, memory| memory.populate_write(0..memory.pages()),
        faults_a_page: 1,
    },
    Row {
        before: "MADV_POPULATE_WRITE, then KVM_PRE_FAULT_MEMORY",
        prepare: |vcpu, memory| {
            memory.populate_write(0..memory.pages());
            pre_fault_all(vcpu, GPA, memory.pages());
        },
        faults_a_page: 0,
    },
];

#[test]
fn faults_of_small_pages_are_the_measured_ones() {
    for profile in [Profile::V6_12, Profile::V7_2] {
        for row in &ROWS {
            let memory = Memory::anonymous(PAGES);
            let vm = vm(profile);
            attach(&vm, 0, 0, GPA, &memory);
            let mut vcpu = vm.create_vcpu(0).unwrap();
            (row.prepare)(&mut vcpu, &memory);
            assert_eq!(stat(&vcpu, "pf_taken"), 0, "a pre-fault is no fault");
            write_each(&mut vcpu, GPA, PAGES);
            let faults = stat(&vcpu, "pf_taken");
            println!("{profile} {:48} {faults:6} faults", row.before);
            assert_eq!(faults, row.faults_a_page * PAGES, "{profile}, {}", row.before);
            assert_eq!(stat(&vcpu, "exits"), faults);
            assert_eq!(
                stat(&vcpu, "pf_fixed"),
                PAGES.min(faults),
                "one mapping a page, the rest tried again"
            );
            assert_eq!(mapped(&vm), [PAGES, 0, 0]);
        }
    }
}

#[test]
fn a_memfd_is_writable_once_it_is_there() {
    let memory = Memory::memfd(PAGES);
    let vm = vm(Profile::V6_12);
    attach(&vm, 0, 0, GPA, &memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    pre_fault_all(&mut vcpu, GPA, PAGES);
    write_each(&mut vcpu, GPA, PAGES);
    assert_eq!(stat(&vcpu, "pf_taken"), 0);
}

#[test]
fn reads_map_the_zero_page_and_the_first_write_then_costs_two_faults() {
    let memory = Memory::anonymous(64);
    let vm = vm(Profile::V6_12);
    attach(&vm, 0, 0, GPA, &memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    read_each(&mut vcpu, GPA, 64);
    assert_eq!(stat(&vcpu, "pf_taken"), 64);
    write_each(&mut vcpu, GPA, 64);
    assert_eq!(stat(&vcpu, "pf_taken"), 64 + 2 * 64);
}

#[test]
fn a_private_file_is_copied_page_by_page() {
    let memory = Memory::private_file(64);
    let vm = vm(Profile::V6_12);
    attach(&vm, 0, 0, GPA, &memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    pre_fault_all(&mut vcpu, GPA, 64);
    write_each(&mut vcpu, GPA, 32);
    assert_eq!(stat(&vcpu, "pf_taken"), 2 * 32, "the page cache, which a write copies");
    memory.populate_write(32..64);
    let vm = self::vm(Profile::V6_12);
    attach(&vm, 0, 0, GPA, &memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    pre_fault_all(&mut vcpu, GPA, 64);
    write_each(&mut vcpu, GPA, 64);
    assert_eq!(stat(&vcpu, "pf_taken"), 0, "all copied before");
}

#[test]
fn huge_pages_are_mapped_huge_and_fault_once_each() {
    const BLOCKS: u64 = 8;
    let pages = BLOCKS * HUGE / PAGE_SIZE;
    for profile in Profile::ALL {
        let demand = {
            let Some(memory) = Memory::huge(pages) else { return };
            let vm = vm(profile);
            attach(&vm, 0, 0, GPA, &memory);
            let mut vcpu = vm.create_vcpu(0).unwrap();
            write_each(&mut vcpu, GPA, pages);
            let [_, huge, _] = mapped(&vm);
            if huge < BLOCKS {
                println!("skipped: the kernel gave {huge} huge pages of {BLOCKS}");
                return;
            }
            stat(&vcpu, "pf_taken")
        };
        assert_eq!(demand, BLOCKS);

        let Some(memory) = Memory::huge(pages) else { return };
        memory.populate_write(0..pages);
        let vm = vm(profile);
        attach(&vm, 0, 0, GPA, &memory);
        let mut vcpu = vm.create_vcpu(0).unwrap();
        pre_fault_all(&mut vcpu, GPA, pages);
        assert_eq!(mapped(&vm), [0, BLOCKS, 0]);
        write_each(&mut vcpu, GPA, pages);
        assert_eq!(stat(&vcpu, "pf_taken"), 0);
    }
}

#[test]
fn pages_of_the_huge_page_pool_are_mapped_huge() {
    const BLOCKS: u64 = 2;
    let pages = BLOCKS * HUGE / PAGE_SIZE;
    for flags in [MapFlags::PRIVATE, MapFlags::SHARED] {
        let Some(memory) = Memory::hugetlb(pages, flags) else { return };
        let vm = vm(Profile::V6_12);
        attach(&vm, 0, 0, GPA, &memory);
        let mut vcpu = vm.create_vcpu(0).unwrap();
        write_each(&mut vcpu, GPA, pages);
        assert_eq!((stat(&vcpu, "pf_taken"), mapped(&vm)), (BLOCKS, [0, BLOCKS, 0]), "demand");

        let vm = self::vm(Profile::V6_12);
        attach(&vm, 0, 0, GPA, &memory);
        let mut vcpu = vm.create_vcpu(0).unwrap();
        pre_fault_all(&mut vcpu, GPA + PAGE_SIZE, pages - 1);
        write_each(&mut vcpu, GPA, pages);
        assert_eq!((stat(&vcpu, "pf_taken"), mapped(&vm)), (0, [0, BLOCKS, 0]), "both stages");
    }
}
