//! What people read.

use crate::{
    contender::Contender,
    figures::{self, Figure, Wanted, Who, best, middle},
    footprint::Footprint,
    link::Link,
    results::Results,
    run::{Outran, Run},
    stats::ratio,
    workload::Workload,
};
use std::{fmt::Write, fs, process::Command, thread::available_parallelism};

const MIB: f64 = 1024.0 * 1024.0;

/// What a run's figure is called, how it is read, and with how many decimals it is shown.
struct Column {
    name: &'static str,
    of: fn(&Run) -> Option<f64>,
    decimals: usize,
}

const fn column(name: &'static str, decimals: usize, of: fn(&Run) -> Option<f64>) -> Column {
    Column { name, of, decimals }
}

/// In all of them, but for the guest's work, less is better.
const COLUMNS: [Column; 6] = [
    column("total, ms", 0, |run| Some(run.total_ms)),
    column("without the target's start, ms", 0, |run| Some(run.total_ms - run.start_ms)),
    column("guest's downtime, ms", 1, |run| run.guest_downtime_ms),
    column("on the wire, MiB", 1, |run| Some(run.wire_bytes as f64 / MIB)),
    column("processor, s", 2, |run| Some(run.cpu_s)),
    column(WORK, 0, |run| run.work_share().map(|share| share * 100.0)),
];
const WORK: &str = "guest's work, %";

/// What explains the others, for the workload that is about it.
const DETAILS: [Column; 9] = [
    column("stop to resume, ms", 1, |run| run.downtime_ms),
    column("client's longest silence, ms", 1, |run| run.client_gap_ms),
    column("longest gap on the guest's own clock, ms", 1, |run| run.guest_gap_ms),
    column("processor of the source, s", 2, |run| Some(run.source_cpu_s)),
    column("faults", 0, |run| Some(run.faults?.count)),
    column("fault p50, µs", 0, |run| Some(run.faults?.p50_us)),
    column("fault p99, µs", 0, |run| Some(run.faults?.p99_us)),
    column("fault, worst, µs", 0, |run| Some(run.faults?.max_us)),
    column("pages/s after the switchover", 0, |run| run.pages_per_s),
];
const DETAILED: &str = "steady";

/// The same, where a guest outruns the link.
const OUTRUN: [Column; 13] = [
    column("time, in RAM ÷ link", 2, |run| Some(run.outran?.copies)),
    column("stop to resume, ms", 1, |run| run.downtime_ms),
    column("computing, %", 0, |run| Some(run.outran?.computing * 100.0)),
    column("not held up, %", 0, |run| run.outran?.not_held_up.map(|share| share * 100.0)),
    column("written before, of the link", 2, |run| Some(run.outran?.writing_before)),
    column("written meanwhile, of the link", 2, |run| Some(run.outran?.writing)),
    column("fresh, of the link", 2, |run| run.outran?.fresh),
    column("probe p99, ms", 2, |run| Some(run.outran?.write_p99_ms)),
    column("probe, worst, ms", 1, |run| Some(run.outran?.write_max_ms)),
    column("probe late p99, ms", 1, |run| Some(run.outran?.late_p99_ms)),
    column("probe, latest, ms", 1, |run| Some(run.outran?.late_max_ms)),
    column("writers stalled, ms", 0, |run| run.outran?.stalled_ms),
    column("longest stall, ms", 1, |run| run.outran?.longest_stall_ms),
];

/// One run in one line, for the progress display.
pub(crate) fn line(run: &Run) -> String {
    let mut text = format!(
        "{} {} {}/{}: {:.0} ms, down {} ms, {:.1} MiB, CPU {:.2} s",
        run.workload,
        run.link,
        run.contender,
        run.run,
        run.total_ms,
        number(run.guest_downtime_ms, 1),
        run.wire_bytes as f64 / MIB,
        run.cpu_s,
    );
    if let Some(share) = run.work_share() {
        let _ = write!(text, ", work {:.0} %", share * 100.0);
    }
    if let Some(Outran { copies, computing, write_p99_ms, .. }) = run.outran {
        let computing = computing * 100.0;
        let _ = write!(
            text,
            ", {copies:.2} RAM ÷ link, computing {computing:.0} %, probe p99 {write_p99_ms:.2} ms"
        );
    }
    if let Some(trouble) = &run.trouble {
        let _ = write!(
            text,
            "{} ({})",
            if run.harmed { ", HARMED" } else { ", not finished" },
            trouble.replace('\n', "; ")
        );
    }
    text
}

/// A forecast is good that is no farther off.
const FORECAST: f64 = 0.25;

/// The whole document.
pub(crate) fn all(results: &Results, memory: &[Footprint], load: f64, tls: bool) -> String {
    let mut text = String::from("# Whimbrel beside QEMU's own migration\n\n");
    text += &preface(load, tls);
    for workload in Workload::ALL {
        for link in Link::ALL {
            text += &compared(results, &workload, link);
        }
    }
    text += &forecasts(results);
    if !memory.is_empty() {
        text += "## Memory of an agent that moves a guest of 5 GiB\n\n";
        text += &footprints(memory);
    }
    let figures = figures::all(results);
    if !figures.is_empty() {
        text += "## What was to be reached\n\n";
        text += &reached(&figures);
    }
    text + MEANING
}

/// A row for each contender, and what the first of whimbrel's is of QEMU's best in each column.
fn compared(results: &Results, workload: &Workload, link: Link) -> String {
    let runs = |name: &'static str| results.of(workload.name, link.name(), name);
    let present: Vec<_> =
        Contender::ALL.iter().map(|c| c.name).filter(|name| runs(name).next().is_some()).collect();
    if present.is_empty() {
        return String::new();
    }
    let mut text = format!("## {}, {}\n\nThe guest: {}.\n\n", workload.name, link.name(), workload.what);
    let middle = |name, column: &Column| middle(results, workload.name, link, name, column.of);
    let table = |columns: &[Column]| {
        let mut text = header(
            ["finished"].into_iter().chain(columns.iter().map(|column| column.name)).map(str::to_owned),
        );
        for name in &present {
            let finished = runs(name).filter(|run| run.finished).count();
            let harmed = runs(name).filter(|run| run.harmed).count();
            let harmed = if harmed > 0 { format!(", {harmed} harmed") } else { String::new() };
            let finished = format!("{finished} of {}{harmed}", runs(name).count());
            let cells = columns.iter().map(|column| number(middle(name, column), column.decimals));
            text += &row(name, [finished].into_iter().chain(cells));
        }
        text
    };
    text += &table(&COLUMNS);
    let ours = present.iter().find(|name| name.starts_with("whimbrel"));
    let theirs = COLUMNS.iter().map(|column| match column.name {
        // A share of work is best where it is greatest.
        WORK => None,
        _ => best(results, workload.name, link, Who::Any, column.of),
    });
    if let Some(name) = ours {
        let cells =
            COLUMNS.iter().zip(theirs).map(|(column, best)| number(ratio(middle(name, column), best), 2));
        let last = row(&format!("{name} / QEMU's best"), ["".to_owned()].into_iter().chain(cells));
        text += &last;
    }
    text.push('\n');
    if workload.name == DETAILED {
        text += &table(&DETAILS);
        text.push('\n');
    }
    if workload.outruns {
        text += &table(&OUTRUN);
        text.push('\n');
    }
    text
}

/// What was expected beside what came.
fn forecasts(results: &Results) -> String {
    let mut rows = String::new();
    let (mut all, mut near) = (0, 0);
    for (workload, link) in Workload::ALL.iter().flat_map(|workload| Link::ALL.map(|link| (workload, link))) {
        for contender in Contender::ALL.iter().filter(|contender| contender.name.starts_with("whimbrel")) {
            let middle = |of| middle(results, workload.name, link, contender.name, of);
            let (Some(expected), Some(total)) =
                (middle(|run| run.expected_ms), middle(|run| Some(run.total_ms)))
            else {
                continue;
            };
            let runs = results.of(workload.name, link.name(), contender.name).filter(|run| run.finished);
            let off = |run: &Run| run.expected_ms.map(|expected| run.total_ms / expected - 1.0);
            let offs: Vec<f64> = runs.filter_map(off).collect();
            let within = offs.iter().filter(|off| off.abs() <= FORECAST).count();
            (all, near) = (all + 1, near + usize::from((total / expected - 1.0).abs() <= FORECAST));
            let cells = [
                number(Some(expected), 0),
                number(Some(total), 0),
                format!("{:+.0} %", (total / expected - 1.0) * 100.0),
                format!("{within} of {}", offs.len()),
            ];
            rows +=
                &row(&format!("{}, {}, {}", workload.name, link.name(), contender.name), cells.into_iter());
        }
    }
    if rows.is_empty() {
        return rows;
    }
    let names = ["expected, ms", "took, ms", "off", "runs within 25 %"].map(str::to_owned);
    format!(
        "## What whimbrel had expected\n\nThe forecast that each migration gives before anything moves. \
         {near} of {all} medians are within 25 %.\n\n{}{rows}\n",
        header(names.into_iter())
    )
}

fn reached(figures: &[Figure]) -> String {
    let mut text = header(["reached", "wanted", ""].map(str::to_owned).into_iter());
    for figure in figures {
        let wanted = match figure.wanted {
            Wanted::AtLeast(least) => format!("≥ {least:.2}"),
            Wanted::AtMost(most) => format!("≤ {most:.2}"),
        };
        let mark = if figure.is_reached() { "✓" } else { "✗" };
        text += &row(&figure.what, [format!("{:.2}", figure.reached), wanted, mark.to_owned()].into_iter());
    }
    text.push('\n');
    text
}

/// Where and of what, so that nobody takes the figures for another machine's.
fn preface(load: f64, tls: bool) -> String {
    let said = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned())
    };
    let or = |text: Option<String>| text.unwrap_or_else(|| "unknown".to_owned());
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        info.lines().find_map(|line| Some(line.strip_prefix("model name")?.split_once(": ")?.1.to_owned()));
    format!(
        "Made by `./dev bench` on {date}: {processors} processors ({model}), Linux {linux}, {qemu}, software \
         emulation of the guest's CPU. Both hosts, the guest's vCPUs and the bench itself share these \
         processors, and the machine's load was {load:.1} before anything began: take the ratios, not the \
         absolutes.\n\n\
         Each guest is a `q35` with 1 GiB (where it says so, 2 GiB) and two vCPUs. It is booted twice from \
         one command line, each time on two hosts of its own (network namespaces, veth between them). \
         Whimbrel moves one of the two, QEMU the other, there and back on the same boot; the contenders take \
         turns, and the guest that is not being measured is frozen. Figures are medians of the runs that \
         came to their end. {protection}\n\n",
        protection = if tls {
            "Everybody's connections are protected by TLS."
        } else {
            "Everybody's connections are in plaintext (`--tls` protects them all)."
        },
        date = or(said("date", &["-u", "+%Y-%m-%d %H:%M UTC"])),
        processors = available_parallelism().map_or(0, |n| n.get()),
        model = or(model),
        linux = or(said("uname", &["-r"])),
        qemu = or(said(lab::QEMU, &["--version"])),
    )
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

/// What a reader could take for something else.
const MEANING: &str = "\
## What the figures mean

- **Total**: from the request, the start of the target's QEMU included for everybody, until all memory is on
  the target, the guest runs there, and (whimbrel's) the source's QEMU has ended or (QEMU's) the source says
  `completed`. The second column leaves the start of the target's QEMU out, and with it all that whimbrel does
  before it moves memory.
- **Guest's downtime**: the guest's highest-priority thread sends a datagram every 8 ms (`steady`: 2 ms); this
  is the longest time without one. A clock outside measures it, because the guest's own stands still while the
  guest is stopped.
- **On the wire**: what the source host's network card sent, headers and retransmissions included.
- **Processor**: of both sides, vCPUs apart. Whimbrel's is that of the agents and of their QEMUs' main threads
  (the target's from the end of its start on); QEMU's is that of all its other threads.
- **Guest's work**: what its workloads got done meanwhile, as a share of what they do undisturbed, seen just
  before.
- **Finished**: a run that takes three times as long as a copy of all memory at the link's speed (and 10 s at
  least) is ended. A guest is harmed if it is dead or silent afterwards, or if its memory is not what it
  should be; it is then booted anew.
- **Best of QEMU**: in each column the best median that any of its modes has in the same bench. Its bandwidth
  is not capped, its downtime limit is whimbrel's (300 ms; 20 ms in `steady` and where a guest outruns the
  link), multifd has a channel a processor, zstd its level 1, xbzrle a cache of 512 MiB, post-copy begins
  after the first round.
- **plain-copy** moves 640 MiB from one memory file into another by `pread`, a socket and `pwrite`, with as
  many threads and connections as whimbrel: what nobody can beat who sends memory as it is. Compared with it
  is whimbrel's first round.
- **Stop to resume** (`steady`): whimbrel's from just before `stop` on the source to the target's `RESUME`
  event; QEMU's from its `STOP` event, which comes once the vCPUs have paused. **The client** sends the
  guest's echo port a message every 2 ms; its silence contains the retransmission of lost packets. **Faults**
  are those that waited for the source; **pages/s**: what was still to be moved at the switchover, by the time
  until it was there.
- **Where a guest outruns the link** one vCPU writes random numbers, the other computes without writing, and
  writes one page a millisecond, none that it wrote in the last eight seconds (the probe). *RAM ÷ link*: what
  all RAM takes over the link as it is. *Computing*: its speed until the migration's end, of what it was just
  before, by the guest's own clock: the pause of the switchover is not in it, what both hosts' programs take
  of the same processors is. *Not held up*: of the time before the switchover, how much that vCPU ran or
  waited for nothing but a processor of this machine; stalls and throttling are the rest. *Written*: what the
  writer wrote; *fresh*: what was sent already and had to be sent again, as whimbrel's rounds tell: pages that
  were opened ahead of a write are among it. *Probe*: how long its writes took, and how late they began; those
  that it missed meanwhile count as late. *Stalled*: how long whimbrel made writers wait.
- **Memory**: the largest of each kind, looked at every 5 ms, less what the idle agent held before that
  migration.

The guest boots with `pti=on` because QEMU 7.2's own migration otherwise loses writes of this emulated guest,
which is dead or silent afterwards (each of the 8 times that it was tried; `--work` with `pti=off` among its
words shows it). Whimbrel moved the same guest without it 9 times out of 9.

The small parts have benches of their own: `cargo bench -p bench --bench micro`.
";
