//! A small VMM, which knows nothing of the library that is preloaded into it.
// UNSAFETY: fork, seccomp filters and ioctls that must fail.
#![expect(unsafe_code, reason = "what a VMM does, and std does not offer")]

mod confine;
mod machine;

use std::ffi::OsStr;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;

use confine::On;
use kvm_ioctls::Kvm;
use machine::{Kick, Machine};

pub(crate) use machine::BYTES;

/// The environment variable that says what to do.
pub(crate) const VARIABLE: &str = "PREMAP_TEST_VMM";
/// What it prints when it has done all.
pub(crate) const DONE: &str = "the VMM is done";
/// Enough to be at it for a while.
pub(crate) const MUCH: u64 = 256 << 20;

/// Enough to be at it for long.
pub(crate) const VERY_MUCH: u64 = 1 << 30;

const CREATE_VM: libc::c_ulong = 0xae01;
const CREATE_VCPU: libc::c_ulong = 0xae41;
const SET_USER_MEMORY_REGION: libc::c_ulong = 0x4020_ae46;
const RUN: libc::c_ulong = 0xae80;

#[test]
#[ignore = "the VMM that the other tests run"]
fn vmm() {
    let kvm = Kvm::new().unwrap();
    match std::env::var(VARIABLE).unwrap().as_str() {
        "nothing" => {}
        "children" => assert!(std::process::Command::new("true").status().unwrap().success()),
        "plain" => run(&mut Machine::new(&kvm)),
        "close" => (0..3).for_each(|_| run(&mut Machine::new(&kvm))),
        "slots" => slots(&kvm),
        "slots-anew" => {
            let mut machine = Machine::new(&kvm);
            machine.add_slot(4 << 30, BYTES);
            machine.hand_over(&[(0, BYTES), (4 << 30, BYTES)]);
            run(&mut machine);
            machine.move_last_slot(5 << 30);
            (0..8).for_each(|_| run(&mut machine));
        }
        "churn" => {
            let mut machine = Machine::new(&kvm);
            machine.add_slot(1 << 30, MUCH);
            machine.run_beside_changes(100);
        }
        "pool" => {
            let mut machine = Machine::new(&kvm);
            machine.add_slot(4 << 30, BYTES);
            machine.add_slot(8 << 30, MUCH);
            machine.hand_over(&[(0, BYTES), (4 << 30, BYTES)]);
            run(&mut machine);
            println!("present: {}", machine::present());
        }
        "pool-untold" => {
            let mut machine = Machine::new(&kvm);
            machine.add_slot(1 << 30, BYTES);
            machine.add_slot(8 << 30, MUCH);
            run(&mut machine);
            println!("present: {}", machine::present());
        }
        "closed-by-range" => {
            let close = |fd: u32| {
                // SAFETY: the descriptor is the machine's, and nobody uses it any more.
                unsafe { libc::close_range(fd, fd, 0) }
            };
            closed(&kvm, |fd| close(fd.cast_unsigned()));
        }
        // SAFETY: the descriptors are the machine's, and nobody uses them any more.
        "closed-by-dup2" => closed(&kvm, |fd| unsafe { libc::dup2(0, fd) }),
        // SAFETY: as above.
        "closed-by-dup3" => closed(&kvm, |fd| unsafe { libc::dup3(0, fd, libc::O_CLOEXEC) }),
        "closed-in-vfork" => {
            let mut machine = Machine::new(&kvm);
            in_sharing_child(&|| {
                machine.descriptors().for_each(|fd| {
                    // SAFETY: the child closes descriptors of its own.
                    assert_eq!(unsafe { libc::close(fd) }, 0);
                });
            });
            run(&mut machine);
        }
        "vm-in-vfork" => {
            let mut machine = Machine::new(&kvm);
            in_sharing_child(&|| {
                // The child's VM gets the number that the parent's has.
                let fd = machine.descriptors().next().unwrap();
                // SAFETY: the child closes a descriptor of its own, and the request takes a number.
                let made = unsafe { (libc::close(fd), libc::ioctl(kvm.as_raw_fd(), CREATE_VM, 0)) };
                assert_eq!(made, (0, fd));
            });
            run(&mut machine);
        }
        "few-threads" => {
            become_unprivileged();
            // The kernel has one for the VM, from its first run on.
            limit_threads(4);
            let mut machine = Machine::new(&kvm);
            std::thread::scope(|scope| {
                let (stay, leave) = std::sync::mpsc::channel::<()>();
                let leave = std::sync::Arc::new(std::sync::Mutex::new(leave));
                for _ in 0..3 {
                    let leave = std::sync::Arc::clone(&leave);
                    let started =
                        std::thread::Builder::new().spawn_scoped(scope, move || leave.lock().unwrap().recv());
                    started.unwrap_or_else(|error| panic!("a VMM must have its threads: {error}"));
                }
                run(&mut machine);
                drop(stay);
            });
        }
        // The library's second thread is one too many; the kernel's is not.
        "no-threads" => {
            become_unprivileged();
            limit_threads(1);
            run(&mut Machine::new(&kvm));
        }
        // A child needs the place of one.
        "spawned" => {
            become_unprivileged();
            assert_eq!(kvm.get_api_version(), 12);
            limit_threads(0);
            assert!(std::process::Command::new("true").status().unwrap().success());
        }
        // The library's two are what there is.
        "kernel-thread" => {
            become_unprivileged();
            limit_threads(2);
            run(&mut Machine::new(&kvm));
        }
        "quiet" => {
            run(&mut Machine::new(&kvm));
            let begin = std::time::Instant::now();
            // One stays for the next VM, which may be made under a filter.
            while own_threads() > 1 {
                assert!(
                    begin.elapsed() < std::time::Duration::from_secs(60),
                    "threads of the library's stay"
                );
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
        // A root without /proc, before the library began.
        "chroot" => {
            let root = std::env::temp_dir();
            assert!(!root.join("proc").exists());
            std::os::unix::fs::chroot(root).unwrap();
            run(&mut Machine::new(&kvm));
        }
        "odd-path" => {
            let path = std::env::temp_dir().join(OsStr::from_bytes(b"premap-odd-\xff\xfe\n"));
            let file = std::fs::File::options()
                .write(true)
                .read(true)
                .create(true)
                .truncate(true)
                .open(&path)
                .unwrap();
            std::fs::remove_file(&path).unwrap();
            file.set_len(4096).unwrap();
            // SAFETY: a new mapping, which nobody uses.
            let at = unsafe {
                libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
            };
            assert_ne!(at, libc::MAP_FAILED);
            run(&mut Machine::new(&kvm));
        }
        // It has the engine in itself, and used it before.
        "linked" => {
            let other = Machine::new(&kvm);
            other.map_by_itself();
            run(&mut Machine::new(&kvm));
            other.map_by_itself();
        }
        "registered" => registered(&kvm),
        "called-back" => called_back(&kvm),
        "fork" => fork(&kvm),
        "errno" => errno(&kvm),
        // The filter is laid before the library was ever called: opening the device asks KVM nothing. And after.
        "confined-before" => {
            confine::loosely(On::EveryThread);
            run(&mut Machine::new(&kvm));
        }
        "confined-after" => {
            let mut machine = Machine::new(&kvm);
            confine::loosely(On::EveryThread);
            run(&mut machine);
        }
        // The filter is laid once the VMM has the device, before it makes a VM and after, and even later.
        "no-files" => {
            assert_eq!(kvm.get_api_version(), 12);
            confine::without_files(On::Caller);
            run(&mut Machine::new(&kvm));
        }
        "no-files-later" => {
            let mut machine = Machine::new(&kvm);
            confine::without_files(On::Caller);
            assert!(machine.vm.check_extension(kvm_ioctls::Cap::UserMemory));
            assert!(kvm.get_vcpu_mmap_size().unwrap() > 0);
            run(&mut machine);
        }
        "no-files-when-idle" => {
            assert_eq!(kvm.get_api_version(), 12);
            // The one that stays starts the other again.
            while own_threads() > 1 {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            confine::without_files(On::Caller);
            run(&mut Machine::new(&kvm));
        }
        "exit-wanted" => {
            let mut machine = Machine::new(&kvm);
            machine.add_slot(1 << 30, VERY_MUCH);
            // So many take their time to be looked at.
            machine.add_vcpus(280);
            let took = machine.run_with_exit_wanted();
            println!("took: {}", took.as_micros());
        }
        "called-until-seen" => {
            let mut machine = Machine::new(&kvm);
            machine.add_slot(1 << 30, VERY_MUCH);
            machine.run_until_called_back(VERY_MUCH / 16);
        }
        "strict" => {
            let mut machine = Machine::new(&kvm);
            // A vCPU's thread confines itself, as VMMs have it.
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    confine::strictly(On::Caller);
                    machine.run().unwrap();
                });
            });
        }
        other => panic!("{other}"),
    }
    println!("{DONE}");
}

fn run(machine: &mut Machine) {
    machine.clear();
    machine.run().unwrap();
}

/// Has a VM's descriptors closed in some way. That the VM has ended is told by then, and not at the exit.
fn closed(kvm: &Kvm, close: impl Fn(i32) -> i32) {
    let mut machine = Machine::new(kvm);
    run(&mut machine);
    let fds: Vec<_> = machine.descriptors().collect();
    machine.leak();
    fds.into_iter().for_each(|fd| assert!(close(fd) >= 0, "{}", io::Error::last_os_error()));
    println!("{DONE}");
    // SAFETY: ends the process without what is done at an exit.
    unsafe { libc::_exit(0) };
}

/// Does work in a child that shares the memory and has descriptors of its own, as `posix_spawn` makes it.
fn in_sharing_child(work: &dyn Fn()) {
    extern "C" fn begin(argument: *mut libc::c_void) -> libc::c_int {
        // SAFETY: the argument is to the parent's reference, and the parent waits until the child has ended.
        unsafe { (*argument.cast::<&dyn Fn()>())() };
        0
    }
    let mut stack = vec![0_u128; 1 << 16];
    let mut work = work;
    let mut status = -1;
    // SAFETY: the child has a stack of its own, which it leaves before its parent goes on.
    unsafe {
        let top = stack.as_mut_ptr_range().end.cast();
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        let child = libc::clone(begin, top, flags, (&raw mut work).cast());
        assert!(child > 0, "{}", io::Error::last_os_error());
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
    }
    assert_eq!(status, 0, "the child has done its work");
}

/// Becomes a user of whom no other process is, and who has no privileges.
fn become_unprivileged() {
    let user = 500_000 + std::process::id();
    // SAFETY: these change the process's own rights only. After the change its own files of /proc would be root's.
    unsafe {
        assert_eq!((libc::setgid(user), libc::setuid(user)), (0, 0), "{}", io::Error::last_os_error());
        assert_eq!(libc::prctl(libc::PR_SET_DUMPABLE, 1), 0);
    }
}

/// Allows so many threads beside those that are there.
fn limit_threads(more: u64) {
    let there = std::fs::read_dir("/proc/self/task").unwrap().count() as u64;
    let limit = libc::rlimit { rlim_cur: there + more, rlim_max: there + more };
    // SAFETY: the call reads one rlimit.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NPROC, &raw const limit) }, 0);
}

/// How many threads of the library's there are.
fn own_threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names.filter(|name| name.starts_with("premap")).count()
}

/// Gives memory to a userfaultfd handler that never answers, while a run is at it.
fn registered(kvm: &Kvm) {
    #[repr(C)]
    struct Api(u64, u64, u64);
    #[repr(C)]
    struct Register(u64, u64, u64, u64);
    const API: libc::c_ulong = 0xc018_aa3f;
    const REGISTER: libc::c_ulong = 0xc020_aa00;
    // SAFETY: makes a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let fd = i32::try_from(fd).unwrap();
    if fd < 0 {
        println!("skipped: userfaultfd: {}", io::Error::last_os_error());
        return;
    }
    let mut machine = Machine::new(kvm);
    let host = machine.add_slot(1 << 30, VERY_MUCH);
    // SAFETY: the call reads and writes one struct of this kind.
    assert_eq!(unsafe { libc::ioctl(fd, API, &mut Api(0xaa, 0, 0)) }, 0);
    let before = machine::present();
    std::thread::scope(|scope| {
        let machine = &mut machine;
        let ran = scope.spawn(move || run(machine));
        while machine::present() < before + VERY_MUCH / 16 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        // The half that a run gets to last; missing pages (1) are the handler's.
        let half = VERY_MUCH / 2;
        // SAFETY: the call reads and writes one struct of this kind.
        let done = unsafe { libc::ioctl(fd, REGISTER, &mut Register(host + half, half, 1, 0)) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
        ran.join().unwrap();
    });
    // More entries: the run that was stopped is made up for, without the handler's memory.
    (0..8).for_each(|_| run(&mut machine));
}

fn called_back(kvm: &Kvm) {
    let mut machine = Machine::new(kvm);
    machine.add_slot(1 << 30, VERY_MUCH);
    for kick in [Kick::ByEintr, Kick::ByFlag] {
        machine.clear();
        let (result, present) = machine.run_and_call_back(kick, VERY_MUCH / 16);
        assert_eq!(result.map_err(|error| error.errno()), Err(libc::EINTR));
        assert!(present < VERY_MUCH / 2, "the call waited for the run's end: {present}");
    }
    run(&mut machine);
}

fn slots(kvm: &Kvm) {
    let mut machine = Machine::new(kvm);
    run(&mut machine);
    machine.add_slot(8 << 30, BYTES);
    (0..8).for_each(|_| run(&mut machine));
}

fn fork(kvm: &Kvm) {
    let mut own = Machine::new(kvm);
    run(&mut own);
    // SAFETY: the child does what one thread can do alone: the harness's other threads hold no lock that it takes, and
    // the C library makes its allocator whole in the child.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "{}", io::Error::last_os_error());
    if child == 0 {
        // The parent's VM is of no use here, and must do no harm.
        let refused = own.run().is_err_and(|error| error.errno() == libc::EIO);
        run(&mut Machine::new(kvm));
        // SAFETY: ends the child alone; there is nothing to be done at its exit.
        unsafe { libc::_exit(if refused { 7 } else { 8 }) };
    }
    let mut status = 0;
    // SAFETY: `status` has room for the answer.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(libc::WEXITSTATUS(status), 7, "{status:#x}");
    run(&mut own);
}

fn errno(kvm: &Kvm) {
    let fails = |fd: libc::c_int, request: libc::c_ulong, argument: libc::c_ulong, errno: libc::c_int| {
        // SAFETY: the requests take numbers or an address that is not mapped, and KVM refuses each of them.
        let value = unsafe { libc::ioctl(fd, request, argument) };
        assert_eq!((value, io::Error::last_os_error().raw_os_error()), (-1, Some(errno)), "{request:#x}");
    };
    let vm = kvm.create_vm().unwrap();
    for _ in 0..2 {
        fails(-1, RUN, 0, libc::EBADF);
        fails(-1, CREATE_VM, 0, libc::EBADF);
        fails(kvm.as_raw_fd(), CREATE_VM, libc::c_ulong::MAX, libc::EINVAL);
        fails(vm.as_raw_fd(), CREATE_VCPU, 1 << 30, libc::EINVAL);
        fails(vm.as_raw_fd(), SET_USER_MEMORY_REGION, 8, libc::EFAULT);
    }
}
