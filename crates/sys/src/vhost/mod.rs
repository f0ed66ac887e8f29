//! A vhost worker: whether what it writes into guest memory is seen, and whether it waits for memory that is
//! missing, by having one do so.
//!
//! With `-netdev tap,vhost=on` a worker of the kernel's carries packets between a TAP and a guest's ring. It
//! writes as a system call of its owner would: through its owner's page tables, so that both trackers see it,
//! and its own dirty log is not needed. No interface promises that, so it is tried on the kernel at hand: on
//! a process of ours, with a TAP in a network namespace of its own. All of it ends with that process.
//! Whatever fails, comes late or is not as expected means that nothing is proven.

mod abi; // what the kernel is told
mod link; // a TAP, and who sends packets to it
mod worker; // one that is set up

use crate::{
    pagemap::Pagemap,
    patient::page,
    uffd::{Copied, Features, Uffd, Watch},
};
use nix::libc;
use std::{
    collections::BTreeSet,
    io, thread,
    time::{Duration, Instant},
};
use units::PAGE_SIZE;
use worker::{AVAILABLE, DESCRIPTORS, EMPTY, Memory, PATIENCE, USED, Worker, page_of};

/// How long a worker is watched while it is to wait: it would be done in a hundredth of that.
const HESITATION: Duration = Duration::from_millis(20);

/// Between two looks whether it waits or is done.
const LOOK: Duration = Duration::from_millis(1);

/// What tracking asks of the kernel: for shared memory, and for the asynchronous tracker.
const SYNCHRONOUS: Features = Features(Features::WP.0 | Features::WP_SHMEM.0);
const ASYNCHRONOUS: Features = Features(SYNCHRONOUS.0 | Features::WP_UNPOPULATED.0 | Features::WP_ASYNC.0);

/// Why nothing is proven.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// The kernel offers no vhost.
    #[error("there is no /dev/vhost-net (modprobe vhost_net)")]
    Absent,
    /// It is there, but not for us.
    #[error("/dev/vhost-net cannot be opened: {0}")]
    Refused(#[source] io::Error),
    /// A step failed.
    #[error("cannot {what}: {why}")]
    Broken {
        /// The step, such as `set a worker up`.
        what: &'static str,
        /// What went wrong.
        why: io::Error,
    },
    /// It was tried, and a write would be lost.
    #[error("{0}")]
    Unsafe(String),
}

/// What was proven: that the worker's writes are seen by each tracker that this kernel has, and that it waits
/// for missing memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Proven {
    /// Whether the kernel has the asynchronous tracker.
    pub asynchronous: bool,
}

/// Tries it, in a second or so.
pub fn prove() -> Result<Proven, VhostError> {
    synchronous()?;
    missing()?;
    let asynchronous = asynchronous(Memory::Shared)?;
    if asynchronous {
        self::asynchronous(Memory::Private)?;
    }
    Ok(Proven { asynchronous })
}

/// Whether there is the asynchronous tracker; then it sees each page that the worker writes, and no other.
fn asynchronous(memory: Memory) -> Result<bool, VhostError> {
    let mut worker = Worker::start(memory)?;
    let uffd = match worker.patient.uffd(ASYNCHRONOUS) {
        // The kernel's word for a feature that it does not have.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(false),
        uffd => step("make a userfaultfd", uffd)?,
    };
    let tracked = worker.from(DESCRIPTORS);
    // One buffer is there, the other was never touched.
    step("write memory", worker.write(worker.at(page_of(0)), &[EMPTY; PAGE_SIZE]))?;
    let begun = uffd.register(tracked.clone(), Watch::Writes).and_then(|()| uffd.protect(tracked.clone()));
    step("track memory", begun)?;
    let mut pagemap = step("track memory", Pagemap::open(worker.patient.process()))?;
    let mut written = || {
        let mut pages = BTreeSet::new();
        let took = pagemap.take_written(tracked.clone(), |run| {
            let pages_of = (run.start..run.end).step_by(PAGE_SIZE);
            pages.extend(pages_of.map(|at| (at - tracked.start) / PAGE_SIZE as u64 + DESCRIPTORS));
        });
        step("scan memory", took.map(|()| pages))
    };
    for buffer in [0, 1, 1, 0] {
        step("write memory", worker.clear(buffer))?;
        written()?;
        step("receive a packet", receive(&mut worker, buffer))?;
        let pages = written()?;
        let wanted = BTreeSet::from([USED, page_of(buffer)]);
        // Of the ring's pages, this process has written one.
        let beyond: Vec<_> = pages.difference(&wanted).filter(|page| **page != AVAILABLE).collect();
        if !pages.is_superset(&wanted) || !beyond.is_empty() {
            return Err(VhostError::Unsafe(format!(
                "the asynchronous tracker saw a worker write pages {pages:?} of {memory:?} memory, which \
                 wrote {wanted:?}"
            )));
        }
    }
    Ok(true)
}

fn receive(worker: &mut Worker, buffer: u16) -> io::Result<()> {
    worker.post(buffer)?;
    worker.send()?;
    worker.await_done()?;
    arrived(worker, buffer)
}

fn arrived(worker: &mut Worker, buffer: u16) -> io::Result<()> {
    match worker.has_received(buffer)? {
        true => Ok(()),
        false => Err(io::Error::other(format!("buffer {buffer} was used, and no packet is in it"))),
    }
}

/// The synchronous tracker hears of each page before the worker writes it, and the worker waits for the
/// answer.
fn synchronous() -> Result<(), VhostError> {
    let mut worker = Worker::start(Memory::Shared)?;
    let uffd = step("make a userfaultfd", worker.patient.uffd(SYNCHRONOUS))?;
    step("write memory", worker.write(worker.at(page_of(0)), &[EMPTY; PAGE_SIZE]))?;
    // What this process writes itself is before that.
    let tracked = worker.from(USED);
    step("track memory", uffd.register(tracked.clone(), Watch::Writes))?;
    for buffer in [0, 1, 1] {
        step("write memory", worker.clear(buffer))?;
        step("track memory", uffd.protect(tracked.clone()))?;
        step("receive a packet", worker.post(buffer).and_then(|()| worker.send()))?;
        let heard = serve(&worker, &uffd, |address, number| {
            if ![USED, page_of(buffer)].contains(&number) {
                return Err(io::Error::other(format!("page {number} was written by nobody")));
            }
            uffd.unprotect(address..address + PAGE_SIZE as u64)
        })?;
        step("receive a packet", arrived(&mut worker, buffer))?;
        if let Some(page) = [USED, page_of(buffer)].into_iter().find(|page| !heard.contains(page)) {
            return Err(VhostError::Unsafe(format!(
                "the synchronous tracker did not hear of page {page}, which a worker wrote"
            )));
        }
    }
    Ok(())
}

/// The worker waits for pages that are missing, whether it reads or writes them, and goes on with what they
/// hold.
fn missing() -> Result<(), VhostError> {
    let mut worker = Worker::start(Memory::Shared)?;
    let uffd = step("make a userfaultfd", worker.patient.uffd(Features::MISSING_SHMEM))?;
    for buffer in [0, 1] {
        step("write memory", worker.write(worker.at(page_of(buffer)), &[EMPTY; PAGE_SIZE]))?;
    }
    step("watch memory", uffd.register(worker.from(DESCRIPTORS), Watch::Missing))?;
    for (buffer, number) in [(0, page_of(0)), (1, DESCRIPTORS), (0, AVAILABLE), (1, USED)] {
        step("receive a packet", worker.clear(buffer).and_then(|()| worker.post(buffer)))?;
        let mut content = vec![0; PAGE_SIZE];
        let taken = worker.read(worker.at(number), &mut content);
        step("take a page away", taken.and_then(|()| worker.patient.ram().punch(page(number))))?;
        step("receive a packet", worker.send())?;
        let heard = serve(&worker, &uffd, |address, _| match uffd.copy(address, &content)? {
            Copied::All => Ok(()),
            Copied::UpTo(_) => Err(io::Error::other("a missing page was there already")),
        })?;
        step("receive a packet", arrived(&mut worker, buffer))?;
        let mut end = [0; 1];
        step("read memory", worker.read(worker.at(page_of(buffer) + 1) - 1, &mut end))?;
        if heard != BTreeSet::from([number]) || end != [EMPTY] {
            return Err(VhostError::Unsafe(format!(
                "a worker did not wait for page {number}, which was missing, but for {heard:?}"
            )));
        }
    }
    Ok(())
}

/// Answers the worker's faults until it has received its packet; each of them after it has waited for a
/// while. Says which pages they were of.
fn serve(
    worker: &Worker,
    uffd: &Uffd,
    mut answer: impl FnMut(u64, u64) -> io::Result<()>,
) -> Result<BTreeSet<u64>, VhostError> {
    let end = Instant::now() + PATIENCE;
    let mut heard = BTreeSet::new();
    let mut used_is_there = false;
    loop {
        while let Some(fault) = step("hear of a fault", uffd.next(LOOK))? {
            let number = fault.address.saturating_sub(worker.memory.start) / PAGE_SIZE as u64;
            if heard.insert(number) {
                thread::sleep(HESITATION);
                // Where the index itself is missing, reading it would wait as well.
                let waits =
                    (number == USED && !fault.protected) || !step("look at a worker", worker.is_done())?;
                if !waits {
                    return Err(VhostError::Unsafe(format!(
                        "a worker did not wait for page {number}, of which it was to be told"
                    )));
                }
            }
            step("answer a fault", answer(fault.address, number))?;
            used_is_there = true;
        }
        if Instant::now() > end {
            let why = io::Error::new(io::ErrorKind::TimedOut, format!("it took longer than {PATIENCE:?}"));
            return Err(VhostError::Broken { what: "receive a packet", why });
        }
        // Before the first fault the index may be what is missing.
        if used_is_there && step("look at a worker", worker.is_done())? {
            return Ok(heard);
        }
    }
}

fn step<T>(what: &'static str, result: io::Result<T>) -> Result<T, VhostError> {
    result.map_err(|why| VhostError::Broken { what, why })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_vhost_proves_nothing() {
        match prove() {
            // Where it is there, it is as it should be, or it is said.
            Ok(_) => {}
            Err(VhostError::Absent) => assert!(!std::path::Path::new("/sys/module/vhost_net").exists()),
            Err(error) => eprintln!("SKIPPED: {error}"),
        }
    }
}
