//! The heartbeat on the console, and the gaps a guest can feel.
//!
//! A thread sleeps a short tick again and again; the longest time between two of its ticks is what a program
//! in this guest would have waited. While the guest is stopped its clocks stand still with it, under
//! emulation at least: the pause of a switchover shows outside (and in the wall time of a host), the pauses
//! of page faults show here.

use crate::{
    job::{Jobs, locked},
    say,
    words::Wish,
};
use rustix::time::{ClockId, clock_gettime};
use std::{
    fmt::Write as _,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// The longest gaps between ticks, in microseconds: since the last heartbeat, and ever.
static GAP: AtomicU64 = AtomicU64::new(0);
static GAP_EVER: AtomicU64 = AtomicU64::new(0);
static BEATS: AtomicU64 = AtomicU64::new(0);

/// Who is told of every other tick.
static LISTENER: Mutex<Option<UdpSocket>> = Mutex::new(None);

/// Ahead of every workload, so that a gap is the machine's and not the scheduler's.
const FIRST: i32 = -20;

/// Starts the ticks and the heartbeat.
pub(crate) fn start(wish: &Wish, jobs: &Arc<Jobs>) {
    let (ticking, length) = (jobs.clone(), wish.tick);
    thread::spawn(move || tick(&ticking, length));
    let (jobs, every) = (jobs.clone(), wish.beat);
    thread::spawn(move || {
        hurry();
        loop {
            thread::sleep(every);
            BEATS.fetch_add(1, Relaxed);
            say!("WHIMBREL {}", line(&jobs, GAP.swap(0, Relaxed)));
        }
    });
}

/// Puts the calling thread ahead of the workloads.
pub(crate) fn hurry() {
    if let Err(e) = rustix::process::setpriority_process(None, FIRST) {
        say!("WHIMBREL warning: a thread stays at its priority: {e}");
    }
}

fn tick(jobs: &Jobs, length: Duration) {
    hurry();
    let (mut before, mut odd) = (Instant::now(), false);
    loop {
        thread::sleep(length);
        let now = Instant::now();
        let gap = now.duration_since(before).as_micros() as u64;
        GAP.fetch_max(gap, Relaxed);
        GAP_EVER.fetch_max(gap, Relaxed);
        before = now;
        odd = !odd;
        if let (true, Some(socket)) = (odd, locked(&LISTENER).as_ref()) {
            // Nobody may be listening any more: that is no error of ours.
            let done: u64 = jobs.list().iter().map(|job| job.pages.load(Relaxed)).sum();
            let _ = socket.send(&done.to_be_bytes());
        }
    }
}

/// Sends a datagram at every other tick to this address, with the pages that all workloads have done; to
/// nobody, if none is given.
pub(crate) fn tell(address: Option<&str>) -> Result<(), String> {
    let open = |address: &str| {
        let address: SocketAddr = address.parse().map_err(|_| format!("\"{address}\" is not IP:PORT"))?;
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(|e| e.to_string())?;
        socket.set_nonblocking(true).and_then(|()| socket.connect(address)).map_err(|e| e.to_string())?;
        Ok::<_, String>(socket)
    };
    *locked(&LISTENER) = address.map(open).transpose()?;
    Ok(())
}

/// The guest's monotonic time.
pub(crate) fn mono_ms() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

fn wall_ms() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_millis())
}

/// All counters by name; the same for the console and for the control port.
fn counters(jobs: &Jobs, gap_us: u64) -> Vec<(String, String)> {
    let ms = |us: u64| format!("{:.3}", us as f64 / 1000.0);
    let mut all = vec![
        ("beat".to_owned(), BEATS.load(Relaxed).to_string()),
        ("mono_ms".to_owned(), mono_ms().to_string()),
        ("wall_ms".to_owned(), wall_ms().to_string()),
        ("corrupt".to_owned(), jobs.corrupted().to_string()),
    ];
    for job in jobs.list() {
        all.push((format!("{}_pages", job.name), job.pages.load(Relaxed).to_string()));
        all.push((format!("{}_loops", job.name), job.loops.load(Relaxed).to_string()));
    }
    all.push(("gap_ms_max".to_owned(), ms(gap_us)));
    all.push(("gap_ms_ever".to_owned(), ms(GAP_EVER.load(Relaxed))));
    all
}

fn line(jobs: &Jobs, gap_us: u64) -> String {
    let words: Vec<String> = counters(jobs, gap_us).into_iter().map(|(k, v)| format!("{k}={v}")).collect();
    words.join(" ")
}

/// The counters as one JSON object, all numbers; the gap is the one since the last heartbeat.
pub(crate) fn json(jobs: &Jobs) -> String {
    let mut text = String::from("{");
    for (k, v) in counters(jobs, GAP.load(Relaxed)) {
        // Writing to a string cannot fail.
        let _ = write!(text, "{}\"{k}\":{v}", if text.len() > 1 { "," } else { "" });
    }
    text.push('}');
    text
}

/// Forgets the gaps seen so far, so that a test can ask for those of one migration.
pub(crate) fn forget_gaps() {
    GAP.store(0, Relaxed);
    GAP_EVER.store(0, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_and_json_tell_the_same() {
        let jobs = Jobs::default();
        jobs.add("check").pages.store(12, Relaxed);
        let console = line(&jobs, 1500);
        assert!(console.contains(" check_pages=12 ") && console.contains(" gap_ms_max=1.500 "), "{console}");
        let json = json(&jobs);
        assert!(json.starts_with("{\"beat\":") && json.contains(",\"check_pages\":12,"), "{json}");
    }
}
