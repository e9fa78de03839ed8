//! The page tables of a machine's guests, where the software KVM shadows them.

use std::sync::{Mutex, MutexGuard, PoisonError};

use premap_address::GpaRange;
use premap_softkvm::SoftVm;

use crate::error::{GuestError, MachineError, MemoryError};
use crate::linux::control::{Control, SLOT};
use crate::slots::give_back;

/// Tables of which no one has asked for any yet, or the slot that has them.
#[derive(Debug)]
pub(super) struct Tables {
    vm: SoftVm,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    control: Option<Control>,
    /// The address spaces that have the slot.
    shown: Vec<u32>,
}

impl Tables {
    pub(super) fn new(vm: SoftVm) -> Self {
        Self { vm, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the slot in an address space, if it is not there.
    pub(super) fn show(&self, space: u32) -> Result<(), GuestError> {
        let mut state = self.lock();
        if state.shown.contains(&space) {
            return Ok(());
        }
        if state.control.is_none() {
            state.control = Some(Control::new().map_err(told)?);
        }
        if let Some(control) = &state.control {
            control.add_to(&self.vm, space).map_err(told)?;
            state.shown.push(space);
        }
        Ok(())
    }

    /// Lets the tables reach a range.
    pub(super) fn map(&self, range: GpaRange) -> Result<(), GuestError> {
        self.lock().control.as_ref().map_or(Ok(()), |control| control.map(range).map(drop))
    }
}

impl Drop for Tables {
    /// The slots go before their memory does: the caller may have the VM still.
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(control) = state.control.take() {
            give_back(&self.vm, state.shown.iter().map(|space| space << 16 | SLOT), control.into_memory());
        }
    }
}

/// A guest's error, where a machine can't be given what its guests need.
fn told(error: MachineError) -> GuestError {
    match error {
        MachineError::Call { call, errno } | MachineError::Memory(MemoryError::Os { what: call, errno }) => {
            GuestError::Call { call, errno }
        }
        other => GuestError::Exit { reason: other.to_string() },
    }
}
