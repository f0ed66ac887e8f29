//! What a VM was when its migration began, and whether it still is.

use crate::{
    qmp::{Asked, Qmp, QmpError},
    ram::{self, Listed},
    snapshot::{Depth, Snapshot, WITHIN},
};
use ports::{RunState, VmCheck};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// Commands such as `device_add` and `blockdev-add` have no event: so the short questions are asked this
/// often, 2 ms of QEMU's time.
const SHORT: Duration = Duration::from_secs(1);

/// And all of them this often, 6 ms.
const WHOLE: Duration = Duration::from_secs(5);

/// QEMU answers what is asked with `stop` within 2 ms. Where that is over so much later, something has held
/// it or us up.
const FRESH: Duration = Duration::from_millis(10);

/// Events after which all is asked. What a guest does by itself (it reboots, moves its network card's filter,
/// …) is not among them.
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
    "MIGRATION",
    "QUORUM_REPORT_BAD",
];

/// Events after which it is asked what the guest does: it may have gone to sleep, switched itself off or
/// died, and a disk's error may have stopped it. (A reset leaves it running.)
const OF_THE_GUEST: &[&str] =
    &["BLOCK_IO_ERROR", "GUEST_PANICKED", "RESET", "SHUTDOWN", "STOP", "SUSPEND", "SUSPEND_DISK", "WATCHDOG"];

/// Somebody or something has stopped the guest.
const STOPPED: &str = "STOP";

/// Said of a QEMU that has stopped its guest and answers nobody. While somebody loads a snapshot, QEMU itself
/// writes all of the guest's memory, and must not be slowed as a writer: the guest stands still meanwhile.
const BUSY: &str = "QEMU has stopped the guest, and is busy with that (savevm, loadvm, dump-guest-memory?); \
                    migrate again when that is done";

/// See the module.
#[derive(Debug)]
pub(crate) struct Known {
    was: Snapshot,
    asked: Instant,
    asked_all: Instant,
    /// Whether a pause has ended since.
    paused: bool,
}

/// Questions whose answers are to be read.
#[derive(Debug)]
pub(crate) struct Look {
    lines: Vec<(&'static str, Value)>,
    asked: Asked,
    /// How many questions had been asked then.
    questions: u64,
    /// Since when they can be answered.
    since: Instant,
}

impl Look {
    /// The command before them was answered only now.
    pub(crate) fn begins(self) -> Self {
        Self { since: Instant::now(), ..self }
    }

    /// Whether QEMU is still about to answer, and not for long: others may change what it has told already,
    /// unnoticed. Nothing was asked since, or the answers would be passed over.
    pub(crate) fn is_current(&self, qmp: &Qmp) -> bool {
        let is_last = self.questions == qmp.questions();
        is_last && !qmp.is_answered(&self.asked) && self.since.elapsed() < FRESH
    }
}

impl Known {
    /// As it is now.
    pub(crate) fn begin(qmp: &mut Qmp) -> Result<Self, QmpError> {
        // What happened before is in the answers.
        qmp.notice()?;
        let was = Snapshot::take(qmp, Depth::Whole)?;
        let now = Instant::now();
        Ok(Self { was, asked: now, asked_all: now, paused: false })
    }

    /// See [`Snapshot::hindrances`].
    pub(crate) fn hindrances(&self) -> Vec<String> {
        self.was.hindrances()
    }

    /// It goes on after a pause, in which others may have acted: all is asked next time.
    pub(crate) fn goes_on(&mut self) {
        self.paused = true;
    }

    /// How it differs and what the guest does, if that is to be asked now: something has happened, or it is
    /// time.
    pub(crate) fn watch(&mut self, qmp: &mut Qmp) -> Result<VmCheck, QmpError> {
        let events = qmp.notice()?;
        let depth = if is_telling(&events) || self.paused || self.asked_all.elapsed() >= WHOLE {
            Depth::Whole
        } else if self.asked.elapsed() >= SHORT || is_of_the_guest(&events) {
            Depth::Short
        } else {
            return Ok(VmCheck::default());
        };
        let now = match Snapshot::take(qmp, depth) {
            Err(QmpError::Timeout { .. }) if events.contains(STOPPED) => {
                return Ok(VmCheck { changes: vec![BUSY.to_owned()], state: None });
            }
            now => now?,
        };
        let changes = self.tell_of(qmp, depth, &now)?;
        self.asked = Instant::now();
        if depth == Depth::Whole {
            (self.asked_all, self.paused) = (self.asked, false);
        }
        Ok(VmCheck { changes, state: Some(RunState::from_name(&now.run_state)) })
    }

    /// Asks how it differs, for a pause, and for its RAM blocks; [`Known::look`] reads the answers. Between
    /// two of them nobody waits, neither QEMU nor the guest. The command that follows is poised meanwhile.
    pub(crate) fn ask(qmp: &mut Qmp, next: (&str, &Value)) -> Result<Look, QmpError> {
        let mut lines = Snapshot::lines(Depth::Short);
        // What the guest does the answer to `stop` tells.
        lines.retain(|(command, _)| *command != "query-status");
        lines.insert(0, (ram::LISTING, json!({})));
        let asked = qmp.ask_all(&lines, WITHIN)?;
        qmp.poise(next.0, next.1)?;
        Ok(Look { lines, asked, questions: qmp.questions(), since: Instant::now() })
    }

    /// Its RAM blocks now, before its device state is saved, and how it differs.
    pub(crate) fn look(&self, qmp: &mut Qmp, look: Look) -> Result<(Vec<Listed>, Vec<String>), QmpError> {
        let (lines, mut asked) = (look.lines, look.asked.within(WITHIN));
        let listing = qmp.next_answer(&mut asked)?;
        let answers = lines[1..].iter().map(|_| qmp.next_answer(&mut asked)).collect::<Result<_, _>>()?;
        let blocks = match listing {
            Err(error) if error.is_unknown_command() => ram::listed(qmp),
            listing => ram::parse_listing(qmp, &listing?),
        };
        let now = Snapshot::read(Depth::Short, &lines[1..], answers)?;
        let mut told = self.tell_of(qmp, Depth::Short, &now)?;
        if told.is_empty() && is_telling(&qmp.notice()?) {
            // Something has happened that the short questions do not tell.
            told = self.was.differences(&Snapshot::take(qmp, Depth::Whole)?);
        }
        Ok((blocks?, told))
    }

    /// What a QEMU that answers nobody any more has said since it was asked last, if something about it has
    /// changed.
    pub(crate) fn happened(&self, qmp: &mut Qmp) -> Result<Option<String>, QmpError> {
        let events = qmp.notice()?;
        let told = TELLING.iter().find(|event| events.contains(**event));
        Ok(told.map(|event| format!("QEMU has said {event} just before it was frozen; migrate again")))
    }

    fn tell_of(&self, qmp: &mut Qmp, depth: Depth, now: &Snapshot) -> Result<Vec<String>, QmpError> {
        let told = self.was.differences(now);
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

fn is_of_the_guest(events: &BTreeSet<String>) -> bool {
    OF_THE_GUEST.iter().any(|event| events.contains(*event))
}
