//! One task at a time for each VM.

use std::{
    collections::HashMap,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};
use units::Locked;

/// How long whoever is to do something waits for who only looks. A look asks QEMU one question; one that
/// takes longer waits for a QEMU that answers nobody.
const LOOK: Duration = Duration::from_secs(10);

/// What is done with a VM.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    /// It is started, stopped or migrated, which may take long: nobody waits for that.
    Task,
    /// QEMU is asked what it does, for a list: that is over at once, and no reason to refuse anything.
    Look,
}

/// Who is busy with what.
#[derive(Default)]
pub(super) struct Leases {
    held: Mutex<HashMap<String, By>>,
    ended: Condvar,
}

/// The right to do something with a VM; ends when dropped.
pub struct Lease {
    leases: Arc<Leases>,
    name: String,
}

impl Leases {
    /// To do something with it; `None` while another task does.
    pub(super) fn take(self: &Arc<Self>, name: &str) -> Option<Lease> {
        self.take_by(name, By::Task)
    }

    /// To look at it; `None` while a task does something with it.
    pub(super) fn look(self: &Arc<Self>, name: &str) -> Option<Lease> {
        self.take_by(name, By::Look)
    }

    fn take_by(self: &Arc<Self>, name: &str, by: By) -> Option<Lease> {
        let end = Instant::now() + LOOK;
        let mut held = self.held.locked();
        while let Some(other) = held.get(name) {
            let left = end.saturating_duration_since(Instant::now());
            if *other == By::Task || left.is_zero() {
                return None;
            }
            held = self.ended.wait_timeout(held, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        held.insert(name.to_owned(), by);
        Some(Lease { leases: self.clone(), name: name.to_owned() })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.leases.held.locked().remove(&self.name);
        self.leases.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::mpsc, thread};

    #[test]
    fn who_is_to_do_something_waits_for_who_looks() {
        let leases: Arc<Leases> = Arc::default();
        let look = leases.look("a");
        assert!(look.is_some() && leases.take("b").is_some());
        let (tell, told) = mpsc::channel();
        let waiting = leases.clone();
        let waiter = thread::spawn(move || {
            let task = waiting.take("a");
            tell.send(task.is_some()).unwrap();
            task
        });
        assert!(told.recv_timeout(Duration::from_millis(20)).is_err(), "it waits");
        drop(look);
        assert_eq!(told.recv(), Ok(true));
        let task = waiter.join().unwrap();
        assert!(leases.take("a").is_none() && leases.look("a").is_none(), "nobody waits for a task");
        drop(task);
        assert!(leases.look("a").is_some());
    }
}
