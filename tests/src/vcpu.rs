//! The thread that runs a vCPU: how long it was held up. What a guest gets done where many share few
//! processors says little about that: a vCPU that only waits for a processor of this machine is held up by
//! nobody.

use crate::{Doing, Result};
use std::{cmp::Reverse, fs, time::Duration};

/// The thread of one vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Vcpu {
    pid: u32,
    tid: u32,
}

impl Vcpu {
    /// The thread of vCPU `index` of `count` busy ones of a QEMU process. QEMU starts them in order, and no
    /// other of its threads has run for so long.
    pub fn find(pid: u32, index: usize, count: usize) -> Result<Self> {
        let path = format!("/proc/{pid}/task");
        let mut all = Vec::new();
        for entry in fs::read_dir(&path).doing(format!("list {path}"))?.flatten() {
            let tid = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let vcpu = Self { pid, tid: tid.doing(format!("understand {path}"))? };
            // A thread may end between the two looks.
            all.extend(vcpu.times().map(|(ran, _)| (Reverse(ran), vcpu)));
        }
        all.sort_by_key(|(ran, _)| *ran);
        let mut busy: Vec<_> = all.iter().take(count).map(|(_, vcpu)| *vcpu).collect();
        busy.sort_by_key(|vcpu| vcpu.tid);
        busy.get(index).copied().doing(format!("find vCPU {index} of process {pid}"))
    }

    /// How long it has run, or would have if others had not had the processors. A vCPU that computes all the
    /// time was held up for the rest.
    pub fn ready(&self) -> Result<Duration> {
        self.times().map(|(ran, waited)| ran + waited)
    }

    fn times(&self) -> Result<(Duration, Duration)> {
        let path = format!("/proc/{}/task/{}/schedstat", self.pid, self.tid);
        let text = fs::read_to_string(&path).doing(format!("read {path}"))?;
        let mut words = text.split_whitespace().map(|word| word.parse().map(Duration::from_nanos));
        match (words.next(), words.next()) {
            (Some(Ok(ran)), Some(Ok(waited))) => Ok((ran, waited)),
            _ => Err(crate::Error::new(format!("understand {path}"), text)),
        }
    }
}
