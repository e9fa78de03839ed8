//! Sizes and times as users write and read them. Sizes are binary: `512M` is 512 MiB.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Size(pub(crate) u64);

const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

impl Size {
    /// The size as a flag's value: the largest unit of which it is a whole number.
    pub(crate) fn flag(self) -> String {
        let unit = UNITS.iter().rev().find(|(_, shift)| self.0 > 0 && self.0.trailing_zeros() >= *shift);
        unit.map_or_else(|| self.0.to_string(), |(letter, shift)| format!("{}{letter}", self.0 >> shift))
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        let bad =
            || "not a size; write bytes, or K, M, G or T after a whole number, as 512M or 4GiB".to_owned();
        let number: u64 = number.parse().map_err(|_| bad())?;
        let shift = match unit.to_ascii_uppercase().trim_end_matches("IB") {
            "" if unit.is_empty() => 0,
            short => UNITS
                .iter()
                .find(|(letter, _)| short.chars().eq([*letter]))
                .map(|(_, shift)| *shift)
                .ok_or_else(bad)?,
        };
        number
            .checked_mul(1 << shift)
            .map(Self)
            .ok_or_else(|| "more than any machine has; give a size such as 512M".to_owned())
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS.iter().rev().find(|(_, shift)| self.0 >= 1 << shift);
        let Some((letter, shift)) = unit else {
            return write!(f, "{} bytes", self.0);
        };
        let (whole, rest) = (self.0 >> shift, self.0 & ((1 << shift) - 1));
        match (u128::from(rest) * 10) >> shift {
            0 => write!(f, "{whole} {letter}iB"),
            tenth => write!(f, "{whole}.{tenth} {letter}iB"),
        }
    }
}

/// Reads a time with its unit, `us`, `ms`, `s`, `m` or `h`: `500ms`, `2s`, `1.5h`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let bad = || "not a time; write a number and us, ms, s, m or h after it, as 500ms or 2s".to_owned();
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let seconds = match &text[number.len()..] {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(bad()),
    };
    let number: f64 = number.parse().map_err(|_| bad())?;
    match Duration::try_from_secs_f64(number * seconds) {
        Ok(time) if !time.is_zero() => Ok(time),
        Ok(_) => Err("no time at all; give more, as 500ms".to_owned()),
        Err(_) => Err(bad()),
    }
}

/// A whole number with its thousands apart.
pub(crate) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// So many of something whose plural ends in s: `1 page`, `1,024 pages`.
pub(crate) fn counted(number: u64, noun: &str) -> String {
    let ending = if number == 1 { "" } else { "s" };
    format!("{} {noun}{ending}", thousands(number))
}

/// A time in the unit that suits it, to three digits or so.
pub(crate) fn time(ns: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "it is rounded to three digits anyway")]
    let ns = ns as f64;
    let (value, unit) = match ns {
        0.0 => return "0".to_owned(),
        ..1e3 => (ns, "ns"),
        ..1e6 => (ns / 1e3, "µs"),
        ..1e9 => (ns / 1e6, "ms"),
        _ => (ns / 1e9, "s"),
    };
    let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.digits$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_and_read_in_every_usual_spelling() {
        for (text, bytes) in [
            ("4096", 4096),
            ("64k", 64 << 10),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("4G", 4 << 30),
            ("4GiB", 4 << 30),
            ("1t", 1 << 40),
            ("0", 0),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_says_how_to_write_one() {
        for text in
            ["", "M", "x", "-1", "1.5G", "4GB", "4iB", "5 M", "4MM", "99999999999999999999", "99999999T"]
        {
            let error = text.parse::<Size>().unwrap_err();
            assert!(error.contains("512M"), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_print_in_the_largest_unit() {
        for (bytes, text) in [
            (3, "3 bytes"),
            (4096, "4 KiB"),
            (512 << 20, "512 MiB"),
            (3 << 29, "1.5 GiB"),
            ((1 << 30) + 4096, "1 GiB"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }

    #[test]
    fn flags_read_back_as_the_same_size() {
        for (bytes, text) in [(0, "0"), (3, "3"), (4096, "4K"), (3 << 29, "1536M"), (100 << 40, "100T")] {
            assert_eq!((Size(bytes).flag().as_str(), text.parse()), (text, Ok(Size(bytes))));
        }
    }

    #[test]
    fn times_need_a_unit_and_are_never_nothing() {
        for (text, ms) in
            [("500ms", 500), ("1.5s", 1_500), ("2000us", 2), ("90m", 5_400_000), ("0.5h", 1_800_000)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "5", "ms", "-1s", "0s", "0h", "1d", "1hm", "1 h", "nans", "infs", "1e400s"] {
            assert!(duration(text).unwrap_err().contains("500ms"), "{text}");
        }
    }

    #[test]
    fn numbers_are_easy_to_read() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(1_048_576), "1,048,576");
        assert_eq!((counted(1, "page"), counted(0, "page")), ("1 page".to_owned(), "0 pages".to_owned()));
        assert_eq!(time(0), "0");
        assert_eq!(time(950), "950 ns");
        assert_eq!(time(1_234), "1.23 µs");
        assert_eq!(time(45_600_000), "45.6 ms");
        assert_eq!(time(12_345_678_900), "12.3 s");
    }
}
