//! The shadow MMU: what is lost there and never by the TDP MMU, and guests that run on shadows of their own tables.
#![expect(clippy::unwrap_used, reason = "a test that can't set up its machine fails")]

mod guest;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use guest::tables::{GuestTables, READ_ONLY, TABLES, WRITABLE};
use guest::*;
use premap_address::{Gpa, PAGE_SIZE};
use premap_kvm::abi::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
use premap_kvm::{Errno, Vcpu};
use premap_softkvm::{CpuMode, GuestFault, Profile, SoftConfig, SoftVcpu, SoftVm, Tdp};
use rustix::mm::{Advice, MprotectFlags};

const GPA: u64 = 1 << 32;
/// Above what 64 shadow pages can map of 2 MiB blocks, one page each.
const BLOCKS: u64 = 100;
const BLOCK: u64 = HUGE / PAGE_SIZE;

fn config(profile: Profile, tdp: Tdp) -> SoftConfig {
    SoftConfig { profile, tdp, ..SoftConfig::default() }
}

/// A VM with a slot of [`BLOCKS`] times 2 MiB, of which the first `present` pages are there.
fn big(profile: Profile, tdp: Tdp, present: u64) -> (Memory, SoftVm, SoftVcpu) {
    let memory = Memory::anonymous(BLOCKS * BLOCK);
    memory.populate_write(0..present);
    let vm = vm_with(config(profile, tdp));
    attach(&vm, 0, 0, GPA, &memory);
    let vcpu = vm.create_vcpu(0).unwrap();
    (memory, vm, vcpu)
}

/// Writes the first page of each block, and gives the faults.
fn touch_blocks(vcpu: &mut SoftVcpu) -> u64 {
    let before = stat(vcpu, "pf_taken");
    for block in 0..BLOCKS {
        vcpu.write(Gpa::new(GPA + block * HUGE), block).unwrap();
    }
    stat(vcpu, "pf_taken") - before
}

/// Writes the first 16 pages, and gives the faults.
fn touch_first(vcpu: &mut SoftVcpu) -> u64 {
    let before = stat(vcpu, "pf_taken");
    write_each(vcpu, GPA, 16);
    stat(vcpu, "pf_taken") - before
}

#[test]
fn a_pre_mapped_page_is_lost_to_the_page_limit_but_not_by_the_tdp_mmu() {
    for profile in Profile::RELEASES {
        for (tdp, lost) in [(Tdp::WithoutTdpMmu, 16), (Tdp::On, 0)] {
            let (_memory, vm, mut vcpu) = big(profile, tdp, 16);
            assert_eq!(vm.set_nr_mmu_pages(63), Err(Errno::INVAL));
            vm.set_nr_mmu_pages(64).unwrap();
            pre_fault_all(&mut vcpu, GPA, 16);
            assert_eq!(touch_first(&mut vcpu), 0);
            touch_blocks(&mut vcpu);
            assert_eq!(touch_first(&mut vcpu), lost, "{profile}, {tdp:?}");
            assert!((0..16).all(|page| vcpu.read(Gpa::new(GPA + page * PAGE_SIZE)) == Ok(page)));
        }
    }
}

#[test]
fn a_lower_limit_takes_pre_mapped_pages_at_once() {
    for (tdp, left) in [(Tdp::WithoutTdpMmu, 0), (Tdp::On, BLOCKS)] {
        let (memory, vm, mut vcpu) = big(Profile::V6_12, tdp, 0);
        vm.set_nr_mmu_pages(1024).unwrap();
        for block in 0..BLOCKS {
            memory.populate_write(block * BLOCK..block * BLOCK + 1);
            pre_fault_all(&mut vcpu, GPA + block * HUGE, 1);
        }
        assert_eq!(mapped(&vm), [BLOCKS, 0, 0]);
        vm.set_nr_mmu_pages(64).unwrap();
        // The directory above all leaf tables is older than any of them.
        assert_eq!(mapped(&vm), [left, 0, 0], "{tdp:?}");
        assert_eq!(touch_blocks(&mut vcpu), BLOCKS - left);
    }
}

#[test]
fn a_pre_mapped_page_is_lost_to_the_shrinker_where_there_is_one_but_not_by_the_tdp_mmu() {
    for profile in Profile::ALL {
        for tdp in [Tdp::WithoutTdpMmu, Tdp::On] {
            let (_memory, vm, mut vcpu) = big(profile, tdp, 16);
            if pre_fault(&mut vcpu, GPA, 16).0 == Err(Errno::OPNOTSUPP) {
                assert_eq!((profile, tdp), (Profile::PROPOSAL, Tdp::WithoutTdpMmu));
                touch_first(&mut vcpu);
            }
            let shrinks = tdp == Tdp::WithoutTdpMmu && !Profile::RELEASES[1..].contains(&profile);
            assert_eq!(vm.shrink_mmu(128) > 0, shrinks, "{profile}, {tdp:?}");
            assert_eq!(touch_first(&mut vcpu), if shrinks { 16 } else { 0 }, "{profile}, {tdp:?}");
        }
    }
}

#[test]
fn a_pre_mapped_page_is_lost_to_a_role_change_but_not_by_the_tdp_mmu() {
    for (tdp, lost) in [(Tdp::WithoutTdpMmu, 16), (Tdp::On, 0)] {
        let (memory, vm, mut vcpu) = big(Profile::V7_2, tdp, 16);
        attach(&vm, 1 << 16, 0, GPA, &memory);
        vm.set_nr_mmu_pages(64).unwrap();
        pre_fault_all(&mut vcpu, GPA, 16);
        // The root is let go: it stays hashed, and is found again while there is room.
        let smm = CpuMode::SystemManagement { cr3: None };
        vcpu.enter(smm).unwrap();
        vcpu.enter(CpuMode::PagingOff).unwrap();
        assert_eq!(touch_first(&mut vcpu), 0, "{tdp:?}");
        // In the other role the vCPU needs pages, and nobody holds the first role's root any more.
        vcpu.enter(smm).unwrap();
        touch_blocks(&mut vcpu);
        vcpu.enter(CpuMode::PagingOff).unwrap();
        assert_eq!(touch_first(&mut vcpu), lost, "{tdp:?}");
    }
}

#[test]
fn a_reset_loses_nothing_by_itself() {
    for tdp in [Tdp::WithoutTdpMmu, Tdp::On] {
        let (_memory, _vm, mut vcpu) = big(Profile::V6_12, tdp, 16);
        pre_fault_all(&mut vcpu, GPA, 16);
        vcpu.reset();
        assert_eq!(touch_first(&mut vcpu), 0, "{tdp:?}");
    }
}

#[test]
fn enospc_is_what_is_left_where_every_shadow_page_is_a_root() {
    const L1S: u32 = 16;
    let (memory, vm, mut vcpu) = big(Profile::V6_12, Tdp::WithoutTdpMmu, 16);
    vm.set_nr_mmu_pages(64).unwrap();
    // Each vCPU keeps four roots at hand: the one that it runs on, and three that it had.
    let mut others: Vec<SoftVcpu> = (1..=L1S).map(|id| vm.create_vcpu(id).unwrap()).collect();
    for (index, other) in (0..).zip(&mut others) {
        for table in 0..4 {
            let ncr3 = Gpa::new(GPA + (64 + index * 4 + table) * PAGE_SIZE);
            other.enter(CpuMode::NestedPaging { ncr3 }).unwrap();
            assert_eq!(other.read(Gpa::new(0)), Err(GuestFault::Guest { address: Gpa::new(0) }));
        }
    }
    assert_eq!(pre_fault(&mut vcpu, GPA, 16), (Err(Errno::NOSPC), GPA, 16));
    assert!(matches!(vcpu.read(Gpa::new(GPA)), Err(GuestFault::Failed { errno: Errno::NOSPC, .. })));
    drop(others);
    pre_fault_all(&mut vcpu, GPA, 16);
    assert_eq!(touch_first(&mut vcpu), 0);
    drop((vcpu, vm, memory));
}

#[test]
fn a_fourth_table_lets_the_oldest_root_go() {
    let nested = |table: u64| CpuMode::NestedPaging { ncr3: Gpa::new(GPA + table * PAGE_SIZE) };
    let (_memory, vm, mut vcpu) = big(Profile::V6_12, Tdp::On, 512);
    for table in 1..=6 {
        vcpu.enter(nested(table)).unwrap();
        assert!(vcpu.read(Gpa::new(0)).is_err());
    }
    assert_eq!(vm.shrink_mmu(64), 2, "six roots, of which four are at hand");
}

/// Rows of the pre-fault table, with the shadow MMU in the place of the TDP MMU.
#[test]
fn direct_pages_get_the_answers_of_the_table() {
    for profile in Profile::RELEASES {
        let memory = Memory::anonymous(8);
        memory.populate_write(0..4);
        let vm = vm_with(config(profile, Tdp::WithoutTdpMmu));
        attach(&vm, 0, 0, GPA, &memory);
        attach(&vm, 1, KVM_MEM_READONLY, 2 * GPA, &memory);
        let mut vcpu = vm.create_vcpu(0).unwrap();
        assert_eq!(pre_fault(&mut vcpu, GPA + 7 * PAGE_SIZE, 2), (Ok(()), GPA + 8 * PAGE_SIZE, 1));
        assert_eq!(pre_fault(&mut vcpu, GPA + 8 * PAGE_SIZE, 1).0, Err(Errno::NOENT));
        assert_eq!((stat(&vcpu, "pf_mmio_spte_created"), stat(&vcpu, "pf_taken")), (2, 0), "one a call");
        let hole = Gpa::new(GPA + 8 * PAGE_SIZE);
        assert_eq!(vcpu.read(hole), Err(GuestFault::Mmio { gpa: hole }));
        assert_eq!(stat(&vcpu, "pf_taken"), 0, "the mapping tells, no fault");
        pre_fault_all(&mut vcpu, GPA, 8);
        write_each(&mut vcpu, GPA, 8);
        assert_eq!(stat(&vcpu, "pf_taken"), 2 * 4, "two for each page that the host had not written");
        pre_fault_all(&mut vcpu, 2 * GPA, 8);
        assert_eq!(vcpu.write(Gpa::new(2 * GPA), 1), Err(GuestFault::ReadOnly { gpa: Gpa::new(2 * GPA) }));
        assert_eq!(mapped(&vm), [16, 0, 0]);
        vm.notifier().invalidate(&memory.range(2..3), || memory.protect(2..3, MprotectFlags::empty()));
        assert_eq!(mapped(&vm), [14, 0, 0], "behind both slots");
        assert_eq!(pre_fault(&mut vcpu, GPA + 2 * PAGE_SIZE, 1).0, Err(Errno::FAULT));
        assert_eq!(pre_fault(&mut vcpu, GPA, 4), (Ok(()), GPA + 2 * PAGE_SIZE, 2));
        detach(&vm, 0);
        assert_eq!(mapped(&vm), [0, 0, 0], "the quirk: everything goes");
        vcpu.read(Gpa::new(2 * GPA)).unwrap();
    }
}

#[test]
fn dirty_logging_counts_direct_pages_mapped_ahead() {
    for profile in [Profile::V6_12, Profile::V7_2] {
        let memory = Memory::anonymous(64);
        memory.populate_write(0..32);
        let vm = vm_with(config(profile, Tdp::WithoutTdpMmu));
        attach(&vm, 0, KVM_MEM_LOG_DIRTY_PAGES, GPA, &memory);
        let mut vcpu = vm.create_vcpu(0).unwrap();
        pre_fault_all(&mut vcpu, GPA, 64);
        assert_eq!(dirty_log(&vm, 0, 64).unwrap(), (0..32).collect::<Vec<_>>());
        vcpu.write(Gpa::new(GPA + 5 * PAGE_SIZE), 1).unwrap();
        assert_eq!((stat(&vcpu, "pf_taken"), stat(&vcpu, "pf_fast")), (1, 1), "{profile}: protected again");
        assert_eq!(dirty_log(&vm, 0, 64).unwrap(), [5]);
        pre_fault_all(&mut vcpu, GPA, 8);
        let again = if profile == Profile::V6_12 { (0..8).collect() } else { vec![] };
        assert_eq!(dirty_log(&vm, 0, 64).unwrap(), again, "{profile}: rebuilt, or left alone");
    }
}

/// A VM without two-dimensional paging: 64 pages of memory, and tables that reach them from address 0.
fn shadowed() -> (Memory, SoftVm, SoftVcpu, GuestTables) {
    let memory = Memory::anonymous(64);
    let vm = vm_with(config(Profile::V6_12, Tdp::Off));
    attach(&vm, 0, 0, GPA, &memory);
    let tables = GuestTables::new(&vm, 1, 0, 2);
    for page in 0..64 {
        tables.set(page, GPA + page * PAGE_SIZE, WRITABLE);
    }
    let vcpu = vm.create_vcpu(0).unwrap();
    (memory, vm, vcpu, tables)
}

#[test]
fn without_tdp_guests_run_on_shadows_of_their_tables() {
    let (memory, vm, mut vcpu, tables) = shadowed();
    // Without paging first.
    vcpu.write(Gpa::new(GPA + 8), 77).unwrap();
    assert_eq!((memory.word(0, 1), mapped(&vm)), (77, [1, 0, 0]));
    vcpu.enter(CpuMode::Paging { cr3: tables.root() }).unwrap();
    tables.set(3, GPA + 3 * PAGE_SIZE, READ_ONLY);
    assert_eq!(vcpu.read(Gpa::new(8)), Ok(77));
    vcpu.write(tables.address(5), 5).unwrap();
    assert_eq!(memory.word(5, 0), 5);
    let denied = tables.address(3);
    assert_eq!(vcpu.read(denied), Ok(0));
    assert_eq!(vcpu.write(denied, 1), Err(GuestFault::Guest { address: denied }));
    let absent = tables.address(64);
    assert_eq!(vcpu.read(absent), Err(GuestFault::Guest { address: absent }));
    assert_eq!(stat(&vcpu, "pf_guest"), 2);
    assert_eq!(pre_fault(&mut vcpu, GPA, 1).0, Err(Errno::OPNOTSUPP));
    assert_eq!(vcpu.enter(CpuMode::NestedPaging { ncr3: tables.root() }), Err(Errno::INVAL));
    // Memory that is not there is emulated, at the guest-physical address.
    tables.set(65, 8 * GPA, WRITABLE);
    assert_eq!(vcpu.read(tables.address(65)), Err(GuestFault::Mmio { gpa: Gpa::new(8 * GPA) }));
    let taken = stat(&vcpu, "pf_taken");
    assert_eq!(vcpu.read(tables.address(65)), Err(GuestFault::Mmio { gpa: Gpa::new(8 * GPA) }));
    assert_eq!(stat(&vcpu, "pf_taken"), taken, "the MMIO mapping tells");
}

#[test]
fn accessed_and_dirty_get_into_the_guests_tables() {
    let (_memory, _vm, mut vcpu, tables) = shadowed();
    vcpu.enter(CpuMode::Paging { cr3: tables.root() }).unwrap();
    tables.set(9, GPA, 3);
    vcpu.read(tables.address(9)).unwrap();
    assert_eq!(tables.get(9) & 0x60, 0x20);
    vcpu.write(tables.address(9), 1).unwrap();
    assert_eq!(tables.get(9) & 0x60, 0x60);
}

#[test]
fn a_guests_writes_to_its_tables_take_effect_at_once() {
    let (memory, vm, mut vcpu, tables) = shadowed();
    vcpu.enter(CpuMode::Paging { cr3: tables.root() }).unwrap();
    // The guest sees its leaf table at page 600.
    tables.set(600, tables.entry(0).raw(), WRITABLE);
    for page in 0..8 {
        vcpu.write(tables.address(page), page).unwrap();
    }
    let window = |page: u64| Gpa::new(tables.address(600).raw() + page * 8);
    let emulated = stat(&vcpu, "pf_emulate");
    tables.write(&mut vcpu, window(1), GPA + 40 * PAGE_SIZE, WRITABLE);
    assert_eq!(stat(&vcpu, "pf_emulate"), emulated + 1, "the write is done for it");
    vcpu.write(tables.address(1), 4040).unwrap();
    assert_eq!((memory.word(1, 0), memory.word(40, 0)), (1, 4040));
    // Another vCPU, without paging, writes the same table.
    let mut other = vm.create_vcpu(1).unwrap();
    tables.write(&mut other, tables.entry(1), GPA + 41 * PAGE_SIZE, READ_ONLY);
    assert_eq!(vcpu.read(tables.address(1)), Ok(0));
    assert!(vcpu.write(tables.address(1), 1).is_err());
    tables.write(&mut other, tables.entry(2), 0, 0);
    let gone = tables.address(2);
    assert_eq!(vcpu.read(gone), Err(GuestFault::Guest { address: gone }));
}

#[test]
fn an_l1s_writes_to_its_nested_tables_take_effect_at_once() {
    // A pre-fault writes mappings anew in 6.12, and leaves them alone later.
    let profiles = [Profile::V6_12, Profile::V7_2];
    for (tdp, profile) in [Tdp::On, Tdp::WithoutTdpMmu].into_iter().flat_map(|tdp| profiles.map(|p| (tdp, p)))
    {
        let memory = Memory::anonymous(64);
        let vm = vm_with(config(profile, tdp));
        attach(&vm, 0, 0, GPA, &memory);
        let tables = GuestTables::new(&vm, 1, 0, 1);
        for page in 0..64 {
            tables.set(page, GPA + page * PAGE_SIZE, WRITABLE);
        }
        let (mut l1, mut l2) = (vm.create_vcpu(0).unwrap(), vm.create_vcpu(1).unwrap());
        // L1 has its tables mapped, writable, before they are shadowed.
        pre_fault_all(&mut l1, TABLES, 4);
        tables.write(&mut l1, tables.entry(0), GPA, WRITABLE);
        l2.enter(CpuMode::NestedPaging { ncr3: tables.root() }).unwrap();
        l2.write(tables.address(0), 1).unwrap();
        for turn in 1..20 {
            tables.write(&mut l1, tables.entry(0), GPA + turn * PAGE_SIZE, WRITABLE);
            l2.write(tables.address(0), turn + 100).unwrap();
            assert_eq!(memory.word(turn, 0), turn + 100, "{tdp:?}, {profile}");
            if turn == 10 {
                // Mapping the tables again does not make them writable behind the shadow's back.
                l1.renew_root().unwrap();
                pre_fault_all(&mut l1, TABLES, 4);
            }
        }
    }
}

#[test]
fn what_the_host_takes_goes_from_shadows_too() {
    let (memory, vm, mut vcpu, tables) = shadowed();
    vcpu.enter(CpuMode::Paging { cr3: tables.root() }).unwrap();
    for page in 0..64 {
        vcpu.write(tables.address(page), page + 1).unwrap();
    }
    assert_eq!(mapped(&vm), [64, 0, 0]);
    vm.notifier().invalidate(&memory.range(10..20), || {
        assert_eq!(mapped(&vm), [54, 0, 0]);
        memory.advise(10..20, Advice::LinuxDontNeed);
    });
    for page in 0..64 {
        let expected = if (10..20).contains(&page) { 0 } else { page + 1 };
        assert_eq!(vcpu.read(tables.address(page)), Ok(expected));
    }
    // A slot that goes takes everything, and its pages lead nowhere.
    detach(&vm, 0);
    assert_eq!(mapped(&vm), [0, 0, 0]);
    assert_eq!(vcpu.read(tables.address(7)), Err(GuestFault::Mmio { gpa: Gpa::new(GPA + 7 * PAGE_SIZE) }));
    attach(&vm, 0, KVM_MEM_LOG_DIRTY_PAGES, GPA, &memory);
    vcpu.write(tables.address(7), 1).unwrap();
    assert_eq!(dirty_log(&vm, 0, 64).unwrap(), [7]);
    assert_eq!(vcpu.read(tables.address(7)), Ok(1));
    vcpu.write(tables.address(7), 2).unwrap();
    assert_eq!(dirty_log(&vm, 0, 64).unwrap(), [7], "protected when the log was taken");
}

#[test]
fn without_the_quirk_tables_in_a_slot_that_goes_are_forgotten() {
    let (_memory, vm, mut vcpu, tables) = shadowed();
    disable_slot_zap_quirk(&vm);
    vcpu.enter(CpuMode::Paging { cr3: tables.root() }).unwrap();
    vcpu.write(tables.address(0), 1).unwrap();
    detach(&vm, 1);
    assert_eq!(mapped(&vm), [0, 0, 0]);
    assert_eq!(vcpu.read(tables.address(0)), Err(GuestFault::Guest { address: tables.address(0) }));
}

/// Guests write and rewrite their tables while their memory is made inaccessible and accessible again, tables included: a
/// walk or a store that outlives the notifier's word dies of SIGSEGV.
#[test]
fn inaccessible_memory_is_never_touched() {
    const PAGES: u64 = 32;
    for tdp in [Tdp::Off, Tdp::WithoutTdpMmu] {
        let memory = Memory::anonymous(PAGES + 4);
        let vm = vm_with(config(Profile::V7_2, tdp));
        // The tables lie in the memory that comes and goes: directories in its last pages, one leaf table.
        attach(&vm, 0, 0, GPA, &memory);
        let table = |page: u64| GPA + (PAGES + page) * PAGE_SIZE;
        for level in 0..3 {
            memory.set_word(PAGES + level, 0, table(level + 1) | WRITABLE);
        }
        for page in 0..PAGES {
            memory.set_word(PAGES + 3, page, (GPA + page * PAGE_SIZE) | WRITABLE);
        }
        let modes = [
            if tdp == Tdp::Off {
                CpuMode::Paging { cr3: Gpa::new(table(0)) }
            } else {
                CpuMode::NestedPaging { ncr3: Gpa::new(table(0)) }
            },
            CpuMode::PagingOff,
        ];
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for (id, mode) in (0..).zip(modes) {
                let (vm, stop) = (&vm, &stop);
                scope.spawn(move || {
                    let mut vcpu = vm.create_vcpu(id).unwrap();
                    vcpu.enter(mode).unwrap();
                    let base = if mode == CpuMode::PagingOff { GPA } else { 0 };
                    while !stop.load(Ordering::SeqCst) {
                        for page in 0..PAGES {
                            // EFAULT, or a table that can't be read.
                            let _ = vcpu.write(Gpa::new(base + page * PAGE_SIZE), page);
                            if base == GPA {
                                let _ = vcpu.write(
                                    Gpa::new(table(3) + page * 8),
                                    (GPA + page * PAGE_SIZE) | WRITABLE,
                                );
                            }
                        }
                    }
                });
            }
            for round in 0..400_u64 {
                let first = round * 5 % (PAGES + 4);
                let part = first..(first + 6).min(PAGES + 4);
                vm.notifier().invalidate(&memory.range(part.clone()), || {
                    memory.protect(part.clone(), MprotectFlags::empty());
                    thread::yield_now();
                    memory.protect(part, MprotectFlags::READ | MprotectFlags::WRITE);
                });
            }
            stop.store(true, Ordering::SeqCst);
        });
        let mut vcpu = vm.create_vcpu(7).unwrap();
        vcpu.enter(modes[0]).unwrap();
        for page in 0..PAGES {
            assert_eq!(vcpu.read(Gpa::new(page * PAGE_SIZE)), Ok(page));
        }
    }
}
