//! Numbers and tables for people.

use serde::Serialize;
use std::time::Duration;

/// `1234567` as `1,234,567`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut words = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            words.push(',');
        }
        words.push(digit);
    }
    words
}

/// A count with its noun.
pub(crate) fn counted(number: u64, one: &str, many: &str) -> String {
    format!("{} {}", count(number), if number == 1 { one } else { many })
}

/// A time with three digits that matter: `8.41 ms`, `2.31 s`, `3 min 12 s`.
pub(crate) fn millis(ms: f64) -> String {
    let three = |value: f64, unit: &str| {
        let decimals = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
        format!("{value:.decimals$} {unit}")
    };
    if ms <= 0.0 {
        "0 ms".to_owned()
    } else if ms < 1.0 {
        format!("{:.0} µs", ms * 1e3)
    } else if ms < 1e3 {
        three(ms, "ms")
    } else if ms < 120e3 {
        three(ms / 1e3, "s")
    } else {
        let seconds = (ms / 1e3) as u64;
        format!("{} min {} s", seconds / 60, seconds % 60)
    }
}

/// The same for microseconds.
pub(crate) fn micros(us: u64) -> String {
    millis(us as f64 / 1e3)
}

/// How long until the end, without false precision.
pub(crate) fn left(time: Duration) -> String {
    match time.as_secs() {
        0 => "less than 1 s left".to_owned(),
        s @ 1..120 => format!("{s} s left"),
        s => format!("{} min left", s / 60),
    }
}

/// One JSON object, its fields in the order in which they are documented.
pub(crate) fn json(value: &impl Serialize) -> String {
    // What is written here is plain data with string keys, which cannot fail; if it ever does, a program that
    // reads this finds no JSON, and says so.
    serde_json::to_string(value).unwrap_or_else(|error| error.to_string())
}

/// Rows with their columns aligned; the last column is as long as it likes.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut words = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line += &format!("{cell:width$}  ");
        }
        words += line.trim_end();
        words.push('\n');
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_people_read_them() {
        let counts = [(0, "0"), (999, "999"), (1000, "1,000"), (1234567, "1,234,567")];
        for (number, words) in counts {
            assert_eq!(count(number), words);
        }
        let times = [
            (0.25, "250 µs"),
            (8.412, "8.41 ms"),
            (84.12, "84.1 ms"),
            (841.2, "841 ms"),
            (2310.0, "2.31 s"),
            (192e3, "3 min 12 s"),
        ];
        for (ms, words) in times {
            assert_eq!(millis(ms), words);
        }
        assert_eq!(left(Duration::from_millis(300)), "less than 1 s left");
        assert_eq!(left(Duration::from_secs(4)), "4 s left");
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [vec!["NAME".into(), "STATE".into()], vec!["database".into(), "running".into()]];
        assert_eq!(table(&rows), "NAME      STATE\ndatabase  running\n");
    }
}
