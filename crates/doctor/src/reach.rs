//! The rights over another process: to borrow its threads, its descriptors, its memory.

use crate::{
    Check,
    diagnosis::{BOTH, not_tried},
};
use std::{fs, io, os::fd::AsRawFd};
use sys::{
    maps,
    patient::{Patient, name_of},
};

const PTRACE: &str = "ptrace";
const PIDFD: &str = "pidfd-getfd";
const MAP_FILES: &str = "map-files";
const ROOT: &str = "run as root (sudo whimbrel …)";

/// `ptrace`, `pidfd-getfd`, `map-files`.
pub(crate) fn checks(patient: &io::Result<Patient>) -> Vec<Check> {
    let patient = match patient {
        Ok(patient) => patient,
        Err(e) => return not_tried(&e.to_string(), &[(PTRACE, BOTH), (PIDFD, BOTH), (MAP_FILES, BOTH)]),
    };
    let yama = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok();
    vec![
        judge_ptrace(ptrace(patient), yama.as_deref().map(str::trim)),
        judge(
            PIDFD,
            take_descriptor(patient),
            "a descriptor of another process was taken",
            &format!("{ROOT}, on Linux 5.6 or newer; a container must allow pidfd_getfd (seccomp)"),
        ),
        judge(
            MAP_FILES,
            open_mapping(patient),
            "another process' RAM opens through /proc/PID/map_files",
            &format!("{ROOT}, or give the agent CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN"),
        ),
    ]
}

fn judge(name: &str, tried: io::Result<()>, found: &str, remedy: &str) -> Check {
    match tried {
        Ok(()) => Check::ok(name, BOTH, found),
        Err(e) => Check::fail(name, BOTH, e.to_string(), remedy),
    }
}

fn ptrace(patient: &Patient) -> io::Result<()> {
    let wanted = patient.process().pid();
    match patient.getpid()? {
        got if got == wanted as u64 => Ok(()),
        got => Err(io::Error::other(format!("an injected getpid answered {got} in process {wanted}"))),
    }
}

fn judge_ptrace(tried: io::Result<()>, yama: Option<&str>) -> Check {
    let found = "a system call was run in another process' place";
    let remedy = match yama {
        None | Some("0") => {
            format!("{ROOT}, or as the user of the QEMU processes; a container needs CAP_SYS_PTRACE")
        }
        Some("3") => {
            "kernel.yama.ptrace_scope is 3, which forbids it until the next boot: set it to 2 or less in \
                      /etc/sysctl.d and boot"
                .to_owned()
        }
        Some(scope) => {
            format!("kernel.yama.ptrace_scope is {scope}: {ROOT}, or give the agent CAP_SYS_PTRACE")
        }
    };
    judge(PTRACE, tried, found, &remedy)
}

fn take_descriptor(patient: &Patient) -> io::Result<()> {
    let taken = patient.process().take_fd(0)?;
    let (taken, ours) = (name_of(taken.as_raw_fd())?, patient.stdin_name()?);
    if taken == ours {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "a descriptor that was taken is {}, not {}",
        taken.display(),
        ours.display()
    )))
}

/// The mapping that nothing has registered yet: registering would split it.
fn open_mapping(patient: &Patient) -> io::Result<()> {
    let addresses = patient.map_ram()?;
    let all = maps::read(patient.process())?;
    let mapping = all.iter().find(|m| m.addresses == addresses);
    let mapping =
        mapping.ok_or_else(|| io::Error::other("what was mapped there is not in /proc/PID/maps"))?;
    maps::open_file(patient.process(), mapping).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;

    #[test]
    fn the_remedy_for_ptrace_names_yama_where_it_stands_in_the_way() {
        let denied = || Err(io::ErrorKind::PermissionDenied.into());
        let table = [
            (None, "CAP_SYS_PTRACE"),
            (Some("0"), "root"),
            (Some("1"), "ptrace_scope is 1"),
            (Some("3"), "boot"),
        ];
        for (yama, words) in table {
            let check = judge_ptrace(denied(), yama);
            assert_eq!(check.status, Status::Fail);
            assert!(check.remedy.as_deref().unwrap_or_default().contains(words), "{yama:?}: {check:?}");
        }
        assert_eq!(judge_ptrace(Ok(()), Some("1")).status, Status::Ok);
    }
}
