//! Runs a script on a machine of either kernel.
//!
//! What the two kernels have apart by nature is kept out of sight. A guest on `/dev/kvm` has code and page tables of its
//! own, in a slot of their own: before each touch the guest reads a *warm-up page*, so that their faults are not the
//! touch's, and the pages that they take are subtracted while they are mapped. Each write of a guest writes another word,
//! so that what is read back tells where it went. A pre-fault that spins, as Linux 6.12 does
//! on a stale root, is interrupted after a while.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use premap::{Engine, Stages, Touch as HostTouch};
use premap_guest::{
    Access, Guest, Kernel, Lent, Machine, MachineVm, MappedPages, Memory, Order, PrivateMemory, Slice,
    SlotFlags, VmType,
};
use premap_kvm::abi::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL, kvm_enable_cap, kvm_pre_fault_memory,
    kvm_userspace_memory_region,
};
use premap_kvm::{Errno, Vcpu, Vm};

use super::observation::{Observation, Outcome};
use super::op::{ARENA, Op, Script, WINDOW};
use super::private::{self, Descriptors, PrivateOp};
use crate::fixture::{BASE, PAGE, pages, plan};
use crate::storm;

/// Scripts' slots begin here, above those that the machine makes itself.
const FIRST_SLOT: u32 = 10;
/// The warm-up page, in the same GiB as the window, so that it takes no further page table of the guest's.
const WARM: u64 = 128 << 10;

/// Runs the script on a fresh machine and gives what was observed after each operation. A pre-fault that takes longer
/// than `patience` is interrupted.
pub fn run<K: Kernel>(kernel: &K, script: &Script, patience: Duration) -> Vec<Observation> {
    let mut stage = Stage::new(kernel, script, patience);
    script.ops.iter().map(|op| stage.observe(*op)).collect()
}

struct Stage<'k, K: Kernel> {
    kernel: &'k K,
    // Dropped in this order: the memory outlives the machine that was told of it.
    machine: Machine<K>,
    arena: Memory,
    descriptors: Descriptors<K>,
    patience: Duration,
    /// Operations done so far.
    done: u64,
    /// The scripts' slots that are there: address and length.
    slots: BTreeMap<u32, (u64, u64)>,
    /// Pages that the guest itself takes, and whether they are mapped now.
    own: MappedPages,
    own_mapped: bool,
    keep_mappings: bool,
}

impl<'k, K: Kernel> Stage<'k, K> {
    fn new(kernel: &'k K, script: &Script, patience: Duration) -> Self {
        let mut machine = Machine::of_type(kernel, script.vm_type, 2).expect("a machine can be made");
        let arena = Memory::new(ARENA * PAGE, script.backing).expect("8 MiB can be had");
        let warm = Memory::new(PAGE, premap_guest::Backing::Anonymous).expect("a page can be had");
        warm.write_word(0, 1);
        let gpa = pages(WARM, 1).start();
        machine.slots().add(gpa, warm, SlotFlags::NONE).expect("the warm-up slot can be made");
        let mut stage = Self {
            kernel,
            machine,
            arena,
            descriptors: Descriptors::new(),
            patience,
            done: 0,
            slots: BTreeMap::new(),
            own: MappedPages::default(),
            own_mapped: false,
            // The quirk is one of default VMs.
            keep_mappings: script.vm_type != VmType::Default,
        };
        // Warmed up, the guest has the warm-up page and its own mapped, and no other.
        for vcpu in [0, 1] {
            stage.guest(vcpu, WARM, Access::Read).expect("the guest can read the warm-up page");
        }
        let mapped = stage.machine.mapped().expect("pages are counted");
        stage.own = MappedPages { pages_4k: mapped.pages_4k - 1, ..mapped };
        stage.own_mapped = true;
        stage
    }

    fn observe(&mut self, op: Op) -> Observation {
        let mut seen = Observation {
            outcome: Outcome::Done,
            left: None,
            word: None,
            fault: None,
            faults: 0,
            mapped: MappedPages::default(),
            dirty: Vec::new(),
        };
        match op {
            Op::Slot { slot, gpa, bytes, page, flags } => {
                seen.outcome = self.set_slot(slot, gpa, bytes, page, flags);
            }
            Op::PreFault { vcpu, gpa, bytes, flags } => {
                let mut range = kvm_pre_fault_memory {
                    gpa: BASE.wrapping_add(gpa).raw(),
                    size: bytes,
                    flags,
                    ..Default::default()
                };
                let vcpu = &mut self.machine.lend().vcpus[vcpu];
                seen.outcome = pre_fault(vcpu, &mut range, self.patience).into();
                seen.fault = vcpu.memory_fault();
                seen.left = Some((range.gpa.wrapping_sub(BASE.raw()), range.size));
            }
            Op::Guest { vcpu, page, access } => {
                self.guest(vcpu, WARM, Access::Read).expect("the guest can read the warm-up page");
                self.own_mapped = true;
                let before = self.faults(vcpu);
                match self.guest(vcpu, page, access) {
                    Ok(word) => seen.word = (access == Access::Read).then_some(word),
                    Err(outcome) => seen.outcome = outcome,
                }
                seen.fault = self.machine.lend().vcpus[vcpu].memory_fault();
                seen.faults = self.faults(vcpu) - before;
            }
            Op::HostWrite { page } => {
                let arena = &self.arena;
                let word = 0x1000 + page;
                self.machine
                    .vm()
                    .touch_host_memory(&part(arena, page, 1), || arena.write_word(page * PAGE, word));
            }
            Op::HostRead { page } => {
                let arena = &self.arena;
                let read = || arena.read_word(page * PAGE);
                seen.word = Some(self.machine.vm().touch_host_memory(&part(arena, page, 1), read));
            }
            Op::Populate { page, count } => self.populate(page, count),
            Op::Discard { page, count } => {
                let range = part(&self.arena, page, count);
                let Self { machine, arena, .. } = self;
                let discard = || arena.discard(page * PAGE..(page + count) * PAGE);
                machine.vm().change_host_memory(&range, discard).expect("pages can be given back");
            }
            Op::DirtyLog { slot } => (seen.outcome, seen.dirty) = self.dirty_log(slot),
            Op::KeepMappings => {
                let mut cap = kvm_enable_cap { cap: KVM_CAP_DISABLE_QUIRKS2, ..Default::default() };
                cap.args[0] = KVM_X86_QUIRK_SLOT_ZAP_ALL.into();
                let result = self.machine.vm().enable_cap(&cap);
                self.keep_mappings |= result.is_ok();
                seen.outcome = result.into();
            }
            Op::Private(op) => seen.outcome = self.private(op),
        }
        self.done += 1;
        seen.mapped = self.mapped();
        seen
    }

    fn set_slot(&mut self, slot: u32, gpa: u64, bytes: u64, page: u64, flags: u32) -> Outcome {
        self.check_within_arena(page, bytes);
        let region = kvm_userspace_memory_region {
            slot: FIRST_SLOT + slot,
            flags,
            guest_phys_addr: BASE.wrapping_add(gpa).raw(),
            memory_size: bytes,
            userspace_addr: self.arena.hva().raw() + page * PAGE,
        };
        // SAFETY: the memory lies in the arena, which outlives the VM, and is only reached atomically.
        #[expect(unsafe_code, reason = "hands the arena's memory to the VM")]
        let result = unsafe { self.machine.vm().set_user_memory_region(&region) };
        if result.is_ok() {
            self.note_slot(slot, gpa, bytes);
        }
        result.into()
    }

    fn note_slot(&mut self, slot: u32, gpa: u64, bytes: u64) {
        let before =
            if bytes == 0 { self.slots.remove(&slot) } else { self.slots.insert(slot, (gpa, bytes)) };
        let gone = before.is_some_and(|before| bytes == 0 || before != (gpa, bytes));
        self.own_mapped &= !gone || self.keep_mappings;
    }

    fn private(&mut self, op: PrivateOp) -> Outcome {
        let result = match op {
            PrivateOp::Create { file, bytes, flags } => {
                self.descriptors.create(&self.machine, file, bytes, flags)
            }
            PrivateOp::Close { file } => self.descriptors.close(file),
            PrivateOp::Allocate { file, mode, offset, bytes } => {
                self.descriptors.allocate(file, mode, offset, bytes)
            }
            PrivateOp::Attributes { gpa, bytes, attributes, flags } => {
                let request = private::attributes(gpa, bytes, attributes, flags);
                self.machine.vm().set_memory_attributes(&request)
            }
            PrivateOp::Slot { slot, gpa, bytes, page, flags, from, offset } => {
                self.check_within_arena(page, bytes);
                let file = (self.descriptors.number(self.kernel, from), offset);
                let hva = self.arena.hva().raw() + page * PAGE;
                let region = private::region(FIRST_SLOT + slot, flags, (gpa, bytes), hva, file);
                // SAFETY: as in `set_slot`.
                #[expect(unsafe_code, reason = "hands the arena's memory to the VM")]
                let result = unsafe { self.machine.vm().set_user_memory_region2(&region) };
                if result.is_ok() {
                    self.note_slot(slot, gpa, bytes);
                }
                result
            }
        };
        result.into()
    }

    fn check_within_arena(&self, page: u64, bytes: u64) {
        assert!(page * PAGE + bytes <= self.arena.bytes(), "a script's slot reaches beyond the host memory");
    }

    fn guest(&mut self, vcpu: usize, page: u64, access: Access) -> Result<u64, Outcome> {
        let gpa = pages(page, 1).start();
        let slice =
            Slice { gpa, first: page + WINDOW * self.done, pages: 1, access, order: Order::Ascending };
        let vcpu = &mut self.machine.lend().vcpus[vcpu];
        vcpu.prepare(&slice)?;
        Ok(vcpu.run()?)
    }

    fn faults(&mut self, vcpu: usize) -> u64 {
        let stats = self.machine.lend().vcpus[vcpu].stats().expect("faults are counted");
        stats.get("pf_taken").expect("faults are counted")
    }

    fn populate(&mut self, page: u64, count: u64) {
        let whole = self.arena.region(BASE, HostTouch::Write);
        let host = premap::Hva::new(whole.host.raw() + page * PAGE);
        let plan = plan([premap::Region { range: pages(page, count), host, ..whole }]);
        let Self { machine, arena, .. } = self;
        let Lent { vm, vcpus, .. } = machine.lend();
        let report = vm.touch_host_memory(&part(arena, page, count), || {
            Engine::new().stages(Stages::Host).run(&plan, vcpus).expect("the run can begin")
        });
        assert_eq!(report.host.mapped, count * PAGE, "{report:?}");
    }

    fn dirty_log(&self, slot: u32) -> (Outcome, Vec<u64>) {
        let mut bitmap = vec![0_u64; usize::try_from(ARENA / 64 + 1).expect("a small number")];
        // SAFETY: no slot of a script is longer than the arena, for whose pages the bitmap has room.
        #[expect(unsafe_code, reason = "KVM is not told how long the bitmap is")]
        let result = unsafe { self.machine.vm().get_dirty_log(FIRST_SLOT + slot, &mut bitmap) };
        let dirty = (0..).zip(&bitmap).flat_map(|(word, bits)| {
            (0..64_u64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| word * 64 + bit)
        });
        (result.into(), dirty.collect())
    }

    fn mapped(&self) -> MappedPages {
        let all = self.machine.mapped().expect("pages are counted");
        let own = if self.own_mapped { self.own } else { MappedPages::default() };
        MappedPages {
            pages_4k: all.pages_4k.wrapping_sub(own.pages_4k),
            pages_2m: all.pages_2m.wrapping_sub(own.pages_2m),
            pages_1g: all.pages_1g.wrapping_sub(own.pages_1g),
        }
    }
}

/// Pre-faults. A call that spins is interrupted; one that was interrupted because it is slow goes on.
fn pre_fault(
    vcpu: &mut impl Vcpu,
    range: &mut kvm_pre_fault_memory,
    patience: Duration,
) -> Result<(), Errno> {
    let mut so_far = None;
    loop {
        let before = range.size;
        let (result, interrupted) = storm::interrupted_after(patience, || vcpu.pre_fault_memory(range));
        if !interrupted || result.is_err() || range.size == 0 || range.size == before {
            return so_far.unwrap_or(result);
        }
        so_far = Some(Ok(()));
    }
}

fn part(arena: &Memory, page: u64, count: u64) -> Range<premap::Hva> {
    let start = arena.hva().wrapping_add(page * PAGE);
    start..start.wrapping_add(count * PAGE)
}
