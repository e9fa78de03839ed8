//! An external table that mirrors ours: TDX's Secure-EPT, which only the TDX module may write.
//!
//! **Protocol.** The mirror is told *before* an entry of ours is published or given up, while the entry is locked, so that
//! no other thread sees or changes it meanwhile. It can refuse; then our entry stays as it was, and the operation stops
//! there and says so. A table is linked before any leaf in it is set, and removed after its last leaf was removed.
//!
//! **Guarantee.** What our table maps the mirror maps, at every moment at which no operation is under way on that entry;
//! and a refusal leaves both as they were.

use core::convert::Infallible;
use core::fmt::Debug;

use premap_address::{Gpa, PageSize, Pfn};

/// The owner of an external table.
///
/// The calls come with an entry's lock held: they must not call back into the same page table.
pub trait Mirror: Send + Sync {
    /// Why a change was refused.
    type Refusal: Debug;

    /// Whether anyone listens. With `false` the calls are compiled out.
    const ACTIVE: bool = true;

    /// A table is about to be linked: `table` will be walked for addresses from `gpa` on, and its entries are of `level`.
    ///
    /// # Errors
    /// The table is not linked then.
    fn link_table(&self, gpa: Gpa, level: u8, table: Pfn) -> Result<(), Self::Refusal>;

    /// A leaf is about to be published in an entry that mapped nothing.
    ///
    /// # Errors
    /// The leaf is not published then.
    fn set_leaf(&self, gpa: Gpa, size: PageSize, pfn: Pfn) -> Result<(), Self::Refusal>;

    /// A leaf was taken from walkers and is about to be given up. The external table's TLB flush is this call's affair.
    ///
    /// # Errors
    /// The leaf is restored then.
    fn remove_leaf(&self, gpa: Gpa, size: PageSize, pfn: Pfn) -> Result<(), Self::Refusal>;

    /// An empty table is about to be given up.
    ///
    /// # Errors
    /// The table stays linked then.
    fn remove_table(&self, gpa: Gpa, level: u8, table: Pfn) -> Result<(), Self::Refusal>;
}

/// No external table.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoMirror;

impl Mirror for NoMirror {
    type Refusal = Infallible;

    const ACTIVE: bool = false;

    fn link_table(&self, _: Gpa, _: u8, _: Pfn) -> Result<(), Infallible> {
        Ok(())
    }

    fn set_leaf(&self, _: Gpa, _: PageSize, _: Pfn) -> Result<(), Infallible> {
        Ok(())
    }

    fn remove_leaf(&self, _: Gpa, _: PageSize, _: Pfn) -> Result<(), Infallible> {
        Ok(())
    }

    fn remove_table(&self, _: Gpa, _: u8, _: Pfn) -> Result<(), Infallible> {
        Ok(())
    }
}
