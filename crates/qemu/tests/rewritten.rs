//! Images whose headers are rewritten between our look at them and QEMU's: it must not come to use other
//! files by that.

mod common;

use common::{
    ends::{Ended, Folder},
    hand::has,
    host, qemu_10, recipe,
};
use ports::Machine;
use qemu::{
    Host, Recipe, Vm,
    recipe::{Role, files::Opened},
};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

/// A directory with images, and a QEMU before whose start one of them is written over.
struct Bed {
    folder: Folder,
    qemu: PathBuf,
}

impl Bed {
    fn new(qemu: Option<PathBuf>) -> Self {
        Self { folder: Folder::new(), qemu: qemu.unwrap_or("/usr/bin/qemu-system-x86_64".into()) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn full(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// `qemu-img create` of 1 MiB.
    fn image(&self, name: &str, options: &[&str]) {
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]).args(options).arg(self.path(name)).arg("1M");
        let made = command.current_dir(self.folder.path()).output().unwrap();
        assert!(made.status.success(), "{made:?}");
    }

    /// A host as root, whose QEMU is started just after `image` was written over with `evil`.
    fn host(&self, image: &str, evil: &str) -> Host {
        let program = self.path("qemu-system-x86_64");
        let (qemu, image, evil) = (self.qemu.display(), self.full(image), self.full(evil));
        let text = format!(
            "#!/bin/sh\ncase \"$*\" in *defer*) cat '{evil}' > '{image}';; esac\nexec {qemu} -L \
             /usr/share/qemu \"$@\"\n"
        );
        fs::write(&program, text).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let user = rustix::process::geteuid().is_root().then(|| "root".to_owned());
        Host { user, ..host(self.folder.path(), "run", Some(program)) }
    }

    fn recipe(&self, host: &Host) -> Recipe {
        let disk = self.full("web.qcow2");
        let text =
            format!("name = \"web\"\nmemory = \"64MiB\"\n[[disk]]\npath = \"{disk}\"\nformat = \"qcow2\"\n");
        recipe(&text, host)
    }

    /// A QEMU that waits, with files that were opened before; and what it has open beyond them.
    fn waits(&self, image: &str, evil: &str) -> (Vm, Result<(), Vec<String>>) {
        let host = self.host(image, evil);
        let recipe = self.recipe(&host);
        let open = |path: &Path, role: Role| Opened::open(path, role, role != Role::Disk).unwrap();
        let opened: Vec<_> = recipe.files.iter().map(|file| open(&file.path, file.role)).collect();
        let vm = Vm::incoming_with(&recipe, &host, &opened).unwrap();
        let uses = vm.uses(&opened);
        (vm, uses)
    }
}

fn opens(vm: &Vm, path: &Path) -> bool {
    let links = fs::read_dir(vm.process().proc_path("fd")).unwrap().flatten();
    links.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|link| link == path)
}

fn all() -> Vec<Option<PathBuf>> {
    [None].into_iter().chain(qemu_10().map(Some)).collect()
}

#[test]
fn i6_a_header_rewritten_while_qemu_starts_is_not_followed() {
    for qemu in all() {
        let bed = Bed::new(qemu);
        bed.image("base.qcow2", &[]);
        bed.image("secret.qcow2", &[]);
        bed.image("web.qcow2", &["-b", &bed.full("base.qcow2"), "-F", "qcow2"]);
        bed.image("evil.qcow2", &["-b", &bed.full("secret.qcow2"), "-F", "qcow2"]);
        let (mut vm, uses) = bed.waits("web.qcow2", "evil.qcow2");
        assert!(opens(&vm, &bed.path("base.qcow2")) && !opens(&vm, &bed.path("secret.qcow2")));
        assert_eq!(uses, Ok(()), "QEMU was told the whole chain");
        vm.destroy().unwrap();
    }
}

#[test]
fn i6_a_file_that_a_rewritten_header_names_ends_the_arrival() {
    for qemu in all() {
        let bed = Bed::new(qemu);
        bed.image("base.qcow2", &[]);
        let secret = bed.path("secret.raw");
        fs::write(&secret, vec![7; 1 << 20]).unwrap();
        let mut command = Command::new("qemu-nbd");
        fs::write(bed.path("served.raw"), vec![7; 1 << 20]).unwrap();
        command.args(["-f", "raw", "-t", "-e", "4", "-k"]).args([bed.path("nbd"), bed.path("served.raw")]);
        let mut server = Ended(command.spawn().unwrap());
        while !bed.path("nbd").exists() {
            assert!(server.0.try_wait().unwrap().is_none(), "qemu-nbd does not start");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let nbd = format!("nbd+unix:///?socket={}", bed.full("nbd"));
        let data = format!("data_file={},data_file_raw=on", secret.display());
        // What the image was, what it becomes, and what is told.
        let rows: [(&[&str], &[&str], String); 4] = [
            (
                &[],
                &["-b", &secret.display().to_string(), "-F", "raw"],
                format!("the file {}", secret.display()),
            ),
            (
                &["-b", "base.qcow2", "-F", "qcow2"],
                &["-b", "secret.raw", "-F", "raw"],
                format!("the file {}", secret.display()),
            ),
            (&[], &["-o", &data], format!("the file {}", secret.display())),
            (
                &[],
                &["-u", "-b", &nbd, "-F", "raw"],
                format!("a connection to the socket {}", bed.full("nbd")),
            ),
        ];
        for (was, becomes, told) in rows {
            bed.image("web.qcow2", was);
            bed.image("evil.qcow2", becomes);
            let (mut vm, uses) = bed.waits("web.qcow2", "evil.qcow2");
            let reasons = uses.unwrap_err();
            has(&reasons, &format!("its QEMU has {told} open here, which was not granted to it"));
            vm.destroy().unwrap();
            fs::remove_file(bed.path("web.qcow2")).unwrap();
        }
    }
}
