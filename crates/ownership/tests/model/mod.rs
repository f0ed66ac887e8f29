//! A VM's directory as the protocol sees it, without a file system: every answer may be lost, late, or old.

use ownership::steps::{Got, Op};
use std::collections::BTreeMap;

/// What goes wrong with one operation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// It is done, and the answer is lost.
    LostReply,
    /// It is done, the answer is lost, and what comes back is what a second attempt gets: `EEXIST`, `ENOENT`.
    Repeated,
    /// It is not done.
    NotDone,
    /// A look-up finds nothing and a listing shows what was there before: this host has not heard of it yet.
    Blind,
}

impl Fault {
    /// All of them.
    pub(crate) const ALL: [Self; 5] =
        [Self::None, Self::LostReply, Self::Repeated, Self::NotDone, Self::Blind];

    /// Whether it makes a difference to this operation.
    pub(crate) fn can_hit(self, op: &Op) -> bool {
        let looks = matches!(op, Op::Read { .. } | Op::List);
        match self {
            Self::None => true,
            Self::NotDone => true,
            Self::Blind => looks,
            Self::LostReply => !looks,
            Self::Repeated => matches!(op, Op::Make { .. } | Op::Link { .. } | Op::Remove { .. }),
        }
    }
}

/// A directory of files that are never written to once they have a name.
#[derive(Clone, PartialEq, Eq, Hash, Default, Debug)]
pub(crate) struct Model {
    /// Name → content. Two names of one file have the same.
    names: BTreeMap<String, Vec<u8>>,
    /// The names as they were before the last few changes, oldest first.
    before: Vec<Vec<String>>,
}

/// How old a listing can be, in changes.
const MEMORY: usize = 8;

impl Model {
    /// What is there, for the one who checks.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// A file's content, for the one who checks.
    pub(crate) fn content(&self, name: &str) -> Option<&[u8]> {
        self.names.get(name).map(Vec::as_slice)
    }

    /// As a backup would bring it back.
    pub(crate) fn restore(&mut self, backup: &Self) {
        *self = backup.clone();
    }

    /// Does one operation, with this fault.
    pub(crate) fn act(&mut self, op: &Op, fault: Fault) -> Got {
        match fault {
            Fault::None => self.apply(op),
            Fault::NotDone => Got::Failed("it did not answer, and did nothing".to_owned()),
            Fault::LostReply => {
                self.apply(op);
                Got::Failed("the answer was lost".to_owned())
            }
            Fault::Repeated => {
                self.apply(op);
                self.apply(op)
            }
            Fault::Blind => match op {
                Op::List => Got::Names(self.before.first().cloned().unwrap_or_default()),
                _ => Got::Missing,
            },
        }
    }

    fn apply(&mut self, op: &Op) -> Got {
        match op {
            Op::Make { name, content } => self.name(name, content.clone()),
            Op::Link { from, to } => match self.names.get(from) {
                Some(content) => self.name(to, content.clone()),
                None => Got::Missing,
            },
            Op::Read { name } => self.names.get(name).cloned().map_or(Got::Missing, Got::Content),
            Op::List => Got::Names(self.names.keys().cloned().collect()),
            Op::Sync => Got::Done,
            Op::Remove { name } if self.names.contains_key(name) => {
                self.remember();
                self.names.remove(name);
                Got::Done
            }
            Op::Remove { .. } => Got::Missing,
        }
    }

    fn name(&mut self, name: &str, content: Vec<u8>) -> Got {
        if self.names.contains_key(name) {
            return Got::Exists;
        }
        self.remember();
        self.names.insert(name.to_owned(), content);
        Got::Done
    }

    fn remember(&mut self) {
        if self.before.len() == MEMORY {
            self.before.remove(0);
        }
        self.before.push(self.names.keys().cloned().collect());
    }
}
