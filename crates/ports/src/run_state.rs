//! What a VM does, in QEMU's own words, and which of it a migration can carry over.

use serde::{Deserialize, Serialize};
use std::fmt;

/// What `query-status` says.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Its vCPUs run.
    #[default]
    Running,
    /// Somebody stopped it.
    Paused,
    /// The guest sleeps (S3).
    Suspended,
    /// The guest has powered off, and QEMU was told to stay (`-no-shutdown`).
    Shutdown,
    /// The guest's kernel has panicked, and QEMU stopped it.
    GuestPanicked,
    /// QEMU stopped it because a disk fails (`werror=stop`).
    IoError,
    /// The guest's watchdog has stopped it (`-action watchdog=pause`).
    Watchdog,
    /// KVM could not go on with it.
    InternalError,
    /// It has never run (`-S`), or was reset while it was stopped.
    Prelaunch,
    /// It waits for a device state.
    Inmigrate,
    /// QEMU's own migration of it is under way.
    FinishMigrate,
    /// QEMU's own migration has taken it elsewhere.
    Postmigrate,
    /// A debugger holds it.
    Debug,
    /// A word that is not known here.
    #[serde(other)]
    Unknown,
}

impl RunState {
    /// QEMU's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Suspended => "suspended",
            Self::Shutdown => "shutdown",
            Self::GuestPanicked => "guest-panicked",
            Self::IoError => "io-error",
            Self::Watchdog => "watchdog",
            Self::InternalError => "internal-error",
            Self::Prelaunch => "prelaunch",
            Self::Inmigrate => "inmigrate",
            Self::FinishMigrate => "finish-migrate",
            Self::Postmigrate => "postmigrate",
            Self::Debug => "debug",
            Self::Unknown => "unknown",
        }
    }

    /// By QEMU's word.
    pub fn from_name(word: &str) -> Self {
        let all = [
            Self::Running,
            Self::Paused,
            Self::Suspended,
            Self::Shutdown,
            Self::GuestPanicked,
            Self::IoError,
            Self::Watchdog,
            Self::InternalError,
            Self::Prelaunch,
            Self::Inmigrate,
            Self::FinishMigrate,
            Self::Postmigrate,
            Self::Debug,
        ];
        all.into_iter().find(|state| state.name() == word).unwrap_or(Self::Unknown)
    }

    /// Why a VM in this state cannot be moved, and what to do about it; none if it can. The device state that
    /// QEMU saves for us says `running` or `paused`, nothing else.
    pub fn hindrance(self) -> Option<String> {
        let (what, mend) = match self {
            Self::Running | Self::Paused => return None,
            Self::Suspended => ("the guest sleeps (S3)", "wake it (system_wakeup) and migrate it then"),
            Self::Shutdown => {
                ("the guest has powered off", "end it, or start it again with system_reset and cont")
            }
            Self::GuestPanicked => ("the guest has panicked", "look at its console, then reset or end it"),
            Self::IoError => ("QEMU stopped the guest because a disk fails", "mend the disk, then `cont`"),
            Self::Watchdog => {
                ("the guest's watchdog has stopped it", "look at the guest, then `cont` or reset it")
            }
            Self::InternalError => ("QEMU cannot go on with it", "reset or end it"),
            Self::Prelaunch => {
                ("it does not run yet, or was reset while it was stopped", "let it run (`cont`)")
            }
            Self::Inmigrate => ("it waits for another migration", "end that one"),
            Self::FinishMigrate => ("QEMU's own migration of it is under way", "wait for it, or cancel it"),
            Self::Postmigrate => ("QEMU's own migration has moved it elsewhere", "migrate it from there"),
            Self::Debug => ("a debugger holds it", "end the debugger"),
            Self::Unknown => ("QEMU says a word that is not known here", "let it run (`cont`)"),
        };
        Some(format!("it is in state {self}: {what}, which cannot be carried over; {mend}"))
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_words_are_read_and_only_two_of_them_move() {
        let moved = ["running", "paused"];
        for word in [
            "running",
            "paused",
            "suspended",
            "shutdown",
            "guest-panicked",
            "io-error",
            "watchdog",
            "internal-error",
            "prelaunch",
            "inmigrate",
            "finish-migrate",
            "postmigrate",
            "debug",
        ] {
            let state = RunState::from_name(word);
            assert_eq!(state.to_string(), word);
            assert_eq!(serde_json::to_string(&state).unwrap(), format!("\"{word}\""));
            assert_eq!(state.hindrance().is_none(), moved.contains(&word), "{word}");
        }
        assert_eq!(RunState::from_name("colo"), RunState::Unknown);
        assert_eq!(serde_json::from_str::<RunState>("\"colo\"").unwrap(), RunState::Unknown);
    }
}
