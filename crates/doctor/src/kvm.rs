//! Whether KVM is usable: a guest counts, and is timed.

use crate::Check;
use std::fs;
use sys::kvm::{KvmError, Ran, USABLE_SHARE, measure};

const NAME: &str = "kvm";

/// Tries it.
pub(crate) fn check() -> Check {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    judge(measure(), extension(&cpuinfo))
}

/// The processor's word for virtualisation and the driver for it.
fn extension(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    flags.split_whitespace().find_map(|flag| match flag {
        "vmx" => Some("kvm_intel"),
        "svm" => Some("kvm_amd"),
        _ => None,
    })
}

/// Never a failure: without KVM guests run in QEMU's software emulation, slowly, and migrate all the same.
fn judge(measured: Result<Ran, KvmError>, driver: Option<&str>) -> Check {
    let slow = "guests run in software emulation (TCG)";
    match measured {
        Ok(ran) if ran.usable() => {
            let found = format!("a tiny guest makes {:.0} million loop turns/s", ran.speed() / 1e6);
            Check::ok(NAME, &[], found)
        }
        Ok(ran) => Check::warn(
            NAME,
            &[],
            format!("/dev/kvm works, but only {:.2} million loop turns/s: {slow}", ran.speed() / 1e6),
            format!(
                "it lacks the hardware's help (the processor itself makes {:.0} million/s, a guest should \
                 make {:.0}): enable nested virtualisation on the machine below, or leave it",
                ran.native / 1e6,
                ran.native * USABLE_SHARE / 1e6
            ),
        ),
        Err(e @ KvmError::Absent) => Check::warn(
            NAME,
            &[],
            format!("{e}: {slow}"),
            match driver {
                Some(driver) => format!("load the driver: modprobe {driver}"),
                None => {
                    "the processor shows no vmx or svm: enable virtualisation in the firmware, or nested \
                         virtualisation on the machine below"
                        .to_owned()
                }
            },
        ),
        Err(e @ KvmError::Refused(_)) => Check::warn(
            NAME,
            &[],
            format!("{e}: {slow}"),
            "run as root, or add this user to the group that owns /dev/kvm: usermod -aG kvm USER",
        ),
        Err(e) => Check::warn(NAME, &[], format!("{e}: {slow}"), "see the kernel's log: dmesg | grep -i kvm"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;
    use std::{io, time::Duration};

    #[test]
    fn kvm_is_judged_by_what_a_guest_did_and_never_fails_a_host() {
        let ran = |turns, ms| Ok(Ran { turns, time: Duration::from_millis(ms), native: 3e9, finished: true });
        let broken = || KvmError::Broken { what: "create a VM", why: io::ErrorKind::Unsupported.into() };
        let table: [(Result<Ran, KvmError>, Status, &str); 6] = [
            (ran(20_000_000, 10), Status::Ok, ""),
            (ran(350_000, 500), Status::Warn, "nested virtualisation"),
            (Err(KvmError::Absent), Status::Warn, "modprobe kvm_amd"),
            (Err(KvmError::Refused(io::ErrorKind::PermissionDenied.into())), Status::Warn, "usermod"),
            (Err(broken()), Status::Warn, "dmesg"),
            (Err(KvmError::Exit(8)), Status::Warn, "dmesg"),
        ];
        for (measured, status, remedy) in table {
            let said = format!("{measured:?}");
            let check = judge(measured, Some("kvm_amd"));
            assert_eq!(check.status, status, "{said}");
            assert!(check.remedy.unwrap_or_default().contains(remedy), "{said}");
        }
    }

    #[test]
    fn the_driver_is_told_by_the_processors_flags() {
        assert_eq!(extension("flags\t\t: fpu vmx sse\n"), Some("kvm_intel"));
        assert_eq!(extension("flags\t\t: fpu svm sse\n"), Some("kvm_amd"));
        assert_eq!(extension("vmx flags\t: vnmi\nflags\t\t: fpu\n"), None);
        assert!(judge(Err(KvmError::Absent), None).remedy.unwrap().contains("firmware"));
    }
}
