//! `KVM_RUN` that comes back: a guest that loops for ever, or that an interpreting KVM hardly moves, is
//! interrupted.
//!
//! The vCPU runs on a thread of its own with every signal blocked, and `KVM_SET_SIGNAL_MASK` opens one of
//! them for as long as the vCPU runs. A timer sends it. So `KVM_RUN` ends with `EINTR`, whether the signal
//! came before or during it, no handler is ever needed, and the signal dies with the thread.

use super::native::used;
use kvm_ioctls::VcpuFd;
use nix::libc;
use std::{
    io,
    mem::{MaybeUninit, zeroed},
    os::fd::AsRawFd,
    ptr::{from_ref, null_mut},
    thread,
    time::{Duration, Instant},
};

/// Runs the vCPU for at most `limit` by the clock on the wall. Says whether it left by itself (or else the
/// time was up), and how much processor time it took.
pub(super) fn run(vcpu: &mut VcpuFd, limit: Duration) -> io::Result<(bool, Duration)> {
    thread::scope(|scope| {
        let runner = thread::Builder::new().name("tiny-vcpu".into()).spawn_scoped(scope, || {
            block_all_signals()?;
            let signal = libc::SIGRTMAX();
            open_to(vcpu, signal)?;
            let _timer = Timer::start(signal, limit)?;
            let (began, before) = (Instant::now(), used()?);
            let took = || used().map(|now| now.saturating_sub(before));
            loop {
                match vcpu.run().map(drop).map_err(io::Error::from) {
                    Ok(()) => return Ok((true, took()?)),
                    // A debugger that stops us interrupts the call too; only the deadline ends it.
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                        if began.elapsed() >= limit {
                            return Ok((false, took()?));
                        }
                    }
                    Err(e) => return Err(e),
                }
            }
        })?;
        runner.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Opens this thread to one signal for as long as the vCPU runs: `KVM_SET_SIGNAL_MASK`.
fn open_to(vcpu: &VcpuFd, signal: i32) -> io::Result<()> {
    /// The kernel's struct ends in an array without a length, which does not count in the call's number.
    const SET_SIGNAL_MASK: u64 = 0x4004_ae8b;
    /// `struct kvm_signal_mask` with the kernel's 64 signals.
    #[repr(C, packed)]
    struct SignalMask {
        len: u32,
        blocked: u64,
    }
    let mask = SignalMask { len: 8, blocked: !(1u64 << (signal - 1)) };
    // SAFETY: the kernel reads the length and as many bytes behind it.
    match unsafe { libc::ioctl(vcpu.as_raw_fd(), SET_SIGNAL_MASK as _, from_ref(&mask)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn block_all_signals() -> io::Result<()> {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigfillset` initialises the set that `pthread_sigmask` then reads; a null old set is allowed.
    let result = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// Sends a signal to the thread that started it, and goes on sending it: a debugger may swallow the first.
struct Timer(libc::timer_t);

impl Timer {
    fn start(signal: i32, after: Duration) -> io::Result<Self> {
        // SAFETY: all zeros is a valid `sigevent`; it and `id` live across the call. `gettid` cannot fail.
        let timer = unsafe {
            let mut event: libc::sigevent = zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal;
            event.sigev_notify_thread_id = libc::gettid();
            let mut id: libc::timer_t = zeroed();
            if libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut id) != 0 {
                return Err(io::Error::last_os_error());
            }
            Self(id)
        };
        // A zero value would disarm it.
        let after = after.max(Duration::from_nanos(1));
        let value = libc::timespec { tv_sec: after.as_secs() as _, tv_nsec: after.subsec_nanos().into() };
        let again = libc::timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        let setting = libc::itimerspec { it_interval: again, it_value: value };
        // SAFETY: `timer` owns a live timer; `setting` is read only; a null old setting is allowed.
        match unsafe { libc::timer_settime(timer.0, 0, from_ref(&setting), null_mut()) } {
            0 => Ok(timer),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: a timer that `start` created and nobody else deletes.
        unsafe { libc::timer_delete(self.0) };
    }
}
