//! Which memory the guest was given at its start, and which it may be given later: the rule, without any system call.
//!
//! A VMM reserves address space and slots for memory that a guest may be given one day: a virtio-mem device's, or a DIMM's
//! that is not plugged yet. To map that ahead would take the host's memory for nothing. No call to KVM tells such a slot
//! from another one, but what a guest was given, something must tell the guest:
//!
//! | the first entry is | the guest was given |
//! |---|---|
//! | by a boot protocol that hands over a memory map (PVH, Linux) | the writable slots that hold RAM of that map, above 4 GiB up to its end |
//! | at the reset vector: firmware, on a PC | what [lies where a PC has its RAM](firmware) |
//! | anywhere else: a guest that was restored, or an unknown VMM | the slots whose memory goes on from that at 0 |
//!
//! In the last two, all that lies below 4 GiB is the guest's, and above, what can't be told is left; it is a user's to say
//! that it is mapped all the same. Read-only slots are never pools.
//!
//! The rule is x86's. Elsewhere every slot counts as given.

use std::ops::Range;

use premap_address_space::Area;

use crate::memory::Slot;

/// Where a PC goes on with its RAM above the devices.
const HIGH: u64 = 4 << 30;
/// The low end of the firmware's and the screen's place below 1 MiB, and its end.
const LEGACY_END: u64 = 1 << 20;
/// A PC with RAM above 4 GiB has at least so much below.
const LOW_AT_LEAST: u64 = 2 << 30;
/// A PC's place for memory devices begins on such a boundary.
const DEVICE_MEMORY_ALIGN: u64 = 1 << 30;

/// What the first entry tells of the guest's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum HandOver {
    /// Where the guest has RAM, as its boot protocol hands it over.
    Ram(Vec<Range<u64>>),
    /// The vCPU is at the reset vector.
    Firmware,
    /// Nothing.
    Unknown,
}

/// What is behind a slot: a mapping, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Backed {
    pub(crate) slot: Slot,
    /// The file at the slot's first byte, and where in it that byte is.
    pub(crate) file: Option<(FileId, u64)>,
}

/// A file: its device and its number there.
pub(crate) type FileId = ((u32, u32), u64);

impl Backed {
    /// What is behind a slot.
    pub(crate) fn of(slot: Slot, areas: &[Area]) -> Self {
        let area = areas.iter().find(|area| (area.start..area.end).contains(&slot.host));
        let file = area.and_then(|area| {
            let file = area.file.as_ref()?;
            Some(((file.device, file.inode), file.offset + (slot.host - area.start)))
        });
        Self { slot, file }
    }

    fn end(&self) -> u64 {
        self.slot.gpa.saturating_add(self.slot.bytes)
    }

    fn is_writable(&self) -> bool {
        self.slot.flags & premap_kvm::abi::KVM_MEM_READONLY == 0
    }

    /// Whether `next` has the memory that goes on just where this slot's ends.
    fn goes_on_in(&self, next: &Self) -> bool {
        match (self.file, next.file) {
            (None, None) => self.slot.host.checked_add(self.slot.bytes) == Some(next.slot.host),
            (Some((file, offset)), Some((other, at))) => {
                file == other && offset.checked_add(self.slot.bytes) == Some(at)
            }
            _ => false,
        }
    }
}

/// Finds the slots, and parts of slots, that the guest may be given only later, or of which that can't be told.
pub(crate) fn pools(mut slots: Vec<Backed>, hand_over: &HandOver) -> Vec<Slot> {
    slots.retain(|backed| backed.slot.slot >> 16 == 0);
    slots.sort_by_key(|backed| backed.slot.gpa);
    let given = match hand_over {
        HandOver::Ram(ram) => return beyond_ram(&slots, ram),
        HandOver::Firmware => firmware(&slots),
        HandOver::Unknown => going_on(&slots),
    };
    let pools = slots.iter().zip(given).filter(|(backed, given)| !given && backed.is_writable());
    pools.map(|(backed, _)| backed.slot).collect()
}

/// Whether memory devices' slots may lie there: for those that come later, nothing else tells.
pub(crate) fn may_be_plugged(slot: &Slot) -> bool {
    slot.gpa >= HIGH && slot.slot >> 16 == 0 && slot.flags & premap_kvm::abi::KVM_MEM_READONLY == 0
}

/// The writable slots that hold no RAM and, above 4 GiB, what of a slot lies beyond the RAM in it.
fn beyond_ram(slots: &[Backed], ram: &[Range<u64>]) -> Vec<Slot> {
    let beyond = |one: &Backed| {
        let in_slot = ram.iter().filter(|ram| ram.start < one.end() && ram.end > one.slot.gpa);
        let end = match in_slot.map(|ram| ram.end).max() {
            None => one.slot.gpa,
            Some(end) if one.slot.gpa >= HIGH => end.min(one.end()),
            Some(_) => one.end(),
        };
        let given = end - one.slot.gpa;
        let rest = Slot {
            gpa: end,
            bytes: one.slot.bytes - given,
            host: one.slot.host.saturating_add(given),
            ..one.slot
        };
        (rest.bytes > 0).then_some(rest)
    };
    slots.iter().filter(|one| one.is_writable()).filter_map(beyond).collect()
}

/// A PC's RAM: from 0 up to the devices below 4 GiB and, where that is 2 GiB at least, on from 4 GiB.
///
/// Above 4 GiB it is one stretch. A slot there is RAM that begins at 4 GiB or where such RAM ends, and either goes on in
/// the same memory (the VMM has one mapping and cuts it), or begins where no device's memory may (each NUMA node has a
/// mapping of its own). Memory devices come after it, from the next boundary of 1 GiB on.
fn firmware(slots: &[Backed]) -> Vec<bool> {
    let mut low: Option<&Backed> = None;
    let mut end = 0;
    for one in slots.iter().filter(|one| one.slot.gpa < HIGH && one.is_writable()) {
        if one.slot.gpa <= end.max(LEGACY_END) && one.end() > end {
            (low, end) = (Some(one), one.end());
        }
    }
    let mut last = low.filter(|_| end >= LOW_AT_LEAST);
    let mut next = HIGH;
    let mut given = Vec::new();
    for one in slots {
        let high = one.slot.gpa >= HIGH;
        let yes = !high
            || last.filter(|_| one.slot.gpa == next).is_some_and(|before| {
                !one.slot.gpa.is_multiple_of(DEVICE_MEMORY_ALIGN) || before.goes_on_in(one)
            });
        if high && yes {
            (last, next) = (Some(one), one.end());
        }
        given.push(yes);
    }
    given
}

/// What lies below 4 GiB, and what goes on from that.
fn going_on(slots: &[Backed]) -> Vec<bool> {
    let mut given: Vec<bool> = Vec::new();
    for (number, one) in slots.iter().enumerate() {
        let before = slots[..number].iter().zip(&given);
        let yes = one.slot.gpa < HIGH
            || before.filter(|(_, given)| **given).any(|(before, _)| before.goes_on_in(one));
        given.push(yes);
    }
    given
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    /// Where the first mapping lies in the VMM.
    const A: u64 = 0x7f00_0000_0000;
    /// And another.
    const B: u64 = 0x7e00_0000_0000;
    const C: u64 = 0x7d00_0000_0000;

    fn slot(gpa: u64, bytes: u64, host: u64) -> Backed {
        Backed { slot: Slot { slot: 0, flags: 0, gpa, bytes, host }, file: None }
    }

    fn rom(gpa: u64, bytes: u64, host: u64) -> Backed {
        let mut rom = slot(gpa, bytes, host);
        rom.slot.flags = premap_kvm::abi::KVM_MEM_READONLY;
        rom
    }

    fn of_file(inode: u64, offset: u64, backed: Backed) -> Backed {
        Backed { file: Some((((0, 1), inode), offset)), ..backed }
    }

    #[track_caller]
    fn check(slots: &[Backed], hand_over: &HandOver, expected: &[u64]) {
        let found: Vec<_> = pools(slots.to_vec(), hand_over).iter().map(|slot| slot.gpa).collect();
        assert_eq!(found, expected);
    }

    /// QEMU's q35 as it is at the first entry, with `low` bytes below 4 GiB in one mapping.
    fn q35(low: u64) -> Vec<Backed> {
        vec![
            slot(0, 0xc_0000, A),
            rom(0xc_0000, 0x2_0000, B),
            rom(0xe_0000, 0x2_0000, B + 0x2_0000),
            slot(MIB, low - MIB, A + MIB),
            slot(0xfd00_0000, 16 * MIB, C),
            rom(0xfffc_0000, 0x4_0000, B + 0x4_0000),
        ]
    }

    fn with(mut slots: Vec<Backed>, more: &[Backed]) -> Vec<Backed> {
        slots.extend_from_slice(more);
        slots
    }

    #[test]
    fn a_boot_protocol_s_map_says_which_slots_are_the_guest_s() {
        // Cloud Hypervisor's virtio-mem: a region of its own behind the RAM.
        let slots =
            [slot(0, 3 * GIB, A), slot(4 * GIB, GIB, B), slot(5 * GIB, 8 * GIB, C), rom(20 * GIB, GIB, C)];
        let ram = |high: Range<u64>| HandOver::Ram(vec![0..0xa_0000, MIB..3 * GIB, high]);
        check(&slots, &ram(4 * GIB..5 * GIB), &[5 * GIB]);
        // Of a slot that is RAM in part, the rest may be plugged.
        check(&slots, &ram(4 * GIB..6 * GIB), &[6 * GIB]);
        check(&slots, &ram(4 * GIB..13 * GIB), &[]);
        check(&slots, &ram(5 * GIB..13 * GIB), &[4 * GIB]);
    }

    #[test]
    fn a_pc_s_ram_goes_on_at_4_gib_and_memory_devices_follow_it() {
        check(&q35(GIB), &HandOver::Firmware, &[]);
        // No RAM is above 4 GiB where there is less than 2 below: this is a device's.
        let device = slot(4 * GIB, GIB, C);
        check(&with(q35(GIB), std::slice::from_ref(&device)), &HandOver::Firmware, &[4 * GIB]);
        // Even where the mappings touch.
        check(&with(q35(GIB), &[slot(4 * GIB, GIB, A + GIB)]), &HandOver::Firmware, &[4 * GIB]);
        let high = slot(4 * GIB, GIB, A + 2 * GIB);
        let slots = with(q35(2 * GIB), &[high.clone(), slot(5 * GIB, GIB, C), slot(40 * GIB, GIB, C)]);
        check(&slots, &HandOver::Firmware, &[5 * GIB, 40 * GIB]);
        // All of the RAM is below 4 GiB, and a device begins there.
        check(&with(q35(2 * GIB), &[device]), &HandOver::Firmware, &[4 * GIB]);
        // The VMM cuts its one mapping as it likes.
        let cut = [slot(4 * GIB, GIB, A + 2 * GIB), slot(5 * GIB, GIB, A + 3 * GIB)];
        check(&with(q35(2 * GIB), &cut), &HandOver::Firmware, &[]);
    }

    #[test]
    fn numa_nodes_are_told_where_no_device_may_begin() {
        let nodes = [slot(4 * GIB, GIB / 2, A + 2 * GIB), slot(4 * GIB + GIB / 2, GIB, B)];
        check(&with(q35(2 * GIB), &nodes), &HandOver::Firmware, &[]);
        let unclear = [slot(4 * GIB, GIB, A + 2 * GIB), slot(5 * GIB, GIB, B)];
        check(&with(q35(2 * GIB), &unclear), &HandOver::Firmware, &[5 * GIB]);
    }

    #[test]
    fn files_are_told_by_their_offsets_and_not_by_where_they_are_mapped() {
        let low = vec![of_file(7, 0, slot(0, 2 * GIB, A))];
        let high = |inode, offset| of_file(inode, offset, slot(4 * GIB, GIB, B));
        for hand_over in [HandOver::Firmware, HandOver::Unknown] {
            check(&with(low.clone(), &[high(7, 2 * GIB)]), &hand_over, &[]);
            check(&with(low.clone(), &[high(7, 3 * GIB)]), &hand_over, &[4 * GIB]);
            check(&with(low.clone(), &[high(8, 2 * GIB)]), &hand_over, &[4 * GIB]);
            let beside = of_file(8, 0, slot(4 * GIB, GIB, A + 2 * GIB));
            check(&with(low.clone(), &[beside]), &hand_over, &[4 * GIB]);
        }
    }

    #[test]
    fn without_a_word_only_memory_that_goes_on_is_the_guest_s() {
        let slots = [
            slot(0, 3 * GIB, A),
            slot(0xd000_0000, MIB, C),
            slot(4 * GIB, GIB, A + 3 * GIB),
            slot(5 * GIB, GIB, A + 4 * GIB),
            slot(6 * GIB, GIB, B),
            rom(7 * GIB, GIB, C),
        ];
        check(&slots, &HandOver::Unknown, &[6 * GIB]);
    }

    #[test]
    fn the_second_address_space_and_odd_slots_are_no_matter() {
        let mut smm = slot(8 * GIB, GIB, A);
        smm.slot.slot = 1 << 16;
        let odd = Backed {
            slot: Slot { slot: 1, flags: 0, gpa: u64::MAX - 4095, bytes: 8192, host: u64::MAX },
            file: None,
        };
        for hand_over in [HandOver::Firmware, HandOver::Unknown, HandOver::Ram(vec![])] {
            check(&[smm.clone(), odd.clone()], &hand_over, &[odd.slot.gpa]);
        }
        check(&[], &HandOver::Firmware, &[]);
    }
}
