//! What takes bytes from strangers in here, as functions of bytes: for the crate `fuzz`, and for nothing
//! else.
//!
//! Not behind a feature: cargo builds the workspace with all features that anybody asks for, and what is
//! tested would not be what is sent.

use crate::{
    conn,
    kept::KeptTable,
    ports::{DeviceState, GuestMemory, KeptCopy, MissingPages},
    receive::{PageReceiver, WritePolicy, receive},
    source, target,
};
use api::{Forecast, PastMigration};
use proto::{Shape, control};
use std::{
    io::{self, Read},
    sync::Arc,
    time::Duration,
};
use units::{MemorySet, Rate};

/// Whose pages arrive.
#[derive(Clone, Debug)]
pub enum Guest {
    /// One that does not run yet.
    Stands,
    /// One that runs or is about to, and lacks these pages.
    Lacks(MemorySet),
    /// One that has all its memory.
    Complete,
}

/// Receives what a data connection carries; says why it ended and what is still missing.
pub fn land(
    memory: Arc<dyn GuestMemory>,
    missing_mode: Option<Arc<dyn MissingPages>>,
    kept: Option<Arc<dyn KeptCopy>>,
    tag_key: Option<[u8; 32]>,
    guest: Guest,
    connection: impl Read,
) -> (io::Error, MemorySet) {
    let receiver = PageReceiver::new(memory, missing_mode, false, tag_key.map(page::Tagger::new), || {});
    let receiver = receiver.keeps(kept);
    match guest {
        Guest::Stands => {}
        Guest::Lacks(missing) => receiver.go_on(missing),
        Guest::Complete => receiver.enter(WritePolicy::Closed),
    }
    let end = receive(connection, &receiver, |_| {});
    let missing = receiver.missing().clone();
    (end, missing)
}

/// Takes in what a target says that it keeps of a VM of this shape. Says whether all of it may be said, and
/// how many tags the source holds then.
pub fn hear_kept(shape: &Shape, messages: &[control::Kept]) -> (bool, usize) {
    let table = KeptTable::new(shape.clone());
    let good = messages.iter().all(|message| table.hear(message).is_ok());
    (good, table.tags())
}

/// Reads one control message with its length.
pub fn read_control(connection: &mut impl Read) -> io::Result<control::Kind> {
    conn::read_control(connection)
}

/// Unpacks a device state.
pub fn decompress(state: &control::State) -> Result<DeviceState, String> {
    target::decompress(state)
}

/// What is foretold of a guest of so many pages, that wrote so many pages in the second before, whose earlier
/// migrations went like this by the word of other hosts.
pub fn foresee(
    history: &[PastMigration],
    link: Rate,
    present: u64,
    written: u64,
    limit: Duration,
) -> Forecast {
    let mut set = policy::WorkingSet::of(present);
    for part in 1..=4 {
        set.see(Duration::from_millis(250 * part), written * part / 4);
    }
    source::foresee(history, link, present, &set, limit)
}
