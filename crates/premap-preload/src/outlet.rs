//! Writing to whoever reads, or does not: a pipe that stays full holds nobody up for long.
//!
//! A pipe is opened anew for it, in a way in which a write does not wait. The VMM's own descriptor stays as it is: others may
//! have it too.

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Result, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

/// How long a pipe may stay full.
const FULL_LIMIT: Duration = Duration::from_millis(100);
/// How long it is left alone then.
const PAUSE: Duration = Duration::from_millis(5);

/// Writes all to a file that has this descriptor.
///
/// # Errors
/// `TimedOut` where it is a pipe that stays full; some may be written then.
pub(crate) fn write<F: AsRawFd>(file: &F, bytes: &[u8]) -> Result<()>
where
    for<'a> &'a F: Write,
{
    match own_end(file.as_raw_fd()) {
        Some(pipe) => write_patiently(pipe, bytes),
        // A named pipe that was opened here is of the kind already; elsewhere a write waits for as long as it must.
        None => write_patiently(file, bytes),
    }
}

/// Another end of the pipe, where the descriptor is a pipe's and somebody reads it.
fn own_end(fd: RawFd) -> Option<File> {
    let path = format!("/proc/self/fd/{fd}");
    let link = std::fs::read_link(&path).ok()?;
    if !link.to_string_lossy().starts_with("pipe:") {
        return None;
    }
    OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path).ok()
}

fn write_patiently(mut file: impl Write, mut bytes: &[u8]) -> Result<()> {
    let mut until = Instant::now() + FULL_LIMIT;
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => {
                bytes = bytes.get(count..).unwrap_or_default();
                until = Instant::now() + FULL_LIMIT;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < until => {
                std::thread::sleep(PAUSE);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                return Err(Error::new(
                    ErrorKind::TimedOut,
                    "it is a pipe that is full, and nobody reads it",
                ));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_full_pipe_is_given_up_and_one_that_is_read_gets_all() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let much = vec![7; 1 << 20];
        assert_eq!(write(&writer, &much).unwrap_err().kind(), ErrorKind::TimedOut);
        let read = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).map(|_| bytes.len())
        });
        write(&writer, &much).unwrap();
        drop(writer);
        assert!(read.join().unwrap().unwrap() > much.len());
    }
}
