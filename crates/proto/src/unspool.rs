//! The spool at the target: what of the source's file goes into memory, and when.
//!
//! Before the commit the target follows the file as far as the source says that it is durable: it receives
//! what is to be received, and keeps in mind where the rest is. Once the guest runs, what it lacks may be
//! placed from the file: a page's newest version, if that is the one that the guest had when it was stopped.

use crate::control;
use std::collections::BTreeSet;

/// Up to where the source has written, by its word.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Follow {
    /// Extents in the file.
    pub extents: u64,
    /// The bytes that they take.
    pub bytes: u64,
    /// From which extent on that is received now, if at all.
    pub receive_from: Option<u64>,
    /// Since which turn of the fence that was said.
    pub turn: u32,
}

/// What is done with an extent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Put {
    /// Into memory.
    Receive,
    /// Into the index: it may be placed later.
    Keep,
    /// Nothing: it is of a round that was interrupted, or is sent otherwise.
    Pass,
}

/// What the target may do with the source's file.
#[derive(Clone, PartialEq, Eq, Hash, Default, Debug)]
pub struct TargetSpool {
    /// How often the source's words so far have lost their effect.
    fence: u32,
    /// Extents that were read.
    next: u64,
    /// What the source says that the file is good for from the commit on: extents before the first do not
    /// matter, and the second is where it ended.
    manifest: Option<(u64, u64)>,
    /// Of pages that were in the file when the VM changed hands, versions from here on are current.
    from: Option<u64>,
    placing: bool,
    /// Extents that could not be read: the network has to bring their pages. No older version is taken
    /// instead (I5).
    unreadable: BTreeSet<u64>,
}

impl TargetSpool {
    /// After a restart of this side's agent, by what was recorded.
    pub fn resumed(floor: u64, end: u64) -> Self {
        Self { manifest: Some((floor, end)), placing: true, ..Self::default() }
    }

    /// Nothing of which the source has spoken until now will arrive any more before the commit: it may be
    /// sent otherwise, and be newer there (I5).
    pub fn stop(&mut self) {
        self.fence += 1;
    }

    /// How often that was.
    pub fn turn(&self) -> u32 {
        self.fence
    }

    /// The source says how far its file is, and perhaps what it is good for.
    pub fn said(&mut self, spooled: &control::Spooled) -> Follow {
        let &control::Spooled { extents, bytes, receive, receive_from, .. } = spooled;
        if let Some(manifest) = &spooled.manifest {
            (self.manifest, self.from) = (Some((manifest.floor, manifest.end)), None);
        }
        let receive_from = receive.then_some(receive_from);
        Follow { extents, bytes, receive_from, turn: self.fence }
    }

    /// The source's guest runs on: what was said of the file does not hold.
    pub fn forget(&mut self) {
        (self.manifest, self.from) = (None, None);
    }

    /// The guest runs: from now on the file helps to bring what it lacks, if it is good for that.
    pub fn place(&mut self) {
        self.placing |= self.manifest.is_some();
    }

    /// Extents that were read.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// They are read now.
    pub fn has_read(&mut self, extents: u64) {
        self.next = extents;
    }

    /// What is done with the next extent of what is followed.
    pub fn put(&self, sequence: u64, to: &Follow) -> Result<Put, String> {
        if sequence != self.next {
            return Err(format!("extent {sequence} follows on {}", self.next));
        }
        Ok(match to.receive_from {
            None => Put::Keep,
            Some(from) if to.turn == self.fence && sequence >= from => Put::Receive,
            Some(_) => Put::Pass,
        })
    }

    /// What the file is good for: its floor and its end.
    pub fn manifest(&self) -> Option<(u64, u64)> {
        self.manifest
    }

    /// All that the source has spoken of is read; where trust begins by what is there of it.
    pub fn trust(&mut self, from: u64) {
        self.from = self.manifest.map(|_| from);
    }

    /// Whether what is missing may be placed from it.
    pub fn places(&self) -> bool {
        self.placing && self.from.is_some()
    }

    /// Whether the newest version of a missing page is the one that the guest had when it was stopped; only
    /// later ones are of a page that is outdated.
    pub fn is_current(&self, sequence: u64, outdated: bool) -> bool {
        let (Some((_, end)), Some(from)) = (self.manifest, self.from) else { return false };
        sequence >= (if outdated { end } else { from }) && self.is_readable(sequence)
    }

    /// Whether it was not tried in vain.
    pub fn is_readable(&self, sequence: u64) -> bool {
        !self.unreadable.contains(&sequence)
    }

    /// It could not be read.
    pub fn unread(&mut self, sequence: u64) {
        self.unreadable.insert(sequence);
    }

    /// A datastore that failed once may be back: nobody else may have these pages. Whether there are any.
    pub fn try_again(&mut self) -> bool {
        !std::mem::take(&mut self.unreadable).is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(receive: bool, receive_from: u64) -> control::Spooled {
        control::Spooled { extents: 9, bytes: 9, receive, receive_from, ..Default::default() }
    }

    #[test]
    fn i5_what_was_said_before_the_fence_does_not_arrive() {
        let mut spool = TargetSpool::default();
        spool.has_read(4);
        let (keep, receive, later) =
            (spool.said(&said(false, 0)), spool.said(&said(true, 4)), spool.said(&said(true, 5)));
        for (to, put) in [(keep, Put::Keep), (receive, Put::Receive), (later, Put::Pass)] {
            assert_eq!(spool.put(4, &to), Ok(put));
        }
        assert!(spool.put(5, &keep).is_err(), "an extent is left out");
        spool.stop();
        assert_eq!(spool.put(4, &receive), Ok(Put::Pass));
    }

    #[test]
    fn i5_only_what_is_known_to_be_current_is_placed() {
        let manifest = Some(control::Manifest { floor: 3, outdated: vec![], end: 7 });
        let mut spool = TargetSpool::default();
        spool.place();
        assert!(!spool.places(), "it is good for nothing yet");
        spool.said(&control::Spooled { manifest, ..said(false, 0) });
        spool.place();
        assert!(!spool.places() && !spool.is_current(8, false), "not all of it is read");
        spool.trust(5);
        assert!(spool.places());
        for (sequence, outdated, current) in
            [(4, false, false), (5, false, true), (6, true, false), (7, true, true)]
        {
            assert_eq!(spool.is_current(sequence, outdated), current, "{sequence}");
        }
        spool.unread(7);
        assert!(!spool.is_current(7, false) && spool.try_again() && spool.is_current(7, false));
        spool.forget();
        assert!(!spool.places() && !spool.is_current(8, false));
    }
}
