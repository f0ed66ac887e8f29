//! What earlier migrations taught: of each VM, wherever it was moved before, and of the way to each host.
//!
//! It is advice only: whatever of it is lost or unreadable costs no VM anything, so nothing here is an error
//! for its reader.

use super::{Store, StoreError, Trouble, decode, encode};
use api::{Outcome, PastMigration, Report};
use redb::{TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use units::Rate;

/// VM name → [`PastMigration`]s, oldest first.
const HISTORY: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("history");

/// Host name → [`Known`].
const LINKS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("links");

/// What may come from a peer for one VM, in bytes: twenty times what is usual.
const MOST: usize = 64 << 10;

/// After so many seconds a link is probed again: it may be another one, or others may use it.
const FRESH: u64 = 3600;

/// So many switchovers are remembered; the quickest of them is what one costs: the others were disturbed.
const SWITCHOVERS: usize = 3;

/// What is known of the way to a host.
#[derive(Clone, PartialEq, Default, Debug, Serialize, Deserialize)]
pub struct Known {
    /// What the link carried when it was probed, in bytes a second, and when that was, in seconds since 1970.
    pub probed: Option<(u64, u64)>,
    /// What the last switchovers cost besides memory, in milliseconds.
    #[serde(default)]
    pub switchovers_ms: Vec<f64>,
}

impl Known {
    /// What the link carries, if that was seen lately.
    pub fn link(&self) -> Option<Rate> {
        let (rate, at) = self.probed?;
        let fresh = now().checked_sub(at).is_some_and(|age| age < FRESH);
        (rate > 0 && fresh).then_some(Rate(rate))
    }

    /// What a switchover costs besides memory.
    pub fn switchover(&self) -> Option<Duration> {
        let quickest = self.switchovers_ms.iter().copied().min_by(f64::total_cmp)?;
        Duration::try_from_secs_f64(quickest / 1e3).ok()
    }

    fn learn(&mut self, report: &Report) {
        if let Some(forecast) = &report.forecast {
            let probed = self.link().is_none().then(|| (forecast.link, now()));
            self.probed = probed.or(self.probed);
        }
        if let (Some(pause), Some(last)) = (report.downtime_ms, report.rounds.last()) {
            // What the disks took is another VM's no more than another moment's.
            let drain = report.drain_ms.unwrap_or_default();
            self.switchovers_ms.push((pause - last.ms - drain).max(0.1));
            self.switchovers_ms.drain(..self.switchovers_ms.len().saturating_sub(SWITCHOVERS));
        }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

pub(super) fn prepare(change: &WriteTransaction) -> Result<(), Trouble> {
    change.open_table(HISTORY)?;
    change.open_table(LINKS)?;
    Ok(())
}

pub(super) fn forget(change: &WriteTransaction, vm: &str) -> Result<(), Trouble> {
    change.open_table(HISTORY)?.remove(vm)?;
    Ok(())
}

impl Store {
    /// How this VM's migrations went, oldest first.
    pub fn history(&self, vm: &str) -> Vec<PastMigration> {
        self.advice(HISTORY, vm)
    }

    /// Keeps what came with a VM; what cannot be understood is left out.
    pub fn keep_history(&self, vm: &str, json: &[u8]) -> Result<(), StoreError> {
        if json.is_empty() {
            return Ok(());
        }
        let mut all: Vec<PastMigration> =
            if json.len() > MOST { vec![] } else { serde_json::from_slice(json).unwrap_or_default() };
        all.retain(PastMigration::is_sound);
        let latest = &all[all.len().saturating_sub(PastMigration::KEPT)..];
        self.put(HISTORY, vm, &latest)
    }

    /// What is known of the way to a host.
    pub fn link_history(&self, to: &str) -> Known {
        self.advice(LINKS, to)
    }

    /// Its link carries so much.
    pub fn keep_link(&self, to: &str, rate: Rate) -> Result<(), StoreError> {
        self.put(LINKS, to, &Known { probed: Some((rate.0, now())), ..self.link_history(to) })
    }

    /// Learns from a migration that is over. Of a VM that moved on, the history went with it.
    pub fn learn(&self, report: &Report, limited: bool) -> Result<(), StoreError> {
        if report.outcome == Outcome::Completed && !limited {
            let mut known = self.link_history(&report.to);
            known.learn(report);
            return self.put(LINKS, &report.to, &known);
        }
        match PastMigration::of(report) {
            Some(past) if report.outcome != Outcome::Completed => {
                let mut history = self.history(&report.vm);
                PastMigration::add(&mut history, past);
                self.put(HISTORY, &report.vm, &history)
            }
            _ => Ok(()),
        }
    }

    fn advice<T: serde::de::DeserializeOwned + Default>(
        &self,
        table: TableDefinition<'_, &str, &[u8]>,
        of: &str,
    ) -> T {
        let found = self.look(&format!("look up what is known of {of}"), |look| {
            look.open_table(table)?.get(of)?.map(|row| decode(row.value())).transpose()
        });
        found
            .unwrap_or_else(|error| {
                tracing::warn!(%error, "going on without");
                None
            })
            .unwrap_or_default()
    }

    fn put<T: Serialize>(
        &self,
        table: TableDefinition<'_, &str, &[u8]>,
        of: &str,
        what: &T,
    ) -> Result<(), StoreError> {
        self.change(&format!("keep what was learned of {of}"), |change| {
            change.open_table(table)?.insert(of, encode(what)?.as_slice())?;
            Ok(())
        })
    }
}
