//! Page tables of a guest, in a slot of their own.

use premap_address::{Gpa, PAGE_SIZE};
use premap_softkvm::{SoftVcpu, SoftVm};

use super::{Memory, attach};

/// Present, writable, accessed and dirty.
pub(crate) const WRITABLE: u64 = 0x63;
/// The same without writing.
pub(crate) const READ_ONLY: u64 = 0x61;

/// Where the slot with the tables lies.
pub(crate) const TABLES: u64 = 1 << 30;
/// Directories of one table of level 2 and one of each above: enough for 1 GiB of addresses below 512 GiB.
const DIRECTORIES: u64 = 3;

/// Tables that reach addresses from one start on: 2 MiB for each leaf table. The first page is the root.
pub(crate) struct GuestTables {
    memory: Memory,
    start: u64,
}

impl GuestTables {
    /// Empty leaf tables for so many times 2 MiB of addresses from `start`, in a slot of the VM.
    pub(crate) fn new(vm: &SoftVm, slot: u32, start: u64, leaf_tables: u64) -> Self {
        let memory = Memory::anonymous(DIRECTORIES + leaf_tables);
        let index = |level: u32| start >> (12 + 9 * (level - 1)) & 511;
        memory.set_word(0, index(4), (TABLES + PAGE_SIZE) | WRITABLE);
        memory.set_word(1, index(3), (TABLES + 2 * PAGE_SIZE) | WRITABLE);
        for table in 0..leaf_tables {
            memory.set_word(2, index(2) + table, (TABLES + (DIRECTORIES + table) * PAGE_SIZE) | WRITABLE);
        }
        attach(vm, slot, 0, TABLES, &memory);
        Self { memory, start }
    }

    /// Makes another slot of the same tables, at the same place of another address space.
    pub(crate) fn attach(&self, vm: &SoftVm, slot: u32) {
        attach(vm, slot, 0, TABLES, &self.memory);
    }

    /// Where the root lies.
    pub(crate) fn root(&self) -> Gpa {
        Gpa::new(TABLES)
    }

    /// Where the entry of a page lies, counted from the first address.
    pub(crate) fn entry(&self, page: u64) -> Gpa {
        Gpa::new(TABLES + DIRECTORIES * PAGE_SIZE + page * 8)
    }

    /// Lets a page lead to a guest-physical address, before the guest runs.
    pub(crate) fn set(&self, page: u64, gpa: u64, bits: u64) {
        self.memory.set_word(DIRECTORIES + page / 512, page % 512, gpa | bits);
    }

    /// The same as a write of a vCPU's to the entry, at an address of its own that leads there.
    pub(crate) fn write(&self, vcpu: &mut SoftVcpu, at: Gpa, gpa: u64, bits: u64) {
        vcpu.write(at, gpa | bits).unwrap();
    }

    /// What the entry of a page holds.
    pub(crate) fn get(&self, page: u64) -> u64 {
        self.memory.word(DIRECTORIES + page / 512, page % 512)
    }

    /// The address of a page under the tables.
    pub(crate) fn address(&self, page: u64) -> Gpa {
        Gpa::new(self.start + page * PAGE_SIZE)
    }
}
