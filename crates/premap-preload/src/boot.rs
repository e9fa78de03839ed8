//! What the first entry hands over to the guest: read from the vCPUs' registers and from guest memory.
//!
//! Guest memory is read as the kernel reads another process's: where it is not what it seems, that is an errno and no
//! signal. Memory that a userfaultfd handler gives is not read, since nobody knows when it will.

use std::ops::Range;

use premap_address_space::{Area, Kind};

use crate::given::HandOver;
use crate::kvm::{self, Registers};
use crate::memory::Slot;

/// Where VMMs put what they hand over. A guest that was restored has it there still: Linux leaves the low 64 KiB alone.
const USUAL_START_INFO: u64 = 0x6000;
const USUAL_ZERO_PAGE: u64 = 0x7000;
/// More entries than any map has.
const MOST_ENTRIES: usize = 1024;
/// RAM, in both protocols' maps.
const RAM: u32 = 1;

/// Guest memory, to be read.
pub(crate) struct GuestMemory<'a> {
    pub(crate) slots: &'a [Slot],
    pub(crate) areas: &'a [Area],
}

impl GuestMemory<'_> {
    fn read(&self, gpa: u64, len: usize) -> Option<Vec<u8>> {
        let bytes = u64::try_from(len).ok()?;
        let holds = |start: u64, size: u64, at: u64| {
            at >= start && at - start <= size && size - (at - start) >= bytes
        };
        let slot = self.slots.iter().find(|slot| slot.slot >> 16 == 0 && holds(slot.gpa, slot.bytes, gpa))?;
        let host = slot.host.checked_add(gpa - slot.gpa)?;
        let area = self.areas.iter().find(|area| holds(area.start, area.end - area.start, host))?;
        if matches!(area.kind, Kind::Userfault | Kind::Device | Kind::Closed) {
            return None;
        }
        kvm::read_own_memory(host, len).ok()
    }
}

/// Looks at vCPUs that have not run yet. The one that boots need not be the first to enter.
pub(crate) fn hand_over(vcpus: &[Registers], memory: &GuestMemory<'_>) -> HandOver {
    let read = |gpa, len| memory.read(gpa, len);
    let by_registers =
        vcpus.iter().find_map(|vcpu| start_info(vcpu.rbx, &read).or_else(|| zero_page(vcpu.rsi, &read)));
    if let Some(ram) = by_registers {
        return HandOver::Ram(ram);
    }
    if vcpus.iter().any(Registers::are_at_reset) {
        return HandOver::Firmware;
    }
    let left = start_info(USUAL_START_INFO, &read).or_else(|| zero_page(USUAL_ZERO_PAGE, &read));
    left.map_or(HandOver::Unknown, HandOver::Ram)
}

type Read<'a> = dyn Fn(u64, usize) -> Option<Vec<u8>> + 'a;

/// The RAM of a PVH start info (Xen's `hvm_start_info`, from version 1 on).
fn start_info(at: u64, read: &Read<'_>) -> Option<Vec<Range<u64>>> {
    const MAGIC: u64 = 0x336e_c578;
    let info = read(at, 56)?;
    if field(&info, 0, 4) != MAGIC || field(&info, 4, 4) == 0 {
        return None;
    }
    let count = usize::try_from(field(&info, 48, 4)).ok().filter(|count| *count <= MOST_ENTRIES)?;
    ram(&read(field(&info, 40, 8), count * 24)?, 24)
}

/// The RAM of Linux's boot parameters (`struct boot_params`).
fn zero_page(at: u64, read: &Read<'_>) -> Option<Vec<Range<u64>>> {
    const COUNT: usize = 0x1e8;
    const BOOT_FLAG: usize = 0x1fe;
    const HEADER: usize = 0x202;
    const TABLE: usize = 0x2d0;
    let page = read(at, 4096)?;
    if field(&page, BOOT_FLAG, 2) != 0xaa55 || page.get(HEADER..HEADER + 4)? != b"HdrS" {
        return None;
    }
    let bytes = usize::from(*page.get(COUNT)?) * 20;
    ram(page.get(TABLE..TABLE + bytes)?, 20)
}

/// The RAM of a map whose entries have so many bytes: an address, a size, and a type.
fn ram(map: &[u8], entry: usize) -> Option<Vec<Range<u64>>> {
    let entries = map.chunks_exact(entry).filter(|entry| field(entry, 16, 4) == u64::from(RAM));
    let ranges: Vec<_> = entries
        .map(|entry| {
            let start = field(entry, 0, 8);
            start..start.saturating_add(field(entry, 8, 8))
        })
        .filter(|range| !range.is_empty())
        .collect();
    // A map without RAM is no map of a guest's.
    (!ranges.is_empty()).then_some(ranges)
}

/// A number of that many bytes; what lies outside reads as zeros.
fn field(bytes: &[u8], at: usize, size: usize) -> u64 {
    let bytes = bytes.get(at..at + size).unwrap_or_default();
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const MAP: [(u64, u64, u32); 3] = [(0, 0xa_0000, 1), (0xa_0000, 0x6_0000, 2), (4 * GIB, GIB, 1)];

    fn entry(at: (u64, u64, u32), bytes: usize) -> Vec<u8> {
        let mut entry = [at.0.to_le_bytes(), at.1.to_le_bytes()].concat();
        entry.extend(at.2.to_le_bytes());
        entry.resize(bytes, 0);
        entry
    }

    /// Guest memory of 64 KiB with a start info and a zero page where VMMs put them, or elsewhere.
    struct Guest(Vec<u8>);

    impl Guest {
        fn put(mut self, at: u64, bytes: &[u8]) -> Self {
            let at = usize::try_from(at).unwrap();
            self.0[at..at + bytes.len()].copy_from_slice(bytes);
            self
        }

        fn with_start_info(self, at: u64) -> Self {
            let map: Vec<_> = MAP.iter().flat_map(|one| entry(*one, 24)).collect();
            let fields = [(0, 0x336e_c578, 4), (4, 1, 4), (40, 0x9000, 8), (48, 3_u64, 4)];
            let put = |guest: Self, (offset, value, size): (u64, u64, usize)| {
                guest.put(at + offset, &value.to_le_bytes()[..size])
            };
            fields.into_iter().fold(self, put).put(0x9000, &map)
        }

        fn with_zero_page(self, at: u64) -> Self {
            let map: Vec<_> = MAP.iter().flat_map(|one| entry(*one, 20)).collect();
            self.put(at + 0x1e8, &[3])
                .put(at + 0x1fe, &[0x55, 0xaa])
                .put(at + 0x202, b"HdrS")
                .put(at + 0x2d0, &map)
        }

        #[track_caller]
        fn check(&self, vcpus: &[Registers], expected: &HandOver) {
            let host = self.0.as_ptr().addr() as u64;
            let bytes = self.0.len() as u64;
            let slots = [Slot { slot: 0, flags: 0, gpa: 0, bytes, host }];
            let areas = premap_address_space::areas().unwrap();
            assert_eq!(&hand_over(vcpus, &GuestMemory { slots: &slots, areas: &areas }), expected);
            // Memory that is not there is no map, and no fault.
            let slots = [Slot { host: 4096, ..slots[0] }];
            let nothing = hand_over(&vcpus[..1], &GuestMemory { slots: &slots, areas: &areas });
            assert!(!matches!(nothing, HandOver::Ram(_)));
        }
    }

    fn guest() -> Guest {
        Guest(vec![0; 1 << 16])
    }

    #[test]
    fn both_protocols_maps_are_read_from_any_vcpu_s_registers() {
        let ram = HandOver::Ram(vec![0..0xa_0000, 4 * GIB..5 * GIB]);
        let at_reset = Registers { rip: 0xfff0, cs_base: 0xffff_0000, ..Registers::default() };
        let pvh = Registers { rbx: 0x3000, rip: 0x10_0000, ..Registers::default() };
        let linux = Registers { rsi: 0x4000, rip: 0x20_0000, ..Registers::default() };
        guest().with_start_info(0x3000).check(&[at_reset, pvh], &ram);
        guest().with_zero_page(0x4000).check(&[at_reset, linux], &ram);
    }

    #[test]
    fn what_was_handed_over_long_ago_is_read_where_vmms_put_it() {
        let ram = HandOver::Ram(vec![0..0xa_0000, 4 * GIB..5 * GIB]);
        let running =
            Registers { rbx: 7, rsi: 0xffff_ffff_8000_0000, rip: 0xffff_ffff_8100_0000, cs_base: 0 };
        guest().with_start_info(USUAL_START_INFO).check(&[running], &ram);
        guest().with_zero_page(USUAL_ZERO_PAGE).check(&[running], &ram);
        guest().check(&[running], &HandOver::Unknown);
    }

    #[test]
    fn a_vcpu_at_the_reset_vector_is_firmware_s() {
        let at_reset = Registers { rip: 0xfff0, cs_base: 0xffff_0000, ..Registers::default() };
        guest().check(&[at_reset], &HandOver::Firmware);
        // What is left of another guest in memory does not count.
        guest().with_zero_page(USUAL_ZERO_PAGE).check(&[at_reset], &HandOver::Firmware);
    }

    #[test]
    fn a_map_that_is_cut_or_wrong_is_no_map() {
        let linux = |rsi| [Registers { rsi, ..Registers::default() }];
        guest().with_zero_page(0xf000).put(0xf1e8, &[255]).check(&linux(0xf000), &HandOver::Unknown);
        guest().with_zero_page(0x4000).put(0x4202, b"hdrs").check(&linux(0x4000), &HandOver::Unknown);
        guest().with_zero_page(0x4000).put(0x41e8, &[0]).check(&linux(0x4000), &HandOver::Unknown);
        guest().check(&linux(u64::MAX - 10), &HandOver::Unknown);
        let pvh = [Registers { rbx: 0x3000, ..Registers::default() }];
        guest().with_start_info(0x3000).put(0x3030, &[255; 4]).check(&pvh, &HandOver::Unknown);
        guest().with_start_info(0x3000).put(0x3028, &[255; 8]).check(&pvh, &HandOver::Unknown);
        guest().with_start_info(0x3000).put(0x3004, &[0; 4]).check(&pvh, &HandOver::Unknown);
    }
}
