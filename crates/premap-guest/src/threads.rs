//! Work that begins at one moment on many threads, or not at all.

use std::sync::{Barrier, OnceLock};
use std::thread::{self, Builder};

use rustix::io::Errno;

use crate::error::MachineError;

/// Does `work` for each job on a thread of its own, all released at once, and gives what each came to, in order.
///
/// # Errors
/// A thread that the host does not give. No job was begun then.
pub(crate) fn together<J: Send, R: Send>(
    jobs: Vec<J>,
    work: impl Fn(J) -> R + Sync,
) -> Result<Vec<R>, MachineError> {
    let wanted = jobs.len();
    let (barrier, complete) = (&Barrier::new(wanted), &OnceLock::<bool>::new());
    let work = &work;
    thread::scope(|scope| {
        let mut threads = Vec::with_capacity(wanted);
        for job in jobs {
            let body = move || {
                complete.wait().then(|| {
                    barrier.wait();
                    work(job)
                })
            };
            match Builder::new().spawn_scoped(scope, body) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    // Those that are there wait for all others, which will not come.
                    complete.get_or_init(|| false);
                    return Err(no_thread(threads.len(), wanted, &error));
                }
            }
        }
        complete.get_or_init(|| true);
        let results = threads.into_iter().map(|thread| thread.join().expect("the work doesn't panic"));
        Ok(results.flatten().collect())
    })
}

/// What it means that a thread could not be started.
#[must_use]
pub fn no_thread(started: usize, wanted: usize, error: &std::io::Error) -> MachineError {
    MachineError::Threads { started, wanted, errno: Errno::from_io_error(error).unwrap_or(Errno::AGAIN) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_job_is_done_once_and_told_in_its_place() {
        let done = together((0..20).collect(), |number: u32| number * number).unwrap();
        assert!(done.into_iter().eq((0..20).map(|number| number * number)));
        assert_eq!(together(Vec::<u32>::new(), |number| number), Ok(Vec::new()));
    }
}
