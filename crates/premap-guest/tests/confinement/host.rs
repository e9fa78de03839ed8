//! What the modes work on, made ready before anything is confined.

use std::fs::File;

use premap::{Plan, Touch};
use premap_address::Gpa;
use premap_guest::{Backing, Linux, Machine, Memory, SlotFlags};
use premap_kvm::{Vcpu, Vm, linux};

use crate::skip;

/// Each of the two pieces of memory: more than one chunk of a background run.
pub(crate) const BYTES: u64 = 4 << 20;

/// What there is of KVM here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kvm {
    /// It is there, whether it can pre-fault or not.
    Present,
    /// There is none: each ioctl on the file in its place is ENOTTY.
    Missing,
}

/// Memory to be mapped, and what maps it.
pub(crate) struct Host<'a> {
    pub(crate) vm: &'a (dyn Vm + Sync),
    pub(crate) vcpu: &'a mut (dyn Vcpu + Send),
    pub(crate) spare: &'a mut (dyn Vcpu + Send),
    /// One piece of memory to be written, and one to be read.
    pub(crate) plan: Plan,
    pub(crate) kvm: Kvm,
}

/// Makes a host, of which nothing is left when `use_it` has come back.
pub(crate) fn with<R>(use_it: impl FnOnce(Host<'_>) -> R) -> R {
    let pieces = [(4 << 30, Touch::Write), (5 << 30, Touch::Read)].map(|(gpa, touch)| {
        let memory = Memory::new(BYTES, Backing::Anonymous).unwrap();
        (memory.region(Gpa::new(gpa), touch), memory)
    });
    let plan = Plan::new(pieces.iter().map(|(region, _)| *region)).unwrap();
    match Linux::open() {
        Ok(linux) => {
            let mut machine = Machine::with_spares(&linux, 1, 1).unwrap();
            for (region, memory) in pieces {
                machine.slots().add(region.range.start(), memory, SlotFlags::NONE).unwrap();
            }
            let lent = machine.lend();
            let (vcpu, spare) = (&mut lent.vcpus[0], &mut lent.spares[0]);
            use_it(Host { vm: lent.vm, vcpu, spare, plan, kvm: Kvm::Present })
        }
        Err(error) => {
            skip(&error.to_string());
            let file = || File::open("/dev/null").unwrap();
            let (mut vcpu, mut spare) = (linux::Vcpu::new(file()), linux::Vcpu::new(file()));
            let vm = &linux::Vm::new(file());
            use_it(Host { vm, vcpu: &mut vcpu, spare: &mut spare, plan, kvm: Kvm::Missing })
        }
    }
}
