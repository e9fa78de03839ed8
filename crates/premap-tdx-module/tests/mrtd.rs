//! The measurement that the module makes of a firmware is the one that premap-tdx tells beforehand.
#![expect(clippy::unwrap_used, reason = "in a test the panic is the message")]

mod common;
#[path = "../../premap-tdx/tests/common/mod.rs"]
mod firmware;

use common::{Host, LP, Stage, at};
use premap_tdx::measure::{Event, events};
use premap_tdx::{Image, Measurement, Order, PageAug, Rules, Section, Tdvf, measure};
use premap_tdx_module::{Gpa, Hpa, Level, Seamcall, Source};

/// The bytes of a section's page.
fn content(section: &Section<'_>, gpa: Gpa) -> [u8; 4096] {
    let offset = usize::try_from(gpa.checked_offset_from(section.memory().start()).unwrap()).unwrap();
    let data = section.data().get(offset..).unwrap_or_default();
    let mut page = [0; 4096];
    let len = data.len().min(4096);
    page[..len].copy_from_slice(&data[..len]);
    page
}

/// Loads a firmware as a VMM of these rules does; what the module made of it, and what a guest then reads.
fn load(sections: &[Section<'_>], rules: Rules) -> Measurement {
    let host = Host::new();
    let td = host.td(Stage::WithVcpu);
    let source = Hpa::new(0x8_0000);
    for event in events(sections, rules) {
        match event {
            Event::Add { gpa, section } => {
                host.tables(td.tdr, gpa.raw(), Level::PT);
                let content = content(&sections[section], gpa);
                let page = at(gpa.raw(), Level::PT);
                // From the machine's memory or from a buffer: it makes no difference.
                let source = if gpa.raw() & 0x1000 == 0 {
                    host.module.host_write(source, &content).unwrap();
                    Source::Memory(source)
                } else {
                    Source::Bytes(&content)
                };
                host.module.mem_page_add(page, td.tdr, host.page(), source).unwrap();
            }
            Event::Extend { gpa, .. } => host.module.mr_extend(gpa, td.tdr).unwrap(),
        }
    }
    let so_far = host.module.mng_rd_mrtd(td.tdr).unwrap();
    host.module.mr_finalize(td.tdr).unwrap();
    let mrtd = host.module.mng_rd_mrtd(td.tdr).unwrap();
    assert_eq!(so_far, mrtd);
    let reported = host.module.vp_enter(LP, td.vcpus[0], |guest| {
        for section in sections {
            let mut page = [1; 4096];
            guest.read(section.memory().start(), &mut page).unwrap();
            assert_eq!(page, content(section, section.memory().start()));
        }
        guest.mrtd()
    });
    assert_eq!(reported, Ok(mrtd));
    let counts = host.module.counts();
    Measurement {
        mrtd,
        adds: counts.of(Seamcall::MemPageAdd).calls,
        extends: counts.of(Seamcall::MrExtend).calls,
    }
}

fn check(image: Vec<u8>) {
    let image = Image::new(image);
    let tdvf = Tdvf::parse(&image).unwrap();
    for order in Order::ALL {
        let rules = Rules { order, page_aug: PageAug::Added };
        assert_eq!(load(tdvf.sections(), rules), measure(tdvf.sections(), rules), "{order} order");
    }
}

#[test]
fn a_small_firmware_is_measured_as_foretold() {
    check(firmware::firmware(firmware::SMALL_LEN, &firmware::SMALL));
}

#[test]
fn debians_firmware_is_measured_as_foretold() {
    match std::fs::read("/usr/share/ovmf/OVMF.fd") {
        Ok(image) => check(image),
        Err(error) => {
            let required = std::env::var_os("PREMAP_REQUIRE_LAB").is_some_and(|value| value == "1");
            assert!(!required, "/usr/share/ovmf/OVMF.fd: {error}; install the package ovmf");
            eprintln!("skipped: /usr/share/ovmf/OVMF.fd: {error}; the package ovmf has it");
        }
    }
}

#[test]
fn what_is_augmented_is_not_measured() {
    let host = Host::new();
    let td = host.td(Stage::Initialized);
    let before = host.module.mng_rd_mrtd(td.tdr).unwrap();
    host.aug(td.tdr, 0x20_0000, Level::PD);
    assert_eq!(host.module.mng_rd_mrtd(td.tdr), Ok(before));
    host.add(td.tdr, 0x1000, 0);
    assert_ne!(host.module.mng_rd_mrtd(td.tdr), Ok(before));
}
