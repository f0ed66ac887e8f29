//! The memory of VMs that have left, for when they come back.
//!
//! It is content and nothing else: no VM ever runs in it. Only the host that a VM left for is told of it, and
//! only if it has the VM from that migration.

use agent::config::Keep;
use ports::Block;
use std::{
    fs,
    sync::{Arc, Mutex, Weak},
    thread,
    time::Duration,
};
use sys::{pressure::Pressure, proc};
use units::{Bytes, Locked, MigrationId};

/// How often it is looked how much memory is left; programs that wait for memory are heard of at once.
const LOOK: Duration = Duration::from_secs(1);

/// Where less than one part in so many of the host's memory is left, nothing is kept.
const LOW: u64 = 16;

/// All that is kept on this host.
#[derive(Clone, Debug)]
pub(crate) struct Copies(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    keep: Keep,
    all: Mutex<All>,
}

#[derive(Debug, Default)]
struct All {
    /// What left first is first.
    copies: Vec<Copy>,
    /// Whether somebody looks how much memory is left.
    is_watched: bool,
}

#[derive(Debug)]
struct Copy {
    vm: String,
    /// Where it went, and by which migration.
    to: String,
    left_by: MigrationId,
    memory: Arc<attach::Kept>,
    bytes: u64,
}

impl Copies {
    /// Keeps so much.
    pub(crate) fn new(keep: Keep) -> Self {
        Self(Arc::new(Shared { keep, all: Mutex::default() }))
    }

    /// A VM has left, and its process has ended: its memory is kept if there is room for it.
    pub(crate) fn keep(&self, vm: &str, to: &str, left_by: MigrationId, memory: &attach::Memory) {
        if self.0.keep.of(u64::MAX) == 0 {
            return;
        }
        let memory = match attach::Kept::of(memory) {
            Ok(Some(memory)) => memory,
            Ok(None) => return tracing::debug!(vm, "its memory is others', too, and not kept"),
            Err(error) => return tracing::warn!(vm, %error, "its memory cannot be kept"),
        };
        let bytes = memory.allocated();
        let mut all = self.0.all.locked();
        let kept: u64 = all.copies.iter().map(|copy| copy.bytes).sum();
        let free = left().map_or(0, |(left, _)| left).saturating_add(kept).saturating_add(bytes);
        let sizes: Vec<u64> = all.copies.iter().map(|copy| copy.bytes).collect();
        let Some(leave) = make_way(&sizes, bytes, self.0.keep.of(free)) else {
            return tracing::info!(vm, bytes = %Bytes(bytes), "its memory is more than may be kept");
        };
        all.copies.drain(..leave);
        let (vm, to) = (vm.to_owned(), to.to_owned());
        tracing::info!(vm, to, bytes = %Bytes(bytes), "its memory is kept for when it comes back");
        all.copies.push(Copy { vm, to, left_by, memory: Arc::new(memory), bytes });
        if !std::mem::replace(&mut all.is_watched, true) {
            let shared = Arc::downgrade(&self.0);
            let watched = thread::Builder::new().name("kept".into()).spawn(move || watch(&shared));
            if let Err(error) = watched {
                tracing::warn!(%error, "nobody would see that memory gets scarce: nothing is kept");
                *all = All::default();
            }
        }
    }

    /// A VM of this name comes: what is kept of the one that left, if it is the same, with the same memory,
    /// and comes from where it went. Whatever else is kept under its name is forgotten.
    pub(crate) fn take(
        &self,
        vm: &str,
        from: &str,
        came_by: Option<MigrationId>,
        blocks: &[Block],
    ) -> Option<Arc<attach::Kept>> {
        let mut all = self.0.all.locked();
        let (mut of_vm, others) = all.copies.drain(..).partition::<Vec<_>, _>(|copy| copy.vm == vm);
        all.copies = others;
        let same =
            |copy: &Copy| Some(copy.left_by) == came_by && copy.to == from && copy.memory.blocks() == blocks;
        of_vm.pop().filter(same).map(|copy| copy.memory)
    }

    /// Gives memory back, what left first before all else and what is of this VM last, until there is room.
    pub(crate) fn make_room(&self, vm: &str, has_room: impl Fn() -> bool) {
        let mut all = self.0.all.locked();
        while !all.copies.is_empty() && !has_room() {
            let first = all.copies.iter().position(|copy| copy.vm != vm).unwrap_or(0);
            let Copy { vm, bytes, .. } = all.copies.remove(first);
            tracing::info!(vm, bytes = %Bytes(bytes), "what was kept of it makes room");
        }
    }
}

/// How many of the oldest make way for so many bytes more, where there may be `most`; none: all would not do.
fn make_way(sizes: &[u64], bytes: u64, most: u64) -> Option<usize> {
    let room = most.checked_sub(bytes)?;
    let mut kept: u64 = sizes.iter().fold(0, |sum, size| sum.saturating_add(*size));
    let mut leave = 0;
    while kept > room {
        kept -= sizes.get(leave)?;
        leave += 1;
    }
    Some(leave)
}

/// Gives everything back once memory gets scarce. Ends when nothing is kept.
fn watch(shared: &Weak<Shared>) {
    let pressure = Pressure::watch().inspect_err(|error| {
        tracing::info!(%error, "the kernel does not say when programs wait for memory; the agent looks");
    });
    loop {
        let waited = pressure.as_ref().ok().and_then(|pressure| pressure.wait(LOOK).ok());
        if waited.is_none() {
            thread::sleep(LOOK);
        }
        let Some(shared) = shared.upgrade() else { return };
        let is_scarce = waited == Some(true) || left().is_some_and(|(left, all)| left < all / LOW);
        let mut all = shared.all.locked();
        if is_scarce && !all.copies.is_empty() {
            tracing::info!(copies = all.copies.len(), "memory is scarce: what was kept of VMs is given back");
            all.copies.clear();
        }
        if all.copies.is_empty() {
            all.is_watched = false;
            return;
        }
    }
}

/// How much memory of this host is left, and how much there is.
fn left() -> Option<(u64, u64)> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    Some((proc::bytes(&text, "MemAvailable")?, proc::bytes(&text, "MemTotal")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_left_first_makes_way_first() {
        let table = [
            (&[][..], 10, 10, Some(0)),
            (&[], 11, 10, None),
            (&[5, 5], 10, 20, Some(0)),
            (&[5, 5], 10, 19, Some(1)),
            (&[5, 5], 10, 14, Some(2)),
            (&[5, 5], 10, 10, Some(2)),
            (&[1, 9, 1], 5, 7, Some(2)),
            (&[u64::MAX, 1], 5, 7, Some(1)),
        ];
        for (sizes, bytes, most, leave) in table {
            assert_eq!(make_way(sizes, bytes, most), leave, "{sizes:?} and {bytes} in {most}");
        }
    }
}
