//! Read-side sections that may sleep, and a wait for all of them: the role that SRCU has in KVM.
//!
//! **Protocol.** A reader enters and takes a share of the current section; a writer, after it published something new,
//! replaces the section by a fresh one and waits until nobody shares the old one.
//!
//! **Guarantee.** [`Srcu::synchronize`] returns only after every reader has left that entered before it was called. It may
//! wait for long: a reader that never leaves is waited for for ever, as in the kernel.

use std::mem;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// The readers of one thing.
#[derive(Debug, Default)]
pub(crate) struct Srcu {
    section: Mutex<Arc<()>>,
}

/// A read-side section; it ends when this is dropped.
#[must_use]
#[derive(Debug)]
pub(crate) struct Reading {
    _section: Arc<()>,
}

impl Srcu {
    pub(crate) fn enter(&self) -> Reading {
        Reading { _section: Arc::clone(&self.section.lock().unwrap_or_else(PoisonError::into_inner)) }
    }

    /// Waits until all have left that entered before. The caller is in no section itself.
    pub(crate) fn synchronize(&self) {
        let old = {
            let mut section = self.section.lock().unwrap_or_else(PoisonError::into_inner);
            mem::replace(&mut *section, Arc::new(()))
        };
        for tries in 0_u32.. {
            if Arc::strong_count(&old) == 1 {
                break;
            }
            if tries < 64 { thread::yield_now() } else { thread::sleep(Duration::from_micros(100)) }
        }
        // Sees all that the readers did before they left.
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_reader_is_waited_for_and_a_later_one_is_not() {
        let srcu = Srcu::default();
        let left = AtomicBool::new(false);
        let early = srcu.enter();
        thread::scope(|scope| {
            scope.spawn(|| {
                srcu.synchronize();
                assert!(left.load(Ordering::SeqCst), "synchronize came back while a reader was inside");
            });
            thread::sleep(Duration::from_millis(20));
            left.store(true, Ordering::SeqCst);
            drop(early);
        });
        let _late = srcu.enter();
        drop(srcu.enter());
    }
}
