//! The threads that send pages. Mirrors `engine/send.rs` and `page/encode.rs`, a page a batch.

use super::{Heard, Job, Reopened, Stream, Work, pages};
use crate::{
    link::{As, Side, Word},
    pages::{Page, Pages, UNKNOWN},
    planted::PlantedBug,
    printed::Printed,
    world::{Conditions, World, say},
};
use proto::{Phase, Rest, control};

impl World {
    /// Whether a stream's thread has something to do.
    pub fn stream_can(&self, i: usize) -> bool {
        let Some(work) = self.source.work.as_deref().filter(|_| self.up[0]) else { return false };
        match work.streams.get(i).map_or(Job::Rest, |stream| stream.job) {
            Job::Rest => false,
            Job::Round => work.left.lowest().is_none_or(|page| work.is_told(page)),
            Job::Push => work.to_push.from(work.focus).is_none_or(|page| work.is_told(page)),
        }
    }

    /// It sends one page, or says that its share is over.
    pub fn stream_moves(&mut self, i: usize) {
        let eager = self.setup.eager;
        let pages = self.setup.pages;
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let conn = work.streams[i].conn;
        let word = match work.streams[i].job {
            Job::Rest => return,
            Job::Round => match work.left.lowest() {
                Some(page) => {
                    work.left.drop(page);
                    let ram = &self.qemus[0].ram;
                    let now = work.read_before.as_ref().map_or(ram.at(page), |read| read.at(page));
                    let sent = refine(work, i, page, now, pages, eager).map(|how| work.names(page, now, how));
                    work.sent.0[usize::from(page)] = now.content;
                    work.streams[i].mine.add(page);
                    say!(self, "stream {i}: page {page} is {} as {sent:?}", now.content);
                    let Some(how) = sent else { return };
                    Word::Page(page, now, how)
                }
                None => {
                    work.streams[i].job = Job::Rest;
                    work.heard.push_back(Heard::Shared(conn, work.round));
                    Word::RoundEnd(work.round)
                }
            },
            Job::Push => match work.to_push.from(work.focus) {
                Some(page) => {
                    work.to_push.drop(page);
                    work.focus = page;
                    say!(self, "stream {i}: pushes page {page}");
                    let now = self.qemus[0].ram.at(page);
                    Word::Page(page, now, work.names(page, now, plain(now)))
                }
                None => {
                    work.streams[i].job = Job::Rest;
                    return;
                }
            },
        };
        self.say_on(conn, Side::Source, word);
    }

    /// A stream goes on over another connection (`go_on` of `engine/source/mending.rs`).
    pub(super) fn stream_goes_on(&mut self, i: u8) {
        let forgets = self.has(PlantedBug::StreamRestNotSent);
        let keeps = self.has(PlantedBug::StreamSentKept);
        let misses = self.has(PlantedBug::StreamMissesRound);
        let replaces = self.has(PlantedBug::StreamOwedReplaced);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let Some(at) = work.reopened.iter().position(|reopened| reopened.stream == i) else { return };
        let Reopened { conn: (conn, _), back, .. } = work.reopened.remove(at);
        let Some(Printed(back)) = back else { return };
        let has = back.blocks.first().map_or(Pages::default(), pages);
        let mine = work.streams[usize::from(i)].mine;
        let again = match Rest::of(work.round, back.round) {
            _ if back.missing => None,
            Rest::OfFile => None,
            Rest::Part => Some(mine.less(has)),
            // The round has begun since the target said that.
            Rest::Whole if misses => None,
            Rest::Whole => Some(mine),
        };
        let job = if again.is_some() { Job::Round } else { Job::Rest };
        let again = again.filter(|_| !forgets).unwrap_or_default();
        say!(self, "stream {i}: goes on");
        work.streams[usize::from(i)] = Stream { conn, job, mine: mine.less(again), ended: false };
        if self.conns.iter().all(|other| other.id != conn || !other.open[0]) {
            // It was lost again before anything was written to it.
            work.heard.push_back(Heard::Lost(conn));
        }
        work.left = work.left.or(again);
        again.iter().filter(|_| !keeps).for_each(|page| work.sent.0[usize::from(page)] = UNKNOWN);
        if work.machine.as_ref().is_some_and(|machine| machine.phase() == Phase::PostCopy) {
            if back.missing {
                work.to_push = if replaces { has } else { work.to_push.or(has) };
            }
            work.all_do(Job::Push);
        }
        if self.ghost.conditions == Conditions::OneCut {
            self.ghost.conditions = Conditions::OneCutWaitedFor;
        }
    }

    /// The target's guest waits for a page (`serve_faults`).
    pub fn source_is_asked_for(&mut self, id: u16, page: u8) {
        let now = self.qemus[0].ram.at(page);
        say!(self, "source: answers with page {page}");
        self.say_on(id, Side::Source, Word::Page(page, now, plain(now)));
        if let Some(work) = self.source.work.as_deref_mut() {
            work.to_push.drop(page);
            work.focus = page;
        }
    }
}

impl Work {
    /// Whether it is known what the target keeps of this page, or nobody asks (`KeptTable::of`).
    fn is_told(&self, page: u8) -> bool {
        self.kept.as_ref().is_none_or(|kept| kept.complete || page < kept.told)
    }

    /// A page that the target keeps is only named.
    fn names(&self, page: u8, now: Page, how: As) -> As {
        let kept = self.kept.as_ref().map_or(0, |kept| kept.tags.0[usize::from(page)]);
        if how != As::Zero && kept != 0 && kept == now.content { As::Kept } else { how }
    }

    /// The target's word of what it keeps (`KeptTable::hear`).
    pub(super) fn hear_kept(&mut self, word: &control::Kept) {
        let Some(kept) = &mut self.kept else { return };
        kept.complete |= word.end;
        if let Some(tag) = word.tags.first() {
            kept.tags.0[word.start as usize] = *tag as u16;
            kept.told = word.start as u8 + 1;
        }
    }
}

fn plain(page: Page) -> As {
    if page.content == 0 { As::Zero } else { As::Raw }
}

/// What a page is sent as; none: the target has just that, and nothing travels.
fn refine(work: &Work, stream: usize, page: u8, now: Page, pages: u8, eager: bool) -> Option<As> {
    let sent = |page: u8| work.sent.0[usize::from(page)];
    let may_refer = |other| eager || !work.set.has(other) || work.streams[stream].mine.has(other);
    if sent(page) == now.content {
        return None;
    }
    if now.content == 0 {
        return Some(As::Zero);
    }
    if let Some(other) = (0..pages).find(|o| *o != page && sent(*o) == now.content && may_refer(*o)) {
        return Some(As::Duplicate(other));
    }
    // Every other version is similar enough to the one before it.
    if ![0, UNKNOWN].contains(&sent(page)) && now.content % 2 == 1 {
        return Some(As::Delta(sent(page)));
    }
    Some(As::Raw)
}
