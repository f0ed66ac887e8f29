//! A migration as the API sees it: everything that happened so far, and whatever happens next.

use super::{MigrateRequest, Wishes};
use api::{Event, Phase, Report};
use std::sync::{Arc, Mutex};
use tokio::sync::watch;
use units::Locked;

/// One migration, running or over. Its events are kept from the beginning, except that of the ticks between
/// two other events only the latest is: who joins late sees all that happened, and an endless migration stays
/// small.
pub struct MigrationHandle {
    /// What was asked for.
    pub request: MigrateRequest,
    /// What people wish of it.
    pub wishes: Wishes,
    progress: Mutex<Progress>,
    told: watch::Sender<u64>,
}

#[derive(Default)]
struct Progress {
    /// Each with its serial number, from 1 on; ascending, with gaps where ticks were replaced.
    events: Vec<(u64, Event)>,
    last: u64,
    phase: Option<Phase>,
    report: Option<Report>,
}

impl MigrationHandle {
    /// A migration of which nothing has happened yet.
    pub fn new(request: MigrateRequest) -> Arc<Self> {
        let progress = Mutex::new(Progress::default());
        Arc::new(Self { request, wishes: Wishes::default(), progress, told: watch::Sender::new(0) })
    }

    /// Adds what has happened. Nothing follows `Event::Done`.
    pub fn tell(&self, event: Event) {
        let mut progress = self.progress.locked();
        if progress.report.is_some() {
            return;
        }
        match &event {
            Event::Phase { phase, .. } | Event::Tick { phase, .. } => progress.phase = Some(*phase),
            Event::Done(report) => {
                progress.phase = Some(Phase::Done);
                progress.report = Some((**report).clone());
            }
            Event::Forecast(_) | Event::Round(_) | Event::Note { .. } | Event::Downtime { .. } => {}
        }
        let is_tick = |event: &Event| matches!(event, Event::Tick { .. });
        if is_tick(&event) && progress.events.last().is_some_and(|(_, last)| is_tick(last)) {
            progress.events.pop();
        }
        progress.last += 1;
        let serial = progress.last;
        progress.events.push((serial, event));
        drop(progress);
        self.told.send_replace(serial);
    }

    /// Where it stands.
    pub fn phase(&self) -> Option<Phase> {
        self.progress.locked().phase
    }

    /// Its report, once it is over.
    pub fn report(&self) -> Option<Report> {
        self.progress.locked().report.clone()
    }

    /// Whether a cancel can still be heeded, as far as is known: the guest has not started on the target.
    pub fn can_be_cancelled(&self) -> bool {
        !matches!(self.phase(), Some(Phase::PostCopy | Phase::Done))
    }

    /// Its events from the beginning on.
    pub fn follow(self: &Arc<Self>) -> Follower {
        Follower { migration: self.clone(), told: self.told.subscribe(), seen: 0 }
    }

    /// Waits until it is over, or until the guest runs on the target.
    pub async fn past_cancelling(&self) {
        let mut told = self.told.subscribe();
        while self.can_be_cancelled() {
            if told.changed().await.is_err() {
                return;
            }
        }
    }

    fn after(&self, seen: u64) -> Vec<(u64, Event)> {
        let progress = self.progress.locked();
        let from = progress.events.partition_point(|(serial, _)| *serial <= seen);
        progress.events[from..].to_vec()
    }
}

/// Somebody who watches a migration.
pub struct Follower {
    migration: Arc<MigrationHandle>,
    told: watch::Receiver<u64>,
    seen: u64,
}

impl Follower {
    /// What has happened since the last call; empty if nothing has.
    pub fn so_far(&mut self) -> Vec<Event> {
        let news = self.migration.after(self.seen);
        self.seen = news.last().map_or(self.seen, |(serial, _)| *serial);
        news.into_iter().map(|(_, event)| event).collect()
    }

    /// The same, but waits until something has happened; `None` once everything was told.
    pub async fn next(&mut self) -> Option<Vec<Event>> {
        loop {
            self.told.borrow_and_update();
            let over = self.migration.report().is_some();
            let news = self.so_far();
            if !news.is_empty() {
                return Some(news);
            }
            if over || self.told.changed().await.is_err() {
                return None;
            }
        }
    }
}
