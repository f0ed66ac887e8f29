//! The asynchronous tracker, where the kernel has it, as long as nobody has to be slowed; then the throttled
//! one.

use crate::{AsyncTracker, Error, Memory, ThrottlingTracker, Tracking, tracker::slices};
use ports::{GuestMemory, Stalls, Tracker};
use std::{io, sync::Arc, time::Duration};
use sys::{process::PidFd, pulse::Pulse};
use units::{BlockId, MemorySet};

/// Tracks a guest's writes, and changes its way when they have to be throttled.
#[derive(Debug)]
pub struct SwitchingTracker {
    process: Arc<PidFd>,
    memory: Arc<Memory>,
    how: Tracking,
    pulse: Pulse,
    /// Another share and longest wait than usual.
    agreed: Option<(f64, Duration)>,
    now: Now,
    /// Nobody knows what was written during a change: all of it counts as written, once.
    unsure: bool,
    /// Its memory is on a disk, of huge pages, or thrown away meanwhile: there is only one way.
    fixed: bool,
}

#[derive(Debug)]
enum Now {
    Free(AsyncTracker),
    Throttled(ThrottlingTracker),
}

impl SwitchingTracker {
    pub(crate) fn attach(
        process: &Arc<PidFd>,
        memory: &Arc<Memory>,
        how: Tracking,
        pulse: &Pulse,
        discards: bool,
    ) -> Result<Self, Error> {
        let on_disk = memory.on_disk().map_err(Error::step("look at the memory", process.pid()))?;
        let huge = memory.huge().map(|(block, _)| block.to_owned());
        let throttled = || match (on_disk, &huge) {
            (Some(block), _) => Err(Error::OnDisk { block: block.to_owned() }),
            (None, Some(block)) => Err(Error::HugePages { block: block.clone() }),
            (None, None) if discards => Err(Error::Discards),
            (None, None) => ThrottlingTracker::attach(process, memory, &how, pulse).map(Now::Throttled),
        };
        let now = if how.synchronous {
            throttled()?
        } else {
            match AsyncTracker::attach(process, memory, discards.then_some(pulse)) {
                // Linux 5.19 to 6.6.
                Err(Error::Kernel { .. }) if memory.private().is_none() => throttled()?,
                attached => Now::Free(attached?),
            }
        };
        let fixed = on_disk.is_some() || huge.is_some() || discards;
        let (process, memory) = (Arc::clone(process), Arc::clone(memory));
        Ok(Self { process, memory, how, pulse: pulse.clone(), agreed: None, now, unsure: false, fixed })
    }

    /// One page has one watcher at a time, so between the two its writes are seen by nobody. They are not
    /// looked for: once the new tracker sees everything, all that the guest ever wrote counts as written.
    /// What did not change since it was sent is found out by its print and costs no bytes; so the guest need
    /// not be stopped for this.
    fn change(&mut self) -> io::Result<()> {
        let Now::Free(free) = &mut self.now else { return Ok(()) };
        let mut throttled = ThrottlingTracker::attach(&self.process, &self.memory, &self.how, &self.pulse)
            .map_err(io::Error::other)?;
        if let Some((share, max_stall)) = self.agreed {
            throttled.agree(share, max_stall);
        }
        self.unsure = true;
        for slice in slices(self.memory.regions()) {
            free.let_go(slice.clone())?;
            throttled.take_over(slice)?;
        }
        self.now = Now::Throttled(throttled);
        Ok(())
    }
}

impl Tracker for SwitchingTracker {
    fn begin(&mut self) -> io::Result<()> {
        match &mut self.now {
            Now::Free(tracker) => tracker.begin(),
            Now::Throttled(tracker) => tracker.begin(),
        }
    }

    fn collect(&mut self, dirty: &mut MemorySet) -> io::Result<()> {
        if self.unsure {
            if matches!(self.now, Now::Free(_)) {
                return Err(io::Error::other("the way of tracking writes was changed, but not to its end"));
            }
            // What the new tracker sees comes on top: it was there before this is read.
            let blocks = (0..).map(BlockId).zip(self.memory.regions());
            for (id, _) in blocks.filter(|(_, region)| !region.is_handed_over()) {
                dirty.block_mut(id).union(&self.memory.present(id)?);
            }
            self.unsure = false;
        }
        match &mut self.now {
            Now::Free(tracker) => tracker.collect(dirty),
            Now::Throttled(tracker) => tracker.collect(dirty),
        }
    }

    fn leave_out(&mut self, blocks: &[BlockId]) -> io::Result<()> {
        match &mut self.now {
            Now::Free(tracker) => tracker.leave_out(blocks),
            Now::Throttled(tracker) => tracker.leave_out(blocks),
        }
    }

    fn can_throttle(&self) -> bool {
        !self.fixed
    }

    fn throttle(&mut self, sent_per_s: f64) -> io::Result<()> {
        if self.fixed {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.change()?;
        match &mut self.now {
            Now::Free(tracker) => tracker.throttle(sent_per_s),
            Now::Throttled(tracker) => tracker.throttle(sent_per_s),
        }
    }

    fn agree(&mut self, share: f64, max_stall: Duration) {
        self.agreed = Some((share, max_stall));
        if let Now::Throttled(tracker) = &mut self.now {
            tracker.agree(share, max_stall);
        }
    }

    fn suspend_throttling(&mut self) -> io::Result<()> {
        match &mut self.now {
            Now::Free(tracker) => tracker.suspend_throttling(),
            Now::Throttled(tracker) => tracker.suspend_throttling(),
        }
    }

    fn resume_throttling(&mut self) {
        match &mut self.now {
            Now::Free(tracker) => tracker.resume_throttling(),
            Now::Throttled(tracker) => tracker.resume_throttling(),
        }
    }

    fn learn(&mut self, unchanged: &MemorySet) {
        match &mut self.now {
            Now::Free(tracker) => tracker.learn(unchanged),
            Now::Throttled(tracker) => tracker.learn(unchanged),
        }
    }

    fn may_make_wait(&self) -> bool {
        match &self.now {
            Now::Free(tracker) => tracker.may_make_wait(),
            Now::Throttled(tracker) => tracker.may_make_wait(),
        }
    }

    fn stalls(&self) -> Stalls {
        match &self.now {
            Now::Free(tracker) => tracker.stalls(),
            Now::Throttled(tracker) => tracker.stalls(),
        }
    }

    fn writers(&mut self) -> Option<Vec<i32>> {
        match &mut self.now {
            Now::Free(tracker) => tracker.writers(),
            Now::Throttled(tracker) => tracker.writers(),
        }
    }
}
