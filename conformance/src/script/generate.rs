//! Scripts from a seed.
//!
//! Small numbers meet often: three slots, a window of 4,096 pages, and addresses that cluster around a few anchors, two of
//! them on 2 MiB boundaries. One operation in some is wrong on purpose: unaligned, overlapping, unknown flags.

use premap_guest::{Access, Backing, VmType};
use premap_kvm::abi::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_MEMORY_ATTRIBUTE_PRIVATE,
};
use rustix::fs::FallocateFlags;

use super::op::{ARENA, Op, Script, WINDOW};
use super::private::{Descriptor, FILES, PrivateOp};
use crate::fixture::PAGE;

/// Guest pages around which scripts happen; the host memory's anchors are the same modulo its size.
const ANCHORS: [u64; 5] = [0, 500, 512, 1024, 1500];

/// Which VMs scripts are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Among {
    /// Default VMs, on a kernel that may be built without private memory.
    Default,
    /// Default VMs and, most of the time, software-protected ones.
    EveryType,
}

/// Makes the script of this seed and number; the same pair gives the same script for ever.
#[must_use]
pub fn generate(among: Among, seed: u64, number: u64) -> Script {
    let mut dice =
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number.wrapping_mul(0xd134_2543_de82_ef95));
    let backing = *dice.pick(&[
        Backing::Anonymous,
        Backing::Anonymous,
        Backing::TransparentHuge,
        Backing::Memfd,
        Backing::File,
    ]);
    let protected = among == Among::EveryType && !dice.one_in(5);
    let length = 3 + dice.below(10);
    let (vm_type, first) = if protected {
        let first = [dice.create(0), dice.private_slot(0), dice.attributes()];
        (VmType::SoftwareProtected, first.map(Op::Private).to_vec())
    } else {
        (VmType::Default, vec![dice.slot_with(0)])
    };
    // A default VM is asked for private memory too, now and then, where the kernel knows what that is.
    let rarity = match (among, vm_type) {
        (Among::Default, _) => None,
        (Among::EveryType, VmType::Default) => Some(8),
        (Among::EveryType, VmType::SoftwareProtected) => Some(3),
    };
    let mut op = |_| {
        let private = rarity.is_some_and(|times| dice.one_in(times));
        if private { Op::Private(dice.private_op()) } else { dice.op() }
    };
    Script { vm_type, backing, ops: first.into_iter().chain((0..length).map(&mut op)).collect() }
}

/// splitmix64: small, and good enough to choose with.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.roll() % limit
    }

    /// True once in so many times.
    fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        let index = self.below(from.len() as u64);
        &from[usize::try_from(index).expect("an index of the slice")]
    }

    fn vcpu(&mut self) -> usize {
        usize::from(self.one_in(3))
    }

    fn page(&mut self) -> u64 {
        *self.pick(&ANCHORS) + self.below(12)
    }

    fn count(&mut self) -> u64 {
        *self.pick(&[1, 2, 3, 7, 64, 512, 513, 700])
    }

    fn op(&mut self) -> Op {
        match self.below(20) {
            0..3 => {
                let slot = u32::try_from(self.below(3)).expect("below 3");
                if self.one_in(3) {
                    Op::Slot { slot, gpa: 0, bytes: 0, page: 0, flags: 0 }
                } else {
                    self.slot_with(slot)
                }
            }
            3..9 => self.pre_fault(),
            9..15 => {
                let access = *self.pick(&[Access::Read, Access::Write, Access::Write]);
                Op::Guest { vcpu: self.vcpu(), page: self.page() % WINDOW, access }
            }
            15 => Op::HostWrite { page: self.page() % ARENA },
            16 => Op::HostRead { page: self.page() % ARENA },
            17 => {
                let page = self.page() % ARENA;
                Op::Populate { page, count: self.count().min(ARENA - page) }
            }
            18 => {
                let page = self.page() % ARENA;
                Op::Discard { page, count: self.count().min(ARENA - page) }
            }
            _ if self.one_in(2) => Op::KeepMappings,
            _ => Op::DirtyLog { slot: u32::try_from(self.below(3)).expect("below 3") },
        }
    }

    fn slot_with(&mut self, slot: u32) -> Op {
        let flags =
            *self.pick(&[0, 0, 0, 0, KVM_MEM_READONLY, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_LOG_DIRTY_PAGES]);
        let first = *self.pick(&ANCHORS);
        // Congruent modulo 2 MiB more often than not, so that huge mappings are possible.
        let page = if self.one_in(4) { self.below(8) } else { first % 1024 };
        let bytes = *self.pick(&[1, 8, 512, 1024, 1024]) * PAGE;
        let mut op = (first * PAGE, bytes, page, flags);
        if self.one_in(12) {
            match self.below(4) {
                0 => op.0 += 0x800,
                1 => op.1 += 0x10,
                2 => op.3 |= 0x8000,
                _ => op.1 = 0,
            }
        }
        Op::Slot { slot, gpa: op.0, bytes: op.1, page: op.2, flags: op.3 }
    }

    fn private_op(&mut self) -> PrivateOp {
        match self.below(12) {
            0..5 => self.attributes(),
            5..8 => {
                let slot = u32::try_from(self.below(3)).expect("below 3");
                self.private_slot(slot)
            }
            8..10 => self.allocate(),
            10 => PrivateOp::Close { file: self.file() },
            _ => {
                let file = self.file();
                self.create(file)
            }
        }
    }

    fn file(&mut self) -> usize {
        if self.one_in(4) { FILES - 1 } else { 0 }
    }

    fn create(&mut self, file: usize) -> PrivateOp {
        let (mut bytes, mut flags) = (*self.pick(&[8, 512, 1024, 1024, 1500]) * PAGE, 0);
        if self.one_in(12) {
            match self.below(4) {
                0 => bytes += 0x800,
                1 => bytes = 0,
                2 => bytes = 1 << 63,
                _ => flags = 1 << 40,
            }
        }
        PrivateOp::Create { file, bytes, flags }
    }

    fn allocate(&mut self) -> PrivateOp {
        let punch = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE;
        let mut mode = *self.pick(&[punch, punch, punch, FallocateFlags::KEEP_SIZE]);
        let (mut offset, mut bytes) = (self.page() % ARENA * PAGE, self.count() * PAGE);
        if self.one_in(5) {
            match self.below(6) {
                0 => offset += 0x10,
                1 => bytes -= 0x10,
                2 => bytes = 0,
                3 => mode = FallocateFlags::PUNCH_HOLE,
                4 => mode |= FallocateFlags::ZERO_RANGE,
                _ => (offset, bytes) = (PAGE, (1 << 63) - PAGE),
            }
        }
        PrivateOp::Allocate { file: self.file(), mode: mode.bits(), offset, bytes }
    }

    fn private_slot(&mut self, slot: u32) -> PrivateOp {
        let Op::Slot { slot, gpa, bytes, page, flags } = self.slot_with(slot) else {
            unreachable!("slot_with makes slots");
        };
        // Flags that do not go together with private memory come up, and are not the rule.
        let flags =
            if self.one_in(8) { flags } else { flags & !(KVM_MEM_READONLY | KVM_MEM_LOG_DIRTY_PAGES) };
        let flags = if self.one_in(12) { flags } else { flags | KVM_MEM_GUEST_MEMFD };
        let from = match self.below(24) {
            0 => Descriptor::OtherVm,
            1 => Descriptor::Null,
            2 => Descriptor::Closed,
            _ => Descriptor::Own(self.file()),
        };
        let mut offset = *self.pick(&[0, 0, 0, 1, 8, 512]) * PAGE;
        if self.one_in(16) {
            offset = *self.pick(&[0x10, 1 << 40, u64::MAX - 0xfff]);
        }
        PrivateOp::Slot { slot, gpa, bytes, page, flags, from, offset }
    }

    fn attributes(&mut self) -> PrivateOp {
        let (mut gpa, mut bytes) = (self.page() * PAGE, self.count() * PAGE);
        let private = u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE);
        let (mut attributes, mut flags) = (*self.pick(&[private, private, 0]), 0);
        if self.one_in(10) {
            match self.below(5) {
                0 => gpa += 0x10,
                1 => bytes += 0x10,
                2 => bytes = 0,
                3 => attributes |= 1,
                _ => flags = 1,
            }
        }
        PrivateOp::Attributes { gpa, bytes, attributes, flags }
    }

    fn pre_fault(&mut self) -> Op {
        let (mut gpa, mut bytes, mut flags) = (self.page() * PAGE, self.count() * PAGE, 0);
        if self.one_in(10) {
            match self.below(5) {
                0 => gpa += 0x10,
                1 => bytes += 0x10,
                2 => bytes = 0,
                3 => flags = 1,
                _ => (gpa, bytes) = (gpa, !0xfff),
            }
        }
        Op::PreFault { vcpu: self.vcpu(), gpa, bytes, flags }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_script_for_ever_and_another_one_another() {
        for among in [Among::Default, Among::EveryType] {
            assert_eq!(generate(among, 7, 3), generate(among, 7, 3));
            let differ = |number: &u64| generate(among, 7, *number) != generate(among, 8, *number);
            assert_eq!((0..100).filter(differ).count(), 100);
        }
    }

    #[test]
    fn every_kind_of_operation_comes_up() {
        let ops: Vec<_> = (0..200).flat_map(|number| generate(Among::EveryType, 1, number).ops).collect();
        let kinds: std::collections::HashSet<_> = ops.iter().map(std::mem::discriminant).collect();
        assert_eq!(kinds.len(), 10);
        let private = ops.iter().filter_map(|op| if let Op::Private(op) = op { Some(op) } else { None });
        let kinds: std::collections::HashSet<_> = private.map(std::mem::discriminant).collect();
        assert_eq!(kinds.len(), 5);
    }

    #[test]
    fn only_who_asks_for_every_type_gets_protected_vms() {
        let of = |among| (0..200).map(move |number| generate(among, 1, number).vm_type);
        assert!(of(Among::Default).all(|vm_type| vm_type == VmType::Default));
        let protected = of(Among::EveryType).filter(|vm_type| *vm_type == VmType::SoftwareProtected).count();
        assert!((120..190).contains(&protected), "{protected} of 200");
    }
}
