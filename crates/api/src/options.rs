//! What is asked of a migration. A field here is an option of `whimbrel migrate` and `plan`, a value of the
//! agent's API and what the engine reads: its name, default and help are written down once.

use crate::{Limit, Way};
use serde::{Deserialize, Serialize};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};
use units::Rate;

/// How memory travels relative to the switchover.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Pre-copy until the pause is short enough; then, if allowed, post-copy.
    #[default]
    Auto,
    /// All memory while the VM runs here.
    PreCopy,
    /// All memory while the VM runs there.
    PostCopy,
    /// One pass while it runs here, the rest while it runs there.
    Hybrid,
}

impl Mode {
    /// As `--mode` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::PreCopy => "pre-copy",
            Self::PostCopy => "post-copy",
            Self::Hybrid => "hybrid",
        }
    }

    /// What the user demands; none of `auto`.
    pub fn demanded(self) -> Option<Way> {
        match self {
            Self::Auto => None,
            Self::PreCopy => Some(Way::PreCopy),
            Self::Hybrid => Some(Way::Hybrid),
            Self::PostCopy => Some(Way::PostCopy),
        }
    }
}

impl From<Way> for Mode {
    fn from(way: Way) -> Self {
        match way {
            Way::PreCopy => Self::PreCopy,
            Way::Hybrid => Self::Hybrid,
            Way::PostCopy => Self::PostCopy,
        }
    }
}

/// What pages may be compressed with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// What moves most guest memory a second, measured on the way.
    #[default]
    Auto,
    /// Nothing.
    None,
    /// LZ4 always.
    Lz4,
    /// Zstandard always, at the level that suits the link.
    Zstd,
}

/// What must be in the spool when the VM changes hands before all its memory is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Robust {
    /// All that the target lacks: from then on the source may be lost.
    #[default]
    Strict,
    /// It is written afterwards; how much is missing is shown.
    Relaxed,
}

impl Robust {
    /// As `--robust` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Relaxed => "relaxed",
        }
    }
}

/// `POST /v1/vms/NAME/migrate`, and the options of `migrate` and `plan`. Times are in milliseconds there.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
#[serde(deny_unknown_fields)]
pub struct MigrateOptions {
    /// The host to move it to: a name from the agent's `[peers]`, or ADDR:PORT; `self`: another QEMU of this
    /// host takes it over, and memory that is shared stays where it is.
    #[cfg_attr(feature = "clap", arg(long, value_name = "HOST"))]
    pub to: String,
    /// How memory travels.
    #[cfg_attr(feature = "clap", arg(long, value_enum, default_value_t))]
    #[serde(default)]
    pub mode: Mode,
    /// Let `auto` end in post-copy when pre-copy does not get there.
    #[cfg_attr(feature = "clap", arg(long))]
    #[serde(default)]
    pub allow_post_copy: bool,
    /// Let a host take it whose QEMU is older than the one that runs it. If that cannot read its device
    /// state, it stays here.
    #[cfg_attr(feature = "clap", arg(long))]
    #[serde(default)]
    pub allow_older_qemu: bool,
    /// With `--to self`: the QEMU that takes it over [default: the agent's].
    #[cfg_attr(feature = "clap", arg(long, value_name = "FILE"))]
    #[serde(default)]
    pub qemu: Option<PathBuf>,
    /// The pause that is acceptable, like 20ms.
    #[cfg_attr(
        feature = "clap",
        arg(long, value_name = "TIME", value_parser = time::some, default_value = "20ms")
    )]
    #[serde(default = "time::max_downtime", rename = "max_downtime_ms", with = "time::ms")]
    pub max_downtime: Duration,
    /// How long all of it may take, like 60s.
    #[cfg_attr(feature = "clap", arg(long, value_name = "TIME", value_parser = time::some))]
    #[serde(default, rename = "max_time_ms", with = "time::ms_if")]
    pub max_time: Option<Duration>,
    /// A guest that writes faster than the link carries is slowed, so that pre-copy ends: whoever writes to
    /// one more page waits, but never longer than this at a time, like 5ms.
    #[cfg_attr(
        feature = "clap",
        arg(long, value_name = "TIME", value_parser = time::some, default_value = "5ms")
    )]
    #[serde(default = "time::max_stall", rename = "max_stall_ms", with = "time::ms")]
    pub max_stall: Duration,
    /// Where not all of --max-downtime, --max-time and --max-stall can hold: which is kept first. The last
    /// one is violated first, and that is said before anything moves.
    #[cfg_attr(
        feature = "clap",
        arg(
            long,
            value_name = "LIMITS",
            value_enum,
            value_delimiter = ',',
            default_value = "downtime,time,stall"
        )
    )]
    #[serde(default)]
    pub keep: Vec<Limit>,
    /// A directory on a datastore that both hosts reach: memory goes into a file there, too, while it goes
    /// over the network, so that the target can finish from it if this host is lost. With it, `auto` may end
    /// in post-copy [default: the agent's, if it has one].
    #[cfg_attr(feature = "clap", arg(long, value_name = "DIR"))]
    #[serde(default)]
    pub spool: Option<PathBuf>,
    /// What must be in that file when the VM changes hands before all its memory is there [default: strict].
    #[cfg_attr(feature = "clap", arg(long, value_name = "HOW", value_enum))]
    #[serde(default)]
    pub robust: Option<Robust>,
    /// How long a link that was lost is waited for, with the VM running on here, like 60s; 0s ends the
    /// migration at once. Once the VM may run on the target it is waited for as long as it takes.
    #[cfg_attr(
        feature = "clap",
        arg(long, value_name = "TIME", value_parser = time::any, default_value = "60s")
    )]
    #[serde(default = "time::give_up", rename = "give_up_ms", with = "time::ms")]
    pub give_up: Duration,
    /// The most that may be put on the wire, like 1Gbit or 50MiB/s.
    #[cfg_attr(feature = "clap", arg(long, value_name = "RATE", value_parser = rate))]
    #[serde(default, with = "bytes_per_s")]
    pub bandwidth: Option<Rate>,
    /// How many data connections [default: from 2 to the number of cores, 8 at most: as many as it pays to
    /// use].
    #[cfg_attr(
        feature = "clap",
        arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))
    )]
    #[serde(default)]
    pub streams: Option<u16>,
    /// What pages may be compressed with. `auto` finds out what moves most over this link.
    #[cfg_attr(feature = "clap", arg(long, value_enum, default_value_t))]
    #[serde(default)]
    pub compress: Compression,
    /// The most cores that may compress at a time [default: those that the VM leaves idle, at least 1].
    #[cfg_attr(
        feature = "clap",
        arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))
    )]
    #[serde(default)]
    pub cpu: Option<u32>,
    /// Compare all memory of both sides while the VM is stopped. The command has it in `migrate` alone.
    #[cfg_attr(feature = "clap", arg(skip))]
    #[serde(default)]
    pub verify: bool,
}

impl MigrateOptions {
    /// The most streams that can be asked for. Each has a thread on both sides; beyond the number of cores
    /// they only take turns.
    pub const MOST_STREAMS: u16 = 64;

    /// A migration to this host with every option left out.
    pub fn to(host: impl Into<String>) -> Self {
        Self {
            to: host.into(),
            mode: Mode::default(),
            allow_post_copy: false,
            allow_older_qemu: false,
            qemu: None,
            max_downtime: time::max_downtime(),
            max_time: None,
            max_stall: time::max_stall(),
            keep: Vec::new(),
            spool: None,
            robust: None,
            give_up: time::give_up(),
            bandwidth: None,
            streams: None,
            compress: Compression::default(),
            cpu: None,
            verify: false,
        }
    }

    /// Whether a guest may run before all its memory is there. With a file it is safe, so it need not be
    /// allowed.
    pub fn post_copy(&self) -> bool {
        match self.mode {
            Mode::Auto => self.allow_post_copy || self.spool.is_some(),
            Mode::PreCopy => false,
            Mode::PostCopy | Mode::Hybrid => true,
        }
    }

    /// The file on a datastore: its directory, and what must be in it when the VM changes hands.
    pub fn spooled(&self) -> Option<(&Path, Robust)> {
        self.spool.as_deref().map(|directory| (directory, self.robust.unwrap_or_default()))
    }

    /// The limits in the order in which they are kept: what was named first, then the others as usual.
    pub fn kept(&self) -> [Limit; 3] {
        let mut kept = Limit::USUAL;
        let rank = |limit: &Limit| self.keep.iter().position(|first| first == limit);
        kept.sort_by_key(|limit| rank(limit).unwrap_or(self.keep.len()));
        kept
    }
}

/// `1Gbit`, `50MiB/s`.
#[cfg(feature = "clap")]
fn rate(text: &str) -> Result<Rate, String> {
    match text.parse::<Rate>() {
        Ok(Rate(0)) => Err("nothing moves at that rate".to_owned()),
        Ok(rate) => Ok(rate),
        Err(error) => Err(error.to_string()),
    }
}

/// A rate as a number of bytes a second.
mod bytes_per_s {
    use super::Rate;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(rate: &Option<Rate>, to: S) -> Result<S::Ok, S::Error> {
        rate.map(|rate| rate.0).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Rate>, D::Error> {
        Ok(Option::<u64>::deserialize(from)?.map(Rate))
    }
}

/// Times: their defaults, as milliseconds on the wire, and as words of the command line.
mod time {
    use std::time::Duration;

    /// The longest that anything is taken to be allowed: an instant further away could not be told.
    const A_YEAR_MS: f64 = 365.0 * 86400.0 * 1000.0;

    /// What a TCP peer takes for a slow packet.
    pub(super) fn max_downtime() -> Duration {
        Duration::from_millis(20)
    }

    /// Less than a disk takes now and then.
    pub(super) fn max_stall() -> Duration {
        Duration::from_millis(5)
    }

    /// A switch that restarts takes less.
    pub(super) fn give_up() -> Duration {
        Duration::from_secs(60)
    }

    fn of_ms<E: serde::de::Error>(ms: f64) -> Result<Duration, E> {
        Duration::try_from_secs_f64(ms.min(A_YEAR_MS) / 1000.0)
            .map_err(|_| E::custom(format!("a time of {ms} ms is not more than nothing")))
    }

    pub(super) mod ms {
        use serde::{Deserialize, Deserializer, Serializer};
        use std::time::Duration;

        pub(in super::super) fn serialize<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
            to.serialize_f64(time.as_secs_f64() * 1000.0)
        }

        pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
            from: D,
        ) -> Result<Duration, D::Error> {
            super::of_ms(f64::deserialize(from)?)
        }
    }

    pub(super) mod ms_if {
        use serde::{Deserialize, Deserializer, Serialize, Serializer};
        use std::time::Duration;

        pub(in super::super) fn serialize<S: Serializer>(
            time: &Option<Duration>,
            to: S,
        ) -> Result<S::Ok, S::Error> {
            time.map(|time| time.as_secs_f64() * 1000.0).serialize(to)
        }

        pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
            from: D,
        ) -> Result<Option<Duration>, D::Error> {
            Option::<f64>::deserialize(from)?.map(super::of_ms).transpose()
        }
    }

    /// A time that is more than nothing.
    #[cfg(any(test, feature = "clap"))]
    pub(super) fn some(text: &str) -> Result<Duration, String> {
        match any(text)? {
            Duration::ZERO => Err("a pause of nothing cannot be had".to_owned()),
            time => Ok(time),
        }
    }

    /// `20ms`, `1.5s`, `500us`; `0s` is none at all.
    #[cfg(any(test, feature = "clap"))]
    pub(super) fn any(text: &str) -> Result<Duration, String> {
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        assert_eq!(time::some("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(time::some("0.5 s"), Ok(Duration::from_millis(500)));
        assert_eq!(time::some("500us"), Ok(Duration::from_micros(500)));
        for bad in ["", "20", "ms", "-1ms", "1h", "0ms", "1e3ms", "99999999999999999999s"] {
            assert!(time::some(bad).is_err(), "{bad}");
        }
        assert_eq!(time::any("0s"), Ok(Duration::ZERO));
        assert!(time::any("0").is_err());
    }

    #[test]
    fn what_is_left_out_has_its_default_and_the_rest_survives() {
        let parse = |text: &str| serde_json::from_str::<MigrateOptions>(text);
        assert_eq!(parse("{\"to\":\"b\"}").unwrap(), MigrateOptions::to("b"));
        assert!(parse("{}").is_err() && parse("{\"to\":\"b\",\"max_downtme_ms\":1}").is_err());
        let asked = MigrateOptions {
            mode: Mode::Hybrid,
            max_downtime: Duration::from_micros(1500),
            max_time: Some(Duration::from_secs(9)),
            bandwidth: Some(Rate(5)),
            ..MigrateOptions::to("b")
        };
        let wire = serde_json::to_value(&asked).unwrap();
        assert_eq!((&wire["max_downtime_ms"], &wire["bandwidth"]), (&1.5.into(), &5.into()));
        assert_eq!(parse(&wire.to_string()).unwrap(), asked);
        assert_eq!(parse("{\"to\":\"b\",\"give_up_ms\":0}").unwrap().give_up, Duration::ZERO);
        assert!(parse("{\"to\":\"b\",\"give_up_ms\":-1}").is_err());
    }

    #[test]
    fn limits_are_kept_in_the_order_in_which_they_are_named() {
        use Limit::{Downtime, Stall, Time};
        let kept = |keep: &[Limit]| MigrateOptions { keep: keep.to_vec(), ..MigrateOptions::to("b") }.kept();
        assert_eq!(kept(&[]), Limit::USUAL);
        assert_eq!(kept(&[Stall]), [Stall, Downtime, Time]);
        assert_eq!(kept(&[Time, Stall, Downtime]), [Time, Stall, Downtime]);
    }
}
