//! The roots that a vCPU has at hand: the one that it walks from, and up to three that it had before.
//!
//! Another CR3, and entering or leaving guest mode, rotate them: the root of the new purpose comes back if it is at hand, and
//! where it is not, the oldest is let go. What is let go of the shadow MMU stays hashed until it is evicted, so it may be
//! found again; roots of the TDP MMU stay in any case.

use crate::loaded::Loaded;
use crate::mmu::RootKey;

/// `KVM_MMU_NUM_PREV_ROOTS`.
const PREVIOUS: usize = 3;

/// A vCPU's roots.
#[derive(Debug)]
pub(super) struct RootCache {
    /// What the current root is for.
    key: RootKey,
    current: Option<Loaded>,
    /// Newest first.
    previous: Vec<(RootKey, Loaded)>,
}

impl RootCache {
    pub(super) fn new(key: RootKey) -> Self {
        Self { key, current: None, previous: Vec::with_capacity(PREVIOUS + 1) }
    }

    pub(super) fn key(&self) -> RootKey {
        self.key
    }

    pub(super) fn current(&self) -> Option<&Loaded> {
        self.current.as_ref()
    }

    pub(super) fn load(&mut self, root: Loaded) {
        self.current = Some(root);
    }

    /// Goes to another purpose, with the root that was had for it last if that is at hand.
    pub(super) fn rotate(&mut self, key: RootKey) {
        if key == self.key {
            return;
        }
        let found = self.previous.iter().position(|(previous, _)| *previous == key);
        let next = found.map(|index| self.previous.remove(index).1);
        if let Some(root) = self.current.take() {
            self.previous.insert(0, (self.key, root));
            self.previous.truncate(PREVIOUS);
        }
        (self.key, self.current) = (key, next);
    }

    /// Goes to another purpose with no root at all: `kvm_mmu_reset_context`.
    pub(super) fn reset(&mut self, key: RootKey) {
        self.let_go();
        self.key = key;
    }

    /// Lets every root go.
    pub(super) fn let_go(&mut self) {
        self.current = None;
        self.previous.clear();
    }

    /// Lets go of roots that were invalidated.
    pub(super) fn let_go_of_obsolete(&mut self) {
        if self.current.as_ref().is_some_and(Loaded::is_obsolete) {
            self.current = None;
            self.previous.retain(|(_, root)| !root.is_obsolete());
        }
    }
}
