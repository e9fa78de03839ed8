//! Each way a guest can end, with kernels of a few instructions instead of Linux: they are loaded, entered and served alike.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use linux_loader::loader::bootparam::setup_header;
use premap::{Engine, Plan, Touch};
use premap_guest::{Backing, Linux};
use premap_kvm::probe;
use premap_linux_guest::{End, Image, LinuxMachine, Shape, Until};
use vm_memory::ByteValued;

const SHAPE: Shape = Shape { bytes: 64 << 20, backing: Backing::Anonymous, vcpus: 2, spares: 0 };

/// `jmp $`
const SPIN: [u8; 2] = [0xeb, 0xfe];
/// `ud2`, which without a table of handlers is a triple fault.
const FAULT: [u8; 2] = [0x0f, 0x0b];

/// `mov dx, port; mov eax, value; out dx, al` or, for two bytes, `ax`.
fn out(port: u16, value: &[u8]) -> Vec<u8> {
    let mut code = vec![0x66, 0xba];
    code.extend(port.to_le_bytes());
    code.push(0xb8);
    code.extend([value[0], value.get(1).copied().unwrap_or(0), 0, 0]);
    code.extend(if value.len() == 1 { &[0xee][..] } else { &[0x66, 0xef] });
    code
}

fn say(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out(0x3f8, &[byte])).collect()
}

/// Writes a byte of each of so many pages from 16 MiB on: `mov byte [rdi], 1; add rdi, 4096; dec ecx; jnz`.
fn touch(pages: u32) -> Vec<u8> {
    let mut code = vec![0xbf, 0, 0, 0, 1, 0xb9];
    code.extend(pages.to_le_bytes());
    code.extend([0xc6, 0x07, 0x01, 0x48, 0x81, 0xc7, 0x00, 0x10, 0, 0, 0xff, 0xc9, 0x75, 0xf2]);
    code
}

/// A bzImage with such code at its 64-bit entry.
fn image(code: &[Vec<u8>]) -> Image {
    let header = setup_header {
        setup_sects: 1,
        syssize: 4096 / 16,
        header: 0x5372_6448,
        version: 0x020f,
        loadflags: 1,
        code32_start: 0x10_0000,
        initrd_addr_max: 0x7fff_ffff,
        xloadflags: 1,
        cmdline_size: 255,
        pref_address: 0x10_0000,
        init_size: 0x1000,
        ..Default::default()
    };
    let mut file = vec![0; 1024 + 4096];
    file[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(header.as_slice());
    let code = code.concat();
    file[1024 + 0x200..1024 + 0x200 + code.len()].copy_from_slice(&code);
    Image::new(file, None, "quiet").unwrap()
}

/// `/dev/kvm`; in the lab (`PREMAP_LAB=1`), which exists so that there is one, its lack is a failure.
fn linux() -> Option<Linux> {
    let opened = Linux::open();
    if let Err(error) = &opened {
        let lab = std::env::var_os("PREMAP_LAB").is_some_and(|value| value == "1");
        assert!(!lab, "must run in the lab: {error}");
        eprintln!("skipped: {error}");
    }
    opened.ok()
}

fn until(marker: &str, seconds: u64) -> Until {
    let marker = (!marker.is_empty()).then(|| marker.to_owned());
    Until { marker, limit: Duration::from_secs(seconds) }
}

#[test]
fn every_end_is_told_and_the_console_kept() {
    let Some(linux) = linux() else { return };
    let spin = || SPIN.to_vec();
    for (code, marker, end, console) in [
        (vec![say("so it is up"), spin()], "is up", End::Marker, "so it is up"),
        (vec![say("off"), out(0x604, &[0, 0x34]), spin()], "", End::PowerOff, "off"),
        (vec![say("re"), out(0x608, &[1]), spin()], "never", End::Reset, "re"),
        (vec![out(0x64, &[0xfe]), spin()], "", End::Reset, ""),
        (vec![FAULT.to_vec()], "", End::Reset, ""),
    ] {
        let mut machine = LinuxMachine::new(&linux, &image(&code), &SHAPE).unwrap();
        let boot = machine.boot(&until(marker, 60)).unwrap();
        assert_eq!((boot.end, machine.console().as_str()), (end, console));
    }
    let mut machine = LinuxMachine::new(&linux, &image(&[spin()]), &SHAPE).unwrap();
    assert_eq!(machine.boot(&until("", 1)).unwrap().end, End::TimeLimit);
}

#[test]
fn memory_that_was_mapped_ahead_takes_no_faults() {
    const PAGES: u32 = 4096;
    let Some(linux) = linux() else { return };
    let image = image(&[touch(PAGES), say("up"), SPIN.to_vec()]);
    let mut machine = LinuxMachine::new(&linux, &image, &SHAPE).unwrap();
    let demand = machine.boot(&until("up", 60)).unwrap();
    assert_eq!(demand.end, End::Marker);
    let mut machine = LinuxMachine::new(&linux, &image, &SHAPE).unwrap();
    let plan = Plan::new(machine.regions(Touch::Write)).unwrap();
    let mut lent = machine.lend();
    if !probe::pre_fault(&lent.vm, &mut lent.vcpus[0]).is_supported() {
        eprintln!("skipped: this /dev/kvm can't pre-fault");
        return;
    }
    assert!(demand.cost.faults >= u64::from(PAGES), "{demand:?}");
    let report = Engine::new().vm(&lent.vm).run(&plan, &mut lent.vcpus).unwrap();
    assert!(report.is_complete(), "{report:?}");
    let two = machine.boot(&until("up", 60)).unwrap();
    assert!(two.end == End::Marker && two.cost.faults <= 4, "{two:?}");
}
