//! Whether an agent is frozen, and must end so that its guest goes on. To end one that is only slow costs all
//! its other migrations, so this needs evidence.

use std::{fs, io, time::Duration};
use sys::{
    cgroup,
    proc::{self, Stat},
};

/// How often the agent is to be heard, and looked at.
pub(super) const LOOK: Duration = Duration::from_millis(50);

/// An agent that is seen to be frozen is ended after so long: a stop that is undone at once, as a look of a
/// debugger's may be, costs nothing.
pub(super) const FROZEN: Duration = Duration::from_millis(200);

/// One of which only its silence is known: a thread that waits for another one, or for memory that is swapped
/// out, comes back in less.
pub(super) const STUCK: Duration = Duration::from_secs(3);

/// The threads that show that the agent gets on: the heart, and those that answer the guest's writers.
const TELLING: [&str; 2] = ["heart", "throttle"];

/// For how long nothing was heard of the agent.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Silence(Duration);

impl Silence {
    /// After one more look, which came so long after the one before. Whoever looks late may only have been
    /// starved as the agent was: of such a time no more counts than two looks.
    pub(super) fn after(self, heard: bool, passed: Duration) -> Self {
        if heard { Self::default() } else { Self(self.0 + passed.min(LOOK * 2)) }
    }

    /// Whether it is worth a look at the agent.
    pub(super) fn is_odd(self) -> bool {
        self.0 >= FROZEN
    }
}

/// What one look at the agent's threads shows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum AgentState {
    /// It cannot go on by itself: why.
    Frozen(String),
    /// It wants to go on and is not given a processor.
    Starved,
    /// Neither.
    Unclear,
}

/// Why the agent must end, if it must.
pub(super) fn verdict(silence: Silence, seen: AgentState) -> Option<String> {
    match seen {
        AgentState::Frozen(why) if silence.0 >= FROZEN => Some(why),
        AgentState::Unclear if silence.0 >= STUCK => {
            Some(format!("nothing is heard of it for {} ms", silence.0.as_millis()))
        }
        _ => None,
    }
}

/// Looks at a process. One that cannot be looked at has ended.
pub(super) fn look(pid: i32) -> io::Result<AgentState> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    if proc::value(&status, "CoreDumping") == Some("1") {
        return Ok(AgentState::Frozen("it dumps its core".to_owned()));
    }
    let mut starved = false;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?;
        // A thread may end meanwhile.
        let Ok(Stat { name, state, .. }) =
            fs::read_to_string(task.path().join("stat")).and_then(|stat| Stat::parse(&stat))
        else {
            continue;
        };
        let name = name.as_str();
        match state {
            'T' => return Ok(AgentState::Frozen(format!("its thread {name} is stopped"))),
            't' => return Ok(AgentState::Frozen(format!("its thread {name} is stopped by a debugger"))),
            'R' => starved |= TELLING.contains(&name),
            _ => {}
        }
        let thread = format!("{pid}/task/{}", task.file_name().display());
        if TELLING.contains(&name)
            && let Some(why) = cgroup::frozen(&thread).unwrap_or(None)
        {
            return Ok(AgentState::Frozen(why));
        }
    }
    Ok(if starved { AgentState::Starved } else { AgentState::Unclear })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use sys::process::PidFd;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn frozen() -> AgentState {
        AgentState::Frozen("why".to_owned())
    }

    #[test]
    fn only_evidence_ends_an_agent_soon() {
        let table = [
            (199, frozen(), false),
            (200, frozen(), true),
            (2999, AgentState::Unclear, false),
            (3000, AgentState::Unclear, true),
            (60_000, AgentState::Starved, false),
        ];
        for (silence, seen, ends) in table {
            assert_eq!(verdict(Silence(ms(silence)), seen.clone()).is_some(), ends, "{silence} ms, {seen:?}");
        }
    }

    #[test]
    fn a_watchdog_that_was_starved_itself_does_not_count_that_time() {
        let silence = Silence::default().after(false, ms(50)).after(false, ms(5000));
        assert_eq!(silence, Silence(ms(150)));
        assert!(!silence.is_odd() && silence.after(false, ms(60)).is_odd());
        assert_eq!(silence.after(true, ms(50)), Silence::default());
    }

    #[test]
    fn a_stopped_process_is_frozen_and_a_sleeping_one_is_not() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id().cast_signed();
        assert_eq!(look(pid).unwrap(), AgentState::Unclear);
        let stopped = Command::new("kill").args(["-STOP", &pid.to_string()]).status().unwrap();
        assert!(stopped.success());
        // The signal is on its way.
        let end = std::time::Instant::now() + Duration::from_secs(10);
        while look(pid).unwrap() == AgentState::Unclear && std::time::Instant::now() < end {
            std::thread::yield_now();
        }
        assert_eq!(look(pid).unwrap(), AgentState::Frozen("its thread sleep is stopped".to_owned()));
        PidFd::open(pid).unwrap().kill().unwrap();
        child.wait().unwrap();
        assert!(look(pid).is_err());
    }
}
