//! What can be seen of mappings only from inside: their Accessed and Dirty bits.

use premap_address::{Gpa, PAGE_SIZE};
use premap_kvm::Vcpu;
use premap_kvm::abi::{kvm_pre_fault_memory, kvm_userspace_memory_region2};
use premap_mmu::Use;

use super::*;
use crate::Profile;

#[repr(C, align(4096))]
struct Page([u8; 4096]);

const GPA: u64 = 1 << 32;

/// Runs `test` on a VM with four pages at [`GPA`], all written by the host.
fn check(profile: Profile, test: impl FnOnce(&SoftVm, &mut SoftVcpu)) {
    let memory: Vec<Page> = (0..4).map(|_| Page([1; 4096])).collect();
    let vm = SoftVm::new(SoftConfig { profile, ..SoftConfig::default() }).unwrap();
    let region = kvm_userspace_memory_region2 {
        guest_phys_addr: GPA,
        memory_size: 4 * PAGE_SIZE,
        userspace_addr: memory.as_ptr().expose_provenance() as u64,
        ..Default::default()
    };
    vm.machine.set_memory_region(&region).unwrap();
    test(&vm, &mut vm.create_vcpu(0).unwrap());
    drop(vm);
    assert!(memory.iter().all(|page| page.0[4095] == 1));
}

fn pre_fault(vcpu: &mut SoftVcpu) {
    let mut range = kvm_pre_fault_memory { gpa: GPA, size: PAGE_SIZE, ..Default::default() };
    assert_eq!(vcpu.pre_fault_memory(&mut range), Ok(()));
}

fn used(vm: &SoftVm) -> Use {
    vm.machine.roots.list()[0].table.walk(Gpa::new(GPA)).unwrap().attributes.used
}

#[test]
fn a_pre_faulted_page_is_dirty_and_not_accessed_until_it_is_touched() {
    for profile in Profile::ALL {
        check(profile, |vm, vcpu| {
            pre_fault(vcpu);
            assert_eq!(used(vm), Use { accessed: false, dirty: true });
            assert_eq!(vcpu.read(Gpa::new(GPA)), Ok(u64::from_ne_bytes([1; 8])));
            assert_eq!(used(vm), Use { accessed: true, dirty: true });
        });
    }
}

#[test]
fn a_second_pre_fault_clears_accessed_in_6_12_alone() {
    for profile in Profile::ALL {
        check(profile, |vm, vcpu| {
            vcpu.read(Gpa::new(GPA)).unwrap();
            pre_fault(vcpu);
            assert_eq!(used(vm).accessed, profile != Profile::V6_12, "{profile}");
        });
    }
}
