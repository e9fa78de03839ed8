//! What the library tells of its work: a JSON object a line, and lines on stderr.
//!
//! `started` is the command's own. `mapped` is written after each run, `ended` when a VM's last descriptor is closed, or at the process's exit. A process
//! that ends by a signal or by `_exit` has no `ended`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

use premap::Report;
use premap_exec_settings as settings;
use serde::Serialize;

use crate::account::{Account, Memory};
use crate::kvm;
use crate::memory::{Left, Slot};
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
pub(crate) struct Journal(Option<File>);

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
            None => return Self(None),
            Some(settings::Report::File(path)) => OpenOptions::new()
                .append(true)
                .create(true)
                .open(path)
                .map_err(|error| format!("{}: {error}", path.display())),
            Some(settings::Report::Descriptor(number)) => kvm::duplicate_any(*number)
                .map(File::from)
                .map_err(|error| format!("descriptor {number}: {error}")),
        };
        Self(opened.map_err(|error| say(&format!("no report is written: {error}"))).ok())
    }

    /// Whether anybody reads.
    pub(crate) fn is_open(&self) -> bool {
        self.0.is_some()
    }

    /// Writes an event, in one write, so that lines of several processes stay whole.
    pub(crate) fn write(&self, event: &Event<'_>) {
        let Some(mut file) = self.0.as_ref() else { return };
        let name = std::env::current_exe().ok();
        let name = name.as_deref().and_then(|path| path.file_name()).unwrap_or_default().to_string_lossy();
        let line = Line { version: settings::REPORT_VERSION, vmm: &name, pid: std::process::id(), event };
        let written = serde_json::to_vec(&line).map_err(std::io::Error::from).and_then(|mut bytes| {
            bytes.push(b'\n');
            file.write_all(&bytes)
        });
        if let Err(error) = written {
            say(&format!("the report can't be written: {error}"));
        }
    }
}
