//! The machine's devices, all behind I/O ports: a serial line, and ACPI's power management.

use std::io;

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::console::Console;
use crate::vcpu::End;

/// The first serial port of a PC, and its interrupt.
const SERIAL: u16 = 0x3f8;
pub(crate) const SERIAL_IRQ: u32 = 4;
/// PM1 event: status, then enable; 16 bits each.
pub(crate) const PM1_EVENT: u16 = 0x600;
const PM1_ENABLE: u16 = PM1_EVENT + 2;
pub(crate) const PM1_CONTROL: u16 = 0x604;
/// ACPI's reset register: [`RESET_VALUE`] written to it resets the machine.
pub(crate) const RESET: u16 = 0x608;
pub(crate) const RESET_VALUE: u8 = 1;
/// The keyboard controller, of which only the reset line is there.
const KEYBOARD: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

const SCI_ENABLED: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;

/// Raises the serial line's interrupt.
#[derive(Debug)]
pub(crate) struct Interrupt(pub(crate) EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// What answers at the ports.
#[derive(Debug)]
pub(crate) struct Ports {
    serial: Serial<Interrupt, NoEvents, Console>,
    pm1_enable: u16,
}

impl Ports {
    pub(crate) fn new(interrupt: Interrupt) -> Self {
        Self { serial: Serial::new(interrupt, Console::default()), pm1_enable: 0 }
    }

    pub(crate) fn console(&self) -> &Console {
        self.serial.writer()
    }

    pub(crate) fn console_mut(&mut self) -> &mut Console {
        self.serial.writer_mut()
    }

    /// Takes a write, and tells if the machine ends by it.
    pub(crate) fn write(&mut self, port: u16, data: &[u8]) -> Option<End> {
        match (port, data) {
            (SERIAL..=0x3ff, bytes) => {
                for byte in bytes {
                    let offset = u8::try_from(port - SERIAL).unwrap_or_default();
                    // An interrupt that can't be raised is one that the guest, which polls too, does without.
                    let _ = self.serial.write(offset, *byte);
                }
                self.console().has_marker().then_some(End::Marker)
            }
            (PM1_ENABLE, [low, high]) => {
                self.pm1_enable = u16::from_le_bytes([*low, *high]);
                None
            }
            (PM1_CONTROL, [low, high]) => {
                (u16::from_le_bytes([*low, *high]) & SLEEP_ENABLE != 0).then_some(End::PowerOff)
            }
            (RESET, [RESET_VALUE]) | (KEYBOARD, [KEYBOARD_RESET]) => Some(End::Reset),
            _ => None,
        }
    }

    /// Answers a read; where nothing is, as an empty bus does.
    pub(crate) fn read(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (port, data) {
            (SERIAL..=0x3ff, [byte]) => {
                *byte = self.serial.read(u8::try_from(port - SERIAL).unwrap_or_default());
            }
            (PM1_EVENT, [low, high]) => [*low, *high] = [0, 0],
            (PM1_ENABLE, [low, high]) => [*low, *high] = self.pm1_enable.to_le_bytes(),
            (PM1_CONTROL, [low, high]) => [*low, *high] = SCI_ENABLED.to_le_bytes(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports() -> Ports {
        Ports::new(Interrupt(EventFd::new(libc::EFD_NONBLOCK).unwrap()))
    }

    #[test]
    fn each_way_to_end_is_told() {
        for (port, data, end) in [
            (PM1_CONTROL, &[0, 0x34][..], Some(End::PowerOff)),
            (PM1_CONTROL, &[0, 0x14], None),
            (RESET, &[1], Some(End::Reset)),
            (RESET, &[0], None),
            (KEYBOARD, &[0xfe], Some(End::Reset)),
            (KEYBOARD, &[0xd1], None),
            (0x80, &[0], None),
        ] {
            assert_eq!(ports().write(port, data), end, "{port:#x} {data:x?}");
        }
        let mut ports = ports();
        ports.console_mut().look_for("up");
        assert_eq!(ports.write(SERIAL, b"u"), None);
        assert_eq!(ports.write(SERIAL, b"p"), Some(End::Marker));
    }

    #[test]
    fn registers_read_as_acpi_wants_them_and_the_rest_as_nothing() {
        let mut ports = ports();
        ports.write(PM1_ENABLE, &[0x20, 1]);
        for (port, expected) in
            [(PM1_EVENT, [0, 0]), (PM1_ENABLE, [0x20, 1]), (PM1_CONTROL, [1, 0]), (0xcfc, [0xff, 0xff])]
        {
            let mut data = [0x5a; 2];
            ports.read(port, &mut data);
            assert_eq!(data, expected, "{port:#x}");
        }
    }
}
