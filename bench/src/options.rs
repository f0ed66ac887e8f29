//! The command line.

use std::{path::PathBuf, time::Duration};
use units::Rate;

/// Moves the same guest by whimbrel and by QEMU's own migration, in turns, and compares.
#[derive(clap::Parser, Debug)]
#[command(name = "bench")]
pub(crate) struct Options {
    /// How often each contender runs.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) runs: u32,

    /// Only contenders whose name contains this (may be given several times): whimbrel-pre-copy, whimbrel-post-copy,
    /// whimbrel-hybrid, qemu-default, qemu-multifd, memory.
    #[arg(long, value_name = "NAME")]
    pub(crate) only: Vec<String>,

    /// Writes all runs to this file, as one JSON array.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,

    /// Begins no further run after this many minutes.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(crate) minutes: u64,

    /// Over how many streams whimbrel sends; without it, over as many as it takes by itself.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) streams: Option<u16>,

    /// Whimbrel's connections are protected by TLS, as they are by default. Without this they are in plaintext, as QEMU's are
    /// unless it is set up otherwise: like is compared with like.
    #[arg(long)]
    pub(crate) tls: bool,

    /// How fast the hosts' link is, like 1Gbit, kept to by a token bucket on both hosts' network cards; without it, as fast as it
    /// goes.
    #[arg(long, value_name = "RATE")]
    pub(crate) link: Option<Rate>,

    /// What the guest does, in the words of its kernel command line.
    #[arg(long, value_name = "WORDS", default_value = crate::guest::WORK)]
    pub(crate) work: String,
}

impl Options {
    /// Whether something of this name is to run.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part.as_str()))
    }

    /// When to begin no further run.
    pub(crate) fn limit(&self) -> Duration {
        Duration::from_secs(self.minutes * 60)
    }
}
