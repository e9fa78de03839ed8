//! ACPI tables: which vCPUs there are, where the interrupt controllers lie, and how to power off.
//!
//! ```text
//!   RSDP --> XSDT --+--> FADT --+--> FACS
//!                   |           +--> DSDT: \_S5
//!                   +--> MADT
//! ```

use acpi_tables::aml::{Name, PackageBuilder};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

use crate::layout::{ACPI, IO_APIC, LOCAL_APIC};
use crate::ports::{PM1_CONTROL, PM1_EVENT, RESET, RESET_VALUE};

const OEM: [u8; 6] = *b"PREMAP";
const TABLE: [u8; 8] = *b"PREMAPVM";
/// The interrupt of power-management events, of which there are none.
const SCI: u16 = 9;
/// The type of the soft-off state, to be written with the sleep bit.
const SOFT_OFF: u8 = 5;
/// FADT: no VGA, and no real-time clock in the CMOS.
const NO_VGA_NO_CLOCK: u16 = 1 << 2 | 1 << 5;
const ALIGN: usize = 64;

/// The tables for so many vCPUs, as they are to lie from [`ACPI`] on.
pub(crate) fn tables(vcpus: u8) -> Vec<u8> {
    let mut bytes = vec![0; Rsdp::len()];
    let facs = push(&mut bytes, &FACS::new());
    let dsdt = push(&mut bytes, &dsdt());
    let fadt = push(&mut bytes, &fadt(facs, dsdt));
    let madt = push(&mut bytes, &madt(vcpus));
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = push(&mut bytes, &xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    bytes[..root.len()].copy_from_slice(&root);
    bytes
}

/// Adds a table on a boundary of its own, and gives its address in the guest.
fn push(bytes: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
    let at = ACPI.raw() + bytes.len() as u64;
    table.to_aml_bytes(bytes);
    at
}

fn dsdt() -> Sdt {
    let mut sdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, 1);
    let mut off = PackageBuilder::new();
    for value in [SOFT_OFF, SOFT_OFF, 0, 0] {
        off.add_element(&value);
    }
    let mut body = Vec::new();
    Name::new(aml::Path::new("_S5_"), &off).to_aml_bytes(&mut body);
    sdt.append_slice(&body);
    sdt
}

fn fadt(facs: u64, dsdt: u64) -> acpi_tables::fadt::FADT {
    // The tables lie below 1 MiB.
    let low32 = |address: u64| u32::try_from(address).unwrap_or_default();
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1).dsdt_32(low32(dsdt)).firmware_ctrl_32(low32(facs));
    for flag in [Flags::Wbinvd, Flags::PwrButton, Flags::SlpButton, Flags::ResetRegSup] {
        fadt = fadt.flag(flag);
    }
    fadt.sci_int = SCI.into();
    (fadt.pm1a_evt_blk, fadt.pm1_evt_len) = (u32::from(PM1_EVENT).into(), 4);
    (fadt.pm1a_cnt_blk, fadt.pm1_cnt_len) = (u32::from(PM1_CONTROL).into(), 2);
    fadt.iapc_boot_arch = NO_VGA_NO_CLOCK.into();
    fadt.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, RESET.into());
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, 1, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    madt
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::KERNEL;

    /// The table at a guest address, by its own length, with its checksum verified.
    fn table(bytes: &[u8], at: u64) -> &[u8] {
        let start = usize::try_from(at - ACPI.raw()).unwrap();
        let length = u32::from_le_bytes(bytes[start + 4..start + 8].try_into().unwrap());
        let table = &bytes[start..start + usize::try_from(length).unwrap()];
        assert_eq!(table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum of {table:x?}");
        table
    }

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn the_tables_are_found_from_the_root() {
        let bytes = tables(3);
        assert_eq!(&bytes[..8], b"RSD PTR ");
        let xsdt = table(&bytes, word(&bytes, 24));
        let (fadt, madt) = (table(&bytes, word(xsdt, 36)), table(&bytes, word(xsdt, 44)));
        assert_eq!((&fadt[..4], &madt[..4]), (&b"FACP"[..], &b"APIC"[..]));
        let processors = madt[44..].chunks(8).take_while(|entry| entry[..2] == [0, 8]).count();
        assert_eq!(processors, 3);
        let dsdt = u64::from(u32::from_le_bytes(fadt[40..44].try_into().unwrap()));
        assert!(table(&bytes, dsdt).windows(4).any(|name| name == b"_S5_"));
    }

    #[test]
    fn as_many_vcpus_as_there_may_be_fit_below_the_kernel() {
        assert!(ACPI.wrapping_add(tables(254).len() as u64) < KERNEL);
    }
}
