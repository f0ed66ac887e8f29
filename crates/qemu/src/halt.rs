//! What became of a guest around our `stop`, by QEMU's events. Others use the same QEMU through monitors of
//! their own, and the guest acts, too: `stop` succeeds from every state, and does nothing to a guest that
//! does not run.

use crate::qmp::Event;
use ports::RunState;
use std::time::SystemTime;

/// What `stop` found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Found {
    /// What the guest did just before.
    pub(crate) state: RunState,
    /// When it was stopped by us, if it was, by QEMU's clock.
    pub(crate) stopped_at: Option<SystemTime>,
    /// The number of the first event after that.
    pub(crate) since: Option<u64>,
}

/// `before`: what `query-status` said; `events`: what came between that answer and that of `stop`; `after`:
/// what `query-status` said then. The last STOP is ours. If somebody's came in the instant before it and ours
/// found nothing to do, then that is taken for ours: both came at the same time.
///
/// QEMU may do what the guest has asked for between it and its answer: a guest that has just reset itself is
/// in state `prelaunch` by then.
pub(crate) fn found<'e>(
    before: RunState,
    events: impl IntoIterator<Item = &'e Event>,
    after: RunState,
) -> Found {
    let (mut state, mut found) = (before, None);
    for event in events {
        match event.name.as_str() {
            "STOP" => {
                found = Some(Found { state, stopped_at: Some(event.at), since: Some(event.number + 1) });
                state = RunState::Paused;
            }
            "RESUME" | "WAKEUP" => state = RunState::Running,
            "SUSPEND" => state = RunState::Suspended,
            _ => {}
        }
    }
    let nothing = |state| Found { state, stopped_at: None, since: None };
    match (found, after) {
        (Some(found), RunState::Paused | RunState::Running | RunState::Prelaunch) => found,
        (None, RunState::Paused | RunState::Running) => nothing(state),
        // It did not run, so that nothing was done to it.
        (_, after) => nothing(after),
    }
}

/// What somebody, or the guest, has done to it since it was stopped: the saved state is not that of the guest
/// any more. In the order in which it happened, the first.
pub(crate) fn changed<'e>(events: impl IntoIterator<Item = &'e Event>) -> Option<&'static str> {
    events.into_iter().find_map(|event| {
        Some(match event.name.as_str() {
            "RESUME" => "somebody let the guest run on through another monitor (cont)",
            "RESET" => "the guest was reset",
            "SHUTDOWN" => "the guest has powered off",
            "POWERDOWN" => "somebody asked the guest to power off (system_powerdown)",
            "SUSPEND" | "SUSPEND_DISK" => "the guest went to sleep",
            "WAKEUP" => "somebody woke the guest (system_wakeup)",
            "GUEST_PANICKED" if !goes_on(event) => "the guest has panicked",
            "WATCHDOG" if !goes_on(event) => "the guest's watchdog has expired",
            _ => return None,
        })
    })
}

/// Whether it is in the state in which somebody else, or the guest itself, wants it to be since we stopped
/// it: then it is left as it is.
pub(crate) fn taken_over<'e>(events: impl IntoIterator<Item = &'e Event>) -> bool {
    events.into_iter().any(|event| match event.name.as_str() {
        "RESUME" | "SHUTDOWN" | "SUSPEND" | "SUSPEND_DISK" => true,
        "GUEST_PANICKED" | "WATCHDOG" => !goes_on(event),
        _ => false,
    })
}

/// QEMU was told to do nothing about it.
fn goes_on(event: &Event) -> bool {
    matches!(event.data["action"].as_str(), Some("run" | "none" | "debug" | "inject-nmi"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use RunState::{GuestPanicked, Paused, Prelaunch, Running, Shutdown, Suspended};
    use serde_json::json;
    use std::time::Duration;

    fn at(ms: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(ms)
    }

    fn events(names: &[&str]) -> Vec<Event> {
        let event = |(number, name): (usize, &&str)| Event {
            name: (*name).to_owned(),
            data: json!({ "action": "pause" }),
            at: at(number as u64),
            number: number as u64,
        };
        names.iter().enumerate().map(event).collect()
    }

    #[test]
    fn the_state_before_our_stop_is_told_by_events() {
        for (before, said, after, state, stopped) in [
            (Running, &["STOP"][..], Paused, Running, Some(0)),
            (Paused, &[], Paused, Paused, None),
            (Paused, &["RTC_CHANGE"], Paused, Paused, None),
            // Others were faster.
            (Running, &["STOP", "RESUME", "STOP"], Paused, Running, Some(2)),
            (Paused, &["RESUME", "STOP"], Paused, Running, Some(1)),
            // The guest was faster; QEMU's `stop` does nothing to it.
            (Running, &["SHUTDOWN", "STOP"], Shutdown, Shutdown, None),
            (Running, &["SUSPEND"], Suspended, Suspended, None),
            (Running, &["GUEST_PANICKED", "STOP"], GuestPanicked, GuestPanicked, None),
            // QEMU 9 and later stop a sleeping guest, too.
            (Running, &["SUSPEND", "STOP"], Paused, Suspended, Some(1)),
            (Suspended, &["WAKEUP", "STOP"], Paused, Running, Some(1)),
            // A guest that had asked for its reset before it was stopped; others who reset a paused one.
            (Running, &["STOP", "RESET"], Prelaunch, Running, Some(0)),
            (Paused, &["RESET"], Prelaunch, Prelaunch, None),
        ] {
            let expected = Found { state, stopped_at: stopped.map(at), since: stopped.map(|n| n + 1) };
            assert_eq!(found(before, &events(said), after), expected, "{before} {said:?}");
        }
    }

    #[test]
    fn what_changes_a_stopped_guest_is_named() {
        for (name, changes, leave) in [
            ("RESUME", true, true),
            ("RESET", true, false),
            ("SHUTDOWN", true, true),
            ("POWERDOWN", true, false),
            ("SUSPEND", true, true),
            ("WAKEUP", true, false),
            ("GUEST_PANICKED", true, true),
            ("STOP", false, false),
            ("RTC_CHANGE", false, false),
            ("MIGRATION", false, false),
        ] {
            let said = events(&["STOP", name]);
            assert_eq!((changed(&said).is_some(), taken_over(&said)), (changes, leave), "{name}");
        }
        let mut ignored = events(&["GUEST_PANICKED"]);
        ignored[0].data = json!({ "action": "run" });
        assert_eq!((changed(&ignored), taken_over(&ignored)), (None, false), "QEMU was told to go on");
    }
}
