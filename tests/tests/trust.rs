//! Who may move VMs to whom: certificates by default, plaintext by an explicit word, and a host's own limits
//! for what others send it.

use lab::{Agent, Cli, Doing, Host, Oddity, Result, Spec, Stage, Tools, Traces, VmFile, ensure, story};
use std::{fs, path::Path};

const WORK: &str = "whimbrel.check=16M,rate=4M";

fn plain(_: &Host) -> Oddity {
    Oddity { plaintext: true, ..Oddity::default() }
}

/// The agent of a host, begun anew.
fn restart(stage: &mut Stage<'_>, host: &str, odd: Oddity) -> Result<()> {
    stage.agent_mut(host).end()?;
    let (lab, tools) = (stage.lab, stage.tools);
    *stage.agent_mut(host) = Agent::start_odd(lab.host(host), lab.hosts(), tools, odd)?;
    Ok(())
}

#[test]
fn a_migration_is_protected_unless_both_sides_say_otherwise() {
    story("protected by default", &["a", "b"], |lab, tools| {
        let mut stage = Stage::new(lab, tools)?;
        let guest = stage.run("a", &VmFile::new("web", Spec::new(91, WORK)))?;
        let report = stage.migrate("web", &guest, "a", "b", &["--mode", "hybrid"])?;
        ensure!(report.0["protected"] == true, "{}", report.0);
        // By its address, which its certificate names too.
        let a = format!("{}:{}", lab.host("a").address, lab::PORT);
        let report = stage.start_migration("web", "b", &a, &["--verify"])?.completed()?;
        ensure!(report.0["protected"] == true && report.verified() == Some(true), "{}", report.0);
        stage.check_moved("web", &guest, "b", "a")?;

        // One of the two is told otherwise: neither way anything moves.
        let before = Traces::of(lab.host("b"))?;
        restart(&mut stage, "b", plain(lab.host("b")))?;
        let error = stage.start_migration("web", "a", "b", &[])?.ended("failed", 1)?.error();
        ensure!(error.contains("the other side speaks plaintext (--insecure-plaintext)"), "{error}");
        stage.check_untouched("web", &guest, "a", "b", &before)?;
        let said = stage.agent_mut("b").process()?.said();
        ensure!(said.contains("INSECURE: connections are in plaintext"), "b is loud about it: {said}");
        ensure!(said.contains("the other side speaks TLS"), "b says why it turned a away: {said}");
        restart(&mut stage, "b", Oddity::default())?;
        restart(&mut stage, "a", plain(lab.host("a")))?;
        let error = stage.start_migration("web", "a", "b", &[])?.ended("failed", 1)?.error();
        ensure!(error.contains("the other side speaks TLS"), "{error}");
        let said = stage.agent_mut("b").process()?.said();
        ensure!(said.contains("the other side speaks plaintext"), "b says why it turned a away: {said}");
        stage.check_untouched("web", &guest, "a", "b", &before)?;

        // Both: it moves, and says so.
        restart(&mut stage, "b", plain(lab.host("b")))?;
        let mut migration = stage.start_migration("web", "a", "b", &["--verify"])?;
        migration.until("the warning", |event| {
            event["text"].as_str().is_some_and(|text| text.contains("NOT PROTECTED"))
        })?;
        let report = migration.completed()?;
        ensure!(report.0["protected"] == false && report.verified() == Some(true), "{}", report.0);
        stage.check_moved("web", &guest, "a", "b")?;
        let answer = stage.agent("a").cli().run(["status", "web"])?;
        answer.says(&["NOT PROTECTED"])?;
        Ok(())
    });
}

#[test]
fn a_stranger_or_an_impostor_gets_nothing() {
    story("other workgroups", &["a", "b"], |lab, tools| {
        let mut stage = Stage::new(lab, tools)?;
        let guest = stage.run("a", &VmFile::new("web", Spec::new(92, WORK)))?;
        let before = Traces::of(lab.host("b"))?;
        let cli = Cli::new(&tools.whimbrel, None);
        let path = |name: &str| lab.dir().join(name).to_string_lossy().into_owned();
        let tls = lab.host("b").dir.join("tls");

        // The same name, another CA.
        fs::rename(&tls, lab.dir().join("right")).doing("put a certificate aside")?;
        cli.run(["pki", "init", "--dir", &path("other"), "--name", "other"])?.succeeded()?;
        let out = tls.to_string_lossy().into_owned();
        cli.run(["pki", "issue", "b", "--dir", &path("other"), "--out", &out])?.succeeded()?;
        restart(&mut stage, "b", Oddity::default())?;
        let error = stage.start_migration("web", "a", "b", &[])?.ended("failed", 1)?.error();
        ensure!(error.contains("another workgroup than this host's (laboratory)"), "{error}");
        let said = stage.agent_mut("b").process()?.said();
        ensure!(said.contains("another workgroup than this host's (other)"), "b says it too: {said}");
        stage.check_untouched("web", &guest, "a", "b", &before)?;

        // The right CA, at an address that its certificate is not for.
        fs::rename(&tls, lab.dir().join("wrong")).doing("put a certificate aside")?;
        cli.run(["pki", "issue", "b", "--dir", &path("ca"), "--out", &out])?.succeeded()?;
        restart(&mut stage, "b", Oddity::default())?;
        let address = format!("{}:{}", lab.host("b").address, lab::PORT);
        let error = stage.start_migration("web", "a", &address, &[])?.ended("failed", 1)?.error();
        ensure!(error.contains("but for b"), "{error}");
        stage.check_untouched("web", &guest, "a", "b", &before)?;
        stage.migrate("web", &guest, "a", "b", &[]).map(drop)
    });
}

#[test]
fn an_agent_without_certificates_does_not_start_and_says_why() {
    story("no certificates", &["a"], |lab, tools| {
        let cli = Cli::new(&tools.whimbrel, None);
        let dir = lab.dir().join("agent");
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let (state, run, tls) = (text(&dir.join("state")), text(&dir.join("run")), text(&dir.join("tls")));
        let agent = |name: &str| {
            let places = ["--state-dir", &state, "--runtime-dir", &run, "--tls", &tls];
            cli.run(["agent", "--listen", "127.0.0.1:0", "--name", name].iter().chain(&places))
        };
        agent("a")?.exited(1)?.says(&[
            "no certificate yet",
            "whimbrel pki init",
            "pki issue a",
            "--insecure-plaintext",
        ])?;
        let ca = text(&lab.dir().join("ca"));
        cli.run(["pki", "issue", "c", "--dir", &ca, "--out", &tls])?.succeeded()?;
        agent("a")?.exited(1)?.says(&["is called a", "is for c", "pki issue a"])?;
        let key = dir.join("tls/host.key");
        lab::run(std::process::Command::new("chmod").arg("640").arg(&key))?;
        agent("c")?.exited(1)?.says(&["open to others", &format!("chmod 600 {}", key.display())])?;
        lab::run(std::process::Command::new("chmod").arg("600").arg(&key))?;
        fs::copy(lab.host("a").dir.join("tls/host.key"), &key).doing("put another key there")?;
        agent("c")?.exited(1)?.says(&["not the key of"]).map(drop)
    })
}

#[test]
fn a_vm_that_wants_more_than_is_granted_stays_where_it_is() {
    story("what a host grants", &["a", "b"], |lab, tools: &Tools| {
        let mut stage = Stage::new(lab, tools)?;
        let disks = lab.dir().join("elsewhere");
        fs::create_dir(&disks).doing("make a directory")?;
        let disk = disks.join("web.img");
        fs::write(&disk, vec![0; 16 << 20]).doing("make a disk")?;
        let vm = VmFile { disks: vec![(disk, "raw".to_owned())], ..VmFile::new("web", Spec::new(93, WORK)) };
        let guest = stage.run("a", &vm)?;
        let granted = lab.dir().join("granted");
        let allow = Some(format!("disks = [{granted:?}]\nboot = [{granted:?}]\nbridges = [\"other\"]"));
        let odd = Oddity { allow, ..Oddity::default() };
        restart(&mut stage, "b", odd)?;
        let before = Traces::of(lab.host("b"))?;
        let report = stage.start_migration("web", "a", "b", &[])?.ended("failed", 1)?;
        let error = report.error();
        for reason in ["web.img", "vmlinuz", "the bridge br0", "[allow]"] {
            ensure!(error.contains(reason), "{reason} is among the reasons: {error}");
        }
        stage.check_untouched("web", &guest, "a", "b", &before)?;
        restart(&mut stage, "b", Oddity::default())?;
        stage.migrate("web", &guest, "a", "b", &[]).map(drop)
    });
}
