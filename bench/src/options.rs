//! The command line.

use crate::{contender::Contender, link::Link, workload::Workload};
use std::{path::PathBuf, time::Duration};

/// Moves the same guest by whimbrel and by QEMU's own migration, in turns, and compares.
#[derive(clap::Parser, Debug)]
#[command(name = "bench")]
pub(crate) struct Options {
    /// How often each contender moves each workload.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) runs: u32,

    /// Only this workload (may be given several times): idle, page-cache, compressible, incompressible,
    /// duplicate, rewritten, redis, compile, hot-under, hot-over; steady (faults, small downtimes), over-1.2,
    /// over-2, over-5 (guests that outrun the link; with -hot behind it most of it where they are hot, with
    /// -2g in 2 GiB), memory (of the agents), pause (of many switchovers, part by part) and
    /// commons (there and back to a host that keeps memory).
    #[arg(long, value_name = "WORKLOAD", value_parser = workload)]
    pub(crate) only: Vec<String>,

    /// Only contenders whose name contains this (may be given several times), such as whimbrel, qemu-multifd,
    /// post-copy.
    #[arg(long, value_name = "NAME", value_parser = contender)]
    pub(crate) contender: Vec<String>,

    /// Only this link.
    #[arg(long)]
    pub(crate) link: Option<Link>,

    /// Also the workloads and contenders that a usual run leaves out.
    #[arg(long)]
    pub(crate) all: bool,

    /// Writes all runs to this file, as one JSON array. Runs that it has already are not run again.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,

    /// Begins no further run after this many minutes.
    #[arg(long, value_name = "N", default_value_t = 38)]
    pub(crate) minutes: u64,

    /// Of `pause`: how often each load is moved by each mode.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) switchovers: u32,

    /// Over how many streams whimbrel sends; without it, over as many as it takes by itself.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) streams: Option<u16>,

    /// Everybody's connections are protected by TLS, whimbrel's and QEMU's. Without this everybody's are in
    /// plaintext.
    #[arg(long)]
    pub(crate) tls: bool,

    /// What the guest does instead, in the words of its kernel command line.
    #[arg(long, value_name = "WORDS")]
    pub(crate) work: Option<String>,
}

/// The workload that is none of a guest: the memory of the agents.
pub(crate) const MEMORY: &str = "memory";

/// Neither is that of its pauses.
pub(crate) const PAUSE: &str = "pause";

/// Nor that of VMs that come back.
pub(crate) const COMMONS: &str = "commons";

impl Options {
    /// Whether a workload is to be measured.
    pub(crate) fn wants(&self, workload: &Workload) -> bool {
        match self.only.is_empty() {
            true => self.all || workload.is_usual(),
            false => self.only.iter().any(|name| name == workload.name),
        }
    }

    /// Whether the memory of the agents is to be measured.
    pub(crate) fn wants_memory(&self) -> bool {
        if self.only.is_empty() { self.all } else { self.only.iter().any(|name| name == MEMORY) }
    }

    /// Whether pauses are to be measured: only if they are asked for, because that takes hours.
    pub(crate) fn wants_pauses(&self) -> bool {
        self.only.iter().any(|name| name == PAUSE)
    }

    /// Whether VMs that come back are to be measured.
    pub(crate) fn wants_commons(&self) -> bool {
        self.only.iter().any(|name| name == COMMONS)
    }

    /// Who is to move a workload, in the order of their turns.
    pub(crate) fn movers(&self, workload: &Workload) -> Vec<Contender> {
        let named = |name: &str| self.contender.iter().any(|part| name.contains(part.as_str()));
        // Who is asked for by name runs, usual or not; so does everybody of a workload that is not usual.
        let all = self.all || !self.contender.is_empty() || !workload.is_usual();
        let names = workload.movers(all);
        let mut movers = Contender::ALL.to_vec();
        movers.retain(|c| names.contains(&c.name) && (self.contender.is_empty() || named(c.name)));
        movers
    }

    /// Over what.
    pub(crate) fn links(&self) -> Vec<Link> {
        self.link.map_or_else(|| Link::ALL.to_vec(), |link| vec![link])
    }

    /// What a guest is to do.
    pub(crate) fn words<'a>(&'a self, workload: &Workload, link: Link) -> &'a str {
        self.work.as_deref().unwrap_or(workload.words(link))
    }

    /// When to begin no further run.
    pub(crate) fn limit(&self) -> Duration {
        Duration::from_secs(self.minutes * 60)
    }
}

fn workload(name: &str) -> Result<String, String> {
    let names: Vec<_> =
        Workload::ALL.iter().map(|workload| workload.name).chain([MEMORY, PAUSE, COMMONS]).collect();
    match names.contains(&name) {
        true => Ok(name.to_owned()),
        false => Err(format!("there are {}", names.join(", "))),
    }
}

fn contender(part: &str) -> Result<String, String> {
    match Contender::ALL.iter().any(|contender| contender.name.contains(part)) {
        true => Ok(part.to_owned()),
        false => Err(format!("there are {}", Contender::ALL.map(|contender| contender.name).join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn parsed(words: &str) -> Options {
        Options::try_parse_from(format!("bench {words}").split_whitespace()).unwrap()
    }

    fn find(name: &str) -> Workload {
        *Workload::ALL.iter().find(|workload| workload.name == name).unwrap()
    }

    #[test]
    fn a_usual_run_leaves_out_what_is_not_usual() {
        let usual = parsed("");
        assert!(usual.wants(&find("idle")) && !usual.wants(&find("steady")) && !usual.wants_memory());
        assert_eq!(usual.links(), Link::ALL);
        let all = parsed("--all");
        assert!(all.wants(&find("steady")) && all.wants_memory());
        assert!(all.movers(&find("idle")).len() > usual.movers(&find("idle")).len());
    }

    #[test]
    fn what_is_named_is_all_that_runs() {
        let some =
            parsed("--only steady --only redis --link 1gbit --contender qemu-multifd --contender hybrid");
        assert!(some.wants(&find("steady")) && some.wants(&find("redis")) && !some.wants(&find("idle")));
        assert_eq!(some.links(), [Link::Gigabit]);
        let names = |name| some.movers(&find(name)).iter().map(|mover| mover.name).collect::<Vec<_>>();
        assert_eq!(names("redis"), ["qemu-multifd", "qemu-multifd-zstd", "whimbrel-hybrid"]);
        assert_eq!(parsed("--only steady").movers(&find("steady")).len(), 5);
    }

    #[test]
    fn unknown_names_are_refused() {
        for words in ["--only idel", "--contender quemu", "--link 10gbit", "--runs 0"] {
            assert!(Options::try_parse_from(format!("bench {words}").split_whitespace()).is_err(), "{words}");
        }
    }
}
