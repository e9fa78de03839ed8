//! Every scenario on `/dev/kvm`, and what only a system call can get wrong.

conformance::test_every_scenario!(conformance::reach::linux_with_pre_fault);

mod without_tdp {
    conformance::test_every_scenario_without_tdp!(conformance::reach::linux_without_tdp);
}

/// A pointer that can't be read, or not be written back to: EFAULT. The software KVM takes a reference, which always can.
#[test]
fn a_bad_user_pointer_is_efault() {
    use std::os::fd::AsRawFd;

    use premap_kvm::Errno;
    use premap_kvm::abi::{KVM_PRE_FAULT_MEMORY, kvm_pre_fault_memory};

    static READ_ONLY: kvm_pre_fault_memory =
        kvm_pre_fault_memory { gpa: 0, size: 4096, flags: 0, padding: [0; 5] };

    let Some(kernel) = conformance::reach::linux_with_pre_fault() else { return };
    let vm = kernel.bare_vm().expect("a VM can be made");
    let vcpu = vm.0.create_vcpu(0).expect("a VM can have a vCPU");
    for pointer in [std::ptr::without_provenance(8), std::ptr::from_ref(&READ_ONLY)] {
        // SAFETY: KVM reads and writes one struct behind the pointer, and says EFAULT where it can't.
        #[expect(unsafe_code, reason = "a system call with a bad pointer")]
        let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_PRE_FAULT_MEMORY.into(), pointer) };
        let errno = Errno::from_io_error(&std::io::Error::last_os_error());
        assert_eq!((result, errno), (-1, Some(Errno::FAULT)), "{pointer:?}");
    }
}
