//! Getting pages without ceasing to hear signals.
//!
//! A page can take for ever: its content may come from a userfaultfd handler that is in no hurry. KVM waits for it so that
//! a signal ends the wait; `madvise` waits so that only death does. So the call is made on a thread of its own, and the
//! vCPU waits for that thread, looking for signals now and then. A wait that was given up leaves the thread behind; it ends
//! when its page comes, and makes present then what nobody asked for any more, as a late touch would.
//!
//! A vCPU that never meets an absent page starts no thread. For 2 MiB at a time, the hand-over costs far less than a
//! hundredth of the work.

use std::ops::Range;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use premap_address::Hva;

use super::populate::populate;
use super::{Failure, Touch};

/// How long a signal may go unheard.
const PATIENCE: Duration = Duration::from_millis(1);

/// Makes pages present for one vCPU.
#[derive(Debug, Default)]
pub(crate) struct Getter {
    helper: Option<Helper>,
}

#[derive(Debug)]
struct Helper {
    jobs: Sender<(Range<Hva>, Touch)>,
    results: Receiver<Result<(), Failure>>,
}

impl Helper {
    /// Starts the thread, with the signal mask of this one.
    fn start() -> Option<Self> {
        let (jobs, received) = channel();
        let (results, answers) = channel();
        let work = move || {
            for (range, touch) in received {
                if results.send(populate(range, touch)).is_err() {
                    // Nobody waits any more.
                    return;
                }
            }
        };
        thread::Builder::new().name("softkvm-pages".to_owned()).spawn(work).ok()?;
        Some(Self { jobs, results: answers })
    }
}

impl Getter {
    /// Makes the pages of `range` present as a touch would, unless `interrupted` says meanwhile to stop waiting. The
    /// caller has its signals blocked, so that the helper never handles one.
    pub(crate) fn populate(
        &mut self,
        range: Range<Hva>,
        touch: Touch,
        interrupted: impl Fn() -> bool,
    ) -> Result<(), Failure> {
        if self.helper.is_none() {
            self.helper = Helper::start();
        }
        let sent = self.helper.as_ref().filter(|helper| helper.jobs.send((range.clone(), touch)).is_ok());
        let Some(helper) = sent else {
            // No thread is to be had: better deaf than not at all.
            return populate(range, touch);
        };
        loop {
            match helper.results.recv_timeout(PATIENCE) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) if !interrupted() => {}
                Err(RecvTimeoutError::Timeout) => {
                    self.helper = None;
                    return Err(Failure::Interrupted);
                }
                Err(RecvTimeoutError::Disconnected) => {
                    self.helper = None;
                    return Err(Failure::Again);
                }
            }
        }
    }
}
