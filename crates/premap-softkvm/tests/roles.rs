//! vCPU roles: which root a mode has, what a pre-fault does in it, and what of it survives.
#![expect(clippy::unwrap_used, reason = "a test that can't set up its machine fails")]

mod guest;

use guest::tables::GuestTables;
use guest::*;
use premap_address::{Gpa, PAGE_SIZE};
use premap_kvm::abi::KVM_CAP_PRE_FAULT_MEMORY;
use premap_kvm::{Errno, Vm};
use premap_softkvm::{
    CpuMode, PhysicalBits, Profile, SoftConfig, SoftVcpu, SoftVm, SpecialModes, Tdp, TdpLevels,
};

const GPA: u64 = 1 << 32;
const PAGES: u64 = 64;
const SMM_SLOT: u32 = 1 << 16;
const TABLE: Gpa = Gpa::new(tables::TABLES);
const SMM: CpuMode = CpuMode::SystemManagement { cr3: None };
const SHADOWING_L1: CpuMode = CpuMode::NestedShadow { cr3: TABLE };
const NESTED_L1: CpuMode = CpuMode::NestedPaging { ncr3: TABLE };

fn config(profile: Profile, tdp: Tdp) -> SoftConfig {
    SoftConfig { profile, tdp, ..SoftConfig::default() }
}

/// A VM with a slot of [`PAGES`] at [`GPA`], all present on the host.
fn machine(config: SoftConfig) -> (Memory, SoftVm, SoftVcpu) {
    let memory = Memory::anonymous(PAGES);
    memory.populate_write(0..PAGES);
    let vm = vm_with(config);
    attach(&vm, 0, 0, GPA, &memory);
    let vcpu = vm.create_vcpu(0).unwrap();
    (memory, vm, vcpu)
}

/// Writes every page, and gives the faults that this took.
fn faults_of_writes(vcpu: &mut SoftVcpu) -> u64 {
    let before = stat(vcpu, "pf_taken");
    write_each(vcpu, GPA, PAGES);
    stat(vcpu, "pf_taken") - before
}

#[test]
fn a_vcpu_without_paging_fills_the_root_that_paging_uses() {
    for tdp in [Tdp::On, Tdp::WithoutTdpMmu] {
        let (_memory, vm, mut vcpu) = machine(config(Profile::V6_12, tdp));
        assert_eq!(vcpu.mode(), CpuMode::PagingOff);
        pre_fault_all(&mut vcpu, GPA, PAGES);
        vcpu.enter(CpuMode::Paging { cr3: TABLE }).unwrap();
        assert_eq!(faults_of_writes(&mut vcpu), 0, "{tdp:?}");
        let mut other = vm.create_vcpu(1).unwrap();
        assert_eq!(faults_of_writes(&mut other), 0, "{tdp:?}: roots are shared by role");
    }
}

#[test]
fn system_management_has_slots_and_a_root_of_its_own() {
    for tdp in [Tdp::On, Tdp::WithoutTdpMmu] {
        for profile in Profile::RELEASES {
            let (memory, vm, mut vcpu) = machine(config(profile, tdp));
            pre_fault_all(&mut vcpu, GPA, PAGES);
            vcpu.enter(SMM).unwrap();
            assert_eq!(pre_fault(&mut vcpu, GPA, PAGES), (Err(Errno::NOENT), GPA, PAGES));
            let smram = Memory::anonymous(PAGES);
            smram.populate_write(0..PAGES);
            attach(&vm, SMM_SLOT, 0, GPA, &smram);
            pre_fault_all(&mut vcpu, GPA, PAGES);
            assert_eq!(mapped(&vm), [2 * PAGES, 0, 0]);
            assert_eq!(faults_of_writes(&mut vcpu), 0);
            assert_eq!((smram.word(7, 0), memory.word(7, 0)), (7, 0), "another piece of memory");
            // Both roots survive the way out and a reset.
            vcpu.reset();
            assert_eq!(vcpu.mode(), CpuMode::PagingOff);
            assert_eq!(faults_of_writes(&mut vcpu), 0, "{profile}, {tdp:?}");
            assert_eq!(memory.word(7, 0), 7);
            vcpu.enter(SMM).unwrap();
            assert_eq!(faults_of_writes(&mut vcpu), 0, "{profile}, {tdp:?}");
        }
    }
}

#[test]
fn what_concerns_one_address_space_leaves_the_other_alone() {
    for tdp in [Tdp::On, Tdp::WithoutTdpMmu] {
        let (memory, vm, mut vcpu) = machine(config(Profile::V7_2, tdp));
        disable_slot_zap_quirk(&vm);
        let smram = Memory::anonymous(PAGES);
        smram.populate_write(0..PAGES);
        attach(&vm, SMM_SLOT, 0, GPA, &smram);
        pre_fault_all(&mut vcpu, GPA, PAGES);
        vcpu.enter(SMM).unwrap();
        pre_fault_all(&mut vcpu, GPA, PAGES);
        drop(vm.notifier().begin(&memory.range(0..4)));
        assert_eq!(mapped(&vm), [2 * PAGES - 4, 0, 0], "{tdp:?}");
        assert_eq!(faults_of_writes(&mut vcpu), 0);
        detach(&vm, 0);
        assert_eq!(mapped(&vm), [PAGES, 0, 0], "{tdp:?}");
        assert_eq!(faults_of_writes(&mut vcpu), 0);
    }
}

#[test]
fn a_guest_under_shadow_paging_fills_the_root_of_guest_mode() {
    for tdp in [Tdp::On, Tdp::WithoutTdpMmu] {
        for profile in Profile::RELEASES {
            let (_memory, vm, mut vcpu) = machine(config(profile, tdp));
            vcpu.enter(CpuMode::Paging { cr3: TABLE }).unwrap();
            vcpu.enter(SHADOWING_L1).unwrap();
            pre_fault_all(&mut vcpu, GPA, PAGES);
            assert_eq!(faults_of_writes(&mut vcpu), 0);
            vcpu.enter(CpuMode::Paging { cr3: TABLE }).unwrap();
            assert_eq!(faults_of_writes(&mut vcpu), PAGES, "{profile}, {tdp:?}: L1's root is another");
            assert_eq!(mapped(&vm), [2 * PAGES, 0, 0]);
            vcpu.enter(SHADOWING_L1).unwrap();
            assert_eq!(faults_of_writes(&mut vcpu), 0, "{profile}, {tdp:?}: and this one is there still");
        }
    }
}

#[test]
fn a_guest_under_nested_paging_is_shadowed_and_can_not_be_pre_faulted() {
    for tdp in [Tdp::On, Tdp::WithoutTdpMmu] {
        for profile in Profile::ALL {
            let (memory, vm, mut vcpu) = machine(config(profile, tdp));
            let tables = GuestTables::new(&vm, 1, 0, 1);
            // L2's pages, in reverse order.
            for page in 0..PAGES {
                tables.set(page, GPA + (PAGES - 1 - page) * PAGE_SIZE, tables::WRITABLE);
            }
            vcpu.enter(CpuMode::NestedPaging { ncr3: tables.root() }).unwrap();
            assert_eq!(pre_fault(&mut vcpu, 0, 1), (Err(Errno::OPNOTSUPP), 0, 1), "{profile}");
            for page in 0..PAGES {
                vcpu.write(tables.address(page), page).unwrap();
            }
            assert_eq!(stat(&vcpu, "pf_taken"), PAGES);
            assert!((0..PAGES).all(|page| memory.word(page, 0) == PAGES - 1 - page));
            assert_eq!(mapped(&vm), [PAGES, 0, 0]);
            vcpu.enter(CpuMode::Paging { cr3: TABLE }).unwrap();
            let pre_faulted = pre_fault(&mut vcpu, GPA, 1).0;
            let refused = (profile, tdp) == (Profile::PROPOSAL, Tdp::WithoutTdpMmu);
            assert_eq!(
                pre_faulted,
                if refused { Err(Errno::OPNOTSUPP) } else { Ok(()) },
                "{profile}, {tdp:?}"
            );
        }
    }
}

#[test]
fn support_is_a_property_of_the_mmu() {
    for profile in Profile::ALL {
        for (tdp, capability) in [(Tdp::On, 1), (Tdp::WithoutTdpMmu, 1), (Tdp::Off, 0)] {
            let (_memory, vm, mut vcpu) = machine(config(profile, tdp));
            assert_eq!(vm.check_extension(KVM_CAP_PRE_FAULT_MEMORY), Ok(capability));
            let has = match tdp {
                Tdp::On => true,
                Tdp::WithoutTdpMmu => profile != Profile::PROPOSAL,
                Tdp::Off => false,
            };
            for mode in [CpuMode::PagingOff, CpuMode::Paging { cr3: TABLE }] {
                vcpu.enter(mode).unwrap();
                let expected = if has { Ok(()) } else { Err(Errno::OPNOTSUPP) };
                assert_eq!(pre_fault(&mut vcpu, GPA, 1).0, expected, "{profile}, {tdp:?}, {mode:?}");
            }
        }
    }
}

/// The design's open question: each answer, in each special mode.
#[test]
fn special_modes_are_refused_or_fill_their_own_root_or_the_base_root() {
    for special in [SpecialModes::Refused, SpecialModes::OwnRoot, SpecialModes::BaseRoot] {
        for mode in [SMM, SHADOWING_L1, NESTED_L1] {
            let chosen = SoftConfig { special_modes: Some(special), ..config(Profile::PROPOSAL, Tdp::On) };
            let (memory, vm, mut vcpu) = machine(chosen);
            attach(&vm, SMM_SLOT, 0, GPA, &memory);
            vcpu.enter(mode).unwrap();
            let result = pre_fault(&mut vcpu, GPA, PAGES).0;
            let refused =
                special == SpecialModes::Refused || (special, mode) == (SpecialModes::OwnRoot, NESTED_L1);
            assert_eq!(result, if refused { Err(Errno::OPNOTSUPP) } else { Ok(()) }, "{special:?}, {mode:?}");
            let own = if mode == NESTED_L1 { None } else { Some(faults_of_writes(&mut vcpu)) };
            vcpu.reset();
            let base = faults_of_writes(&mut vcpu);
            match special {
                SpecialModes::Refused => assert_eq!((own.unwrap_or(PAGES), base), (PAGES, PAGES)),
                SpecialModes::OwnRoot => assert_eq!((own.unwrap_or(0), base), (0, PAGES), "{mode:?}"),
                SpecialModes::BaseRoot => assert_eq!((own.unwrap_or(PAGES), base), (PAGES, 0), "{mode:?}"),
            }
        }
    }
}

#[test]
fn a_profile_has_an_answer_of_its_own() {
    for profile in Profile::ALL {
        let (memory, vm, mut vcpu) = machine(config(profile, Tdp::On));
        attach(&vm, SMM_SLOT, 0, GPA, &memory);
        for mode in [SMM, SHADOWING_L1] {
            vcpu.enter(mode).unwrap();
            let refused = profile == Profile::PROPOSAL;
            let expected = if refused { Err(Errno::OPNOTSUPP) } else { Ok(()) };
            assert_eq!(pre_fault(&mut vcpu, GPA, 1).0, expected, "{profile}, {mode:?}");
        }
    }
}

#[test]
fn levels_follow_the_host_on_amd_and_the_guest_on_intel() {
    let bits = |bits| PhysicalBits::new(bits).unwrap();
    for (levels, host, told, high) in [
        (TdpLevels::OfHost, 48, 40, false),
        (TdpLevels::OfHost, 52, 40, true),
        (TdpLevels::OfGuest, 52, 52, true),
        (TdpLevels::OfGuest, 52, 48, false),
    ] {
        for tdp in [Tdp::On, Tdp::WithoutTdpMmu] {
            let config = SoftConfig { physical_bits: bits(host), levels, tdp, ..SoftConfig::default() };
            let (_memory, vm, mut first) = machine(config);
            let mut second = vm.create_vcpu(1).unwrap();
            second.set_physical_bits(bits(told)).unwrap();
            pre_fault_all(&mut first, GPA, PAGES);
            pre_fault_all(&mut second, GPA, PAGES);
            // In the shadow MMU, what a low root maps is a part of what a high one does, and they share it.
            let apart = levels == TdpLevels::OfGuest && told != host && tdp == Tdp::On;
            let roots = if apart { 2 } else { 1 };
            assert_eq!(mapped(&vm), [roots * PAGES, 0, 0], "{levels:?} {host} {told} {tdp:?}");
            if host < 49 || tdp == Tdp::WithoutTdpMmu {
                continue;
            }
            // Five levels reach what four do not.
            let far = Memory::anonymous(1);
            attach(&vm, 1, 0, 1 << 50, &far);
            let mut fresh = vm.create_vcpu(2).unwrap();
            fresh.set_physical_bits(bits(told)).unwrap();
            assert_eq!(pre_fault(&mut fresh, 1 << 50, 1).0.is_ok(), high, "{levels:?} {host} {told}");
        }
    }
}

#[test]
fn all_six_roots_of_the_tdp_mmu_live_side_by_side() {
    let bits = |bits| PhysicalBits::new(bits).unwrap();
    let chosen = SoftConfig { physical_bits: bits(52), levels: TdpLevels::OfGuest, ..SoftConfig::default() };
    let (memory, vm, mut vcpu) = machine(chosen);
    attach(&vm, SMM_SLOT, 0, GPA, &memory);
    let all = [48, 52]
        .into_iter()
        .flat_map(|told| [CpuMode::PagingOff, SMM, SHADOWING_L1].map(|mode| (told, mode)));
    for (told, mode) in all.clone() {
        vcpu.set_physical_bits(bits(told)).unwrap();
        vcpu.enter(mode).unwrap();
        pre_fault_all(&mut vcpu, GPA, PAGES);
    }
    assert_eq!(mapped(&vm), [6 * PAGES, 0, 0]);
    for (told, mode) in all {
        vcpu.set_physical_bits(bits(told)).unwrap();
        vcpu.enter(mode).unwrap();
        assert_eq!(faults_of_writes(&mut vcpu), 0, "{told} bits, {mode:?}");
    }
    // What the host takes goes from all six.
    drop(vm.notifier().begin(&memory.range(0..1)));
    assert_eq!(mapped(&vm), [6 * (PAGES - 1), 0, 0]);
}
