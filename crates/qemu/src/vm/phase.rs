//! Where a VM is on its way through a pause. What may be done next is checked here, before QEMU is asked for
//! anything.

use sys::{freeze::Turns, hold::Hold};

/// Where it is.
#[derive(Debug, Default)]
pub(super) enum Phase {
    /// Nothing of ours is done to its guest.
    #[default]
    Free,
    /// All is ready for `stop`.
    Ready,
    /// `stop` was answered.
    Stopped {
        /// Whether its guest stands still because of that.
        paused: bool,
        /// The number of the first event after that.
        since: u64,
    },
    /// Its device state is saved, and its QEMU stands still as a whole.
    Frozen {
        /// The number of the first event after `stop`.
        since: u64,
        /// By which to see whether it has stood still all the time.
        turns: Turns,
        /// No signal lets it go.
        hold: Option<Hold>,
    },
    /// A device state was loaded into it, and its guest stands still.
    Loaded,
}

/// What is done to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Transition {
    /// `prepare_stop`.
    Prepare,
    /// `stop`.
    Stop,
    /// `save`.
    Save,
    /// `hold`.
    Hold,
    /// `load`.
    Load,
}

impl Phase {
    /// Whether that may be done now. Giving the guest back is allowed at any time.
    pub(super) fn allows(&self, step: Transition) -> Result<(), &'static str> {
        match (step, self) {
            (Transition::Prepare, Self::Free | Self::Ready)
            | (Transition::Stop, Self::Ready)
            | (Transition::Save, Self::Stopped { paused: true, .. })
            | (Transition::Hold, Self::Frozen { .. })
            | (Transition::Load, Self::Free) => Ok(()),
            (
                Transition::Save | Transition::Hold,
                Self::Free | Self::Ready | Self::Stopped { paused: false, .. },
            ) => Err("the guest runs; stop it first"),
            (Transition::Hold, Self::Stopped { .. }) => Err("its device state is not saved"),
            (Transition::Save, Self::Frozen { .. }) => Err("its device state is saved already"),
            (Transition::Load, Self::Ready | Self::Stopped { .. } | Self::Frozen { .. }) => {
                Err("it has a guest of its own")
            }
            (Transition::Stop, Self::Free) => Err("it is not ready for that"),
            (_, Self::Loaded) => Err("a device state is loaded, and its guest has not gone on"),
            (Transition::Prepare | Transition::Stop, Self::Stopped { .. } | Self::Frozen { .. }) => {
                Err("it is stopped already")
            }
        }
    }

    /// The number of the first event after `stop`, if it was stopped by us.
    pub(super) fn since(&self) -> Option<u64> {
        match self {
            Self::Stopped { since, .. } | Self::Frozen { since, .. } => Some(*since),
            _ => None,
        }
    }

    pub(super) fn is_frozen(&self) -> bool {
        matches!(self, Self::Frozen { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_has_its_time() {
        let at = |paused| Phase::Stopped { paused, since: 7 };
        let table = [
            (Phase::Free, vec![Transition::Prepare, Transition::Load], None),
            (Phase::Ready, vec![Transition::Prepare, Transition::Stop], None),
            (at(false), vec![], Some(7)),
            (at(true), vec![Transition::Save], Some(7)),
            (Phase::Loaded, vec![], None),
        ];
        for (phase, allowed, since) in table {
            for step in
                [Transition::Prepare, Transition::Stop, Transition::Save, Transition::Hold, Transition::Load]
            {
                assert_eq!(phase.allows(step).is_ok(), allowed.contains(&step), "{step:?} in {phase:?}");
            }
            assert_eq!(phase.since(), since);
        }
    }
}
