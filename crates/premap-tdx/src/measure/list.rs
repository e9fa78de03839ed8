//! A measurement written down, so that two can be laid side by side.
//!
//! One operation a line, then the address, then the section by number and type. Before the first operation in another
//! 2 MiB of the guest's memory, or in another section, a line tells the value that the MRTD would have if it ended there;
//! so the first `digest` line in which two lists differ bounds the difference to 2 MiB. Nothing in the text depends on
//! where or when it was written.
//!
//! ```text
//! # MRTD events, page order
//! # section 0 BFV [0xffe20000, 0x100000000) data 0x20000+0x1e0000 measured
//! add    0x00000000ffe20000 0:BFV
//! extend 0x00000000ffe20000 0:BFV
//! digest 1c5e... adds 480 extends 7680
//! mrtd   4c72... adds 538 extends 7680
//! ```

use std::io;

use premap_address::{Gpa, PageSize};

use super::event::{Event, events};
use super::mrtd::Mrtd;
use super::rules::Rules;
use super::{Measurement, Section};
use crate::sha384::DefaultSha384;

/// Measures as [`measure`](super::measure()) does and writes down every operation and the value every 2 MiB.
///
/// Lines are short and many: give a writer that is buffered.
///
/// # Errors
/// What the writer says.
pub fn write_events(
    sections: &[Section<'_>],
    rules: Rules,
    out: &mut impl io::Write,
) -> io::Result<Measurement> {
    writeln!(out, "# MRTD events, {rules}")?;
    for (index, section) in sections.iter().enumerate() {
        let (kind, memory) = (section.kind(), section.memory());
        write!(out, "# section {index} {kind} {memory}")?;
        if !section.data().is_empty() {
            write!(out, " data {:#x}+{:#x}", section.data_offset(), section.data().len())?;
        }
        let fate = match (rules.loads(section), section.is_measured()) {
            (false, _) => "left out",
            (true, false) => "added",
            (true, true) => "added and measured",
        };
        writeln!(out, " {fate}")?;
    }
    let mut mrtd = Mrtd::<DefaultSha384>::new();
    let mut stretch = None;
    for event in events(sections, rules) {
        let here = (event.section(), event.gpa().align_down(PageSize::Size2M));
        if stretch.replace(here).is_some_and(|before| before != here) {
            write_value(out, "digest", &mrtd.so_far())?;
        }
        let kind = sections[event.section()].kind();
        write_operation(out, &event, format_args!("{}:{kind}", event.section()))?;
        mrtd.record(&event);
    }
    let measurement = mrtd.finish();
    write_value(out, "mrtd  ", &measurement)?;
    Ok(measurement)
}

fn write_operation(
    out: &mut impl io::Write,
    event: &Event<'_>,
    section: std::fmt::Arguments<'_>,
) -> io::Result<()> {
    let name = match event {
        Event::Add { .. } => "add   ",
        Event::Extend { .. } => "extend",
    };
    writeln!(out, "{name} {:#018x} {section}", Gpa::raw(event.gpa()))
}

fn write_value(out: &mut impl io::Write, name: &str, measurement: &Measurement) -> io::Result<()> {
    let Measurement { mrtd, adds, extends } = measurement;
    writeln!(out, "{name} {mrtd} adds {adds} extends {extends}")
}
