//! An agent's memory while it moves a large guest.

use crate::{guest, whimbrel};
use lab::{Doing, HandStart, Lab, Result, Tools};
use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};
use units::Bytes;

/// Above the 4 GiB hole, as the published figure asks.
const GUEST: Bytes = Bytes(5 << 30);
/// Nearly all of it in use; without content, because an emulated guest would take minutes to think of some. A
/// page of zeros that the guest has written costs an agent the same memory as any other. A part is not zero,
/// so that buffers fill.
const WORK: &str =
    "whimbrel.fill=4300M,content=zero whimbrel.check=128M,rate=8M whimbrel.dirty=256M,rate=32M";
/// How often an agent's memory is looked at.
const GLANCE: Duration = Duration::from_millis(5);

/// What one agent held, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Held {
    /// All that is resident.
    pub(crate) all: u64,
    /// Its own: heap and stacks.
    pub(crate) anon: u64,
    /// Mapped files: its program.
    pub(crate) file: u64,
    /// Mapped shared memory: guest RAM, which is not its own.
    pub(crate) shared: u64,
}

/// One agent in one migration.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Footprint {
    /// The mode.
    pub(crate) mode: &'static str,
    /// `source` or `target`.
    pub(crate) side: &'static str,
    /// Before.
    pub(crate) idle: Held,
    /// The most of each during the migration.
    pub(crate) peak: Held,
    /// How long the migration took.
    pub(crate) total_ms: f64,
}

/// Moves a guest of 5 GiB there by pre-copy and back by post-copy.
pub(crate) fn measure(tools: &Tools, tls: bool) -> Result<Vec<Footprint>> {
    let lab = Lab::new(&["a", "b"])?;
    let start = HandStart { memory: GUEST, vcpus: 2, ..HandStart::new(guest::spec(WORK)) };
    let moved = whimbrel::Moved::boot(whimbrel::stage(&lab, tools, tls)?, start, None)?;
    let mut found = Vec::new();
    for (mode, source) in [("pre-copy", 0), ("post-copy", 1)] {
        let agents = moved.agents();
        let idle = [held(agents[0])?, held(agents[1])?];
        let over = AtomicBool::new(false);
        let (report, peak) = thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let mut peak = idle;
                while !over.load(Ordering::Relaxed) {
                    for (peak, pid) in peak.iter_mut().zip(agents) {
                        // An agent that ends makes the migration fail, which is told below.
                        peak.raise(held(pid).unwrap_or_default());
                    }
                    thread::sleep(GLANCE);
                }
                peak
            });
            let report = moved.move_over(mode);
            over.store(true, Ordering::Relaxed);
            (report, watch.join().unwrap_or(idle))
        });
        let total_ms = report?.number("total_ms")?;
        for (side, i) in [("source", source), ("target", 1 - source)] {
            let (idle, peak) = (idle[i], peak[i]);
            found.push(Footprint { mode, side, idle, peak, total_ms });
        }
    }
    lab::ensure!(moved.guest().verify()? > 0, "the guest checked its memory");
    Ok(found)
}

impl Held {
    fn raise(&mut self, now: Self) {
        self.all = self.all.max(now.all);
        self.anon = self.anon.max(now.anon);
        self.file = self.file.max(now.file);
        self.shared = self.shared.max(now.shared);
    }
}

fn held(pid: u32) -> Result<Held> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).doing(format!("read {path}"))?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        let kib: Option<u64> = line.split_whitespace().next().and_then(|word| word.parse().ok());
        kib.map(|kib| kib << 10).doing(format!("find {name} in {path}"))
    };
    Ok(Held {
        all: field("VmRSS:")?,
        anon: field("RssAnon:")?,
        file: field("RssFile:")?,
        shared: field("RssShmem:")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_holds_what_its_parts_hold() {
        let held = held(std::process::id()).unwrap();
        assert!(held.anon > 0 && held.all > 0, "{held:?}");
    }
}
