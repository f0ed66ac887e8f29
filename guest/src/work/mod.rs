//! The workloads.

mod check;
pub(crate) mod compile;
mod compute;
mod dirty;
mod disk;
mod fill;
mod page_cache;
mod probe;
mod redis;

use crate::{
    content::Content,
    job::Jobs,
    say, setup,
    words::{Fill, Wish},
};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::{
    fs,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};
use units::Bytes;

/// What can be verified when asked.
#[derive(Default)]
pub(crate) struct Work {
    check: Option<Arc<check::Area>>,
    fill: Option<fill::Filled>,
    cached: Option<Arc<page_cache::Cached>>,
    probe: Option<Arc<probe::Probe>>,
    /// What was asked for later.
    claimed: Mutex<Vec<fill::Filled>>,
}

impl Work {
    /// Compares everything that is known with what is there; says how many pages that were. What is wrong is
    /// on the console and in `jobs`.
    pub(crate) fn verify(&self, jobs: &Jobs) -> u64 {
        self.check.as_ref().map_or(0, |area| area.verify(jobs))
            + self.fill.as_ref().map_or(0, |f| f.verify(jobs))
            + self.cached.as_ref().map_or(0, |c| c.verify(jobs))
            + self.probe.as_ref().map_or(0, |p| p.verify(jobs))
            + self.claimed().iter().map(|f| f.verify(jobs)).sum::<u64>()
    }

    /// Fills so many MiB more.
    pub(crate) fn claim(&self, mib: u64, jobs: &Jobs) {
        let wish = Fill { set: Bytes(mib << 20), content: Content::Random };
        let filled = fill::fill(&wish, &jobs.add("claim"));
        self.claimed().push(filled);
    }

    fn claimed(&self) -> MutexGuard<'_, Vec<fill::Filled>> {
        self.claimed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The probe, if it was asked for.
    pub(crate) fn probe(&self) -> Option<&probe::Probe> {
        self.probe.as_deref()
    }
}

/// Starts what was asked for. Memory is filled when this returns.
pub(crate) fn start(wish: &Wish, jobs: &Arc<Jobs>) -> Result<Work, String> {
    let fill = wish.fill.as_ref().map(|f| fill::fill(f, &jobs.add("fill")));
    let mut work = Work { fill, ..Work::default() };
    if let Some(w) = &wish.check {
        work.check = Some(check::start(w, w.threads.unwrap_or_else(setup::cpus), jobs));
    }
    if let Some(w) = &wish.dirty {
        dirty::start(w, &jobs.add("dirty"))?;
    }
    if let Some(w) = &wish.disk {
        disk::start(w, jobs)?;
    }
    if let Some(w) = &wish.page_cache {
        work.cached = Some(page_cache::start(w, jobs)?);
    }
    if let Some(w) = &wish.redis {
        redis::start(w, jobs)?;
    }
    if let Some(w) = &wish.compile {
        compile::start(w, setup::cpus(), jobs)?;
    }
    if let Some(w) = &wish.compute {
        compute::start(w, &jobs.add("compute"))?;
    }
    if let Some(w) = &wish.probe {
        work.probe = Some(probe::start(w, jobs)?);
    }
    Ok(work)
}

/// Starts a thread of a workload, on this vCPU alone if one is named.
fn spawn(cpu: Option<usize>, work: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let only = cpu.map(|cpu| match cpu < setup::cpus() {
        true => {
            let mut set = CpuSet::new();
            set.set(cpu);
            Ok(set)
        }
        false => Err(format!("there is no vCPU {cpu} here: there are {} from 0 on", setup::cpus())),
    });
    let only = only.transpose()?;
    thread::spawn(move || {
        if let Some(Err(e)) = only.map(|set| sched_setaffinity(None, &set)) {
            say!("WHIMBREL warning: a thread is not tied to its vCPU: {e}");
        }
        work();
    });
    Ok(())
}

/// What the rest of the guest needs: page tables, sockets, stacks.
const SPARE: u64 = 24 << 20;

/// Whether the guest has the memory for all of it: better a word now than the out-of-memory killer later.
pub(crate) fn fits(wish: &Wish) -> Result<(), String> {
    let sets = [
        wish.check.as_ref().map(|w| w.set),
        wish.dirty.as_ref().map(|w| w.set),
        wish.fill.as_ref().map(|w| w.set),
        wish.page_cache.as_ref().map(|w| w.set),
        wish.redis.as_ref().map(|w| w.set),
        wish.compile.as_ref().map(|w| w.set),
        wish.probe.as_ref().map(|w| w.set),
    ];
    let wanted: Bytes = sets.into_iter().flatten().sum();
    let text = fs::read_to_string("/proc/meminfo").map_err(|e| format!("/proc/meminfo: {e}"))?;
    let free = available(&text).ok_or("/proc/meminfo has no MemAvailable")?;
    if wanted.0 > 0 && wanted.0.saturating_add(SPARE) > free.0 {
        let spare = Bytes(SPARE);
        return Err(format!(
            "the workloads want {wanted} and {spare} to spare, but only {free} are free here"
        ));
    }
    Ok(())
}

fn available(meminfo: &str) -> Option<Bytes> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok().map(|kib: u64| Bytes(kib << 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_read_as_the_kernel_writes_it() {
        assert_eq!(available("MemTotal:  9 kB\nMemAvailable:    2048 kB\n"), Some(Bytes(2 << 20)));
        assert_eq!(available("MemTotal: 9 kB\n"), None);
    }
}
