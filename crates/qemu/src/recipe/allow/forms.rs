//! The forms that a value may have. A value of a known form can be nothing but what the form says: never a
//! path, a descriptor or an address that somebody is called at.

use super::super::options::{is_off, is_on};
use std::net::IpAddr;

/// The longest text that a device shows its guest. QEMU's own bounds are lower: a disk's serial number has 36
/// bytes at most.
const LONGEST_TEXT: usize = 256;

/// The longest name of an object, and of a word from a list.
pub(in super::super) const LONGEST_NAME: usize = 63;

/// What the ids of our own back ends begin with: a device of the recipe that named one would speak to our
/// monitor.
pub(in super::super) const RESERVED: &str = "whimbrel-";

/// What a value must look like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Form {
    /// `on` or `off`, by whichever of its names.
    Switch,
    /// The same, or `auto`.
    Auto,
    /// A number, decimal or hexadecimal.
    Number,
    /// A number of bytes, such as `64M`.
    Size,
    /// What the recipe calls an object: no name of a file, as it has no slash.
    Id,
    /// Where a device is on its bus: `06.0`, `0x1e.1`, `2.1`.
    Place,
    /// What the guest is shown.
    Text,
    /// `52:54:00:12:34:56`.
    Mac,
    /// An address in a network that QEMU makes up for the guest: `10.0.2.0/24`, `fd00::2`.
    Address,
    /// A UUID, or `auto`.
    Uuid,
    /// Numbers of vCPUs: `0-3`.
    Range,
    /// `utc`, `localtime`, or a date with a time.
    Moment,
    /// A number of bits, or `auto`.
    Shift,
    /// One of these words.
    Word(&'static [&'static str]),
    /// `off`: switched on, it would do harm.
    Off,
    /// Nothing at all: the name of a file would stand there.
    Empty,
}

impl Form {
    /// Whether `value` has this form.
    pub(super) fn fits(self, value: &str) -> bool {
        let all = |allowed: fn(&u8) -> bool| value.as_bytes().iter().all(allowed);
        match self {
            Self::Switch => is_on(value) || is_off(value),
            Self::Auto => is_on(value) || is_off(value) || value == "auto",
            Self::Number => is_number(value.strip_prefix('-').unwrap_or(value)),
            Self::Size => {
                is_number(value.strip_suffix(|unit: char| "bBkKmMgGtT".contains(unit)).unwrap_or(value))
            }
            Self::Id => is_id(value) && !value.starts_with(RESERVED),
            Self::Place => {
                (1..=LONGEST_NAME).contains(&value.len())
                    && all(|byte| byte.is_ascii_hexdigit() || b".x".contains(byte))
            }
            Self::Text => value.len() <= LONGEST_TEXT && !value.contains(char::is_control),
            Self::Mac => value.len() == 17 && all(|byte| byte.is_ascii_hexdigit() || *byte == b':'),
            Self::Address => {
                let (address, bits) = value.split_once('/').unwrap_or((value, "0"));
                address.parse::<IpAddr>().is_ok() && bits.parse::<u8>().is_ok_and(|bits| bits <= 128)
            }
            Self::Uuid => {
                value == "auto" || value.len() == 36 && all(|byte| byte.is_ascii_hexdigit() || *byte == b'-')
            }
            Self::Range => {
                let (from, to) = value.split_once('-').unwrap_or((value, value));
                is_number(from) && is_number(to)
            }
            Self::Moment => {
                matches!(value, "utc" | "localtime")
                    || (10..=19).contains(&value.len())
                        && all(|byte| byte.is_ascii_digit() || b"-:T".contains(byte))
            }
            Self::Shift => value == "auto" || value.len() < 3 && is_number(value),
            Self::Word(words) => words.contains(&value),
            Self::Off => is_off(value),
            Self::Empty => value.is_empty(),
        }
    }

    /// What the form wants, for an error message.
    pub(super) fn wants(self) -> String {
        match self {
            Self::Switch => "on or off".to_owned(),
            Self::Auto => "on, off or auto".to_owned(),
            Self::Number => "a number".to_owned(),
            Self::Size => "a size such as 64M".to_owned(),
            Self::Id => format!("an id: letters, digits, '-', '_' and '.', not beginning with {RESERVED:?}"),
            Self::Place => "an address such as 06.0".to_owned(),
            Self::Text => format!("text of at most {LONGEST_TEXT} bytes without control characters"),
            Self::Mac => "a MAC address".to_owned(),
            Self::Address => "an IP address, with /LENGTH if it is a network".to_owned(),
            Self::Uuid => "a UUID".to_owned(),
            Self::Range => "a range of numbers such as 0-3".to_owned(),
            Self::Moment => "utc, localtime or a date such as 2026-06-17T16:01:21".to_owned(),
            Self::Shift => "a number of bits or auto".to_owned(),
            Self::Word(words) => format!("one of {}", words.join(", ")),
            Self::Off => "off".to_owned(),
            Self::Empty => "empty".to_owned(),
        }
    }
}

/// Digits, or hexadecimal digits after `0x`; no longer than 64 bits are.
fn is_number(text: &str) -> bool {
    let (digits, is_digit): (_, fn(&u8) -> bool) = match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(digits) => (digits, u8::is_ascii_hexdigit),
        None => (text, u8::is_ascii_digit),
    };
    (1..=20).contains(&digits.len()) && digits.as_bytes().iter().all(is_digit)
}

pub(in super::super) fn is_word(text: &str) -> bool {
    (1..=LONGEST_NAME).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

/// What QEMU accepts as an id, and what cannot be taken for another option.
pub(crate) fn is_id(text: &str) -> bool {
    is_word(text) && text.as_bytes()[0].is_ascii_alphabetic()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_takes_what_it_says_and_no_path() {
        let table: &[(Form, &[&str], &[&str])] = &[
            (Form::Switch, &["on", "off", "yes", "n", "true"], &["", "auto", "1", "ON"]),
            (Form::Auto, &["auto", "on"], &["", "maybe"]),
            (
                Form::Number,
                &["0", "-1", "0x1F", "18446744073709551615"],
                &["", "-", "0x", "1k", "1 ", "--1", "1e3"],
            ),
            (Form::Size, &["512", "64M", "0x10k", "4G"], &["", "M", "1MB", "-1", "64M "]),
            (
                Form::Id,
                &["net0", "pcie.0", "a_b-c"],
                &["", "0a", "a b", "a,b", "whimbrel-qmp", "#block1", "a[0]"],
            ),
            (Form::Place, &["06.0", "0x1e.1", "2.1", "6"], &["", "g", "0000:00:01.0"]),
            (Form::Text, &["", "disk 1", "QEMU/KVM", "a,b"], &["a\nb", "a\0b", "\u{1b}[2J"]),
            (Form::Mac, &["52:54:00:12:34:56"], &["", "52:54:00:12:34", "52:54:00:12:34:5g"]),
            (Form::Address, &["10.0.2.0/24", "fd00::", "::1"], &["", "host", "10.0.2.3,x", "10.0.2.0/129"]),
            (Form::Uuid, &["auto", "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"], &["", "324e6eaf"]),
            (Form::Range, &["0", "0-3"], &["", "-3", "0-", "0-3-5", "a-b"]),
            (Form::Moment, &["utc", "2026-06-17T16:01:21", "2026-06-17"], &["", "now", "2026"]),
            (Form::Shift, &["auto", "7", "10"], &["", "x", "100", "on"]),
            (Form::Word(&["stop", "report"]), &["stop"], &["", "sto", "stop "]),
            (Form::Off, &["off", "no"], &["on", "", "auto"]),
            (Form::Empty, &[""], &[" ", "x"]),
        ];
        for (form, taken, refused) in table {
            for value in *taken {
                assert!(form.fits(value), "{form:?} {value:?}");
            }
            for value in *refused {
                assert!(!form.fits(value), "{form:?} {value:?}");
            }
            if *form != Form::Text {
                for path in ["/etc/shadow", "../x", "/", "a/b", "/dev/fd/3"] {
                    assert!(!form.fits(path), "{form:?} {path:?}");
                }
            }
            assert!(!form.fits(&"a".repeat(1000)), "{form:?}");
        }
    }
}
