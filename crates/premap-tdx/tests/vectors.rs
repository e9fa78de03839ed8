//! Values that others have: MRTDs and TD HOB digests of `data/mrtd.json`.
#![expect(clippy::unwrap_used, reason = "in a test the panic is the message")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use premap_tdx::measure::{events, search, write_events};
use premap_tdx::tdvf::Fault;
use premap_tdx::{Digest, Image, Measurement, Order, Rules, Section, SectionType, TdHob, Tdvf, measure};
use serde::Deserialize;
use sha2::Digest as _;

#[derive(Deserialize)]
struct Vectors {
    mrtd: Vec<Vector>,
    td_hob_sha384: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Vector {
    firmware: Option<String>,
    sha256_of_unpacked: Option<String>,
    mrtd: Option<String>,
    sha256: Option<String>,
    adds: Option<u64>,
    extends: Option<u64>,
    mrtd_page: Option<String>,
    mrtd_region: Option<String>,
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("data/mrtd.json")).unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Measures in an order and holds the list of events against it: same value, same counts.
fn measured(sections: &[Section<'_>], order: Order) -> Measurement {
    let measurement = measure(sections, order.into());
    let mut list = Vec::new();
    assert_eq!(write_events(sections, order.into(), &mut list).unwrap(), measurement);
    let list = String::from_utf8(list).unwrap();
    let lines = |start: &str| list.lines().filter(|line| line.starts_with(start)).count() as u64;
    assert_eq!((lines("add "), lines("extend ")), (measurement.adds, measurement.extends));
    assert!(list.ends_with(&format!(
        "mrtd   {} adds {} extends {}\n",
        measurement.mrtd, measurement.adds, measurement.extends
    )));
    measurement
}

#[test]
fn the_clean_example_has_its_published_mrtd() {
    let vectors = vectors();
    let vector = vectors.mrtd.iter().find(|vector| vector.firmware.is_some()).unwrap();
    let bytes = common::clean_example();
    assert_eq!(Some(&sha256(&bytes)), vector.sha256_of_unpacked.as_ref());
    let image = Image::new(bytes);
    let tdvf = Tdvf::parse(&image).unwrap();
    let page = measured(tdvf.sections(), Order::Page);
    assert_eq!(Some(page.mrtd.to_string()), vector.mrtd);
    assert_ne!(measured(tdvf.sections(), Order::Region).mrtd, page.mrtd);
}

/// The clean example has the sections that the digests of the TD HOB are for.
#[test]
fn td_hobs_have_the_digests_of_qemus() {
    let image = Image::new(common::clean_example());
    let tdvf = Tdvf::parse(&image).unwrap();
    let mut checked = 0;
    for (mib, digest) in &vectors().td_hob_sha384 {
        let Ok(mib) = mib.parse::<u64>() else { continue };
        let hob = TdHob::q35(&tdvf, mib << 20).unwrap();
        assert_eq!(hob.digest().to_string(), *digest, "{mib} MiB");
        assert_eq!(hob.gpa().raw(), 0x80_9000);
        checked += 1;
    }
    assert_eq!(checked, 3);
}

/// Debian's image is too big to carry along; the package `ovmf` has it.
#[test]
fn debians_image_has_the_mrtds_that_independent_tools_agree_on() {
    let Some(bytes) = installed("/usr/share/ovmf/OVMF.fd") else { return };
    let sum = sha256(&bytes);
    let image = Image::new(bytes);
    let tdvf = Tdvf::parse(&image).unwrap();
    let page = measured(tdvf.sections(), Order::Page);
    let region = measured(tdvf.sections(), Order::Region);
    assert_ne!(page.mrtd, region.mrtd);
    let vectors = vectors();
    let Some(vector) = vectors.mrtd.iter().find(|vector| vector.sha256.as_ref() == Some(&sum)) else {
        eprintln!(
            "another release of ovmf than the vectors': parsed and measured, but compared with nothing"
        );
        return;
    };
    assert_eq!((Some(page.adds), Some(page.extends)), (vector.adds, vector.extends));
    assert_eq!(Some(page.mrtd.to_string()), vector.mrtd_page);
    assert_eq!(Some(region.mrtd.to_string()), vector.mrtd_region);
    for (order, measurement) in [(Order::Page, page), (Order::Region, region)] {
        let found = search(tdvf.sections(), &measurement.mrtd).fits;
        assert_eq!(found, Some((Rules::from(order), measurement)));
    }
    let none = search(tdvf.sections(), &Digest([0; Digest::LEN]));
    assert_eq!((none.fits, none.tried.len()), (None, 2));
    let parts = events(tdvf.sections(), Rules::default()).count() as u64;
    assert_eq!(parts, page.adds + page.extends);
}

/// What a distribution ships beside the whole image: halves, for which the reason must be the true one.
#[test]
fn halves_of_installed_firmware_are_refused_alone_and_measured_together() {
    let (code, vars) = ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd");
    // Releases after bookworm have the halves of 4 MiB only.
    let large = ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd");
    let (code, vars) = if Path::new(code).exists() { (code, vars) } else { large };
    let Some((code, vars)) = installed(code).zip(installed(vars)) else { return };
    let alone = Image::new(code.as_slice());
    let missing = vars.len() as u64;
    assert_eq!(Tdvf::parse(&alone).unwrap_err().fault, Fault::SplitCode { missing });
    assert_eq!(Tdvf::parse(&Image::new(vars.as_slice())).unwrap_err().fault, Fault::NoFooter);
    let image = Image::join(&vars, &code);
    let tdvf = Tdvf::parse(&image).unwrap();
    assert_eq!(tdvf.sections().first().map(Section::kind), Some(SectionType::BFV));
    assert!(measured(tdvf.sections(), Order::Page).extends > 0);
    let short = Image::join(&vars[1..], &code);
    let expected = Fault::WrongVars { given: missing - 1, expected: missing };
    assert_eq!(Tdvf::parse(&short).unwrap_err().fault, expected);
}

/// The bytes of a file of the package `ovmf`, or nothing and the reason said.
fn installed(file: &str) -> Option<Vec<u8>> {
    match std::fs::read(file) {
        Ok(bytes) => Some(bytes),
        Err(error) => {
            let required = std::env::var_os("PREMAP_REQUIRE_LAB").is_some_and(|value| value == "1");
            assert!(!required, "{file}: {error}; install the package ovmf");
            eprintln!("skipped: {file}: {error}; the package ovmf has it");
            None
        }
    }
}
