//! Linux guests that come to a bad end: what their console showed is kept, and one line says why.

mod command;

use std::path::PathBuf;
use std::process::Command;

use command::premap;

/// A bzImage of a few instructions at its 64-bit entry: it says `hi`, and goes to where there is no memory.
fn dying_kernel() -> Vec<u8> {
    let mut file = vec![0; 1024 + 4096];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x1f4, &256_u32.to_le_bytes()); // syssize
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes()); // version
    put(0x211, &[1]); // loadflags
    put(0x214, &0x10_0000_u32.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(0x236, &[1]); // xloadflags
    put(0x238, &255_u32.to_le_bytes()); // cmdline_size
    put(0x258, &0x10_0000_u64.to_le_bytes()); // pref_address
    put(0x260, &0x1000_u32.to_le_bytes()); // init_size
    // mov dx, 0x3f8; mov al, letter; out dx, al
    let say = |letter| vec![0x66, 0xba, 0xf8, 0x03, 0xb0, letter, 0xee];
    // mov eax, 0x30000000; jmp rax
    let leave = vec![0xb8, 0, 0, 0, 0x30, 0xff, 0xe0];
    put(1024 + 0x200, &[say(b'h'), say(b'i'), leave].concat());
    file
}

/// Where a file of this test's own lies.
fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

fn has_kvm() -> bool {
    let opened = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &opened {
        eprintln!("skipped: /dev/kvm: {error}");
    }
    opened.is_ok()
}

#[test]
fn a_guest_whose_vcpu_dies_leaves_its_console() {
    if !has_kvm() {
        return;
    }
    let (kernel, console) = (path("dying.bzImage"), path("dying.console"));
    let _ = std::fs::remove_file(&console);
    std::fs::write(&kernel, dying_kernel()).unwrap();
    let done = premap(&format!(
        "run --guest linux --backend kvm --memory 64M --strategy demand --time-limit 60s --kernel {} --console {}",
        kernel.display(),
        console.display()
    ));
    assert_eq!((done.code, done.stdout.as_str()), (Some(1), ""), "{}", done.stderr);
    assert!(done.stderr.contains("demand: vCPU 0 left the guest: "), "{}", done.stderr);
    assert!(done.stderr.trim_end().ends_with("its last line: hi"), "{}", done.stderr);
    assert_eq!(std::fs::read_to_string(&console).unwrap(), "hi");
}

#[test]
fn a_linux_guest_without_a_thread_for_each_vcpu_says_so_and_ends() {
    if !has_kvm() {
        return;
    }
    let kernel = path("threads.bzImage");
    std::fs::write(&kernel, dying_kernel()).unwrap();
    let run = "run --guest linux --backend kvm --memory 64M --vcpus 2 --strategy demand --kernel";
    let done = Command::new(env!("CARGO_BIN_EXE_premap"))
        .args(run.split(' '))
        .arg(&kernel)
        // A stack that no address space has room for: no thread can be started, whoever asks.
        .env("RUST_MIN_STACK", (1_u64 << 47).to_string())
        .output()
        .unwrap();
    let stderr = String::from_utf8(done.stderr).unwrap();
    assert_eq!((done.status.code(), stderr.lines().count()), (Some(1), 1), "{stderr}");
    assert!(stderr.contains("2 vCPUs need a thread each, and after 0 the host gave no more"), "{stderr}");
}
