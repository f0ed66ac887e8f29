//! The target's door and its connections. Mirrors `engine/accept.rs` and `engine/target/link.rs`.

use super::{Heard, Session, WritePolicy};
use crate::{
    driver::Driver,
    link::{Over, Purpose, Side, Word},
    planted::PlantedBug,
    printed::Printed,
    source::bitmap,
    world::{Timer, World, say},
};
use proto::{
    Target,
    control::{self, Kind},
};

impl World {
    /// A connection's preamble (`Acceptor::serve`).
    pub fn accept(&mut self, id: u16, purpose: Purpose) {
        let session = self.target.work.as_ref().is_some_and(|work| work.machine.is_some());
        let arrived = self.target.store.durable().arrived;
        let welcome = match purpose {
            Purpose::Control if !session && !self.target.store.read().seen => {
                let mut work = Session::new(Some(Target::new(control::Hello::default())));
                work.control = Some(id);
                self.target.work = Some(Box::new(work));
                true
            }
            Purpose::Control => false,
            Purpose::Record => true,
            Purpose::Data(_) | Purpose::Faults | Purpose::Resume if session => {
                // Welcome only when it is in use.
                if let Some(work) = self.target.work.as_deref_mut() {
                    work.heard.push_back(Heard::Attach(id));
                }
                return;
            }
            Purpose::Resume => arrived,
            Purpose::Data(_) | Purpose::Faults => false,
        };
        say!(self, "target: {purpose:?} is {}", if welcome { "welcome" } else { "refused" });
        let Some(conn) = self.conn(id) else { return };
        conn.welcome = Some(welcome);
        if purpose == Purpose::Resume && welcome {
            conn.say(Side::Target, Word::Say(Printed(Kind::Settled(control::Settled::default()))));
        }
        if !welcome {
            conn.shut(Side::Target);
        }
    }

    /// A further connection of the migration (`attach`).
    pub(super) fn attach(&mut self, id: u16) {
        let Some(purpose) = self.conn(id).map(|conn| conn.purpose) else { return };
        if purpose == Purpose::Resume {
            self.target_hangs_up();
            self.target_is_patient();
        }
        if let Some(conn) = self.conn(id) {
            conn.welcome = Some(true);
        }
        let Some(work) = self.target.work.as_deref_mut() else { return };
        match purpose {
            Purpose::Data(stream) => self.take_stream(stream, id),
            Purpose::Faults => {
                work.conns.push(id);
                work.asking_on = Some(id);
                // First for everything that somebody waits for already.
                let asked = work.asked;
                for page in asked.iter() {
                    self.say_on(id, Side::Target, Word::Want(page));
                }
            }
            Purpose::Resume => {
                work.control = Some(id);
                work.event(proto::TargetEvent::Reconnected);
            }
            Purpose::Control | Purpose::Record => {}
        }
    }

    /// Pages come over this connection from now on (`take_stream`).
    fn take_stream(&mut self, stream: u8, id: u16) {
        let lands_on = self.has(PlantedBug::OldStreamLandsOn);
        let Some(work) = self.target.work.as_deref_mut() else { return };
        let old = work.streams.iter().position(|(known, _)| *known == stream);
        let old = old.map(|at| work.streams.swap_remove(at).1);
        work.streams.push((stream, id));
        work.streams.sort_unstable();
        work.conns.retain(|conn| Some(*conn) != old || lands_on);
        work.conns.push(id);
        let (lacks, round) = (work.stage == WritePolicy::PostCopy, work.round);
        let pages = if lacks { work.missing } else { work.received };
        if work.streams.iter().all(|(_, conn)| work.conns.contains(conn)) {
            self.call_off(Timer::Missed);
        }
        let Some(old) = old else { return };
        if !lands_on {
            self.shut(old, Side::Target);
        }
        let blocks = vec![bitmap(pages)];
        let back = control::StreamReopened { stream: stream.into(), round, blocks, missing: lacks };
        self.target_says(Kind::StreamReopened(back));
    }

    /// One connection that pages travel on has ended (`stream_lost`). Says whether it was one.
    pub(super) fn stream_lost(&mut self, id: u16) -> bool {
        let Some(work) = self.target.work.as_deref_mut() else { return false };
        let Some((stream, _)) = work.streams.iter().copied().find(|(_, conn)| *conn == id) else {
            return false;
        };
        work.conns.retain(|conn| *conn != id);
        self.shut(id, Side::Target);
        self.set(Timer::Missed);
        self.target_says(Kind::StreamLost(control::StreamLost { stream: stream.into() }));
        true
    }

    /// A stream was lost and not opened again for long: so is the link, then (`missed`).
    pub fn target_misses_a_stream(&mut self) {
        if let Some(work) = self.target.work.as_deref_mut()
            && let Some(control) = work.control
        {
            work.heard.push_back(Heard::Lost(control, Over::Cut));
        }
    }

    /// Ends all connections (`hang_up`).
    pub(super) fn target_hangs_up(&mut self) {
        let too_early = self.has(PlantedBug::ArrivedCountsAsReceived);
        let land_on = self.has(PlantedBug::OldStreamsReceiveOn);
        let fence_open = self.has(PlantedBug::FenceOpen);
        let Some(work) = self.target.work.as_deref_mut() else { return };
        work.ended = 0;
        work.asking_on = None;
        work.streams.clear();
        self.timers.retain(|(_, timer)| *timer != Timer::Missed);
        if let Some(spool) = work.spool.as_mut().filter(|_| !fence_open) {
            spool.core.stop();
        }
        if too_early && work.stage == WritePolicy::Before {
            for conn in self.conns.iter().filter(|conn| work.conns.contains(&conn.id)) {
                let pages = conn.to[Side::Target.at()].iter();
                pages.for_each(|word| {
                    if let Word::Page(page, ..) = word {
                        work.received.add(*page)
                    }
                });
            }
        }
        if land_on && work.stage == WritePolicy::Before {
            return work.control.take().into_iter().for_each(|id| self.shut(id, Side::Target));
        }
        let conns = std::mem::take(&mut work.conns);
        for id in conns.into_iter().chain(work.control.take()) {
            self.shut(id, Side::Target);
        }
    }
}
