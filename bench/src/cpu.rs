//! Processor time of processes and threads, to the nanosecond: `/proc/PID/stat` counts in hundredths of a
//! second, and a migration lasts a few tenths.

use lab::{Doing, Result};
use nix::{
    time::{clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};
use std::{fs, time::Duration};

/// What a process has used so far, its ended threads included.
pub(crate) fn process(pid: u32) -> Result<Duration> {
    let what = || format!("read the processor time of process {pid}");
    let clock = clock_getcpuclockid(Pid::from_raw(pid as i32)).doing(what())?;
    clock_gettime(clock).map(Duration::from).doing(what())
}

/// What one thread has used so far.
pub(crate) fn thread(pid: u32, tid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/task/{tid}/schedstat");
    let text = fs::read_to_string(&path).doing(format!("read {path}"))?;
    let ns = text.split_whitespace().next().and_then(|word| word.parse().ok());
    ns.map(Duration::from_nanos).doing(format!("understand {path}: {text}"))
}

/// What a QEMU process has used beside running its guest: all its threads, also ended ones, but its vCPUs.
pub(crate) fn beside_vcpus(pid: u32, vcpus: &[u32]) -> Result<Duration> {
    let mut guest = Duration::ZERO;
    for tid in vcpus {
        guest += thread(pid, *tid)?;
    }
    Ok(process(pid)?.saturating_sub(guest))
}
