//! A small VMM that maps its guest's memory before the guest touches it: to be copied from.
//!
//! It makes a VM with two pieces of memory and one vCPU, maps the memory ahead, shows what became of it, and runs a guest
//! that writes a word of every page. What premap adds to such a VMM is `map_ahead`, called when the slots are set and the
//! vCPUs made, before the first `KVM_RUN`; or `map_meanwhile`, for a VMM that will not wait.
//!
//! `cargo run -p example-vmm` where there is a `/dev/kvm`, `cargo xtask lab -- example-vmm` where there is none; with
//! `--background` the memory is mapped while the guest runs, with `--demand` not at all.
// UNSAFETY: guest memory handed to KVM, and KVM's descriptors borrowed from their owners.
#![expect(
    unsafe_code,
    reason = "KVM is told of memory by address, and kvm-ioctls gives descriptors by number"
)]

use std::os::fd::{AsRawFd, BorrowedFd};

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use premap::kvm::{Vcpu, linux};
use premap::vm_memory::regions;
use premap::{Background, Budget, Engine, Plan, Report, Touch};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Two pieces, as the hole for devices below 4 GiB makes of any larger memory.
const MEMORY: [(GuestAddress, usize); 2] = [(GuestAddress(0), 64 << 20), (GuestAddress(1 << 30), 64 << 20)];
const ENTRY: u64 = 0x1000;
const SERIAL: u16 = 0x3f8;

/// 32-bit code that writes a word of every page of both pieces, from 1 MiB on, says so on the serial port, and halts.
const CODE: [u8; 41] = [
    0xbf, 0x00, 0x00, 0x10, 0x00, // mov edi, 1 MiB
    0xb9, 0x00, 0x3f, 0x00, 0x00, // mov ecx, 63 MiB / 4 KiB
    0xe8, 0x13, 0x00, 0x00, 0x00, // call fill
    0xbf, 0x00, 0x00, 0x00, 0x40, // mov edi, 1 GiB
    0xb9, 0x00, 0x40, 0x00, 0x00, // mov ecx, 64 MiB / 4 KiB
    0xe8, 0x04, 0x00, 0x00, 0x00, // call fill
    0xb0, b'!', 0xee, 0xf4, // mov al, '!'; out dx, al; hlt
    // fill:
    0x89, 0x0f, // mov [edi], ecx
    0x01, 0xf7, // add edi, esi
    0xe2, 0xfa, // loop fill
    0xc3, // ret
];

fn main() -> Result<()> {
    let kvm = Kvm::new().context("opening /dev/kvm")?;
    // Made before the VM, so dropped after it.
    let memory = GuestMemoryMmap::<()>::from_ranges(&MEMORY)?;
    let vm = kvm.create_vm()?;
    for (slot, region) in (0..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr().expose_provenance() as u64,
        };
        // SAFETY: the memory is the guest's alone, is reached by vm-memory's volatile accesses, and outlives the VM.
        unsafe { vm.set_user_memory_region(region) }?;
    }
    memory.write_slice(&CODE, GuestAddress(ENTRY))?;
    let mut vcpu = make_vcpu(&kvm, &vm, 0)?;

    match std::env::args().nth(1).as_deref() {
        None => {
            show(&map_ahead(&vm, &vcpu, &memory)?);
            run(&mut vcpu)?;
        }
        Some("--background") => {
            let background = map_meanwhile(&kvm, &vm, &memory)?;
            run(&mut vcpu)?;
            show(&background.join()?);
        }
        Some("--demand") => run(&mut vcpu)?,
        Some(other) => bail!("{other} is not known; give --background, --demand or nothing"),
    }
    // The code counts down to 1.
    let last: u32 = memory.read_obj(GuestAddress((1 << 30) + (64 << 20) - 4096))?;
    ensure!(last == 1, "the guest's last word is {last}: its memory is not what it wrote");
    let counted = faults(&vcpu).map_or("an unknown number of".to_owned(), |faults| faults.to_string());
    println!("the guest wrote {} pages and took {counted} faults", 0x3f00 + 0x4000);
    Ok(())
}

/// All that premap asks of a VMM: its memory, and descriptors.
fn map_ahead(vm: &VmFd, vcpu: &VcpuFd, memory: &GuestMemoryMmap) -> Result<Report> {
    let (vm, mut vcpus) = (linux::Vm::new(borrow(vm)), [premap_vcpu(vcpu)]);
    let plan = Plan::new(regions(memory, Touch::Write)?)?;
    Ok(Engine::new().vm(&vm).budget(Budget::within_host_memory()).run(&plan, &mut vcpus)?)
}

/// The same while the guest runs, on a vCPU that it never hears of. A VMM that changes its slots meanwhile closes the run's
/// gate around that.
fn map_meanwhile(kvm: &Kvm, vm: &VmFd, memory: &GuestMemoryMmap) -> Result<Background<'static>> {
    let spare = borrow(&make_vcpu(kvm, vm, 1)?).try_clone_to_owned()?;
    let plan = Plan::new(regions(memory, Touch::Write)?)?;
    let vm = linux::Vm::new(borrow(vm));
    let engine = Engine::new().vm(&vm).budget(Budget::within_host_memory());
    Ok(engine.background(plan, vec![linux::Vcpu::new(spare)])?)
}

fn show(report: &Report) {
    for (name, stage) in [("host", report.host), ("second", report.second)] {
        println!("{name} stage: {} of {} bytes in {} calls", stage.mapped, report.asked, stage.calls);
    }
    // What can't be mapped ahead is left to faults: a VMM tells of it, and goes on.
    for lost in &report.unmapped {
        println!("{:?} stage, {}: {}", lost.stage, lost.range, lost.reason);
    }
}

fn premap_vcpu(vcpu: &VcpuFd) -> linux::Vcpu<BorrowedFd<'_>> {
    linux::Vcpu::new(borrow(vcpu))
}

fn borrow(owner: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the owner is borrowed for as long as what is given, so the descriptor stays open.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }
}

/// Page faults that KVM took for the guest, where this KVM counts them.
fn faults(vcpu: &VcpuFd) -> Option<u64> {
    premap_vcpu(vcpu).stats().ok()?.get("pf_taken")
}

/// A vCPU in 32-bit protected mode, flat and without paging, about to run the code.
fn make_vcpu(kvm: &Kvm, vm: &VmFd, id: u64) -> Result<VcpuFd> {
    let vcpu = vm.create_vcpu(id)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut sregs = vcpu.get_sregs()?;
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, db: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 0x08, type_: 0xb, ..flat };
    let data = kvm_segment { selector: 0x10, type_: 0x3, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs)?;
    let (rip, rsp) = (ENTRY, ENTRY);
    vcpu.set_regs(&kvm_regs { rip, rsp, rsi: 4096, rdx: SERIAL.into(), rflags: 2, ..Default::default() })?;
    Ok(vcpu)
}

/// Runs the guest until it halts, and shows what it says.
fn run(vcpu: &mut VcpuFd) -> Result<()> {
    loop {
        match vcpu.run()? {
            VcpuExit::Hlt => return Ok(()),
            VcpuExit::IoOut(SERIAL, bytes) => println!("the guest says {}", String::from_utf8_lossy(bytes)),
            exit => bail!("the guest left for an unexpected reason: {exit:?}"),
        }
    }
}
