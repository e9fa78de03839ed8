//! What the library tells of its work: a JSON object a line, and lines on stderr.
//!
//! `started` is the command's own. `mapped` is written after each run, `ended` when a VM's last descriptor is closed, or at the process's exit. A process
//! that ends by a signal or by `_exit` has no `ended`.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use premap::Report;
use premap_exec_settings as settings;
use serde::Serialize;

use crate::account::{Account, Memory};
use crate::kvm;
use crate::memory::{Left, Slot};
use crate::outlet;
use crate::say::say;

/// Something that happened to a VM.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event<'a> {
    /// A run has ended.
    Mapped {
        /// The process's VMs are numbered from 1.
        vm: u32,
        /// The VM's runs are numbered from 1.
        run: u32,
        /// How many vCPUs were lent.
        vcpus: usize,
        /// Page faults that KVM took for the guest before this run.
        faults: Option<u64>,
        /// The slots' bytes, all accounted for.
        memory: Memory,
        /// The slots as they were.
        slots: &'a [Slot],
        /// What of them was left alone.
        left: &'a [Left],
        report: &'a Report,
    },
    /// A run could not begin.
    Failed { vm: u32, run: u32, why: &'a str },
    /// A VM's mapping was called back again and again; what is not mapped by now is left to the guest's faults.
    GivenUp { vm: u32, run: u32, why: &'a str },
    /// The library does nothing more in this process.
    SteppedAside { why: &'a str },
    /// The process that the command became has made no VM.
    NoVm,
    /// That process runs another program in its place, and in that one nothing is mapped.
    NotPreloaded {
        #[serde(serialize_with = "lossy")]
        program: &'a Path,
    },
    /// The VM is gone.
    Ended {
        vm: u32,
        runs: u32,
        vcpus: usize,
        /// What the runs did in all.
        #[serde(flatten)]
        account: Account,
        /// Page faults that KVM took for the guest (`pf_taken`), over all vCPUs.
        faults: Option<u64>,
        /// Exits from the guest, over all vCPUs.
        exits: Option<u64>,
    },
}

fn lossy<S: serde::Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// Where events go.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    file: Option<File>,
    /// Whether nobody reads, and a line may be torn.
    given_up: AtomicBool,
}

#[derive(Serialize)]
struct Line<'a> {
    version: u32,
    /// The program's name.
    vmm: &'a str,
    pid: u32,
    #[serde(flatten)]
    event: &'a Event<'a>,
}

impl Journal {
    /// Opens what the settings name.
    pub(crate) fn open(report: Option<&settings::Report>) -> Self {
        let opened = match report {
            None => return Self::default(),
            Some(settings::Report::File(path)) => OpenOptions::new()
                .append(true)
                .create(true)
                // A named pipe may stay full, or have no reader at all.
                .custom_flags(libc::O_NONBLOCK)
                .open(path)
                .map_err(|error| format!("{}: {error}", path.display())),
            Some(settings::Report::Descriptor(number)) => kvm::duplicate_any(*number)
                .map(File::from)
                .map_err(|error| format!("descriptor {number}: {error}")),
        };
        let file = opened.map_err(|error| say(&format!("no report is written: {error}"))).ok();
        Self { file, given_up: AtomicBool::new(false) }
    }

    /// Whether anybody reads.
    pub(crate) fn is_open(&self) -> bool {
        self.file.is_some()
    }

    /// Writes an event, in one write, so that lines of several processes stay whole. A pipe that stays full is given up.
    pub(crate) fn write(&self, event: &Event<'_>) {
        let Some(file) = self.file.as_ref().filter(|_| !self.given_up.load(Ordering::Relaxed)) else {
            return;
        };
        let name = std::env::current_exe().ok();
        let name = name.as_deref().and_then(|path| path.file_name()).unwrap_or_default().to_string_lossy();
        let line = Line { version: settings::REPORT_VERSION, vmm: &name, pid: std::process::id(), event };
        let written = serde_json::to_vec(&line).map_err(std::io::Error::from).and_then(|mut bytes| {
            bytes.push(b'\n');
            outlet::write(file, &bytes)
        });
        if let Err(error) = written {
            let ends = error.kind() == ErrorKind::TimedOut && !self.given_up.swap(true, Ordering::Relaxed);
            say(&format!("the report {}: {error}", if ends { "ends here" } else { "can't be written" }));
        }
    }
}
