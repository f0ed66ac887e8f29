//! The formats of `/proc` (`proc(5)`), taken apart: the only place that knows them, `maps` and cgroups apart.

use std::io;

/// `/proc/PID/stat` or `/proc/PID/task/TID/stat`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stat {
    /// The program's or the thread's name.
    pub name: String,
    /// What it does: `R`, `S`, `T` and so on.
    pub state: char,
    fields: Vec<String>,
}

impl Stat {
    /// Reads its text. The name stands in parentheses and may itself hold parentheses and blanks.
    pub fn parse(text: &str) -> io::Result<Self> {
        let odd = || io::Error::new(io::ErrorKind::InvalidData, format!("odd content of stat: {text}"));
        let (name, rest) =
            text.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')')).ok_or_else(odd)?;
        let fields: Vec<String> = rest.split_whitespace().map(str::to_owned).collect();
        let state = fields.first().and_then(|state| state.chars().next()).ok_or_else(odd)?;
        Ok(Self { name: name.to_owned(), state, fields })
    }

    /// Field `n`, as the manual counts from 1 on; the numbers begin with the fourth.
    pub fn number(&self, n: usize) -> io::Result<u64> {
        let number =
            n.checked_sub(FIRST).and_then(|at| self.fields.get(at)).and_then(|field| field.parse().ok());
        number.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("stat has no number {n}")))
    }

    /// The same where it may be below zero.
    pub fn word(&self, n: usize) -> Option<&str> {
        n.checked_sub(FIRST).and_then(|at| self.fields.get(at)).map(String::as_str)
    }

    /// Whether somebody has stopped it: a signal or a debugger.
    pub fn is_stopped(&self) -> bool {
        matches!(self.state, 'T' | 't')
    }

    /// Whether it has ended, reaped or not.
    pub fn has_ended(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }
}

/// The manual's number of the first field behind the name.
const FIRST: usize = 3;

/// What kind of thread it is, in the kernel's flags.
pub(crate) const FLAGS: usize = 9;

/// Page faults that needed no disk.
pub const MINOR_FAULTS: usize = 10;

/// When it started, in ticks since the host did.
pub const START_TIME: usize = 22;

/// What stands behind `key:` in a text with a key a line: `status`, `meminfo`, `smaps`.
pub fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let value = |line: &'a str| Some(line.strip_prefix(key)?.strip_prefix(':')?.trim());
    text.lines().find_map(value)
}

/// The same where it is an amount: `12 kB`. In bytes.
pub fn bytes(text: &str, key: &str) -> Option<u64> {
    amount(value(text, key)?)
}

/// `12 kB` in bytes.
pub(crate) fn amount(value: &str) -> Option<u64> {
    value.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1 << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_look_like_the_rest() {
        let text = "4711 (a) R (b) S 1 4711 4711 0 -1 4194304 103 0 0 0 7 8 9 10 20 0 1 0 99 12";
        let stat = Stat::parse(text).unwrap();
        assert_eq!((stat.name.as_str(), stat.state), ("a) R (b", 'S'));
        assert_eq!((stat.number(MINOR_FAULTS).unwrap(), stat.number(START_TIME).unwrap()), (103, 99));
        assert!(!stat.is_stopped() && !stat.has_ended());
        for n in [0, 3, 1000] {
            assert!(stat.number(n).is_err(), "{n}");
        }
        for odd in ["", "4711 a S 1", "4711 (a)", "4711 (a) "] {
            assert!(Stat::parse(odd).is_err(), "{odd}");
        }
    }

    #[test]
    fn values_are_found_by_their_whole_key() {
        let text = "VmLckPages:\t1\nVmLck:\t   12 kB\nTgid:\t4711\nHugePages_Total:       0\nVmPin:\tmuch\n";
        assert_eq!(value(text, "Tgid"), Some("4711"));
        assert_eq!((value(text, "VmLck"), bytes(text, "VmLck")), (Some("12 kB"), Some(12 << 10)));
        assert_eq!((value(text, "Vm"), bytes(text, "VmPin"), bytes(text, "Tgid")), (None, None, None));
    }
}
