//! Takes connections in and hands them to the migrations that they belong to.

use crate::{
    conn::{Conn, Dial, GREETING, invalid, read_control, welcome},
    ports::{Claim, Claimed, Host, Ownership, OwnershipRecord, Request, Waiting},
    target::{TargetDriver, ToTarget},
};
use proto::{Kind, Reply, Status, control};
use std::{
    collections::HashMap,
    io::{self, Write},
    net::TcpStream,
    sync::{Arc, Mutex, mpsc::Sender},
    thread,
    time::{Duration, Instant},
};
use units::{Epoch, MemorySet, MigrationId};

/// Migrations that may come in at once. More would starve one another; a hostile peer could exhaust the host.
const MAX_SESSIONS: usize = 64;

type Sessions = Arc<Mutex<HashMap<MigrationId, Sender<ToTarget>>>>;

/// The door of a host.
#[derive(Clone)]
pub struct Acceptor {
    host: Arc<dyn Host>,
    sessions: Sessions,
}

impl Acceptor {
    /// For this host.
    pub fn new(host: Arc<dyn Host>) -> Self {
        Self { host, sessions: Arc::default() }
    }

    /// Serves one connection; returns when it has been handed over, or is over. Call it on a thread of its own: the peer
    /// may be slow, and may be hostile.
    pub fn serve(&self, stream: TcpStream) -> io::Result<()> {
        let (mut conn, preamble) = welcome(stream)?;
        let id = preamble.migration;
        match preamble.kind {
            Kind::Control => self.begin(conn, id),
            Kind::Record => self.answer_record(conn, id),
            Kind::Data(_) | Kind::Fault | Kind::Resume => {
                let session = self.sessions.lock().expect("no one panics here").get(&id).cloned();
                match session {
                    Some(session) => {
                        // It may have ended in this very moment: then the connection ends with it.
                        let _ = session.send(ToTarget::Attach(preamble.kind, conn));
                        Ok(())
                    }
                    None if preamble.kind == Kind::Resume && self.host.settled(id) => {
                        conn.write_all(&Reply::new(Status::Welcome).to_bytes())?;
                        conn.write_all(&proto::encode(control::Kind::Settled(control::Settled::default())))
                    }
                    None => conn.write_all(&Reply::new(Status::Unknown).to_bytes()),
                }
            }
        }
    }

    /// The agent is about to end: migrations that are not permitted yet are given up, so that nothing of them stays. Waits
    /// until they are, at most `time`.
    pub fn give_up(&self, time: Duration) {
        let end = Instant::now() + time;
        for session in self.sessions.lock().expect("no one panics here").values() {
            let _ = session.send(ToTarget::GiveUp);
        }
        // There is no event for it: each session ends on a thread of its own, and a later start cleans up what stays.
        while Instant::now() < end && !self.sessions.lock().expect("no one panics here").is_empty() {
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Goes on with a VM that this host has claimed and whose agent was restarted: the source will connect again. Returns
    /// once the guest has all its memory.
    pub fn go_on(&self, request: Request, waiting: Waiting, owed: MemorySet) -> io::Result<()> {
        let id = request.migration;
        let (driver, outside) = TargetDriver::new(self.host.clone(), id);
        if !self.enter(id, outside) {
            return Err(io::Error::other("this migration is being served already"));
        }
        let result = driver.run_after_claim(request, waiting, owed);
        self.leave(id);
        result
    }

    fn begin(&self, mut conn: Conn, id: MigrationId) -> io::Result<()> {
        let (driver, outside) = TargetDriver::new(self.host.clone(), id);
        if !self.enter(id, outside) {
            return conn.write_all(&Reply::new(Status::Busy).to_bytes());
        }
        let this = self.clone();
        let spawned = thread::Builder::new().name("target".into()).spawn(move || {
            let welcome = conn.write_all(&Reply::new(Status::Welcome).to_bytes());
            if let Err(e) = welcome.and_then(|()| driver.run(conn)) {
                tracing::warn!(%e, migration = %id, "an incoming migration ended");
            }
            this.leave(id);
        });
        spawned.map(drop).inspect_err(|_| self.leave(id))
    }

    /// Whether there was room for another migration.
    fn enter(&self, id: MigrationId, outside: Sender<ToTarget>) -> bool {
        let mut sessions = self.sessions.lock().expect("no one panics here");
        if sessions.len() >= MAX_SESSIONS || sessions.contains_key(&id) {
            return false;
        }
        sessions.insert(id, outside);
        true
    }

    fn leave(&self, id: MigrationId) {
        self.sessions.lock().expect("no one panics here").remove(&id);
    }

    fn answer_record(&self, mut conn: Conn, migration: MigrationId) -> io::Result<()> {
        conn.write_all(&Reply::new(Status::Welcome).to_bytes())?;
        conn.silence(Some(GREETING))?;
        let control::Kind::Claim(claim) = read_control(&mut conn)? else {
            return Err(invalid("only claims are expected here"));
        };
        let claim =
            Claim { vm: claim.vm, migration, expected: Epoch(claim.expected), claimer: claim.claimer };
        let claimed = match self.host.record().claim(&claim)? {
            Claimed::Yours(epoch) => control::Claimed { yours: true, owner: claim.claimer, epoch: epoch.0 },
            Claimed::Lost(record) => {
                control::Claimed { yours: false, owner: record.owner, epoch: record.epoch.0 }
            }
        };
        conn.write_all(&proto::encode(control::Kind::Claimed(claimed)))
    }
}

/// The record that the target's agent holds, asked from afar.
pub struct RemoteRecord(pub Arc<dyn Dial>);

impl Ownership for RemoteRecord {
    fn claim(&self, claim: &Claim) -> io::Result<Claimed> {
        let mut conn = self.0.dial(Kind::Record)?;
        conn.silence(Some(GREETING))?;
        conn.write_all(&proto::encode(control::Kind::Claim(control::Claim {
            vm: claim.vm.clone(),
            expected: claim.expected.0,
            claimer: claim.claimer.clone(),
        })))?;
        match read_control(&mut conn)? {
            control::Kind::Claimed(claimed) if claimed.yours => Ok(Claimed::Yours(Epoch(claimed.epoch))),
            control::Kind::Claimed(claimed) => Ok(Claimed::Lost(OwnershipRecord {
                owner: claimed.owner,
                epoch: Epoch(claimed.epoch),
                migration: Some(claim.migration),
            })),
            _ => Err(invalid("the peer answers a claim with something else")),
        }
    }
}
