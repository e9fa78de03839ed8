//! A VM with two vCPUs and 1 MiB of memory, whose guest writes a word to every page.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::Duration;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// The memory of each slot.
pub(crate) const BYTES: u64 = 1 << 20;

const PAGE: u64 = 4096;
/// Where the guest's code lies.
const CODE: u64 = 0x1000;
/// The first page that the guest writes, and the first that it does not, as real mode has them: divided by 16.
const FIRST: u16 = 0x200;
const END: u16 = 0xff00;

/// Real mode: writes its own number, divided by 16, to each page from `FIRST` on to `END`.
const GUEST: [u8; 18] = [
    0xb8, 0x00, 0x02, // mov ax, FIRST
    0x8e, 0xc0, // next: mov es, ax
    0x26, 0xa3, 0x00, 0x00, // mov es:[0], ax
    0x05, 0x00, 0x01, // add ax, 0x100
    0x3d, 0x00, 0xff, // cmp ax, END
    0x75, 0xf2, // jne next
    0xf4, // hlt
];

/// The machine.
pub(crate) struct Machine {
    pub(crate) vm: VmFd,
    vcpus: Vec<VcpuFd>,
    slots: Vec<Memory>,
}

struct Memory(*mut u8, u64);

// SAFETY: the pointer is to a mapping that belongs to this value alone, whatever thread it is on.
unsafe impl Send for Memory {}
// SAFETY: it is read only while no guest runs.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(bytes: u64) -> Self {
        let len = usize::try_from(bytes).unwrap();
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), len, flags, MapFlags::PRIVATE) };
        let base = base.unwrap();
        // Huge pages would make everything present in no time.
        // SAFETY: the mapping is new and this value's own; advice changes no content.
        let _ = unsafe { madvise(base, len, Advice::LinuxNoHugepage) };
        Self(base.cast(), bytes)
    }

    fn at(&self, offset: u64) -> *mut u8 {
        assert!(offset < self.1 - 8);
        self.0.wrapping_add(usize::try_from(offset).unwrap())
    }

    fn word(&self, offset: u64) -> u16 {
        // SAFETY: the word lies inside the mapping, and no guest runs.
        unsafe { self.at(offset).cast::<u16>().read_volatile() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the VM that had this memory is gone: its field is dropped first.
        unsafe { munmap(self.0.cast(), usize::try_from(self.1).unwrap()) }.unwrap();
    }
}

impl Machine {
    pub(crate) fn new(kvm: &Kvm) -> Self {
        let vm = kvm.create_vm().unwrap();
        let vcpus = (0..2).map(|id| vm.create_vcpu(id).unwrap()).collect();
        let mut machine = Self { vm, vcpus, slots: Vec::new() };
        machine.add_slot(0, BYTES);
        for (offset, byte) in (CODE..).zip(GUEST) {
            // SAFETY: the code lies inside the mapping, and no guest runs.
            unsafe { machine.slots[0].at(offset).write_volatile(byte) };
        }
        machine
    }

    /// Adds more vCPUs, which stay where they are.
    pub(crate) fn add_vcpus(&mut self, count: u64) {
        let first = self.vcpus.len() as u64;
        self.vcpus.extend((first..first + count).map(|id| self.vm.create_vcpu(id).unwrap()));
    }

    /// Adds a slot with new memory, and says where that lies.
    pub(crate) fn add_slot(&mut self, gpa: u64, bytes: u64) -> u64 {
        let memory = Memory::new(bytes);
        let region = kvm_userspace_memory_region {
            slot: u32::try_from(self.slots.len()).unwrap(),
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: bytes,
            userspace_addr: memory.0.expose_provenance() as u64,
        };
        // SAFETY: the memory is the machine's own, and lives as long as the VM.
        unsafe { self.vm.set_user_memory_region(region) }.unwrap();
        self.slots.push(memory);
        region.userspace_addr
    }

    /// Deletes the last slot, and makes it anew with the same memory elsewhere.
    pub(crate) fn move_last_slot(&mut self, gpa: u64) {
        let memory = self.slots.last().unwrap();
        for memory_size in [0, memory.1] {
            let region = kvm_userspace_memory_region {
                slot: u32::try_from(self.slots.len() - 1).unwrap(),
                flags: 0,
                guest_phys_addr: gpa,
                memory_size,
                userspace_addr: memory.0.expose_provenance() as u64,
            };
            // SAFETY: the memory is the machine's own, and lives as long as the VM.
            unsafe { self.vm.set_user_memory_region(region) }.unwrap();
        }
    }

    /// Puts Linux's boot parameters at 0, where a guest's registers point that says nothing else, with that RAM in them.
    pub(crate) fn hand_over(&mut self, ram: &[(u64, u64)]) {
        let mut page = [0_u8; 4096];
        page[0x1e8] = u8::try_from(ram.len()).unwrap();
        page[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        page[0x202..0x206].copy_from_slice(b"HdrS");
        for ((start, bytes), entry) in ram.iter().zip(page[0x2d0..].chunks_exact_mut(20)) {
            entry[..8].copy_from_slice(&start.to_le_bytes());
            entry[8..16].copy_from_slice(&bytes.to_le_bytes());
            entry[16] = 1;
        }
        for (offset, byte) in (0..).zip(page) {
            // SAFETY: the page lies inside the mapping, and no guest runs.
            unsafe { self.slots[0].at(offset).write_volatile(byte) };
        }
    }

    /// Maps the memory by the engine that is in this program, as a VMM does that links the crate.
    pub(crate) fn map_by_itself(&self) {
        let range = premap::GpaRange::new(premap::Gpa::new(0), BYTES);
        let host = premap::Hva::new(self.slots[0].0.expose_provenance() as u64);
        let touch = premap::Touch::Write;
        let region = premap::Region { range, host, backing: premap::Backing::Anonymous, touch };
        let plan = premap::Plan::new([region]).unwrap();
        let mut vcpus: Vec<_> =
            self.vcpus.iter().map(|vcpu| premap_kvm::linux::Vcpu::new(borrowed(vcpu))).collect();
        let report = premap::Engine::new().run(&plan, &mut vcpus).unwrap();
        assert_eq!(report.host.mapped, BYTES);
    }

    /// The descriptors of the VM and of its vCPUs.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = i32> {
        std::iter::once(self.vm.as_raw_fd()).chain(self.vcpus.iter().map(AsRawFd::as_raw_fd))
    }

    /// Leaves the descriptors to whoever closes them.
    pub(crate) fn leak(self) {
        std::mem::forget((self.vm, self.vcpus));
    }

    /// Has the first vCPU's guest run to its end.
    pub(crate) fn run(&mut self) -> Result<(), kvm_ioctls::Error> {
        run_one(&mut self.vcpus[0], &self.slots[0])
    }

    /// Has the guest run on a thread of its own, and calls the vCPU back while the library maps for it: sends its thread
    /// SIGUSR1 once that much more memory is present. Gives what the call said, and how much was present by then.
    pub(crate) fn run_and_call_back(
        &mut self,
        kick: Kick,
        once_present: u64,
    ) -> (Result<(), kvm_ioctls::Error>, u64) {
        let Self { vcpus, slots, .. } = self;
        let vcpu = &mut vcpus[0];
        kick.prepare(vcpu);
        let before = present();
        let came_to = std::thread::scope(|scope| {
            let (sender, thread) = std::sync::mpsc::channel();
            let (vcpu, memory) = (&mut *vcpu, &slots[0]);
            let ran = scope.spawn(move || {
                // SAFETY: pthread_self has no preconditions.
                sender.send(unsafe { libc::pthread_self() }).unwrap();
                (run_one(vcpu, memory), present().saturating_sub(before))
            });
            let thread = thread.recv().unwrap();
            while !ran.is_finished() {
                std::thread::sleep(Duration::from_millis(5));
                if present().saturating_sub(before) >= once_present {
                    // Again and again: a handler without the flag is not noticed if it runs outside the call.
                    // SAFETY: the thread is not joined yet, so its handle is good.
                    unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
                }
            }
            ran.join().unwrap()
        });
        vcpu.set_kvm_immediate_exit(0);
        came_to
    }

    /// Calls the first vCPU with `immediate_exit` set, as a VMM does that has an exit's rest done. Says how long that took.
    pub(crate) fn run_with_exit_wanted(&mut self) -> Duration {
        let begin = std::time::Instant::now();
        self.vcpus[0].set_kvm_immediate_exit(1);
        let errno = self.vcpus[0].run().map(|_| ()).map_err(|error| error.errno());
        assert_eq!((errno, self.vcpus[0].get_kvm_run().immediate_exit), (Err(libc::EINTR), 1));
        begin.elapsed()
    }

    /// Has the vCPU called until it sees the flag that a signal's handler sets, once, when that much more is present.
    pub(crate) fn run_until_called_back(&mut self, once_present: u64) {
        let vcpu = &mut self.vcpus[0];
        Kick::ByFlag.prepare(vcpu);
        let before = present();
        std::thread::scope(|scope| {
            let (sender, thread) = std::sync::mpsc::channel();
            let ran = scope.spawn(move || {
                // SAFETY: pthread_self has no preconditions.
                sender.send(unsafe { libc::pthread_self() }).unwrap();
                let flag = &raw const vcpu.get_kvm_run().immediate_exit;
                for _ in 0..100 {
                    let errno = vcpu.run().map(|_| ()).map_err(|error| error.errno());
                    assert_eq!(errno, Err(libc::EINTR), "the kick is lost");
                    // SAFETY: the flag lies in the page that the vCPU shares with this process.
                    if unsafe { flag.read_volatile() } != 0 {
                        return;
                    }
                }
                panic!("the flag is lost");
            });
            let thread = thread.recv().unwrap();
            while present().saturating_sub(before) < once_present {
                std::thread::sleep(Duration::from_millis(1));
            }
            // SAFETY: the thread is not joined yet, so its handle is good.
            unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
            ran.join().unwrap();
        });
    }

    /// Has the guest run so many times, while another thread sets and deletes a slot as often.
    pub(crate) fn run_beside_changes(&mut self, times: u32) {
        let memory = Memory::new(BYTES);
        let host = memory.0.expose_provenance() as u64;
        let slot = move |memory_size| kvm_userspace_memory_region {
            slot: 100,
            flags: 0,
            guest_phys_addr: 32 << 30,
            memory_size,
            userspace_addr: host,
        };
        let Self { vm, vcpus, slots } = self;
        std::thread::scope(|scope| {
            let vm = &*vm;
            scope.spawn(move || {
                for _ in 0..times {
                    for size in [BYTES, 0] {
                        // SAFETY: the memory lives until after the slot's deletion.
                        unsafe { vm.set_user_memory_region(slot(size)) }.unwrap();
                    }
                }
            });
            for _ in 0..times {
                run_one(&mut vcpus[0], &slots[0]).unwrap();
            }
        });
    }

    /// Forgets what the guest wrote.
    pub(crate) fn clear(&mut self) {
        for page in (u64::from(FIRST) << 4..u64::from(END) << 4).step_by(usize::try_from(PAGE).unwrap()) {
            // SAFETY: the word lies inside the mapping, and no guest runs.
            unsafe { self.slots[0].at(page).cast::<u16>().write_volatile(0) };
        }
    }
}

fn borrowed(vcpu: &VcpuFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor stays open for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) }
}

/// What a signal's handler does that calls a vCPU back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kick {
    /// Nothing: `KVM_RUN` ends by the signal alone.
    ByEintr,
    /// Sets `immediate_exit`, as most VMMs have it.
    ByFlag,
}

impl Kick {
    fn prepare(self, vcpu: &mut VcpuFd) {
        static FLAG: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
        extern "C" fn handler(_: libc::c_int) {
            let flag = FLAG.load(Ordering::Relaxed);
            if !flag.is_null() {
                // SAFETY: the flag lies in the page that the vCPU shares with this process, which outlives the signal.
                unsafe { flag.write_volatile(1) };
            }
        }
        let flag = &raw mut vcpu.get_kvm_run().immediate_exit;
        FLAG.store(if self == Self::ByFlag { flag } else { std::ptr::null_mut() }, Ordering::Relaxed);
        // SAFETY: all zeros is a valid sigaction, and the handler only writes a byte.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as extern "C" fn(libc::c_int) as libc::sighandler_t;
            // So has the wait the least chance to end by itself.
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
        }
    }
}

/// How much memory this process has.
pub(crate) fn present() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * PAGE
}

fn run_one(vcpu: &mut VcpuFd, memory: &Memory) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (CODE, 2);
    vcpu.set_regs(&regs)?;
    match vcpu.run()? {
        VcpuExit::Hlt => {}
        other => panic!("{other:?}"),
    }
    for segment in (FIRST..END).step_by(0x100) {
        assert_eq!(memory.word(u64::from(segment) << 4), segment);
    }
    Ok(())
}
