//! The process that a VM leaves.

use crate::{
    Ability, AsyncTracker, Error, Lent, Memory, RamBlock, SwitchingTracker, ThrottlingTracker, VcpuStuns,
    handover, region,
};
use ports::Nonce;
use std::{sync::Arc, time::Duration};
use sys::{inject::Borrowed, process::PidFd, pulse::Pulse};
use units::BlockId;

/// A running process whose RAM can be read and tracked. Opening it changes nothing in the process.
#[derive(Debug)]
pub struct Source {
    process: Arc<PidFd>,
    memory: Arc<Memory>,
    pulse: Pulse,
    /// Whether the process may throw memory away meanwhile.
    discards: bool,
}

impl Source {
    /// Finds the RAM `blocks` of process `pid`; `BlockId(n)` is the n-th.
    pub fn open(pid: i32, blocks: &[RamBlock]) -> Result<Self, Error> {
        let process = Arc::new(PidFd::open(pid).map_err(Error::step("get hold", pid))?);
        let memory = Arc::new(Memory::new(region::find(&process, blocks)?, false));
        Ok(Self { process, memory, pulse: Pulse::default(), discards: false })
    }

    /// Has the threads on which the guest may have to wait show there that they get on.
    pub fn with_pulse(self, pulse: Pulse) -> Self {
        Self { pulse, ..self }
    }

    /// Reckons with memory that the process throws away, if `discards`.
    pub fn with_discards(self, discards: bool) -> Self {
        Self { discards, ..self }
    }

    /// Its RAM.
    pub fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.memory)
    }

    /// The process.
    pub fn process(&self) -> &Arc<PidFd> {
        &self.process
    }

    /// A RAM block whose writers cannot be made to wait, because it is a file on a disk.
    pub fn on_disk(&self) -> Result<Option<&str>, Error> {
        self.memory.on_disk().map_err(Error::step("look at the memory", self.process.pid()))
    }

    /// A RAM block of explicit huge pages, and their size: its writers cannot be made to wait either.
    pub fn huge(&self) -> Option<(&str, u64)> {
        self.memory.huge()
    }

    /// A block for another process of this host to map, marked with `nonce`; none if no other process can.
    /// Its content is not touched.
    pub fn lend(&self, id: BlockId, nonce: Nonce) -> Result<Option<Lent>, Error> {
        let step = Error::step(format!("mark RAM block number {}", id.0), self.process.pid());
        handover::lend(&self.memory, id, nonce).map_err(step)
    }

    /// Tries what every migration does to the process: borrows a thread of it and has it make a userfaultfd,
    /// which is closed again. What a debugger, a filter or a lack of rights is against is found before it
    /// matters.
    pub fn try_out(&self) -> Result<(), Error> {
        let pid = self.process.pid();
        let thread = Borrowed::seize(&self.process).map_err(Error::step("borrow a thread", pid))?;
        let made = thread.userfaultfd().map_err(Error::step("watch the memory", pid))?;
        thread.close(made).map_err(Error::step("close a descriptor", pid))?;
        if self.memory.private().is_some() || self.memory.huge().is_some() || self.discards {
            // What follows its writes; nothing is protected yet, so the guest notices nothing.
            self.tracker().map(drop).map_err(|error| match error {
                Error::Kernel { cause, .. } if !self.discards => {
                    let private = self.memory.private().is_some();
                    let ability = if private { Ability::Private } else { Ability::HugePages };
                    Error::Kernel { ability, cause }
                }
                other => other,
            })?;
        }
        Ok(())
    }

    /// A RAM block that only its process can reach: after the switchover of a post-copy its process must live
    /// until all of it has arrived.
    pub fn private(&self) -> Option<&str> {
        self.memory.private()
    }

    /// A tracker of its writes. Borrows a thread of the process for well under a millisecond. One at a time:
    /// while another tracker has its RAM, `begin` fails.
    pub fn tracker(&self) -> Result<AsyncTracker, Error> {
        AsyncTracker::attach(&self.process, &self.memory, self.discards.then_some(&self.pulse))
    }

    /// One that can slow the guest's writes from the start.
    pub fn throttled(&self, how: &Tracking) -> Result<ThrottlingTracker, Error> {
        if let Some((block, _)) = self.memory.huge() {
            return Err(Error::HugePages { block: block.to_owned() });
        }
        ThrottlingTracker::attach(&self.process, &self.memory, how, &self.pulse)
    }

    /// One that begins to do so when it is asked to, and costs the guest little before; unless the kernel has
    /// nothing else, or it is to be like that from the start.
    pub fn switching(&self, how: Tracking) -> Result<SwitchingTracker, Error> {
        SwitchingTracker::attach(&self.process, &self.memory, how, &self.pulse, self.discards)
    }

    /// What stuns those of its vCPU threads that write, none of them for longer than `longest` at a time.
    /// Nobody is stunned yet.
    pub fn stuns(&self, vcpus: Vec<i32>, longest: Duration) -> Result<VcpuStuns, Error> {
        VcpuStuns::new(&self.process, vcpus, longest, &self.pulse)
    }
}

/// How a guest's writes are seen, and slowed if need be.
#[derive(Clone, Debug)]
pub struct Tracking {
    /// So many threads of the guest write at a time, at most.
    pub writers: u32,
    /// None of them waits longer at a time.
    pub max_stall: Duration,
    /// By the synchronous tracker from the start, also where the kernel has the asynchronous one.
    pub synchronous: bool,
    /// How many pages one write opens there; `None`: as many as pays, region by region.
    pub group: Option<u64>,
}
