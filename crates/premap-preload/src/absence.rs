//! Telling that nothing was mapped, where no VM was made: by QEMU with `-accel tcg`, say, or since a program cleared the
//! environment before it ran the VMM. A process that ends by a signal or by `_exit`, as shells do, tells nothing.
//!
//! Only the process that the command became tells, and only what it did itself: its children tell for themselves, if the
//! library is in them. It has no VM, so no filter for running one: the thread at hand says it.
// UNSAFETY: a function to be called at the process's begin and one at its end, and strings that an exec is called with.
#![expect(unsafe_code, reason = "the process's begin and end, and exec's arguments")]

use std::ffi::{CStr, OsStr, c_char};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use premap_exec_settings::{LIBRARY, Settings, VARIABLE};

use crate::events::{Event, Journal};
use crate::say::say;

/// The settings, in the process that the command became.
static OWN: OnceLock<Settings> = OnceLock::new();
/// How many page faults the process's children had before this program began.
static FAULTS_BEFORE: AtomicI64 = AtomicI64::new(0);
/// Whether a VM was made.
static MADE: AtomicBool = AtomicBool::new(false);
/// Whether it was told already that nothing is mapped.
static TOLD: AtomicBool = AtomicBool::new(false);

// SAFETY: the linker gathers pointers to functions under this name, which the C library calls at the process's begin.
#[used]
#[cfg_attr(not(test), unsafe(link_section = ".init_array"))]
static BEGIN: extern "C" fn() = begin;
// SAFETY: likewise at its end.
#[used]
#[cfg_attr(not(test), unsafe(link_section = ".fini_array"))]
static END: extern "C" fn() = end;

extern "C" fn begin() {
    // Here nothing can be told or done about a panic.
    let _ = std::panic::catch_unwind(|| {
        let settings = std::env::var(VARIABLE).ok().and_then(|text| Settings::decode(&text).ok());
        if let Some(settings) = settings.filter(|settings| settings.process == Some(std::process::id())) {
            let _ = OWN.set(settings);
            FAULTS_BEFORE.store(children_s_faults(), Ordering::Relaxed);
        }
    });
}

extern "C" fn end() {
    // As above.
    let _ = std::panic::catch_unwind(|| {
        let Some(settings) = untold() else { return };
        Journal::open(settings.report.as_ref()).write(&Event::NoVm);
        // A shell that ran a VMM has made none itself.
        if !had_children() {
            say("no VM was made through KVM, so nothing was mapped; QEMU makes one with -accel kvm");
        }
    });
}

/// Takes note of a VM.
pub(crate) fn made() {
    MADE.store(true, Ordering::Relaxed);
}

/// Takes note that it was told why nothing is mapped.
pub(crate) fn told() {
    TOLD.store(true, Ordering::Relaxed);
}

/// The settings, where this is the process that the command became, and nobody has told yet that it has no VM.
fn untold() -> Option<&'static Settings> {
    let settings = OWN.get().filter(|_| !MADE.load(Ordering::Relaxed) && !TOLD.load(Ordering::Relaxed))?;
    // A child has its parent's memory.
    (settings.process == Some(std::process::id())).then_some(settings)
}

/// Whether the program has waited for any child. What ran before it in this process may have had some of its own.
fn had_children() -> bool {
    children_s_faults() > FAULTS_BEFORE.load(Ordering::Relaxed)
}

/// How many page faults the children had that this process has waited for.
fn children_s_faults() -> libc::c_long {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `usage` has room for the answer, and all zeros is one.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr());
        usage.assume_init()
    };
    usage.ru_minflt
}

/// Does what comes before an exec in this process, which takes the library along only by the environment.
///
/// # Safety
/// The program is null or a string, and the environment null or a list of strings that ends with a null.
pub(crate) unsafe fn leaving(program: *const c_char, environment: *const *const c_char) {
    let Some(settings) = untold().filter(|_| !program.is_null()) else { return };
    // SAFETY: the caller's promise.
    if unsafe { has_library(environment) } {
        return;
    }
    told();
    // SAFETY: the caller's promise.
    let program = Path::new(OsStr::from_bytes(unsafe { CStr::from_ptr(program) }.to_bytes()));
    Journal::open(settings.report.as_ref()).write(&Event::NotPreloaded { program });
    say(&format!(
        "nothing is mapped in {}: it is run with an environment that lacks LD_PRELOAD; put premap exec behind what clears it",
        program.display()
    ));
}

/// Whether a program with this environment has the library.
///
/// # Safety
/// As for [`leaving`].
unsafe fn has_library(environment: *const *const c_char) -> bool {
    let mut at = environment;
    // SAFETY: the list goes on until its null.
    while let Some(entry) = unsafe { at.as_ref() }.filter(|entry| !entry.is_null()) {
        // SAFETY: the list holds strings.
        let text = unsafe { CStr::from_ptr(*entry) }.to_bytes();
        if text.strip_prefix(b"LD_PRELOAD=").is_some_and(holds_library) {
            return true;
        }
        at = at.wrapping_add(1);
    }
    false
}

fn holds_library(preloaded: &[u8]) -> bool {
    let paths = preloaded.split(|byte| matches!(byte, b':' | b' '));
    paths.filter_map(|path| Path::new(OsStr::from_bytes(path)).file_name()).any(|name| name == LIBRARY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_found_in_an_environment() {
        let check = |entries: &[&CStr], expected| {
            let mut list: Vec<_> = entries.iter().map(|entry| entry.as_ptr()).collect();
            list.push(std::ptr::null());
            // SAFETY: the list holds strings and ends with a null.
            assert_eq!(unsafe { has_library(list.as_ptr()) }, expected, "{entries:?}");
        };
        check(&[c"A=b", c"LD_PRELOAD=/x/libpremap_preload.so"], true);
        check(&[c"LD_PRELOAD=/y.so:/x/libpremap_preload.so:/z.so"], true);
        check(&[c"LD_PRELOAD=/y.so"], false);
        check(&[c"PREMAP_LD_PRELOAD=/x/libpremap_preload.so"], false);
        check(&[], false);
        // SAFETY: no environment is an empty one.
        assert!(!unsafe { has_library(std::ptr::null()) });
    }
}
