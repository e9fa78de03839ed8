//! Whatever the module refuses, the mirror says what the Secure-EPT has.

use std::sync::Arc;

use premap_address::{Gfn, Gpa, GpaRange, PAGE_SIZE};
use premap_kvm::abi::{
    KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_create_guest_memfd, kvm_memory_attributes,
    kvm_pre_fault_memory, kvm_userspace_memory_region2,
};
use premap_kvm::tdx::{TdVcpu, TdVm, kvm_tdx_init_mem_region, kvm_tdx_init_vm};
use premap_kvm::{Errno, Vcpu};
use premap_tdx_module::inject::Nth;
use premap_tdx_module::{Class, EntryState, Operand, PageInfo, Seamcall, Status};
use proptest::prelude::*;
use rustix::fs::FallocateFlags;

use super::TdxHost;
use crate::{GuestMemfd, Profile, SoftConfig, SoftVcpu, SoftVm, VmType};

/// Across a boundary of 2 MiB.
const FIRST: u64 = 508;
const PAGES: u64 = 8;

/// What a VMM or a guest does, to so many pages from one on.
#[derive(Clone, Copy, Debug)]
enum Op {
    PreFault(u64, u64),
    Add(u64, u64, bool),
    Finalize,
    Accept(u64, u64),
    Punch(u64, u64),
    Convert(u64, u64, bool),
}

fn op() -> impl Strategy<Value = Op> {
    let part = || (0..PAGES).prop_flat_map(|first| (Just(first), 1..=PAGES - first));
    prop_oneof![
        4 => part().prop_map(|(first, pages)| Op::PreFault(first, pages)),
        4 => (part(), any::<bool>()).prop_map(|((first, pages), measured)| Op::Add(first, pages, measured)),
        1 => Just(Op::Finalize),
        4 => part().prop_map(|(first, pages)| Op::Accept(first, pages)),
        2 => part().prop_map(|(first, pages)| Op::Punch(first, pages)),
        2 => (part(), any::<bool>()).prop_map(|((first, pages), private)| Op::Convert(first, pages, private)),
    ]
}

/// Calls that fail: which, at which time, and whether for good.
fn failure() -> impl Strategy<Value = Option<(Seamcall, u64, bool)>> {
    prop::option::of((prop::sample::select(Seamcall::ALL.to_vec()), 0_u64..3, any::<bool>()))
}

#[repr(C, align(4096))]
struct Content([[u8; 4096]; PAGES as usize]);

struct World {
    vcpu: SoftVcpu,
    vm: SoftVm,
    file: GuestMemfd,
    host: Arc<TdxHost>,
    content: Box<Content>,
}

fn at(page: u64) -> Gpa {
    Gfn::new(FIRST + page).address()
}

impl World {
    fn new(profile: Profile) -> Self {
        let host = TdxHost::new(16 << 20).unwrap();
        let config = SoftConfig { profile, vm_type: VmType::Tdx, ..SoftConfig::default() };
        let vm = SoftVm::on_tdx_host(config, &host).unwrap();
        vm.tdx_init_vm(&kvm_tdx_init_vm { xfam: 3, ..Default::default() }).unwrap();
        let size = PAGES * PAGE_SIZE;
        let file = vm.create_guest_memfd(&kvm_create_guest_memfd { size, ..Default::default() }).unwrap();
        let content = Box::new(Content([[7; 4096]; PAGES as usize]));
        // Shared memory that nobody touches: any address will do.
        let region = kvm_userspace_memory_region2 {
            flags: KVM_MEM_GUEST_MEMFD,
            guest_phys_addr: at(0).raw(),
            memory_size: size,
            guest_memfd: file.number(),
            ..Default::default()
        };
        vm.machine().set_memory_region(&region).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vcpu.tdx_init_vcpu(0).unwrap();
        let mut world = Self { vcpu, vm, file, host, content };
        world.convert(0, PAGES, true);
        world
    }

    fn convert(&mut self, first: u64, pages: u64, private: bool) {
        let attributes = if private { KVM_MEMORY_ATTRIBUTE_PRIVATE.into() } else { 0 };
        let size = pages * PAGE_SIZE;
        // Of a VM that died it is EIO.
        let _ = self.vm.set_memory_attributes(&kvm_memory_attributes {
            address: at(first).raw(),
            size,
            attributes,
            flags: 0,
        });
    }

    /// Does it, whatever comes of it.
    fn apply(&mut self, op: Op) {
        match op {
            Op::PreFault(first, pages) => {
                let size = pages * PAGE_SIZE;
                let mut range = kvm_pre_fault_memory { gpa: at(first).raw(), size, ..Default::default() };
                while range.size > 0 && self.vcpu.pre_fault_memory(&mut range).is_ok() {}
            }
            Op::Add(first, pages, measured) => {
                let source_addr = self.content.0.as_ptr().expose_provenance() as u64;
                let mut region =
                    kvm_tdx_init_mem_region { source_addr, gpa: at(first).raw(), nr_pages: pages };
                let _ = self.vcpu.tdx_init_mem_region(&mut region, u32::from(measured));
            }
            Op::Finalize => _ = self.vm.tdx_finalize_vm(),
            Op::Accept(first, pages) => {
                let _ = self.vcpu.accept(GpaRange::new(at(first), pages * PAGE_SIZE));
            }
            Op::Punch(first, pages) => {
                let punch = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE;
                self.file.fallocate(punch, first * PAGE_SIZE, pages * PAGE_SIZE).unwrap();
            }
            Op::Convert(first, pages, private) => self.convert(first, pages, private),
        }
    }

    /// Compares each page: what the mirror maps the module maps, at the same place, and what is reserved neither does.
    fn agree(&self) {
        let td = self.vm.machine().td().unwrap();
        let built = td.built().unwrap();
        let mut reserved = 0;
        for page in 0..PAGES {
            let mirrored = built.table.walk(at(page)).map(|leaf| leaf.pfn);
            let secure = match self.host.module.mem_sept_rd(PageInfo::page(at(page)), built.tdr) {
                Ok(entry) if entry.state == EntryState::Free => None,
                Ok(entry) => {
                    assert!(matches!(entry.state, EntryState::Mapped | EntryState::Pending), "{entry:?}");
                    Some(Gpa::new(entry.entry & 0x000f_ffff_ffff_f000).frame().number())
                }
                Err(failure) => {
                    assert_eq!(failure.class(), Class::EPT_WALK_FAILED);
                    None
                }
            };
            assert_eq!(mirrored.map(|pfn| pfn.number()), secure, "page {page}");
            let gfn = at(page).frame();
            let is_reserved = td.reservations.with(gfn, |block| block.get(gfn)).is_some();
            assert!(!(is_reserved && mirrored.is_some()), "page {page} is reserved and present");
            reserved += u64::from(is_reserved);
        }
        assert_eq!(reserved, td.reservations.count());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_mirror_and_the_secure_ept_agree_whatever_fails(
        profile in prop::sample::select(vec![Profile::PROPOSAL, Profile::COMBINED, Profile::V7_2]),
        ops in prop::collection::vec((op(), failure()), 1..40),
    ) {
        let mut world = World::new(profile);
        for (op, failure) in ops {
            if let Some((call, nth, busy)) = failure {
                let status = if busy {
                    Class::OPERAND_BUSY.on(Operand::TDR)
                } else {
                    Class::OPERAND_INVALID.on(Operand::RCX)
                };
                world.host.module.inject(Some(Arc::new(Nth::new(call, nth, status))));
            }
            world.apply(op);
            world.host.module.inject(None);
            world.agree();
        }
    }
}

#[test]
fn what_fails_while_a_td_is_made_leaves_nothing_behind() {
    let calls = [Seamcall::MngCreate, Seamcall::MngKeyConfig, Seamcall::MngAddcx, Seamcall::MngInit];
    for call in calls {
        let host = TdxHost::new(1 << 20).unwrap();
        // More often than there are keys or memory for.
        for round in 0..200 {
            let config = SoftConfig { vm_type: VmType::Tdx, profile: Profile::V7_2, ..SoftConfig::default() };
            let vm = SoftVm::on_tdx_host(config, &host).unwrap();
            let status: Status = Class::OPERAND_INVALID.on(Operand::RCX);
            host.module.inject(Some(Arc::new(Nth::new(call, 0, status))));
            let init = kvm_tdx_init_vm { xfam: 3, ..Default::default() };
            let error = vm.tdx_init_vm(&init).unwrap_err();
            let expected = if call == Seamcall::MngInit { Errno::INVAL } else { Errno::IO };
            assert_eq!((error.errno, error.hw_error), (expected, status.raw()), "{call}, round {round}");
            host.module.inject(None);
            vm.tdx_init_vm(&init).unwrap();
        }
    }
}
