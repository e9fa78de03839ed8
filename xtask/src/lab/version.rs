//! Debian's order of upstream version strings, as deb-version(7) states it.
//!
//! Digits compare as numbers and everything else by character, where `~` sorts before the end of the string and
//! letters before other signs. Kernel package names carry such a string, so `6.12.117+deb12` is above
//! `6.12.95+deb12` and `7.3.4` above `7.3~rc4`.

use std::cmp::Ordering;

/// Compares two upstream version strings.
pub(super) fn compare(left: &str, right: &str) -> Ordering {
    let (mut left, mut right) = (left.as_bytes(), right.as_bytes());
    loop {
        let (text_l, rest_l) = split(left, |byte| !byte.is_ascii_digit());
        let (text_r, rest_r) = split(right, |byte| !byte.is_ascii_digit());
        let (number_l, rest_l) = split(rest_l, u8::is_ascii_digit);
        let (number_r, rest_r) = split(rest_r, u8::is_ascii_digit);
        let order = compare_text(text_l, text_r).then_with(|| compare_number(number_l, number_r));
        if order.is_ne() || (rest_l.is_empty() && rest_r.is_empty()) {
            return order;
        }
        (left, right) = (rest_l, rest_r);
    }
}

fn split(bytes: &[u8], belongs: impl Fn(&u8) -> bool) -> (&[u8], &[u8]) {
    bytes.split_at(bytes.iter().position(|byte| !belongs(byte)).unwrap_or(bytes.len()))
}

fn compare_text(left: &[u8], right: &[u8]) -> Ordering {
    let weight = |byte: Option<&u8>| match byte {
        Some(b'~') => -1,
        None => 0,
        Some(byte) if byte.is_ascii_alphabetic() => i32::from(*byte),
        Some(byte) => i32::from(*byte) + 256,
    };
    (0..left.len().max(right.len()))
        .map(|at| weight(left.get(at)).cmp(&weight(right.get(at))))
        .find(|order| order.is_ne())
        .unwrap_or(Ordering::Equal)
}

fn compare_number(left: &[u8], right: &[u8]) -> Ordering {
    let significant = |digits| split(digits, |byte| *byte == b'0').1;
    let (left, right) = (significant(left), significant(right));
    left.len().cmp(&right.len()).then_with(|| left.cmp(right))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(lower: &str, higher: &str) {
        assert_eq!(compare(lower, higher), Ordering::Less, "{lower} < {higher}");
        assert_eq!(compare(higher, lower), Ordering::Greater, "{higher} > {lower}");
        assert_eq!(compare(lower, lower), Ordering::Equal, "{lower}");
    }

    #[test]
    fn numbers_compare_as_numbers() {
        check("6.12.95+deb12", "6.12.117+deb12");
        check("6.19.14+deb13", "7.0.4+deb13");
        check("6.12.9", "6.12.010");
    }

    #[test]
    fn a_longer_version_is_higher_unless_a_tilde_follows() {
        check("6.12.90+deb12", "6.12.90+deb12.1");
        check("7.3~rc4", "7.3");
        check("7.3~rc4", "7.3.1");
        check("6.1.0-9", "6.1.0-10");
    }

    #[test]
    fn letters_sort_before_other_signs() {
        check("1a", "1+");
        check("1", "1a");
    }
}
