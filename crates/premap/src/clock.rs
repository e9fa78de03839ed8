//! Shares a run's wall-clock time between its stages.
//!
//! The stages overlap, so neither "from first to last call" nor "summed over threads" says what a stage cost the caller.
//! Each moment in which calls are under way is shared equally among them; a stage's time is the sum of its calls' shares.
//! The two times add up to the wall-clock time in which anything was under way.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::report::Stage;

/// Times calls of both stages.
#[derive(Debug)]
pub(crate) struct Clock(Mutex<State>);

#[derive(Debug)]
struct State {
    last: Instant,
    under_way: [u32; 2],
    shares: [Duration; 2],
    busy: [Duration; 2],
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(State {
            last: Instant::now(),
            under_way: [0; 2],
            shares: [Duration::ZERO; 2],
            busy: [Duration::ZERO; 2],
        }))
    }

    /// Runs `call` as one of the stage's.
    pub(crate) fn time<T>(&self, stage: Stage, call: impl FnOnce() -> T) -> T {
        self.turn(|state| state.under_way[stage as usize] += 1);
        let value = call();
        self.turn(|state| state.under_way[stage as usize] -= 1);
        value
    }

    /// The stage's share of the wall-clock time, and its time summed over threads.
    pub(crate) fn read(&self, stage: Stage) -> (Duration, Duration) {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (state.shares[stage as usize], state.busy[stage as usize])
    }

    fn turn(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let elapsed = now.saturating_duration_since(state.last);
        state.last = now;
        let all: u32 = state.under_way.iter().sum();
        for stage in 0..2 {
            let calls = state.under_way[stage];
            if calls > 0 {
                state.shares[stage] += elapsed * calls / all;
                state.busy[stage] += elapsed * calls;
            }
        }
        change(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up_to_the_time_under_way_and_never_more() {
        let clock = Clock::new();
        let begin = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| clock.time(Stage::Host, || std::thread::sleep(Duration::from_millis(20))));
            clock.time(Stage::Second, || std::thread::sleep(Duration::from_millis(20)));
        });
        let wall = begin.elapsed();
        let (host, second) = (clock.read(Stage::Host), clock.read(Stage::Second));
        assert!(host.0 + second.0 <= wall, "{host:?} and {second:?} exceed {wall:?}");
        assert!(host.1 >= Duration::from_millis(20) && second.1 >= Duration::from_millis(20));
        assert!(host.0 <= host.1 && second.0 <= second.1);
    }
}
