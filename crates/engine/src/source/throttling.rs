//! When the guest's writes are slowed, and to which pace; and when its vCPUs are stunned, because that does
//! not suffice.

use super::SourceDriver;
use crate::{Broken, ports::Stalls, why};
use api::Phase;
use policy::{Duty, OUTRUN};
use std::time::{Duration, Instant};

/// So long a round must have lasted before it is judged: less shows how its first pages were sent. Again
/// after twice as long, and so on: each look protects anew what the guest writes, which costs it a fault a
/// page.
const JUDGED: Duration = Duration::from_millis(200);

/// What the source knows of throttling its guest.
#[derive(Debug, Default)]
pub(super) struct Throttling {
    /// Pages a second that the guest's writes follow now; none: they are free.
    pace: Option<f64>,
    /// In which round that began.
    since: Option<u32>,
    /// How much of the time the vCPUs stand still; none before it was looked at.
    duty: Option<Duty>,
    /// The user knows of that.
    told: bool,
    /// The pace is a forecast.
    guessed: bool,
    /// The tracker cannot slow anybody.
    unsupported: bool,
    /// When it was looked last, and what the stalls came to by then.
    looked: Option<(Instant, Stalls)>,
    /// The round that was judged last, and how long it must have lasted to be judged again.
    judged: (u32, Duration),
}

impl SourceDriver {
    /// In the middle of a round: does the guest outrun it?
    pub(super) fn watch(&mut self) -> Result<(), Broken> {
        // A link that is lost says nothing of how fast it is, nor does one that is not needed.
        let silent = !self.link.is_up() || self.reporter.finds_kept();
        if !self.may_throttle() || self.phase() != Phase::PreCopy || silent {
            return Ok(());
        }
        let (Some(round), Some(lasted)) = (self.current.clone(), self.reporter.round_lasts()) else {
            return Ok(());
        };
        self.count_stalls();
        if lasted < JUDGED {
            return Ok(());
        }
        let sent = round.set.len() - round.left();
        if sent == 0 {
            // A link that carries nothing is no reason to slow anybody.
            return Ok(());
        }
        // What the guest writes travels, unlike much of a first round.
        let sent_per_s = (sent as f64).min(self.moved_so_far()) / lasted.as_secs_f64();
        match self.throttling.pace {
            // A link that got slower, or was only guessed; one that seems faster may only have less to carry.
            Some(pace) if sent_per_s < pace || std::mem::take(&mut self.throttling.guessed) => {
                self.throttle(sent_per_s)
            }
            Some(_) => Ok(()),
            None => {
                let (judged, again) = self.throttling.judged;
                if judged == round.number && lasted < again {
                    return Ok(());
                }
                self.throttling.judged = (round.number, lasted * 2);
                self.collect()?;
                let outrun = self.dirty.len() as f64 > OUTRUN * sent as f64;
                let fits = self.rounds.would_fit(self.dirty.bytes(), sent_per_s);
                if outrun && !fits { self.throttle(sent_per_s) } else { Ok(()) }
            }
        }
    }

    /// At the end of a round that was not the last, when it is known what was dirtied meanwhile.
    pub(super) fn judge(&mut self) -> Result<(), Broken> {
        if !self.may_throttle() {
            return Ok(());
        }
        self.count_stalls();
        let Some((pages, moved_per_s)) = self.rounds.last() else { return Ok(()) };
        self.stun(pages, moved_per_s);
        if self.throttling.pace.is_some() || self.dirty.len() as f64 > OUTRUN * pages as f64 {
            let share = policy::share_of_round(
                self.usual_share(),
                self.dirty.len() as f64,
                self.rounds.fit(moved_per_s),
            );
            self.agree(share, Some(moved_per_s));
            return self.throttle(moved_per_s);
        }
        Ok(())
    }

    /// At the end of a round: did it shrink as it should, having been throttled from its beginning?
    fn stun(&mut self, pages: u64, sent_per_s: f64) {
        let ended = self.current.as_ref().map(|round| round.number);
        let (Some(stuns), Some(tracker)) = (&mut self.parts.stuns, &mut self.parts.tracker) else { return };
        if self.throttling.since.is_none() || self.throttling.since >= ended {
            return;
        }
        let duty = self.throttling.duty.get_or_insert_with(|| Duty::new(stuns.vcpus()));
        let share = duty.after(pages, self.dirty.len(), sent_per_s);
        let writers = tracker.writers();
        if share == 0.0 {
            return stuns.calm();
        }
        let told = match stuns.stun(share, writers.as_deref()) {
            Ok(()) => "that does not suffice: its writing vCPUs stand still for moments".to_owned(),
            // Then it goes on as it did, and ends if it can.
            Err(e) => format!("that does not suffice, but its vCPUs cannot be made to stand still: {e}"),
        };
        if !std::mem::replace(&mut self.throttling.told, true) {
            self.reporter.note(told);
        }
    }

    /// Nobody is stunned from now on.
    pub(super) fn calm(&mut self) {
        if let Some(stuns) = &mut self.parts.stuns {
            stuns.calm();
        }
    }

    fn may_throttle(&self) -> bool {
        // A guest that may end in post-copy need not be slowed, unless that is kinder.
        let wanted =
            (!self.options.post_copy() || self.throttling_is_kinder()) && !self.throttling.unsupported;
        wanted && !self.stopped && self.parts.tracker.as_ref().is_some_and(|tracker| tracker.can_throttle())
    }

    /// Before anything was sent.
    pub(super) fn throttle_by_guess(&mut self, sent_per_s: f64) -> Result<(), Broken> {
        self.throttling.guessed = true;
        self.throttle(sent_per_s)
    }

    pub(super) fn is_throttled(&self) -> bool {
        self.throttling.pace.is_some()
    }

    fn throttle(&mut self, sent_per_s: f64) -> Result<(), Broken> {
        let Some(tracker) = &mut self.parts.tracker else { return Ok(()) };
        match tracker.throttle(sent_per_s) {
            Ok(()) => {
                if self.throttling.pace.replace(sent_per_s).is_none() {
                    self.throttling.since = Some(self.current.as_ref().map_or(0, |round| round.number));
                    self.reporter.throttled();
                }
                Ok(())
            }
            // Then it goes on as it did, and ends if it can.
            Err(e) if e.kind() == std::io::ErrorKind::Unsupported => {
                self.throttling.unsupported = true;
                Ok(())
            }
            Err(e) => Err(why("slow the guest's writes")(e)),
        }
    }

    pub(super) fn count_stalls(&mut self) {
        let Some(tracker) = &self.parts.tracker else { return };
        let stood = self.parts.stuns.as_ref().map(|stuns| stuns.stalls()).unwrap_or_default();
        let (now, stalls) = (Instant::now(), tracker.stalls().and(stood));
        if let Some((then, before)) = self.throttling.looked.replace((now, stalls)) {
            self.reporter.stalled(&stalls, stalls.total.saturating_sub(before.total), now - then);
        }
    }
}
