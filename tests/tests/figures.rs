//! What private memory, direct I/O and adoption cost, side by side with what does without: measured in turns
//! within one run, and compared by medians. Each prints its figures for docs/benchmarks.md, and fails where
//! they are missed: `cargo test --release -p lab --test figures -- --ignored --nocapture --test-threads 1`.

use lab::{Doing, HandStart, Oddity, Ram, Result, Spec, Stage, Tools, ensure, story};
use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};
use units::Bytes;

/// So many guests of each kind are moved.
const GUESTS: usize = 9;

/// There, back, and there again.
const MODES: [&str; 3] = ["pre-copy", "post-copy", "hybrid"];

/// How often the guest with direct I/O is moved, and how often it comes to one move of the other.
const MOVES: usize = 200;
const TO_ONE: usize = 4;

/// How many of each kind are adopted.
const ADOPTED: usize = 20;

/// The memory of guests that touch next to nothing of it, in GiB; and how often each is moved, by each mode:
/// an even number, so that it is where it was.
const SIZES: [u64; 4] = [1, 16, 64, 256];
const SWITCHOVERS: usize = 20;

/// Milliseconds, as they come.
#[derive(Default)]
struct Times(Vec<f64>);

impl Times {
    fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    }

    fn most(&self) -> f64 {
        self.0.iter().copied().fold(0.0, f64::max)
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let least = self.0.iter().copied().fold(f64::INFINITY, f64::min);
        write!(f, "{} | {:.1} | {least:.1}–{:.1}", self.0.len(), self.median(), self.most())
    }
}

/// A ratio that may not be more than this.
fn at_most(what: &str, ratio: f64, bound: f64) -> Result<()> {
    println!("{what}: {ratio:.2} × (at most {bound} × was wanted)");
    ensure!(ratio <= bound, "{what}: {ratio:.2} ×, not at most {bound} ×");
    Ok(())
}

#[test]
#[ignore = "measures: needs a machine of its own"]
fn private_memory_moves_as_fast_as_a_memfd() {
    story("private memory beside a memfd", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let kinds = [("private", Ram::Private), ("memfd", Ram::Memfd)];
        let mut pauses: [Times; 2] = Default::default();
        let mut totals: [Times; 2] = Default::default();
        for n in 0..GUESTS {
            for (kind, (name, ram)) in kinds.iter().enumerate() {
                let work = "whimbrel.fill=256M,content=40% whimbrel.check=64M,rate=8M";
                let spec = Spec::new((2 * n + kind + 1) as u8, work);
                let start = HandStart { ram: ram.clone(), memory: Bytes(512 << 20), ..HandStart::new(spec) };
                let name = format!("{name}{n}");
                let (guest, _machine) = stage.adopt("a", &name, start)?;
                let report = stage.start_migration(&name, "a", "b", &["--mode", "pre-copy"])?.completed()?;
                guest.verify()?;
                pauses[kind].0.push(report.number("downtime_ms")?);
                totals[kind].0.push(report.number("total_ms")?);
                println!(
                    "{name}: {:.0} ms, {:.0} before memory moved, first round {:.0} of {} pages, wire {} MiB",
                    report.number("total_ms")?,
                    report.number("preflight_ms")?,
                    report.0["rounds"][0]["ms"].as_f64().unwrap_or_default(),
                    report.0["rounds"][0]["pages"],
                    report.0["wire_bytes"].as_u64().unwrap_or_default() >> 20,
                );
                stage.agent("b").cli().json(&["stop", &name])?;
            }
        }
        for (kind, (name, _)) in kinds.iter().enumerate() {
            println!("| {name}, pause, ms | {} |\n| {name}, total, ms | {} |", pauses[kind], totals[kind]);
        }
        let ratio = |times: &[Times; 2]| times[0].median() / times[1].median();
        at_most("pause of private memory, of a memfd's", ratio(&pauses), 1.2).and(at_most(
            "total time of private memory, of a memfd's",
            ratio(&totals),
            1.15,
        ))
    });
}

/// Idle guests that have touched next to nothing of their memory.
#[test]
#[ignore = "measures: needs a machine of its own"]
fn the_pause_does_not_grow_with_the_size_of_the_vm() {
    story("pauses by size", &["a", "b"], |lab, tools| {
        // Their memory is never touched: the host need not have it.
        let stage = Stage::with(lab, tools, |_| Oddity {
            lines: "memory.overcommit = 64\n".to_owned(),
            ..Oddity::default()
        })?;
        let mut medians = Vec::new();
        for (n, gib) in SIZES.into_iter().enumerate() {
            let spec = Spec::new(n as u8 + 1, "whimbrel.idle");
            let start = HandStart { memory: Bytes(gib << 30), ..HandStart::new(spec) };
            let name = format!("sparse{gib}");
            let (guest, _machine) = stage.adopt("a", &name, start)?;
            for mode in MODES {
                let (mut pauses, mut scans, mut totals) =
                    (Times::default(), Times::default(), Times::default());
                for turn in 0..SWITCHOVERS {
                    let (from, to) = if turn % 2 == 0 { ("a", "b") } else { ("b", "a") };
                    let report = stage.start_migration(&name, from, to, &["--mode", mode])?.completed()?;
                    pauses.0.push(report.number("downtime_ms")?);
                    totals.0.push(report.number("total_ms")?);
                    let parts = report.0["downtime"].as_array().doing("find the parts of the pause")?;
                    let scan = parts.iter().find(|part| part["part"] == "last-scan");
                    scans.0.extend(scan.and_then(|part| part["took_ms"].as_f64()));
                }
                guest.verify()?;
                println!("| {gib} GiB, {mode}, pause, ms | {pauses} |");
                println!("| {gib} GiB, {mode}, last scans, ms | {scans} |");
                println!("| {gib} GiB, {mode}, total, ms | {totals} |");
                medians.push((gib, mode, pauses.median()));
            }
            stage.agent("a").cli().json(&["stop", &name])?;
        }
        let smallest = |mode: &str| medians.iter().find(|(_, its, _)| *its == mode).map(|(.., ms)| *ms);
        for (gib, mode, ms) in &medians {
            let first = smallest(mode).doing("find the smallest guest")?;
            at_most(&format!("pause of {gib} GiB, {mode}, of 1 GiB"), ms / first, 1.5)?;
        }
        Ok(())
    });
}

/// A guest that writes and reads its disk and checks what it finds.
fn with_disk(stage: &Stage, number: u8, name: &str, cache: &str) -> Result<(lab::Guest, lab::HandStarted)> {
    let image: PathBuf = stage.lab.dir().join(format!("{name}.qcow2"));
    let make = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("64M").status();
    ensure!(make.doing("make an image")?.success(), "qemu-img makes an image");
    let drive = format!("file={},format=qcow2,if=none,id=d,{cache}", image.display());
    let extra = ["-drive", &drive, "-device", "virtio-blk-pci,drive=d"].map(str::to_owned).to_vec();
    let work = "whimbrel.check=24M,rate=4M whimbrel.disk=vda,set=16M,rate=8M,direct=both";
    let start = HandStart { extra, memory: Bytes(192 << 20), ..HandStart::new(Spec::new(number, work)) };
    stage.adopt("a", name, start)
}

#[test]
#[ignore = "measures: needs a machine of its own"]
fn i2_two_hundred_moves_with_direct_io_lose_nothing() {
    story("direct I/O beside buffered", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let (direct, _one) = with_disk(&stage, 1, "direct", "cache=none,aio=native")?;
        let (buffered, _other) = with_disk(&stage, 2, "buffered", "cache=writeback,aio=threads")?;
        let guests = [("direct", &direct), ("buffered", &buffered)];
        let hosts = ["a", "b"];
        let (mut at, mut pauses) = ([0, 0], <[[Times; 3]; 2]>::default());
        for n in 0..MOVES {
            for (kind, (name, guest)) in guests.iter().enumerate() {
                if kind == 1 && n % TO_ONE != 0 {
                    continue;
                }
                let (from, to) = (hosts[at[kind] % 2], hosts[(at[kind] + 1) % 2]);
                let mode = n % MODES.len();
                let report = stage.start_migration(name, from, to, &["--mode", MODES[mode]])?.completed()?;
                at[kind] += 1;
                pauses[kind][mode].0.push(report.number("downtime_ms")?);
                guest.verify()?;
                ensure!(guest.count("corrupt")? == 0.0, "{name}: what was written is read");
            }
        }
        for (kind, (name, guest)) in guests.iter().enumerate() {
            for (mode, times) in MODES.iter().zip(&pauses[kind]) {
                println!("| {name}, {mode}, pause, ms | {times} |");
            }
            println!("{name}: {} pages of the disk were read back and right", guest.count("disk_pages")?);
        }
        let [direct, buffered] =
            pauses.map(|modes| Times(modes.into_iter().flat_map(|mode| mode.0).collect()));
        at_most("pause with direct I/O, of buffered", direct.median() / buffered.median(), 1.3)
    });
}

/// How long the command takes that adopts a VM.
fn adoption(stage: &Stage, tools: &Tools, number: usize, ram: Ram) -> Result<f64> {
    let (name, host) = (format!("adopted{number}"), stage.lab.host("a"));
    let start = HandStart { ram, vga: true, ..HandStart::new(Spec::new(number as u8, "whimbrel.idle")) };
    let machine = start.start(host, tools)?;
    let socket = machine.qmp_socket();
    let begin = Instant::now();
    let adopt =
        |socket: &Path| stage.agent("a").cli().json(&["adopt", &name, "--qmp", &socket.to_string_lossy()]);
    adopt(&socket)?;
    let took = begin.elapsed().as_secs_f64() * 1000.0;
    stage.agent("a").cli().json(&["stop", &name])?;
    Ok(took)
}

#[test]
#[ignore = "measures: needs a machine of its own"]
fn a_vm_is_adopted_within_300_ms() {
    story("adoption", &["a"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let mut all = Vec::new();
        for (first, kind, ram) in [(1, "private", Ram::Private), (1 + ADOPTED, "memfd", Ram::Memfd)] {
            let numbers = first..first + ADOPTED;
            let times = numbers.map(|n| adoption(&stage, tools, n, ram.clone())).collect::<Result<_>>()?;
            all.push((kind, Times(times)));
        }
        for (kind, times) in &all {
            println!("| adoption, {kind}, ms | {times} |");
        }
        for (kind, times) in &all {
            ensure!(times.median() <= 300.0, "adoption of {kind} memory takes {:.0} ms", times.median());
        }
        Ok(())
    });
}
