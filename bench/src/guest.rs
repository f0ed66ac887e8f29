//! What is moved, and what it feels.

use crate::run::{Outran, Terms};
use lab::{Doing, Error, Guest, HandStart, Heard, Progress, Result, Spec, TcpClient, Ticks, Vcpu};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    sync::{Arc, Mutex},
    thread::{self, sleep},
    time::{Duration, Instant, SystemTime},
};
use units::{Bytes, Locked, PAGE_SIZE, Rate};

/// So long before a migration the guest is watched: its pace, undisturbed.
const BEFORE: Duration = Duration::from_millis(500);
/// So long if its pace is what everything is compared with: on shared processors half a second says little.
const BEFORE_LONG: Duration = Duration::from_secs(2);
/// And so long after it: what the migration still does to it is seen.
const AFTER: Duration = Duration::from_millis(300);

/// The command line of both sides' guest: a `q35` with two vCPUs.
pub(crate) fn start(work: &str, memory: Bytes) -> HandStart {
    HandStart { memory, vcpus: 2, ..HandStart::new(spec(work)) }
}

/// The guest, with what makes Linux boot quickly and keep its clock under emulation.
///
/// `pti=on` is for QEMU's sake. Its own migration of an emulated guest (seen on 7.2) loses writes: without
/// it, guests with two vCPUs crash after it (`--work "pti=off …"` shows that). The likely cause: taking the
/// dirty bits leaves entries of the emulated TLB writable, and what is written through them is not sent; a
/// guest with a single address space keeps such entries, page table isolation drops them at each entry to the
/// kernel. (Compare QEMU's later commit "physmem: Fix migration dirty bitmap coherency with TCG memory
/// access".) Whimbrel's tracker is the kernel's.
pub(crate) fn spec(work: &str) -> Spec {
    Spec::new(9, format!("pti=on tsc=reliable nokaslr noreplace-smp cryptomgr.notests {work}"))
}

/// A guest whose client has waited so long for an answer is dead.
const SILENCE: Duration = Duration::from_secs(5);

/// Watches what the guest and its client feel.
pub(crate) struct Feelings<'a> {
    guest: &'a Guest,
    client: TcpClient,
    ticks: Ticks,
    before: Heard,
    /// What one that outruns the link does undisturbed, and how far it was when it began.
    paces: Option<Paces>,
    ready: Option<Readiness>,
    /// Pages that its workloads do in a second while nothing moves.
    pub(crate) work_per_s: f64,
}

/// What a guest that outruns the link got done in a second.
struct Paces {
    link: Rate,
    writes: f64,
    computes: f64,
    since: Progress,
}

/// How long the second vCPU of a guest, which computes, was not held up: ran, or waited for a processor only.
/// Looked at again and again, because the thread ends with its process.
struct Readiness(Arc<Mutex<Vec<(SystemTime, Duration)>>>);

impl Readiness {
    fn watch(pid: u32) -> Result<Self> {
        const GLANCE: Duration = Duration::from_millis(10);
        let (vcpu, seen) = (Vcpu::find(pid, 1, 2)?, Arc::new(Mutex::new(Vec::new())));
        let told = Arc::downgrade(&seen);
        thread::spawn(move || {
            while let (Some(seen), Ok(ready)) = (told.upgrade(), vcpu.ready()) {
                seen.locked().push((SystemTime::now(), ready));
                drop(seen);
                sleep(GLANCE);
            }
        });
        Ok(Self(seen))
    }

    /// As a share of the time until then.
    fn share(&self, until: SystemTime) -> Option<f64> {
        let seen = self.0.locked();
        let ((began, before), (ended, after)) = (seen.first()?, seen.iter().rfind(|(at, _)| *at <= until)?);
        let time = ended.duration_since(*began).ok().filter(|time| !time.is_zero())?;
        Some((*after - *before).as_secs_f64() / time.as_secs_f64())
    }
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
    pub(crate) ticks: f64,
    pub(crate) client: f64,
    pub(crate) guest: f64,
}

impl<'a> Feelings<'a> {
    /// Begins to watch a guest that this QEMU process runs.
    pub(crate) fn begin(guest: &'a Guest, pid: u32, terms: &Terms) -> Result<Self> {
        let every = Duration::from_millis(terms.pulse.client_ms);
        let (client, ticks) = (guest.echo(every)?, guest.ticks()?);
        let heard = || {
            let first = || Ok(Some(ticks.heard()).filter(|heard| heard.longest_gap > Duration::ZERO));
            lab::wait_for("the guest's ticks", SILENCE, first)
        };
        let (first, since) = (heard()?, Instant::now());
        let progress = terms.outruns.map(|link| guest.progress().map(|first| (link, first))).transpose()?;
        sleep(if progress.is_some() { BEFORE_LONG } else { BEFORE });
        let paces = |(link, first): (Rate, Progress)| {
            let since = guest.progress()?;
            let (writes, computes) = (since.writes_per_s(&first), since.computes_per_s(&first));
            Ok::<_, Error>(Paces { link, writes, computes, since })
        };
        let paces = progress.map(paces).transpose()?;
        let before = ticks.heard();
        let work_per_s = (before.work - first.work) as f64 / since.elapsed().as_secs_f64();
        guest.order("forget")?;
        client.forget_gap();
        ticks.forget_gap();
        let ready = terms.outruns.map(|_| Readiness::watch(pid)).transpose()?;
        Ok(Self { guest, client, ticks, before, paces, ready, work_per_s })
    }

    /// Of the time until then, when the guest was stopped or the migration ended, how much its computing vCPU
    /// was not held up.
    pub(crate) fn not_held_up(&self, until: SystemTime) -> Option<f64> {
        self.ready.as_ref()?.share(until)
    }

    /// What became of one that outruns the link, if it can still say so.
    pub(crate) fn outran(&self) -> Option<Outran> {
        let paces = self.paces.as_ref()?;
        let (now, probed) = (self.guest.progress().ok()?, self.guest.probe().ok()?);
        let links = |pages_per_s: f64| pages_per_s * PAGE_SIZE as f64 / paces.link.0 as f64;
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        Some(Outran {
            computing: now.computes_per_s(&paces.since) / paces.computes,
            writing_before: links(paces.writes),
            writing: links(now.writes_per_s(&paces.since)),
            write_p99_ms: ms(probed.write.p99),
            write_max_ms: ms(probed.write.max),
            late_p99_ms: ms(probed.late.p99),
            late_max_ms: ms(probed.late.max),
            ..Outran::default()
        })
    }

    /// Pages that its workloads have done since.
    pub(crate) fn work(&self) -> u64 {
        self.ticks.heard().work.saturating_sub(self.before.work)
    }

    /// What was felt. The guest's memory is right as far as it has looked; it looks at all of it if told to.
    pub(crate) fn end(self, verify: bool) -> Felt {
        sleep(AFTER);
        let gaps = || {
            let seen = self.client.finish(SILENCE)?;
            let ticks = self.ticks.heard().longest_gap;
            let status = self.guest.status()?;
            let gap = status["gap_ms_ever"].as_f64().doing(format!("read the guest's gaps in {status}"))?;
            lab::ensure!(status["corrupt"] == 0, "the guest's memory is right: {status}");
            self.guest.order("ticks")?;
            if verify {
                self.guest.verify()?;
            }
            let ms = |time: Duration| time.as_secs_f64() * 1000.0;
            Ok(Gaps { ticks: ms(ticks), client: ms(seen.longest_gap), guest: gap })
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
