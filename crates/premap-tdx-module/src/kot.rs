//! The key ownership table: which HKIDs have a TD.

use crate::Module;
use crate::locks::{Exclusive, Sharex};
use crate::phymem::{Hkid, KeyIds};
use crate::status::{Class, Operand, Status};
use crate::sync::{Field, Ordering};

const FREE: u64 = 0;
const ASSIGNED: u64 = 1;
const FLUSHED: u64 = 2;

/// The table, an entry a private HKID.
#[derive(Debug)]
pub(crate) struct Kot {
    lock: Sharex,
    first: u16,
    entries: Box<[Field]>,
}

/// The table, held by one call.
#[derive(Debug)]
pub(crate) struct KotHeld<'m> {
    kot: &'m Kot,
    _lock: Exclusive<'m>,
}

impl Kot {
    pub(crate) fn new(keys: &KeyIds) -> Self {
        let entries = keys.private.clone().map(|_| Field::new(FREE)).collect();
        Self { lock: Sharex::new(), first: keys.private.start, entries }
    }

    fn entry(&self, hkid: u16) -> Option<&Field> {
        self.entries.get(usize::from(hkid.checked_sub(self.first)?))
    }
}

impl KotHeld<'_> {
    /// Gives a free HKID to a TD.
    ///
    /// # Errors
    /// HKID_NOT_FREE.
    pub(crate) fn assign(&mut self, hkid: Hkid) -> Result<(), Status> {
        let entry = self.kot.entry(hkid.0).filter(|entry| entry.load(Ordering::Relaxed) == FREE);
        entry.ok_or(Class::HKID_NOT_FREE.status())?.store(ASSIGNED, Ordering::Relaxed);
        Ok(())
    }

    /// Notes that no processor uses the HKID's key any more.
    pub(crate) fn flushed(&mut self, hkid: u64) {
        self.set(hkid, FLUSHED);
    }

    /// Takes the HKID back.
    pub(crate) fn free(&mut self, hkid: u64) {
        self.set(hkid, FREE);
    }

    fn set(&mut self, hkid: u64, state: u64) {
        if let Some(entry) = u16::try_from(hkid).ok().and_then(|hkid| self.kot.entry(hkid)) {
            entry.store(state, Ordering::Relaxed);
        }
    }
}

impl Module {
    /// Takes the table.
    ///
    /// # Errors
    /// OPERAND_BUSY (KOT) while another call has it.
    pub(crate) fn kot(&self) -> Result<KotHeld<'_>, Status> {
        let lock = self.kot.lock.try_exclusive().ok_or(Class::OPERAND_BUSY.on(Operand::KOT))?;
        Ok(KotHeld { kot: &self.kot, _lock: lock })
    }
}
