//! Whether programs of this host wait for memory: the kernel's pressure stall information
//! (`Documentation/accounting/psi.rst`).

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags, open},
};
use std::{fs::File, io, io::Write, time::Duration};

/// Tells when some program has waited for memory for 200 ms within two seconds: shorter windows are for
/// programs with `CAP_SYS_RESOURCE`.
#[derive(Debug)]
pub struct Pressure(File);

impl Pressure {
    /// Has the kernel watch. Fails where it cannot (before Linux 4.20, or built or started without it).
    pub fn watch() -> io::Result<Self> {
        let file =
            open("/proc/pressure/memory", OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
        let mut file = File::from(file);
        file.write_all(b"some 200000 2000000\0")?;
        Ok(Self(file))
    }

    /// Waits until that happens, for at most so long. Says whether it has.
    pub fn wait(&self, time: Duration) -> io::Result<bool> {
        let mut files = [PollFd::new(&self.0, PollFlags::PRI)];
        let time = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
        let ready = poll(&mut files, Some(&time))?;
        if files[0].revents().contains(PollFlags::ERR) {
            return Err(io::Error::other("the kernel does not watch for pressure any more"));
        }
        Ok(ready > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_wait_for_pressure_ends_in_time() {
        let Ok(pressure) = Pressure::watch() else {
            return eprintln!("this kernel does not tell of pressure");
        };
        let since = Instant::now();
        pressure.wait(Duration::from_millis(20)).unwrap();
        assert!(since.elapsed() < Duration::from_secs(5));
    }
}
