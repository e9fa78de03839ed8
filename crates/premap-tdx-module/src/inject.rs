//! For tests: calls that fail on request, and states that only a migration or a fatal error would bring.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use premap_address::Hpa;

use crate::seamcall::{Outcome, Seamcall};
use crate::sept::{EntryState, lock_by_host};
use crate::status::{Class, Operand, Status};
use crate::td::{Lifecycle, OpState};
use crate::{Module, PageInfo};

/// Decides which calls fail.
pub trait Injector: Send + Sync + std::fmt::Debug {
    /// The status with which this call fails, untried and without effect; or `None` for it to be made.
    fn fail(&self, call: Seamcall) -> Option<Status>;
}

/// Who decides, if anyone does: asked only then, so that calls don't meet at a lock for nothing.
#[derive(Debug, Default)]
pub(crate) struct Injection {
    armed: AtomicBool,
    injector: RwLock<Option<Arc<dyn Injector>>>,
}

/// Fails a few calls of one kind in a row.
#[derive(Debug)]
pub struct Nth {
    call: Seamcall,
    status: Status,
    first: u64,
    times: u64,
    seen: AtomicU64,
}

impl Nth {
    /// Fails the `nth` call of this kind from now on, counted from 0.
    #[must_use]
    pub fn new(call: Seamcall, nth: u64, status: Status) -> Self {
        Self { call, status, first: nth, times: 1, seen: AtomicU64::new(0) }
    }

    /// Fails so many in a row instead of one.
    #[must_use]
    pub fn times(self, times: u64) -> Self {
        Self { times, ..self }
    }

    /// How many calls of this kind were made, those that failed included.
    pub fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }
}

impl Injector for Nth {
    fn fail(&self, call: Seamcall) -> Option<Status> {
        if call != self.call {
            return None;
        }
        let nth = self.seen.fetch_add(1, Ordering::Relaxed);
        (nth.checked_sub(self.first)? < self.times).then_some(self.status)
    }
}

impl Module {
    /// Has calls fail as the injector says, or none of them.
    pub fn inject(&self, injector: Option<Arc<dyn Injector>>) {
        let mut held = self.injection.injector.write().unwrap_or_else(PoisonError::into_inner);
        self.injection.armed.store(injector.is_some(), Ordering::Release);
        *held = injector;
    }

    pub(crate) fn injected(&self, call: Seamcall) -> Option<Status> {
        if !self.injection.armed.load(Ordering::Acquire) {
            return None;
        }
        let injector = self.injection.injector.read().unwrap_or_else(PoisonError::into_inner);
        injector.as_ref()?.fail(call)
    }

    /// Puts a TD into an OP_STATE.
    ///
    /// # Errors
    /// Those of the TDR (RCX).
    pub fn put_op_state(&self, tdr: Hpa, state: OpState) -> Outcome {
        self.td_alone(tdr, Operand::RCX)?.td().set_op_state(state);
        Ok(())
    }

    /// Puts a TD into a state of its life cycle. Its HKID stays what it was.
    ///
    /// # Errors
    /// Those of the TDR (RCX).
    pub fn put_lifecycle(&self, tdr: Hpa, state: Lifecycle) -> Outcome {
        self.td_alone(tdr, Operand::RCX)?.td().set_lifecycle(state);
        Ok(())
    }

    /// Has a TD meet a fatal error.
    ///
    /// # Errors
    /// Those of the TDR (RCX).
    pub fn put_fatal(&self, tdr: Hpa) -> Outcome {
        self.td_alone(tdr, Operand::RCX)?.td().set_fatal();
        Ok(())
    }

    /// Puts an entry that has a page, a table, or neither, into another state of its kind.
    ///
    /// # Errors
    /// Those of the TDR (RDX); EPT_WALK_FAILED (RCX); OPERAND_BUSY (SEPT_ENTRY).
    pub fn put_entry_state(&self, page: PageInfo, tdr: Hpa, state: EntryState) -> Outcome {
        let sole = self.td_alone(tdr, Operand::RDX)?;
        let td = sole.td();
        let invalid = Class::OPERAND_INVALID.on(Operand::RCX);
        let levels = crate::Level::PT..=td.top_level();
        let (gpa, level) = page.parse(&levels).ok_or(invalid)?;
        let found = self.walk_to(td, gpa, level)?;
        let entry = lock_by_host(found.word).ok_or(Class::OPERAND_BUSY.on(Operand::SEPT_ENTRY))?;
        let value = entry.value();
        entry.set(value.in_state(state));
        Ok(())
    }

    /// How many 4 KiB pages a TD has, its TDR left out, in every state of its life cycle.
    ///
    /// # Errors
    /// Those of the TDR (RCX).
    pub fn child_count(&self, tdr: Hpa) -> Outcome<u64> {
        Ok(self.td_alone(tdr, Operand::RCX)?.td().children.sum())
    }
}
