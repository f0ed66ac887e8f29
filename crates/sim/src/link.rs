//! Connections: ordered, each for itself, as TCP; cut at any message, with neither side knowing what arrived.

use crate::{
    pages::Page,
    printed::Printed,
    record::{Answer, Asked},
};
use proto::control::Kind;
use std::collections::VecDeque;

/// A host of the migration.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Side {
    /// Where the guest comes from.
    Source,
    /// Where it goes.
    Target,
}

impl Side {
    /// As an index.
    pub fn at(self) -> usize {
        self as usize
    }

    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Purpose {
    /// Control messages.
    Control,
    /// The same, of a source that is back.
    Resume,
    /// Pages.
    Data(u8),
    /// Pages that the guest waits for.
    Faults,
    /// Asking the record that the target holds.
    Record,
}

/// What a page is sent as. `meant` is what the source read, and what must come out.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum As {
    /// As it is.
    Raw,
    /// A page full of zeros.
    Zero,
    /// The content of another page, sealed.
    Duplicate(u8),
    /// The difference to this content, sealed.
    Delta(u16),
    /// What the target keeps of this page from before, sealed.
    Kept,
}

/// What a connection carries.
#[derive(Clone, Hash, Debug)]
#[expect(clippy::large_enum_variant, reason = "there are few at a time")]
pub enum Word {
    /// The preamble: who wants what.
    Hello,
    /// A control message.
    Say(Printed<Kind>),
    /// A page.
    Page(u8, Page, As),
    /// The end of this stream's share of a round.
    RoundEnd(u32),
    /// Somebody waits for this page.
    Want(u8),
    /// A claim.
    Claim(Asked),
    /// Its answer.
    Claimed(Answer),
}

/// How an end of a connection learns that it is over.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Over {
    /// The other end was closed.
    Closed,
    /// It was cut.
    Cut,
}

/// One connection. Both arrays are indexed by the side at whose end something is.
#[derive(Clone, Hash, Debug)]
pub struct Conn {
    /// Never used twice.
    pub id: u16,
    /// What it is for.
    pub purpose: Purpose,
    /// What is on its way to each side.
    pub to: [VecDeque<Word>; 2],
    /// Whether each side still has its end open.
    pub open: [bool; 2],
    /// What each side is to hear behind what is on its way.
    pub over: [Option<Over>; 2],
    /// The target's answer to the preamble.
    pub welcome: Option<bool>,
}

impl Conn {
    /// Just dialled by the source.
    pub fn dialled(id: u16, purpose: Purpose) -> Self {
        let to = [VecDeque::new(), VecDeque::from([Word::Hello])];
        Self { id, purpose, to, open: [true; 2], over: [None; 2], welcome: None }
    }

    /// Says something to the other side, which may never arrive.
    pub fn say(&mut self, from: Side, word: Word) {
        let to = from.other().at();
        if self.open[from.at()] && self.open[to] && self.over[from.at()].is_none() {
            self.to[to].push_back(word);
        }
    }

    /// One side closes its end: what it has said still arrives, what was said to it does not.
    pub fn shut(&mut self, by: Side) {
        if std::mem::replace(&mut self.open[by.at()], false) {
            self.to[by.at()].clear();
            let other = by.other().at();
            if self.open[other] {
                self.over[other].get_or_insert(Over::Closed);
            }
        }
    }

    /// It breaks, with all that is on its way.
    pub fn cut(&mut self) {
        self.lose(Side::Source);
        self.lose(Side::Target);
    }

    /// It breaks for one side, with all that is on its way there. What that side has said still arrives.
    pub fn lose(&mut self, side: Side) {
        self.to[side.at()].clear();
        if self.open[side.at()] {
            self.over[side.at()] = Some(Over::Cut);
        }
    }

    /// Whether nothing of it is left.
    pub fn is_gone(&self) -> bool {
        (0..2).all(|side| !self.open[side] && self.to[side].is_empty())
    }
}
