//! When the guest's writes are slowed, and to which pace; and when its vCPUs are stunned, because that does
//! not suffice.

use super::SourceDriver;
use crate::{Broken, ports::Stalls, report::Phase, why};
use policy::{Duty, OUTRUN};
use std::time::{Duration, Instant};

/// So long a round must have lasted before it is judged: less shows how its first pages were sent. Again
/// after twice as long, and so on: each look protects anew what the guest writes, which costs it a fault a
/// page.
const JUDGED: Duration = Duration::from_millis(200);

/// What the source knows of governing its guest.
#[derive(Debug, Default)]
pub(super) struct Governing {
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
        // A link that is lost says nothing of how fast it is.
        if !self.may_govern() || self.phase() != Phase::PreCopy || !self.link.is_up() {
            return Ok(());
        }
        let (Some(round), Some(lasted)) = (self.current.clone(), self.story.round_lasts()) else {
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
        match self.governing.pace {
            // A link that got slower, or was only guessed; one that seems faster may only have less to carry.
            Some(pace) if sent_per_s < pace || std::mem::take(&mut self.governing.guessed) => {
                self.govern(sent_per_s)
            }
            Some(_) => Ok(()),
            None => {
                let (judged, again) = self.governing.judged;
                if judged == round.number && lasted < again {
                    return Ok(());
                }
                self.governing.judged = (round.number, lasted * 2);
                self.collect()?;
                let outrun = self.dirty.len() as f64 > OUTRUN * sent as f64;
                let fits = self.rounds.would_fit(self.dirty.bytes(), sent_per_s);
                if outrun && !fits { self.govern(sent_per_s) } else { Ok(()) }
            }
        }
    }

    /// At the end of a round that was not the last, when it is known what was dirtied meanwhile.
    pub(super) fn judge(&mut self) -> Result<(), Broken> {
        if !self.may_govern() {
            return Ok(());
        }
        self.count_stalls();
        let Some((pages, moved_per_s)) = self.rounds.last() else { return Ok(()) };
        self.stun(pages, moved_per_s);
        if self.governing.pace.is_some() || self.dirty.len() as f64 > OUTRUN * pages as f64 {
            let share = policy::share_of_round(
                self.usual_share(),
                self.dirty.len() as f64,
                self.rounds.fit(moved_per_s),
            );
            self.agree(share, Some(moved_per_s));
            return self.govern(moved_per_s);
        }
        Ok(())
    }

    /// At the end of a round: did it shrink as it should, having been governed from its beginning?
    fn stun(&mut self, pages: u64, sent_per_s: f64) {
        let ended = self.current.as_ref().map(|round| round.number);
        let (Some(stuns), Some(tracker)) = (&mut self.parts.stuns, &mut self.parts.tracker) else { return };
        if self.governing.since.is_none() || self.governing.since >= ended {
            return;
        }
        let duty = self.governing.duty.get_or_insert_with(|| Duty::new(stuns.vcpus()));
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
        if !std::mem::replace(&mut self.governing.told, true) {
            self.story.note(told);
        }
    }

    /// Nobody is stunned from now on.
    pub(super) fn calm(&mut self) {
        if let Some(stuns) = &mut self.parts.stuns {
            stuns.calm();
        }
    }

    fn may_govern(&self) -> bool {
        // A guest that may end in post-copy need not be slowed, unless that is kinder.
        let wanted = (!self.options.post_copy() || self.governing_is_kinder()) && !self.governing.unsupported;
        wanted && !self.stopped && self.parts.tracker.as_ref().is_some_and(|tracker| tracker.can_govern())
    }

    /// Before anything was sent.
    pub(super) fn govern_by_guess(&mut self, sent_per_s: f64) -> Result<(), Broken> {
        self.governing.guessed = true;
        self.govern(sent_per_s)
    }

    pub(super) fn is_governed(&self) -> bool {
        self.governing.pace.is_some()
    }

    fn govern(&mut self, sent_per_s: f64) -> Result<(), Broken> {
        let Some(tracker) = &mut self.parts.tracker else { return Ok(()) };
        match tracker.govern(sent_per_s) {
            Ok(()) => {
                if self.governing.pace.replace(sent_per_s).is_none() {
                    self.governing.since = Some(self.current.as_ref().map_or(0, |round| round.number));
                    self.story.governed();
                }
                Ok(())
            }
            // Then it goes on as it did, and ends if it can.
            Err(e) if e.kind() == std::io::ErrorKind::Unsupported => {
                self.governing.unsupported = true;
                Ok(())
            }
            Err(e) => Err(why("slow the guest's writes")(e)),
        }
    }

    pub(super) fn count_stalls(&mut self) {
        let Some(tracker) = &self.parts.tracker else { return };
        let stood = self.parts.stuns.as_ref().map(|stuns| stuns.stalls()).unwrap_or_default();
        let (now, stalls) = (Instant::now(), tracker.stalls().and(stood));
        if let Some((then, before)) = self.governing.looked.replace((now, stalls)) {
            self.story.stalled(&stalls, stalls.total.saturating_sub(before.total), now - then);
        }
    }
}
