//! What the modes work on, made ready before anything is confined.
// UNSAFETY: a file is mapped, for the engine alone.
#![expect(unsafe_code, reason = "mmap")]

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use premap::{Hva, Plan, Region, Touch};
use premap_address::{Gpa, GpaRange};
use premap_guest::{Backing, Linux, Machine, Memory, SlotFlags};
use premap_kvm::{Vcpu, Vm, linux};
use rustix::mm::{MapFlags, ProtFlags, mmap};

use crate::skip;

/// Each of the three pieces of memory: more than one chunk of a background run.
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
    /// One piece of memory to be written, one to be read, one that is shared, and a file that is shorter than its two mappings.
    pub(crate) plan: Plan,
    pub(crate) kvm: Kvm,
}

/// Makes a host, of which nothing is left when `use_it` has come back.
pub(crate) fn with<R>(use_it: impl FnOnce(Host<'_>) -> R) -> R {
    let pieces = [
        (4 << 30, Backing::Anonymous, Touch::Write),
        (5 << 30, Backing::Anonymous, Touch::Read),
        (8 << 30, Backing::Memfd, Touch::Write),
    ];
    let pieces = pieces.map(|(gpa, backing, touch)| {
        let memory = Memory::new(BYTES, backing).unwrap();
        (memory.region(Gpa::new(gpa), touch), memory)
    });
    let file = ShortFile::new();
    let mapped = [
        file.map(6 << 30, MapFlags::SHARED, premap::Backing::Shared, Touch::Write),
        file.map(7 << 30, MapFlags::PRIVATE, premap::Backing::PrivateFile, Touch::Write),
    ];
    let plan = Plan::new(pieces.iter().map(|(region, _)| *region).chain(mapped)).unwrap();
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

/// A file of 64 KiB, which is removed in the end.
struct ShortFile(PathBuf);

impl ShortFile {
    fn new() -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let name = format!("premap-short-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, [1; 64 << 10]).unwrap();
        Self(path)
    }

    /// Maps more than there is of it, for as long as the process lives.
    fn map(&self, gpa: u64, flags: MapFlags, backing: premap::Backing, touch: Touch) -> Region {
        let (bytes, file) = (1 << 20, File::options().read(true).write(true).open(&self.0).unwrap());
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice, on which no reference is ever made.
        let start = unsafe { mmap(std::ptr::null_mut(), bytes, access, flags, &file, 0) }.unwrap();
        let range = GpaRange::new(Gpa::new(gpa), bytes as u64);
        Region { range, host: Hva::new(start.expose_provenance() as u64), backing, touch }
    }
}

impl Drop for ShortFile {
    fn drop(&mut self) {
        // In a chroot it is out of reach.
        let _ = std::fs::remove_file(&self.0);
    }
}
