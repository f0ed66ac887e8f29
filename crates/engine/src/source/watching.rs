//! Whether the VM is still what it was when its migration began. Managers, backup tools and people use its
//! QEMU at any moment.

use super::{Signal, SourceDriver};
use crate::ports::{MachineError, VmCheck};
use api::Phase;
use proto::SourceEvent;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

/// How often the machine is asked while the guest runs. It asks QEMU only when something may have happened; a
/// change that comes between two looks is found by the look in the pause.
const EVERY: Duration = Duration::from_millis(250);

/// The looks of one migration.
#[derive(Default)]
pub(super) struct Watching {
    last: Option<Instant>,
    /// One is under way.
    busy: bool,
    /// One that has not begun must not begin: it would keep the machine from whoever stops the guest.
    over: Arc<AtomicBool>,
}

impl SourceDriver {
    /// Looks beside the driver, if it is time.
    pub(super) fn look_around(&mut self) {
        let due = self.watching.last.is_none_or(|last| last.elapsed() >= EVERY);
        if !due || self.watching.busy || !self.is_watched() {
            return;
        }
        self.watching.last = Some(Instant::now());
        self.watching.over.store(false, SeqCst);
        let (tell, over) = (self.tell.clone(), self.watching.over.clone());
        let look = self.parts.machine.later("watch", move |machine| {
            let seen = if over.load(SeqCst) { Ok(VmCheck::default()) } else { machine.watch() };
            let _ = tell.send(Signal::Watched(seen));
        });
        self.watching.busy = look.is_ok();
    }

    /// The guest is about to be stopped.
    pub(super) fn end_watch(&self) {
        self.watching.over.store(true, SeqCst);
    }

    /// What a look has found.
    pub(super) fn watched(&mut self, seen: Result<VmCheck, MachineError>) -> Option<SourceEvent> {
        self.watching.busy = false;
        let seen = match seen {
            // Once the guest stands still, the looks in the pause tell.
            Ok(seen) if self.is_watched() => seen,
            Ok(_) => return None,
            // A QEMU that is busy for long answers the look in the pause, or ends the migration there.
            Err(error) => {
                tracing::info!(%error, "could not look whether the VM has changed");
                return None;
            }
        };
        if !seen.changes.is_empty() {
            return Some(self.broke(MachineError::changed(&seen.changes).into()));
        }
        let state = seen.state?;
        let ended = self.can_be_carried(state).err()?;
        // It stays so.
        self.before = state;
        Some(self.broke(ended))
    }

    fn is_watched(&self) -> bool {
        !self.stopped && matches!(self.phase(), Phase::Preflight | Phase::PreCopy)
    }
}
