//! A VM that comes back to a host which keeps its memory, beside one that comes back to a host without.

use crate::{guest, link::Link, options::Options, stats::median, whimbrel};
use lab::{Lab, Report, Result, Tools, ensure};
use std::{fmt::Write, thread, time::Duration};
use units::Bytes;

/// How long the guest runs on the other host before it comes back.
const AWAY: Duration = Duration::from_secs(20);

const MEMORY: Bytes = Bytes(1 << 30);

/// What the guests do.
const LOADS: [(&str, &str); 2] = [
    ("idle", "whimbrel.fill=512M,content=random whimbrel.check=2M,rate=64K"),
    ("writes 1 MiB/s", "whimbrel.fill=512M,content=random whimbrel.dirty=128M,content=random,rate=1M"),
];

/// What the host keeps that it comes back to.
const KEEPS: [(&str, &str); 2] = [("kept", "50%"), ("nothing kept", "0")];

/// One migration.
#[derive(Clone, Copy)]
struct Way {
    bytes: f64,
    ms: f64,
    pause_ms: f64,
}

/// Moves each load there and back `options.runs` times over a gigabit a second, and tells the medians as
/// Markdown.
pub(crate) fn measure(
    tools: &Tools,
    options: &Options,
    mut tell: impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    tell(
        "## There and back\n\n| guest | way | on the wire | time, ms | pause, ms |\n|---|---|---|---|---|\n",
    )?;
    for (load, words) in LOADS {
        for (name, keep) in KEEPS {
            eprintln!("commons: {load}, {name} …");
            let lab = Lab::new(&["a", "b"])?;
            // Only the first host keeps anything: the way there is always one to a host that was never there.
            let lines =
                |host: &str| if host == "a" { format!("commons.keep = {keep:?}\n") } else { String::new() };
            // Over a connection that is not protected nothing is kept.
            let stage = whimbrel::stage_with(&lab, tools, true, lines)?;
            Link::Gigabit.shape(&lab)?;
            let moved = whimbrel::Moved::boot(stage, guest::start(words, MEMORY), options.streams)?;
            let (mut there, mut back) = (vec![], vec![]);
            for _ in 0..options.runs {
                there.push(way(&moved.move_over("pre-copy")?)?.0);
                thread::sleep(AWAY);
                let (way, kept) = way(&moved.move_over("pre-copy")?)?;
                ensure!((kept > 0.0) == (keep != "0"), "{kept} pages were kept");
                back.push(way);
            }
            moved.guest().verify()?;
            tell(&row(load, &format!("there, {name}"), &there))?;
            tell(&row(load, &format!("back, {name}"), &back))?;
        }
    }
    tell("\n")
}

fn way(report: &Report) -> Result<(Way, f64)> {
    let number = |name| report.number(name);
    let way = Way { bytes: number("wire_bytes")?, ms: number("total_ms")?, pause_ms: number("downtime_ms")? };
    Ok((way, number("pages.kept")?))
}

fn row(load: &str, name: &str, ways: &[Way]) -> String {
    let of = |value: fn(&Way) -> f64| median(ways.iter().map(value)).unwrap_or_default();
    let (bytes, ms, pause) = (Bytes(of(|way| way.bytes) as u64), of(|way| way.ms), of(|way| way.pause_ms));
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(text, "| {load} | {name} | {bytes} | {ms:.0} | {pause:.1} |");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_the_medians() {
        let ways = [3.0, 1.0, 20.0].map(|n| Way { bytes: n * 1048576.0, ms: n * 10.0, pause_ms: n });
        assert_eq!(row("idle", "back", &ways), "| idle | back | 3.0 MiB | 30 | 3.0 |\n");
    }
}
