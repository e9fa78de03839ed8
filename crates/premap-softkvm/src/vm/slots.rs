//! Changing memslots, and what becomes of the mappings.
//!
//! A slot that goes or moves is published as dying first; when every reader has seen that, its mappings are taken away, all
//! roots with them while the slot-zap quirk is on; then the new state is published. See `memslots`.

use premap_kvm::Errno;
use premap_kvm::abi::kvm_userspace_memory_region2;

use crate::machine::Machine;
use crate::memslots::{Change, Limits, Slot, Snapshot, plan};
use crate::role::Spaces;

impl Machine {
    pub(crate) fn set_memory_region(&self, region: &kvm_userspace_memory_region2) -> Result<(), Errno> {
        let _changing = self.slots.lock();
        let slots = self.slots.current();
        let limits = Limits { gpa_end: self.gpa_end(), private_memory: self.has_private_memory() };
        let bind = |new: &Slot| {
            let (number, offset) = (region.guest_memfd, region.guest_memfd_offset);
            self.guest_memfds.bind(number, offset, new.id, new.base, new.pages)
        };
        match plan(&slots, region, limits, bind)? {
            Change::Nothing => {}
            Change::Create(new) => {
                self.publish(slots.replaced(None, Some(new)));
                self.follow_slots(&self.slots.current());
            }
            Change::Delete(old) => {
                let dying = self.retire(&slots, &old);
                self.publish(dying.replaced(Some(old.id), None));
                self.follow_slots(&self.slots.current());
                if let Some(private) = &old.private {
                    private.unbind(old.id);
                }
            }
            Change::Move { old, new } => {
                let dying = self.retire(&slots, &old);
                self.publish(dying.replaced(Some(old.id), Some(new)));
            }
            Change::Flags { old, new } => {
                self.publish(slots.replaced(Some(old.id), Some(new.clone())));
                if new.dirty.is_some() { self.logging_began(&new) } else { self.logging_ended(&new) }
            }
        }
        Ok(())
    }

    /// Publishes the slot as dying and takes its mappings away.
    fn retire(&self, slots: &Snapshot, slot: &Slot) -> Snapshot {
        let dying = slots.dying(slot);
        self.publish(dying.clone());
        if self.zaps_all() {
            self.roots.invalidate();
            self.shadow.invalidate();
        } else {
            let (space, pages) = (Spaces::One(slot.id.space), slot.base..slot.end());
            self.shadow.forget(space, &pages);
            self.unmap(space, &pages);
        }
        dying
    }

    /// Publishes new slots and waits until no reader has older ones.
    fn publish(&self, slots: Snapshot) {
        self.invalidations.when_idle(|| self.slots.publish(slots));
        self.slots.synchronize();
    }
}
