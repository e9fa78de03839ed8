//! The lab suite: the workspace's tests that need a kernel, commands in cgroups too small for them, and the acceptance cases,
//! on each kernel; the scenarios on the first of them without the TDP MMU and without two-dimensional paging; and an unchanged
//! VMM without and with `premap exec`.
//!
//! Counts that fall short fail it. Times that do are measured again and told, and fail it only where `PREMAP_REQUIRE_TIMES=1`
//! says that the machine is quiet.

mod limits;

use std::io::{self, Write};
use std::ops::AddAssign;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::acceptance::{self, ATTEMPTS, Case, Kind, Run};
use crate::exec_check;
use crate::lab::boot::{Boot, Job};
use crate::lab::initramfs::GuestFile;
use crate::lab::kernel::{Kernel, Line};
use crate::lab::machine::Machine;
use crate::lab::{Lab, binaries, environment};

/// The packages whose tests run in the lab as well as on the host.
const PACKAGES: &[&str] = &["conformance", "premap-guest", "premap-linux-guest"];
/// The example VMM runs there too.
const EXAMPLE: &str = "example-vmm";
/// The test program with the scenarios on `/dev/kvm`, and those of them that a KVM without two-dimensional paging can show.
const SCENARIOS: &str = "conformance-linux";
const WITHOUT_TDP: &str = "without_tdp";
/// How many random scripts each kernel is compared on.
const SCRIPTS: &str = "60";
/// A scenario that turns the engine's watchdog off, to show that the guard around slot changes does without. It is left out
/// where there is no TDP MMU: Linux 6.12 was seen to hang once while it ran there, and nothing ends a call then.
const UNGUARDED: &str = "slots_come_and_go_under_the_guard";
const TEST_LIMIT: Duration = Duration::from_secs(900);
/// How many guests may die before a command counts as failed: under emulation one does now and then, whatever it runs. What
/// a guest that lives has counted is never measured again.
const GUESTS: u32 = 2;
const CASE_LIMIT: Duration = Duration::from_secs(300);

/// Runs the suite on each kernel, and fails at the first kernel on which something does.
///
/// # Errors
///
/// What fell short, or why the lab can't run where `PREMAP_REQUIRE_LAB=1` demands it.
pub(crate) fn run(lines: &[Line]) -> Result<()> {
    let required = is_set("PREMAP_REQUIRE_LAB");
    let lab = match Lab::prepare(lines) {
        Ok(lab) => lab,
        Err(error) if required => {
            return Err(error.context("the lab cannot run, and PREMAP_REQUIRE_LAB=1 demands it"));
        }
        Err(error) => {
            println!("skipped: the lab cannot run here: {error:#}");
            return Ok(());
        }
    };
    let tests = binaries::tests(&lab.directory, PACKAGES)?;
    let mut files = tests.clone();
    for program in ["premap", "conformance", EXAMPLE] {
        files.extend(binaries::program(&lab.directory, program)?);
    }

    let machine = Machine::default();
    for kernel in &lab.kernels {
        println!("\n-- Linux {}", kernel.release);
        let mut boot = Boot::start(&lab, kernel, &machine, &files)?;
        for test in &tests {
            run_test(&mut boot, &[&test.name])?;
        }
        run_test(&mut boot, &[EXAMPLE])?;
        run_test(&mut boot, &[EXAMPLE, "--background"])?;
        limits::run(&mut boot, kernel)?;
        compare(&mut boot)?;
        let mut short = Short::default();
        for case in acceptance::cases() {
            short += run_case(&mut boot, &case)?;
        }
        if short.counts > 0 || (short.times > 0 && is_set("PREMAP_REQUIRE_TIMES")) {
            let all = short.counts + short.times;
            bail!("{all} of premap's acceptance checks failed on Linux {}", kernel.release);
        }
        if short.times > 0 {
            println!("{} times fell short on Linux {}, see above", short.times, kernel.release);
        }
    }
    if let Some(kernel) = lab.kernels.first() {
        run_with_parameter(&lab, kernel, &files, "tdp_mmu=0", &[SCENARIOS, "--skip", UNGUARDED])?;
        run_with_parameter(&lab, kernel, &files, "npt=0", &[SCENARIOS, WITHOUT_TDP])?;
    }
    exec_check::run_in_suite(&lab)
}

/// Runs a test in a boot whose KVM has a parameter set.
fn run_with_parameter(
    lab: &Lab,
    kernel: &Kernel,
    files: &[GuestFile],
    parameter: &str,
    command: &[&str],
) -> Result<()> {
    println!("\n-- Linux {}, {parameter}", kernel.release);
    let parameter = parameter.parse().map_err(anyhow::Error::msg)?;
    let machine = Machine { kvm: vec![parameter], ..Machine::default() };
    run_test(&mut Boot::start(lab, kernel, &machine, files)?, command)
}

fn is_set(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| value == "1")
}

/// How many expectations fell short.
#[derive(Clone, Copy, Debug, Default)]
struct Short {
    counts: usize,
    times: usize,
}

impl AddAssign for Short {
    fn add_assign(&mut self, other: Self) {
        self.counts += other.counts;
        self.times += other.times;
    }
}

fn run_test(boot: &mut Boot, command: &[&str]) -> Result<()> {
    let test = command.join(" ");
    println!("{test}");
    let argv = command.iter().map(|&word| word.to_owned()).collect();
    let job = job(argv, TEST_LIMIT);
    let code = boot.run(&job, &mut io::stdout().lock(), &mut io::stderr().lock())?;
    if code != 0 {
        bail!("{test} ended with {code} in the lab");
    }
    Ok(())
}

/// Compares the software KVM with this kernel on scripts that no run before had; the seed is in the output.
fn compare(boot: &mut Boot) -> Result<()> {
    let seed = crate::conformance::fresh_seed().to_string();
    println!("random scripts, seed {seed}");
    let argv = ["conformance", "--cases", SCRIPTS, "--seed", &seed].map(str::to_owned).to_vec();
    let code = boot.run(&job(argv, TEST_LIMIT), &mut io::stdout().lock(), &mut io::stderr().lock())?;
    if code != 0 {
        bail!(
            "the software KVM and this kernel differ; `cargo xtask conformance --seed {seed}` shows it again"
        );
    }
    Ok(())
}

/// Runs a case, again if only times fell short.
fn run_case(boot: &mut Boot, case: &Case) -> Result<Short> {
    println!("acceptance: {}", case.name);
    for command in &case.before {
        run_premap(boot, command)?;
    }
    let mut attempt = 1;
    let mut runs: Vec<Run> = Vec::new();
    loop {
        for (at, command) in case.commands.iter().enumerate() {
            let output = run_premap(boot, command)?;
            let parsed = Run::parse(&output);
            let mut run = parsed.map_err(|error| anyhow::anyhow!("premap {}: {error}", command.join(" ")))?;
            match runs.get_mut(at) {
                Some(earlier) => {
                    run.take_shorter_times(earlier);
                    *earlier = run;
                }
                None => runs.push(run),
            }
        }
        let (mut slow, mut wrong) = (0, 0);
        for expectation in case.expectations {
            let (word, figures) = match (expectation.judge(&runs), expectation.kind) {
                (Ok(figures), _) => ("ok", figures),
                (Err(figures), Kind::Time) => {
                    slow += 1;
                    ("SLOW", figures)
                }
                (Err(figures), Kind::Count) => {
                    wrong += 1;
                    ("FAILED", figures)
                }
            };
            println!("  {word:6} {} ({figures})", expectation.what);
        }
        if wrong > 0 || slow == 0 || attempt == ATTEMPTS {
            return Ok(Short { counts: wrong, times: slow });
        }
        attempt += 1;
        println!("  times fell short: measuring again, attempt {attempt} of {ATTEMPTS}");
    }
}

/// Runs the command and gives what it printed.
fn run_premap(boot: &mut Boot, arguments: &[String]) -> Result<Vec<u8>> {
    let mut argv = vec!["premap".to_owned()];
    argv.extend_from_slice(arguments);
    let text = argv.join(" ");
    let mut attempt = 1;
    loop {
        let mut output = Vec::new();
        let code = boot.run(&job(argv.clone(), CASE_LIMIT), &mut output, &mut io::stderr().lock())?;
        if code == 0 {
            return Ok(output);
        }
        // What it printed is all there is to say why.
        io::stdout().write_all(&output).context("cannot write to standard output")?;
        if attempt == GUESTS {
            bail!("{text} ended with {code} in the lab");
        }
        attempt += 1;
        println!("  {text} ended with {code}: attempt {attempt} of {GUESTS}");
    }
}

fn job(argv: Vec<String>, timeout: Duration) -> Job {
    let mut environment = environment();
    for name in ["PREMAP_LAB", "PREMAP_REQUIRE_LAB"] {
        environment.retain(|(known, _)| known != name);
        environment.push((name.to_owned(), "1".to_owned()));
    }
    Job { argv, environment, timeout }
}
