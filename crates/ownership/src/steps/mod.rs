//! The protocol of the shared directory, step by step, without a directory.
//!
//! A machine says what to do next (`Op`) and is told what came of it (`Got`). So the same steps run over a
//! real file system, over a model in which everything goes wrong, and in virtual time.

mod claiming;
mod looking;
mod offering;

pub use claiming::Claiming;
pub use looking::Looking;
pub use offering::Offering;

use crate::record::{Entry, Named, epoch_name};
use std::io;

/// What is to be done in the VM's directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Make a new file with this content. Both are durable when it is done.
    Make {
        /// Its name, which nobody else uses.
        name: String,
        /// All of it.
        content: Vec<u8>,
    },
    /// Give a file a second name: exclusively, in one step.
    Link {
        /// The name that it has.
        from: String,
        /// The name that it gets.
        to: String,
    },
    /// Read a file.
    Read {
        /// Its name.
        name: String,
    },
    /// The names in the directory.
    List,
    /// Make durable what the names in the directory are.
    Sync,
    /// Remove a name.
    Remove {
        /// The name.
        name: String,
    },
}

/// What came of an [`Op`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Got {
    /// It is done.
    Done,
    /// The name is taken. After a lost reply: maybe by us.
    Exists,
    /// There is no such file; or it cannot be seen from here yet.
    Missing,
    /// The file's content.
    Content(Vec<u8>),
    /// The names, as they are or were some time ago.
    Names(Vec<String>),
    /// Nobody knows whether it was done.
    Failed(String),
}

/// What a machine wants.
#[derive(Debug)]
pub enum Step<T> {
    /// Do this and say what came of it.
    Do(Op),
    /// It is over.
    End(io::Result<T>),
}

/// A machine of this module.
pub trait Steps {
    /// What it comes to.
    type Outcome;

    /// The first step.
    fn begin(&mut self) -> Step<Self::Outcome>;

    /// The next one.
    fn next(&mut self, got: Got) -> Step<Self::Outcome>;
}

fn read<T>(epoch: u64) -> Step<T> {
    Step::Do(Op::Read { name: epoch_name(epoch) })
}

/// An answer that is none: ask again.
fn unknown<T>(why: String) -> Step<T> {
    Step::End(Err(io::Error::other(why)))
}

fn odd<T>(got: &Got) -> Step<T> {
    match got {
        Got::Failed(why) => unknown(why.clone()),
        other => unknown(format!("the directory answered something else than was asked: {other:?}")),
    }
}

/// The entry in the file of an epoch; it must say what its name says.
fn entry(content: &[u8], vm: &str, epoch: u64) -> io::Result<Entry> {
    let place = format!("the file {} of {vm}", epoch_name(epoch));
    let entry = Entry::decode(content, &place)?;
    if entry.vm == vm && entry.epoch == epoch {
        return Ok(entry);
    }
    let why = format!("{place} is about {} at epoch {}: it is not where it belongs", entry.vm, entry.epoch);
    Err(io::Error::new(io::ErrorKind::InvalidData, why))
}

/// The newest epoch among these names.
fn newest(names: &[String]) -> Option<u64> {
    let epoch = |name: &String| match Named::parse(name) {
        Some(Named::Epoch(epoch)) => Some(epoch),
        _ => None,
    };
    names.iter().filter_map(epoch).max()
}
