//! What whimbrel is to reach, and whether it does: medians of one bench, each beside the best that QEMU has.

use crate::{
    contender::{COPY, Contender},
    link::Link,
    results::Results,
    run::Run,
    stats::{median, ratio},
    workload::Workload,
};

/// The contender that the figures are of: pre-copy, as QEMU's is.
const OURS: &str = "whimbrel-pre-copy";
const UNCOMPRESSED: &str = "whimbrel-uncompressed";

/// Bytes on the wire as a share of those of QEMU's best mode that does not compress.
const WIRE: [(&str, f64); 5] =
    [("idle", 0.35), ("page-cache", 0.50), ("duplicate", 0.10), ("rewritten", 0.15), ("redis", 0.50)];
/// How many times faster than QEMU's fastest mode; faster than those that do not compress; faster than
/// multifd with zstd.
const FASTER: [(&str, Who, f64); 4] = [
    ("idle", Who::Any, 2.5),
    ("page-cache", Who::Plain, 1.7),
    ("page-cache", Who::Zstd, 1.15),
    ("duplicate", Who::Any, 5.0),
];
/// Nowhere slower than this share of QEMU's fastest mode.
const NEVER_SLOWER: f64 = 0.95;
/// A guest that outruns the link is moved in so many times what all its RAM takes over the link,
const COPIES: f64 = 2.0;
/// and who only computes goes on at this share of its speed.
const COMPUTING: f64 = 0.95;
/// Without compression, of what a plain copy reaches.
const OF_COPY: f64 = 0.80;

/// Of QEMU's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Who {
    Any,
    Plain,
    Zstd,
}

/// One figure: what it is, what it came to, and what it must be at least or at most.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Figure {
    pub(crate) what: String,
    pub(crate) reached: f64,
    pub(crate) wanted: Wanted,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Wanted {
    AtLeast(f64),
    AtMost(f64),
}

impl Figure {
    pub(crate) fn is_reached(&self) -> bool {
        match self.wanted {
            Wanted::AtLeast(least) => self.reached >= least,
            Wanted::AtMost(most) => self.reached <= most,
        }
    }
}

/// The median of those runs that came to their end, where most did.
pub(crate) fn middle(
    results: &Results,
    workload: &str,
    link: Link,
    contender: &str,
    of: fn(&Run) -> Option<f64>,
) -> Option<f64> {
    let runs = || results.of(workload, link.name(), contender);
    let finished = runs().filter(|run| run.finished).count();
    (2 * finished > runs().count()).then(|| median(runs().filter(|run| run.finished).filter_map(of)))?
}

/// The least that any of QEMU's modes needs.
pub(crate) fn best(
    results: &Results,
    workload: &str,
    link: Link,
    who: Who,
    of: fn(&Run) -> Option<f64>,
) -> Option<f64> {
    let theirs = Contender::ALL.into_iter().filter(|c| match who {
        Who::Any => c.is_qemu(),
        Who::Plain => c.is_plain_qemu(),
        Who::Zstd => c.is_zstd_qemu(),
    });
    theirs.filter_map(|c| middle(results, workload, link, c.name, of)).reduce(f64::min)
}

/// All figures for which there are runs.
pub(crate) fn all(results: &Results) -> Vec<Figure> {
    let wire: fn(&Run) -> Option<f64> = |run| Some(run.wire_bytes as f64);
    let time: fn(&Run) -> Option<f64> = |run| Some(run.total_ms);
    let speed: fn(&Run) -> Option<f64> = |run| run.bytes_per_s;
    let ours = |workload: &str, link, of| middle(results, workload, link, OURS, of);
    let mut found = Vec::new();
    let mut add = |what: String, reached: Option<f64>, wanted| {
        found.extend(reached.map(|reached| Figure { what, reached, wanted }));
    };
    for (workload, most) in WIRE {
        for link in Link::ALL {
            let share = |who| ratio(ours(workload, link, wire), best(results, workload, link, who, wire));
            let what = |beside| format!("{workload}, {}: bytes on the wire, of {beside}", link.name());
            add(what("QEMU's best plain mode"), share(Who::Plain), Wanted::AtMost(most));
            add(what("multifd with zstd"), share(Who::Zstd), Wanted::AtMost(1.0));
        }
    }
    for (workload, who, least) in FASTER {
        let link = Link::Gigabit;
        let times = ratio(best(results, workload, link, who, time), ours(workload, link, time));
        let beside = match who {
            Who::Any => "QEMU's fastest mode",
            Who::Plain => "QEMU's plain modes",
            Who::Zstd => "multifd with zstd",
        };
        add(format!("{workload}, {}: times as fast as {beside}", link.name()), times, Wanted::AtLeast(least));
    }
    for link in Link::ALL {
        for (workload, outruns) in Workload::ALL.map(|workload| (workload.name, workload.outruns)) {
            // Nobody is as fast there as who moves each page once, after the guest: by post-copy.
            if outruns {
                let copies = ours(workload, link, |run| Some(run.outran?.copies));
                let what = format!("{workload}, {}: time, in times of RAM ÷ link", link.name());
                add(what, copies, Wanted::AtMost(COPIES));
                let computing = ours(workload, link, |run| Some(run.outran?.computing));
                let what = format!("{workload}, {}: speed of the vCPU that computes", link.name());
                add(what, computing, Wanted::AtLeast(COMPUTING));
                continue;
            }
            let times = ratio(best(results, workload, link, Who::Any, time), ours(workload, link, time));
            let what = format!("{workload}, {}: times as fast as QEMU's fastest mode", link.name());
            add(what, times, Wanted::AtLeast(NEVER_SLOWER));
        }
        let of = |name| middle(results, "incompressible", link, name, speed);
        let what = format!("incompressible, {}: bytes/s without compression, of a plain copy's", link.name());
        add(what, ratio(of(UNCOMPRESSED), of(COPY)), Wanted::AtLeast(OF_COPY));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(contender: &str, wire_bytes: u64, total_ms: f64, finished: bool) -> Run {
        let (workload, link) = ("idle".to_owned(), "1gbit".to_owned());
        Run {
            workload,
            link,
            contender: contender.to_owned(),
            wire_bytes,
            total_ms,
            finished,
            ..Run::default()
        }
    }

    #[test]
    fn each_column_has_its_own_best_of_qemu() {
        let mut results = Results::default();
        results.runs = vec![
            run("whimbrel-pre-copy", 30, 100.0, true),
            run("qemu-pre-copy", 100, 300.0, true),
            run("qemu-multifd", 110, 240.0, true),
            run("qemu-multifd-zstd", 40, 500.0, true),
            // Ended early: no figure of anybody's.
            run("qemu-xbzrle", 1, 1.0, false),
        ];
        let figures: Vec<_> = all(&results).iter().map(|f| (f.reached, f.is_reached())).collect();
        assert_eq!(figures, [(0.30, true), (0.75, true), (2.4, false), (2.4, true)]);
    }

    #[test]
    fn a_contender_that_mostly_does_not_finish_has_no_median() {
        let mut results = Results::default();
        let time = |run: &Run| Some(run.total_ms);
        results.runs = vec![run("c", 1, 5.0, true), run("c", 1, 9.0, false)];
        assert_eq!(middle(&results, "idle", Link::Gigabit, "c", time), None);
        results.runs.push(run("c", 1, 7.0, true));
        assert_eq!(middle(&results, "idle", Link::Gigabit, "c", time), Some(6.0));
    }
}
