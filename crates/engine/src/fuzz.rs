//! What takes bytes from strangers in here, as functions of bytes: for the crate `fuzz`, and for nothing
//! else.
//!
//! Not behind a feature: cargo builds the workspace with all features that anybody asks for, and what is
//! tested would not be what is shipped.

use crate::{
    conn,
    land::{Landing, Stage, receive},
    ports::{DeviceState, GuestMemory, MissingPages},
    report::{Forecast, Past},
    source, target,
};
use proto::control;
use std::{
    io::{self, Read},
    sync::Arc,
    time::Duration,
};
use units::{MemorySet, Rate};

/// Whose pages land.
#[derive(Clone, Debug)]
pub enum Guest {
    /// One that does not run yet.
    Stands,
    /// One that runs or is about to, and lacks these pages.
    Lacks(MemorySet),
    /// One that has all its memory.
    Complete,
}

/// Lands what a data connection carries; says why it ended and what is still owed.
pub fn land(
    memory: Arc<dyn GuestMemory>,
    missing: Option<Arc<dyn MissingPages>>,
    seal_key: Option<[u8; 32]>,
    guest: Guest,
    connection: impl Read,
) -> (io::Error, MemorySet) {
    let landing = Landing::new(memory, missing, false, seal_key.map(page::Sealer::new), || {});
    match guest {
        Guest::Stands => {}
        Guest::Lacks(owed) => landing.go_on(owed),
        Guest::Complete => landing.enter(Stage::Closed),
    }
    let end = receive(connection, &landing, |_| {});
    let owed = landing.owed().clone();
    (end, owed)
}

/// Reads one control message with its length.
pub fn read_control(connection: &mut impl Read) -> io::Result<control::Kind> {
    conn::read_control(connection)
}

/// Unpacks a device state.
pub fn unpack(state: &control::State) -> Result<DeviceState, String> {
    target::unpack(state)
}

/// What is foretold of a guest of so many pages, that wrote so many pages in the second before, whose earlier
/// migrations went like this by the word of other hosts.
pub fn foresee(history: &[Past], link: Rate, present: u64, written: u64, limit: Duration) -> Forecast {
    let mut set = policy::WorkingSet::of(present);
    for part in 1..=4 {
        set.see(Duration::from_millis(250 * part), written * part / 4);
    }
    source::foresee(history, link, present, &set, limit)
}
