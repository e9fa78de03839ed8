//! Grace periods: when a frame that was unlinked may be used again.
//!
//! **Protocol.** An epoch counts up. Who walks a table *pins*: adds one to a counter of the current epoch's parity, then
//! reads the epoch again, and starts over if it moved. Who unlinked a frame takes the epoch as its *stamp* afterwards. The
//! epoch moves from `e` to `e + 1` only when no pin of epoch `e - 1` is left, that is when the counters of the other
//! parity are zero. A frame may be freed when the epoch is at least two past its stamp.
//!
//! **Guarantee.** While a [`Guard`] lives, no frame is freed that was linked at any time since the guard was made. And
//! [`Epochs::synchronize`] returns only after every guard has gone that lived when it was called.
//!
//! **Why it holds.** Take a pin whose second look saw `e`, and the scan that would let the epoch go from `e + 1` to
//! `e + 2`. The pin adds to a counter and the scan adds nothing to it, but both are read-modify-writes of one word, so one
//! comes first. If it is the pin, the scan sees it and the epoch stays. If it is the scan, the pin acquires what the
//! scan released; the scanner had read `e + 1` before, so the pin's second look reads no less, and it starts over.
//!
//! A frame stamped `t` was unlinked before some write moved the epoch to `t + 1`: the stamp is a read-modify-write that
//! releases, so that write comes after it in the epoch's history and passes on what it released, and a pin that read
//! `t + 1` sees the frame unlinked. Hence only pins of `t` and before can hold it, and at `t + 2` they are gone. What a
//! pin's holder read of the frame comes before it is freed: the pin's end releases, the scan acquires, the write of the
//! epoch after the scan releases, and who frees acquires that.
//!
//! No access here is sequentially consistent. That is not for speed: loom takes sequentially consistent accesses for
//! acquiring and releasing ones, so what needs more of them can't be checked. Each ordering here was weakened, and a
//! model failed. What loom does not see is what C11's model allows beyond the order in which a program's steps are run
//! (a load that reads a store made later), and more than three preemptions of three threads.
//!
//! **Why ours.** crossbeam-epoch without std has no thread-local handle: each walker would carry a `LocalHandle` that is
//! bound to its thread, vCPU threads would have to register with every table, and loom can't look inside it. Here a pin is
//! one add on a striped counter, needs no registration and no thread-local, and is a few lines that loom checks whole.

use alloc::vec::Vec;

use premap_address::Pfn;

use crate::spin::Spin;
use crate::stripes::Stripes;
use crate::sync::{AtomicU64, AtomicUsize, Backoff, Ordering};

/// The pins of one stripe by the parity of their epoch.
type Pins = [AtomicUsize; 2];

/// The epoch of one table or of several that share their frames' life.
pub(crate) struct Epochs {
    epoch: AtomicU64,
    pins: Stripes<Pins>,
    retired: Spin<Vec<Retired>>,
}

/// A frame that waits to be freed.
#[derive(Clone, Copy, Debug)]
struct Retired {
    frame: Pfn,
    stamp: u64,
}

const fn parity(epoch: u64) -> usize {
    (epoch & 1) as usize
}

impl Epochs {
    pub(crate) fn new() -> Self {
        Self {
            epoch: AtomicU64::new(0),
            pins: Stripes::new(|| [AtomicUsize::new(0), AtomicUsize::new(0)]),
            retired: Spin::new(Vec::new()),
        }
    }

    /// Keeps every frame that is linked now, or gets linked from now on, from being freed.
    #[inline]
    pub(crate) fn pin(&self) -> Guard<'_> {
        let mine = self.pins.mine();
        loop {
            let epoch = self.epoch.load(Ordering::Acquire);
            let pins = &mine[parity(epoch)];
            pins.fetch_add(1, Ordering::Acquire);
            if self.epoch.load(Ordering::Relaxed) == epoch {
                return Guard { pins };
            }
            // Nothing was read under this pin.
            pins.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Moves the epoch on by one if no pin of the epoch before the current one is left.
    fn advance(&self) -> bool {
        let epoch = self.epoch.load(Ordering::Relaxed);
        let before = parity(epoch.wrapping_sub(1));
        // Not a load: the scan has its place among the pins of the counter.
        if self.pins.iter().any(|pins| pins[before].fetch_add(0, Ordering::AcqRel) != 0) {
            return false;
        }
        self.epoch.compare_exchange(epoch, epoch + 1, Ordering::Release, Ordering::Relaxed).is_ok()
    }

    /// Waits until every guard that lives now has gone. The caller holds none itself.
    pub(crate) fn synchronize(&self) {
        let target = self.stamp() + 2;
        let mut backoff = Backoff::new();
        while self.advance_to(target) < target {
            backoff.wait();
        }
    }

    /// Moves the epoch on to this one, or as far as pins let it; says how far it is.
    fn advance_to(&self, target: u64) -> u64 {
        loop {
            let moved = self.advance();
            let epoch = self.epoch.load(Ordering::Acquire);
            if epoch >= target || !moved {
                return epoch;
            }
        }
    }

    /// The epoch now, ordered after everything that the caller did before.
    fn stamp(&self) -> u64 {
        self.epoch.fetch_add(0, Ordering::Release)
    }

    /// Takes frames that nothing links to any more, and gives `free` those whose time has come.
    pub(crate) fn retire(&self, frames: impl IntoIterator<Item = Pfn>, free: impl FnMut(Pfn)) {
        let stamp = self.stamp();
        self.retired.lock().extend(frames.into_iter().map(|frame| Retired { frame, stamp }));
        self.collect(free);
    }

    /// Gives `free` every retired frame whose grace period is over.
    pub(crate) fn collect(&self, mut free: impl FnMut(Pfn)) {
        let ripe: Vec<Retired> = {
            // Whoever holds the list collects; there is no need for two to do so.
            let Some(mut retired) = self.retired.try_lock() else { return };
            let Some(youngest) = retired.last().map(|last| last.stamp) else { return };
            let epoch = self.advance_to(youngest + 2);
            retired.extract_if(.., |frame| frame.stamp + 2 <= epoch).collect()
        };
        ripe.into_iter().for_each(|retired| free(retired.frame));
    }

    /// Gives `free` all frames still retired; the caller is the only one left.
    pub(crate) fn drain(&mut self, mut free: impl FnMut(Pfn)) {
        self.retired.get_mut().drain(..).for_each(|retired| free(retired.frame));
    }
}

/// While it lives, no table that its holder can reach is freed.
#[derive(Debug)]
pub(crate) struct Guard<'e> {
    pins: &'e AtomicUsize,
}

impl Drop for Guard<'_> {
    #[inline]
    fn drop(&mut self) {
        self.pins.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(all(test, loom))]
// UNSAFETY: a cell that loom watches is shared between threads.
#[expect(unsafe_code, reason = "loom's cell is not Sync")]
mod loom_models {
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    /// A frame that a link leads to. Walking reads its cell and freeing writes it: loom finds what is not ordered, whatever
    /// the values read.
    struct Frame {
        epochs: Epochs,
        linked: AtomicUsize,
        content: UnsafeCell<()>,
    }

    // SAFETY: the cell holds nothing; loom checks the order in which it is entered.
    unsafe impl Sync for Frame {}
    // SAFETY: as for `Sync`.
    unsafe impl Send for Frame {}

    impl Frame {
        fn walk(&self) {
            let _guard = self.epochs.pin();
            if self.linked.load(Ordering::Acquire) != 0 {
                self.content.with(|_| ());
            }
        }

        fn free(&self) {
            self.content.with_mut(|_| ());
        }

        fn unlink(&self) {
            self.linked.store(0, Ordering::Release);
            self.epochs.retire([Pfn::new(1)], |_| self.free());
        }
    }

    fn check(unlinker: impl Fn(&Frame) + Copy + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(move || {
            let frame = Arc::new(Frame {
                epochs: Epochs::new(),
                linked: AtomicUsize::new(1),
                content: UnsafeCell::new(()),
            });
            let run = |part: fn(&Frame)| {
                let frame = frame.clone();
                thread::spawn(move || part(&frame))
            };
            // The third moves the epoch, so that neither a pin nor a stamp is ordered by what its own thread did.
            let others = [run(Frame::walk), run(|frame| _ = frame.epochs.advance())];
            unlinker(&frame);
            others.into_iter().for_each(|other| other.join().expect("no panic"));
        });
    }

    #[test]
    fn a_frame_is_freed_after_all_that_found_it() {
        check(Frame::unlink);
    }

    #[test]
    fn synchronize_waits_for_all_that_found_it() {
        check(|frame| {
            frame.linked.store(0, Ordering::Release);
            frame.epochs.synchronize();
            frame.free();
        });
    }
}
