//! A guest's ticks, heard by somebody whose clock does not stop when the guest does.

use crate::{Doing, Namespace, Result};
use rustix::process::setpriority_process;
use std::{
    net::{Ipv4Addr, UdpSocket},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// What was heard so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Heard {
    /// The longest time in which the guest did not tick.
    pub longest_gap: Duration,
    /// The pages that its workloads have done altogether.
    pub work: u64,
}

/// Listens to the ticks of one guest.
#[derive(Debug)]
pub struct Ticks {
    heard: Arc<Mutex<Heard>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Where it listens.
    pub port: u16,
}

impl Ticks {
    /// Listens inside `namespace`.
    pub fn listen(namespace: &Namespace) -> Result<Self> {
        /// How often silence is noted.
        const GLANCE: Duration = Duration::from_millis(50);
        let socket = namespace.inside(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).doing("open a port"))?;
        socket.set_read_timeout(Some(GLANCE)).doing("set a timeout")?;
        let port = socket.local_addr().doing("name a port")?.port();
        let (heard, stop) = (Arc::new(Mutex::new(Heard::default())), Arc::new(AtomicBool::new(false)));
        let (told, over) = (heard.clone(), stop.clone());
        let thread = thread::spawn(move || {
            // A tick that waits for a processor here would look late. Without the right to it, it may.
            let _ = setpriority_process(None, -20);
            let mut last = None;
            let mut message = [0; 8];
            while !over.load(Ordering::Relaxed) {
                let came = socket.recv(&mut message).is_ok();
                let now = Instant::now();
                let mut heard = locked(&told);
                if let Some(last) = last {
                    heard.longest_gap = heard.longest_gap.max(now.duration_since(last));
                }
                if came {
                    last = Some(now);
                    heard.work = u64::from_be_bytes(message);
                }
            }
        });
        Ok(Self { heard, stop, thread: Some(thread), port })
    }

    /// What was heard so far.
    pub fn heard(&self) -> Heard {
        *locked(&self.heard)
    }

    /// Starts a new measurement of the longest gap.
    pub fn forget_gap(&self) {
        locked(&self.heard).longest_gap = Duration::ZERO;
    }
}

impl Drop for Ticks {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn locked(heard: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}
