//! What people read.

use crate::{
    bench::Results,
    contender::Contender,
    footprint::Footprint,
    options::Options,
    run::Run,
    stats::{largest, median, ratio},
};
use std::{fmt::Write, fs, process::Command, thread::available_parallelism};

const MIB: f64 = 1024.0 * 1024.0;

/// What a run's figure is called, how it is read, and with how many decimals it is shown.
struct Figure {
    name: &'static str,
    of: fn(&Run) -> Option<f64>,
    decimals: usize,
}

const fn figure(name: &'static str, decimals: usize, of: fn(&Run) -> Option<f64>) -> Figure {
    Figure { name, of, decimals }
}

/// The figures in which every contender has a value; less is better in all of them.
const FIGURES: [Figure; 10] = [
    figure("total time, ms", 0, |run| Some(run.total_ms)),
    figure("total without the start of the target's QEMU, ms", 0, |run| Some(run.moving_ms())),
    figure("downtime (stop to resume), ms", 1, |run| Some(run.downtime_ms)),
    figure("longest silence seen by the guest's client, ms", 1, |run| run.client_gap_ms),
    figure("longest gap on the guest's own clock, ms", 1, |run| run.guest_gap_ms),
    figure("on the wire, MiB", 1, |run| Some(run.wire_bytes as f64 / MIB)),
    figure("processor of the source, s", 2, |run| Some(run.source_cpu_s)),
    figure("processor of the target, s", 2, |run| Some(run.target_cpu_s)),
    figure("processor of the source, s/GiB on the wire", 2, |run| Some(run.source_cpu_s / run.wire_gib())),
    figure("processor of the target, s/GiB on the wire", 2, |run| Some(run.target_cpu_s / run.wire_gib())),
];

/// What only a migration has whose guest starts before its memory is there.
const AFTERWARDS: [Figure; 5] = [
    figure("faults that waited for the source", 0, |run| Some(run.faults?.count)),
    figure("fault latency p50, µs", 0, |run| Some(run.faults?.p50_us)),
    figure("fault latency p99, µs", 0, |run| Some(run.faults?.p99_us)),
    figure("fault latency, worst, µs", 0, |run| Some(run.faults?.max_us)),
    figure("pages/s taken in by the target", 0, |run| run.pages_per_s),
];

/// One run in one line, for the progress display.
pub(crate) fn line(run: &Run) -> String {
    let mut text = format!(
        "{} {} → {}: {:.0} ms, down {:.1} ms, client {} ms, {:.0} MiB, CPU {:.2} + {:.2} s",
        run.contender,
        run.from,
        run.to,
        run.total_ms,
        run.downtime_ms,
        number(run.client_gap_ms, 1),
        run.wire_bytes as f64 / MIB,
        run.source_cpu_s,
        run.target_cpu_s
    );
    if run.preflight_ms > 0.0 {
        let _ = write!(text, " (preflight {:.0} ms)", run.preflight_ms);
    }
    if let Some(faults) = run.faults {
        let _ = write!(text, ", {:.0} faults, p99 {:.0} µs", faults.count, faults.p99_us);
    }
    text
}

/// The whole document.
pub(crate) fn all(options: &Options, results: &Results) -> String {
    let mut text = String::from("# Whimbrel beside QEMU's own migration\n\n");
    text += &preface(options, results);
    let present: Vec<_> = Contender::ALL.iter().filter(|c| !of(results, **c).is_empty()).copied().collect();
    let ours: Vec<_> = present.iter().filter(|c| c.is_whimbrel()).copied().collect();
    let theirs: Vec<_> = present.iter().filter(|c| !c.is_whimbrel()).copied().collect();
    if !present.is_empty() {
        text += "## Medians\n\n";
        text += &medians(results, &present, &FIGURES);
        text += &quiet(results);
    }
    if !ours.is_empty() && !theirs.is_empty() {
        text += "## Whimbrel as a multiple of QEMU\n\nBelow 1 whimbrel needs less.\n\n";
        text += &ratios(results, &ours, &theirs);
    }
    let late: Vec<_> =
        ours.iter().filter(|c| of(results, **c).iter().any(|r| r.faults.is_some())).copied().collect();
    if !late.is_empty() {
        text += "## After the switchover\n\n";
        text += &medians(results, &late, &AFTERWARDS);
    }
    if !results.footprints.is_empty() {
        text += "## Memory of an agent that moves a guest of 5 GiB\n\n";
        text += &footprints(&results.footprints);
    }
    if !results.failures.is_empty() {
        text += "## Failed\n\n";
        for (name, why) in &results.failures {
            let _ = writeln!(text, "- {name}: {}", why.to_string().replace('\n', "; "));
        }
        text.push('\n');
    }
    text + MEANING
}

/// Where and of what, so that nobody takes the figures for another machine's.
fn preface(options: &Options, results: &Results) -> String {
    let said = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned())
    };
    let or = |text: Option<String>| text.unwrap_or_else(|| "unknown".to_owned());
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        info.lines().find_map(|line| Some(line.strip_prefix("model name")?.split_once(": ")?.1.to_owned()));
    format!(
        "Made by `./dev bench --runs {runs}` on {date}: {processors} processors ({model}), Linux {linux}, {qemu}, software \
         emulation of the guest's CPU. Both hosts, the guest's vCPUs and the bench itself share these processors, and \
         the machine's load was {load:.1} before anything began: take the ratios, not the absolutes.\n\n\
         The guest is a `q35` with 1 GiB and two vCPUs, doing `{work}`. It is booted twice from one command line, each time \
         on two hosts of its own (network namespaces, {link} between them). Whimbrel moves one of the two, QEMU \
         the other, there and back on the same boot; the contenders take turns, and the guest that is not being measured \
         is frozen. After every run the guest verifies all of its memory.\n\n\
         QEMU's bandwidth is uncapped and its downtime limit is 20 ms; `qemu-default` is otherwise as it comes, \
         `qemu-multifd` has two channels. Its target is started before its clock is: the second line of the table takes \
         that time away from whimbrel too. {protection}\n\n",
        runs = options.runs,
        date = or(said("date", &["-u", "+%Y-%m-%d %H:%M UTC"])),
        processors = available_parallelism().map_or(0, |n| n.get()),
        model = or(model),
        linux = or(said("uname", &["-r"])),
        qemu = or(said(lab::QEMU, &["--version"])),
        load = results.load,
        work = options.work,
        link = options.link.map_or("an unshaped veth".to_owned(), |rate| format!("a link of {rate}")),
        protection = if options.tls {
            "Whimbrel's connections are protected by TLS, QEMU's are in plaintext."
        } else {
            "All connections are in plaintext: QEMU's are unless its TLS is set up, whimbrel's only for this comparison \
             (`--tls` protects them)."
        },
    )
}

/// What a reader could take for something else.
const MEANING: &str = "\
## What the figures mean

- **Total time**: whimbrel's from the request to the report, the end of the source's QEMU included; QEMU's from the `migrate`
  command until the source says `completed` and the target says `RESUME`.
- **Downtime**: whimbrel's from just before `stop` on the source to the target's `RESUME` event. QEMU's from its `STOP` event, which
  comes once the vCPUs have paused, to the target's `RESUME` event, by the stamps of the events. So QEMU's lacks the few
  milliseconds that pausing takes.
- **The client** sends the guest's echo port a message every 2 ms and notes the longest silence. It contains lost packets' retransmission
  (200 ms at the earliest, once a pause has used the connection's window up).
- **The guest's own clock** stands still while the guest is stopped: its gaps are what page faults, trackers and crowded processors
  cost a thread that sleeps 1 ms at a time.
- **On the wire**: what the source host's network card counted, both ways, headers included.
- **Processor time** leaves vCPUs out. Whimbrel's is that of the agents and of their QEMUs' main threads (the target's from the end
  of its start on); QEMU's is that of all its other threads.
- **Faults** are those that waited for the source; pages that the guest never wrote are answered at once and not counted.
- **Pages/s** of a post-copy: what was still to be moved at the switchover, by the time until it was there.
- **Memory**: the largest of each kind, looked at every 5 ms, less what the idle agent held before that migration.

The guest boots with `pti=on` because QEMU 7.2's own migration otherwise loses writes of this emulated guest, which is dead or silent
afterwards (each of the 8 times that it was tried; `--work` with `pti=off` among its words shows it). Whimbrel moved the same guest
without it 9 times out of 9.

The small parts have benches of their own: `cargo bench -p bench --bench micro`.
";

fn of(results: &Results, contender: Contender) -> Vec<&Run> {
    results.runs.iter().filter(|run| run.contender == contender.name()).collect()
}

fn middle(results: &Results, contender: Contender, figure: &Figure) -> Option<f64> {
    median(of(results, contender).into_iter().filter_map(figure.of))
}

fn medians(results: &Results, contenders: &[Contender], figures: &[Figure]) -> String {
    let names = contenders.iter().map(|c| c.name().to_owned());
    let mut text = header(names);
    let counts = contenders.iter().map(|c| of(results, *c).len().to_string());
    text += &row("runs", counts);
    let harmed = |c: &Contender| of(results, *c).iter().filter(|run| run.harm.is_some()).count();
    text += &row(
        "of them left the guest dead or its memory wrong",
        contenders.iter().map(|c| harmed(c).to_string()),
    );
    for figure in figures {
        let cells = contenders.iter().map(|c| number(middle(results, *c, figure), figure.decimals));
        text += &row(figure.name, cells);
    }
    text.push('\n');
    text
}

fn quiet(results: &Results) -> String {
    let client = || results.quiet.iter().map(|quiet| quiet.client_gap_ms);
    let guest = || results.quiet.iter().map(|quiet| quiet.guest_gap_ms);
    format!(
        "While nothing migrates, the client's longest silence is {} ms (worst {}), the longest gap on the guest's own \
         clock {} ms (worst {}).\n\n",
        number(median(client()), 1),
        number(largest(client()), 1),
        number(median(guest()), 1),
        number(largest(guest()), 1),
    )
}

fn ratios(results: &Results, ours: &[Contender], theirs: &[Contender]) -> String {
    let pairs: Vec<_> = theirs.iter().flat_map(|b| ours.iter().map(move |a| (*a, *b))).collect();
    let short = |name: &'static str| name.split_once('-').map_or(name, |(_, rest)| rest);
    let mut text = header(pairs.iter().map(|(a, b)| format!("{} / {}", short(a.name()), b.name())));
    for figure in &FIGURES {
        let cells = pairs.iter().map(|(a, b)| {
            let (a, b) = (middle(results, *a, figure), middle(results, *b, figure));
            number(ratio(a, b), 2)
        });
        text += &row(figure.name, cells);
    }
    text.push('\n');
    text
}

fn footprints(all: &[Footprint]) -> String {
    let names = [
        "idle",
        "peak above idle",
        "own memory above idle",
        "mapped files above idle",
        "mapped guest RAM",
        "time, s",
    ];
    let mut text = header(names.map(str::to_owned).into_iter());
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / MIB);
    for Footprint { mode, side, idle, peak, total_ms, .. } in all {
        let cells = [
            mib(idle.all),
            mib(peak.all.saturating_sub(idle.all)),
            mib(peak.anon.saturating_sub(idle.anon)),
            mib(peak.file.saturating_sub(idle.file)),
            mib(peak.shared),
            format!("{:.1}", total_ms / 1000.0),
        ];
        text += &row(&format!("{mode}, {side}"), cells.into_iter());
    }
    text.push('\n');
    text
}

fn header(columns: impl Iterator<Item = String>) -> String {
    let names: Vec<_> = columns.collect();
    format!("| | {} |\n|---|{}\n", names.join(" | "), "---:|".repeat(names.len()))
}

fn row(name: &str, cells: impl Iterator<Item = String>) -> String {
    format!("| {name} | {} |\n", cells.collect::<Vec<_>>().join(" | "))
}

fn number(number: Option<f64>, decimals: usize) -> String {
    number.map_or_else(|| "–".to_owned(), |number| format!("{number:.decimals$}"))
}
