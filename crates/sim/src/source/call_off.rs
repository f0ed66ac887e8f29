//! The thread that tells the target that a migration has ended whose link was lost. Mirrors
//! `SourceDriver::call_off` in `engine/source/link.rs`.

use crate::{
    link::{Over, Purpose, Side, Word},
    printed::Printed,
    world::{Timer, World, say},
};
use proto::control::{Failed, Kind};

/// How far it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Call {
    /// It is to be dialled, now or a little later.
    Dial,
    /// Whether that is welcome is not known yet.
    Dialled(u16),
    /// It was said, and the target hangs up once it has understood.
    Said(u16),
}

impl Call {
    /// The connection.
    pub fn conn(self) -> Option<u16> {
        match self {
            Self::Dial => None,
            Self::Dialled(id) | Self::Said(id) => Some(id),
        }
    }
}

impl World {
    /// It begins.
    pub(super) fn begin_call(&mut self) {
        self.source.call = Some(Call::Dial);
        self.set(Timer::CallEnd);
    }

    /// Whether it can go on.
    pub fn caller_can(&self) -> bool {
        match self.source.call.filter(|_| self.up[0]) {
            None | Some(Call::Said(_)) => false,
            Some(Call::Dial) => !self.is_set(Timer::CallAgain),
            Some(Call::Dialled(id)) => self.conns.iter().any(|c| c.id == id && c.welcome == Some(true)),
        }
    }

    /// It dials, or says what it has to say.
    pub fn caller_moves(&mut self) {
        match self.source.call {
            Some(Call::Dial) => match self.dial(Purpose::Resume) {
                Some(id) => self.source.call = Some(Call::Dialled(id)),
                None => self.set(Timer::CallAgain),
            },
            Some(Call::Dialled(id)) => {
                say!(self, "source: tells the target that the migration has ended");
                let failed = Failed { what: "the migration".into(), why: "ended".into(), cancelled: false };
                self.say_on(id, Side::Source, Word::Say(Printed(Kind::Failed(failed))));
                self.source.call = Some(Call::Said(id));
            }
            _ => {}
        }
    }

    /// Its connection is over: the target has heard it, or knows of no migration, or is to be called again.
    pub fn caller_loses(&mut self, over: Over) {
        let heard = match self.source.call {
            Some(Call::Said(_)) => over == Over::Closed,
            Some(Call::Dialled(id)) => self.conns.iter().any(|c| c.id == id && c.welcome == Some(false)),
            _ => return,
        };
        if heard {
            self.source.call = None;
            self.call_off(Timer::CallEnd);
        } else {
            self.source.call = Some(Call::Dial);
            self.set(Timer::CallAgain);
        }
    }

    /// It was tried for long enough: the target gives up by itself.
    pub fn call_ends(&mut self) {
        self.call_off(Timer::CallAgain);
        let conn = self.source.call.take().and_then(Call::conn);
        conn.into_iter().for_each(|id| self.shut(id, Side::Source));
    }
}
