//! `cargo xtask exec-check`: Debian's own QEMU with KVM, run in the lab, boots Linux without and with `premap exec`.
//!
//! ```text
//!   this machine > the lab's kernel, with KVM > qemu-system-x86_64 -accel kvm > Linux
//! ```
//!
//! Both sides run under `premap exec`, which counts faults; on the one side it does nothing else. Every boot must print
//! the same, byte for byte, and end with the same exit code. Transparent huge pages are off in the lab's kernel. Then come
//! the rows of [`harm`], in which the VMM may not be worse off with premap.

mod harm;
mod verdict;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::lab::boot::{Boot, Job};
use crate::lab::kernel::{Kernel, Line};
use crate::lab::machine::Machine;
use crate::lab::{Lab, guest, nested, note};
use verdict::{Outcome, Side, Verdict};

/// The VMM's guest memory.
const MEMORY: &str = "256M";
const REPORT: &str = "/run/report.jsonl";
/// Seconds that one boot may take in the suite, on whatever machine that runs.
const SUITE_LIMIT: u64 = 600;
/// Unpacking is quick; an emulated machine on a busy host is not.
const UNPACK_LIMIT: Duration = Duration::from_secs(120);

/// Flags of `cargo xtask exec-check`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Boots without premap, and as many with it; with 0 only the rows of harm are run
    #[arg(long, value_name = "N", default_value_t = 10)]
    boots: u32,
    /// Run only this row of harm; may be given more than once
    #[arg(long, value_enum, value_name = "CASE")]
    harm: Vec<harm::Case>,
    /// Kernel series of the lab such as 6.12, or `latest`
    #[arg(long, value_name = "SERIES", default_value = "6.12")]
    kernel: Line,
    /// Seconds that one boot may take
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
    /// Machine type of the VMM, instead of its own default
    #[arg(long, value_name = "TYPE")]
    machine: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the check and prints what it found.
pub(crate) fn run_command(options: &Options) -> ExitCode {
    let lab = Lab::prepare(std::slice::from_ref(&options.kernel)).context("the lab cannot be prepared");
    let verdict =
        lab.and_then(|lab| check(&lab, lab.kernels.first().context("no kernel was prepared")?, options));
    match verdict.and_then(|verdict| print(&verdict, options).map(|()| verdict)) {
        Ok(verdict) => match verdict.shortfall() {
            None => ExitCode::SUCCESS,
            Some(why) => {
                note!("exec-check failed: {why}");
                ExitCode::FAILURE
            }
        },
        Err(error) => {
            note!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// One boot without premap and one with it, on the first of the lab's kernels.
///
/// # Errors
///
/// What fell short.
pub(crate) fn run_in_suite(lab: &Lab) -> Result<()> {
    println!("\n-- an unchanged VMM");
    let kernel = lab.kernels.first().context("the lab has no kernel")?;
    let options = Options {
        boots: 1,
        harm: Vec::new(),
        kernel: Line::Series(kernel.release.clone()),
        timeout: SUITE_LIMIT,
        machine: None,
        json: false,
    };
    let verdict = check(lab, kernel, &options)?;
    print(&verdict, &options)?;
    verdict.shortfall().map_or(Ok(()), |why| bail!("exec-check failed: {why}"))
}

fn print(verdict: &Verdict, options: &Options) -> Result<()> {
    let text = if options.json { serde_json::to_string_pretty(verdict)? } else { verdict.to_string() };
    writeln!(io::stdout().lock(), "{text}").context("cannot write to standard output")
}

fn check(lab: &Lab, kernel: &Kernel, options: &Options) -> Result<Verdict> {
    let archive = lab.directory.join(format!("vmm-{}.cpio", std::process::id()));
    let packed = nested::pack(lab, &build()?, &archive)?;
    // Room for a GiB of the VMM's twice, beside what is unpacked.
    let machine = Machine { memory: "3G".to_owned(), ..Machine::default() };
    let boot = Boot::start(lab, kernel, &machine, &[packed]);
    // A running lab has it in memory.
    std::fs::remove_file(&archive)?;
    let mut boot = boot?;
    let script = format!(
        "cd / && cpio -idu </lab/{name} && rm /lab/{name} && echo never >/sys/kernel/mm/transparent_hugepage/enabled",
        name = nested::ARCHIVE
    );
    let unpacked = Job { argv: shell(&script), environment: Vec::new(), timeout: UNPACK_LIMIT };
    if boot.run(&unpacked, &mut io::sink(), &mut io::sink())? != 0 {
        bail!("the VMM could not be unpacked in the lab");
    }
    let (major, minor) = lab.qemu.version();
    let mut verdict =
        Verdict::new(format!("qemu-system-x86_64 {major}.{minor}"), &kernel.release, options.boots);
    for number in 1..=options.boots {
        for side in [Side::Without, Side::With] {
            let outcome =
                boot_once(&mut boot, side, options).with_context(|| format!("boot {number} {side}"))?;
            note!("boot {number} {side}: {outcome}");
            verdict.add(side, outcome);
        }
    }
    let all = harm::Case::all();
    for case in all.iter().filter(|case| options.harm.is_empty() || options.harm.contains(case)) {
        verdict.add_row(harm::run(&mut boot, *case)?);
    }
    Ok(verdict)
}

/// Builds the command and its library as a user does, and gives their paths.
fn build() -> Result<Vec<PathBuf>> {
    note!("building premap and its library");
    let output = Command::new(crate::cargo())
        .args(["build", "--release", "--package", "premap-cli", "--package", "premap-preload"])
        .arg("--message-format=json-render-diagnostics")
        .current_dir(crate::workspace())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    if !output.status.success() {
        bail!("cargo build failed");
    }
    let paths = artifacts(&String::from_utf8_lossy(&output.stdout));
    if paths.len() != 2 {
        bail!("cargo built no premap or no library: {paths:?}");
    }
    Ok(paths)
}

/// Reads the paths of the command and the library from cargo's messages.
fn artifacts(messages: &str) -> Vec<PathBuf> {
    let built = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let files = built.flat_map(|message| message["filenames"].as_array().cloned().unwrap_or_default());
    let paths = files.filter_map(|file| Some(PathBuf::from(file.as_str()?)));
    paths
        .filter(|path| {
            let name = path.file_name().unwrap_or_default();
            name == "premap" || name == "libpremap_preload.so"
        })
        .collect()
}

fn boot_once(boot: &mut Boot, side: Side, options: &Options) -> Result<Outcome> {
    let mut argv: Vec<String> =
        ["/vmm/bin/premap", "exec", "--report", REPORT, "--strategy", side.strategy(), "--"]
            .map(str::to_owned)
            .into();
    argv.extend(vmm(options.machine.as_deref()));
    let environment = vec![("LD_LIBRARY_PATH".to_owned(), "/vmm/lib".to_owned())];
    let job = Job { argv, environment, timeout: Duration::from_secs(options.timeout) };
    let mut console = Console::new();
    let mut errors = Vec::new();
    let code = boot.run(&job, &mut console, &mut errors)?;

    let read = Job { argv: shell(&format!("cat {REPORT}")), environment: Vec::new(), timeout: UNPACK_LIMIT };
    let mut report = Vec::new();
    boot.run(&read, &mut report, &mut io::sink())?;
    let said = String::from_utf8_lossy(&errors).trim().to_owned();
    let console = console.finish();
    Outcome::new(code, console, &report)
        .map_err(|why| anyhow::anyhow!("{why}; the VMM ended with {code}; stderr: {said}"))
}

fn vmm(machine: Option<&str>) -> Vec<String> {
    // Without time stamps and the boot's messages, the console says the same each time.
    let append = "console=ttyS0 quiet printk.time=0 panic=-1";
    let mut argv: Vec<_> = [
        "/vmm/bin/qemu-system-x86_64",
        "-L",
        "/vmm/share",
        "-accel",
        "kvm",
        "-m",
        MEMORY,
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        "stdio",
        "-kernel",
        guest::KERNEL,
        "-initrd",
        guest::INITRAMFS,
        "-append",
        append,
    ]
    .map(str::to_owned)
    .into();
    argv.extend(machine.into_iter().flat_map(|machine| ["-machine".to_owned(), machine.to_owned()]));
    argv
}

fn shell(script: &str) -> Vec<String> {
    ["sh", "-c", script].map(str::to_owned).into()
}

/// Takes the nested guest's console, and notes when the marker came.
struct Console {
    begun: Instant,
    bytes: Vec<u8>,
    up: Option<Duration>,
}

impl Console {
    fn new() -> Self {
        Self { begun: Instant::now(), bytes: Vec::new(), up: None }
    }

    fn finish(self) -> verdict::Console {
        verdict::Console { text: String::from_utf8_lossy(&self.bytes).into_owned(), up: self.up }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        let marker = guest::MARKER.as_bytes();
        if self.up.is_none() && self.bytes.windows(marker.len()).any(|window| window == marker) {
            self.up = Some(self.begun.elapsed());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_marker_is_noticed_when_it_comes_in_pieces() {
        let mut console = Console::new();
        let (head, tail) = guest::MARKER.split_at(5);
        console.write_all(head.as_bytes()).unwrap();
        assert_eq!(console.up, None);
        console.write_all(tail.as_bytes()).unwrap();
        assert!(console.up.is_some());
        assert_eq!(console.finish().text, guest::MARKER);
    }

    #[test]
    fn command_and_library_are_found_among_what_cargo_built() {
        let messages = r#"
{"reason":"compiler-artifact","filenames":["/t/deps/libserde.rlib"]}
{"reason":"compiler-artifact","filenames":["/t/libpremap_preload.so"]}
{"reason":"compiler-artifact","filenames":["/t/premap"],"executable":"/t/premap"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(
            artifacts(messages),
            [PathBuf::from("/t/libpremap_preload.so"), PathBuf::from("/t/premap")]
        );
    }
}
