//! Values with units.

use std::time::Duration;
use units::Rate;

/// `1Gbit`, `50MiB/s`.
pub(super) fn rate(text: &str) -> Result<Rate, String> {
    match text.parse::<Rate>() {
        Ok(Rate(0)) => Err("nothing moves at that rate".to_owned()),
        Ok(rate) => Ok(rate),
        Err(error) => Err(error.to_string()),
    }
}

/// A time that is more than nothing.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    match patience(text)? {
        Duration::ZERO => Err("a pause of nothing cannot be had".to_owned()),
        time => Ok(time),
    }
}

/// `20ms`, `1.5s`, `500us`; `0s` is none at all.
pub(super) fn patience(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time; write one like 20ms, 500us or 1s");
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
    let number: f64 = text[..split].parse().map_err(|_| wrong())?;
    let seconds = match text[split..].trim() {
        "us" | "µs" => number / 1e6,
        "ms" => number / 1e3,
        "s" => number,
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(seconds).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        assert_eq!(duration("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(duration("0.5 s"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("500us"), Ok(Duration::from_micros(500)));
        for bad in ["", "20", "ms", "-1ms", "1h", "0ms", "1e3ms", "99999999999999999999s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        assert_eq!(patience("0s"), Ok(Duration::ZERO));
        assert!(patience("0").is_err());
    }
}
