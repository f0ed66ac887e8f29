//! The pause alone: many switchovers of one guest there and back, by mode and by what the guest does; a
//! histogram, and in which part the slowest tenth spends its time. QEMU's own migration beside it.

use crate::{
    contender::Contender, guest, options::Options, qemu, run::Terms, stats::median, whimbrel, workload::Pulse,
};
use api::{DowntimePart, PausePart, Side};
use lab::{Doing, HandStart, Lab, Report, Result, Tools};
use std::{collections::BTreeMap, fmt::Write, fs::File, time::Duration};
use units::Bytes;

/// QEMU's own migrations of each load: each takes as long as ten of whimbrel's.
const QEMUS: u32 = 20;

/// What QEMU may plan for its pause.
const DOWNTIME_MS: u64 = 300;

/// When one of QEMU's migrations is ended: it may never converge.
const PATIENCE: Duration = Duration::from_secs(60);

/// The guest's disk, which both hosts see.
const DISK: u64 = 64 << 20;

/// What a guest does.
struct Load {
    name: &'static str,
    words: &'static str,
    memory: Bytes,
    /// It has a disk.
    disk: bool,
}

const GIB: Bytes = Bytes(1 << 30);

const LOADS: [Load; 5] = [
    Load { name: "idle", words: "whimbrel.idle", memory: GIB, disk: false },
    Load { name: "steady writer", words: "whimbrel.check=64M,rate=16M", memory: GIB, disk: false },
    Load {
        name: "outrunning writer",
        words: "whimbrel.check=32M,rate=4M whimbrel.dirty=128M,content=random,rate=max",
        memory: GIB,
        disk: false,
    },
    Load {
        name: "disk",
        words: "whimbrel.check=24M,rate=4M whimbrel.disk=vda,set=16M,rate=8M,direct=both",
        memory: GIB,
        disk: true,
    },
    Load { name: "idle, 64 GiB", words: "whimbrel.idle", memory: Bytes(64 << 30), disk: false },
];

const MODES: [&str; 3] = ["pre-copy", "hybrid", "post-copy"];

/// One switchover.
#[derive(Clone, PartialEq, Debug, Default)]
struct Pause {
    ms: f64,
    /// Nothing is known of QEMU's own.
    parts: Vec<DowntimePart>,
}

/// Moves each load `options.switchovers` times by each mode, and tells as Markdown what came of it, as soon
/// as it is known. A load that fails is named, and the others go on.
pub(crate) fn measure(
    tools: &Tools,
    options: &Options,
    mut tell: impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    tell("## Pauses\n\n")?;
    for load in &LOADS {
        if let Err(why) = one(load, tools, options, &mut tell) {
            eprintln!("FAILED pauses, {}: {why}", load.name);
            tell(&format!("{}: failed: {why}\n\n", load.name))?;
        }
    }
    Ok(())
}

fn one(
    load: &Load,
    tools: &Tools,
    options: &Options,
    tell: &mut impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    for mode in MODES {
        eprintln!("pauses: {}, {mode} …", load.name);
        let lab = Lab::new(&["a", "b"])?;
        let moved = whimbrel::Moved::boot(
            whimbrel::stage(&lab, tools, options.tls)?,
            start(load, &lab)?,
            options.streams,
        )?;
        let mut pauses = Vec::new();
        for _ in 0..options.switchovers {
            pauses.push(pause(&moved.move_over(mode)?)?);
        }
        moved.guest().verify()?;
        tell(&summary(&format!("{}, {mode}", load.name), &pauses))?;
    }
    eprintln!("pauses: {}, QEMU's own …", load.name);
    let lab = Lab::new(&["a", "b"])?;
    let mut moved = qemu::Moved::boot(&lab, tools, start(load, &lab)?, options.tls)?;
    let pulse = Pulse { tick_ms: 4, client_ms: 20 };
    let terms = Terms { downtime_ms: DOWNTIME_MS, patience: PATIENCE, outruns: None, pulse, verify: false };
    let plain = Contender::ALL.into_iter().find(|contender| contender.name == "qemu-pre-copy");
    let plain = plain.doing("find QEMU's own migration")?;
    let (mut pauses, mut lost) = (Vec::new(), 0);
    for _ in 0..QEMUS.min(options.switchovers) {
        match moved.hop(plain, &terms) {
            Ok(run) => pauses.extend(run.downtime_ms.map(|ms| Pause { ms, parts: vec![] })),
            // An emulated guest is dead now and then once QEMU has moved it: see `guest::spec`.
            Err(why) => {
                eprintln!("pauses: {}, QEMU's own: {why}; the guest is booted again", load.name);
                lost += 1;
                moved.reboot()?;
            }
        }
    }
    let title = match lost {
        0 => format!("{}, QEMU's own", load.name),
        _ => format!("{}, QEMU's own (the guest was lost {lost} times)", load.name),
    };
    tell(&summary(&title, &pauses))
}

fn start(load: &Load, lab: &Lab) -> Result<HandStart> {
    let start = guest::start(&format!("{} whimbrel.tick=4ms", load.words), load.memory);
    if !load.disk {
        return Ok(start);
    }
    let path = lab.dir().join("pause.img");
    File::create(&path).and_then(|file| file.set_len(DISK)).doing("make a disk")?;
    Ok(start.disk(&path, "cache=none,aio=native"))
}

fn pause(report: &Report) -> Result<Pause> {
    let parts = serde_json::from_value(report.0["downtime"].clone()).doing("read the parts of a pause")?;
    Ok(Pause { ms: report.number("downtime_ms")?, parts })
}

/// The upper bounds of a histogram's classes, in milliseconds.
const CLASSES: [f64; 9] = [5.0, 7.5, 10.0, 15.0, 20.0, 25.0, 50.0, 100.0, f64::INFINITY];

/// A histogram, the medians of all and of the slowest tenth, and what each part makes of them.
fn summary(title: &str, pauses: &[Pause]) -> String {
    let mut sorted: Vec<&Pause> = pauses.iter().collect();
    sorted.sort_by(|a, b| a.ms.total_cmp(&b.ms));
    let mut text = format!("### {title}\n\n");
    let Some(worst) = sorted.last() else { return text + "no switchover\n\n" };
    let at = |share: usize| sorted[(sorted.len() - 1) * share / 100].ms;
    // Writing to a string cannot fail, here and below.
    let _ = writeln!(
        text,
        "{} switchovers: median {:.1} ms, 90 % {:.1}, 99 % {:.1}, longest {:.1}\n",
        sorted.len(),
        at(50),
        at(90),
        at(99),
        worst.ms
    );
    let mut below = 0.0;
    for class in CLASSES {
        let count = sorted.iter().filter(|pause| (below..class).contains(&pause.ms)).count();
        if count > 0 {
            let name = if class.is_finite() { format!("< {class}") } else { format!("≥ {below}") };
            let _ = writeln!(text, "    {name:>7} ms {count:5} {}", "#".repeat(count.div_ceil(4)));
        }
        below = class;
    }
    let slowest = &sorted[sorted.len() - sorted.len().div_ceil(10)..];
    let (all, slow) = (by_part(&sorted), by_part(slowest));
    if all.is_empty() {
        return text + "\n";
    }
    text += "\n| part | side | mean, ms | of the slowest tenth, ms | more, ms |\n|---|---|---|---|---|\n";
    let mut rows: Vec<_> =
        slow.iter().map(|(key, ms)| (key, ms, all.get(key).copied().unwrap_or(0.0))).collect();
    rows.sort_by(|a, b| (b.1 - b.2).total_cmp(&(a.1 - a.2)));
    for ((part, side), slow, all) in rows {
        let _ =
            writeln!(text, "| {} | {} | {all:.2} | {slow:.2} | {:.2} |", word(part), word(side), slow - all);
    }
    let medians = median(sorted.iter().map(|pause| pause.parts.len() as f64)).unwrap_or_default();
    let _ = writeln!(text, "\n{medians:.0} parts in a typical one.\n");
    text
}

/// What each part takes on average.
fn by_part(pauses: &[&Pause]) -> BTreeMap<(PausePart, Side), f64> {
    let mut parts = BTreeMap::new();
    for part in pauses.iter().flat_map(|pause| &pause.parts) {
        *parts.entry((part.part, part.side)).or_insert(0.0) += part.ms / pauses.len() as f64;
    }
    parts
}

/// As in JSON.
fn word(value: &impl serde::Serialize) -> String {
    let value = serde_json::to_value(value).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_that_makes_the_slowest_slow_comes_first() {
        let part = |part, ms| DowntimePart { part, side: Side::Source, at_ms: 0.0, ms, took_ms: ms };
        let pauses: Vec<Pause> = (0..20)
            .map(|n| {
                let fence = if n % 10 == 3 { 30.0 } else { 1.0 };
                Pause {
                    ms: 6.0 + fence,
                    parts: vec![part(PausePart::Save, 6.0), part(PausePart::Fence, fence)],
                }
            })
            .collect();
        let text = summary("idle", &pauses);
        assert!(text.contains("20 switchovers: median 7.0 ms, 90 % 7.0, 99 % 36.0, longest 36.0"), "{text}");
        assert!(text.contains("< 7.5 ms    18") && text.contains("< 50 ms     2"), "{text}");
        let rows: Vec<&str> = text.lines().filter(|line| line.contains("| source |")).collect();
        assert_eq!(
            rows,
            ["| fence | source | 3.90 | 30.00 | 26.10 |", "| save | source | 6.00 | 6.00 | 0.00 |"],
            "{text}"
        );
        assert!(summary("none", &[]).contains("no switchover"));
    }
}
