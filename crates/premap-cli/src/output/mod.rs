//! What `premap run` prints: a table for people, JSON for programs, a bar while it goes on.

pub(crate) mod account;
pub(crate) mod json;
mod meaning;
pub(crate) mod progress;
pub(crate) mod table;

use comfy_table::{LineStyle, TableStyle};

/// The width of text and tables: fixed, so that what is piped into a report looks as it does on a terminal.
pub(crate) const WIDTH: usize = 110;

/// Lines above and below the table and under its header.
pub(crate) const STYLE: TableStyle = TableStyle::new()
    .top_border(LineStyle::none().fill('─').junction('─'))
    .header_separator(LineStyle::none().fill('─').junction('─'))
    .bottom_border(LineStyle::none().fill('─').junction('─'));

/// Breaks a paragraph into lines of at most [`WIDTH`], each behind `indent` spaces but the first.
pub(crate) fn wrap(paragraph: &str, indent: usize) -> String {
    let mut text = String::new();
    let mut column = 0;
    for word in paragraph.split(' ') {
        let length = word.chars().count();
        if column > 0 && column + 1 + length > WIDTH {
            text.push('\n');
            text.push_str(&" ".repeat(indent));
            column = indent;
        } else if column > 0 {
            text.push(' ');
            column += 1;
        }
        text.push_str(word);
        column += length;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_are_broken_between_words() {
        let wrapped = wrap(&"word ".repeat(60), 2);
        assert_eq!(wrapped.lines().count(), 3);
        for line in wrapped.lines() {
            assert!(line.chars().count() <= WIDTH, "{line}");
        }
        assert!(wrapped.lines().nth(1).unwrap().starts_with("  word"));
        assert_eq!(wrapped.split_whitespace().count(), 60);
        assert_eq!(wrap("×", 4), "×");
    }
}
