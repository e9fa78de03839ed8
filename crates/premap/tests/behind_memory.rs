//! What lies behind a plan's memory decides what may be done with it: nothing here may wait for ever, allocate what the VMM
//! did not ask for, or fail page by page.
// UNSAFETY: maps memory of its own, and registers it with userfaultfd.
#![expect(unsafe_code, reason = "mmap, madvise and ioctls on the test's own memory")]
#![expect(clippy::unwrap_used, reason = "in a test the panic is the message")]

use std::ffi::{CString, c_void};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use premap::{
    Backing, Engine, Fate, Gate, Gpa, GpaRange, Hva, Pace, Plan, Reason, Region, Report, Stage, Stages, Touch,
};
use premap_kvm::linux::Vcpu;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Far more than any run here takes; what is not back by then never will be.
const LIMIT: Duration = Duration::from_secs(60);

/// Memory of the test's own.
struct Mapped {
    base: *mut c_void,
    len: usize,
}

impl Mapped {
    fn new(bytes: u64, file: Option<(&File, MapFlags)>, protection: ProtFlags) -> Self {
        let len = usize::try_from(bytes).unwrap();
        let (null, norm) = (std::ptr::null_mut(), MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let base = unsafe {
            match file {
                Some((file, flags)) => mmap(null, len, protection, flags | norm, file, 0),
                None => mmap_anonymous(null, len, protection, MapFlags::PRIVATE | norm),
            }
        };
        Self { base: base.unwrap(), len }
    }

    fn anonymous(bytes: u64) -> Self {
        Self::new(bytes, None, ProtFlags::READ | ProtFlags::WRITE)
    }

    fn of(file: &File, bytes: u64, flags: MapFlags) -> Self {
        Self::new(bytes, Some((file, flags)), ProtFlags::READ | ProtFlags::WRITE)
    }

    /// A region of it, at the same distance from guest address 0.
    fn region(&self, from: u64, bytes: u64, backing: Backing) -> Region {
        let host = Hva::new(self.base.expose_provenance() as u64).wrapping_add(from);
        Region { range: GpaRange::new(Gpa::new(from), bytes), host, backing, touch: Touch::Write }
    }

    fn whole(&self, backing: Backing) -> Plan {
        Plan::new([self.region(0, self.len as u64, backing)]).unwrap()
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        unsafe { munmap(self.base, self.len) }.unwrap();
    }
}

/// Does what may never come back, and ends the test where it does not: a thread that waits for a handler can't be ended.
fn comes_back<T>(run: impl FnOnce() -> T) -> T {
    let (back, wait) = channel::<()>();
    std::thread::spawn(move || {
        if wait.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
            eprintln!("the run has not come back in {LIMIT:?}");
            std::process::exit(101);
        }
    });
    let value = run();
    drop(back);
    value
}

/// Runs the host stage, and checks that every byte is accounted for.
fn host_stage(engine: &mut Engine<'_>, plan: &Plan) -> Report {
    let none: &mut [Vcpu<OwnedFd>] = &mut [];
    let report = comes_back(|| engine.run(plan, none).unwrap());
    for stage in [&report.host, &report.second] {
        assert_eq!(stage.bytes(), plan.bytes(), "{report:?}");
    }
    report
}

fn host_only<'a>() -> Engine<'a> {
    Engine::new().stages(Stages::Host)
}

/// Bytes that the host stage lost for a reason.
fn lost(report: &Report, reason: Reason) -> u64 {
    let of = report.unmapped.iter().filter(|lost| lost.stage == Stage::Host && lost.reason == reason);
    of.map(|lost| lost.range.bytes()).sum()
}

/// `struct uffdio_api` and `struct uffdio_register`, which begin alike.
#[repr(C)]
struct Uffdio {
    first: u64,
    second: u64,
    third: u64,
    fourth: u64,
}

/// A userfaultfd with nobody who reads it; `None` where this process may have none.
fn userfaultfd() -> Option<OwnedFd> {
    // SAFETY: what the handler does not give, a reader waits for; the engine must not, which is what is tested.
    let made = unsafe { rustix::mm::userfaultfd(rustix::mm::UserfaultfdFlags::CLOEXEC) };
    let fd = made.map_err(|errno| eprintln!("skipped: no userfaultfd here: {errno}")).ok()?;
    let mut api = Uffdio { first: 0xaa, second: 0, third: 0, fourth: 0 };
    // SAFETY: UFFDIO_API reads and writes three words.
    assert_eq!(unsafe { libc::ioctl(fd.as_raw_fd(), 0xc018_aa3f, &raw mut api) }, 0);
    Some(fd)
}

/// Registers missing pages of a region with it.
fn register(fd: &OwnedFd, region: &Region) {
    const MISSING: u64 = 1;
    let mut range =
        Uffdio { first: region.host.raw(), second: region.range.bytes(), third: MISSING, fourth: 0 };
    // SAFETY: UFFDIO_REGISTER reads and writes four words; the memory is the test's own.
    assert_eq!(unsafe { libc::ioctl(fd.as_raw_fd(), 0xc020_aa00, &raw mut range) }, 0);
}

/// A file in the folder for temporary files, gone when dropped.
struct Temporary {
    path: PathBuf,
    file: File,
}

impl Temporary {
    fn new(name: &str, bytes: u64) -> Self {
        let path = std::env::temp_dir().join(format!("premap-behind-{}-{name}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(bytes).unwrap();
        Self { path, file }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[test]
fn memory_with_a_userfaultfd_handler_is_left_to_it_and_the_run_comes_back() {
    let Some(fd) = userfaultfd() else { return };
    let memory = Mapped::anonymous(12 * MIB);
    register(&fd, &memory.region(4 * MIB, 4 * MIB, Backing::Anonymous));
    let report = host_stage(&mut host_only(), &memory.whole(Backing::Anonymous));
    assert_eq!((report.host.mapped, lost(&report, Reason::Userfault)), (8 * MIB, 4 * MIB), "{report:?}");
    assert_eq!(Reason::Userfault.fate(), Fate::Skipped);
}

#[test]
fn memory_that_is_registered_behind_a_closed_gate_while_a_run_goes_on_is_left_too() {
    let Some(fd) = userfaultfd() else { return };
    let memory = Mapped::anonymous(64 * MIB);
    let gate = Gate::new();
    let slowly = Pace::BytesPerSecond((16 * MIB).try_into().unwrap());
    let engine = host_only().gate(&gate).pace(slowly);
    let run = engine.background::<Vcpu<OwnedFd>>(memory.whole(Backing::Anonymous), Vec::new()).unwrap();
    while run.progress().host == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let guard = gate.close();
    // Whatever of it is present by now stays so.
    register(&fd, &memory.region(32 * MIB, 32 * MIB, Backing::Anonymous));
    drop(guard);
    let report = comes_back(|| run.join().unwrap());
    assert!(lost(&report, Reason::Userfault) > 0, "{report:?}");
    assert_eq!(report.host.mapped + lost(&report, Reason::Userfault), 64 * MIB, "{report:?}");
}

#[test]
fn memory_that_is_registered_behind_a_gate_that_was_closed_when_the_run_began_is_left_too() {
    let Some(fd) = userfaultfd() else { return };
    let memory = Mapped::anonymous(16 * MIB);
    let gate = Gate::new();
    let guard = gate.close();
    let engine = host_only().gate(&gate);
    let run = engine.background::<Vcpu<OwnedFd>>(memory.whole(Backing::Anonymous), Vec::new()).unwrap();
    // The run has looked at its memory by then, and waits at the gate.
    std::thread::sleep(Duration::from_millis(200));
    register(&fd, &memory.region(0, 16 * MIB, Backing::Anonymous));
    drop(guard);
    let report = comes_back(|| run.join().unwrap());
    assert_eq!(lost(&report, Reason::Userfault), 16 * MIB, "{report:?}");
}

#[test]
fn holes_of_a_private_file_in_memory_are_not_allocated_by_a_read() {
    let Some(mount) = Tmpfs::new("private", 32 * MIB) else { return };
    let path = mount.0.join("ram");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(GIB).unwrap();
    file.write_all_at(&vec![1; usize::try_from(2 * MIB).unwrap()], 512 * MIB).unwrap();
    let memory = Mapped::of(&file, GIB, MapFlags::PRIVATE);
    let region = Region { touch: Touch::Read, ..memory.region(0, GIB, Backing::PrivateFile) };
    let plan = Plan::new([region]).unwrap();
    let report = host_stage(&mut host_only(), &plan);
    assert_eq!((report.host.mapped, lost(&report, Reason::FileHole)), (2 * MIB, GIB - 2 * MIB), "{report:?}");
    std::fs::remove_file(&path).unwrap();
    let report = host_stage(&mut host_only(), &plan);
    assert_eq!((report.host.mapped, lost(&report, Reason::FileHole)), (2 * MIB, GIB - 2 * MIB), "{report:?}");
    assert_eq!(file.metadata().unwrap().blocks() * 512, 2 * MIB);
}

#[test]
fn holes_of_a_file_on_disk_are_not_allocated_and_its_data_is_read() {
    let disk = Temporary::new("sparse", 256 * MIB);
    for at in [0, 64 * MIB] {
        disk.file.write_all_at(&vec![7; 2 << 20], at).unwrap();
    }
    disk.file.sync_all().unwrap();
    let before = disk.file.metadata().unwrap().blocks();
    if before * 512 > 200 * MIB {
        eprintln!("skipped: the file system of {} has no holes", disk.path.display());
        return;
    }
    let memory = Mapped::of(&disk.file, 256 * MIB, MapFlags::SHARED);
    let report = host_stage(&mut host_only(), &memory.whole(Backing::Shared));
    disk.file.sync_all().unwrap();
    assert_eq!(disk.file.metadata().unwrap().blocks(), before, "holes were allocated: {report:?}");
    if std::fs::metadata("/proc/self/smaps").is_ok() && !is_in_memory(&disk.file) {
        assert_eq!((report.host.mapped, lost(&report, Reason::FileHole)), (4 * MIB, 252 * MIB), "{report:?}");
    }
}

fn is_in_memory(file: &File) -> bool {
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    let kind = rustix::fs::fstatfs(file).unwrap().f_type.cast_unsigned();
    [TMPFS, RAMFS].contains(&kind)
}

#[test]
fn a_memfd_is_memory_and_populated_by_writing() {
    let fd = rustix::fs::memfd_create("behind", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(8 * MIB).unwrap();
    let memory = Mapped::of(&file, 8 * MIB, MapFlags::SHARED);
    let report = host_stage(&mut host_only(), &memory.whole(Backing::Shared));
    assert_eq!(report.host.mapped, 8 * MIB, "{report:?}");
    assert_eq!(file.metadata().unwrap().blocks() * 512, 8 * MIB);
}

#[test]
fn a_sealed_memfd_is_without_access_to_who_would_write_and_is_read() {
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("behind", flags).unwrap());
    file.set_len(8 * MIB).unwrap();
    rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::FUTURE_WRITE).unwrap();
    let memory = Mapped::new(8 * MIB, Some((&file, MapFlags::SHARED)), ProtFlags::READ);
    let report = host_stage(&mut host_only(), &memory.whole(Backing::Shared));
    assert_eq!((lost(&report, Reason::NoAccess), report.host.calls), (8 * MIB, 0), "{report:?}");
    let read = Region { touch: Touch::Read, ..memory.region(0, 8 * MIB, Backing::Shared) };
    let report = host_stage(&mut host_only(), &Plan::new([read]).unwrap());
    assert_eq!(report.host.mapped, 8 * MIB, "{report:?}");
}

#[test]
fn a_pool_without_access_costs_no_call() {
    let memory = Mapped::anonymous(8 * MIB);
    let pool = Mapped::new(64 * GIB, None, ProtFlags::empty());
    let shifted = |region: Region| {
        let start = Gpa::new(region.range.start().raw() + GIB);
        Region { range: GpaRange::new(start, region.range.bytes()), ..region }
    };
    let regions = [
        memory.region(0, 8 * MIB, Backing::Anonymous),
        shifted(pool.region(0, 64 * GIB, Backing::Anonymous)),
    ];
    let report = host_stage(&mut host_only(), &Plan::new(regions).unwrap());
    assert_eq!((report.host.mapped, lost(&report, Reason::NoAccess)), (8 * MIB, 64 * GIB), "{report:?}");
    assert!(report.host.calls <= 2, "{report:?}");
}

#[test]
fn huge_pages_that_are_not_there_fail_once_and_are_named() {
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::HUGETLB;
    let Ok(fd) = rustix::fs::memfd_create("behind", flags) else {
        return eprintln!("skipped: this kernel has no hugetlb");
    };
    let file = File::from(fd);
    // Far more than any pool has.
    file.set_len(1 << 44).unwrap();
    let memory = Mapped::of(&file, 1 << 44, MapFlags::SHARED);
    let bytes = 1 << 43;
    let huge = Backing::Hugetlb(premap::PageSize::Size2M);
    let region = memory.region(1 << 43, bytes, huge);
    let plan = Plan::new([region]).unwrap();
    // Whatever the pool has is taken first.
    let report = host_stage(
        &mut host_only().budget(premap::Budget { bytes: Some(64 * GIB), ..Default::default() }),
        &plan,
    );
    let failed = lost(&report, Reason::NoHugePage);
    assert!(failed >= 32 * GIB && report.host.calls < 20_000, "{report:?}");
}

#[test]
fn pages_beyond_the_end_of_a_file_are_lost_at_once_and_the_file_is_named() {
    let short = Temporary::new("short", 4 * MIB);
    let memory = Mapped::of(&short.file, 2 * GIB, MapFlags::PRIVATE);
    let report = host_stage(&mut host_only(), &memory.whole(Backing::PrivateFile));
    assert_eq!(
        (report.host.mapped, lost(&report, Reason::BeyondFile)),
        (4 * MIB, 2 * GIB - 4 * MIB),
        "{report:?}"
    );
    assert!(report.host.calls < 100, "{report:?}");
    let said = report.explain(&report.unmapped[0]);
    assert!(said.contains("beyond the end") && said.contains("short"), "{said}");
}

#[test]
fn within_the_host_s_memory_a_file_system_without_room_for_all_is_not_filled() {
    let Some(mount) = Tmpfs::new("kept", 32 * MIB) else { return };
    let path = mount.0.join("ram");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(GIB).unwrap();
    let memory = Mapped::of(&file, GIB, MapFlags::SHARED);
    // What the file has already, far from the front, takes nothing more.
    file.write_all_at(&vec![1; usize::try_from(2 * MIB).unwrap()], 512 * MIB).unwrap();
    let whole = premap::Budget { host_memory: premap::HostMemory::Whole, ..Default::default() };
    let report = host_stage(&mut host_only().budget(whole), &memory.whole(Backing::Shared));
    assert_eq!(report.host.mapped, 2 * MIB, "{report:?}");
    assert_eq!(lost(&report, Reason::NoSpace), GIB - 2 * MIB, "{report:?}");
    let said = report.explain(&report.unmapped[0]);
    assert_eq!(said, format!("no space left in {}'s file system", path.display()));
    // A file that fits is filled.
    file.set_len(16 * MIB).unwrap();
    let small = Mapped::of(&file, 16 * MIB, MapFlags::SHARED);
    let report = host_stage(&mut host_only().budget(whole), &small.whole(Backing::Shared));
    assert_eq!(report.host.mapped, 16 * MIB, "{report:?}");
}

#[test]
fn what_a_full_file_system_has_already_is_mapped() {
    let Some(mount) = Tmpfs::new("tail", 32 * MIB) else { return };
    let path = mount.0.join("ram");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(GIB).unwrap();
    file.write_all_at(&vec![1; usize::try_from(16 * MIB).unwrap()], 512 * MIB).unwrap();
    let memory = Mapped::of(&file, GIB, MapFlags::SHARED);
    let report = host_stage(&mut host_only(), &memory.whole(Backing::Shared));
    assert!(report.host.mapped >= 28 * MIB, "{report:?}");
    assert_eq!(report.host.mapped + lost(&report, Reason::NoSpace), GIB, "{report:?}");
}

#[test]
fn a_file_that_was_deleted_fills_its_file_system_no_more_than_one_with_a_name() {
    let Some(mount) = Tmpfs::new("deleted", 32 * MIB) else { return };
    let path = mount.0.join("ram");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(GIB).unwrap();
    let memory = Mapped::of(&file, GIB, MapFlags::SHARED);
    std::fs::remove_file(&path).unwrap();
    let whole = premap::Budget { host_memory: premap::HostMemory::Whole, ..Default::default() };
    let report = host_stage(&mut host_only().budget(whole), &memory.whole(Backing::Shared));
    assert_eq!((report.host.mapped, lost(&report, Reason::NoSpace)), (0, GIB), "{report:?}");
    let report = host_stage(&mut host_only(), &memory.whole(Backing::Shared));
    assert_eq!(report.host.mapped + lost(&report, Reason::NoSpace), GIB, "{report:?}");
    assert!(report.host.mapped >= 24 * MIB && report.host.calls < 1_000, "{report:?}");
}

#[test]
fn a_full_file_system_is_found_in_few_calls_and_named() {
    let Some(mount) = Tmpfs::new("full", 32 * MIB) else { return };
    let path = mount.0.join("ram");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(4 * GIB).unwrap();
    let memory = Mapped::of(&file, 4 * GIB, MapFlags::SHARED);
    let report = host_stage(&mut host_only(), &memory.whole(Backing::Shared));
    drop(memory);
    assert!(report.host.mapped >= 24 * MIB && report.host.mapped <= 32 * MIB, "{report:?}");
    assert_eq!(report.host.mapped + lost(&report, Reason::NoSpace), 4 * GIB, "{report:?}");
    assert!(report.host.calls < 1_000, "{report:?}");
    let said = report.explain(&report.unmapped[0]);
    assert_eq!(said, format!("no space left in {}'s file system", path.display()));
}

/// A tmpfs of its own.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(name: &str, bytes: u64) -> Option<Self> {
        let path = std::env::temp_dir().join(format!("premap-behind-{}-{name}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        let target = CString::new(path.to_str().unwrap()).unwrap();
        let options = CString::new(format!("size={bytes}")).unwrap();
        // SAFETY: all are C strings that outlive the call.
        let result = unsafe {
            libc::mount(c"premap".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), 0, options.as_ptr().cast())
        };
        if result != 0 {
            eprintln!("skipped: can't mount a tmpfs: {}", std::io::Error::last_os_error());
            std::fs::remove_dir(&path).unwrap();
            return None;
        }
        Some(Self(path))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let target = CString::new(self.0.to_str().unwrap()).unwrap();
        // SAFETY: a C string that outlives the call.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        let _ = std::fs::remove_dir(&self.0);
    }
}
