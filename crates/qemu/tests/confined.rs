//! A QEMU that we start runs as a user of its own and sees little of its host: what a guest that breaks out
//! of it could do is tried by a program in QEMU's place.

mod common;

use common::{
    ends::{Ended, Folder},
    host, recipe,
};
use ports::Machine;
use qemu::{
    Account, Host, Limits, Recipe, Vm,
    recipe::{Role, files::Opened},
};
use serde_json::json;
use std::{
    collections::BTreeSet,
    fs,
    io::ErrorKind,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, symlink},
        net::UnixStream,
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};
use sys::mounts::{Ids, with_rights_of};

/// Whom QEMU runs as here; none: these tests are not run by root, and nobody can be chosen.
fn user() -> Option<Ids> {
    Account::choose(None).unwrap().ids()
}

fn installed() -> Vec<Option<PathBuf>> {
    let other = std::env::var_os("WHIMBREL_QEMU_10").map(PathBuf::from);
    std::iter::once(None).chain(other.map(Some)).collect()
}

fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    line.split_whitespace().next().unwrap_or_default().to_owned()
}

/// A file for nobody but root, in a directory for nobody but root.
fn closed(path: &Path, content: impl AsRef<[u8]>) {
    let folder = path.parent().unwrap();
    fs::create_dir_all(folder).unwrap();
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

fn with_disk(disk: &Path, host: &Host) -> Recipe {
    recipe(
        &format!("name = \"web\"\nmemory = \"64MiB\"\n[[disk]]\npath = {disk:?}\nformat = \"raw\"\n"),
        host,
    )
}

#[test]
fn a_qemu_of_ours_has_a_user_no_rights_and_a_view_of_its_own() {
    let Some(user) = user() else { return };
    let folder = Folder::new();
    let disk = folder.path().join("closed/web.img");
    closed(&disk, vec![0; 1 << 20]);
    for (n, program) in installed().into_iter().enumerate() {
        let host = host(folder.path(), &format!("run{n}"), program);
        let mut vm = Vm::run(&with_disk(&disk, &host), &host).unwrap();
        let status = fs::read_to_string(vm.process().proc_path("status")).unwrap();
        assert_eq!(
            (field(&status, "Uid:"), field(&status, "Gid:")),
            (user.user.to_string(), user.group.to_string())
        );
        for set in ["CapEff:", "CapPrm:", "CapInh:", "CapBnd:", "CapAmb:"] {
            assert_eq!(u64::from_str_radix(&field(&status, set), 16), Ok(0), "{set}");
        }
        assert_eq!((field(&status, "NoNewPrivs:"), field(&status, "Seccomp:")), ("1".into(), "2".into()));
        let namespace = |path: PathBuf| fs::read_link(path).unwrap();
        assert_ne!(namespace(vm.process().proc_path("ns/mnt")), namespace("/proc/self/ns/mnt".into()));
        // Its disk has its name there, and is the same file.
        let open = fs::read_dir(vm.process().proc_path("fd")).unwrap().flatten();
        let open: BTreeSet<PathBuf> = open.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
        assert!(open.contains(&disk), "{open:?}");
        let seen = fs::read_dir(vm.process().proc_path("root/dev")).unwrap().flatten();
        let seen: BTreeSet<_> = seen.map(|entry| entry.file_name().into_string().unwrap()).collect();
        let right = ["fd", "full", "null", "random", "shm", "tty", "urandom", "zero"];
        assert_eq!(seen, right.map(str::to_owned).into());
        only_root_reaches(&makes_a_socket(&mut vm));
        // Nothing about the file itself was changed.
        let found = fs::metadata(&disk).unwrap();
        assert_eq!((found.uid(), found.mode() & 0o7777), (0, 0o600));
        vm.destroy().unwrap();
        assert!(!vm.belongings().qmp.exists());
        assert!(!vm.belongings().sockets.as_ref().unwrap().exists());
    }
}

/// As a console or a display does.
fn makes_a_socket(vm: &mut Vm) -> PathBuf {
    let path = vm.belongings().sockets.clone().unwrap().join("a.sock");
    let address = json!({"type": "unix", "data": {"path": path}});
    let backend = json!({"type": "socket", "data": {"addr": address, "server": true, "wait": false}});
    vm.qmp().execute("chardev-add", json!({"id": "late", "backend": backend})).unwrap();
    path
}

fn only_root_reaches(socket: &Path) {
    UnixStream::connect(socket).unwrap();
    for user in [user().unwrap(), Ids { user: 12345, group: 12345 }] {
        let reached = with_rights_of(user, || UnixStream::connect(socket)).unwrap();
        assert_eq!(reached.unwrap_err().kind(), ErrorKind::PermissionDenied, "{user:?}");
    }
}

#[test]
fn io_uring_is_for_vms_whose_drives_use_it() {
    if user().is_none() {
        return;
    }
    let folder = Folder::new();
    let (disk, other) = (folder.path().join("web.img"), folder.path().join("other.img"));
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    fs::write(&other, vec![0; 1 << 20]).unwrap();
    for (engine, works) in [("threads", false), ("io_uring", true)] {
        let mut host = host(folder.path(), engine, None);
        host.limits.disks = vec![folder.path().to_owned()];
        let mut recipe = with_disk(&disk, &host);
        for argument in &mut recipe.arguments {
            let value = argument.value.take();
            argument.value = value.map(|value| value.replace("aio=threads", &format!("aio={engine}")));
        }
        assert_eq!(recipe.uses_io_uring(), works);
        let mut vm = Vm::run(&recipe, &host).unwrap();
        let node = json!({"driver": "file", "node-name": "late", "aio": "io_uring", "filename": other,
            "read-only": true});
        let added = vm.qmp().execute("blockdev-add", node);
        assert_eq!(added.is_ok(), works, "{engine}: {added:?}");
        vm.destroy().unwrap();
    }
}

#[test]
fn root_runs_qemu_only_on_request() {
    if user().is_none() {
        return;
    }
    let folder = Folder::new();
    let mut host = host(folder.path(), "run", None);
    host.user = Some("root".to_owned());
    let mut vm = Vm::run(&recipe("name = \"web\"\nmemory = \"64MiB\"\n", &host), &host).unwrap();
    let status = fs::read_to_string(vm.process().proc_path("status")).unwrap();
    assert_eq!((field(&status, "Uid:"), field(&status, "NoNewPrivs:")), ("0".into(), "1".into()));
    let rights = u64::from_str_radix(&field(&status, "CapEff:"), 16).unwrap();
    // CAP_SETUID, CAP_SYS_MODULE, CAP_SYS_RAWIO, CAP_SYS_ADMIN, CAP_MKNOD
    assert!([7, 16, 17, 21, 27].iter().all(|right| rights & (1 << right) == 0), "{rights:x}");
    vm.destroy().unwrap();
    host.user = Some("no-such-user".to_owned());
    let error =
        Vm::run(&recipe("name = \"web\"\nmemory = \"64MiB\"\n", &host), &host).unwrap_err().to_string();
    assert!(error.contains("there is no user no-such-user ([qemu] user)"), "{error}");
}

/// What a program that is started in QEMU's place says: the lines `script` prints.
fn in_place_of_qemu(folder: &Path, host: &mut Host, disk: &Path, script: &str) -> String {
    let program = folder.join("in-place-of-qemu");
    // Asked for its version it is a QEMU.
    let text = format!("#!/bin/sh\ncase \"$*\" in *--version*) exit 0;; esac\n{script}\necho done\n");
    fs::write(&program, text).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let recipe = with_disk(disk, host);
    host.qemu = Some(program);
    let said = Vm::run(&recipe, host).unwrap_err().to_string();
    assert!(said.contains("done"), "{said}");
    said
}

#[test]
fn who_breaks_out_of_qemu_finds_only_the_vms_own_files() {
    let Some(user) = user() else { return };
    let folder = Folder::new();
    let path = |name: &str| folder.path().join(name);
    // Nobody but root gets to the program, the agent's directories and the disks.
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
    for (name, content) in
        [("disks/web.img", "own"), ("disks/db.img", "another's"), ("state/agent.redb", "keys")]
    {
        closed(&path(name), content);
    }
    let mut host = Host::new(path("run"));
    host.limits = Limits { disks: vec![path("disks")], boot: vec![path("disks")], ..Limits::default() };
    host.owner = path("state");
    fs::create_dir(path("run")).unwrap();
    fs::write(path("run/db.console"), "another's").unwrap();
    // As another VM's QEMU is.
    let other = Ended(Command::new("sleep").arg("60").uid(user.user).gid(user.group).spawn().unwrap());
    let pid = other.0.id();
    let [disk, db, state, run, disks] = ["disks/web.img", "disks/db.img", "state", "run", "disks"]
        .map(|name| path(name).display().to_string());
    let script = format!(
        "no() {{ if \"$@\" >/dev/null 2>&1; then echo \"can: $*\"; fi; }}\n\
         yes() {{ \"$@\" >/dev/null 2>&1 || echo \"cannot: $*\"; }}\n\
         writes() {{ echo x 2>/dev/null >\"$1\"; }}\n\
         yes grep own {disk}\nyes writes {disk}\nyes head -c1 /dev/urandom\nyes ls /usr\n\
         no cat /etc/shadow\nno cat {db}\nno writes {db}\nno cat {state}/agent.redb\nno cat \
         {run}/db.console\n\
         no chmod 4755 {disk}\nno chmod 666 {disk}\nno chown 0 {disk}\nno cat /proc/{pid}/environ\nno \
         readlink /proc/{pid}/fd/0\nno kill -0 {pid}\n\
         no head -c1 /dev/kvm\nno head -c1 /dev/net/tun\nno unshare -U true\nno unshare -Ur mount -t tmpfs x \
         /mnt\n\
         for d in / /etc /usr /var /var/tmp /tmp /root /home /run /dev /dev/shm /boot {state} {run} {disks} \
         .; do\n\
         no writes $d/x\ndone\n\
         find / -maxdepth 2 -path /proc -prune -o -writable ! -type l ! -type c -print 2>/dev/null | head \
         -5\n\
         yes writes ${{WHIMBREL_QMP%.qmp}}.sockets/x\nls -A {run} | grep -v -e 'web-.*sockets' \
         -e web.console\n\
         ls -A /tmp /home /root /run 2>/dev/null | grep -v '^/\\|^$\\|^\\.tmp\\|^tmp'\n\
         grep -E '^Cap|^NoNew' /proc/self/status | grep -v '0000000000000000\\|\t1$'"
    );
    let said = in_place_of_qemu(folder.path(), &mut host, Path::new(&disk), &script);
    assert_eq!(said, "cannot start web: QEMU said: done");
    assert_eq!(fs::read_to_string(&disk).unwrap(), "x\n", "it writes its disk");
    drop(other);
}

#[test]
fn a_vms_files_have_their_names_wherever_they_are() {
    if user().is_none() {
        return;
    }
    let folder = Folder::new();
    let path = |name: &str| folder.path().join(name);
    closed(&path("real/web.img"), "own");
    symlink(path("real"), path("linked")).unwrap();
    symlink(path("linked/web.img"), path("hop.img")).unwrap();
    // Where everybody sees it, behind a link into what is hidden.
    let outside = PathBuf::from(format!("/var/lib/whimbrel-test-{}", std::process::id()));
    closed(&outside.join("web.img"), "own");
    symlink(&outside, path("outside")).unwrap();
    let mut found = Vec::new();
    for name in ["real/web.img", "linked/web.img", "hop.img", "outside/web.img"] {
        let mut host = host(folder.path(), "run", None);
        host.limits = Limits::default();
        let disk = path(name);
        let script = format!("cat {}; for f in {}/*; do echo $f; done", disk.display(), outside.display());
        found.push(in_place_of_qemu(folder.path(), &mut host, &disk, &script));
    }
    fs::remove_dir_all(&outside).unwrap();
    for said in found {
        assert!(said.contains("QEMU said: own"), "{said}");
    }
}

/// A disk of root's where no file shows as somebody else's: in an overlay, in mounts of this thread's own.
fn on_an_overlay(folder: &Path) -> std::io::Result<PathBuf> {
    use rustix::mount::{MountFlags, mount};
    let (disks, upper, work) = (folder.join("disks"), folder.join("upper"), folder.join("work"));
    sys::mounts::leave()?;
    for folder in [&disks, &upper, &work] {
        fs::create_dir(folder)?;
    }
    let below = format!("lowerdir=/etc,upperdir={},workdir={}", upper.display(), work.display());
    let below = std::ffi::CString::new(below)?;
    mount(c"overlay", &disks, c"overlay", MountFlags::empty(), Some(below.as_c_str()))?;
    let disk = disks.join("web.img");
    fs::write(&disk, vec![0; 1 << 20])?;
    Ok(disk)
}

#[test]
fn a_file_that_qemu_cannot_own_is_refused_with_a_remedy() {
    let Some(user) = user() else { return };
    let tried = std::thread::spawn(move || {
        let folder = Folder::new();
        let disk = match on_an_overlay(folder.path()) {
            Ok(disk) => disk,
            Err(error) => return println!("no overlay can be mounted here: {error}"),
        };
        let host = host(folder.path(), "run", None);
        let error = Vm::run(&with_disk(&disk, &host), &host).unwrap_err().to_string();
        assert!(error.contains("as whom QEMU runs, cannot open it: Permission denied"), "{error}");
        assert!(error.contains("chown") && error.contains("user = \"root\""), "{error}");
        // The remedy is one.
        std::os::unix::fs::chown(&disk, Some(user.user), None).unwrap();
        Vm::run(&with_disk(&disk, &host), &host).unwrap().destroy().unwrap();
    });
    tried.join().unwrap();
}

#[test]
fn what_is_done_for_qemus_view_is_not_seen_by_anybody_else() {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    if user().is_none() {
        return;
    }
    let tried = std::thread::spawn(|| {
        let folder = Folder::new();
        let images = folder.path().join("images");
        fs::create_dir(&images).unwrap();
        // As systemd sets it: what is mounted in one view is so in all.
        sys::mounts::leave().unwrap();
        mount(c"tmpfs", &images, c"tmpfs", MountFlags::empty(), None).unwrap();
        mount_change(&images, MountPropagationFlags::SHARED).unwrap();
        let disk = images.join("closed/web.img");
        closed(&disk, vec![0; 1 << 20]);
        let mut host = host(folder.path(), "run", None);
        host.limits.disks = vec![images.clone()];
        let mut recipe = with_disk(&disk, &host);
        // The same file by two names.
        recipe.files.push(recipe.files[0].clone());
        // What others mount elsewhere meanwhile is seen, too.
        let here = folder.path().to_str().unwrap();
        let mounts = || {
            let all = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            all.lines().filter(|line| line.contains(here)).map(str::to_owned).collect::<Vec<_>>()
        };
        let before = mounts();
        let mut vm = Vm::run(&recipe, &host).unwrap();
        assert_eq!(mounts(), before);
        assert!(disk.exists());
        vm.destroy().unwrap();
    });
    tried.join().unwrap();
}

#[test]
fn i6_a_file_that_is_swapped_after_it_was_proven_is_not_used() {
    if user().is_none() {
        return;
    }
    for program in installed() {
        let folder = Folder::new();
        let disk = folder.path().join("disks/web.img");
        closed(&disk, vec![0; 1 << 20]);
        let host = host(folder.path(), "run", program);
        let recipe = with_disk(&disk, &host);
        let opened = Opened::open(&disk, Role::Disk, false).unwrap();
        fs::rename(&disk, folder.path().join("disks/away.img")).unwrap();
        closed(&disk, vec![1; 1 << 20]);
        let opened = [opened];
        let mut vm = Vm::incoming_with(&recipe, &host, &opened).unwrap();
        vm.uses(&opened).unwrap();
        let open = fs::read_dir(vm.process().proc_path("fd")).unwrap().flatten();
        let other = fs::metadata(&disk).unwrap().ino();
        assert!(!open.filter_map(|entry| fs::metadata(entry.path()).ok()).any(|found| found.ino() == other));
        vm.destroy().unwrap();
    }
}

/// `cargo test --release -p qemu --test confined -- start --ignored --nocapture`
#[test]
#[ignore = "measures"]
fn start_of_a_target_as_root_and_as_a_user_of_its_own() {
    if user().is_none() {
        return;
    }
    let folder = Folder::new();
    let disk = folder.path().join("closed/web.img");
    closed(&disk, vec![0; 1 << 20]);
    for program in installed() {
        let mut took = [Vec::new(), Vec::new()];
        // In turns, so that both have the same neighbours.
        for n in 0..40 {
            let mut host = host(folder.path(), "run", program.clone());
            host.user = (n % 2 == 0).then(|| "root".to_owned());
            let recipe = with_disk(&disk, &host);
            let begin = Instant::now();
            let mut vm = Vm::incoming(&recipe, &host).unwrap();
            took[n % 2].push(begin.elapsed());
            vm.destroy().unwrap();
        }
        for (of, took) in ["root", "a user of its own"].iter().zip(&mut took) {
            took.sort();
            println!("{program:?} as {of}: median {:?}, {:?} to {:?}", took[10], took[0], took[19]);
        }
    }
}
