//! The file that pages come by, too: opened, followed, recorded.

use super::{Signal, Spool, Taken, TargetDriver};
use crate::{
    ports::SpoolRecord,
    receive::PageReceiver,
    spooler::STALL,
    unspool::{Files, Unspool, Unspooled},
};
use proto::{TargetEvent, control};
use spool::{BlockShape, Header, Reader, Secret, Side, Writer};
use std::{
    io,
    sync::{Arc, mpsc::channel},
    thread,
    time::{SystemTime, UNIX_EPOCH},
};
use units::MigrationId;

impl TargetDriver {
    /// Opens the source's file and makes one of this side's. A host that cannot goes without, and says why.
    pub(super) fn open_spool(&mut self, taken: &mut Taken, asked: &control::Spool) {
        match self.try_open(taken, asked) {
            Ok(spool) => taken.spool = Some(spool),
            Err(why) => self.no_spool = why,
        }
    }

    fn try_open(&self, taken: &Taken, asked: &control::Spool) -> Result<Spool, String> {
        let secret =
            <[u8; 32]>::try_from(&*asked.secret).map_err(|_| "its key has another length than agreed")?;
        let (host, migration) = (self.host.clone(), self.migration);
        let (wanted, name) = (asked.directory.clone(), self.host.name());
        let vm = taken.request.vm.clone();
        let blocks: Vec<BlockShape> = taken
            .request
            .blocks
            .iter()
            .map(|b| BlockShape { name: b.name.clone(), pages: b.pages })
            .collect();
        let (tell, told) = channel();
        // A datastore that hangs must not hang us.
        let open = move || -> Result<_, String> {
            let directory = host.spool_directory(&wanted)?;
            let files = Files::of(&directory, migration);
            let reader = Reader::open(&files.source, &Secret(secret)).map_err(|e| e.to_string())?;
            let header = reader.header();
            // The same file, and not another one under its name: this also shows that both hosts see the same
            // directory.
            if header.migration != migration || header.side != Side::Source || header.blocks != blocks {
                return Err(format!("{} is not this migration's file", files.source.display()));
            }
            let own = Header {
                migration,
                side: Side::Target,
                host: name,
                vm,
                created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
                blocks,
            };
            let own = Writer::create(&directory, &own, &Secret(secret), STALL);
            // Nothing depends on it: what is in memory is known without it.
            let own =
                own.inspect_err(|e| tracing::warn!(%e, "what arrives is not recorded on the datastore")).ok();
            Ok((reader, files, own, directory))
        };
        let spawned = thread::Builder::new().name("spool-open".into()).spawn(move || drop(tell.send(open())));
        spawned.map_err(|e| e.to_string())?;
        let (reader, files, own, directory) = told
            .recv_timeout(STALL)
            .map_err(|_| format!("the datastore has not answered for {} ms", STALL.as_millis()))??;
        let thread = Unspool::start(reader, files, own, taken.receiver.clone(), self.say_unspooled())
            .map_err(|e| e.to_string())?;
        Ok(Spool { thread, directory, secret, recorded: None })
    }

    fn say_unspooled(&self) -> impl Fn(Unspooled) + Send + 'static {
        let tell = self.tell.clone();
        move |said| drop(tell.send(Signal::Unspooled(said)))
    }

    /// After a restart of this agent.
    pub(super) fn take_up(
        &self,
        migration: MigrationId,
        record: SpoolRecord,
        receiver: &Arc<PageReceiver>,
    ) -> Option<Spool> {
        let files = Files::of(&record.directory, migration);
        let (directory, secret) = (record.directory.clone(), record.secret);
        let thread = Unspool::resume(files, record, receiver.clone(), self.say_unspooled());
        let thread = thread.inspect_err(|e| tracing::error!(%e, "the spool cannot be read")).ok()?;
        Some(Spool { thread, directory, secret, recorded: None })
    }

    /// The source says how far its file is.
    pub(super) fn spooled(&mut self, generation: u32, spooled: &control::Spooled) -> Option<TargetEvent> {
        if generation != self.generation {
            // Of a connection that is lost: what it tells of is sent anew, and may be newer there (I5); and
            // what it says the file is good for may have been taken back.
            return None;
        }
        let taken = self.taken.as_mut()?;
        let spool = taken.spool.as_mut()?;
        let outdated = match &spooled.manifest {
            None => None,
            Some(manifest) => {
                let outdated = if manifest.outdated.is_empty() {
                    let blocks = taken.receiver.shape.0.iter().copied();
                    Ok(units::MemorySet::empty(blocks))
                } else {
                    proto::page_sets(&manifest.outdated, &taken.receiver.shape)
                };
                match outdated {
                    Ok(outdated) => Some((manifest.floor, manifest.end, outdated)),
                    Err(e) => {
                        let what = "understand what the spool is good for".to_owned();
                        return Some(TargetEvent::Broke { what, why: e.to_string() });
                    }
                }
            }
        };
        let follow = spool.thread.core().said(spooled);
        spool.thread.follow(follow, outdated.as_ref().map(|(.., outdated)| outdated.clone()));
        let (floor, end, outdated) = outdated?;
        let record =
            SpoolRecord { directory: spool.directory.clone(), secret: spool.secret, floor, end, outdated };
        let (tell, told) = channel();
        let recording =
            taken.journal.later("record-spool", move |journal| drop(tell.send(journal.spool(&record))));
        spool.recorded = Some(told);
        recording
            .err()
            .map(|e| TargetEvent::Broke { what: "record where the spool is".to_owned(), why: e.to_string() })
    }

    /// The thread has something to say.
    pub(super) fn hear_spool(&mut self, said: Unspooled) {
        match said {
            Unspooled::Taken(extents) => {
                self.say(control::Kind::SpoolTaken(control::SpoolTaken { extents }));
            }
            Unspooled::Failed(why) => {
                tracing::warn!(why, "the spool cannot be read");
                self.say(control::Kind::SpoolFailed(control::SpoolFailed { why }));
            }
            Unspooled::Placed => {
                let Some(taken) = &self.taken else { return };
                let blocks = proto::bitmaps(&taken.receiver.missing());
                self.say(control::Kind::NowMissing(control::NowMissing { blocks }));
            }
        }
    }
}

impl Taken {
    /// The guest runs: from now on the file helps to bring what it lacks.
    pub(super) fn place_spooled(&self) {
        if let Some(spool) = &self.spool {
            spool.thread.place();
        }
    }

    /// Waits until it is recorded durably where the file is.
    pub(super) fn spool_is_recorded(&mut self) -> io::Result<()> {
        let Some(told) = self.spool.as_mut().and_then(|spool| spool.recorded.take()) else { return Ok(()) };
        told.recv().unwrap_or_else(|_| Err(io::Error::other("the recording thread ended without a word")))
    }
}
