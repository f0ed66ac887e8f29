//! Migrations of this host's VMs: how one is asked for, watched and ended.

mod handle;
mod run;
mod wish;

pub use handle::{Follower, MigrationHandle};
pub use run::Migrations;
pub use wish::{Wish, Wishes};

use crate::{
    config::Address,
    peers::Pass,
    store::{Arrival, ArrivalRecord, DepartureRecord, VmRecord},
};
use api::{Event, Forecast, MigrateOptions, Outcome, Report};
use ports::{Claim, Claimed};
use std::{
    io,
    net::{SocketAddr, TcpStream},
    sync::Arc,
};
use units::MigrationId;

/// A migration as it was asked for.
#[derive(Clone, Debug)]
pub struct MigrateRequest {
    /// Its id, drawn at random.
    pub id: MigrationId,
    /// The VM, which belongs here.
    pub vm: VmRecord,
    /// Where the target's agent listens.
    pub address: Address,
    /// What is asked of it, with what the agent's configuration adds.
    pub options: MigrateOptions,
}

impl MigrateRequest {
    /// A report on this migration in which nothing has happened yet.
    pub fn blank_report(&self, from: &str, outcome: Outcome) -> Report {
        Report::blank(&self.vm.name, from, &self.options.to, self.options.mode, outcome)
    }
}

/// Takes what happens in a migration.
pub type Events = Arc<dyn Fn(Event) + Send + Sync>;

/// Moves VMs. Every method may block; each call has a thread of its own.
pub trait Migrator: Send + Sync {
    /// Runs one migration from here to its end, and says how it ended. `events` is for everything but
    /// `Event::Done`. A cancel before the commit is rolled back before this returns.
    fn migrate(&self, request: &MigrateRequest, events: Events, wishes: &Wishes) -> Report;

    /// What a migration would take, or why there can be none. Moves nothing.
    fn plan(&self, request: &MigrateRequest) -> Result<Forecast, String>;

    /// Serves a connection that another agent has made, and that is let in as long as the pass says.
    fn serve(&self, connection: TcpStream, from: SocketAddr, pass: Pass);

    /// Asks the record that decides this migration from here: the one that the target keeps, or a shared one.
    /// An error: not known, ask again.
    fn ask(&self, departure: &DepartureRecord, claim: &Claim) -> io::Result<Claimed>;

    /// Asks the record that decides a migration to here on behalf of this host, which was authorized to. An
    /// error: not known, ask again.
    fn ask_here(&self, claim: &Claim) -> io::Result<Claimed>;

    /// Keeps the frozen QEMU of a guest that another host may run from going on, whatever signals come, for
    /// as long as what is returned lives. None: it is not frozen, or cannot be held.
    fn hold(&self, vm: &VmRecord) -> Option<Box<dyn Send>>;

    /// After a restart: this VM belongs to the target, which may still want pages of the copy here. Serves
    /// them until the target has settled, and ends the copy.
    fn serve_gone(&self, vm: &VmRecord, departure: &DepartureRecord);

    /// After a restart: this VM was claimed by this host, and may not run yet, or still lack pages.
    fn go_on(&self, vm: &VmRecord, arrival: Arrival, record: &ArrivalRecord);

    /// The agent is about to end: arrivals that are not claimed are given up.
    fn shut_down(&self);
}
