//! Disks and media: a VM goes only to a host that has its files, and that is shown, not assumed.

use lab::{Datastore, Doing, HandStart, Oddity, Spec, Stage, Traces, VmFile, ensure, story, wait_for};
use std::{fs, path::Path, time::Duration};

const WORK: &str = "whimbrel.check=16M,rate=4M whimbrel.disk=vda,set=4M";

/// How long something may take that follows from what has already happened.
const SOON: Duration = Duration::from_secs(20);

fn sparse(path: &Path, bytes: u64) -> lab::Result<()> {
    fs::File::create(path).and_then(|file| file.set_len(bytes)).doing(format!("make {}", path.display()))
}

/// `alike`: a file system of each host's own, with the same file in it. `token`: one that both share and
/// whose locks hold on one host only. `iso`: a directory of each host's own.
#[test]
fn i6_a_vm_goes_only_where_its_files_are() {
    story("files", &["a", "b"], |lab, tools| {
        let at = |name: &str| lab.dir().join(name);
        let shown = |name: &str| at(name).display().to_string();
        for name in ["alike", "token", "iso", "iso-b"] {
            fs::create_dir(at(name)).doing("make a directory")?;
        }
        let store = at("disk");
        let views = ["a", "b"].map(|host| Datastore::mount(&at(&format!("view-{host}")), &store));
        let [_a, _b] = views;
        let (_a, _b) = (_a.doing("mount a datastore")?, _b.doing("mount a datastore")?);
        let unsafe_store = Datastore::mount(&at("unsafe"), &at("unsafe-disk")).doing("mount a datastore")?;
        let stage = Stage::with(lab, tools, |host| Oddity {
            prelude: format!(
                "mount -t tmpfs none '{alike}'\ntruncate -s 16M '{alike}/web.img'\nmount --bind '{}' \
                 '{}'\n{}",
                shown(&format!("view-{}", host.name)),
                shown("token"),
                if host.name == "b" {
                    format!("mount --bind '{}' '{}'", shown("iso-b"), shown("iso"))
                } else {
                    String::new()
                },
                alike = shown("alike"),
            ),
            ..Oddity::default()
        })?;

        // The same path, the same inode, the same content, and not the same file. Its guest need not run for
        // long.
        let web = VmFile {
            disks: vec![(at("alike/web.img"), "raw".to_owned())],
            ..VmFile::new("web", Spec::new(71, ""))
        };
        let text = at("web.toml");
        fs::write(&text, web.text(tools)).doing("write a VM file")?;
        stage.agent("a").cli().json(&["run", &text.to_string_lossy()])?;
        // An agent that has just started asks QEMU what it is.
        let idle = || Ok(Some(Traces::of(lab.host("b"))?).filter(|traces| !traces.has_qemu()));
        let before = wait_for("b without a QEMU", SOON, idle)?;
        let error = stage.start_migration("web", "a", "b", &[])?.ended("failed", 1)?.error();
        ensure!(error.contains("web.img is not shown to be the file that the source uses"), "{error}");
        ensure!(!error.contains("inode"), "nothing is told: {error}");
        let same = || Ok((Traces::of(lab.host("b"))? == before).then_some(()));
        wait_for("b without a trace of it", SOON, same)?;
        stage.runs_only_on("web", "a")?;
        stage.agent("a").cli().json(&["stop", "web"])?;

        // Locks do not show it, a token does; and is gone afterwards.
        sparse(&store.join("tok.img"), 16 << 20)?;
        let tok = VmFile {
            disks: vec![(at("token/tok.img"), "raw".to_owned())],
            ..VmFile::new("tok", Spec::new(72, WORK))
        };
        let guest = stage.run("a", &tok)?;
        stage.migrate("tok", &guest, "a", "b", &[])?;
        let left: Vec<_> =
            fs::read_dir(&store).doing("look into the datastore")?.flatten().map(|e| e.file_name()).collect();
        ensure!(left == ["tok.img"], "nothing is left there: {left:?}");
        stage.agent("b").cli().json(&["stop", "tok"])?;

        // A disk that is never flushed by its QEMU, and a CD of which each host has a copy.
        sparse(&at("unsafe-disk/disk.img"), 16 << 20)?;
        fs::write(at("iso/cd.iso"), vec![7; 1 << 20]).doing("write an ISO")?;
        fs::write(at("iso-b/cd.iso"), vec![8; 1 << 20]).doing("write an ISO")?;
        let cd = format!("file={},format=raw,if=none,id=cd,media=cdrom,readonly=on", shown("iso/cd.iso"));
        let mut start =
            HandStart::new(Spec::new(73, WORK)).disk(&at("unsafe/disk.img"), "cache=unsafe,aio=threads");
        start.extra.extend([
            "-drive".to_owned(),
            cd,
            "-device".to_owned(),
            "ide-cd,drive=cd,bus=ide.0".to_owned(),
        ]);
        let (guest, _machine) = stage.adopt("a", "cd", start)?;
        let error = stage.start_migration("cd", "a", "b", &[])?.ended("failed", 1)?.error();
        ensure!(error.contains("cd.iso is not shown to be the file with the source's content"), "{error}");
        stage.runs_only_on("cd", "a")?;
        fs::copy(at("iso/cd.iso"), at("iso-b/cd.iso")).doing("copy an ISO")?;
        let flushes = unsafe_store.fsyncs();
        stage.migrate("cd", &guest, "a", "b", &[])?;
        ensure!(unsafe_store.fsyncs() >= flushes + 2, "flushed before and in the pause");
        Ok(())
    });
}

/// Memory on a file system whose writers nobody can be made to wait: said beforehand, and never slowed in the
/// middle.
#[test]
fn a_vm_whose_memory_is_on_a_disk_is_moved_without_being_slowed() {
    story("memory on ext4", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let ram = lab.dir().join("ram");
        fs::create_dir(&ram).doing("make a directory")?;
        let image = lab.dir().join("ext4.img");
        sparse(&image, 512 << 20)?;
        let mut make = std::process::Command::new("mkfs.ext4");
        let made = make.args(["-q", "-F"]).arg(&image).status().doing("run mkfs.ext4")?;
        ensure!(made.success(), "mkfs.ext4 failed");
        let _mounted = Mounted::new(&image, &ram)?;
        // More than the link carries: it would have to be slowed.
        let guest = Spec::new(74, "whimbrel.check=16M,rate=4M whimbrel.dirty=32M,rate=64M");
        let start = HandStart { ram: lab::Ram::File(ram.clone()), ..HandStart::new(guest) };
        let (guest, _machine) = stage.adopt("a", "slow", start)?;
        lab.host("a").shape(Some(units::Rate(24 << 20)))?;
        let report = stage.start_migration(
            "slow",
            "a",
            "b",
            &["--mode", "pre-copy", "--max-time", "20s", "--keep", "time,stall,downtime"],
        )?;
        // It may have to pause for longer than it should; that is all.
        let (_, report) = report.end()?;
        ensure!(!report.0.to_string().contains("Invalid argument"), "{}", report.0);
        lab.host("a").shape(None)?;
        if report.outcome() == "completed" {
            return stage.check_moved("slow", &guest, "a", "b");
        }
        stage.runs_only_on("slow", "a")?;
        stage.migrate("slow", &guest, "a", "b", &["--mode", "post-copy"]).map(drop)
    });
}

struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn new(image: &Path, at: &'a Path) -> lab::Result<Self> {
        let mut mount = std::process::Command::new("mount");
        let mounted = mount.args(["-o", "loop"]).arg(image).arg(at).status().doing("run mount")?;
        ensure!(mounted.success(), "cannot mount {}", image.display());
        Ok(Self(at))
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0).status();
    }
}
