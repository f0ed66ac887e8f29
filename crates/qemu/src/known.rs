//! What a VM was when its migration began, and whether it still is.

use crate::{
    qmp::{Qmp, QmpError},
    snapshot::{Depth, Snapshot},
};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// Commands such as `device_add` and `blockdev-add` have no event: so the short questions are asked this often, 2 ms of QEMU's time.
const SHORT: Duration = Duration::from_secs(1);

/// And all of them this often, 6 ms.
const WHOLE: Duration = Duration::from_secs(5);

/// Events after which all is asked. What a guest does by itself (it reboots, moves its network card's filter, …) is not among them.
const TELLING: &[&str] = &[
    "ACPI_DEVICE_OST",
    "BLOCK_EXPORT_DELETED",
    "BLOCK_JOB_CANCELLED",
    "BLOCK_JOB_COMPLETED",
    "BLOCK_JOB_ERROR",
    "BLOCK_JOB_PENDING",
    "BLOCK_JOB_READY",
    "DEVICE_DELETED",
    "DEVICE_TRAY_MOVED",
    "JOB_STATUS_CHANGE",
    "MEMORY_DEVICE_SIZE_CHANGE",
    "MIGRATION",
    "QUORUM_REPORT_BAD",
];

/// See the module.
#[derive(Debug)]
pub(crate) struct Known {
    was: Snapshot,
    asked: Instant,
    asked_all: Instant,
}

impl Known {
    /// As it is now.
    pub(crate) fn begin(qmp: &mut Qmp) -> Result<Self, QmpError> {
        // What happened before is in the answers.
        qmp.notice()?;
        let was = Snapshot::take(qmp, Depth::Whole)?;
        let now = Instant::now();
        Ok(Self { was, asked: now, asked_all: now })
    }

    /// See [`Snapshot::hindrances`].
    pub(crate) fn hindrances(&self) -> Vec<String> {
        self.was.hindrances()
    }

    /// How it differs, if that is to be asked now: something has happened, or it is time.
    pub(crate) fn watch(&mut self, qmp: &mut Qmp) -> Result<Vec<String>, QmpError> {
        let happened = is_telling(&qmp.notice()?);
        let depth = if happened || self.asked_all.elapsed() >= WHOLE {
            Depth::Whole
        } else if self.asked.elapsed() >= SHORT {
            Depth::Short
        } else {
            return Ok(vec![]);
        };
        let told = self.look(qmp, depth)?;
        self.asked = Instant::now();
        if depth == Depth::Whole {
            self.asked_all = self.asked;
        }
        Ok(told)
    }

    /// How it differs now, in a pause; `saved`: its device state was saved already.
    pub(crate) fn changes(&self, qmp: &mut Qmp, saved: bool) -> Result<Vec<String>, QmpError> {
        let happened = is_telling(&qmp.notice()?);
        let depth = match (happened, saved) {
            (true, _) => Depth::Whole,
            (false, true) => Depth::Short,
            (false, false) => Depth::Disks,
        };
        let told = self.look(qmp, depth)?;
        // An event that came with the answers, of something that the short questions do not tell.
        if told.is_empty() && !happened && is_telling(&qmp.notice()?) {
            return self.look(qmp, Depth::Whole);
        }
        Ok(told)
    }

    fn look(&self, qmp: &mut Qmp, depth: Depth) -> Result<Vec<String>, QmpError> {
        let told = self.was.differences(&Snapshot::take(qmp, depth)?);
        if told.is_empty() || depth == Depth::Whole {
            return Ok(told);
        }
        // Something is wrong in any case: asked for all, QEMU says what in words that people use.
        let all = self.was.differences(&Snapshot::take(qmp, Depth::Whole)?);
        Ok(if all.is_empty() { told } else { all })
    }
}

fn is_telling(events: &BTreeSet<String>) -> bool {
    TELLING.iter().any(|event| events.contains(*event))
}
