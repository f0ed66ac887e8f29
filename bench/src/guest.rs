//! What is moved, and what it feels.

use lab::{Doing, Error, Guest, HandStart, Result, Spec, TcpClient};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{thread::sleep, time::Duration};
use units::Bytes;

/// Memory to carry (700 MiB of 1 GiB is in use), self-checking records, and 40 MiB of writes a second: a tenth of what the
/// link carries while two emulated vCPUs take their share of two processors.
pub(crate) const WORK: &str =
    "whimbrel.fill=300M,content=40% whimbrel.check=96M,rate=8M whimbrel.dirty=256M,rate=32M";

/// A client's message every so often; what it sees is no finer.
const EVERY: Duration = Duration::from_millis(2);
/// So long before and after a migration the client listens: the guest is at its steady pace, and what the migration
/// still does to it is seen.
const MARGIN: Duration = Duration::from_millis(300);

/// The command line of both sides' guest: a `q35` with 1 GiB and two vCPUs.
pub(crate) fn start(work: &str) -> HandStart {
    HandStart { memory: Bytes(1 << 30), vcpus: 2, ..HandStart::new(spec(work)) }
}

/// The guest, with what makes Linux boot quickly and keep its clock under emulation.
///
/// `pti=on` is for QEMU's sake. Its own migration of an emulated guest (seen on 7.2) loses writes: without it, guests with
/// two vCPUs crash after it (`--work "pti=off …"` shows that). The likely cause: taking the dirty bits leaves entries of the
/// emulated TLB writable, and what is written through them is not sent; a guest with a single address space keeps
/// such entries, page table isolation drops them at each entry to the kernel. (Compare QEMU's later commit "physmem: Fix
/// migration dirty bitmap coherency with TCG memory access".) Whimbrel's tracker is the kernel's.
pub(crate) fn spec(work: &str) -> Spec {
    Spec::new(9, format!("pti=on tsc=reliable nokaslr noreplace-smp cryptomgr.notests {work}"))
}

/// A guest whose client has waited so long for an answer is dead.
const SILENCE: Duration = Duration::from_secs(5);

/// Watches what the guest and its client feel.
pub(crate) struct Feelings<'a> {
    guest: &'a Guest,
    client: TcpClient,
}

/// How a guest is after it was moved.
pub(crate) enum Felt {
    /// Its memory is right, and this was all that it and its client noticed.
    Fine(Gaps),
    /// It is dead, or its memory is not right.
    Harmed(Error),
}

/// The longest gaps, in milliseconds.
pub(crate) struct Gaps {
    pub(crate) client: f64,
    pub(crate) guest: f64,
}

impl<'a> Feelings<'a> {
    /// Begins to watch.
    pub(crate) fn begin(guest: &'a Guest) -> Result<Self> {
        let client = guest.echo(EVERY)?;
        sleep(MARGIN);
        guest.order("forget")?;
        client.forget_gap();
        Ok(Self { guest, client })
    }

    /// What was felt. The guest's memory is verified, all that it can check.
    pub(crate) fn end(self) -> Felt {
        sleep(MARGIN);
        let gaps = || {
            let seen = self.client.finish(SILENCE)?;
            let status = self.guest.status()?;
            let gap = status["gap_ms_ever"].as_f64().doing(format!("read the guest's gaps in {status}"))?;
            self.guest.verify()?;
            Ok(Gaps { client: seen.longest_gap.as_secs_f64() * 1000.0, guest: gap })
        };
        match gaps() {
            Ok(gaps) => Felt::Fine(gaps),
            Err::<_, Error>(why) => Felt::Harmed(why),
        }
    }
}

/// Holds a process still, so that it takes nothing from who is measured.
pub(crate) fn freeze(pid: u32) -> Result<()> {
    signal(pid, Signal::SIGSTOP)
}

/// Ends [`freeze`].
pub(crate) fn thaw(pid: u32) -> Result<()> {
    signal(pid, Signal::SIGCONT)
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(pid as i32), signal).doing(format!("send {signal} to process {pid}"))
}
