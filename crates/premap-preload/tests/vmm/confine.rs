//! Seccomp filters as VMMs lay them.

use std::io;

// Opcodes of classic BPF: load a word, jump if equal, return.
const LOAD: u16 = 0x20;
const EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

/// Where `struct seccomp_data` has the call's number, and the low words of its arguments.
const NUMBER: u32 = 0;
const fn argument(index: u32) -> u32 {
    16 + 8 * index
}

/// Which threads a filter is laid on.
#[derive(Clone, Copy)]
pub(crate) enum On {
    Caller,
    EveryThread,
}

/// A filter that allows everything.
pub(crate) fn loosely(on: On) {
    lay(&mut [answer(libc::SECCOMP_RET_ALLOW)], on);
}

/// A filter that kills the process for opening a file.
pub(crate) fn without_files(on: On) {
    lay(
        &mut [
            load(NUMBER),
            equal(libc::SYS_openat, 0, 1),
            answer(libc::SECCOMP_RET_KILL_PROCESS),
            answer(libc::SECCOMP_RET_ALLOW),
        ],
        on,
    );
}

/// A filter that kills the process for whatever a vCPU's thread does not need: all that is left is to run the guest, to
/// wait, to manage memory and to end.
pub(crate) fn strictly(on: On) {
    const PRE_FAULT_MEMORY: u32 = 0xc040_aed5;
    const GET_STATS_FD: u32 = 0xaece;
    let mut filter = vec![load(NUMBER)];
    let allowed = [
        libc::SYS_futex,
        libc::SYS_mmap,
        libc::SYS_munmap,
        libc::SYS_brk,
        libc::SYS_rt_sigprocmask,
        libc::SYS_sigaltstack,
        libc::SYS_exit,
    ];
    for number in allowed {
        filter.extend([equal(number, 0, 1), answer(libc::SECCOMP_RET_ALLOW)]);
    }
    filter.extend([
        equal(libc::SYS_ioctl, 0, 5),
        load(argument(1)),
        equal(i64::from(PRE_FAULT_MEMORY), 2, 0),
        equal(i64::from(GET_STATS_FD), 1, 0),
        answer(libc::SECCOMP_RET_ALLOW),
        answer(libc::SECCOMP_RET_KILL_PROCESS),
        // The C library gives a thread's stack back.
        equal(libc::SYS_madvise, 0, 3),
        load(argument(2)),
        equal(i64::from(libc::MADV_DONTNEED), 0, 1),
        answer(libc::SECCOMP_RET_ALLOW),
        answer(libc::SECCOMP_RET_KILL_PROCESS),
    ]);
    lay(&mut filter, on);
}

fn load(offset: u32) -> libc::sock_filter {
    libc::sock_filter { code: LOAD, jt: 0, jf: 0, k: offset }
}

fn equal(value: i64, then: u8, otherwise: u8) -> libc::sock_filter {
    libc::sock_filter { code: EQUAL, jt: then, jf: otherwise, k: u32::try_from(value).unwrap() }
}

fn answer(action: u32) -> libc::sock_filter {
    libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: action }
}

fn lay(filter: &mut [libc::sock_filter], on: On) {
    let program = libc::sock_fprog { len: u16::try_from(filter.len()).unwrap(), filter: filter.as_mut_ptr() };
    let flags = match on {
        On::Caller => 0,
        On::EveryThread => libc::SECCOMP_FILTER_FLAG_TSYNC,
    };
    // SAFETY: the calls read one program of that many instructions, which lives until after them.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}
