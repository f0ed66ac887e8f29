//! A pause: the guest is stopped, its device state saved, its QEMU frozen and held; and given back, whatever
//! has come of it.
//!
//! From `save` on the disks are inactive. Whatever another monitor asks of such a QEMU is done to a guest
//! that is about to leave, and some of it ends QEMU. So QEMU stands still as a whole from then on, until its
//! guest is given back or leaves for good.

use super::{
    Vm,
    phase::{Phase, Transition},
};
use crate::{
    flush, halt,
    known::{Known, Look},
    qmp::QmpError,
    ram,
    snapshot::own,
    state::{self, Exit},
};
use ports::{DeviceState, MachineError, RunState, SaveStep, SaveStepKind, Saved, Stopped};
use serde_json::{Value, json};
use std::time::{Duration, Instant, SystemTime};
use sys::hold::Hold;

/// How long `stop` may take: it drains the disks, and the guest stands still meanwhile. Where storage hangs,
/// QEMU itself does, and the guest goes on when that is over; a migration is no reason to wait for it for
/// longer.
const STOP: Duration = Duration::from_secs(10);

/// How long vCPUs take to stand still, at most, where nothing else tells that from waiting for disks: 0.5 ms
/// on a quiet host.
const STAND_STILL: Duration = Duration::from_millis(5);

/// How long QEMU may take to write its device state: milliseconds, unless its disks are slow to inactivate.
const SAVE: Duration = Duration::from_secs(60);

/// How long the guest may take to run after `cont`.
const RESUME: Duration = Duration::from_secs(10);

/// How long QEMU may take to stand still as a whole: as soon as each of its threads has had a processor once.
/// On a machine that others use, too: 0.6 ms (median), 7 ms (99 %); to be held then, 1 ms and 43 ms; beside
/// one question to its monitor of 0.5 ms and 7 ms (`cargo test --release -p qemu --test states -- freezing
/// --ignored --nocapture`). A host whose own processors are taken away from it has needed more than 500 ms.
/// The guest stands still meanwhile; beyond, it goes on here.
const FREEZE: Duration = Duration::from_secs(2);

/// How long to wait before QEMU is asked again whether its own migration has ended.
const AGAIN: Duration = Duration::from_millis(2);

const LET_GO: &str = "somebody has let its QEMU go on while it was to stand still (SIGCONT); migrate again, \
                      and keep debuggers and supervisors from it";

/// How much of `stop`, which took `over`, went into the disks, where QEMU said `since` ago that the guest is
/// stopped. It takes disks from their own threads, and waits for their requests for that, before it says so.
/// Never longer than all of it, whatever the host's clock does.
fn drained(over: Duration, since: Duration, disk_threads: bool) -> Duration {
    let early = if disk_threads { over.saturating_sub(STAND_STILL) } else { Duration::ZERO };
    since.max(early).min(over)
}

impl Vm {
    /// See [`ports::Machine::prepare_stop`].
    pub(super) fn get_ready_to_stop(&mut self) -> Result<RunState, MachineError> {
        let what = "get ready to stop";
        self.phase.allows(Transition::Prepare).map_err(|why| self.error(what, why))?;
        // What is not to be found now is asked again when it is needed.
        if let Err(error) = self.private.locate(&mut self.qmp, &self.process) {
            tracing::debug!(vm = self.name(), %error, "not yet known");
        }
        // Most of what there is to write, while the guest runs.
        if let Err(error) = flush::all(&self.unflushed) {
            tracing::warn!(vm = self.name(), %error, "its disks cannot be flushed yet");
        }
        if self.exit.is_none() {
            self.exit = Some(state::open_exit(&mut self.qmp).map_err(|error| self.error(what, error))?);
        }
        let state = self.state().map_err(|error| self.error(what, error))?;
        self.phase = Phase::Ready;
        Ok(state)
    }

    /// See [`ports::Machine::stop`].
    pub(super) fn halt(&mut self) -> Result<Stopped, MachineError> {
        let what = "stop";
        if matches!(self.phase, Phase::Free) {
            self.get_ready_to_stop()?;
        }
        self.phase.allows(Transition::Stop).map_err(|why| self.error(what, why))?;
        self.stopped_at = None;
        let asked = Instant::now();
        let told = self.say_stop().map_err(|error| self.error(what, error))?;
        let (over, over_at) = (asked.elapsed(), SystemTime::now());
        let ((before, heard), answered, after) = told;
        let around = self.qmp.events_since(heard).filter(|event| event.number < answered);
        let found = halt::found(before, around, after);
        self.stopped_at = found.stopped_at;
        let since = found.since.unwrap_or(answered);
        self.phase = Phase::Stopped { paused: after == RunState::Paused, since };
        match self.changed() {
            Some(changed) => Err(self.error(what, changed)),
            None if after == RunState::Running => Err(self.error(what, "it runs on")),
            None => {
                // QEMU says STOP once the vCPUs stand still, and drains the disks before it answers.
                let since = found.stopped_at.and_then(|at| over_at.duration_since(at).ok());
                let drained = drained(over, since.unwrap_or_default(), self.has_disk_threads());
                Ok(Stopped { before: found.state, drained })
            }
        }
    }

    /// Whether disks may have threads of their own in QEMU.
    fn has_disk_threads(&self) -> bool {
        let kind = |value: &str| value.split(',').next() == Some("iothread") || value.contains("=iothread");
        let objects = self.recipe.arguments.iter().filter(|argument| argument.option == "-object");
        objects.filter_map(|argument| argument.value.as_deref()).any(kind)
    }

    /// The state just before `stop`, with how many events had come by then; how many had when it was
    /// answered; and the state then. QEMU's `stop` succeeds from every state, and does nothing to a guest
    /// that does not run.
    fn say_stop(&mut self) -> Result<((RunState, u64), u64, RunState), QmpError> {
        let lines = ["query-status", "stop", "query-status"].map(|command| (command, json!({})));
        let mut asked = self.qmp.ask_all(&lines, STOP)?;
        // QEMU's monitor has a thread of its own that reads, which takes longer than to answer: it reads what
        // is asked after `stop` while the disks are drained.
        let look = match (&self.known, &self.exit) {
            (Some(_), Some(exit)) => {
                let saving = exit.arguments();
                Some(Known::ask(&mut self.qmp, (state::SAVE, &saving))?)
            }
            _ => None,
        };
        let mut next = || Ok::<_, QmpError>((self.qmp.next_answer(&mut asked)??, self.qmp.heard()));
        let (before, heard) = next()?;
        let (_, answered) = next()?;
        let (after, _) = next()?;
        self.look = look.map(Look::begins);
        let state = |status: &Value| RunState::from_name(status["status"].as_str().unwrap_or_default());
        Ok(((state(&before), heard), answered, state(&after)))
    }

    /// See [`ports::Machine::save`].
    pub(super) fn save_and_freeze(&mut self) -> Result<Saved, MachineError> {
        let what = "save the device state of";
        self.phase.allows(Transition::Save).map_err(|why| self.error(what, why))?;
        let Some(mut exit) = self.exit.take() else {
            return Err(self.error(what, "the guest runs; stop it first"));
        };
        let saved = self.save_through(&mut exit);
        self.exit = Some(exit);
        saved
    }

    fn save_through(&mut self, exit: &mut Exit) -> Result<Saved, MachineError> {
        let what = "save the device state of";
        self.private.locate(&mut self.qmp, &self.process).map_err(|error| self.error(what, error))?;
        self.qmp.hear().map_err(|error| self.error(what, error))?;
        if let Some(changed) = self.changed() {
            return Err(self.error(what, changed));
        }
        let mut steps = Vec::new();
        let mut begin = Instant::now();
        exit.clear().map_err(|error| self.error(what, error))?;
        let arguments = exit.arguments();
        let asked = self.look.take().filter(|look| look.is_current(&self.qmp));
        let look = match &self.known {
            Some(known) => match asked {
                Some(look) => Ok(look),
                None => Known::ask(&mut self.qmp, (state::SAVE, &arguments)),
            }
            .and_then(|look| known.look(&mut self.qmp, look)),
            None => ram::listed(&mut self.qmp).map(|blocks| (blocks, vec![])),
        };
        let (blocks, changes) = look.map_err(|error| self.error("look again at", error))?;
        if !changes.is_empty() {
            return Err(MachineError::changed(&changes));
        }
        steps.push(step(SaveStepKind::Check, &mut begin));

        // What another monitor asks of it later may be more than it can do with inactive disks, and is lost
        // in any case. So it is not asked once more what it is, but stands still with its answer.
        begin = Instant::now();
        self.say_save(arguments).map_err(|error| self.error(what, error))?;
        steps.push(step(SaveStepKind::Save, &mut begin));
        let turns = self.process.freeze(FREEZE).map_err(|error| self.error("freeze", error))?;
        steps.push(step(SaveStepKind::Freeze, &mut begin));
        let since = self.phase.since().unwrap_or_default();
        self.phase = Phase::Frozen { since, turns, hold: None };

        // QEMU says RESUME before a vCPU runs, and into the socket itself: what is not in there by now has
        // not happened, and does not happen before it is let go.
        self.qmp.hear().map_err(|error| self.error(what, error))?;
        if let Some(changed) = self.changed() {
            return Err(self.error(what, changed));
        }
        if let Some(known) = &self.known
            && let Some(happened) =
                known.happened(&mut self.qmp).map_err(|error| self.error("hear", error))?
        {
            return Err(MachineError::changed(&[happened]));
        }
        begin = Instant::now();
        let stream = state::take_saved(exit).map_err(|error| self.error(what, error))?;
        steps.push(step(SaveStepKind::Read, &mut begin));
        // Its disks are inactive now: nothing follows. Before anybody else may open them for good.
        flush::all(&self.unflushed).map_err(|error| self.error("flush the disks of", error))?;
        steps.push(step(SaveStepKind::Flush, &mut begin));
        let private = self.private.save(&blocks, &self.process).map_err(|error| self.error(what, error))?;
        steps.push(step(SaveStepKind::Read, &mut begin));
        Ok(Saved { state: DeviceState { stream, private }, steps })
    }

    /// Has the device state saved. QEMU stands still with its answer, where this host allows that.
    fn say_save(&mut self, arguments: Value) -> Result<(), state::StateError> {
        let saved = self.qmp.execute_last(state::SAVE, arguments, SAVE, &self.process);
        let unknown = |error: QmpError| match error.is_unknown_command() {
            true => state::StateError::Unsupported,
            false => error.into(),
        };
        let frozen = saved.map(drop).map_err(unknown);
        if frozen.is_err() {
            // It is not to be frozen by a refusal.
            self.process
                .thaw()
                .map_err(|cause| state::StateError::System { what: "let QEMU go on", cause })?;
        }
        frozen
    }

    /// See [`ports::Machine::hold`].
    pub(super) fn hold_still(&mut self) -> Result<(), MachineError> {
        let what = "keep still";
        self.phase.allows(Transition::Hold).map_err(|why| self.error(what, why))?;
        let failed = match &mut self.phase {
            Phase::Frozen { turns, hold, .. } => {
                let still = || match self.process.stood_still_since(turns) {
                    Ok(true) => Ok(()),
                    Ok(false) => Err(LET_GO.to_owned()),
                    Err(error) => Err(error.to_string()),
                };
                let held = || Hold::begin(&self.process, FREEZE).map_err(|error| error.to_string());
                still()
                    .and_then(|()| held())
                    // Until it was held it could be let go.
                    .and_then(|held| still().map(|()| *hold = Some(held)))
                    .err()
            }
            _ => None,
        };
        failed.map_or(Ok(()), |why| Err(self.error(what, why)))
    }

    /// See [`ports::Machine::restore`].
    pub(super) fn give_back(&mut self, before: RunState) -> Result<Duration, MachineError> {
        let what = "restore";
        self.thaw().map_err(|error| self.error(what, error))?;
        self.known.iter_mut().for_each(Known::goes_on);
        self.qmp.hear().map_err(|error| self.error(what, error))?;
        let since = self.phase.since().map(|number| self.qmp.events_since(number));
        let taken_over = since.is_some_and(halt::taken_over);
        if before == RunState::Running && !taken_over {
            let ago = self.run_on()?;
            self.phase = Phase::Free;
            return Ok(ago);
        }
        if before == RunState::Suspended
            && self.state().map_err(|error| self.error(what, error))? == RunState::Paused
        {
            // Since QEMU 9 `stop` also stops a guest that sleeps, and `cont` lets it sleep on.
            self.qmp.execute("cont", json!({})).map_err(|error| self.error(what, error))?;
        }
        // Disks that QEMU's own migration has taken elsewhere are not this QEMU's (I1, I6).
        if !matches!(self.phase, Phase::Loaded) {
            self.status_for_good().map_err(|why| self.error(what, why))?;
        }
        // What was stopped already when we came, or by somebody else since, stays so.
        state::activate_disks(&mut self.qmp).map_err(|error| self.error(what, error))?;
        self.phase = Phase::Free;
        self.give_back_exit();
        Ok(Duration::ZERO)
    }

    /// Lets its QEMU go on, if it stands still as a whole.
    fn thaw(&mut self) -> std::io::Result<()> {
        let Phase::Frozen { since, hold, .. } = &mut self.phase else { return Ok(()) };
        let since = *since;
        drop(hold.take());
        self.process.thaw()?;
        self.phase = Phase::Stopped { paused: true, since };
        Ok(())
    }

    /// `cont`. Returns once QEMU says that the guest runs, with how long ago that was.
    fn run_on(&mut self) -> Result<Duration, MachineError> {
        let what = "resume";
        // What we loaded ourselves need not be asked.
        let status = match self.phase {
            Phase::Loaded => {
                self.open_disks().map_err(|why| self.error(what, why))?;
                // Asked again it is another matter: it may run by then.
                self.phase = Phase::Stopped { paused: true, since: self.qmp.heard() };
                RunState::Paused
            }
            _ => self.status_for_good().map_err(|why| self.error(what, why))?,
        };
        match status {
            RunState::Running => return Ok(Duration::ZERO),
            // `cont` would be remembered and would start the guest whenever its state has been loaded.
            RunState::Inmigrate => return Err(self.error(what, "its device state has not been loaded")),
            RunState::Shutdown | RunState::InternalError | RunState::GuestPanicked => {
                let why = format!("it is in state {status}, from which only a reset leads back");
                return Err(self.error(what, why));
            }
            _ => {}
        }
        self.qmp.forget_events("RESUME");
        let asked = Instant::now();
        self.qmp.execute("cont", json!({})).map_err(|error| self.error(what, error))?;
        let event = self.qmp.wait_event(RESUME, |event| event.name == "RESUME");
        let event = event.map_err(|error| self.error(what, error))?;
        if event.is_none() && self.state().map_err(|error| self.error(what, error))? != RunState::Running {
            return Err(self.error(what, format!("QEMU said yes, but does not run it after {RESUME:?}")));
        }
        // QEMU's own stamp: by the time that its word gets here, the guest's vCPUs compete for the processors
        // again. Never longer ago than it was asked for, whatever the host's clock does.
        let at = event.map_or_else(SystemTime::now, |event| event.at);
        let ago = at.elapsed().unwrap_or_default().min(asked.elapsed());
        self.resumed_at = Some(at);
        self.give_back_exit();
        Ok(ago)
    }

    /// Activates the disks of a guest that has not run here yet, where QEMU may open an image by its name for
    /// that, and looks what it has opened. `cont` would do both in one.
    fn open_disks(&mut self) -> Result<(), String> {
        if self.grants.as_ref().is_none_or(|grants| grants.pinned) {
            return Ok(());
        }
        // What is wrong with them `cont` says.
        if let Err(error) = state::activate_disks(&mut self.qmp) {
            tracing::debug!(vm = self.name(), %error, "its disks cannot be activated yet");
        }
        self.opens_no_more().map_err(|reasons| reasons.join("; "))
    }

    /// QEMU needs the place for its device state no more.
    fn give_back_exit(&mut self) {
        if let Some(exit) = self.exit.take()
            && let Err(error) = state::close_exit(&mut self.qmp, exit)
        {
            tracing::debug!(vm = self.name(), %error, "a descriptor stays in QEMU");
        }
    }

    /// What has happened to it since `stop`, by all that its monitor has said so far.
    fn changed(&self) -> Option<&'static str> {
        self.phase.since().and_then(|number| halt::changed(self.qmp.events_since(number)))
    }

    /// Its state, which QEMU's own migration does not change any more: that may take the guest elsewhere at
    /// any moment, and then it must not run here (I1). One that began just when we stopped the guest is
    /// cancelled: it would find the guest standing still, and end between a look at it and `cont`.
    fn status_for_good(&mut self) -> Result<RunState, String> {
        let text = |error: QmpError| error.to_string();
        let begin = Instant::now();
        loop {
            let status = self.status().map_err(text)?;
            // One that waits for its state has no migration of its own but ours.
            if status == "inmigrate" {
                return Ok(RunState::Inmigrate);
            }
            let answer = self.qmp.execute("query-migrate", json!({})).map_err(text)?;
            let own = answer["status"].as_str().unwrap_or("none");
            if status == "running" || (own::is_over(own) && status != "finish-migrate") {
                // Asked before: what ended since has changed it.
                let status = self.status().map_err(text)?;
                let elsewhere = own::elsewhere(&status, own);
                return elsewhere.map_or(Ok(RunState::from_name(&status)), |why| Err(why.to_owned()));
            }
            if begin.elapsed() > RESUME || own.starts_with("postcopy") {
                let why = own::elsewhere(&status, own).unwrap_or("QEMU's own migration does not end");
                return Err(why.to_owned());
            }
            self.qmp.execute("migrate_cancel", json!({})).map_err(text)?;
            std::thread::sleep(AGAIN);
        }
    }
}

/// A step that began then and is over now, where the next one begins.
fn step(kind: SaveStepKind, begin: &mut Instant) -> SaveStep {
    let now = Instant::now();
    let began = std::mem::replace(begin, now);
    SaveStep { kind, began, took: now - began }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_is_what_stop_spent_on_disks() {
        let ms = Duration::from_millis;
        for (over, since, threads, expected) in [
            (767, 766, false, 766),
            (767, 766, true, 766),
            // Before QEMU said that the guest is stopped: 389 ms for a disk's own thread, then a flush.
            (793, 404, true, 788),
            (793, 404, false, 404),
            (3, 1, true, 1),
            // A clock that was set.
            (3, 4000, false, 3),
        ] {
            assert_eq!(drained(ms(over), ms(since), threads), ms(expected), "{over} {since} {threads}");
        }
    }
}
