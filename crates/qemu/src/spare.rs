//! The processors that a guest leaves to others.

use std::{
    io, thread,
    time::{Duration, Instant},
};
use sys::process::PidFd;

/// Intervals shorter than this say nothing.
const SHORT: Duration = Duration::from_millis(50);

/// Looks at what a QEMU process uses for its guest, from one time to the next. Its first thread is left out:
/// it answers the monitor, which a migration asks a lot.
#[derive(Debug)]
pub struct SpareCores {
    guest: Option<PidFd>,
    cores: u32,
    since: Instant,
    used: Duration,
    spare: u32,
}

impl SpareCores {
    /// Beside this process. Begins to look.
    pub fn beside(guest: &PidFd) -> Self {
        let cores = thread::available_parallelism().map_or(1, |n| n.get() as u32);
        let used = used(guest).unwrap_or_default();
        Self { guest: PidFd::open(guest.pid()).ok(), cores, since: Instant::now(), used, spare: 1 }
    }

    /// How many it left since the last time; one at least.
    pub fn now(&mut self) -> u32 {
        let passed = self.since.elapsed();
        if passed < SHORT {
            return self.spare;
        }
        // A process that has ended uses nothing.
        let used = self.guest.as_ref().and_then(|guest| used(guest).ok()).unwrap_or(self.used);
        self.spare = spare(self.cores, used.saturating_sub(self.used), passed);
        (self.since, self.used) = (Instant::now(), used);
        self.spare
    }
}

fn used(guest: &PidFd) -> io::Result<Duration> {
    Ok(guest.cpu_time()?.saturating_sub(guest.main_thread_cpu_time()?))
}

fn spare(cores: u32, used: Duration, passed: Duration) -> u32 {
    let left = f64::from(cores) - used.as_secs_f64() / passed.as_secs_f64();
    // To the nearest: of a processor that is shared, the kernel gives whoever uses less of it all that it
    // wants.
    (left.round() as u32).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_left_what_it_uses() {
        let spare = |cores, percent| spare(cores, Duration::from_millis(percent), Duration::from_millis(100));
        assert_eq!(spare(2, 0), 2, "one that idles");
        assert_eq!(spare(2, 40), 2);
        assert_eq!(spare(2, 60), 1);
        assert_eq!(spare(2, 200), 1, "one at least");
        assert_eq!(spare(2, 400), 1, "more than there is");
        assert_eq!(spare(16, 210), 14);
        assert_eq!(spare(1, 0), 1);
    }

    #[test]
    fn a_process_that_computes_is_seen() {
        // Tests run beside the first thread.
        let me = PidFd::open(std::process::id() as i32).unwrap();
        let mut spare = SpareCores::beside(&me);
        assert_eq!(spare.now(), 1, "nothing is known yet");
        let before = used(&me).unwrap();
        // However busy the machine is: it computes until that is seen.
        let since = Instant::now();
        while used(&me).unwrap() < before + SHORT {
            assert!(since.elapsed() < SHORT * 400, "it computes");
        }
        let (passed, cores) = (since.elapsed(), thread::available_parallelism().unwrap().get() as u32);
        assert!(super::spare(cores, SHORT, passed) >= spare.now(), "what it uses is not left");
    }
}
