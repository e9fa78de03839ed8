//! Limits on a run: how much, until when, and a handle to end it from outside.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use crate::bell::Bell;

/// How far a run may go. What it does not reach is in the report, in order.
#[derive(Clone, Copy, Debug, Default)]
pub struct Budget {
    /// At most this many bytes of the plan are begun.
    pub bytes: Option<u64>,
    /// No call is begun after this moment, and a pre-fault call under way is interrupted.
    pub deadline: Option<Instant>,
    /// What is done where the host, or a limit above this process, can't give all that the plan takes.
    pub host_memory: HostMemory,
}

impl Budget {
    /// Takes no more than the host, and every limit above this process, can give: [`HostMemory::Whole`].
    ///
    /// ```
    /// # use std::time::{Duration, Instant};
    /// use premap::Budget;
    ///
    /// let deadline = Some(Instant::now() + Duration::from_millis(200));
    /// let budget = Budget { deadline, ..Budget::within_host_memory() };
    /// ```
    #[must_use]
    pub const fn within_host_memory() -> Self {
        Self { bytes: None, deadline: None, host_memory: HostMemory::Whole }
    }
}

/// How a run keeps within the memory that there is to take.
///
/// A guest touches its memory little by little, or not all of it, and so may live where not all of it fits: in a cgroup
/// with a limit below its size, or on a host that is overcommitted. There a run that makes it all present has the VMM
/// killed. The memory that there is to take is the least of what the host has available, what each memory cgroup above
/// the process allows, and for hugetlb pages what their pool and cgroups have; a margin is left, for the VMM and the
/// kernel. Memory that is present already takes nothing more and is mapped in any case; what is left is in the report as
/// [`HostMemory`](crate::Reason::HostMemory), with the limit's name in [`Report::limit`](crate::Report::limit).
/// The room is looked at again while the run goes on, and where others use it up, the run ends.
///
/// It takes reads of `/proc` and `/sys/fs/cgroup`, on the calling thread. What can't be read counts as no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostMemory {
    /// Nothing is looked at: the caller knows that there is enough, or has reserved it.
    #[default]
    Unlimited,
    /// A plan that does not fit as a whole is mapped only where memory is present already. For plans without an order of
    /// importance: their front may be memory that the guest never needs, and its own touches come on top of it. With
    /// [`Budget::bytes`], which says how much may be taken all the same, it is `Front`.
    Whole,
    /// A plan that does not fit is mapped up to where the room ends. For plans whose front the guest is known to need, as
    /// one with a [working set](crate::working_set) first.
    Front,
    /// As `Front`, and of memory that is not present yet no more than so many bytes, page tables included, whatever the
    /// room.
    UpTo(u64),
}

/// Ends a run from any thread. Clones share one state.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    stopped: AtomicBool,
    /// Those who watch the runs that have this handle.
    watchers: Mutex<Vec<Weak<Bell>>>,
}

impl Stop {
    /// Makes a handle that has not been used yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends every run that has this handle, now and later. A pre-fault call under way is interrupted.
    pub fn stop(&self) {
        // Relaxed: the flag publishes nothing but itself, and the lock orders it with a watcher that comes just now.
        self.0.stopped.store(true, Ordering::Relaxed);
        let watchers = self.0.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.iter().filter_map(Weak::upgrade).for_each(|bell| bell.ring());
    }

    /// Whether [`stop`](Self::stop) was called.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.0.stopped.load(Ordering::Relaxed)
    }

    /// Has the bell rung when the handle is used.
    pub(crate) fn tell(&self, bell: &Arc<Bell>) {
        let mut watchers = self.0.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.retain(|watcher| watcher.strong_count() > 0);
        watchers.push(Arc::downgrade(bell));
    }
}
