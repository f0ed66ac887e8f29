//! Whether programs of this host wait for memory: the kernel's pressure stall information
//! (`Documentation/accounting/psi.rst`).

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags, open},
};
use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, Write},
    time::{Duration, Instant},
};

/// Where the kernel tells, and is told to.
const MEMORY: &str = "/proc/pressure/memory";

/// So long some program must have waited …
const STALL: Duration = Duration::from_millis(200);

/// … within this time: shorter windows are for programs with `CAP_SYS_RESOURCE`.
const WINDOW: Duration = Duration::from_secs(2);

/// Tells when some program has waited for memory for 200 ms within two seconds.
///
/// The kernel's word alone is not enough: a trigger that was just made may fire at the first stall of a
/// microsecond, because all that was waited before it was made counts (seen on Linux 6.18).
#[derive(Debug)]
pub struct Pressure {
    trigger: File,
    waited: Waited,
}

impl Pressure {
    /// Has the kernel watch. Fails where it cannot (before Linux 4.20, or built or started without it).
    pub fn watch() -> io::Result<Self> {
        let file = open(MEMORY, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
        let mut trigger = File::from(file);
        let (stall, window) = (STALL.as_micros(), WINDOW.as_micros());
        trigger.write_all(format!("some {stall} {window}\0").as_bytes())?;
        let mut waited = Waited::default();
        waited.note(Instant::now(), waited_so_far()?);
        Ok(Self { trigger, waited })
    }

    /// Waits until that happens, for at most so long. Says whether it has.
    pub fn wait(&mut self, time: Duration) -> io::Result<bool> {
        self.waited.note(Instant::now(), waited_so_far()?);
        let mut files = [PollFd::new(&self.trigger, PollFlags::PRI)];
        let time = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
        let ready = poll(&mut files, Some(&time))?;
        if files[0].revents().contains(PollFlags::ERR) {
            return Err(io::Error::other("the kernel does not watch for pressure any more"));
        }
        Ok(ready > 0 && self.waited.is_long(waited_so_far()?))
    }
}

/// How long programs had waited when that was read, for the last window or a little more; oldest first.
#[derive(Debug, Default)]
struct Waited(VecDeque<(Instant, Duration)>);

impl Waited {
    fn note(&mut self, now: Instant, waited: Duration) {
        while self.0.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= WINDOW) {
            self.0.pop_front();
        }
        self.0.push_back((now, waited));
    }

    fn is_long(&self, waited: Duration) -> bool {
        self.0.front().is_some_and(|(_, before)| waited.saturating_sub(*before) >= STALL)
    }
}

/// How long some program waited for memory since the host was started.
fn waited_so_far() -> io::Result<Duration> {
    let text = fs::read_to_string(MEMORY)?;
    total(&text).ok_or_else(|| io::Error::other("the kernel tells of pressure in other words"))
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=MICROSECONDS`
fn total(text: &str) -> Option<Duration> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let total = some.split(' ').find_map(|word| word.strip_prefix("total="))?;
    total.trim().parse().ok().map(Duration::from_micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_for_pressure_ends_in_time() {
        let Ok(mut pressure) = Pressure::watch() else {
            return eprintln!("this kernel does not tell of pressure");
        };
        let since = Instant::now();
        pressure.wait(Duration::from_millis(20)).unwrap();
        assert!(since.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn what_was_waited_before_the_window_does_not_count() {
        let (began, ms) = (Instant::now(), Duration::from_millis);
        let mut waited = Waited::default();
        // Hours before, and nothing since.
        waited.note(began, ms(90_000));
        assert!(!waited.is_long(ms(90_001)));
        assert!(waited.is_long(ms(90_200)));
        // A little all the time is never much within one window.
        for second in 1..20 {
            waited.note(began + ms(second * 1000), ms(90_000 + second * 60));
            assert!(!waited.is_long(ms(90_000 + second * 60 + 50)), "after {second} s");
        }
        // Spread over all of a window it is.
        waited.note(began + ms(20_000), ms(91_240));
        assert!(waited.is_long(ms(91_300)));
    }

    #[test]
    fn the_kernels_word_of_pressure_is_understood() {
        let text = "some avg10=0.00 avg60=1.00 avg300=0.00 total=11284424\nfull avg10=0.00 total=585566\n";
        assert_eq!(total(text), Some(Duration::from_micros(11_284_424)));
        assert_eq!(total("full avg10=0.00 total=5\n"), None);
    }
}
