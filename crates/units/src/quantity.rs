//! Amounts and speeds.

use std::{
    fmt,
    iter::Sum,
    ops::{Add, AddAssign},
    str::FromStr,
    time::Duration,
};

/// An amount of memory or traffic, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Bytes(pub u64);

impl Bytes {
    /// Time to move this much at `rate`; `None` when the link is stalled.
    pub fn time_at(self, rate: Rate) -> Option<Duration> {
        (rate.0 > 0).then(|| Duration::from_secs_f64(self.0 as f64 / rate.0 as f64))
    }

    /// The speed at which this much was moved in `time`.
    pub fn per(self, time: Duration) -> Rate {
        let seconds = time.as_secs_f64();
        Rate(if seconds > 0.0 { (self.0 as f64 / seconds) as u64 } else { 0 })
    }
}

impl Add for Bytes {
    type Output = Bytes;
    fn add(self, other: Bytes) -> Bytes {
        Bytes(self.0 + other.0)
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, other: Bytes) {
        self.0 += other.0;
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Bytes>>(all: I) -> Bytes {
        Bytes(all.map(|b| b.0).sum())
    }
}

/// In the largest binary unit that leaves at least one before the point: `1.5 GiB`.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 < 1024 {
            return f.pad(&format!("{} B", self.0));
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        f.pad(&format!("{value:.1} {}", UNITS[unit]))
    }
}

/// Accepts `512MiB`, `1 GiB`, `4096`, and the decimal `MB`; a unit without `B` (`1G`) is binary, as with
/// QEMU's `-m`.
impl FromStr for Bytes {
    type Err = BadQuantity;

    fn from_str(text: &str) -> Result<Self, BadQuantity> {
        let (number, unit) = split(text)?;
        let factor: u64 = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(BadQuantity::Unit(unit.to_owned())),
        };
        scale(number, factor as f64).map(Bytes)
    }
}

/// A speed, in bytes per second.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Rate(pub u64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/s", Bytes(self.0)))
    }
}

/// Accepts what links are sold by (`1Gbit`, `100 Mbit`: decimal bits per second) and bytes per second
/// (`50MiB/s`).
impl FromStr for Rate {
    type Err = BadQuantity;

    fn from_str(text: &str) -> Result<Self, BadQuantity> {
        let text = text.trim();
        let bare = text.strip_suffix("/s").unwrap_or(text);
        let (number, unit) = split(bare)?;
        let bits: f64 = match unit.to_ascii_lowercase().as_str() {
            "bit" | "bps" => 1.0,
            "kbit" | "kbps" => 1e3,
            "mbit" | "mbps" => 1e6,
            "gbit" | "gbps" => 1e9,
            _ => return bare.parse::<Bytes>().map(|b| Rate(b.0)),
        };
        scale(number, bits / 8.0).map(Rate)
    }
}

/// Text that is no amount and no speed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BadQuantity {
    /// It does not begin with a number, or the number is negative or far too large.
    Number(String),
    /// The unit is not known.
    Unit(String),
}

impl fmt::Display for BadQuantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(text) => {
                write!(f, "\"{text}\" is not an amount; write one like 512MiB, 2GiB or 1Gbit")
            }
            Self::Unit(unit) => {
                write!(f, "unknown unit \"{unit}\"; use KiB, MiB, GiB, or kbit, Mbit, Gbit for a rate")
            }
        }
    }
}

impl std::error::Error for BadQuantity {}

fn split(text: &str) -> Result<(f64, &str), BadQuantity> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number = text[..end].parse().map_err(|_| BadQuantity::Number(text.to_owned()))?;
    Ok((number, text[end..].trim()))
}

fn scale(number: f64, factor: f64) -> Result<u64, BadQuantity> {
    let value = number * factor;
    // Beyond 2^60 nothing here is meant seriously, and arithmetic on it could overflow.
    if value < (1u64 << 60) as f64 { Ok(value as u64) } else { Err(BadQuantity::Number(number.to_string())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_as_people_write_them() {
        let table = [
            ("0", 0),
            ("4096", 4096),
            ("1GiB", 1 << 30),
            ("1 GiB", 1 << 30),
            ("1G", 1 << 30),
            ("1.5MiB", 3 << 19),
            ("1GB", 1_000_000_000),
        ];
        for (text, bytes) in table {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for bad in ["", "GiB", "-1", "1 furlong", "1e99", "99999999999999999999TiB", "1.2.3"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_are_bits_or_bytes_by_their_unit() {
        assert_eq!("1Gbit".parse(), Ok(Rate(125_000_000)));
        assert_eq!("100 Mbit/s".parse(), Ok(Rate(12_500_000)));
        assert_eq!("50MiB/s".parse(), Ok(Rate(50 << 20)));
        assert!("fast".parse::<Rate>().is_err());
    }

    #[test]
    fn a_stalled_link_takes_no_known_time() {
        assert_eq!(Bytes(1).time_at(Rate(0)), None);
        assert_eq!(Bytes(500).time_at(Rate(1000)), Some(Duration::from_millis(500)));
        assert_eq!(Bytes(500).per(Duration::ZERO), Rate(0));
    }

    #[test]
    fn amounts_are_shown_in_the_unit_that_fits() {
        let table = [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB")];
        for (bytes, text) in table {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }
}
