//! Walking the guest's own tables. Entries are those of 64-bit paging (AMD64 APM, volume 2, 5.3): present 0, writable 1,
//! accessed 5, dirty 6, large 7, address 51:12, no-execute 63. An L1's nested tables are spelled alike.

use alloc::vec::Vec;

use premap_address::{Gfn, Gpa, PageSize, Pfn};

use crate::attributes::{Access, Permissions};
use crate::format::{index, leaf_size};

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What the shadow needs of the virtual machine's memory.
pub trait GuestMemory {
    /// The 8 bytes at an address, or `None` where there is no memory.
    fn read(&self, gpa: Gpa) -> Option<u64>;

    /// Replaces 8 bytes, if they still are `old`: how accessed and dirty get into the guest's entries. False if not.
    fn exchange(&self, gpa: Gpa, old: u64, new: u64) -> bool;

    /// The host's frame behind a frame of the guest, and whether it may be written; `None` where there is none.
    fn translate(&self, gfn: Gfn, access: Access) -> Option<(Pfn, bool)>;
}

/// Why the guest's own tables do not translate an access: a fault for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestFault {
    /// The entry of this level is not present.
    NotPresent(u8),
    /// The entries down to the leaf do not permit the access.
    NotPermitted,
    /// A table of this level lies where there is no memory.
    NoMemory(u8),
}

/// Where the guest's tables lead.
#[derive(Debug)]
pub(super) struct GuestWalk {
    /// The tables walked, from the root's level down, each with what the entries above it permit.
    pub(super) tables: Vec<(Gfn, Permissions)>,
    /// The frame of the address, within the leaf.
    pub(super) gfn: Gfn,
    /// What all entries together permit, without writing while the leaf is not dirty.
    pub(super) permissions: Permissions,
}

/// The guest's frame that its tables, from the top-level one in `table` on, have for an access, which is noted in them.
///
/// # Errors
/// The tables do not translate the access.
pub fn guest_frame(
    memory: &impl GuestMemory,
    table: Gfn,
    address: Gpa,
    access: Access,
) -> Result<Gfn, GuestFault> {
    walk(memory, table, address, access).map(|found| found.gfn)
}

/// What an entry permits.
fn permissions(entry: u64) -> Permissions {
    let write = if entry & WRITE != 0 { 0b010 } else { 0 };
    let execute = if entry & NO_EXECUTE == 0 { 0b100 } else { 0 };
    Permissions::from_bits(write | execute)
}

/// Walks the guest's tables for an access, and notes it in them as a processor does.
pub(super) fn walk(
    memory: &impl GuestMemory,
    root: Gfn,
    address: Gpa,
    access: Access,
) -> Result<GuestWalk, GuestFault> {
    'again: loop {
        let mut tables = Vec::with_capacity(4);
        let mut permitted = Permissions::ALL;
        let mut table = root;
        for level in (1..=4).rev() {
            tables.push((table, permitted));
            let at = table.address().wrapping_add(index(address, level) as u64 * 8);
            let entry = memory.read(at).ok_or(GuestFault::NoMemory(level))?;
            if entry & PRESENT == 0 {
                return Err(GuestFault::NotPresent(level));
            }
            permitted = permitted.intersection(permissions(entry));
            let leaf = level == 1 || (level < 4 && entry & LARGE != 0);
            let mut noted = entry | ACCESSED;
            if leaf {
                if !permitted.permits(access) {
                    return Err(GuestFault::NotPermitted);
                }
                if access == Access::Write {
                    noted |= DIRTY;
                }
            }
            if noted != entry && !memory.exchange(at, entry, noted) {
                continue 'again;
            }
            let frame = Pfn::new((entry & ADDRESS) >> premap_address::PAGE_SHIFT).number();
            if leaf {
                let size = leaf_size(level).unwrap_or(PageSize::Size4K);
                let inside = address.frame().number() & (size.pages() - 1);
                let gfn = Gfn::new((frame & !(size.pages() - 1)) + inside);
                let permissions = if noted & DIRTY != 0 { permitted } else { permitted.without_write() };
                return Ok(GuestWalk { tables, gfn, permissions });
            }
            table = Gfn::new(frame);
        }
    }
}
