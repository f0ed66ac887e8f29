//! The outside actor: people, managers and backup tools with a monitor of their own on the same QEMU, and the
//! guest itself. They act whenever they like, and know of no migration.
//!
//! What the guest would be without the migration is in `Ghost::wanted`: the check of I9.

use crate::{
    link::Side,
    qemu::{Run, Theirs},
    source::{Departure, Heard},
    watchdog::Watchdog,
    world::{Conditions, World, say},
};
use std::{fmt, str::FromStr};

/// What they do.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Meddle {
    /// `stop`.
    Stop,
    /// `cont`.
    Cont,
    /// `device_add` and `device_del` in turn, and whatever else changes a VM without an event.
    Plug,
    /// The same of a medium, of which an event tells.
    Eject,
    /// `system_reset`, or the guest's own reboot.
    Reset,
    /// QEMU's own `migrate`, to somewhere else.
    Migrate,
    /// … which has come to its end: the VM is there.
    Finish,
    /// … or has failed.
    Fail,
    /// `quit`.
    Quit,
    /// `kill -CONT`: a frozen QEMU goes on, unless it is held.
    Signal,
    /// The guest switches itself off; QEMU stays (`-no-shutdown`).
    PowerOff,
    /// The guest sleeps (S3).
    Sleep,
    /// … and is woken.
    Wake,
    /// The guest panics.
    Panic,
}

/// Those of them that also happen on the target, once the VM is there.
const LATER: [Meddle; 4] = [Meddle::Stop, Meddle::Cont, Meddle::Reset, Meddle::PowerOff];

const WORDS: [(Meddle, &str); 14] = [
    (Meddle::Stop, "stop"),
    (Meddle::Cont, "cont"),
    (Meddle::Plug, "plug"),
    (Meddle::Eject, "eject"),
    (Meddle::Reset, "reset"),
    (Meddle::Migrate, "migrate"),
    (Meddle::Finish, "migrate-ends"),
    (Meddle::Fail, "migrate-fails"),
    (Meddle::Quit, "quit"),
    (Meddle::Signal, "signal"),
    (Meddle::PowerOff, "power-off"),
    (Meddle::Sleep, "sleep-s3"),
    (Meddle::Wake, "wake"),
    (Meddle::Panic, "panic"),
];

const THERE: &str = "-target";

/// One act, on one host's QEMU.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Outside {
    /// Whose.
    pub side: Side,
    /// What.
    pub what: Meddle,
}

impl Outside {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        let here = WORDS.iter().map(|(what, _)| Self { side: Side::Source, what: *what });
        here.chain(LATER.map(|what| Self { side: Side::Target, what }))
    }
}

impl fmt::Display for Outside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(WORDS.iter().find(|(what, _)| *what == self.what).map_or("?", |(_, word)| word))?;
        if self.side == Side::Target { f.write_str(THERE) } else { Ok(()) }
    }
}

impl FromStr for Outside {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = Self::all().find(|outside| outside.to_string() == text);
        all.ok_or_else(|| format!("{text} is neither a fault nor what others do"))
    }
}

/// What QEMU's events tell, as a set.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct News(u8);

impl News {
    /// `RESUME`.
    pub const RESUMED: Self = Self(1);
    /// `RESET`.
    pub const RESET: Self = Self(2);
    /// A device or a medium is another one.
    pub const CHANGED: Self = Self(4);
    /// `MIGRATION`.
    pub const MIGRATES: Self = Self(8);
    /// The guest is off, asleep, or dead; or QEMU is.
    pub const LEFT: Self = Self(16);

    /// Whether any of these is among them.
    pub fn any_of(self, others: &[Self]) -> bool {
        others.iter().any(|other| self.0 & other.0 != 0)
    }

    /// Whether a migration cannot go on after it. While the guest runs, it may be paused, let run and reset:
    /// that is carried over.
    pub fn ends(self, in_pause: bool) -> bool {
        self.any_of(&[Self::CHANGED, Self::MIGRATES, Self::LEFT])
            || (in_pause && self.any_of(&[Self::RESUMED, Self::RESET]))
    }
}

impl World {
    /// Whether it would change anything.
    pub fn can_meddle(&self, outside: Outside) -> bool {
        let qemu = &self.qemus[outside.side.at()];
        // Nobody holds it for an agent that is dead, and a process that a signal lets go then is as it was
        // for anybody to use.
        if outside.what == Meddle::Signal {
            return qemu.alive && qemu.frozen && self.up[outside.side.at()];
        }
        if !qemu.alive || !qemu.started || qemu.queued.is_some() || qemu.run == Run::Postmigrate {
            return false;
        }
        let by_guest = matches!(outside.what, Meddle::PowerOff | Meddle::Sleep | Meddle::Panic);
        match outside.what {
            _ if by_guest => qemu.runs() && !qemu.frozen,
            Meddle::Stop => qemu.runs() || qemu.run == Run::Paused,
            Meddle::Cont => qemu.run.stands_still(),
            Meddle::Wake => qemu.run == Run::Suspended,
            Meddle::Migrate => {
                qemu.theirs == Theirs::None && (qemu.runs() || qemu.run == Run::Paused) && !qemu.frozen
            }
            Meddle::Finish | Meddle::Fail => qemu.theirs == Theirs::Active && !qemu.frozen,
            _ => true,
        }
    }

    /// Somebody else acts on a QEMU.
    pub fn meddle(&mut self, outside: Outside) {
        if !self.can_meddle(outside) {
            return;
        }
        say!(self, "!!! others: {outside}");
        self.idle = 0;
        self.faults.0 += 1;
        if outside.what != Meddle::Stop {
            // A guest that somebody pauses migrates all the same.
            self.ghost.conditions = Conditions::Storm;
        }
        let qemu = &mut self.qemus[outside.side.at()];
        if outside.what == Meddle::Signal {
            if !qemu.held {
                self.thaw(outside.side);
                self.qemus[outside.side.at()].woken = true;
            }
        } else if qemu.frozen {
            qemu.queued = Some(outside.what);
        } else {
            self.takes_effect(outside.side, outside.what);
        }
        self.check();
    }

    /// A QEMU that was stopped as a process goes on, with what it was asked for meanwhile.
    pub fn thaw(&mut self, side: Side) {
        let qemu = &mut self.qemus[side.at()];
        (qemu.frozen, qemu.held, qemu.woken) = (false, false, false);
        if let Some(what) = qemu.queued.take().filter(|_| qemu.alive) {
            say!(self, "others: {what:?} takes effect");
            self.takes_effect(side, what);
        }
    }

    fn takes_effect(&mut self, side: Side, what: Meddle) {
        // A command of ours makes it stand still, which is not what anybody else wants of it.
        let journal = *self.source.journal.read();
        let in_pause = side == Side::Source
            && (self.source.work.as_deref().is_some_and(|work| work.stopped || work.is_noting())
                || matches!(self.watchdog, Watchdog::Acts(_))
                || !matches!(journal, Departure::None | Departure::Settled));
        let qemu = &mut self.qemus[side.at()];
        let was = qemu.run;
        let news = match what {
            Meddle::Stop => {
                // Of a guest that stands still already, QEMU does not say who else has wanted that.
                let unseen = in_pause && (was.stands_still() || self.nobody_watches());
                let qemu = &mut self.qemus[side.at()];
                if qemu.runs() {
                    qemu.run = Run::Paused;
                }
                if unseen && self.ghost.wanted == Some(Run::Running) {
                    self.ghost.wanted = None;
                } else if qemu.run != was {
                    self.ghost.wanted = Some(Run::Paused);
                    self.ghost.unrecorded |= in_pause;
                }
                None
            }
            Meddle::Cont => {
                if was.stands_still() {
                    self.guest_runs(side);
                    self.ghost.wanted = Some(Run::Running);
                }
                Some(News::RESUMED)
            }
            Meddle::Plug | Meddle::Eject => {
                let bit = if what == Meddle::Plug { 1 } else { 2 };
                qemu.config ^= bit;
                self.ghost.config ^= bit;
                (what == Meddle::Eject).then_some(News::CHANGED)
            }
            Meddle::Reset => {
                // Once the target may run the guest, what is left here is reset and not that.
                let left = self.at_stop.as_mut().filter(|_| side == Side::Source && self.ghost.spoken);
                let is_left = left.is_some();
                let guest = left.map_or(&mut self.guest, |stop| stop);
                guest.done += 1;
                qemu.state = Some(guest.done);
                if !qemu.runs() {
                    qemu.run = Run::Prelaunch;
                }
                if let Some(stop) = self.at_stop.as_mut().filter(|_| !is_left && !self.ghost.committed) {
                    **stop = self.guest.clone();
                }
                if !was.stands_still() && !qemu.runs() {
                    self.ghost.wanted = Some(Run::Prelaunch);
                }
                Some(News::RESET)
            }
            Meddle::Migrate => {
                qemu.theirs = Theirs::Active;
                Some(News::MIGRATES)
            }
            Meddle::Finish if qemu.theirs == Theirs::Active => {
                qemu.theirs = Theirs::Finished;
                qemu.run = Run::Postmigrate;
                qemu.has_disk = false;
                self.ghost.elsewhere = true;
                Some(News::MIGRATES)
            }
            Meddle::Finish => None,
            Meddle::Fail => {
                qemu.theirs = Theirs::None;
                Some(News::MIGRATES)
            }
            Meddle::Quit => {
                self.kill(side);
                self.ghost.quit = true;
                Some(News::LEFT)
            }
            Meddle::PowerOff | Meddle::Sleep | Meddle::Panic => {
                qemu.run = match what {
                    Meddle::PowerOff => Run::Shutdown,
                    Meddle::Sleep => Run::Suspended,
                    _ => Run::Panicked,
                };
                self.ghost.wanted = Some(qemu.run);
                Some(News::LEFT)
            }
            Meddle::Wake if was == Run::Suspended => {
                self.guest_runs(side);
                self.ghost.wanted = Some(Run::Running);
                Some(News::RESUMED)
            }
            Meddle::Wake | Meddle::Signal => None,
        };
        if let (Some(news), Side::Source) = (news, side) {
            self.tell_source(news);
        }
    }

    /// Whether the source's guest may have been let run by a watchdog or a recovery that others then cannot
    /// tell from the pause.
    fn nobody_watches(&self) -> bool {
        self.source.work.as_deref().is_none_or(|work| work.machine.is_none())
    }

    /// An event of the source's QEMU.
    fn tell_source(&mut self, news: News) {
        let qemu = &mut self.qemus[0];
        qemu.told = News(qemu.told.0 | news.0);
        if let Some(work) =
            self.source.work.as_deref_mut().filter(|work| work.machine.is_some() && self.up[0])
        {
            work.heard.push_back(Heard::Qemu(news));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_do_is_read_as_it_is_written() {
        for outside in Outside::all() {
            assert_eq!(outside.to_string().parse(), Ok(outside));
        }
        assert!("hail".parse::<Outside>().is_err());
    }
}
