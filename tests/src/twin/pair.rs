//! Two VMs that start alike and are told the same; one of them is also moved.

use super::{
    action::{Action, Deed, Mode},
    listed::{DIFFERENCES, REFUSALS},
    look,
    vm::{Before, Vm, fault, sink, wrapper},
};
use crate::{
    Doing, Error, Lab, Migration, Oddity, Report, Result, Stage, Tools, ensure, storm::Moment, wait_for,
};
use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    thread,
    time::Duration,
};

/// How long something may take that follows from what has already happened.
const SOON: Duration = Duration::from_secs(20);

/// Slow enough for each moment to come: what there is to move takes most of a second.
const BANDWIDTH: &str = "5M";

/// What is the guest's own, not what somebody set.
const GUESTS: [&str; 3] = ["info registers", "info roms", "memory"];
/// Whether it runs, and what only a guest that runs says of itself.
const RUNS: [&str; 2] = ["query-status", look::SAID];

/// How an error ends that says that something of the guest's own differs, or only what follows from that one
/// of them runs, or nothing of either.
const DIFFER: &str = "they differ";
pub(super) const IN_WHETHER_IT_RUNS: &str = "they differ in whether they run";
pub(super) const IN_WHAT_WAS_SET: &str = "they differ in what was set";

/// By how much the two guests' clocks may differ: each is read in whole seconds, one after the other.
const CLOCKS: i64 = 2;

/// Two hosts with agents, on which pairs live.
pub struct Twins<'a> {
    stage: Stage<'a>,
    /// Where QEMU's own migration goes.
    sink: PathBuf,
    pairs: AtomicU32,
}

/// A sequence that broke a promise.
#[derive(Debug)]
pub struct Broken {
    /// How many of its actions it took; what comes after them has no part in it.
    pub actions: usize,
    /// How.
    pub error: Error,
}

/// How a sequence went.
pub type Outcome = std::result::Result<Went, Broken>;

impl From<Broken> for Error {
    fn from(broken: Broken) -> Self {
        broken.error
    }
}

/// What came of the moves of a sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Went {
    /// How often the VM was moved.
    pub moved: u32,
    /// How often that was refused, or ended, for a listed reason.
    pub refused: u32,
}

struct Pair<'t> {
    stage: &'t Stage<'t>,
    /// The one that is never moved.
    still: Vm,
    /// Its twin.
    moved: Vm,
    at: usize,
    went: Went,
    /// What was done to both.
    done: Vec<Deed>,
    /// What QEMU refuses is told.
    told: bool,
}

const HOSTS: [&str; 2] = ["a", "b"];

impl<'a> Twins<'a> {
    /// In a laboratory with the hosts `a` and `b`.
    pub fn new(lab: &'a Lab, tools: &'a Tools) -> Result<Self> {
        let qemu = wrapper(lab.dir())?;
        let stage =
            Stage::with(lab, tools, |_| Oddity { lines: format!("qemu = {qemu:?}"), ..Oddity::default() })?;
        let sink = sink(lab.dir())?;
        Ok(Self { stage, sink, pairs: AtomicU32::new(0) })
    }

    /// Lets a pair live through a sequence; others may live at the same time.
    pub fn live(&self, sequence: &[Action]) -> Outcome {
        self.tell(sequence, false)
    }

    /// The same; `told`: what QEMU refuses is said.
    pub fn tell(&self, sequence: &[Action], told: bool) -> Outcome {
        let n = self.pairs.fetch_add(1, Relaxed) + 1;
        let mut pair = self.begin(n, told).map_err(|error| Broken { actions: 0, error })?;
        let lived = pair.live(sequence);
        let (name, host) = (pair.moved.name.clone(), HOSTS[pair.at]);
        drop(pair);
        // Its QEMU is gone: the agent forgets it.
        let _ = self.stage.agent(host).cli().run(["stop", &name]);
        let _ = fs::remove_dir_all(self.dir(n));
        lived
    }

    fn dir(&self, n: u32) -> PathBuf {
        self.stage.lab.dir().join(format!("pair{n}"))
    }

    fn begin(&self, n: u32, told: bool) -> Result<Pair<'_>> {
        let (dir, host) = (self.dir(n), self.stage.lab.host("a"));
        let start = |name: String| Vm::start(host, &dir, &self.sink, &name);
        let (still, moved) = thread::scope(|scope| {
            let still = scope.spawn(|| start(format!("s{n}")));
            let moved = start(format!("m{n}"));
            (still.join().unwrap_or_else(|_| Err(Error::new("start a VM", "a panic"))), moved)
        });
        let (still, moved) = (still?, moved?);
        let first = moved.first_monitor();
        self.stage.agent("a").cli().json(&["adopt", &moved.name, "--qmp", &first.to_string_lossy()])?;
        Ok(Pair { stage: &self.stage, still, moved, at: 0, went: Went::default(), done: vec![], told })
    }
}

/// What nobody can compare. After its own migration QEMU 7.2 ends by an assertion when it is to write, also
/// after a reset; and before that it wakes a guest that sleeps, which gets as far as it does.
fn is_left_out(deed: Deed, vm: &Vm, state: &str) -> bool {
    match deed {
        Deed::Grow | Deed::Commit => vm.has_no_disks,
        Deed::Migrate => state == "suspended",
        _ => false,
    }
}

/// Whether our pause begins, or will within a moment.
fn switches(migration: &Migration) -> bool {
    /// From what the agent says to what is read here.
    const LATE: Duration = Duration::from_millis(50);
    thread::sleep(LATE);
    migration.events().iter().any(|event| event["event"] == "phase" && event["phase"] == "switchover")
}

impl Pair<'_> {
    fn live(&mut self, sequence: &[Action]) -> Outcome {
        self.compare("the beginning").map_err(|error| Broken { actions: 0, error })?;
        for (n, action) in sequence.iter().enumerate() {
            if self.still.over && self.moved.over {
                break;
            }
            self.act(n + 1, *action).map_err(|error| Broken { actions: n + 1, error })?;
        }
        Ok(self.went)
    }

    fn act(&mut self, n: usize, action: Action) -> Result<()> {
        let what = format!("action {n}, {action}");
        let done = match action {
            Action::Both(deed) => self.both(deed),
            Action::Move(mode) => self.migrate(mode, None),
            Action::MoveWhile(mode, at, deed) => self.migrate(mode, Some((at, deed))),
        };
        done.map_err(|error| fault(format!("{what}: {}", error.what), error.why))?;
        self.compare(&what)
    }

    fn both(&mut self, deed: Deed) -> Result<()> {
        self.done.push(deed);
        let stayed = Self::does(&mut self.still, deed)?;
        let moved = Self::does(&mut self.moved, deed)?;
        if let Some(error) = stayed.as_ref().filter(|_| self.told) {
            eprintln!("{}: {error}", deed.word());
        }
        ensure!(stayed == moved, "the one that stayed said {stayed:?}, the other one {moved:?}");
        Ok(())
    }

    fn does(vm: &mut Vm, deed: Deed) -> Result<Option<String>> {
        let state = vm.state()?;
        if is_left_out(deed, vm, &state) {
            return Ok(None);
        }
        let before = Before { said: vm.words()?, state, lost: false };
        let error = vm.begin(deed, before.state == "running")?;
        vm.finish(deed, &before, error.is_some())?;
        Ok(error.map(|error| vm.without_its_name(&error)))
    }

    /// Moves the one to the other host; both do something meanwhile, if that is wanted.
    fn migrate(&mut self, mode: Mode, meanwhile: Option<(Moment, Deed)>) -> Result<()> {
        let (from, to) = (HOSTS[self.at], HOSTS[1 - self.at]);
        let mut options = vec!["--mode", mode.word(), "--max-downtime", "300ms"];
        if meanwhile.is_some() {
            options.extend(["--bandwidth", BANDWIDTH]);
        }
        let mut migration = self.stage.start_migration(&self.moved.name, from, to, &options)?;
        let mut again = None;
        let mut in_pause = false;
        if let Some((at, deed)) = meanwhile {
            let state = self.still.state()?;
            // One that has ended before was refused, or has no such moment: then it is done after it.
            let _ = at.wait(&mut migration);
            self.done.push(deed);
            // A QEMU that the VM has left says nothing any more: it is done where it is now.
            let (said, stood) = (self.moved.words(), self.moved.state());
            // In our pause it stands still, and a key would be lost.
            let standing = Vm::is_by_key(deed) && state == "running" && stood.as_deref() != Ok("running");
            let left_out = is_left_out(deed, &self.moved, &state);
            let begun =
                if standing || left_out { None } else { self.moved.begin(deed, state == "running").ok() };
            let lost = self.moved.state().as_deref() != Ok("running");
            in_pause =
                deed == Deed::Pause && (lost && stood.as_deref() != Ok("running") || switches(&migration));
            let stayed = Self::does(&mut self.still, deed)?;
            again = Some((deed, stayed, said.ok().map(|said| Before { said, state, lost }), begun));
        }
        let (_, report) = migration.end()?;
        let ended = matches!(again, Some((Deed::Quit, _, Some(_), Some(None))));
        if ended {
            return self.is_over(&report);
        }
        self.arrive(&report, from, to)?;
        let Some((deed, stayed, before, begun)) = again else { return Ok(()) };
        // QEMU tells nobody of a `stop` in our pause, and refuses much in it; a migration of its own is ended
        // with it. Whoever asked for that asks again.
        let refused = matches!(begun, Some(Some(_))) && stayed.is_none();
        let undone = match deed {
            Deed::Pause | Deed::Migrate => begun == Some(None) && self.moved.state()? == "running",
            _ => false,
        };
        let moved = match (before, begun) {
            (Some(before), Some(error)) if !(in_pause && (refused || undone)) => {
                self.moved.finish(deed, &before, error.is_some())?;
                error.map(|error| self.moved.without_its_name(&error))
            }
            _ => Self::does(&mut self.moved, deed)?,
        };
        ensure!(stayed == moved, "the one that stayed said {stayed:?}, the other one {moved:?}");
        Ok(())
    }

    /// Somebody has ended the VM, and QEMU had agreed: then it is nowhere.
    fn is_over(&mut self, report: &Report) -> Result<()> {
        let name = &self.moved.name;
        for host in HOSTS {
            let state = self.stage.show(host, name)?.map(|vm| vm["state"].as_str().unwrap_or("?").to_owned());
            ensure!(state.as_deref() != Some("running"), "it was ended, and runs on {host}: {}", report.0);
        }
        self.moved.over = true;
        Ok(())
    }

    /// Where it is, by what the report and both agents say.
    fn arrive(&mut self, report: &Report, from: &str, to: &str) -> Result<()> {
        let name = &self.moved.name;
        let completed = report.outcome() == "completed";
        // A host that gets nothing has to end the QEMU that waited first.
        let alone = || {
            let (here, there) = (self.stage.show(from, name)?, self.stage.show(to, name)?);
            Ok((here.is_none() != there.is_none()).then_some(there))
        };
        let there = wait_for(&format!("I1: {name} on one of {from} and {to}"), SOON, alone)?;
        ensure!(completed == there.is_some(), "the report is about something else: {}", report.0);
        if let Some(there) = there {
            let pid =
                there["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).doing("read its process")?;
            self.moved.is_now(pid)?;
            self.at = 1 - self.at;
            self.went.moved += 1;
            return Ok(());
        }
        // What was done meanwhile may have come after it was refused.
        let before = &self.done[..self.done.len().saturating_sub(1)];
        let error = report.error();
        let listed = REFUSALS
            .iter()
            .any(|refusal| refusal.covers(&error, &self.done) || refusal.covers(&error, before));
        // A target that still starts the QEMU of a move that was over at once has it end only then.
        let busy = self.went.refused > 0 && error.contains(&format!("has a VM named {name} already"));
        ensure!(listed || busy, "it was not moved for a reason that is not listed: {}", report.0);
        self.went.refused += 1;
        Ok(())
    }

    /// Both look the same, but for what is listed.
    fn compare(&mut self, after: &str) -> Result<()> {
        if self.still.over || self.moved.over {
            ensure!(self.still.over == self.moved.over, "after {after} only one of them has ended");
            return Ok(());
        }
        let (still, moved) = (self.still.look()?, self.moved.look()?);
        let mut left = Vec::new();
        for found in still.differences(&moved) {
            if !DIFFERENCES.iter().any(|listed| listed.covers(&found)) {
                left.push(found);
            }
        }
        let clocks = self.still.clock()? - self.moved.clock()?;
        // Either of them may be past midnight.
        let apart = clocks.rem_euclid(86_400).min((-clocks).rem_euclid(86_400));
        ensure!(apart <= CLOCKS, "after {after} their clocks are {clocks} s apart");
        if left.is_empty() {
            return Ok(());
        }
        // What was set in a moment that is lost costs nothing else.
        let any_of = |sections: &[&str]| left.iter().any(|d| sections.contains(&d.section.as_str()));
        let differ = match (any_of(&GUESTS), any_of(&RUNS)) {
            (true, _) => DIFFER,
            (false, true) => IN_WHETHER_IT_RUNS,
            (false, false) => IN_WHAT_WAS_SET,
        };
        /// So many lines say enough of what went wrong.
        const SHOWN: usize = 40;
        let lines = left.iter().take(SHOWN).map(|d| {
            let line = |line: &Option<String>| line.clone().unwrap_or_else(|| "(none)".to_owned());
            format!("{}\n    stayed: {}\n    moved:  {}", d.section, line(&d.stayed), line(&d.moved))
        });
        Err(fault(format!("after {after} {differ}"), lines.collect::<Vec<_>>().join("\n")))
    }
}
