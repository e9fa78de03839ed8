//! What the library knows of the process that it is in, and whether it still does anything.
//!
//! The state lies behind one pointer in a page that the kernel wipes in a child (`MADV_WIPEONFORK`). So a child, made in
//! whatever way, starts with nothing: not with a lock that another thread held at the fork, nor with a helper that only
//! the parent has.
// UNSAFETY: a page of the library's own, pointers in it, and a function to be called at exit.
#![expect(unsafe_code, reason = "state that a fork wipes")]

use std::any::Any;
use std::fs::File;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use premap_exec_settings::{self as settings, Settings};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};

use crate::absence;
use crate::events::{Event, Journal};
use crate::helper::{self, Helper, Undone, WhenConfined};
use crate::say::say;
use crate::seccomp::{self, Look};
use crate::turn::Turn;
use crate::vms::Vms;
use crate::watch::{self, TELLING_LIMIT};

/// Where the kernel says what lies where in this process.
const ADDRESS_SPACE: &str = "/proc/self/smaps";

/// Set once the library does nothing any more.
static ASIDE: AtomicBool = AtomicBool::new(false);
/// The page; null until the first use.
static PAGE: AtomicPtr<AtomicPtr<Process>> = AtomicPtr::new(ptr::null_mut());

/// The state of this process.
pub(crate) struct Process {
    pub(crate) settings: Arc<Settings>,
    pub(crate) journal: Arc<Journal>,
    /// Runs the engine.
    pub(crate) mapper: Helper,
    /// Does what is quick, also while the other is at work.
    pub(crate) clerk: Helper,
    vms: Mutex<Vms>,
    /// Changes of them, to wait on.
    pub(crate) turn: Turn,
}

impl Process {
    /// The VMs. Nothing slow is done while this is held.
    pub(crate) fn vms(&self) -> MutexGuard<'_, Vms> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(settings: Settings) -> Result<Self, String> {
        let when_confined = match settings.seccomp {
            settings::Seccomp::StepAside => WhenConfined::Refuse,
            settings::Seccomp::Trust => WhenConfined::Work,
        };
        // What the library's own panics say, they say in one line.
        std::panic::set_hook(Box::new(|_| {}));
        let process = Self {
            journal: Arc::new(Journal::open(settings.report.as_ref())),
            settings: Arc::new(settings),
            mapper: Helper::new(when_confined, mapper_needed),
            clerk: Helper::new(when_confined, clerk_needed),
            vms: Mutex::default(),
            turn: Turn::default(),
        };
        process.start_threads().inspect_err(|_| process.give_up())?;
        Ok(process)
    }

    /// Starts the threads. The calling thread has just opened `/dev/kvm`: only now may it open files, and only once, since
    /// it may lay a filter next.
    fn start_threads(&self) -> Result<(), String> {
        let refused = self.settings.seccomp == settings::Seccomp::StepAside;
        // Without it nothing can be mapped, so that is said first, and by its name.
        File::open(ADDRESS_SPACE).map_err(|error| {
            format!("cannot open {ADDRESS_SPACE}, which says what memory is behind the guest: {error}; mount /proc there")
        })?;
        match Look::new().is_confined() {
            Some(true) if refused => return Err(confined()),
            None if refused => return Err(maybe_confined()),
            _ => {}
        }
        let threads =
            [Some(&self.clerk), (self.settings.strategy != settings::Strategy::None).then_some(&self.mapper)];
        for helper in threads.into_iter().flatten() {
            helper.start().map_err(|error| format!("cannot start a thread: {error}"))?;
        }
        Ok(())
    }

    /// Has the mapper's thread started again where it has ended, since a VM was made. The clerk does it, who stays: the thread
    /// at hand may be confined by now.
    pub(crate) fn wake_mapper(&'static self) {
        if self.settings.strategy == settings::Strategy::None || self.mapper.is_running() {
            return;
        }
        match self.clerk.ask(TELLING_LIMIT, || self.mapper.start()) {
            Ok(Err(error)) => step_aside(&format!("cannot start a thread: {error}")),
            Err(Undone::Confined) => step_aside(&confined()),
            Err(Undone::MaybeConfined) => step_aside(&maybe_confined()),
            // Who is late is still at it; where there is no clerk, the library has stepped aside.
            Ok(Ok(())) | Err(Undone::Late | Undone::Ended | Undone::Panicked(_)) => {}
        }
    }

    /// Ends the threads that were started before one could not be, so that the VMM has them.
    fn give_up(&self) {
        /// They have nothing to do.
        const LIMIT: Duration = Duration::from_secs(1);
        given_up();
        for helper in [&self.mapper, &self.clerk] {
            helper.close();
            helper.wait_until_gone(LIMIT);
        }
    }

    /// Whether any of the library's threads is there.
    pub(crate) fn has_threads(&self) -> bool {
        self.mapper.is_running() || self.clerk.is_running()
    }

    /// Ends what the library does in this process: its runs, then its threads.
    fn end(&self) {
        self.vms().stop_all();
        self.turn.announce();
        self.mapper.close();
        self.clerk.close();
    }
}

fn read_settings() -> Result<Settings, String> {
    match std::env::var(settings::VARIABLE) {
        Err(std::env::VarError::NotPresent) => Ok(Settings::default()),
        Err(error) => Err(format!("{}: {error}", settings::VARIABLE)),
        Ok(text) => Settings::decode(&text)
            .map_err(|error| format!("{} is not of this version: {error}", settings::VARIABLE)),
    }
}

/// For how much longer there may be runs.
fn mapper_needed() -> Duration {
    current().map_or(Duration::ZERO, |process| process.vms().needed(Instant::now()))
}

/// The clerk stays: what a VM counted is told at its end, and another VM may be made on a thread that may not start one of
/// the library's, nor look whether it may.
fn clerk_needed() -> Duration {
    Duration::from_secs(3_600)
}

/// Why a confined process is left alone, and the ways out.
pub(crate) fn confined() -> String {
    format!(
        "this process is confined by seccomp, and its filter might kill it for what mapping takes. If the filter \
         allows {}, say --seccomp trust",
        seccomp::needed()
    )
}

/// Why a process is left alone of which that can't be told.
pub(crate) fn maybe_confined() -> String {
    "cannot tell whether this process is confined by seccomp: /proc/thread-self/status can't be read. Mount /proc in its \
     root, or where it is not confined, say --seccomp trust"
        .to_owned()
}

/// The state, if this process has any.
pub(crate) fn current() -> Option<&'static Process> {
    // SAFETY: the pointer is null or to a page that is never unmapped and holds one aligned pointer.
    let cell = unsafe { PAGE.load(Ordering::Acquire).as_ref() }?;
    // SAFETY: the pointer is null, or came from a box that is never freed.
    unsafe { cell.load(Ordering::Acquire).as_ref() }
}

/// The state, made if there is none. Where that fails, the library steps aside. No file is opened where there is one.
pub(crate) fn begin() -> Option<&'static Process> {
    if let Some(process) = current() {
        return Some(process);
    }
    let cell = cell().map_err(|errno| step_aside(&format!("no memory: {errno}"))).ok()?;
    let settings = read_settings().map_err(|error| step_aside(&error)).ok()?;
    let report = settings.report.clone();
    let told = |error: String| {
        Journal::open(report.as_ref()).write(&Event::SteppedAside { why: &error });
        step_aside(&error);
    };
    let process = Process::start(settings).map_err(told).ok()?;
    let own = Box::into_raw(Box::new(process));
    if cell.compare_exchange(ptr::null_mut(), own, Ordering::AcqRel, Ordering::Acquire).is_err() {
        // Another thread was faster.
        // SAFETY: the pointer is our box's, and nobody else has it.
        drop(unsafe { Box::from_raw(own) });
    } else {
        // SAFETY: the function takes nothing, lives as long as the process, and lets no panic out.
        unsafe { libc::atexit(at_exit) };
    }
    current()
}

extern "C" fn at_exit() {
    // At this point nothing can be told or done about a panic.
    let _ = std::panic::catch_unwind(watch::exiting);
}

/// The page's one cell.
fn cell() -> Result<&'static AtomicPtr<Process>, premap_kvm::Errno> {
    if PAGE.load(Ordering::Acquire).is_null() {
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let page = unsafe { mmap_anonymous(ptr::null_mut(), 4096, flags, MapFlags::PRIVATE) }?;
        // SAFETY: the page is ours and private, so that it can be wiped.
        unsafe { madvise(page, 4096, Advice::LinuxWipeOnFork) }?;
        // A page that loses the race stays, unused.
        let _ = PAGE.compare_exchange(ptr::null_mut(), page.cast(), Ordering::AcqRel, Ordering::Acquire);
    }
    // SAFETY: the page is never unmapped, is aligned, and its zeros are a null pointer.
    unsafe { PAGE.load(Ordering::Acquire).as_ref() }.ok_or(premap_kvm::Errno::NOMEM)
}

/// Whether the library has threads in this process.
pub(crate) fn has_threads() -> bool {
    current().is_some_and(Process::has_threads)
}

/// When the library gave its threads up.
static GIVEN_UP: OnceLock<Instant> = OnceLock::new();

/// Takes note that the library gives its threads up.
pub(crate) fn given_up() {
    let _ = GIVEN_UP.set(Instant::now());
}

/// Whether threads that were given up may still count against the process's limit: one that has done its work is there for
/// a moment longer.
pub(crate) fn is_giving_up() -> bool {
    const MOMENT: Duration = Duration::from_secs(1);
    GIVEN_UP.get().is_some_and(|when| when.elapsed() < MOMENT)
}

/// Whether the library does nothing any more.
pub(crate) fn stepped_aside() -> bool {
    ASIDE.load(Ordering::Relaxed)
}

/// Does nothing from now on, and says why, once.
pub(crate) fn step_aside(why: &str) {
    if !ASIDE.swap(true, Ordering::Relaxed) {
        absence::told();
        say(&format!("the VM runs without pre-mapping: {why}"));
        if let Some(process) = current() {
            let (journal, why) = (Arc::clone(&process.journal), why.to_owned());
            let tell = move || journal.write(&Event::SteppedAside { why: &why });
            // Where the thread has ended there is nobody to tell it.
            let _ = if helper::is_own_thread() {
                tell();
                Ok(())
            } else {
                process.clerk.hand(move |_| tell())
            };
        }
    }
    if let Some(process) = current() {
        process.end();
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".to_owned())
}
