//! Which QEMU there is, and what it offers, by its own word.

mod ask;

use crate::{
    Check,
    diagnosis::{BOTH, Status},
};
use ask::Answers;
use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

const NAME: &str = "qemu";
const INSTALL: &str = "install it: apt-get install qemu-system-x86, or name a binary in the configuration";

/// The names under which distributions ship it, and where some put it outside `PATH`.
const IN_PATH: [&str; 2] = ["qemu-system-x86_64", "qemu-kvm"];
const ELSEWHERE: &str = "/usr/libexec/qemu-kvm";

/// The oldest QEMU that was tried.
const OLDEST_TRIED: (u32, u32) = (7, 2);

/// One check for each QEMU; a failed one when there is none.
pub(crate) fn checks(configured: &[PathBuf]) -> Vec<Check> {
    let mut checks: Vec<Check> = binaries(configured)
        .iter()
        .map(|path| match ask::ask(path) {
            Ok(answers) => judge(path, &answers),
            Err(why) => {
                let found = format!("{} does not start: {why}", path.display());
                Check::fail(NAME, BOTH, found, "reinstall it, or take it out of the configuration")
            }
        })
        .collect();
    if checks.iter().any(|c| c.status != Status::Fail) {
        // One that works is enough: another that does not costs nothing but a word.
        for broken in checks.iter_mut().filter(|c| c.status == Status::Fail) {
            broken.status = Status::Warn;
        }
    }
    if checks.is_empty() {
        checks.push(Check::fail(NAME, BOTH, "no qemu-system-x86_64 in PATH", INSTALL));
    }
    checks
}

/// Every QEMU, each once, the configured ones first.
fn binaries(configured: &[PathBuf]) -> Vec<PathBuf> {
    let found =
        IN_PATH.iter().flat_map(|name| in_path(name)).chain([PathBuf::from(ELSEWHERE)]).filter(|p| runs(p));
    let mut seen = Vec::new();
    let mut all = Vec::new();
    for path in configured.iter().cloned().chain(found) {
        let real = fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
        if !seen.contains(&real) {
            seen.push(real);
            all.push(path);
        }
    }
    all
}

/// The programs of this name in `PATH`.
pub(crate) fn in_path(name: &str) -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(name))
        .filter(|p| runs(p))
        .collect()
}

fn runs(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

fn judge(path: &Path, answers: &Answers) -> Check {
    let (major, minor, micro) = answers.version;
    let shown = |pinned: &Option<String>, name: &str| pinned.clone().unwrap_or_else(|| format!("no {name}"));
    let found = format!(
        "{} {major}.{minor}.{micro}, {}, {}, device state by {}",
        path.display(),
        shown(&answers.q35, "q35"),
        shown(&answers.microvm, "microvm"),
        match (answers.saves_device_state, answers.ignores_shared) {
            (true, _) => "xen-save-devices-state",
            (false, true) => "x-ignore-shared",
            (false, false) => "nothing",
        }
    );
    let other = "use an x86-64 QEMU with its usual devices: apt-get install qemu-system-x86";
    if !answers.saves_device_state && !answers.ignores_shared {
        return Check::fail(NAME, BOTH, format!("{found}: it cannot save device state without RAM"), other);
    }
    if !answers.memfd_backend && !answers.file_backend {
        return Check::fail(
            NAME,
            BOTH,
            format!("{found}: it has no memory backend that can be shared"),
            other,
        );
    }
    if answers.q35.is_none() && answers.microvm.is_none() {
        return Check::fail(NAME, BOTH, found, other);
    }
    if (major, minor) < OLDEST_TRIED {
        let (major, minor) = OLDEST_TRIED;
        return Check::warn(
            NAME,
            BOTH,
            found,
            format!("QEMU {major}.{minor} is the oldest that was tried: update it"),
        );
    }
    Check::ok(NAME, BOTH, found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Status::{Fail, Ok, Warn};

    fn debian() -> Answers {
        Answers {
            version: (7, 2, 22),
            q35: Some("pc-q35-7.2".into()),
            microvm: Some("microvm".into()),
            saves_device_state: true,
            ignores_shared: true,
            memfd_backend: true,
            file_backend: true,
        }
    }

    #[test]
    fn a_qemu_is_judged_by_what_it_says_it_can_do() {
        let table = [
            (debian(), Ok),
            (Answers { version: (6, 2, 0), ..debian() }, Warn),
            (Answers { version: (10, 0, 3), ..debian() }, Ok),
            (Answers { saves_device_state: false, ..debian() }, Ok),
            (Answers { saves_device_state: false, ignores_shared: false, ..debian() }, Fail),
            (Answers { microvm: None, ..debian() }, Ok),
            (Answers { microvm: None, q35: None, ..debian() }, Fail),
            (Answers { memfd_backend: false, file_backend: false, ..debian() }, Fail),
        ];
        for (answers, status) in table {
            assert_eq!(judge(Path::new("/q"), &answers).status, status, "{answers:?}");
        }
    }

    #[test]
    fn a_configured_binary_that_is_not_qemu_is_said_so() {
        let checks = checks(&["/bin/true".into()]);
        assert!(checks[0].found.starts_with("/bin/true does not start"), "{:?}", checks[0]);
        assert_ne!(checks[0].status, Ok);
    }
}
