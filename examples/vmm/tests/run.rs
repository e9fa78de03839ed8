//! The example runs, where there is a `/dev/kvm`.

use std::process::Command;

#[test]
fn the_guest_runs_on_memory_mapped_ahead_or_meanwhile_or_on_demand() {
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        eprintln!("skipped: /dev/kvm: {error}");
        return;
    }
    for arguments in [&[][..], &["--background"], &["--demand"]] {
        let done = Command::new(env!("CARGO_BIN_EXE_example-vmm")).args(arguments).output().unwrap();
        let (out, told) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert!(done.status.success(), "{told}");
        assert!(out.contains("the guest wrote 32512 pages"), "{out}");
        let mapped = out.contains("host stage: 134217728 of 134217728 bytes");
        assert_eq!(mapped, arguments != ["--demand"], "{out}");
    }
}
