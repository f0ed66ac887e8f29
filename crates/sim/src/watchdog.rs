//! The process that watches over the source's pause. Mirrors `host/watchdog`.

use crate::{
    link::Side,
    planted::PlantedBug,
    qemu::Was,
    world::{World, say},
};

/// The last word that it was told, from a pipe that the kernel keeps until it is read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Word {
    /// The pause is ours, and this is how the guest was before.
    Pausing(Was),
    /// Only the record decides.
    Fenced,
    /// The guest is back.
    Back,
}

/// The process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Watchdog {
    /// It waits for the pipe's end.
    Watches(Option<Word>),
    /// The pipe has ended in the middle of a pause, before which the guest was like this.
    Acts(Was),
    /// It has ended.
    Ended,
}

impl World {
    /// The source's driver tells it. Says whether it is there at all.
    pub fn tell_watchdog(&mut self, word: Word) -> bool {
        let deaf = self.has(PlantedBug::WatchdogAfterFence) && word == Word::Fenced;
        let Watchdog::Watches(last) = &mut self.watchdog else { return false };
        if !deaf {
            *last = Some(word);
        }
        true
    }

    /// The only one who could tell it more is gone: the driver, or its agent.
    pub fn watchdog_is_alone(&mut self) {
        if let Watchdog::Watches(last) = self.watchdog {
            let regardless = self.has(PlantedBug::WatchdogForgetsRunState);
            self.watchdog = match last {
                Some(Word::Pausing(was)) if !self.has(PlantedBug::WatchdogIdle) => {
                    Watchdog::Acts(if regardless { Was::Ran } else { was })
                }
                _ => Watchdog::Ended,
            };
        }
    }

    /// It lets QEMU go on; and the guest, if it stands still and ran.
    pub fn watchdog_moves(&mut self) {
        let ran = self.watchdog == Watchdog::Acts(Was::Ran);
        self.watchdog = Watchdog::Ended;
        if !self.has(PlantedBug::WatchdogLeavesFrozen) {
            self.thaw(Side::Source);
        }
        let qemu = &self.qemus[0];
        let stands_still = qemu.alive && qemu.run.stands_still() && !qemu.frozen && ran;
        say!(
            self,
            "watchdog: {}",
            if stands_still { "lets the guest run" } else { "there is nothing to do" }
        );
        if stands_still {
            self.guest_runs(Side::Source);
        }
    }
}
