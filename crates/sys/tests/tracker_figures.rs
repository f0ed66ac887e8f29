//! What the trackers cost: a program that writes at native speed, and a guest under emulation, there beside
//! QEMU's own dirty log. `cargo test --release -p sys --test tracker_figures -- native --ignored
//! --nocapture`, or `emulated`
//!
//! The program writes to 512 MiB as fast as it can; every 0.5 s all that it wrote is read, as a migration
//! reads it, and protected again. Beside it, somebody writes to one of 16,384 other pages each millisecond:
//! how long that takes is what a guest's program feels. Times leave out what a thread waits for a processor:
//! this is about trackers, not about what else the machine does.

mod common;

use attach::{Memory, RamBlock, Source, ThrottlingTracker, Tracking};
use common::{Guest, PROBED, Ran};
use lab::{HandStart, Spec, story};
use ports::{GuestMemory, Tracker};
use serde_json::json;
use std::time::{Duration, Instant};
use units::{BlockId, MemorySet, PAGE_SIZE, PageIndex, PageRange};

const RAM: BlockId = BlockId(0);
const PAGES: u64 = (512 << 20) / PAGE_SIZE as u64 + PROBED;
const ROUND: Duration = Duration::from_millis(500);
const ROUNDS: u32 = 8;
const RUNS: usize = 3;

#[test]
#[ignore = "not a test: the process that the tests experiment on"]
fn role() {
    common::play();
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Untracked,
    QemusOwn,
    Asynchronous,
    Synchronous(Option<u64>),
}

enum Watched {
    /// Or by QEMU itself.
    Nothing,
    By(Box<dyn Tracker>),
    Hearing(ThrottlingTracker),
}

impl Watched {
    fn attach(way: Way, source: &Source) -> Self {
        let how =
            |group| Tracking { writers: 2, max_stall: Duration::from_millis(5), synchronous: true, group };
        let mut watched = match way {
            Way::Untracked | Way::QemusOwn => Self::Nothing,
            Way::Asynchronous => Self::By(Box::new(source.tracker().unwrap())),
            Way::Synchronous(group) => Self::Hearing(source.throttled(&how(group)).unwrap()),
        };
        if let Some(tracker) = watched.tracker() {
            tracker.begin().unwrap();
        }
        watched
    }

    /// A round, as a migration has them: what was written is protected again, read, and found unchanged or
    /// not. Where nothing is watched, all of it is read.
    fn round(&mut self, memory: &Memory, seen: &mut [u64]) {
        let pages = seen.len() as u64;
        let mut dirty = MemorySet::empty([pages]);
        match self.tracker() {
            Some(tracker) => tracker.collect(&mut dirty).unwrap(),
            None => dirty.block_mut(RAM).insert_range(PageRange::new(PageIndex(0), pages)),
        }
        let mut unchanged = MemorySet::empty([pages]);
        let mut buffer = vec![0; 256 * PAGE_SIZE];
        for run in dirty.block(RAM).runs().flat_map(|run| run.pieces(256).collect::<Vec<_>>()) {
            let content = &mut buffer[..run.bytes().0 as usize];
            memory.read(RAM, run, content).unwrap();
            for (page, content) in (run.start.0..).zip(content.chunks(PAGE_SIZE)) {
                let words = content.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap()));
                let print = words.fold(0, |print: u64, word| print.rotate_left(1) ^ word);
                if std::mem::replace(&mut seen[page as usize], print) == print {
                    unchanged.block_mut(RAM).insert(PageIndex(page));
                }
            }
        }
        if let Some(tracker) = self.tracker() {
            tracker.learn(&unchanged);
        }
    }

    fn heard(&self) -> u64 {
        if let Self::Hearing(tracker) = self { tracker.heard() } else { 0 }
    }

    fn tracker(&mut self) -> Option<&mut dyn Tracker> {
        match self {
            Self::Nothing => None,
            Self::By(tracker) => Some(&mut **tracker),
            Self::Hearing(tracker) => Some(tracker),
        }
    }
}

/// What one run came to.
struct Figures {
    /// Million pages a second.
    touched: f64,
    /// Writes that were heard of in a second.
    heard: f64,
    /// How long the other's writes took, in µs.
    p50: f64,
    p99: f64,
}

fn run(way: Way, order: &str) -> Figures {
    let mut guest = Guest::start(PAGES);
    guest.ask("fill");
    let block = RamBlock { name: "ram".into(), bytes: PAGES * PAGE_SIZE as u64, hva: guest.base };
    let source = Source::open(guest.process.pid(), &[block]).unwrap();
    let memory = source.memory();
    let mut watched = Watched::attach(way, &source);
    let mut seen = vec![0; PAGES as usize];
    let millis = (ROUND * ROUNDS).as_millis();
    guest.order(&format!("race {order} {millis}"));
    let (began, ran) = (Instant::now(), Ran::begin(guest.process.pid(), guest.tid));
    for n in 1..ROUNDS {
        ran.until(ROUND * n);
        watched.round(&memory, &mut seen);
    }
    let answer: Vec<f64> = guest.answer().split(' ').map(|word| word.parse().unwrap()).collect();
    let took = began.elapsed().as_secs_f64();
    let heard = watched.heard();
    Figures { touched: answer[0] / 1e6, heard: heard as f64 / took, p50: answer[1], p99: answer[2] }
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

#[test]
#[ignore = "a measurement"]
fn native() {
    let groups = [Some(1), Some(8), Some(64), Some(512), None];
    let ways: Vec<_> =
        [Way::Untracked, Way::Asynchronous].into_iter().chain(groups.map(Way::Synchronous)).collect();
    for order in ["sequential", "random"] {
        // By turns, so that what else this machine does meets all of them.
        let mut runs: Vec<Vec<Figures>> = ways.iter().map(|_| vec![]).collect();
        for _ in 0..RUNS {
            ways.iter().zip(&mut runs).for_each(|(way, runs)| runs.push(run(*way, order)));
        }
        for (n, way) in ways.iter().enumerate() {
            let of = |what: fn(&Figures) -> f64| median(runs[n].iter().map(what).collect());
            let share: Vec<f64> =
                runs[n].iter().zip(&runs[0]).map(|(it, free)| it.touched / free.touched).collect();
            println!(
                "{order}, {way:?}: {:.2} million pages/s, {:.0} % of untracked; {:.0} heard of/s; \
                 another's write p50 {:.0} µs, p99 {:.0} µs",
                of(|f| f.touched),
                median(share) * 100.0,
                of(|f| f.heard),
                of(|f| f.p50),
                of(|f| f.p99)
            );
        }
    }
}

/// Million pages a second that a guest writes while it is tracked in this way, everything protected again
/// each second.
fn emulated_run(way: Way, guest: &lab::Guest, pid: u32, qmp: &mut lab::Qmp) -> lab::Result<f64> {
    const SECONDS: u32 = 5;
    const MIB: u64 = 1 << 20;
    let where_is = qmp.execute("human-monitor-command", json!({"command-line": "gpa2hva 0"}))?;
    let hva = where_is.as_str().and_then(|text| text.trim().rsplit_once("0x")).map(|(_, hva)| hva);
    let hva = u64::from_str_radix(hva.unwrap(), 16).unwrap();
    let block = RamBlock { name: "ram".into(), bytes: 256 * MIB, hva };
    let source = Source::open(pid as i32, &[block]).unwrap();
    let memory = source.memory();
    let mut watched = Watched::attach(way, &source);
    let mut seen = vec![0; (256 * MIB) as usize / PAGE_SIZE];
    let vcpu = qmp.vcpus()?[0] as i32;
    let (before, ran) = (guest.count("dirty_pages")?, Ran::begin(pid as i32, vcpu));
    for n in 1..=SECONDS {
        if way == Way::QemusOwn {
            // A migration that gets nowhere; each begins with everything protected.
            qmp.execute("migrate", json!({"uri": "exec:cat >/dev/null"}))?;
        }
        ran.until(Duration::from_secs(1) * n);
        if way == Way::QemusOwn {
            qmp.execute("migrate_cancel", json!({}))?;
            lab::wait_for("QEMU to have given up", Duration::from_secs(5), || {
                let said = qmp.execute("query-migrate", json!({}))?;
                Ok((said["status"] == "cancelled").then_some(()))
            })?;
        }
        watched.round(&memory, &mut seen);
    }
    Ok((guest.count("dirty_pages")? - before) / ran.so_far().as_secs_f64() / 1e6)
}

#[test]
#[ignore = "a measurement"]
fn emulated() {
    let ways = [Way::Untracked, Way::QemusOwn, Way::Asynchronous, Way::Synchronous(None)];
    for (number, pattern) in [(95, "sequential"), (96, "random")] {
        story("figures", &["a"], |lab, tools| {
            let spec =
                Spec::new(number, format!("whimbrel.dirty=128M,rate=max,content=word,pattern={pattern}"));
            let machine = HandStart::new(spec.clone()).start(lab.host("a"), tools)?;
            let guest = lab::Guest::reach(&lab.client()?, &spec)?;
            let mut qmp = machine.qmp()?;
            qmp.execute("migrate-set-parameters", json!({"max-bandwidth": 4096}))?;
            let mut runs: Vec<Vec<f64>> = ways.iter().map(|_| vec![]).collect();
            for _ in 0..RUNS {
                for (way, runs) in ways.iter().zip(&mut runs) {
                    runs.push(emulated_run(*way, &guest, machine.pid(), &mut qmp)?);
                }
            }
            for (n, way) in ways.iter().enumerate() {
                let share = runs[n].iter().zip(&runs[0]).map(|(it, free)| it / free).collect();
                println!(
                    "{pattern}, emulated, {way:?}: {:.3} million pages/s, {:.0} % of untracked",
                    median(runs[n].clone()),
                    median(share) * 100.0
                );
            }
            Ok(())
        });
    }
}
