//! TDs: building, running, taking memory away, on every profile that has them.
#![expect(clippy::unwrap_used, reason = "a test that can't set up its machine fails")]

mod guest;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use guest::*;
use premap_address::{Gpa, GpaRange, PAGE_SIZE};
use premap_kvm::abi::{
    KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_create_guest_memfd, kvm_memory_attributes,
    kvm_userspace_memory_region2,
};
use premap_kvm::tdx::{TdVcpu, TdVm, TdxError, kvm_tdx_init_mem_region, kvm_tdx_init_vm, tdx_cpuid};
use premap_kvm::{Errno, Vm};
use premap_softkvm::tdx::{Accepted, TdxHost};
use premap_softkvm::{GuestFault, GuestMemfd, Profile, SoftConfig, SoftVcpu, SoftVm, VmType};
use premap_tdx::Mrtd;
use premap_tdx::measure::{CHUNK, Chunk};
use premap_tdx_module::Seamcall;
use rustix::fs::FallocateFlags;

const GPA: u64 = 1 << 32;
const PAGES: u64 = 1024;
const MEASURE: u32 = 1;
const WITH_TDX: [Profile; 5] =
    [Profile::V6_16, Profile::V6_19, Profile::V7_2, Profile::PROPOSAL, Profile::COMBINED];

/// A TD with private memory at [`GPA`], not finalized.
struct Td {
    host: Arc<TdxHost>,
    // Dropped before the memory behind its slot.
    vcpus: Vec<SoftVcpu>,
    vm: SoftVm,
    file: GuestMemfd,
    _memory: Memory,
}

impl Td {
    fn new(profile: Profile, vcpus: u32) -> Self {
        let host = TdxHost::new(1 << 30).unwrap();
        let config = SoftConfig { profile, vm_type: VmType::Tdx, ..SoftConfig::default() };
        let vm = SoftVm::on_tdx_host(config, &host).unwrap();
        vm.tdx_init_vm(&kvm_tdx_init_vm { xfam: 3, ..Default::default() }).unwrap();
        let memory = Memory::anonymous(PAGES);
        let request = kvm_create_guest_memfd { size: PAGES * PAGE_SIZE, ..Default::default() };
        let file = vm.create_guest_memfd(&request).unwrap();
        let region = kvm_userspace_memory_region2 {
            flags: KVM_MEM_GUEST_MEMFD,
            guest_phys_addr: GPA,
            memory_size: PAGES * PAGE_SIZE,
            userspace_addr: memory.hva().raw(),
            guest_memfd: file.number(),
            ..Default::default()
        };
        set2(&vm, &region).unwrap();
        make(&vm, GPA, PAGES, KVM_MEMORY_ATTRIBUTE_PRIVATE.into());
        let mut vcpus: Vec<SoftVcpu> = (0..vcpus).map(|id| vm.create_vcpu(id).unwrap()).collect();
        for vcpu in &mut vcpus {
            vcpu.tdx_init_vcpu(0x80_9000).unwrap();
        }
        Self { host, vcpus, vm, file, _memory: memory }
    }

    /// Adds pages of this content, reserved first where that is asked for.
    fn add(&mut self, page: u64, content: &[Page], flags: u32) -> Result<(), TdxError> {
        let pages = content.len() as u64;
        let (gpa, vcpu) = (GPA + page * PAGE_SIZE, &mut self.vcpus[0]);
        if self.vm.config().profile == Profile::PROPOSAL {
            assert_eq!(pre_fault(vcpu, gpa, pages).0, Ok(()));
        }
        let source_addr = content.as_ptr().expose_provenance() as u64;
        vcpu.tdx_init_mem_region(&mut kvm_tdx_init_mem_region { source_addr, gpa, nr_pages: pages }, flags)
    }

    fn calls(&self, call: Seamcall) -> u64 {
        self.host.seamcalls().of(call).calls
    }
}

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

fn content(pages: u8) -> Vec<Page> {
    (1..=pages).map(|page| Page([page; 4096])).collect()
}

fn make(vm: &SoftVm, gpa: u64, pages: u64, attributes: u64) {
    let size = pages * PAGE_SIZE;
    vm.set_memory_attributes(&kvm_memory_attributes { address: gpa, size, attributes, flags: 0 }).unwrap();
}

fn at(page: u64) -> Gpa {
    Gpa::new(GPA + page * PAGE_SIZE)
}

fn range(page: u64, pages: u64) -> GpaRange {
    GpaRange::new(at(page), pages * PAGE_SIZE)
}

fn errno<T: std::fmt::Debug>(result: Result<T, TdxError>) -> Errno {
    result.unwrap_err().errno
}

#[test]
fn what_is_added_is_measured_and_the_guest_finds_it() {
    let mut digests = Vec::new();
    for profile in WITH_TDX {
        let mut td = Td::new(profile, 2);
        td.add(0, &content(4), MEASURE).unwrap();
        td.add(700, &content(2), 0).unwrap();
        td.vm.tdx_finalize_vm().unwrap();
        assert_eq!(mapped(&td.vm), [6, 0, 0]);
        assert_eq!(td.vcpus[1].read(at(3)), Ok(u64::from_ne_bytes([4; 8])), "{profile}");
        td.vcpus[0].write(at(3), 9).unwrap();
        assert_eq!(td.vcpus[1].read(at(3)), Ok(9));
        digests.push(td.vm.mrtd().unwrap());
    }
    let mut mrtd = <Mrtd>::new();
    for (page, fill) in [(0, 1_u8), (1, 2), (2, 3), (3, 4), (700, 1), (701, 2)] {
        mrtd.add(at(page));
        if page < 4 {
            let chunk = [fill; CHUNK];
            for offset in (0..PAGE_SIZE).step_by(CHUNK) {
                mrtd.extend(at(page).wrapping_add(offset), Chunk::new(&chunk));
            }
        }
    }
    assert_eq!(digests, vec![mrtd.finish().mrtd; WITH_TDX.len()], "whatever the way in");
}

#[test]
fn memory_mapped_ahead_is_accepted_without_an_exit() {
    for profile in WITH_TDX {
        let mut td = Td::new(profile, 2);
        td.add(0, &content(4), MEASURE).unwrap();
        td.vm.tdx_finalize_vm().unwrap();
        let ahead = pre_fault(&mut td.vcpus[1], GPA, 512).0;
        if profile == Profile::COMBINED {
            assert_eq!(ahead, Err(Errno::OPNOTSUPP));
        } else {
            pre_fault_all(&mut td.vcpus[1], GPA, 512);
        }
        let exits = stat(&td.vcpus[0], "exits");
        assert_eq!(td.vcpus[0].accept(range(0, 600)), Ok(Accepted { pages: 596, already: 4 }), "{profile}");
        let on_demand = if profile == Profile::COMBINED { 596 } else { 600 - 512 };
        assert_eq!(stat(&td.vcpus[0], "exits") - exits, on_demand, "one a page that was not there");
        assert_eq!(td.calls(Seamcall::MemPageAug), 596);
        assert_eq!(td.vcpus[1].read(at(100)), Ok(0));
    }
}

#[test]
fn the_proposal_reserves_on_any_vcpu_and_adds_what_is_reserved() {
    let mut td = Td::new(Profile::PROPOSAL, 2);
    pre_fault_all(&mut td.vcpus[1], GPA, 4);
    let built = td.calls(Seamcall::MemSeptAdd);
    assert!(built > 0 && td.calls(Seamcall::MemPageAdd) == 0);
    assert_eq!(mapped(&td.vm), [0, 0, 0], "reserved is not present");
    assert_eq!(errno(td.vm.tdx_finalize_vm()), Errno::INVAL, "four reservations are unused");
    let content = content(5);
    let source_addr = content.as_ptr().expose_provenance() as u64;
    let mut region = kvm_tdx_init_mem_region { source_addr, gpa: GPA, nr_pages: 5 };
    let result = td.vcpus[1].tdx_init_mem_region(&mut region, MEASURE);
    assert_eq!(
        (errno(result), region.nr_pages, region.gpa),
        (Errno::IO, 1, GPA + 4 * PAGE_SIZE),
        "the fifth was not"
    );
    assert_eq!(td.calls(Seamcall::MemSeptAdd), built, "a straight shot: no table is built now");
    assert_eq!((mapped(&td.vm), td.calls(Seamcall::MrExtend)), ([4, 0, 0], 64));
    // Once more is harmless, of what is added and of what is reserved.
    pre_fault_all(&mut td.vcpus[0], GPA, 6);
    pre_fault_all(&mut td.vcpus[0], GPA, 6);
    assert_eq!(errno(td.vm.tdx_finalize_vm()), Errno::INVAL);
    td.file
        .fallocate(FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE, 4 * PAGE_SIZE, 2 * PAGE_SIZE)
        .unwrap();
    td.vm.tdx_finalize_vm().unwrap();
}

#[test]
fn kernels_build_as_they_add_and_pre_fault_only_what_is_finalized() {
    for profile in [Profile::V6_16, Profile::V7_2, Profile::COMBINED] {
        let mut td = Td::new(profile, 2);
        assert_eq!(pre_fault(&mut td.vcpus[0], GPA, 4).0, Err(Errno::OPNOTSUPP), "{profile}");
        let content = content(1);
        let source_addr = content.as_ptr().expose_provenance() as u64;
        let mut region = kvm_tdx_init_mem_region { source_addr, gpa: GPA, nr_pages: 1 };
        let on_the_second = td.vcpus[1].tdx_init_mem_region(&mut region, 0);
        if profile == Profile::COMBINED {
            assert_eq!(errno(on_the_second), Errno::INVAL);
        } else {
            on_the_second.unwrap();
        }
    }
}

#[test]
fn each_command_has_the_kernel_s_errno() {
    let config = SoftConfig { profile: Profile::V7_2, vm_type: VmType::Tdx, ..SoftConfig::default() };
    assert_eq!(SoftVm::new(SoftConfig { profile: Profile::V6_12, ..config }).unwrap_err(), Errno::INVAL);
    let vm = SoftVm::new(config).unwrap();
    assert_eq!(vm.check_extension(235), Ok(0b10_0011));
    assert_eq!(vm.create_vcpu(0).unwrap_err(), Errno::IO, "not initialised");
    assert_eq!(errno(vm.tdx_finalize_vm()), Errno::INVAL);
    let good = kvm_tdx_init_vm { xfam: 3, ..Default::default() };
    let mut reserved = good;
    reserved.reserved[11] = 1;
    assert_eq!(errno(vm.tdx_init_vm(&reserved)), Errno::INVAL);
    assert_eq!(errno(vm.tdx_init_vm(&kvm_tdx_init_vm { attributes: 1 << 40, ..good })), Errno::INVAL);
    let no_sse = vm.tdx_init_vm(&kvm_tdx_init_vm { xfam: 1, ..good }).unwrap_err();
    assert!(no_sse.errno == Errno::INVAL && no_sse.hw_error >> 32 == 0xc000_0100, "{no_sse}");
    let mut with_cpuid = good;
    with_cpuid.cpuid.nent = 2;
    with_cpuid.cpuid.entries[1].function = 7;
    vm.tdx_init_vm(&with_cpuid).unwrap();
    assert_eq!(errno(vm.tdx_init_vm(&good)), Errno::INVAL);
    assert_eq!(errno(vm.tdx_finalize_vm()), Errno::INVAL, "no vCPU");
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut region = kvm_tdx_init_mem_region { source_addr: 0, gpa: GPA, nr_pages: 1 };
    assert_eq!(errno(vcpu.tdx_init_mem_region(&mut region, 0)), Errno::INVAL, "the vCPU is not initialised");
    vcpu.tdx_init_vcpu(0).unwrap();
    assert_eq!(errno(vcpu.tdx_init_vcpu(0)), Errno::INVAL);
    let mut cpuid = tdx_cpuid { nent: 1, ..Default::default() };
    assert_eq!((errno(vcpu.tdx_get_cpuid(&mut cpuid)), cpuid.nent), (Errno::TOOBIG, 2));
    vcpu.tdx_get_cpuid(&mut cpuid).unwrap();
    assert_eq!((cpuid.nent, cpuid.entries[1].function), (2, 7));
    drop((vcpu, vm));

    let mut td = Td::new(Profile::V7_2, 1);
    let page = content(1);
    let source = page.as_ptr().expose_provenance() as u64;
    for (what, source_addr, gpa, nr_pages, flags, expected) in [
        ("flags", source, GPA, 1, 2, Errno::INVAL),
        ("source unaligned", source + 8, GPA, 1, 0, Errno::INVAL),
        ("gpa unaligned", source, GPA + 8, 1, 0, Errno::INVAL),
        ("nothing", source, GPA, 0, 0, Errno::INVAL),
        ("wraps", source, GPA, u64::MAX / PAGE_SIZE, 0, Errno::INVAL),
        ("overflows", source, GPA, u64::MAX, 0, Errno::INVAL),
        ("shared", source, 1 << 47, 1, 0, Errno::INVAL),
        ("no slot", source, 0, 1, 0, Errno::INVAL),
        ("no source", 0, GPA, 1, 0, Errno::FAULT),
    ] {
        let mut region = kvm_tdx_init_mem_region { source_addr, gpa, nr_pages };
        assert_eq!(errno(td.vcpus[0].tdx_init_mem_region(&mut region, flags)), expected, "{what}");
    }
    td.vm.tdx_finalize_vm().unwrap();
    assert_eq!(pre_fault(&mut td.vcpus[0], 1 << 47, 1).0, Err(Errno::INVAL), "the shared bit");
    assert_eq!(pre_fault(&mut td.vcpus[0], (1 << 47) - PAGE_SIZE, 1).0, Err(Errno::NOENT));
    let mut td = Td::new(Profile::V7_2, 1);
    make(&td.vm, GPA, 1, 0);
    assert_eq!(errno(td.add(0, &page, 0)), Errno::INVAL, "not private");
    make(&td.vm, GPA, 1, KVM_MEMORY_ATTRIBUTE_PRIVATE.into());
    td.add(0, &page, 0).unwrap();
    assert_eq!(
        td.vcpus[0].read(at(0)),
        Err(GuestFault::Failed { gpa: at(0), errno: Errno::INVAL }),
        "not yet"
    );
    td.vm.tdx_finalize_vm().unwrap();
    assert_eq!(errno(td.vm.tdx_finalize_vm()), Errno::INVAL);
    assert_eq!(errno(td.add(1, &page, 0)), Errno::INVAL, "finalized");
}

#[test]
fn a_hole_and_a_conversion_take_pages_from_a_running_td() {
    let mut td = Td::new(Profile::V7_2, 1);
    td.vm.tdx_finalize_vm().unwrap();
    pre_fault_all(&mut td.vcpus[0], GPA, 16);
    td.vcpus[0].accept(range(0, 16)).unwrap();
    td.vcpus[0].write(at(5), 55).unwrap();
    let punch = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE;
    td.file.fallocate(punch, 4 * PAGE_SIZE, 4 * PAGE_SIZE).unwrap();
    assert_eq!(mapped(&td.vm), [12, 0, 0]);
    assert_eq!(td.vcpus[0].accept(range(4, 4)), Ok(Accepted { pages: 4, already: 0 }));
    assert_eq!(td.vcpus[0].read(at(5)), Ok(0), "what was taken is lost");
    make(&td.vm, GPA, 2, 0);
    let fault = td.vcpus[0].accept(range(0, 2));
    assert_eq!(fault, Err(GuestFault::Failed { gpa: at(0), errno: Errno::FAULT }));
    assert!(td.vcpus[0].memory_fault().is_some_and(|fault| fault.private && fault.range == range(0, 1)));
}

#[test]
fn memory_is_taken_from_a_td_while_its_guest_accepts_it() {
    let mut td = Td::new(Profile::V7_2, 2);
    td.vm.tdx_finalize_vm().unwrap();
    let (stop, file) = (AtomicBool::new(false), &td.file);
    thread::scope(|scope| {
        for vcpu in &mut td.vcpus {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    vcpu.accept(range(0, 64)).unwrap();
                }
            });
        }
        let punch = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE;
        for round in 0..100 {
            file.fallocate(punch, (round % 60) * PAGE_SIZE, 4 * PAGE_SIZE).unwrap();
        }
        stop.store(true, Ordering::SeqCst);
    });
    td.vcpus[0].accept(range(0, 64)).unwrap();
    assert_eq!(mapped(&td.vm), [64, 0, 0]);
}

#[test]
fn vcpus_reserve_and_augment_side_by_side() {
    let mut td = Td::new(Profile::PROPOSAL, 2);
    let all = |td: &mut Td| {
        thread::scope(|scope| {
            for vcpu in &mut td.vcpus {
                scope.spawn(|| pre_fault_all(vcpu, GPA, PAGES));
            }
        });
    };
    all(&mut td);
    let pages: Vec<Page> = (0..PAGES).map(|_| Page([7; 4096])).collect();
    let source_addr = pages.as_ptr().expose_provenance() as u64;
    let mut region = kvm_tdx_init_mem_region { source_addr, gpa: GPA, nr_pages: PAGES };
    td.vcpus[1].tdx_init_mem_region(&mut region, 0).unwrap();
    td.vm.tdx_finalize_vm().unwrap();
    make(&td.vm, GPA, PAGES, 0);
    make(&td.vm, GPA, PAGES, KVM_MEMORY_ATTRIBUTE_PRIVATE.into());
    assert_eq!(mapped(&td.vm), [0, 0, 0]);
    all(&mut td);
    assert_eq!(mapped(&td.vm), [PAGES, 0, 0]);
    assert_eq!(td.vcpus[0].accept(range(0, PAGES)), Ok(Accepted { pages: PAGES, already: 0 }));
    assert_eq!(stat(&td.vcpus[0], "exits"), 0);
}

#[test]
fn vcpus_add_pages_side_by_side_and_none_is_lost() {
    const HALF: u64 = PAGES / 2;
    for profile in [Profile::PROPOSAL, Profile::V7_2] {
        let mut td = Td::new(profile, 2);
        if profile == Profile::PROPOSAL {
            pre_fault_all(&mut td.vcpus[0], GPA, PAGES);
        }
        let pages: Vec<Page> = (0..HALF).map(|_| Page([7; 4096])).collect();
        thread::scope(|scope| {
            for (half, vcpu) in (0..2).zip(&mut td.vcpus) {
                let source_addr = pages.as_ptr().expose_provenance() as u64;
                let gpa = GPA + half * HALF * PAGE_SIZE;
                scope.spawn(move || {
                    let mut region = kvm_tdx_init_mem_region { source_addr, gpa, nr_pages: HALF };
                    while region.nr_pages > 0 {
                        // PAGE.ADD has the TD alone, so one of two that meet is told to come again.
                        let done = vcpu.tdx_init_mem_region(&mut region, 0);
                        assert!(done.is_ok() || errno(done) == Errno::BUSY, "{done:?}");
                    }
                });
            }
        });
        td.vm.tdx_finalize_vm().unwrap();
        assert_eq!(mapped(&td.vm), [PAGES, 0, 0], "{profile}");
        let adds = td.host.seamcalls().of(Seamcall::MemPageAdd);
        assert_eq!(adds.calls - adds.refused, PAGES);
        assert_eq!(td.vcpus[1].read(at(PAGES - 1)), Ok(u64::from_ne_bytes([7; 8])));
    }
}

#[test]
fn a_td_gives_all_of_its_memory_back() {
    let host = TdxHost::new(4 << 20).unwrap();
    let config = SoftConfig { profile: Profile::PROPOSAL, vm_type: VmType::Tdx, ..SoftConfig::default() };
    // More rounds than there is memory or keys for.
    for _ in 0..100 {
        let vm = SoftVm::on_tdx_host(config, &host).unwrap();
        vm.tdx_init_vm(&kvm_tdx_init_vm { xfam: 3, ..Default::default() }).unwrap();
        let memory = Memory::anonymous(64);
        let file = vm
            .create_guest_memfd(&kvm_create_guest_memfd { size: 64 * PAGE_SIZE, ..Default::default() })
            .unwrap();
        let region = kvm_userspace_memory_region2 {
            flags: KVM_MEM_GUEST_MEMFD,
            memory_size: 64 * PAGE_SIZE,
            userspace_addr: memory.hva().raw(),
            guest_memfd: file.number(),
            ..Default::default()
        };
        set2(&vm, &region).unwrap();
        make(&vm, 0, 64, KVM_MEMORY_ATTRIBUTE_PRIVATE.into());
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vcpu.tdx_init_vcpu(0).unwrap();
        pre_fault_all(&mut vcpu, 0, 64);
        let content = content(1);
        let source_addr = content.as_ptr().expose_provenance() as u64;
        vcpu.tdx_init_mem_region(&mut kvm_tdx_init_mem_region { source_addr, gpa: 0, nr_pages: 1 }, 0)
            .unwrap();
    }
}
