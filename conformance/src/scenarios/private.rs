//! Private memory of software-protected VMs: what a guest_memfd refuses, conversions, and pages that can't be had.
//!
//! Debian's kernels are built without such VMs; the lab's kernel called `private` has them.

use premap::{Gpa, GpaRange};
use premap_guest::{
    Access, Backing, FileOperation, Guest, GuestError, GuestMemfd, Kernel, Machine, Memory, MemoryFault,
    Order, PrivateMemory, Slice, VmType, word_of,
};
use premap_kvm::abi::{
    KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_create_guest_memfd, kvm_memory_attributes,
    kvm_pre_fault_memory, kvm_userspace_memory_region2,
};
use premap_kvm::{Errno, Vcpu};
use rustix::fs::FallocateFlags;

use crate::fixture::{PAGE, pages};
use crate::reach;

const SLOT: u32 = 10;
const COUNT: u64 = 1024;
const PRIVATE: u64 = KVM_MEMORY_ATTRIBUTE_PRIVATE as u64;
const SHARED: u64 = 0;
const PUNCH: FallocateFlags = FallocateFlags::KEEP_SIZE.union(FallocateFlags::PUNCH_HOLE);

type File<K> = <<K as Kernel>::Vm as PrivateMemory>::GuestMemfd;

/// A machine with one vCPU and a slot of [`COUNT`] pages, shared memory and private.
struct Protected<K: Kernel> {
    // Dropped in this order: the memory outlives the machine that was told of it.
    machine: Machine<K>,
    file: File<K>,
    memory: Memory,
}

impl<K: Kernel> Protected<K> {
    /// `None` where the kernel has no such VMs, after saying so.
    fn new(kernel: &K) -> Option<Self> {
        if !kernel.has(VmType::SoftwareProtected) {
            reach::tell_lack(
                "this kernel is built without software-protected VMs (CONFIG_KVM_SW_PROTECTED_VM)",
            );
            return None;
        }
        let machine = Machine::of_type(kernel, VmType::SoftwareProtected, 1).expect("a machine can be made");
        let file = create(&machine, COUNT * PAGE, 0).expect("a guest_memfd can be made");
        let memory = Memory::new(COUNT * PAGE, Backing::TransparentHuge).expect("4 MiB can be had");
        let protected = Self { machine, file, memory };
        protected.add_slot(KVM_MEM_GUEST_MEMFD);
        Some(protected)
    }

    fn add_slot(&self, flags: u32) {
        let region = kvm_userspace_memory_region2 {
            slot: SLOT,
            flags,
            guest_phys_addr: pages(0, 1).start().raw(),
            memory_size: COUNT * PAGE,
            userspace_addr: self.memory.hva().raw(),
            guest_memfd: self.file.number(),
            ..Default::default()
        };
        self.tell(&region);
    }

    fn remove_slot(&self) {
        self.tell(&kvm_userspace_memory_region2 { slot: SLOT, ..Default::default() });
    }

    fn tell(&self, region: &kvm_userspace_memory_region2) {
        // SAFETY: the memory is only reached atomically, and outlives the machine.
        #[expect(unsafe_code, reason = "hands owned memory to the VM")]
        let told = unsafe { self.machine.vm().set_user_memory_region2(region) };
        told.expect("the slot can be changed");
    }

    fn convert(&self, range: GpaRange, attributes: u64) {
        let request = kvm_memory_attributes {
            address: range.start().raw(),
            size: range.bytes(),
            attributes,
            ..Default::default()
        };
        self.machine.vm().set_memory_attributes(&request).expect("pages can be converted");
    }

    /// The guest touches a page; what it writes is the word of `number`.
    fn touch(&mut self, page: u64, access: Access, number: u64) -> Result<u64, GuestError> {
        let gpa = pages(page, 1).start();
        let vcpu = self.vcpu();
        vcpu.prepare(&Slice { gpa, first: number, pages: 1, access, order: Order::Ascending })?;
        vcpu.run()
    }

    /// What the call gave, and the address and length that it left.
    fn pre_fault(&mut self, range: GpaRange) -> (Result<(), Errno>, (u64, u64)) {
        let mut left =
            kvm_pre_fault_memory { gpa: range.start().raw(), size: range.bytes(), ..Default::default() };
        let result = self.vcpu().pre_fault_memory(&mut left);
        (result, (left.gpa, left.size))
    }

    fn vcpu(&mut self) -> &mut K::Vcpu {
        self.machine.lend().vcpus.first_mut().expect("the machine has a vCPU")
    }

    /// A touch and a pre-fault of this page go back to the VMM for want of private memory.
    fn check_missing(&mut self, page: u64) {
        let wanted = Some(MemoryFault { range: pages(page, 1), private: true });
        for access in [Access::Read, Access::Write] {
            let expected =
                GuestError::MemoryFault { gpa: pages(page, 1).start(), bytes: PAGE, private: true };
            assert_eq!(self.touch(page, access, 0), Err(expected));
            assert_eq!(self.vcpu().memory_fault(), wanted);
        }
        let range = pages(page, 1);
        let (result, left) = self.pre_fault(range);
        assert_eq!((result, left), (Err(Errno::FAULT), (range.start().raw(), range.bytes())));
        assert_eq!(self.vcpu().memory_fault(), wanted);
    }
}

fn create<K: Kernel>(machine: &Machine<K>, size: u64, flags: u64) -> Result<File<K>, Errno> {
    machine.vm().create_guest_memfd(&kvm_create_guest_memfd { size, flags, ..Default::default() })
}

/// A guest_memfd can be neither read, written nor mapped; its size is a whole number of pages, flags are refused, holes are
/// whole pages, and each has an inode of its own.
pub fn a_guest_memfd_keeps_its_content_from_the_vmm<K: Kernel>(kernel: &K) {
    let Some(protected) = Protected::new(kernel) else { return };
    let expected = [Errno::INVAL, Errno::INVAL, Errno::NODEV, Errno::INVAL];
    for (operation, errno) in FileOperation::ALL.into_iter().zip(expected) {
        assert_eq!(protected.file.attempt(operation), Err(errno), "{operation:?}");
    }
    for (size, flags) in [(0, 0), (PAGE - 1, 0), (PAGE + 1, 0), (1 << 63, 0), (PAGE, 1 << 40)] {
        let made = create(&protected.machine, size, flags).err();
        assert_eq!(made, Some(Errno::INVAL), "{size:#x} bytes, flags {flags:#x}");
    }
    for (offset, bytes, result) in [
        (0, PAGE, Ok(())),
        (COUNT * PAGE, PAGE, Ok(())),
        (0, COUNT * PAGE * 2, Ok(())),
        (PAGE - 1, PAGE, Err(Errno::INVAL)),
        (0, PAGE - 1, Err(Errno::INVAL)),
        (0, PAGE + 1, Err(Errno::INVAL)),
        (0, 0, Err(Errno::INVAL)),
    ] {
        assert_eq!(protected.file.fallocate(PUNCH, offset, bytes), result, "{bytes:#x} bytes at {offset:#x}");
    }
    let second = create(&protected.machine, PAGE, 0).expect("a second one can be made");
    assert_ne!(protected.file.inode(), second.inode());
}

/// What a guest wrote while a page was shared, and while it was private, is there when it is so again. A hole empties the
/// private one alone.
pub fn content_survives_conversion<K: Kernel>(kernel: &K) {
    let Some(mut protected) = Protected::new(kernel) else { return };
    let (shared, private) = (|page| page, |page| page + COUNT);
    for page in 500..524 {
        protected.touch(page, Access::Write, shared(page)).expect("a shared page is written");
    }
    let converted = pages(506, 12);
    protected.convert(converted, PRIVATE);
    for page in 506..518 {
        assert_eq!(protected.touch(page, Access::Read, 0), Ok(0), "private memory starts empty");
        protected.touch(page, Access::Write, private(page)).expect("a private page is written");
        assert_eq!(
            protected.memory.read_word(page * PAGE),
            word_of(shared(page)),
            "the VMM sees the shared page"
        );
    }
    protected.convert(converted, SHARED);
    for page in 500..524 {
        assert_eq!(protected.touch(page, Access::Read, 0), Ok(word_of(shared(page))));
    }
    protected.file.fallocate(PUNCH, 510 * PAGE, 4 * PAGE).expect("a hole can be punched");
    protected.convert(converted, PRIVATE);
    for page in 506..518 {
        let expected = if (510..514).contains(&page) { 0 } else { word_of(private(page)) };
        assert_eq!(protected.touch(page, Access::Read, 0), Ok(expected), "page {page}");
    }
}

/// A private page without a slot, in a slot without private memory, or whose descriptor was closed, goes back to the VMM:
/// EFAULT, and `kvm_run` says which page was wanted as what.
pub fn a_private_page_that_is_not_there_goes_back_to_the_vmm<K: Kernel>(kernel: &K) {
    let Some(mut protected) = Protected::new(kernel) else { return };
    protected.convert(pages(0, COUNT + 8), PRIVATE);
    protected.check_missing(COUNT + 3);
    protected.touch(3, Access::Write, 3).expect("this one is there");
    assert_eq!(protected.vcpu().memory_fault(), None);
    protected.remove_slot();
    protected.check_missing(3);
    protected.add_slot(0);
    protected.check_missing(3);
    protected.convert(pages(3, 1), SHARED);
    protected.touch(3, Access::Write, 7).expect("the page is shared now");
    assert_eq!(protected.memory.read_word(3 * PAGE), word_of(7));

    // What lies before a page that is not there is mapped, and the call says where it stopped.
    protected.vcpu().renew_root().expect("the root can be renewed");
    let (result, left) = protected.pre_fault(pages(3, 4));
    assert_eq!((result, left), (Ok(()), (pages(4, 1).start().raw(), 3 * PAGE)));
}

/// Closing the descriptor takes the private pages along, and leaves the shared ones.
pub fn a_closed_guest_memfd_takes_its_pages_along<K: Kernel>(kernel: &K) {
    let Some(mut protected) = Protected::new(kernel) else { return };
    protected.convert(pages(0, 8), PRIVATE);
    for page in 0..16 {
        protected.touch(page, Access::Write, page).expect("the page is there");
    }
    // Another takes its place, which no slot knows of.
    let other = create(&protected.machine, PAGE, 0).expect("a guest_memfd can be made");
    drop(std::mem::replace(&mut protected.file, other));
    protected.check_missing(5);
    assert_eq!(protected.touch(12, Access::Read, 0), Ok(word_of(12)));
}

/// Private memory is pre-faulted page by page, also where shared memory would be mapped huge; the guest then pays nothing.
pub fn private_memory_is_pre_faulted_by_small_pages<K: Kernel>(kernel: &K) {
    let Some(mut protected) = Protected::new(kernel) else { return };
    protected.touch(0, Access::Write, 0).expect("the guest can run");
    protected.convert(pages(0, COUNT), PRIVATE);
    let before = protected.machine.mapped().expect("pages are counted");
    let range = pages(0, COUNT);
    let (result, left) = protected.pre_fault(range);
    assert_eq!((result, left), (Ok(()), (end(range).raw(), 0)));
    let after = protected.machine.mapped().expect("pages are counted");
    assert_eq!((after.pages_4k - before.pages_4k, after.pages_2m, after.pages_1g), (COUNT, 0, 0));
    let faults = |protected: &mut Protected<K>| {
        protected.vcpu().stats().expect("faults are counted").get("pf_taken").expect("faults are counted")
    };
    let before = faults(&mut protected);
    for page in (0..COUNT).step_by(37) {
        protected.touch(page, Access::Write, page).expect("the page is there");
    }
    assert_eq!(faults(&mut protected), before);
}

fn end(range: GpaRange) -> Gpa {
    range.start().wrapping_add(range.bytes())
}
