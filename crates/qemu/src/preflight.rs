//! Whether this host can take a VM over: looked at before anything is started, every reason told.

use crate::{
    arriving, confine,
    host::{Host, Kvm, fits_socket},
    qmp::Version,
    recipe::{self, Accel, Backing, Recipe, files::Opened},
    room::{self, Room},
    sharing::servers,
    tap, tpm, vhost,
};
use std::{
    collections::HashMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{LazyLock, Mutex},
};

pub use crate::arriving::{make_stores, settle};
use units::Locked;

/// What the kernel calls a tmpfs (`statfs(2)`).
const TMPFS: u64 = 0x0102_1994;

/// Memory that QEMU takes for itself besides the guest's: measured at 60 to 90 MiB for small guests.
const QEMU_ITSELF: u64 = 128 << 20;

/// Opens what this VM needs of `host`, or says every reason why that cannot take it over. Starts nothing that
/// stays. `from` and `migration` are what the source's proofs hang on. `make_room` is called if nothing else
/// speaks against it, before it is looked whether its memory fits.
///
/// What only a started QEMU can tell (the CPU features that its guest would see) is asked of it afterwards:
/// [`crate::Vm::missing_features`].
pub fn check(
    recipe: &Recipe,
    host: &Host,
    from: &str,
    migration: &str,
    make_room: impl FnOnce(),
) -> Result<Vec<Opened>, Vec<String>> {
    let mut reasons = recipe::check(recipe);
    if !reasons.is_empty() {
        // Nothing of a recipe that is not well formed is looked up on this host.
        return Err(reasons);
    }
    match host.program() {
        Err(why) => reasons.push(why),
        Ok(program) => check_program(recipe, &program, &mut reasons),
    }
    if recipe.accel == Accel::Kvm {
        reasons.extend(check_kvm(recipe.kvm_speed, host.kvm));
    }
    reasons.extend(recipe.tpm.as_ref().and_then(|_| tpm::program().err()));
    reasons.extend(host.limits.check(recipe));
    for net in &recipe.nets {
        match host.limits.check_net(net) {
            Ok(()) => reasons.extend(tap::misfits(net)),
            Err(why) => reasons.push(why),
        }
    }
    for export in &recipe.exports {
        // Nobody is called who is not granted.
        reasons.extend(host.limits.check_server(export).and_then(|()| servers::look(export)).err());
    }
    let opened = arriving::files(recipe, &host.limits, from, migration, &mut reasons);
    reasons.extend(confine::refusals(recipe, host, &opened));
    // The tag is as long as the one that is drawn later.
    if !fits_socket(&host.in_runtime(&format!("{}-00000000", recipe.name), "qmp")) {
        reasons
            .push(format!("the path of a socket in {} would be too long for Linux", host.runtime.display()));
    }
    if reasons.is_empty() {
        make_room();
    }
    check_memory(recipe, host, &mut reasons);
    if reasons.is_empty() { Ok(opened) } else { Err(reasons) }
}

/// A KVM without the hardware's help takes in what already runs on one like it.
fn check_kvm(there: Option<u64>, here: Option<Kvm>) -> Option<String> {
    match here {
        None => Some(
            "the VM runs with KVM, which this host does not have; move it to one that has, or start it \
             without (-accel tcg)"
                .to_owned(),
        ),
        Some(kvm) if kvm.does_for(there) => {
            if !kvm.usable {
                tracing::warn!(speed = kvm.speed, "KVM is slow here, and no slower than at the source");
            }
            None
        }
        Some(Kvm { speed, .. }) => Some(format!(
            "the VM runs with KVM, which makes {speed} turns of a loop in a second here, and {} at the \
             source; `whimbrel doctor` says what is missing here",
            there.map_or("many more".to_owned(), |there| there.to_string())
        )),
    }
}

fn check_program(recipe: &Recipe, program: &Path, reasons: &mut Vec<String>) {
    match version(program) {
        Err(why) => reasons.push(why),
        Ok(here) if is_older(here, recipe.qemu) && !recipe.allow_older_qemu => {
            let there = recipe.qemu;
            reasons.push(format!(
                "QEMU is {here} here, older than the {there} that runs the VM; install {there} or later, or \
                 allow an older one (--allow-older-qemu)"
            ));
        }
        Ok(here) => match machines(program) {
            Err(why) => reasons.push(why),
            Ok(machines) if !machines.iter().any(|name| name == recipe.machine_name()) => {
                reasons.push(format!(
                    "QEMU {here} here has no machine {}; install one that has it ({} -machine help lists \
                     them)",
                    recipe.machine_name(),
                    program.display()
                ));
            }
            Ok(_) => {}
        },
    }
}

/// A micro release does not change what a device state looks like.
pub(crate) fn is_older(here: Version, there: Version) -> bool {
    (here.major, here.minor) < (there.major, there.minor)
}

fn check_memory(recipe: &Recipe, host: &Host, reasons: &mut Vec<String>) {
    let shared = |id: &str| host.shared_memory.contains_key(id);
    reasons.extend(room::refuses(&room::least(), needs(recipe, host), 0, host.overcommit));
    let needed = recipe.used_bytes(|block| block.backing == Backing::File && !shared(&block.id));
    if needed == 0 {
        return;
    }
    match rustix::fs::statvfs(&host.memory) {
        Err(error) => reasons.push(format!("memory directory {}: {error}", host.memory.display())),
        Ok(space) => {
            let bytes = |blocks: u64| blocks.saturating_mul(space.f_frsize);
            let place = format!("in {}, where its memory files go", host.memory.display());
            let there = Room { left: bytes(space.f_bavail), of: bytes(space.f_blocks), place };
            reasons.extend(room::refuses(&there, needed, 0, host.overcommit));
            if rustix::fs::statfs(&host.memory).is_ok_and(|found| found.f_type as u64 != TMPFS) {
                let place = host.memory.display();
                reasons.push(format!(
                    "memory files in {place} would be on a disk; let the agent's memory directory be on a \
                     tmpfs"
                ));
            }
        }
    }
}

/// Whether there is as much memory as a VM needs, where VMs that are arriving will take so much, and so much
/// more than what is left now could be.
pub fn has_room(recipe: &Recipe, host: &Host, reserved: u64, more: u64) -> bool {
    let mut room = room::least();
    room.left = room.left.saturating_add(more);
    room::refuses(&room, needs(recipe, host), reserved, host.overcommit).is_none()
}

/// How much memory a VM will take here at most, QEMU's own included.
pub fn needs(recipe: &Recipe, host: &Host) -> u64 {
    recipe.used_bytes(|block| !host.shared_memory.contains_key(&block.id)).saturating_add(QEMU_ITSELF)
}

/// Asks a QEMU program ahead of time what [`check`] will want to know of it.
pub fn learn(program: &Path) {
    has_sandbox(program);
    vhost::learn();
    let asked = version(program).and_then(|_| machines(program));
    if let Err(why) = asked {
        tracing::debug!(why, "QEMU does not tell what it is");
    }
}

/// The version of a QEMU program.
pub fn version(program: &Path) -> Result<Version, String> {
    let text = ask(program, &["--version"])?;
    let found = text.strip_prefix("QEMU emulator version ").and_then(|rest| rest.split_whitespace().next());
    let mut numbers = found.unwrap_or_default().split('.').map(|number| number.parse().ok());
    match (numbers.next().flatten(), numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor), micro) => Ok(Version { major, minor, micro: micro.unwrap_or(0) }),
        _ => Err(format!("{} does not tell a version as QEMU does", program.display())),
    }
}

/// Whether a QEMU program was built with its seccomp filter. One that cannot be asked just now has it: it
/// must not do without because the host is short of something.
pub(crate) fn has_sandbox(program: &Path) -> bool {
    match ask(program, &["-sandbox", confine::SANDBOX, "--version"]) {
        Err(why) if why.contains("support is not enabled") => {
            tracing::warn!(why, "this QEMU is started without a seccomp filter of its own");
            false
        }
        _ => true,
    }
}

/// The machines that a QEMU program knows.
pub fn machines(program: &Path) -> Result<Vec<String>, String> {
    let text = ask(program, &["-machine", "help"])?;
    Ok(text.lines().skip(1).filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect())
}

/// What a program answered, as long as its file is the same: starting a QEMU for each question takes 45 ms.
fn ask(program: &Path, arguments: &[&str]) -> Result<String, String> {
    type Answers = HashMap<(PathBuf, String), ((u64, u64, i64, i64), String)>;
    static ANSWERS: LazyLock<Mutex<Answers>> = LazyLock::new(Mutex::default);
    let answers = || ANSWERS.locked();
    let file = fs::metadata(program).map_err(|error| format!("{}: {error}", program.display()))?;
    let file = (file.dev(), file.ino(), file.mtime(), file.mtime_nsec());
    let question = (program.to_owned(), arguments.join(" "));
    if let Some((of, answer)) = answers().get(&question)
        && *of == file
    {
        return Ok(answer.clone());
    }
    let answer = run(program, arguments)?;
    answers().insert(question, (file, answer.clone()));
    Ok(answer)
}

fn run(program: &Path, arguments: &[&str]) -> Result<String, String> {
    let failed = |why: String| format!("{} {}: {why}", program.display(), arguments.join(" "));
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_vm_goes_to_a_kvm_that_is_no_slower_than_its_own() {
        let kvm = |speed, usable| Some(Kvm { speed, usable });
        let rows = [
            (Some(600_000), kvm(630_000, false), true),
            (Some(900_000), kvm(630_000, false), true),
            (Some(300_000_000), kvm(60_000_000, true), true),
            (None, kvm(60_000_000, true), true),
            (Some(300_000_000), kvm(630_000, false), false),
            (None, kvm(630_000, false), false),
            (Some(0), None, false),
        ];
        for (there, here, goes) in rows {
            assert_eq!(check_kvm(there, here).is_none(), goes, "{there:?} to {here:?}");
        }
    }

    #[test]
    fn nobody_makes_room_for_a_vm_that_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("qemu");
        fs::write(&program, "#!/bin/sh\necho QEMU emulator version 7.2.1\necho q35\n").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let host = Host { qemu: Some(program), ..Host::new(dir.path()) };
        let text = "name = \"web\"\nmemory = \"64MiB\"\n";
        let file = crate::VmFile::parse(text, Path::new("web.toml")).unwrap();
        let recipe = Recipe { accel: Accel::Tcg, machine: "q35".to_owned(), ..file.recipe(&host).unwrap() };
        let asks = |recipe: &Recipe| {
            let mut asked = false;
            let found = check(recipe, &host, "a", "1", || asked = true);
            (asked, found.err().unwrap_or_default())
        };
        let (asked, reasons) = asks(&recipe);
        assert!(asked, "{reasons:?}");
        let newer = Recipe { qemu: Version { major: 99, minor: 0, micro: 0 }, ..recipe };
        let (asked, reasons) = asks(&newer);
        assert!(!asked && !reasons.is_empty(), "{reasons:?}");
    }

    #[test]
    fn a_program_is_asked_once_until_another_takes_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("qemu");
        let count = dir.path().join("asked");
        let install = |version: &str| {
            let new = dir.path().join("new");
            let script =
                format!("#!/bin/sh\necho x >> {}\necho QEMU emulator version {version}\n", count.display());
            fs::write(&new, script).unwrap();
            fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
            fs::rename(&new, &program).unwrap();
        };
        let asked = || fs::read_to_string(&count).unwrap_or_default().lines().count();
        install("7.2.1");
        for _ in 0..2 {
            assert_eq!(version(&program).unwrap(), Version { major: 7, minor: 2, micro: 1 });
        }
        assert_eq!(asked(), 1);
        install("10.0.3");
        assert_eq!(version(&program).unwrap(), Version { major: 10, minor: 0, micro: 3 });
        assert_eq!(asked(), 2);
        fs::remove_file(&program).unwrap();
        assert!(version(&program).is_err());
    }
}
