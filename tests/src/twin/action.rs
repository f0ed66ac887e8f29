//! What an operator, a manager, a backup tool and the guest itself do to a VM, each in words that can be read
//! back.

use crate::{Doing, Error, Result, storm::Moment};
use std::{fmt, str::FromStr};

/// One action.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Done to both VMs.
    Both(Deed),
    /// Only one of them is moved.
    Move(Mode),
    /// … and both do something meanwhile.
    MoveWhile(Mode, Moment, Deed),
}

/// How it is moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// The rest is sent while the guest stands still.
    PreCopy,
    /// A round, and the rest while it runs on the target.
    Hybrid,
    /// Everything while it runs on the target.
    PostCopy,
}

/// What both VMs do, or somebody does with both.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Deed {
    /// `stop`
    Pause,
    /// `cont`
    Resume,
    /// The guest fills another page.
    Write,
    /// The guest adds up its memory.
    Sum,
    /// `system_reset`
    Reset,
    /// The guest reboots.
    Reboot,
    /// The guest goes to sleep (S3).
    Sleep,
    /// `system_wakeup`
    Wake,
    /// The guest panics.
    Panic,
    /// The guest switches itself off; QEMU stays.
    PowerOff,
    /// `device_add` of a tablet on USB
    Plug,
    /// `device_del` of it
    Unplug,
    /// `eject`
    Eject,
    /// `blockdev-change-medium` to another one
    Insert,
    /// `block_set_io_throttle`
    Throttle,
    /// … and no limit again.
    Unthrottle,
    /// `set_link` off
    LinkDown,
    /// `set_link` on
    LinkUp,
    /// `blockdev-snapshot-sync`: the disk gets an overlay.
    Snapshot,
    /// `block-commit` of all overlays into the image
    Commit,
    /// `block_resize`, by one MiB
    Grow,
    /// `drive-mirror` to another image, which goes on for ever
    Mirror,
    /// `drive-backup` of what is overwritten from now on, which goes on for ever
    Backup,
    /// The end of either.
    CancelJobs,
    /// `blockdev-add` of a node that nobody uses
    AddNode,
    /// `blockdev-del` of it
    DropNode,
    /// `object-add` of a source of random numbers
    AddObject,
    /// `object-del` of it
    DropObject,
    /// `chardev-add` of one that nobody uses
    AddChardev,
    /// `chardev-remove` of it
    DropChardev,
    /// `netdev_add` of a network that no card is on
    AddNetwork,
    /// `netdev_del` of it
    DropNetwork,
    /// Memory is plugged in.
    PlugMemory,
    /// A vCPU is.
    PlugCpu,
    /// `system_powerdown`, of which this guest makes nothing.
    PowerButton,
    /// QEMU's own `migrate`, into nothing
    Migrate,
    /// `quit`
    Quit,
}

const DEEDS: [(Deed, &str); 37] = [
    (Deed::Pause, "pause"),
    (Deed::Resume, "resume"),
    (Deed::Write, "write"),
    (Deed::Sum, "sum"),
    (Deed::Reset, "reset"),
    (Deed::Reboot, "reboot"),
    (Deed::Sleep, "sleep"),
    (Deed::Wake, "wake"),
    (Deed::Panic, "panic"),
    (Deed::PowerOff, "power-off"),
    (Deed::Plug, "plug"),
    (Deed::Unplug, "unplug"),
    (Deed::Eject, "eject"),
    (Deed::Insert, "insert"),
    (Deed::Throttle, "throttle"),
    (Deed::Unthrottle, "unthrottle"),
    (Deed::LinkDown, "link-down"),
    (Deed::LinkUp, "link-up"),
    (Deed::Snapshot, "snapshot"),
    (Deed::Commit, "commit"),
    (Deed::Grow, "grow"),
    (Deed::Mirror, "mirror"),
    (Deed::Backup, "backup"),
    (Deed::CancelJobs, "cancel-jobs"),
    (Deed::AddNode, "add-node"),
    (Deed::DropNode, "drop-node"),
    (Deed::AddObject, "add-object"),
    (Deed::DropObject, "drop-object"),
    (Deed::AddChardev, "add-chardev"),
    (Deed::DropChardev, "drop-chardev"),
    (Deed::AddNetwork, "add-network"),
    (Deed::DropNetwork, "drop-network"),
    (Deed::PlugMemory, "plug-memory"),
    (Deed::PlugCpu, "plug-cpu"),
    (Deed::PowerButton, "power-button"),
    (Deed::Migrate, "migrate"),
    (Deed::Quit, "quit"),
];

const MODES: [(Mode, &str); 3] =
    [(Mode::PreCopy, "pre-copy"), (Mode::Hybrid, "hybrid"), (Mode::PostCopy, "post-copy")];

impl Mode {
    /// As the command line has it.
    pub fn word(self) -> &'static str {
        MODES.iter().find(|(mode, _)| *mode == self).map_or("?", |(_, word)| word)
    }

    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        MODES.into_iter().map(|(mode, _)| mode)
    }
}

impl Deed {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        DEEDS.into_iter().map(|(deed, _)| deed)
    }

    /// What must have been done for it to make a difference.
    pub fn needs(self) -> Option<Self> {
        match self {
            Self::Resume => Some(Self::Pause),
            Self::Wake => Some(Self::Sleep),
            Self::Unplug => Some(Self::Plug),
            Self::Unthrottle => Some(Self::Throttle),
            Self::LinkUp => Some(Self::LinkDown),
            Self::Commit => Some(Self::Snapshot),
            Self::CancelJobs => Some(Self::Mirror),
            Self::DropNode => Some(Self::AddNode),
            Self::DropObject => Some(Self::AddObject),
            Self::DropChardev => Some(Self::AddChardev),
            _ => None,
        }
    }

    /// Its word.
    pub fn word(self) -> &'static str {
        DEEDS.iter().find(|(deed, _)| *deed == self).map_or("?", |(_, word)| word)
    }
}

/// A sequence in words: `write, move hybrid, move pre-copy switchover+4 reset`.
pub fn in_words(sequence: &[Action]) -> String {
    sequence.iter().map(Action::to_string).collect::<Vec<_>>().join(", ")
}

/// A sequence from its words.
pub fn from_words(text: &str) -> Result<Vec<Action>> {
    text.split(',').map(|word| word.trim().parse()).collect()
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Both(deed) => f.write_str(deed.word()),
            Self::Move(mode) => write!(f, "move {}", mode.word()),
            Self::MoveWhile(mode, at, deed) => write!(f, "move {} {at} {}", mode.word(), deed.word()),
        }
    }
}

impl FromStr for Action {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let words: Vec<_> = text.split_whitespace().collect();
        let what = || format!("understand the action {text:?}");
        let deed = |word: &str| DEEDS.iter().find(|(_, known)| *known == word).map(|(deed, _)| *deed);
        let mode = |word: &str| MODES.iter().find(|(_, known)| *known == word).map(|(mode, _)| *mode);
        match words[..] {
            [one] => deed(one).map(Self::Both).doing(what()),
            ["move", how] => mode(how).map(Self::Move).doing(what()),
            ["move", how, at, then] => {
                let moment = Moment::all().find(|moment| moment.to_string() == at).doing(what())?;
                Ok(Self::MoveWhile(mode(how).doing(what())?, moment, deed(then).doing(what())?))
            }
            _ => Err(Error::new(what(), "it has another number of words")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_is_read_as_it_is_written() {
        let mut all: Vec<Action> = Deed::all().map(Action::Both).collect();
        all.extend(Mode::all().map(Action::Move));
        all.extend(
            Deed::all().zip(Moment::all()).map(|(deed, at)| Action::MoveWhile(Mode::Hybrid, at, deed)),
        );
        assert_eq!(from_words(&in_words(&all)).unwrap(), all);
        assert!(from_words("write, dance").is_err());
    }
}
