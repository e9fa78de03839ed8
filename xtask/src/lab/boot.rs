//! One boot of the lab, and the jobs run in it.
//!
//! # Protocol
//!
//! The guest has three ports of one virtio serial device, which the cloud kernels have built in and which pass every
//! byte as it is. Its first serial line is the console, and goes to a file.
//!
//! | port | carries |
//! |---|---|
//! | 1, control | lines, both ways: QEMU's own standard input and output |
//! | 2 | the jobs' standard output, to a file |
//! | 3 | the jobs' standard error, to a file |
//!
//! The guest says `up` on the control port once it is ready. From then on each line from the host is shell text
//! whose newlines and backslashes are escaped for `printf %b`. `token=T` sets the token of this boot; `job N COMMAND`
//! runs a job. When the job has ended and all its output was copied, the guest writes the terminator of
//! [`Stream`] to ports 2 and 3 and `exit N CODE` to the control port. A job is over when all three were seen. When
//! the control port closes, the guest powers off, and when QEMU ends, its standard output does.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::console;
use super::initramfs::{self, GuestFile};
use super::kernel::Kernel;
use super::machine::{self, Machine};
use super::stream::Stream;
use super::{Lab, note};

/// How long a guest may take until it says `up`: some times what it takes beside other work on two processors.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// How often output is looked for.
const POLL: Duration = Duration::from_millis(20);

/// A command to run in the guest.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) argv: Vec<String>,
    pub(crate) environment: Vec<(String, String)>,
    pub(crate) timeout: Duration,
}

/// Why a boot ended before its job did.
#[derive(Debug)]
pub(crate) enum Broken {
    TimedOut { command: String, limit: Duration },
    Died { reason: String },
    Host(anyhow::Error),
}

impl std::fmt::Display for Broken {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TimedOut { command, limit } => {
                write!(formatter, "{command} did not end within {} s", limit.as_secs())
            }
            Self::Died { reason } => write!(formatter, "the lab's guest died: {reason}"),
            Self::Host(error) => write!(formatter, "{error:#}"),
        }
    }
}

impl std::error::Error for Broken {}

impl From<anyhow::Error> for Broken {
    fn from(error: anyhow::Error) -> Self {
        Self::Host(error)
    }
}

impl From<std::io::Error> for Broken {
    fn from(error: std::io::Error) -> Self {
        Self::Host(error.into())
    }
}

/// A guest that is up, until dropped.
pub(crate) struct Boot {
    qemu: Child,
    control: ChildStdin,
    lines: Receiver<String>,
    output: File,
    errors: File,
    directory: PathBuf,
    /// Where the console's log is kept once the boot is over.
    console: PathBuf,
    token: String,
    jobs: usize,
}

impl Boot {
    /// Boots `kernel` with `files` on its search path, and waits until it is up.
    pub(crate) fn start(
        lab: &Lab,
        kernel: &Kernel,
        machine: &Machine,
        files: &[GuestFile],
    ) -> Result<Self, Broken> {
        let directory = lab.run_directory()?;
        let initramfs = directory.join("initramfs");
        fs::write(&initramfs, initramfs::build(&lab.busybox, kernel, &machine.kvm, files)?)?;
        // Made here, so that they can be read before QEMU opens them.
        for name in ["stdout", "stderr", "console"] {
            File::create(directory.join(name))?;
        }

        let parameters: String = machine.kvm.iter().map(|parameter| format!(", {parameter}")).collect();
        note!("booting Linux {}{parameters}", kernel.release);
        let mut command = machine::with_parent(&lab.qemu.command());
        command
            .args(machine::arguments(machine, lab.qemu.accelerator(), &kernel.image, &directory))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(directory.join("qemu"))?);
        let mut qemu = command.spawn().context("cannot start QEMU")?;
        let control = qemu.stdin.take().context("QEMU has no standard input")?;
        let replies = qemu.stdout.take().context("QEMU has no standard output")?;
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(replies).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut boot = Self {
            qemu,
            control,
            lines,
            output: File::open(directory.join("stdout"))?,
            errors: File::open(directory.join("stderr"))?,
            console: lab.directory.join("last-console.log"),
            directory,
            token: token()?,
            jobs: 0,
        };
        boot.wait_until_up()?;
        Ok(boot)
    }

    /// Runs a job, passes its output on as it comes, and returns its exit code.
    pub(crate) fn run(
        &mut self,
        job: &Job,
        output: &mut dyn Write,
        errors: &mut dyn Write,
    ) -> Result<i32, Broken> {
        self.jobs += 1;
        let number = self.jobs;
        let (mut ours, mut theirs) = (Stream::new(&self.token, number), Stream::new(&self.token, number));
        writeln!(self.control, "{}", escape(&job_line(number, job))).map_err(|_| self.died())?;

        let deadline = Instant::now() + job.timeout;
        let mut code = None;
        loop {
            let alive = match self.lines.recv_timeout(POLL) {
                Ok(line) => {
                    code = code.or_else(|| exit_code(&line, number));
                    true
                }
                Err(RecvTimeoutError::Timeout) => true,
                Err(RecvTimeoutError::Disconnected) => false,
            };
            pump(&mut self.output, &mut ours, output)
                .context("cannot pass the command's standard output on")?;
            pump(&mut self.errors, &mut theirs, errors)
                .context("cannot pass the command's standard error on")?;
            if let (Some(code), true, true) = (code, ours.ended(), theirs.ended()) {
                return Ok(code);
            }
            if !alive {
                return Err(self.died());
            }
            if Instant::now() >= deadline {
                self.show_console();
                return Err(Broken::TimedOut { command: job.argv.join(" "), limit: job.timeout });
            }
        }
    }

    fn wait_until_up(&mut self) -> Result<(), Broken> {
        let started = Instant::now();
        loop {
            match self.lines.recv_timeout(BOOT_LIMIT.saturating_sub(started.elapsed())) {
                Ok(line) if line == "up" => break,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    self.show_console();
                    return Err(Broken::TimedOut { command: "the boot".to_owned(), limit: BOOT_LIMIT });
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.died()),
            }
        }
        note!("up after {:.1} s", started.elapsed().as_secs_f64());
        writeln!(self.control, "token={}", self.token).map_err(|_| self.died())
    }

    fn died(&self) -> Broken {
        self.show_console();
        let text = |name| fs::read(self.directory.join(name)).unwrap_or_default();
        let reason = console::cause(&text("console"))
            .or_else(|| console::cause_in_qemu(&text("qemu")))
            .unwrap_or_else(|| "QEMU ended and gave no reason".to_owned());
        Broken::Died { reason }
    }

    fn show_console(&self) {
        let text = fs::read(self.directory.join("console")).unwrap_or_default();
        note!("the end of the guest's console (all of it in target/lab/last-console.log):");
        for line in console::tail(&text, 30) {
            eprintln!("  | {line}");
        }
    }
}

impl Drop for Boot {
    fn drop(&mut self) {
        // The guest keeps nothing, so there's nothing to shut down in order. Errors here have no remedy.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        let _ = fs::rename(self.directory.join("console"), &self.console);
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Draws the token of a boot.
fn token() -> Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes).context("cannot read /dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn pump(from: &mut File, stream: &mut Stream, to: &mut dyn Write) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    while !stream.ended() {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        to.write_all(&stream.push(&buffer[..count]))?;
    }
    to.flush()
}

fn job_line(number: usize, job: &Job) -> String {
    let settings = job.environment.iter().map(|(name, value)| quote(&format!("{name}={value}")));
    let words = job.argv.iter().map(|word| quote(word));
    let all: Vec<_> = settings.chain(words).collect();
    format!("job {number} env {}", all.join(" "))
}

/// Quotes a word for the shell.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Escapes text to one line, for `printf %b`.
fn escape(text: &str) -> String {
    text.replace('\\', r"\\").replace('\n', r"\n")
}

/// Reads `exit NUMBER CODE`.
fn exit_code(line: &str, number: usize) -> Option<i32> {
    let mut words = line.split(' ');
    (words.next()? == "exit" && words.next()?.parse() == Ok(number)).then_some(())?;
    words.next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_one_quoted_line() {
        let job = Job {
            argv: ["sh", "-c", "echo 'a\\n'\necho b"].map(str::to_owned).into(),
            environment: vec![("PREMAP_X".to_owned(), "1 2".to_owned())],
            timeout: Duration::ZERO,
        };
        let line = escape(&job_line(3, &job));
        assert_eq!(line, r"job 3 env 'PREMAP_X=1 2' 'sh' '-c' 'echo '\\''a\\n'\\''\necho b'");
    }

    #[test]
    fn the_exit_line_of_this_job_gives_its_code() {
        let check = |line: &str, expected| assert_eq!(exit_code(line, 2), expected, "{line}");
        check("exit 2 0", Some(0));
        check("exit 2 137", Some(137));
        check("exit 1 0", None);
        check("up", None);
    }
}
