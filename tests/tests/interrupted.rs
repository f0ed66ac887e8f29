//! Migrations that are cancelled, cut off, or lose one of their agents. Whatever happens before the commit,
//! the VM runs on the source as if nothing had been tried; whatever happens after it, the VM runs on the
//! target and loses nothing.

use lab::{Guest, Lab, Migration, Result, Spec, Stage, TcpClient, Tools, Traces, VmFile, ensure, story};
use std::time::{Duration, Instant};
use units::Rate;

/// Enough memory to keep a slow link busy for several seconds, and some of it always changing, to what can
/// neither be compressed nor sent as a difference: what is left for the switchover is several times what the
/// sockets hold.
const WORK: &str = "whimbrel.fill=80M whimbrel.check=16M,rate=4M whimbrel.dirty=40M,rate=24M";
/// About four seconds for one round.
const SLOW: Rate = Rate(32 << 20);
/// Several seconds for what one round of [`SLOW`] leaves.
const CRAWL: Rate = Rate(2 << 20);
/// More than ten seconds for all that a post-copy moves.
const STEADY: Rate = Rate(8 << 20);
const AFTER: Duration = Duration::from_secs(20);

/// A VM on `a`, a slow link, a client.
struct Scene<'a> {
    stage: Stage<'a>,
    guest: Guest,
    client: TcpClient,
    before: Traces,
}

impl<'a> Scene<'a> {
    fn new(lab: &'a Lab, tools: &'a Tools, number: u8) -> Result<Self> {
        let stage = Stage::new(lab, tools)?;
        let guest = stage.run("a", &VmFile::new("web", Spec::new(number, WORK)))?;
        let client = guest.echo(Duration::from_millis(5))?;
        lab.host("a").shape(Some(SLOW))?;
        let before = Traces::of(lab.host("b"))?;
        Ok(Self { stage, guest, client, before })
    }

    fn migrate(&self, options: &[&str]) -> Result<Migration> {
        self.stage.start_migration("web", "a", "b", options)
    }

    /// A migration in the middle of its switchover: so much is dirty and the link so slow that it takes
    /// seconds.
    fn until_switchover(&self, also: &[&str]) -> Result<Migration> {
        let options = [&["--mode", "pre-copy", "--max-downtime", "60s"], also].concat();
        let mut migration = self.migrate(&options)?;
        migration.until_round(1)?;
        self.stage.lab.host("a").shape(Some(CRAWL))?;
        migration.until_phase("switchover")?;
        Ok(migration)
    }

    fn untouched(&self) -> Result<()> {
        self.stage.check_untouched("web", &self.guest, "a", "b", &self.before)
    }

    /// After all that: it goes, and the client's connection has lived through everything.
    fn then_it_goes(self) -> Result<()> {
        self.stage.lab.host("a").shape(None)?;
        self.stage.migrate("web", &self.guest, "a", "b", &["--mode", "pre-copy"])?;
        self.client.finish(Duration::from_secs(10)).map(drop)
    }
}

#[test]
fn a_cancelled_migration_leaves_no_trace_on_the_target() {
    story("cancel", &["a", "b"], |lab, tools| {
        let scene = Scene::new(lab, tools, 61)?;
        let cancel =
            |scene: &Scene| scene.stage.agent("a").cli().run(["cancel", "web"])?.succeeded().map(drop);

        let mut migration = scene.migrate(&["--mode", "pre-copy"])?;
        migration.until_phase("preflight")?;
        cancel(&scene)?;
        migration.ended("cancelled", 130)?;
        scene.untouched()?;

        let mut migration = scene.migrate(&["--mode", "pre-copy"])?;
        migration.until_moving("pre-copy")?;
        cancel(&scene)?;
        migration.ended("cancelled", 130)?;
        scene.untouched()?;

        // Ctrl-C is a cancel.
        let mut migration = scene.migrate(&["--mode", "hybrid"])?;
        migration.until_moving("pre-copy")?;
        migration.interrupt()?;
        migration.ended("cancelled", 130)?;
        scene.untouched()?;

        // While the guest stands still already.
        let migration = scene.until_switchover(&[])?;
        cancel(&scene)?;
        migration.ended("cancelled", 130)?;
        scene.stage.lab.host("a").shape(Some(SLOW))?;
        scene.untouched()?;

        // After the commit there is nothing to cancel: it says so, and the migration goes on to its end.
        let mut migration = scene.migrate(&["--mode", "post-copy", "--verify"])?;
        migration.until_phase("post-copy")?;
        let answer = scene.stage.agent("a").cli().run(["cancel", "web"])?;
        answer.exited(1)?.says(&["post-copy"])?;
        migration.completed()?;
        scene.stage.check_moved("web", &scene.guest, "a", "b")?;

        let answer = scene.stage.agent("b").cli().run(["cancel", "web"])?;
        answer.exited(1)?.says(&["nothing to cancel"])?;
        scene.client.finish(Duration::from_secs(10)).map(drop)
    });
}

#[test]
fn a_vm_whose_link_is_cut_before_the_commit_runs_on_the_source() {
    story("cut before commit", &["a", "b"], |lab, tools| {
        let scene = Scene::new(lab, tools, 62)?;
        let (a, b) = (lab.host("a"), lab.host("b"));

        // In preflight: nobody answers at all.
        b.cut()?;
        let report = scene.migrate(&["--mode", "pre-copy"])?.ended("failed", 1)?;
        ensure!(report.vm_runs_on() == Some("a"), "it says who runs the VM: {}", report.0);
        b.mend()?;
        scene.untouched()?;

        // In the first round, and in a later one.
        for round in 0..2 {
            let mut migration = scene.migrate(&["--mode", "pre-copy", "--give-up", "1s"])?;
            if round > 0 {
                migration.until_round(1)?;
            } else {
                migration.until_moving("pre-copy")?;
            }
            a.cut_from(b)?;
            let report = migration.ended("failed", 1)?;
            ensure!(report.vm_runs_on() == Some("a"), "it says who runs the VM: {}", report.0);
            scene.stage.runs_on("web", "a")?;
            scene.guest.runs()?;
            a.mend_to(b)?;
            scene.untouched()?;
        }

        // While the guest stands still already.
        let migration = scene.until_switchover(&["--give-up", "1s"])?;
        a.cut_from(b)?;
        let report = migration.ended("failed", 1)?;
        ensure!(report.vm_runs_on() == Some("a"), "it says who runs the VM: {}", report.0);
        scene.guest.runs()?;
        a.mend_to(b)?;
        scene.untouched()?;
        scene.then_it_goes()
    });
}

/// How soon it is noticed that a link is gone, and that it is back, in stories: three times the figures, for
/// a busy machine.
const NOTICED: Duration = Duration::from_secs(6);
const RESUMED: Duration = Duration::from_secs(3);
/// How soon pages come again after the start of a target's agent that was killed: also three times the
/// figure, as the median of so many.
const ANSWERED: Duration = Duration::from_millis(1500);
const RESTARTS: usize = 5;

#[test]
fn a_link_that_comes_back_is_used_again() {
    story("a link that comes back", &["a", "b"], |lab, tools| {
        let scene = Scene::new(lab, tools, 67)?;
        let (a, b) = (lab.host("a"), lab.host("b"));
        let mut migration = scene.migrate(&["--mode", "hybrid", "--verify"])?;
        migration.until_moving("pre-copy")?;
        // Before the commit, and after it.
        for (phase, lost) in [("pre-copy", "the VM runs on here"), ("post-copy", "its guest waits for pages")]
        {
            migration.until_moving(phase)?;
            let cut = Instant::now();
            a.cut_from(b)?;
            migration.until_note(lost)?;
            let noticed = cut.elapsed();
            if phase == "pre-copy" {
                scene.guest.runs()?;
            }
            let mended = Instant::now();
            a.mend_to(b)?;
            migration.until_notes("connected to b again", if phase == "pre-copy" { 1 } else { 2 })?;
            let resumed = mended.elapsed();
            eprintln!("{phase}: noticed after {noticed:?}, resumed after {resumed:?}");
            ensure!(noticed < NOTICED, "{phase}: the loss was noticed after {noticed:?}");
            ensure!(resumed < RESUMED, "{phase}: the link's return was noticed after {resumed:?}");
        }
        let report = migration.completed()?;
        ensure!(report.verified() == Some(true), "{}", report.0);
        scene.stage.check_moved("web", &scene.guest, "a", "b")?;
        scene.client.finish(Duration::from_secs(30)).map(drop)
    });
}

#[test]
fn i3_a_link_lost_in_the_pause_ends_neither_guest_nor_migration() {
    story("a link lost in the pause", &["a", "b"], |lab, tools| {
        let scene = Scene::new(lab, tools, 72)?;
        let (a, b) = (lab.host("a"), lab.host("b"));
        let mut migration = scene.until_switchover(&["--verify"])?;
        let cut = Instant::now();
        a.cut_from(b)?;
        migration.until_note("it ran on here after")?;
        let noticed = cut.elapsed();
        eprintln!("it ran on {noticed:?} after the cut");
        ensure!(noticed < NOTICED, "the guest stood still for {noticed:?} without a link");
        // While the link is still away.
        scene.guest.runs()?;
        a.shape(None)?;
        a.mend_to(b)?;
        migration.until_note("connected to b again")?;
        let report = migration.completed()?;
        ensure!(report.verified() == Some(true), "{}", report.0);
        // Of the pause in which it changed hands, not of the one that came to nothing: that one waited for
        // two seconds of silence.
        let downtime = report.number("downtime_ms")?;
        ensure!(downtime > 0.0 && downtime < noticed.as_secs_f64() * 1e3, "{downtime} ms, {noticed:?}");
        let in_vain = report.number("aborted_pauses_ms")?;
        ensure!(in_vain > downtime && in_vain < NOTICED.as_secs_f64() * 1e3, "{in_vain} ms, {downtime} ms");
        scene.stage.check_moved("web", &scene.guest, "a", "b")?;
        scene.client.finish(Duration::from_secs(30)).map(drop)
    });
}

#[test]
fn a_single_lost_connection_is_opened_again_alone() {
    story("one connection ends", &["a", "b"], |lab, tools| {
        let scene = Scene::new(lab, tools, 70)?;
        let (a, b) = (lab.host("a"), lab.host("b"));
        let mut migration = scene.migrate(&["--mode", "hybrid", "--verify"])?;
        for (phase, times) in [("pre-copy", 1), ("post-copy", 2)] {
            migration.until_moving(phase)?;
            a.end_busiest_connection(b)?;
            migration.until_notes("opened again; the others went on", times)?;
        }
        let again = |event: &serde_json::Value| event.to_string().contains("reconnecting");
        ensure!(!migration.events().iter().any(again), "all of them were opened again");
        let report = migration.completed()?;
        ensure!(report.verified() == Some(true), "{}", report.0);
        scene.stage.check_moved("web", &scene.guest, "a", "b")?;
        scene.client.finish(Duration::from_secs(30)).map(drop)
    });
}

#[test]
fn i3_a_guest_whose_agent_dies_in_its_pause_runs_on() {
    story("watchdog", &["a", "b"], |lab, tools| {
        let mut scene = Scene::new(lab, tools, 68)?;
        let migration = scene.until_switchover(&[])?;
        let killed = Instant::now();
        scene.stage.agent_mut("a").crash()?;
        drop(migration);
        // Nobody starts another agent.
        scene.guest.runs()?;
        eprintln!("the guest was seen running {:?} after its agent was killed", killed.elapsed());
        scene.stage.lab.host("a").shape(None)?;
        scene.stage.agent_mut("a").begin()?;
        scene.untouched()?;
        scene.then_it_goes()
    });
}

#[test]
fn a_guest_whose_link_is_cut_during_post_copy_waits_and_goes_on() {
    story("cut during post-copy", &["a", "b"], |lab, tools| {
        let scene = Scene::new(lab, tools, 63)?;
        let (a, b) = (lab.host("a"), lab.host("b"));
        let mut migration = scene.migrate(&["--mode", "post-copy"])?;
        migration.until_phase("post-copy")?;
        a.cut_from(b)?;
        // Long enough for every connection between the agents to be given up.
        std::thread::sleep(AFTER);
        a.mend_to(b)?;
        migration.completed()?;
        scene.stage.check_moved("web", &scene.guest, "a", "b")?;
        scene.client.finish(Duration::from_secs(30)).map(drop)
    });
}

#[test]
fn a_vm_survives_the_crash_of_either_agent_before_the_commit() {
    story("crash before commit", &["a", "b"], |lab, tools| {
        let mut scene = Scene::new(lab, tools, 64)?;

        let mut migration = scene.migrate(&["--mode", "pre-copy"])?;
        migration.until_moving("pre-copy")?;
        scene.stage.agent_mut("b").crash()?;
        // It is waited for; what it was receiving went with it.
        migration.until_note("was lost; the VM runs on here")?;
        scene.guest.runs()?;
        scene.stage.agent_mut("b").begin()?;
        let report = migration.ended("failed", 1)?;
        ensure!(report.error().contains("b has given up meanwhile"), "{}", report.0);
        scene.untouched()?;

        let mut migration = scene.migrate(&["--mode", "pre-copy"])?;
        migration.until_moving("pre-copy")?;
        scene.stage.agent_mut("a").crash()?;
        drop(migration);
        // The write protection went with the agent: the guest runs on, without anybody's help.
        scene.guest.runs()?;
        scene.stage.agent_mut("a").begin()?;
        scene.untouched()?;
        scene.then_it_goes()
    });
}

#[test]
fn a_vm_survives_the_crash_of_either_agent_during_post_copy() {
    story("crash during post-copy", &["a", "b"], |lab, tools| {
        let mut scene = Scene::new(lab, tools, 65)?;
        let mut migration = scene.migrate(&["--mode", "post-copy"])?;
        migration.until_phase("post-copy")?;
        // So that memory is still missing after all of this.
        lab.host("a").shape(Some(STEADY))?;
        let mut answered = Vec::new();
        for times in 1..=RESTARTS {
            scene.stage.agent_mut("b").crash()?;
            // The guest may run into a missing page and wait: it must not read zeros.
            std::thread::sleep(Duration::from_millis(500));
            let started = Instant::now();
            scene.stage.agent_mut("b").begin()?;
            migration.until_notes("connected to b again", times)?;
            answered.push(started.elapsed());
            scene.guest.runs()?;
        }
        answered.sort();
        let median = answered[RESTARTS / 2];
        eprintln!("from the start of the target's agent to pages: median {median:?} of {answered:?}");
        ensure!(median < ANSWERED, "it took {median:?}");
        scene.stage.agent_mut("a").crash()?;
        drop(migration);
        std::thread::sleep(Duration::from_millis(500));
        scene.stage.agent_mut("a").begin()?;
        scene.stage.lab.host("a").shape(None)?;
        scene.stage.check_moved("web", &scene.guest, "a", "b")?;
        scene.client.finish(Duration::from_secs(30)).map(drop)
    });
}

#[test]
fn a_frozen_target_is_a_lost_target() {
    story("a target that goes silent", &["a", "b"], |lab, tools| {
        let scene = Scene::new(lab, tools, 66)?;
        let mut migration = scene.migrate(&["--mode", "pre-copy", "--give-up", "2s"])?;
        migration.until_moving("pre-copy")?;
        scene.stage.agent("b").freeze()?;
        let report = migration.ended("failed", 1)?;
        ensure!(report.vm_runs_on() == Some("a"), "it says who runs the VM: {}", report.0);
        scene.guest.runs()?;
        scene.stage.agent("b").thaw()?;
        scene.untouched()?;
        scene.then_it_goes()
    });
}
