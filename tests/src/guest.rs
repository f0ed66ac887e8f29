//! A guest of the laboratory: who it is, what it was asked to do, and how it is talked to wherever it runs.

use crate::{Doing, Error, Namespace, Result, TcpClient, Ticks, connect};
use serde_json::Value;
use std::{
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// The guest's ports.
const ECHO: u16 = 7;
const CONTROL: u16 = 8;
/// How long a guest under emulation may take to boot on a busy machine.
const BOOT: Duration = Duration::from_secs(120);
/// How long it may take to answer: `verify` reads all that it checks.
const ANSWER: Duration = Duration::from_secs(120);
/// For so long after a migration QEMU has the guest announce itself, and longer.
const ANNOUNCED_MS: f64 = 3000.0;

/// Who a guest is and what it does, from the moment it boots.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Spec {
    /// From 1 on; gives it its addresses.
    pub number: u8,
    /// Words for its kernel command line, such as `whimbrel.check=64M`.
    pub work: String,
}

impl Spec {
    /// The guest with this number, doing `work`.
    pub fn new(number: u8, work: impl Into<String>) -> Self {
        Self { number, work: work.into() }
    }

    /// Its address on the guests' network.
    pub fn ip(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 78, 0, self.number)
    }

    /// Its network card's address.
    pub fn mac(&self) -> String {
        format!("52:54:00:78:00:{:02x}", self.number)
    }

    /// Its kernel command line, on a machine of this kind.
    pub fn command_line(&self, machine: &str) -> String {
        let linux = "console=ttyS0 quiet panic=-1";
        let clock = if machine == "microvm" { self::clock() } else { String::new() };
        let ours = format!("whimbrel.ip={}/24 whimbrel.echo={ECHO} whimbrel.control={CONTROL}", self.ip());
        format!("{linux}{clock} {ours} {}", self.work)
    }
}

/// A microvm has no timer by which Linux could find out how fast its others run: under emulation, where QEMU
/// says nothing either, it would wait for ever. The emulated TSC is the host's, so the host's word will do.
fn clock() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mhz =
        info.lines().find_map(|line| line.strip_prefix("cpu MHz")?.rsplit(':').next()?.trim().parse().ok());
    mhz.map(|mhz: f64| format!(" tsc_early_khz={:.0}", mhz * 1000.0)).unwrap_or_default()
}

/// What a guest's probe felt: it writes a page not written lately each millisecond.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Probed {
    /// How many writes.
    pub count: u64,
    /// How long they took.
    pub write: Times,
    /// How late they began, those counted that it missed because it was held up.
    pub late: Times,
}

/// Of many times, the greatest, and what so many in a hundred do not exceed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Times {
    /// The median.
    pub p50: Duration,
    /// Of 90.
    pub p90: Duration,
    /// Of 99.
    pub p99: Duration,
    /// The greatest.
    pub max: Duration,
}

/// How far a guest's workloads are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// By its own clock.
    pub at: Duration,
    /// Pages that `dirty` has written.
    pub written: u64,
    /// Loops that `compute` has done.
    pub computed: u64,
}

impl Progress {
    /// Pages written a second since then.
    pub fn writes_per_s(&self, since: &Self) -> f64 {
        (self.written - since.written) as f64 / (self.at - since.at).as_secs_f64()
    }

    /// Loops computed a second since then.
    pub fn computes_per_s(&self, since: &Self) -> f64 {
        (self.computed - since.computed) as f64 / (self.at - since.at).as_secs_f64()
    }
}

/// A running guest, talked to over the network from a client's namespace.
#[derive(Debug)]
pub struct Guest {
    spec: Spec,
    client: Namespace,
    control: Mutex<BufReader<TcpStream>>,
}

impl Guest {
    /// Waits until the guest has booted and answers.
    pub fn reach(client: &Namespace, spec: &Spec) -> Result<Self> {
        let stream = connect(client, SocketAddr::from((spec.ip(), CONTROL)), BOOT)?;
        stream.set_read_timeout(Some(ANSWER)).doing("set a timeout")?;
        let guest =
            Self { spec: spec.clone(), client: client.clone(), control: BufReader::new(stream).into() };
        guest.status()?;
        Ok(guest)
    }

    /// Asks it one line and returns its answer.
    pub fn ask(&self, question: &str) -> Result<String> {
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        let what = || format!("ask guest {} to {question}", self.spec.number);
        control.get_mut().write_all(format!("{question}\n").as_bytes()).doing(what())?;
        let mut answer = String::new();
        let n = control.read_line(&mut answer).doing(what())?;
        if n == 0 { Err(Error::new(what(), "it hung up")) } else { Ok(answer.trim_end().to_owned()) }
    }

    /// All its counters, such as `beat`, `corrupt`, `dirty_pages`, `gap_ms_ever`.
    pub fn status(&self) -> Result<Value> {
        let answer = self.ask("status")?;
        serde_json::from_str(&answer).doing(format!("understand the guest's status {answer}"))
    }

    /// One of its counters.
    pub fn count(&self, name: &str) -> Result<f64> {
        self.status()?[name].as_f64().doing(format!("read the guest's counter {name}"))
    }

    /// What its probe felt since it was told to `forget`.
    pub fn probe(&self) -> Result<Probed> {
        let answer = self.ask("probe")?;
        let felt: Value =
            serde_json::from_str(&answer).doing(format!("understand the guest's probe {answer}"))?;
        let times = |kind: &str| {
            let us = |name: &str| {
                let us = felt[kind][name].as_u64().doing(format!("read {kind} {name} in {answer}"))?;
                Ok::<_, Error>(Duration::from_micros(us))
            };
            Ok::<_, Error>(Times { p50: us("p50")?, p90: us("p90")?, p99: us("p99")?, max: us("max")? })
        };
        let count = felt["count"].as_u64().doing(format!("read the count in {answer}"))?;
        Ok(Probed { count, write: times("write_us")?, late: times("late_us")? })
    }

    /// How far its workloads are, by its own clock. That stands still while the guest is stopped.
    pub fn progress(&self) -> Result<Progress> {
        let status = self.status()?;
        let count = |name: &str| status[name].as_u64().unwrap_or_default();
        let at = status["mono_ms"].as_u64().doing(format!("read the guest's clock in {status}"))?;
        let (written, computed) = (count("dirty_pages"), count("compute_loops"));
        Ok(Progress { at: Duration::from_millis(at), written, computed })
    }

    /// Lets it check everything that it can check. The number of pages; an error if any is not what was
    /// written.
    pub fn verify(&self) -> Result<u64> {
        let answer = self.ask("verify")?;
        let pages = answer.strip_prefix("ok pages=").and_then(|pages| pages.parse().ok());
        pages.ok_or_else(|| Error::new(format!("guest {}'s memory is not right", self.spec.number), answer))
    }

    /// An order that is answered with `ok`: `pause [NAME]`, `go [NAME]`, `forget`, `off`.
    pub fn order(&self, order: &str) -> Result<()> {
        match self.ask(order)?.as_str() {
            "ok" => Ok(()),
            answer => Err(Error::new(order, answer)),
        }
    }

    /// Has it switch itself off. Not within the first moments after a migration: Linux 6.1 waits for ever
    /// where it is to announce itself on a network card that it has just shut down.
    pub fn power_off(&self) -> Result<()> {
        let begun = self.count("mono_ms")?;
        let later = || Ok((self.count("mono_ms")? > begun + ANNOUNCED_MS).then_some(()));
        crate::wait_for("the end of announcements", Duration::from_secs(60), later)?;
        self.order("off")?;
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        control.get_mut().write_all(b"\n").doing("let the guest switch itself off")
    }

    /// Waits until it visibly runs: its workloads count on.
    pub fn runs(&self) -> Result<()> {
        let before = self.count("mono_ms")?;
        let on = || Ok((self.count("mono_ms")? > before).then_some(()));
        crate::wait_for("the guest's clock", Duration::from_secs(10), on)
    }

    /// A TCP connection to its echo port, with a message every few milliseconds.
    pub fn echo(&self, every: Duration) -> Result<TcpClient> {
        TcpClient::connect(
            &self.client,
            SocketAddr::from((self.spec.ip(), ECHO)),
            every,
            Duration::from_secs(10),
        )
    }

    /// Listens to its ticks from now on.
    pub fn ticks(&self) -> Result<Ticks> {
        let ticks = Ticks::listen(&self.client)?;
        let me = {
            let control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
            control.get_ref().local_addr().doing("name the client's address")?.ip()
        };
        self.order(&format!("ticks {me}:{}", ticks.port))?;
        Ok(ticks)
    }

    /// Who it is.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }
}
