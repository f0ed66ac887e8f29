//! Takes connections in and hands them to the migrations that they belong to.

use crate::{
    conn::{Conn, Dial, GREETING, invalid, read_control, welcome},
    ports::{Claim, Claimed, Host, Offer, Ownership, OwnershipRecord, Request, SpoolRecord, Waiting},
    secrets::draw_token,
    survey,
    target::{Outside, TargetDriver},
};
use pki::Security;
use proto::{Purpose, Reply, Status, Token, control};
use std::{
    collections::HashMap,
    io::{self, Write},
    net::TcpStream,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};
use units::{Epoch, Locked, MemorySet, MigrationId};

/// Migrations that may come in at once. More would starve one another; a hostile peer could exhaust the host.
const MAX_SESSIONS: usize = 64;

type Sessions = Arc<Mutex<HashMap<MigrationId, Session>>>;

/// A migration that comes in.
#[derive(Clone)]
struct Session {
    driver: Outside,
    /// What its data connections must say.
    token: Token,
    /// Who its source is: each of its connections must be of a host that has one of these names in its
    /// certificate. None where there are no certificates.
    source: Option<Vec<String>>,
}

impl Session {
    /// Whether a connection is one of this migration's.
    fn owns(&self, conn: &Conn, kind: Purpose, token: Option<&Token>) -> bool {
        let from_source = self.source.as_ref().is_none_or(|names| names.iter().any(|name| conn.is_of(name)));
        from_source && (!kind.needs_token() || token.is_some_and(|token| token.is(&self.token)))
    }
}

/// The door of a host.
#[derive(Clone)]
pub struct Acceptor {
    host: Arc<dyn Host>,
    security: Security,
    sessions: Sessions,
}

impl Acceptor {
    /// For this host.
    pub fn new(host: Arc<dyn Host>, security: Security) -> Self {
        Self { host, security, sessions: Arc::default() }
    }

    /// Serves one connection; returns when it has been handed over, or is over. Call it on a thread of its
    /// own: the peer may be slow, and may be hostile.
    pub fn serve(&self, stream: TcpStream) -> io::Result<()> {
        self.serve_greeted(stream, |_| ())
    }

    /// The same; `greeted` hears that the peer has said what it wants, and whether it has a certificate of
    /// the workgroup.
    pub fn serve_greeted(&self, stream: TcpStream, greeted: impl FnOnce(bool)) -> io::Result<()> {
        let (mut conn, preamble, token) = welcome(stream, &self.security, GREETING)?;
        greeted(conn.peer().is_some());
        let id = preamble.migration;
        match preamble.kind {
            Purpose::Control => self.begin(conn, id),
            Purpose::Record => self.answer_record(conn, id),
            Purpose::Probe => {
                conn.write_all(&Reply::new(Status::Welcome).to_bytes())?;
                survey::swallow(conn)
            }
            Purpose::Data(_) | Purpose::Fault | Purpose::Resume => {
                let session = self.sessions.locked().get(&id).cloned();
                match session {
                    Some(session) if !session.owns(&conn, preamble.kind, token.as_ref()) => {
                        conn.write_all(&Reply::new(Status::Stranger).to_bytes())?;
                        let who = conn.peer().map_or_else(|| "somebody".to_owned(), |names| names.join(", "));
                        Err(invalid(format!("{who} wants to be part of migration {id}, which is not theirs")))
                    }
                    Some(Session { driver: session, .. }) => {
                        session.attach(preamble.kind, conn);
                        Ok(())
                    }
                    None if preamble.kind == Purpose::Resume && self.host.settled(id) => {
                        conn.write_all(&Reply::new(Status::Welcome).to_bytes())?;
                        conn.write_all(&proto::encode(control::Kind::Settled(control::Settled::default())))
                    }
                    None => conn.write_all(&Reply::new(Status::Unknown).to_bytes()),
                }
            }
        }
    }

    /// The agent is about to end: migrations that are not authorized yet are given up, so that nothing of
    /// them stays. Waits until they are, at most `time`.
    pub fn give_up(&self, time: Duration) {
        let end = Instant::now() + time;
        for session in self.sessions.locked().values() {
            session.driver.give_up();
        }
        // There is no event for it: each session ends on a thread of its own, and a later start cleans up
        // what stays.
        while Instant::now() < end && !self.sessions.locked().is_empty() {
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Goes on with a VM that this host has claimed and whose agent was restarted: the source will connect
    /// again, or the spool has what is missing. Returns once the guest has all its memory.
    pub fn go_on(
        &self,
        request: Request,
        waiting: Waiting,
        missing: MemorySet,
        spool: Option<SpoolRecord>,
    ) -> io::Result<()> {
        let id = request.migration;
        let token = draw_token()?;
        let (driver, outside) = TargetDriver::new(self.host.clone(), id, token);
        if !self.enter(id, Session { driver: outside, token, source: Some(vec![request.from.clone()]) }) {
            return Err(io::Error::other("this migration is being served already"));
        }
        let result = driver.run_after_claim(request, waiting, missing, spool);
        self.leave(id);
        result
    }

    fn begin(&self, mut conn: Conn, id: MigrationId) -> io::Result<()> {
        let token = draw_token()?;
        let (driver, outside) = TargetDriver::new(self.host.clone(), id, token);
        let source = conn.peer().map(<[String]>::to_vec);
        if !self.enter(id, Session { driver: outside, token, source }) {
            return conn.write_all(&Reply::new(Status::Busy).to_bytes());
        }
        let this = self.clone();
        let spawned = thread::Builder::new().name("target".into()).spawn(move || {
            let welcome = conn.write_all(&Reply::new(Status::Welcome).to_bytes());
            if let Err(e) = welcome.and_then(|()| driver.run(conn)) {
                tracing::warn!(%e, migration = %id, "an incoming migration ended");
            }
            this.leave(id);
            sys::heap::give_back();
        });
        spawned.map(drop).inspect_err(|_| self.leave(id))
    }

    /// Whether there was room for another migration.
    fn enter(&self, id: MigrationId, session: Session) -> bool {
        let mut sessions = self.sessions.locked();
        if sessions.len() >= MAX_SESSIONS || sessions.contains_key(&id) {
            return false;
        }
        sessions.insert(id, session);
        true
    }

    fn leave(&self, id: MigrationId) {
        self.sessions.locked().remove(&id);
    }

    fn answer_record(&self, mut conn: Conn, migration: MigrationId) -> io::Result<()> {
        conn.write_all(&Reply::new(Status::Welcome).to_bytes())?;
        conn.all_within(Some(GREETING))?;
        let control::Kind::Claim(claim) = read_control(&mut conn)? else {
            return Err(invalid("only claims are expected here"));
        };
        if !conn.is_of(&claim.claimer) {
            return Err(invalid(format!(
                "a claim for {}, which is not the host that makes it",
                claim.claimer
            )));
        }
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
    fn identity(&self) -> io::Result<String> {
        Ok(String::new())
    }

    fn offer(&self, _: &Offer) -> io::Result<()> {
        // The target has written it down when it prepared.
        Ok(())
    }

    fn claim(&self, claim: &Claim) -> io::Result<Claimed> {
        let mut conn = self.0.dial(Purpose::Record, None)?;
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
