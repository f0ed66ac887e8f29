//! Threads of another process that stand still for a moment.
//!
//! A thread of ours seizes them with ptrace, interrupts them, waits, and ends; **its end is what lets them
//! go**. That is the way the kernel goes when we die: it detaches whoever was traced, stopped or about to
//! stop, so there is no other way that could fail or forget one. Nothing is waited for: a thread that cannot
//! stop just now (it waits in the kernel for a disk) is as free after that moment as all others, and one that
//! got a signal instead of our stop gets that signal then, since nobody took it.
//!
//! While it stands still a thread may hold a lock of its process; so the moment is to be short.

use crate::process::PidFd;
use nix::libc;
use std::{
    io, process,
    sync::{
        Arc,
        mpsc::{Sender, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Threads that stand still, until this is dropped or the time is over, whichever comes first.
#[derive(Debug)]
pub struct Stun {
    end: Option<Sender<()>>,
    tracer: Option<JoinHandle<Instant>>,
    tracer_tid: i32,
    began: Instant,
    stunned: usize,
}

impl Stun {
    /// Stops those of `threads` that are threads of `process`, for `time`. Who is traced by somebody else, or
    /// has ended, is left alone.
    pub fn begin(process: &Arc<PidFd>, threads: &[i32], time: Duration) -> io::Result<Self> {
        let (end, ended) = channel::<()>();
        let (tell, told) = channel();
        let (process, threads) = (Arc::clone(process), threads.to_vec());
        let trace = move || {
            crate::urgent::become_urgent();
            let began = Instant::now();
            let stunned = threads.iter().filter(|tid| interrupt(&process, **tid).is_ok()).count();
            let _ = tell.send((rustix::thread::gettid().as_raw_nonzero().get(), began, stunned));
            // Until then, or until the other end is dropped.
            let _ = ended.recv_timeout((began + time).saturating_duration_since(Instant::now()));
            Instant::now()
        };
        let tracer = thread::Builder::new().name("stun".to_owned()).spawn(trace)?;
        let (tracer_tid, began, stunned) = told.recv().map_err(io::Error::other)?;
        Ok(Self { end: Some(end), tracer: Some(tracer), tracer_tid, began, stunned })
    }

    /// How many threads it is.
    pub fn stunned(&self) -> usize {
        self.stunned
    }

    /// Waits until its time is over and all run again. Says how long they stood still, at most.
    pub fn wait(mut self) -> Duration {
        self.release() - self.began
    }

    /// Waits until the tracer has ended, and the kernel has let go of those whom it traced. Says when that
    /// began.
    fn release(&mut self) -> Instant {
        let ended = self.tracer.take().and_then(|tracer| until_gone(tracer, self.tracer_tid));
        ended.unwrap_or_else(Instant::now)
    }
}

impl Drop for Stun {
    fn drop(&mut self) {
        self.end = None;
        if self.tracer.is_some() {
            self.release();
        }
    }
}

/// Waits until a tracer has ended, and the kernel has let go of those whom it traced. Says what it returned.
pub(crate) fn until_gone<T>(tracer: JoinHandle<T>, tid: i32) -> Option<T> {
    // Its panic was printed, and ended it as well.
    let ended = tracer.join().ok();
    // A thread can be joined a little before the kernel is done with it.
    while is_thread(process::id() as i32, tid) {
        thread::yield_now();
    }
    ended
}

/// Traces the thread from now on and has it stop as soon as it can.
pub(crate) fn interrupt(process: &PidFd, tid: i32) -> io::Result<()> {
    // Nothing of a tracer is inherited: `PTRACE_O_EXITKILL` is not used.
    ptrace(libc::PTRACE_SEIZE, tid)?;
    // A number can come to mean another process' thread; once it is traced, it can no more. That one is let
    // go unharmed.
    if !is_thread(process.pid(), tid) || !process.is_alive()? {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    ptrace(libc::PTRACE_INTERRUPT, tid)
}

fn ptrace(request: libc::c_uint, tid: i32) -> io::Result<()> {
    // SAFETY: the requests made through here (SEIZE without options, INTERRUPT) take no pointers.
    let result = unsafe { libc::ptrace(request, tid, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn is_thread(pid: i32, tid: i32) -> bool {
    // SAFETY: takes plain numbers; signal 0 only asks.
    unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, 0) == 0 }
}
