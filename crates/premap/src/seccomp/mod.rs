//! What a seccomp filter must allow: one table of system calls, by mode and by thread.
//!
//! README, this documentation and `premap exec` have their lists from here, and a test runs each mode under exactly its
//! rules. A VMM makes its filter of them, here with the crate seccompiler:
//!
//! ```
//! use std::collections::BTreeMap;
//!
//! use premap::seccomp::{Mode, rules};
//! use seccompiler::{
//!     BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
//! };
//!
//! fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
//!     let mut allowed: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
//!     let (mut any, mut some) = (Vec::new(), Vec::new());
//!     for rule in rules(&[Mode::Foreground, Mode::Vm]) {
//!         match rule.argument {
//!             None => any.push(rule.syscall.number),
//!             Some(argument) => some.push((rule.syscall.number, argument)),
//!         }
//!     }
//!     for (number, argument) in some {
//!         let (index, value) = (argument.index, u64::from(argument.value));
//!         let equal = SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?;
//!         allowed.entry(number).or_default().push(SeccompRule::new(vec![equal])?);
//!     }
//!     // A call without a condition is allowed whatever its arguments.
//!     allowed.extend(any.into_iter().map(|number| (number, Vec::new())));
//!     let (other, listed) = (SeccompAction::KillProcess, SeccompAction::Allow);
//!     SeccompFilter::new(allowed, other, listed, std::env::consts::ARCH.try_into()?)?.try_into()
//! }
//! # assert!(!filter().unwrap().is_empty());
//! ```
//!
//! A thread inherits the filter of the one that starts it. So a caller that confines itself *before* it calls the engine
//! needs the rules of both threads, which is what [`rules`] gives; one that does so afterwards needs those of
//! [`Thread::Caller`] alone.
//!
//! The rules are those of a program on glibc. Launching TDs is not among the modes.
//!
//! # The table
//!
#![doc = include_str!("table.md")]

mod table;
mod text;

use std::ffi::c_long;

pub use text::{list, markdown};

/// A way to use premap. What each adds to those that it builds on is its own; [`rules`] puts them together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mode {
    /// Starting threads, which all modes do.
    Threads,
    /// Looking at what lies behind a plan's memory: before it is touched, when calls fail, and when a gate was closed.
    Look,
    /// [`Engine::run`](crate::Engine::run) on a plan.
    Foreground,
    /// Where no thread can be had, as under a limit of threads: the caller does the work.
    Alone,
    /// [`Engine::vm`](crate::Engine::vm): asks the VM what it can do, and counts its pages.
    Vm,
    /// [`Budget::within_host_memory`](crate::Budget::within_host_memory).
    HostMemory,
    /// [`Engine::gate`](crate::Engine::gate), on the thread that closes it too.
    Gate,
    /// [`Engine::pace`](crate::Engine::pace).
    Pace,
    /// [`Engine::background`](crate::Engine::background).
    Background,
    /// [`working_set::Recorder`](crate::working_set::Recorder).
    Recorder,
    /// `premap exec`, once, when the VMM opens KVM: the caller is the VMM's thread that does.
    ExecStart,
    /// `premap exec`: the caller is any thread of the VMM, and the workers are all threads of the library preloaded.
    Exec,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Threads,
        Self::Look,
        Self::Foreground,
        Self::Alone,
        Self::Vm,
        Self::HostMemory,
        Self::Gate,
        Self::Pace,
        Self::Background,
        Self::Recorder,
        Self::ExecStart,
        Self::Exec,
    ];

    /// What the mode adds.
    #[must_use]
    pub const fn adds(self) -> &'static [Rule] {
        table::adds(self)
    }

    /// The mode that it builds on.
    #[must_use]
    pub const fn base(self) -> Option<Self> {
        match self {
            Self::Threads | Self::Exec => None,
            Self::Look | Self::Recorder | Self::ExecStart => Some(Self::Threads),
            Self::Foreground => Some(Self::Look),
            Self::Alone | Self::Vm | Self::HostMemory | Self::Gate | Self::Pace | Self::Background => {
                Some(Self::Foreground)
            }
        }
    }
}

/// A system call that must be allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// The thread that makes it.
    pub thread: Thread,
    /// Which.
    pub syscall: Syscall,
    /// What one of its arguments is; with `None` they vary.
    pub argument: Option<Argument>,
    /// How much it is needed.
    pub need: Need,
}

/// Who makes a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Thread {
    /// The thread that calls premap.
    Caller,
    /// A thread that premap starts.
    Worker,
}

/// A system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Syscall {
    /// Its number on the architecture that this was compiled for.
    pub number: c_long,
    /// Its name.
    pub name: &'static str,
}

/// What an argument of a system call is: the request of an `ioctl`, the advice of a `madvise`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Argument {
    /// Which argument, from 0 on.
    pub index: u8,
    /// Its value, 32 bits wide.
    pub value: u32,
    /// What the value is called.
    pub name: &'static str,
}

/// How much a call is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Need {
    /// It is made.
    Always,
    /// It is made. Where the filter answers with an errno such as EPERM, the work goes on without.
    OrErrno,
    /// It is made on some machines, or with some versions of the C library: when and where.
    Sometimes(&'static str),
}

impl Rule {
    /// Whether this is about the same calls of the same thread as another.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        (self.thread, self.syscall, self.argument) == (other.thread, other.syscall, other.argument)
    }
}

/// What these modes take together, with what they build on.
#[must_use]
pub fn rules(modes: &[Mode]) -> Vec<Rule> {
    let mut all: Vec<Rule> = Vec::new();
    for mode in modes {
        let chain = std::iter::successors(Some(*mode), |mode| mode.base());
        let mut taken: Vec<Rule> = chain.flat_map(|mode| mode.adds()).copied().collect();
        if *mode == Mode::Exec {
            // The engine is called on a thread of the library's own.
            let engine = rules(&[Mode::Vm, Mode::HostMemory]);
            taken.extend(engine.into_iter().map(|rule| Rule { thread: Thread::Worker, ..rule }));
        }
        for rule in taken {
            match all.iter_mut().find(|known| known.is_like(&rule)) {
                Some(known) if rule.need == Need::Always => *known = rule,
                Some(_) => {}
                None => all.push(rule),
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_together_have_each_rule_once_and_what_they_build_on() {
        let all = rules(&Mode::ALL);
        for (index, rule) in all.iter().enumerate() {
            assert!(all[..index].iter().all(|earlier| !earlier.is_like(rule)), "{rule:?} is there twice");
        }
        let has = |modes: &[Mode], name| rules(modes).iter().any(|rule| rule.syscall.name == name);
        assert!(has(&[Mode::Vm], "futex") && has(&[Mode::Vm], "sigaltstack"));
        assert!(rules(&[]).is_empty());
    }

    #[test]
    fn what_one_mode_always_needs_is_needed_by_modes_together() {
        let need = |modes: &[Mode]| {
            let sregs = |rule: &Rule| rule.argument.is_some_and(|argument| argument.name == "KVM_GET_SREGS");
            rules(modes).into_iter().find(|rule| sregs(rule) && rule.thread == Thread::Worker).unwrap().need
        };
        assert_eq!(need(&[Mode::Foreground]), Need::OrErrno);
        assert_eq!(need(&[Mode::Foreground, Mode::Gate]), Need::Always);
    }
}
