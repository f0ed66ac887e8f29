//! The threads that send pages. Mirrors `engine/ship.rs` and `page/refine.rs`, a page a batch.

use super::{Heard, Job, Work};
use crate::{
    link::{As, Side, Word},
    pages::{Page, UNKNOWN},
    world::{World, say},
};

impl World {
    /// Whether a stream's thread has something to do.
    pub fn stream_can(&self, i: usize) -> bool {
        let work = self.source.work.as_deref().filter(|_| self.up[0]);
        work.and_then(|work| work.streams.get(i)).is_some_and(|stream| stream.job != Job::Rest)
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
                    let sent = refine(work, i, page, now, pages, eager);
                    work.sent[usize::from(page)] = now.content;
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
            Job::Push => match work.owing.from(work.focus) {
                Some(page) => {
                    work.owing.drop(page);
                    work.focus = page;
                    say!(self, "stream {i}: pushes page {page}");
                    Word::Page(page, self.qemus[0].ram.at(page), plain(self.qemus[0].ram.at(page)))
                }
                None => {
                    work.streams[i].job = Job::Rest;
                    return;
                }
            },
        };
        if let Some(conn) = self.conn(conn) {
            conn.say(Side::Source, word);
        }
    }

    /// The target's guest waits for a page (`serve_faults`).
    pub fn source_is_asked_for(&mut self, id: u16, page: u8) {
        let now = self.qemus[0].ram.at(page);
        say!(self, "source: answers with page {page}");
        if let Some(conn) = self.conn(id) {
            conn.say(Side::Source, Word::Page(page, now, plain(now)));
        }
        if let Some(work) = self.source.work.as_deref_mut() {
            work.owing.drop(page);
            work.focus = page;
        }
    }
}

fn plain(page: Page) -> As {
    if page.content == 0 { As::Zero } else { As::Plain }
}

/// What a page is sent as; none: the target has just that, and nothing travels.
fn refine(work: &Work, stream: usize, page: u8, now: Page, pages: u8, eager: bool) -> Option<As> {
    let sent = |page: u8| work.sent[usize::from(page)];
    let may_refer = |other| eager || !work.set.has(other) || work.streams[stream].mine.has(other);
    if sent(page) == now.content {
        return None;
    }
    if now.content == 0 {
        return Some(As::Zero);
    }
    if let Some(other) = (0..pages).find(|o| *o != page && sent(*o) == now.content && may_refer(*o)) {
        return Some(As::Known(other));
    }
    // Every other version is similar enough to the one before it.
    if ![0, UNKNOWN].contains(&sent(page)) && now.content % 2 == 1 {
        return Some(As::Delta(sent(page)));
    }
    Some(As::Plain)
}
