//! The table: what each mode adds.

use premap_address_space::{PAGEMAP_SCAN, PROCMAP_QUERY};
use premap_kvm::abi;

use super::Need::{OrErrno, Sometimes};
use super::{Argument, Mode, Need, Rule, Syscall, Thread};

/// A rule a line: the thread, the call, the argument it is about if any, and the need if it is not always there.
macro_rules! rules {
    ($($thread:ident $syscall:ident $(($argument:expr))? $(: $need:expr)?;)*) => {
        &[$(Rule {
            thread: Thread::$thread,
            syscall: Syscall { number: libc::$syscall, name: stringify!($syscall).split_at("SYS_".len()).1 },
            argument: rules!(@ None $(, Some($argument))?),
            need: rules!(@ Need::Always $(, $need)?),
        }),*]
    };
    (@ $default:expr) => { $default };
    (@ $default:expr, $given:expr) => { $given };
}

const PRE_FAULT_MEMORY: Argument = request(abi::KVM_PRE_FAULT_MEMORY, "KVM_PRE_FAULT_MEMORY");
const GET_SREGS: Argument = request(abi::KVM_GET_SREGS, "KVM_GET_SREGS");
const SET_SREGS: Argument = request(abi::KVM_SET_SREGS, "KVM_SET_SREGS");
const CHECK_EXTENSION: Argument = request(abi::KVM_CHECK_EXTENSION, "KVM_CHECK_EXTENSION");
const GET_STATS_FD: Argument = request(abi::KVM_GET_STATS_FD, "KVM_GET_STATS_FD");
const GET_REGS: Argument = request(abi::KVM_GET_REGS, "KVM_GET_REGS");
const SCAN: Argument = request(PAGEMAP_SCAN, "PAGEMAP_SCAN");
const QUERY: Argument = request(PROCMAP_QUERY, "PROCMAP_QUERY");
const POPULATE_READ: Argument = advice(libc::MADV_POPULATE_READ, "MADV_POPULATE_READ");
const POPULATE_WRITE: Argument = advice(libc::MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE");
const DONTNEED: Argument = advice(libc::MADV_DONTNEED, "MADV_DONTNEED");
const WIPEONFORK: Argument = advice(libc::MADV_WIPEONFORK, "MADV_WIPEONFORK");
/// Newer than the C library's headers.
const GUARD_INSTALL: Argument = advice(102, "MADV_GUARD_INSTALL");

const CLONE3: Need = Sometimes("glibc 2.34 and later");
const CLONE: Need = Sometimes("glibc before 2.34, and where clone3 is answered with ENOSYS");
const GUARD: Need = Sometimes("glibc 2.42 and later, for a stack's guard");
const RSEQ: Need = Sometimes("glibc 2.35 and later");
const HEAP: Need = Sometimes("glibc's malloc, where a heap grows or shrinks");
const CLOCK: Need = Sometimes("where the clock can't be read without a call");
const RESTART: Need = Sometimes("after the process was stopped and continued");
const GETPID: Need = Sometimes("glibc, to send a signal");
const FILE: Need = Sometimes("where a file is mapped");
const BACKGROUND_OR_SHORT: Need = Sometimes("in the background, and where room gets short");
const REPORT: Need = Sometimes("for `--report FILE`, and to see whether there is a filter");
const CHECKED_CLOSE: Need = Sometimes("Rust's debug builds, before a close");

const THREADS: &[Rule] = rules! {
    Caller SYS_clone3: CLONE3;
    Caller SYS_clone: CLONE;
    Caller SYS_rt_sigprocmask;
    Caller SYS_futex;
    Caller SYS_mmap: Sometimes("where no stack of an earlier thread is left");
    Caller SYS_mprotect: Sometimes("where no stack of an earlier thread is left");
    Caller SYS_madvise (GUARD_INSTALL): GUARD;
    Caller SYS_munmap: HEAP;
    Caller SYS_brk: HEAP;
    Caller SYS_mremap: HEAP;
    Caller SYS_clock_gettime: CLOCK;
    Caller SYS_restart_syscall: RESTART;
    Worker SYS_rseq: RSEQ;
    Worker SYS_set_robust_list;
    Worker SYS_rt_sigprocmask;
    Worker SYS_sigaltstack;
    Worker SYS_sched_getaffinity;
    Worker SYS_gettid;
    Worker SYS_mmap;
    Worker SYS_mprotect;
    Worker SYS_munmap;
    Worker SYS_prctl;
    Worker SYS_madvise (DONTNEED);
    Worker SYS_exit;
    Worker SYS_brk: HEAP;
    Worker SYS_mremap: HEAP;
    Worker SYS_clock_gettime: CLOCK;
    Worker SYS_restart_syscall: RESTART;
};

/// Of the files of `/proc`, and of those that are mapped.
const LOOK: &[Rule] = rules! {
    Caller SYS_openat: OrErrno;
    Caller SYS_read: OrErrno;
    Caller SYS_close: OrErrno;
    Caller SYS_statx: FILE;
    Caller SYS_lseek: FILE;
    Caller SYS_mincore: FILE;
    Caller SYS_fstatfs: FILE;
    Caller SYS_fcntl: CHECKED_CLOSE;
    Worker SYS_openat: OrErrno;
    Worker SYS_read: OrErrno;
    Worker SYS_close: OrErrno;
    Worker SYS_statx: FILE;
    Worker SYS_lseek: FILE;
    Worker SYS_mincore: FILE;
    Worker SYS_fstatfs: FILE;
    Worker SYS_fcntl: CHECKED_CLOSE;
};

const FOREGROUND: &[Rule] = rules! {
    Caller SYS_rt_sigaction;
    Caller SYS_tgkill;
    Caller SYS_getpid: GETPID;
    Worker SYS_ioctl (PRE_FAULT_MEMORY);
    Worker SYS_madvise (POPULATE_READ);
    Worker SYS_madvise (POPULATE_WRITE);
    Worker SYS_futex;
    Worker SYS_clock_nanosleep;
    Worker SYS_rt_sigreturn;
    // Of a vCPU whose call stalled; without, that vCPU is given up.
    Worker SYS_ioctl (GET_SREGS): OrErrno;
    Worker SYS_ioctl (SET_SREGS): OrErrno;
};

/// What workers do otherwise, under a timer that interrupts it.
const ALONE: &[Rule] = rules! {
    Caller SYS_gettid;
    Caller SYS_timer_create;
    Caller SYS_timer_settime;
    Caller SYS_timer_delete;
    Caller SYS_rt_sigreturn;
    Caller SYS_ioctl (PRE_FAULT_MEMORY);
    Caller SYS_madvise (POPULATE_READ);
    Caller SYS_madvise (POPULATE_WRITE);
    Caller SYS_clock_nanosleep;
    Caller SYS_ioctl (GET_SREGS): OrErrno;
    Caller SYS_ioctl (SET_SREGS): OrErrno;
};

const VM: &[Rule] = rules! {
    // The probe's, which asks for nothing.
    Caller SYS_ioctl (PRE_FAULT_MEMORY);
    Caller SYS_ioctl (CHECK_EXTENSION);
    Caller SYS_ioctl (GET_STATS_FD): OrErrno;
    Caller SYS_read;
    Caller SYS_lseek: FILE;
    Caller SYS_statx: FILE;
    Caller SYS_close;
    Caller SYS_fcntl: CHECKED_CLOSE;
};

/// Where not all of a plan fits, what of it is present.
const HOST_MEMORY: &[Rule] = rules! {
    Caller SYS_ioctl (SCAN): OrErrno;
    Caller SYS_mincore: OrErrno;
    Worker SYS_ioctl (SCAN): BACKGROUND_OR_SHORT;
    Worker SYS_mincore: BACKGROUND_OR_SHORT;
};

const GATE: &[Rule] = rules! {
    Worker SYS_ioctl (GET_SREGS);
    Worker SYS_ioctl (SET_SREGS);
};

const PACE: &[Rule] = rules! {
    Worker SYS_clock_gettime;
};

/// A worker watches the others here, and starts them.
const BACKGROUND: &[Rule] = rules! {
    Caller SYS_ioctl (GET_SREGS): OrErrno;
    Caller SYS_ioctl (SET_SREGS): OrErrno;
    Worker SYS_clone3: CLONE3;
    Worker SYS_clone: CLONE;
    Worker SYS_madvise (GUARD_INSTALL): GUARD;
    Worker SYS_tgkill;
    Worker SYS_getpid: GETPID;
};

const RECORDER: &[Rule] = rules! {
    Caller SYS_openat;
    Caller SYS_close;
    Caller SYS_fcntl: CHECKED_CLOSE;
    Caller SYS_ioctl (QUERY);
    Caller SYS_ioctl (SCAN);
    Worker SYS_ioctl (QUERY);
    Worker SYS_ioctl (SCAN);
    Worker SYS_futex;
    Worker SYS_sched_yield: Sometimes("where both threads use their channel at once");
};

const EXEC_START: &[Rule] = rules! {
    Caller SYS_madvise (WIPEONFORK);
    Caller SYS_openat: REPORT;
    Caller SYS_read: REPORT;
    Caller SYS_close: REPORT;
    Caller SYS_fcntl: Sometimes("for `--report fd:N`");
};

const EXEC: &[Rule] = rules! {
    Caller SYS_futex;
    Caller SYS_mmap: HEAP;
    Caller SYS_mprotect: HEAP;
    Caller SYS_munmap: HEAP;
    Caller SYS_brk: HEAP;
    Worker SYS_openat;
    Worker SYS_pread64;
    Worker SYS_readlink;
    Worker SYS_ioctl (GET_REGS);
    Worker SYS_process_vm_readv;
    Worker SYS_write;
};

pub(super) const fn adds(mode: Mode) -> &'static [Rule] {
    match mode {
        Mode::Threads => THREADS,
        Mode::Look => LOOK,
        Mode::Foreground => FOREGROUND,
        Mode::Alone => ALONE,
        Mode::Vm => VM,
        Mode::HostMemory => HOST_MEMORY,
        Mode::Gate => GATE,
        Mode::Pace => PACE,
        Mode::Background => BACKGROUND,
        Mode::Recorder => RECORDER,
        Mode::ExecStart => EXEC_START,
        Mode::Exec => EXEC,
    }
}

const fn request(value: u32, name: &'static str) -> Argument {
    Argument { index: 1, value, name }
}

const fn advice(value: i32, name: &'static str) -> Argument {
    assert!(value >= 0);
    Argument { index: 2, value: value.cast_unsigned(), name }
}
