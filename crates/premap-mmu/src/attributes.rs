//! What a mapping is: permissions, memory type, use, and what a walk reports of it.

use core::fmt;
use core::ops::{Add, AddAssign, Sub};

use premap_address::{Gpa, GpaRange, Hpa, PageSize, Pfn};

use crate::format::Format;

/// What a guest may do with a mapped page. Every mapping is readable: a page that is not has no mapping.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Permissions(u8);

impl Permissions {
    /// Reading only.
    pub const READ: Self = Self(0b001);
    /// Reading and writing.
    pub const READ_WRITE: Self = Self(0b011);
    /// Reading and fetching instructions.
    pub const READ_EXECUTE: Self = Self(0b101);
    /// Everything.
    pub const ALL: Self = Self(0b111);

    /// The permissions for reading, and for writing and executing as told.
    #[must_use]
    pub(crate) const fn from_bits(bits: u64) -> Self {
        Self((bits & 0b110) as u8 | 0b001)
    }

    /// Bit 0 read, bit 1 write, bit 2 execute: the order in which EPT has them.
    #[must_use]
    pub(crate) const fn bits(self) -> u64 {
        self.0 as u64
    }

    /// Whether all of `other` is permitted.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether writing is permitted.
    #[must_use]
    pub const fn writable(self) -> bool {
        self.0 & 0b010 != 0
    }

    /// Whether fetching instructions is permitted.
    #[must_use]
    pub const fn executable(self) -> bool {
        self.0 & 0b100 != 0
    }

    /// The same without writing.
    #[must_use]
    pub const fn without_write(self) -> Self {
        Self(self.0 & !0b010)
    }

    /// What both permit.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether the access is permitted.
    #[must_use]
    pub const fn permits(self, access: Access) -> bool {
        match access {
            Access::Read => true,
            Access::Write => self.writable(),
            Access::Execute => self.executable(),
        }
    }
}

impl fmt::Debug for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.writable(), self.executable()) {
            (false, false) => "r--",
            (true, false) => "rw-",
            (false, true) => "r-x",
            (true, true) => "rwx",
        })
    }
}

/// How a guest touches a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// A load.
    Read,
    /// A store.
    Write,
    /// An instruction fetch.
    Execute,
}

/// What the processor has noted in a mapping about its use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Use {
    /// The page was touched since this was last cleared.
    pub accessed: bool,
    /// The page was written since this was last cleared.
    pub dirty: bool,
}

impl Use {
    /// Neither touched nor written.
    pub const NONE: Self = Self { accessed: false, dirty: false };
    /// Touched and written: for those who do not track use and spare the processor the updates.
    pub const ALL: Self = Self { accessed: true, dirty: true };
}

/// All of a leaf but its frame and size. Formats without a bit for [`Use`] drop it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Attributes<F: Format> {
    /// What the guest may do.
    pub permissions: Permissions,
    /// How the memory is cached.
    pub memory: F::MemoryType,
    /// Accessed and dirty, as the leaf is to have them or as it was found to have them.
    pub used: Use,
}

impl<F: Format> Attributes<F> {
    /// Attributes with the format's ordinary memory type (write-back), neither accessed nor dirty.
    #[must_use]
    pub fn new(permissions: Permissions) -> Self {
        Self { permissions, memory: F::MemoryType::default(), used: Use::NONE }
    }

    /// The same with this use.
    #[must_use]
    pub fn with_use(self, used: Use) -> Self {
        Self { used, ..self }
    }

    /// The same with this memory type.
    #[must_use]
    pub fn with_memory(self, memory: F::MemoryType) -> Self {
        Self { memory, ..self }
    }
}

impl<F: Format> fmt::Debug for Attributes<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?}", self.permissions, self.memory)?;
        f.write_str(if self.used.accessed { " A" } else { " -" })?;
        f.write_str(if self.used.dirty { "D" } else { "-" })
    }
}

/// A leaf as found in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mapping<F: Format> {
    /// The first guest-physical address that the leaf maps.
    pub gpa: Gpa,
    /// The first frame that the leaf maps.
    pub pfn: Pfn,
    /// The size of the leaf.
    pub page_size: PageSize,
    /// Its attributes, with accessed and dirty as they were at that moment.
    pub attributes: Attributes<F>,
}

impl<F: Format> Mapping<F> {
    /// The range of guest-physical memory that the leaf maps.
    #[must_use]
    pub fn range(&self) -> GpaRange {
        GpaRange::new(self.gpa, self.page_size.bytes())
    }

    /// The host-physical address behind a guest-physical one, or `None` if the leaf does not map it.
    #[must_use]
    pub fn translate(&self, gpa: Gpa) -> Option<Hpa> {
        let offset = gpa.checked_offset_from(self.gpa)?;
        if offset < self.page_size.bytes() { self.pfn.address().checked_add(offset) } else { None }
    }

    /// Whether the guest may write.
    #[must_use]
    pub fn writable(&self) -> bool {
        self.attributes.permissions.writable()
    }
}

/// A number of leaves, by size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Leaves {
    /// Leaves of 4 KiB.
    pub size_4k: u64,
    /// Leaves of 2 MiB.
    pub size_2m: u64,
    /// Leaves of 1 GiB.
    pub size_1g: u64,
}

impl Leaves {
    /// No leaf.
    pub const NONE: Self = Self { size_4k: 0, size_2m: 0, size_1g: 0 };

    /// So many leaves of one size.
    #[must_use]
    pub const fn of(size: PageSize, count: u64) -> Self {
        match size {
            PageSize::Size4K => Self { size_4k: count, ..Self::NONE },
            PageSize::Size2M => Self { size_2m: count, ..Self::NONE },
            PageSize::Size1G => Self { size_1g: count, ..Self::NONE },
        }
    }

    /// Leaves of every size together.
    #[must_use]
    pub const fn total(self) -> u64 {
        self.size_4k + self.size_2m + self.size_1g
    }

    /// The memory they map, in pages of 4 KiB.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.size_4k + self.size_2m * PageSize::Size2M.pages() + self.size_1g * PageSize::Size1G.pages()
    }

    /// The leaves of one size.
    #[must_use]
    pub const fn get(self, size: PageSize) -> u64 {
        match size {
            PageSize::Size4K => self.size_4k,
            PageSize::Size2M => self.size_2m,
            PageSize::Size1G => self.size_1g,
        }
    }
}

impl Add for Leaves {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            size_4k: self.size_4k + other.size_4k,
            size_2m: self.size_2m + other.size_2m,
            size_1g: self.size_1g + other.size_1g,
        }
    }
}

impl AddAssign for Leaves {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sub for Leaves {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            size_4k: self.size_4k - other.size_4k,
            size_2m: self.size_2m - other.size_2m,
            size_1g: self.size_1g - other.size_1g,
        }
    }
}
