//! Read-side sections that may sleep, and a wait for all of them: the role that SRCU has in KVM.
//!
//! **Protocol.** A reader enters and takes a share of the current section; a writer, after it published something new,
//! replaces the section by a fresh one and waits until nobody shares the old one.
//!
//! **Guarantee.** [`Srcu::synchronize`] returns only after every reader has left that entered before it was called. It may
//! wait for long: a reader that never leaves is waited for for ever, as in the kernel.

use std::mem;
use std::sync::PoisonError;

#[cfg(loom)]
use loom::sync::{Arc, Mutex};
#[cfg(not(loom))]
use std::sync::{Arc, Mutex};

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
        let mut old = {
            let mut section = self.section.lock().unwrap_or_else(PoisonError::into_inner);
            mem::replace(&mut *section, Arc::new(()))
        };
        // Alone with it, this sees all that the readers did before they left.
        for tries in 0.. {
            if Arc::get_mut(&mut old).is_some() {
                break;
            }
            pause(tries);
        }
    }
}

/// Lets others run: at once for some tries, and then less and less eagerly.
#[cfg(not(loom))]
fn pause(tries: u32) {
    if tries < 64 {
        std::thread::yield_now();
    } else {
        std::thread::sleep(std::time::Duration::from_micros(100));
    }
}

#[cfg(loom)]
fn pause(_: u32) {
    loom::thread::yield_now();
}

#[cfg(all(test, loom))]
mod loom_model {
    use loom::sync::atomic::{AtomicU64, Ordering};
    use loom::thread;

    use super::*;

    /// A slot's state as a reader finds it, and what a reader that found it alive has mapped.
    #[test]
    fn nothing_is_mapped_of_what_was_gone_before_the_wait() {
        loom::model(|| {
            let shared = Arc::new((Srcu::default(), AtomicU64::new(1), AtomicU64::new(0)));
            let reader = thread::spawn({
                let shared = Arc::clone(&shared);
                move || {
                    let (srcu, alive, mapped) = &*shared;
                    let _reading = srcu.enter();
                    if alive.load(Ordering::Relaxed) == 1 {
                        mapped.store(1, Ordering::Relaxed);
                    }
                }
            });
            let (srcu, alive, mapped) = &*shared;
            alive.store(0, Ordering::Relaxed);
            srcu.synchronize();
            // Whoever found it alive has left, and is seen to have mapped; who comes now finds it gone.
            let taken_away = mapped.swap(0, Ordering::Relaxed);
            reader.join().expect("no panic");
            assert_eq!(mapped.load(Ordering::Relaxed), 0, "mapped after {taken_away} was taken away");
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;
    use std::time::Duration;

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
