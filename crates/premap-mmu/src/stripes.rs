//! State that each thread has, more or less, to itself, so that threads don't pull one cache line back and forth.

/// How many there are. Loom explores each, and threads are few there.
const STRIPES: usize = if cfg!(loom) { 1 } else { 16 };

/// One part on cache lines of its own: two, since processors fetch them in pairs.
#[repr(align(128))]
#[derive(Debug)]
struct Stripe<T>(T);

/// One part for each of several threads. Threads may share one: only speed depends on it.
#[derive(Debug)]
pub struct Stripes<T>([Stripe<T>; STRIPES]);

impl<T> Stripes<T> {
    /// Makes each part.
    pub fn new(mut part: impl FnMut() -> T) -> Self {
        Self(core::array::from_fn(|_| Stripe(part())))
    }

    /// The calling thread's part.
    #[inline]
    pub fn mine(&self) -> &T {
        &self.0[of_this_thread() % STRIPES].0
    }

    /// Every thread's part. They are always in the same order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|stripe| &stripe.0)
    }
}

impl<T: Default> Default for Stripes<T> {
    fn default() -> Self {
        Self::new(T::default)
    }
}

/// A number that differs between threads most of the time.
#[cfg(all(feature = "std", not(loom)))]
#[inline]
fn of_this_thread() -> usize {
    use core::sync::atomic::{AtomicUsize, Ordering};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    std::thread_local! {
        static STRIPE: usize = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    STRIPE.try_with(|stripe| *stripe).unwrap_or(0)
}

/// Threads have stacks of their own, mostly megabytes apart or at least 16 KiB.
#[cfg(not(all(feature = "std", not(loom))))]
#[inline]
fn of_this_thread() -> usize {
    let on_stack = 0_u8;
    let address = core::ptr::from_ref(&on_stack).addr();
    (address >> 14) ^ (address >> 20)
}
