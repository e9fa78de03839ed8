//! How fast an MRTD is measured, against the same SHA-384 library with nothing around it.
//!
//! `measure`: `premap` measures a firmware of 1 MiB, all of it measured, in page order; `sha384_alone` gives the same library
//! the same bytes, laid out beforehand, in one call. Every other library that is compiled in does as `sha384_alone` does,
//! under its name, so that the choice of a library rests on figures: `--features openssl,aws-lc,ring` compiles them in.
//! Subjects take turns, so that a machine whose speed drifts treats all alike, and it is the thread's processor time that
//! counts, so that others who run on the machine do not. The median counts, and the spread is (max - min) / median.
//! `--rounds N` sets how often.

use std::hint::black_box;
use std::time::Duration;

use bench_report::{Line, flag, json, wants_json};
use premap_tdx::measure::{Event, events};
use premap_tdx::sha384::{DefaultSha384, Sha384};
use premap_tdx::{Digest, Image, Order, Rules, Section, Tdvf, measure};
use rustix::time::{ClockId, clock_gettime};

#[path = "../tests/common/mod.rs"]
mod common;

const VOLUME: u32 = 1 << 20;
const VARIABLES: u32 = 0x1000;

/// A firmware whose volume is all measured.
fn firmware() -> Vec<u8> {
    let mut sections = common::SMALL;
    let volume = &mut sections[0];
    (volume.raw, volume.memory) = (VOLUME, VOLUME.into());
    volume.gpa = (1 << 32) - u64::from(VOLUME);
    sections[1].gpa = volume.gpa - u64::from(VARIABLES);
    let len = usize::try_from(VARIABLES + VOLUME).expect("a MiB or so");
    common::firmware(len, &sections)
}

/// All that a measurement hashes, in one piece.
fn stream(sections: &[Section<'_>], rules: Rules) -> Vec<u8> {
    let mut stream = Vec::new();
    for event in events(sections, rules) {
        let (name, content): (&[u8], _) = match event {
            Event::Add { .. } => (b"MEM.PAGE.ADD", None),
            Event::Extend { content, .. } => (b"MR.EXTEND", Some(content.bytes())),
        };
        let mut header = [0; 128];
        header[..name.len()].copy_from_slice(name);
        header[16..24].copy_from_slice(&event.gpa().raw().to_le_bytes());
        stream.extend(header);
        stream.extend(content.iter().flatten());
    }
    stream
}

/// A name, and what hashes.
type Subject<'a> = (&'static str, Box<dyn Fn() -> Digest + 'a>);

fn alone<H: Sha384>(stream: &[u8]) -> Digest {
    let mut hash = H::new();
    hash.update(stream);
    hash.finish()
}

/// How long the processor has worked for this thread.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).expect("the clock starts at 0")
}

fn main() {
    let rounds = flag("--rounds", 201);

    let image = Image::new(firmware());
    let tdvf = Tdvf::parse(&image).expect("the image is good");
    let (sections, rules) = (tdvf.sections(), Rules::from(Order::Page));
    let stream = stream(sections, rules);
    let expected = measure(sections, rules).mrtd;

    let measured = || measure(sections, rules).mrtd;
    let mut subjects: Vec<Subject<'_>> =
        vec![("premap", Box::new(measured)), ("sha384_alone", Box::new(|| alone::<DefaultSha384>(&stream)))];
    #[cfg(feature = "sha2")]
    subjects.push(("sha2", Box::new(|| alone::<premap_tdx::sha384::Sha2>(&stream))));
    #[cfg(feature = "openssl")]
    subjects.push(("openssl", Box::new(|| alone::<premap_tdx::sha384::OpenSsl>(&stream))));
    #[cfg(feature = "aws-lc")]
    subjects.push(("aws-lc", Box::new(|| alone::<premap_tdx::sha384::AwsLc>(&stream))));
    #[cfg(feature = "ring")]
    subjects.push(("ring", Box::new(|| alone::<premap_tdx::sha384::Ring>(&stream))));

    #[expect(clippy::cast_precision_loss, reason = "a million or two")]
    let megabytes = stream.len() as f64 / 1e6;
    let mut rates = vec![Vec::new(); subjects.len()];
    for round in 0..=rounds {
        for turn in 0..subjects.len() {
            let index = (turn + round) % subjects.len();
            let begin = processor_time();
            let digest = black_box(subjects[index].1());
            let seconds = (processor_time() - begin).as_secs_f64();
            assert_eq!(digest, expected, "{}", subjects[index].0);
            if round > 0 {
                rates[index].push(megabytes / seconds);
            }
        }
    }
    let line = |subject, rates| Line::new(("measure", subject), 1, "MB/s", rates);
    let lines: Vec<Line> =
        subjects.iter().zip(rates).map(|(&(subject, _), rates)| line(subject, rates)).collect();
    if wants_json() {
        println!("{}", json(&lines).expect("lines are plain"));
        return;
    }
    println!("{megabytes:.1} MB hashed, the default library is {}", DefaultSha384::NAME);
    lines.iter().for_each(|line| println!("{line}"));
    if let [ours, floor, ..] = lines.as_slice() {
        println!("{:.3} times the rate of the library alone", ours.value / floor.value);
    }
}
