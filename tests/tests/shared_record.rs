//! Who owns a VM is kept in a directory that both hosts share: then a target that is lost for good, at the
//! worst moment, leaves nobody in doubt (I1, I3, I4).

use lab::{
    Call, FaultyDir, Guest, Lab, Oddity, Result, Spec, Stage, Tools, Traces, Trouble, VmFile, ensure, story,
    wait_for,
};
use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    time::Duration,
};

const WORK: &str = "whimbrel.fill=40M whimbrel.check=16M,rate=4M";
/// Whatever takes so long does not come any more.
const LONG: Duration = Duration::from_secs(60);

/// One directory, and the views of it that the hosts have: by different paths, and at times bad ones.
struct Datastore {
    of_a: FaultyDir,
    of_b: FaultyDir,
}

impl Datastore {
    fn new(lab: &Lab) -> Result<Self> {
        let real = lab.dir().join("shared");
        let view = |host: &str| FaultyDir::mount(&lab.dir().join(format!("view-of-{host}")), &real);
        Ok(Self { of_a: view("a")?, of_b: view("b")? })
    }

    fn path(&self, host: &str) -> &Path {
        if host == "b" { self.of_b.path() } else { self.of_a.path() }
    }
}

fn kept_in(directory: &Path) -> Oddity {
    Oddity { lines: format!("[ownership]\ndirectory = {directory:?}\n"), ..Oddity::default() }
}

/// Hosts that share the directory, and a VM on `a` whose record is there.
fn stage<'a>(lab: &'a Lab, tools: &'a Tools, data: &Datastore, number: u8) -> Result<(Stage<'a>, Guest)> {
    let stage = Stage::with(lab, tools, |host| kept_in(data.path(&host.name)))?;
    let guest = stage.run("a", &VmFile::new("web", Spec::new(number, WORK)))?;
    Ok((stage, guest))
}

#[test]
fn i1_a_target_lost_after_the_permit_is_settled_by_directory() {
    story("lost after the authorization", &["a", "b"], |lab, tools| {
        let data = Datastore::new(lab)?;
        let (mut stage, guest) = stage(lab, tools, &data, 68)?;
        let client = guest.echo(Duration::from_millis(5))?;
        let before = Traces::of(lab.host("b"))?;

        // b has the permit and cannot claim.
        let tried = Arc::new(AtomicU32::new(0));
        let count = tried.clone();
        data.of_b.trouble(move |_, call| {
            if call != Call::Link {
                return Trouble::None;
            }
            count.fetch_add(1, SeqCst);
            Trouble::NotDone
        });
        let migration = stage.start_migration("web", "a", "b", &["--mode", "pre-copy"])?;
        wait_for("b's first claim", LONG, || Ok((tried.load(SeqCst) > 0).then_some(())))?;
        // The datastore is away, too, when b dies: nobody can know, and nobody runs it.
        data.of_a.trouble(|_, _| Trouble::NotDone);
        stage.agent_mut("b").crash()?;
        wait_for("a's questions", LONG, || Ok((data.of_a.calls() >= 3).then_some(())))?;
        let doubtful = stage.show("a", "web")?;
        ensure!(doubtful.as_ref().is_some_and(|vm| vm["state"] != "running"), "it waits: {doubtful:?}");

        // Nobody can ask b any more. But the directory is back, and says that the VM is a's.
        data.of_a.well();
        let report = migration.ended("failed", 1)?;
        ensure!(report.vm_runs_on() == Some("a"), "it says who runs the VM: {}", report.0);
        stage.runs_on("web", "a")?;
        guest.runs()?;
        guest.verify()?;

        // b comes back after all, finds that it may have claimed, asks, and gives up.
        data.of_b.well();
        stage.agent_mut("b").begin()?;
        stage.check_untouched("web", &guest, "a", "b", &before)?;
        stage.migrate("web", &guest, "a", "b", &["--mode", "pre-copy"])?;
        stage.migrate("web", &guest, "b", "a", &["--mode", "post-copy"])?;
        client.finish(Duration::from_secs(10)).map(drop)
    });
}

#[test]
fn i4_a_target_killed_after_its_claim_runs_the_vm_when_back() {
    story("lost after the claim", &["a", "b"], |lab, tools| {
        let data = Datastore::new(lab)?;
        let (mut stage, guest) = stage(lab, tools, &data, 69)?;

        // b's claim is done, and it never hears of it.
        let linked = Arc::new(AtomicU32::new(0));
        let count = linked.clone();
        data.of_b.trouble(move |_, call| {
            if count.load(SeqCst) > 0 {
                return Trouble::NotDone;
            }
            if call != Call::Link {
                return Trouble::None;
            }
            count.fetch_add(1, SeqCst);
            Trouble::LostReply
        });
        let migration = stage.start_migration("web", "a", "b", &["--mode", "pre-copy"])?;
        wait_for("b's claim", LONG, || Ok((linked.load(SeqCst) > 0).then_some(())))?;
        stage.agent_mut("b").crash()?;

        // The directory says that it is b's: a never runs it again, although b does not run it yet.
        let (_, report) = migration.end()?;
        ensure!(report.outcome() == "completed", "the record decided: {}", report.0);
        ensure!(stage.show("a", "web")?.is_none(), "a has forgotten it");

        data.of_b.well();
        stage.agent_mut("b").begin()?;
        stage.check_moved("web", &guest, "a", "b")?;
        stage.migrate("web", &guest, "b", "a", &["--mode", "pre-copy"]).map(drop)
    });
}

#[test]
fn a_host_with_another_record_is_refused() {
    story("another record", &["a", "b", "c", "d"], |lab, tools| {
        let (shared, other) = (lab.dir().join("shared"), lab.dir().join("other"));
        for dir in [&shared, &other] {
            std::fs::create_dir_all(dir).map_err(|e| lab::Error::new("make a directory", e))?;
        }
        // b keeps it elsewhere, c nowhere, d in the same place.
        let stage = Stage::with(lab, tools, |host| match host.name.as_str() {
            "b" => kept_in(&other),
            "c" => Oddity::default(),
            _ => kept_in(&shared),
        })?;
        let file = VmFile::new("web", Spec::new(70, WORK));
        let guest = stage.run("a", &file)?;
        for (to, says) in [("b", "another record"), ("c", "this host in none")] {
            let report = stage.start_migration("web", "a", to, &[])?.ended("failed", 1)?;
            ensure!(report.vm_runs_on() == Some("a"), "it says who runs the VM: {}", report.0);
            ensure!(report.error().contains(says), "{to} says why: {}", report.error());
            ensure!(report.error().contains("[ownership]"), "{to} says what to do: {}", report.error());
        }
        guest.runs()?;

        let path = lab.dir().join("web.toml").to_string_lossy().into_owned();
        let answer = stage.agent("d").cli().run(["run", &path])?;
        answer.exited(1)?.says(&["belongs to a", "--i-have-fenced a"])?;
        ensure!(stage.show("d", "web")?.is_none(), "nothing of it is on d");

        // It goes where it is allowed to, and once it has ended it may be started anywhere.
        stage.start_migration("web", "a", "d", &["--mode", "pre-copy"])?.completed()?;
        let answer = stage.agent("a").cli().run(["run", &path])?;
        answer.exited(1)?.says(&["belongs to d"])?;
        stage.agent("d").cli().run(["stop", "web"])?.succeeded()?;
        stage.run("a", &file)?.runs()?;
        let answer = stage.agent("d").cli().run(["run", &path])?;
        answer.exited(1)?.says(&["belongs to a"]).map(drop)
    });
}
