use super::*;
use std::{
    os::unix::fs::symlink,
    process::{Child, Command, Stdio},
};

/// A process that has files open, by names that begin in its working directory, which it leaves.
struct Holder(Child);

impl Holder {
    fn start(folder: &Path, names: &[&str]) -> Self {
        let mut script = String::new();
        for (n, name) in (3..).zip(names) {
            script.push_str(&format!("exec {n}<>'{name}'; "));
        }
        // What it prints tells that it has them open.
        script.push_str("cd /; echo; exec sleep 60");
        let mut child = Command::new("sh")
            .args(["-c", &script])
            .current_dir(folder)
            .env_remove("PWD")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut told = [0];
        io::Read::read_exact(&mut child.stdout.take().unwrap(), &mut told).unwrap();
        Self(child)
    }

    fn held(&self) -> Held {
        Held::by(&PidFd::open(self.0.id().cast_signed()).unwrap()).unwrap()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn names_lead_to_what_is_open_or_nowhere() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().canonicalize().unwrap();
    let at = |name: &str| folder.join(name);
    fs::create_dir(at("images")).unwrap();
    for name in ["images/a.img", "images/b.img", "other.img"] {
        fs::write(at(name), name).unwrap();
    }
    symlink(at("images/b.img"), at("link.img")).unwrap();
    let holder = Holder::start(&folder, &["images/a.img", "link.img"]);
    let find = |name: &Path| holder.held().find("disk", name);

    // Spelt differently, and relative to where it is no longer.
    for (name, found) in [
        ("images/a.img", "images/a.img"),
        ("./images/a.img", "images/a.img"),
        ("a.img", "images/a.img"),
        ("link.img", "images/b.img"),
    ] {
        let relative = find(Path::new(name));
        if name == "link.img" {
            // The shell's own PWD is not in its environment as it was started.
            assert!(relative.is_err() || relative == Ok(at(found)), "{name}: {relative:?}");
        } else {
            assert_eq!(relative, Ok(at(found)), "{name}");
        }
    }
    for name in ["images/a.img", "link.img", "images/../images/b.img"] {
        assert_eq!(find(&at(name)), Ok(at(name)), "{name}");
    }
    let says = |found: Result<PathBuf, String>, what: &str| {
        let why = found.unwrap_err();
        assert!(why.contains(what), "{why}");
    };
    says(find(&at("other.img")), "is not the file that QEMU has open");
    says(find(&at("no.img")), "No such file");

    // Replaced, swapped, removed.
    let known = |name: &str| Some(Identity::at(&at(name)).unwrap());
    let (a, b) = (known("images/a.img"), known("images/b.img"));
    let open = |name: &str, known| holder.held().open("disk", &at(name), known, true).map(drop);
    assert_eq!(open("images/a.img", a), Ok(()));
    fs::rename(at("images/a.img"), at("away")).unwrap();
    fs::rename(at("images/b.img"), at("images/a.img")).unwrap();
    fs::rename(at("away"), at("images/b.img")).unwrap();
    for (name, known) in [("images/a.img", a), ("images/b.img", b)] {
        assert!(open(name, known).unwrap_err().contains("rename it back"));
    }
    fs::rename(at("other.img"), at("images/a.img")).unwrap();
    says(find(&at("images/a.img")), "was deleted or replaced");
    fs::remove_file(at("images/b.img")).unwrap();
    says(find(&at("images/b.img")), "was deleted or replaced");
}
