//! Threads that a guest or a peer waits for.
//!
//! On a host whose processors are all busy an ordinary thread may wait for seconds until it gets one: 2.3 s
//! were seen on Linux 6.18 beside vCPUs and I/O threads that wake each other all the time. An urgent one gets
//! it at once (`sched(7)`, `SCHED_RR`).

use nix::libc;

/// Makes the calling thread urgent. For threads that do little at a time: what they use is taken from guests.
/// Threads and programs that it starts are ordinary. Without the right to (`CAP_SYS_NICE`) it stays ordinary,
/// and that is no error to its work.
pub fn become_urgent() {
    let param = libc::sched_param { sched_priority: 1 };
    // SAFETY: the kernel reads the structure, which lives until the call returns; 0 is the calling thread.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, &raw const param) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, thread};

    /// `policy`, field 41 of `/proc/thread-self/stat` (`proc(5)`).
    fn policy() -> String {
        let stat = fs::read_to_string("/proc/thread-self/stat").unwrap();
        let (_, rest) = stat.rsplit_once(')').unwrap();
        rest.split_whitespace().nth(38).unwrap().to_owned()
    }

    #[test]
    fn an_urgent_threads_own_threads_are_ordinary() {
        let policies = thread::spawn(|| {
            become_urgent();
            (policy(), thread::spawn(policy).join().unwrap())
        });
        let (own, started) = policies.join().unwrap();
        let may = rustix::process::geteuid().is_root();
        assert_eq!((own.as_str(), started.as_str()), (if may { "2" } else { "0" }, "0"));
        assert_eq!(policy(), "0", "it is nobody else's business");
    }
}
