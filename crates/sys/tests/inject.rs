//! Borrowing a thread leaves its process as it was.

mod common;

use common::Guest;
use nix::libc;
use std::io::ErrorKind;
use std::time::{Duration, Instant};
use sys::inject::Borrowed;

#[test]
#[ignore = "not a test: the process that the tests experiment on"]
fn role() {
    common::play();
}

/// On a busy machine a thread may not be given a processor in time to stop; then it is left to its lender,
/// and is asked again.
fn patiently(mut seize: impl FnMut() -> std::io::Result<Borrowed>) -> Borrowed {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match seize() {
            Err(error)
                if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::PermissionDenied)
                    && Instant::now() < end => {}
            borrowed => return borrowed.unwrap(),
        }
    }
}

fn getpid(guest: &Guest) -> u64 {
    let borrowed = patiently(|| Borrowed::seize_thread(&guest.process, guest.tid));
    borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap()
}

#[test]
fn a_borrowed_thread_makes_our_calls_and_goes_on() {
    let mut guest = Guest::start(1);
    {
        let borrowed = Borrowed::seize_thread(&guest.process, guest.tid).unwrap();
        for _ in 0..3 {
            let pid = borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap();
            assert_eq!(pid, u64::from(guest.process.pid() as u32));
        }
        let error = borrowed.close(12345).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        guest.order("write 0");
        assert!(guest.is_silent(), "a borrowed process waits");
    }
    assert_eq!(guest.answer(), "done");
}

#[test]
fn waiting_with_a_timeout_is_not_disturbed() {
    let mut guest = Guest::start(1);
    for (order, result) in [("poll 400", "0"), ("sleep 400", "0"), ("futex 400", "-1")] {
        guest.order(order);
        for _ in 0..50 {
            getpid(&guest);
        }
        let answer = guest.answer();
        let mut words = answer.split(' ');
        assert_eq!(words.next(), Some(result), "{order}: {answer}");
        let ms: u64 = words.next().unwrap().parse().unwrap();
        assert!((400..600).contains(&ms), "{order} took {ms} ms");
        if let Some(error) = words.next() {
            assert_eq!(error, libc::ETIMEDOUT.to_string(), "{order}");
        }
    }
}

#[test]
fn a_thread_in_user_code_is_borrowed_too_and_loses_no_register() {
    let mut guest = Guest::start(1);
    guest.order("compute 1500");
    let began = Instant::now();
    let mut times = 0;
    while began.elapsed() < Duration::from_millis(1200) {
        assert_eq!(getpid(&guest), guest.process.pid() as u64);
        times += 1;
    }
    assert!(times > 20, "only {times} times");
    assert_eq!(guest.answer(), "0", "wrong results after {times} loans");
}

#[test]
fn signals_that_arrive_meanwhile_are_delivered_once() {
    let mut guest = Guest::start(1);
    let pid = guest.process.pid();
    guest.order("compute 1000");
    let sender = std::thread::spawn(move || {
        let none = libc::sigval { sival_ptr: std::ptr::null_mut() };
        // SAFETY: takes plain numbers.
        (0..2000).filter(|_| unsafe { libc::sigqueue(pid, libc::SIGRTMIN(), none) } == 0).count()
    });
    for _ in 0..100 {
        getpid(&guest);
    }
    let sent = sender.join().unwrap();
    assert_eq!(guest.answer(), "0");
    assert_eq!(guest.ask("signals"), sent.to_string());
}

#[test]
fn a_thread_that_is_lent_already_is_passed_over() {
    let mut guest = Guest::start(1);
    guest.count(1);
    let first = patiently(|| Borrowed::seize(&guest.process));
    let second = patiently(|| Borrowed::seize(&guest.process));
    assert_ne!(first.tid(), second.tid());
}

#[test]
fn a_descriptor_can_be_given() {
    let guest = Guest::start(1);
    let file = tempfile();
    let borrowed = Borrowed::seize(&guest.process).unwrap();
    let n = borrowed.give(std::os::fd::AsFd::as_fd(&file)).unwrap();
    drop(borrowed);
    let link = std::fs::read_link(guest.process.proc_path(format!("fd/{n}"))).unwrap();
    assert!(link.to_str().unwrap().contains("given"), "{}", link.display());
}

fn tempfile() -> std::os::fd::OwnedFd {
    rustix::fs::memfd_create("given", rustix::fs::MemfdFlags::CLOEXEC).unwrap()
}

#[test]
fn a_process_that_is_gone_is_an_error() {
    let process = {
        let guest = Guest::start(1);
        std::sync::Arc::clone(&guest.process)
    };
    assert!(!process.is_alive().unwrap());
    Borrowed::seize(&process).unwrap_err();
}
