//! Mapping goes on while the guest runs.
//!
//! The vCPUs lent for it are *spare*: created, never run and never told to the guest. KVM's second-stage table belongs to the
//! VM and the vCPUs' role, not to one vCPU, so what a spare one maps all have. The run is the same as any other, on a thread
//! of its own that watches it; chunks are smaller, so that nothing the guest waits for takes longer than one of them.

use std::sync::Arc;
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};

use premap_kvm::Vcpu;

use crate::control::Control;
use crate::engine::{Engine, Error};
use crate::gate::Gate;
use crate::plan::{BACKGROUND_CHUNK, Plan};
use crate::progress::Progress;
use crate::report::Report;
use crate::run::Run;

const NAME: &str = "premap-watch";

type Ending = Result<Report, Error>;

/// A run that goes on in the background. Dropped, it is stopped, and the drop waits for the call under way: afterwards no
/// thread of the engine touches the guest's memory.
#[derive(Debug)]
#[must_use = "the run is stopped when this is dropped"]
pub struct Background<'scope> {
    control: Arc<Control>,
    /// There until the run was joined.
    thread: Option<Thread<'scope>>,
}

#[derive(Debug)]
enum Thread<'scope> {
    Owned(JoinHandle<Ending>),
    Scoped(ScopedJoinHandle<'scope, Ending>),
}

impl Engine<'_> {
    /// Maps the plan's memory while the guest runs, through vCPUs that are never run.
    ///
    /// A spare vCPU needs the CPUID of the guest's own, since the number of levels of the second-stage table comes from it.
    /// Chunks are of [`BACKGROUND_CHUNK`] bytes unless the plan says otherwise. The VMM closes the run's
    /// [gate](Background::gate) around every change of a memslot. Deleting a slot makes KVM discard what is mapped of the
    /// whole VM, unless `KVM_X86_QUIRK_SLOT_ZAP_ALL` is disabled: another run maps it again.
    ///
    /// Where the system has no thread for the workers, the one that watches does the work.
    ///
    /// # Errors
    /// As [`run`](Self::run), and where not even that thread can be had: the guest can then run without, or be mapped by `run`
    /// before it starts.
    pub fn background<V>(self, plan: Plan, spare: Vec<V>) -> Result<Background<'static>, Error>
    where
        V: Vcpu + Send + 'static,
    {
        let (control, body) = self.in_background(plan, spare)?;
        let thread = Builder::new().name(NAME.to_owned()).spawn(body).map_err(Error::Spawn)?;
        Ok(Background { control, thread: Some(Thread::Owned(thread)) })
    }

    /// The same within a [`std::thread::scope`], so that vCPUs can be borrowed: `&mut V` is a vCPU too.
    ///
    /// # Errors
    /// As [`background`](Self::background).
    pub fn background_scoped<'scope, V>(
        self,
        scope: &'scope Scope<'scope, '_>,
        plan: Plan,
        spare: Vec<V>,
    ) -> Result<Background<'scope>, Error>
    where
        V: Vcpu + Send + 'scope,
    {
        let (control, body) = self.in_background(plan, spare)?;
        let thread = Builder::new().name(NAME.to_owned()).spawn_scoped(scope, body).map_err(Error::Spawn)?;
        Ok(Background { control, thread: Some(Thread::Scoped(thread)) })
    }

    /// Settles a run, and gives what its thread is to do.
    fn in_background<V: Vcpu + Send>(
        self,
        plan: Plan,
        mut spare: Vec<V>,
    ) -> Result<(Arc<Control>, impl FnOnce() -> Ending + use<V>), Error> {
        let control = Arc::new(self.control(&plan));
        let terms = self.settle(&mut spare, &control)?;
        for vcpu in &mut spare[..terms.vcpus] {
            // A spare vCPU never runs, so nothing else renews a root that went stale since it was last lent. Where that
            // fails, the watchdog is left.
            let _ = vcpu.renew_root();
        }
        let shared = Arc::clone(&control);
        let body = move || {
            let vcpus = &mut spare[..terms.vcpus];
            Run::new(terms, &plan, BACKGROUND_CHUNK, &shared).work(vcpus, |_| {})
        };
        Ok((control, body))
    }
}

impl Background<'_> {
    /// The gate that the VMM closes around changes of its memslots: the engine's, if it was given one.
    #[must_use]
    pub fn gate(&self) -> &Gate {
        self.control.entrance.gate()
    }

    /// How far the run is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.control.meter.read()
    }

    /// Whether the run has come to its end, so that [`join`](Self::join) does not wait.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        match &self.thread {
            Some(Thread::Owned(thread)) => thread.is_finished(),
            Some(Thread::Scoped(thread)) => thread.is_finished(),
            None => true,
        }
    }

    /// Ends the run, without waiting for it. A pre-fault call under way is interrupted; what was not reached is in the
    /// report.
    pub fn stop(&self) {
        self.control.stop();
    }

    /// Waits for the run's end and gives its report. It has no [`pages`](Report::pages): the VM was not lent for so long.
    ///
    /// # Errors
    /// As [`run`](Engine::run).
    ///
    /// # Panics
    /// Where a method of the caller's `Vcpu` panicked.
    pub fn join(mut self) -> Result<Report, Error> {
        let ended = self.end().expect("only join and drop take the thread, and each ends the handle");
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn end(&mut self) -> Option<std::thread::Result<Ending>> {
        self.thread.take().map(|thread| match thread {
            Thread::Owned(thread) => thread.join(),
            Thread::Scoped(thread) => thread.join(),
        })
    }
}

impl Drop for Background<'_> {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.stop();
            // A panic of the caller's own vCPU was told by its thread; there is nobody here to give it to.
            drop(self.end());
        }
    }
}
