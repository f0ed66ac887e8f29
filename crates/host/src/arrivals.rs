//! Memory that VMs will still take which are on their way here: two that fit one by one may not fit together.

use qemu::room::{self, Room};
use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock, Weak},
    thread::sleep,
    time::{Duration, Instant},
};
use units::Locked;

/// How long a try that its source has given up may take to be over here: its QEMU starts, and is ended.
const TAKEN_BACK: Duration = Duration::from_secs(3);

/// How often it is looked whether it is.
const LOOK: Duration = Duration::from_millis(5);

/// All VMs that are arriving.
#[derive(Clone, Default)]
pub(crate) struct Arrivals(Arc<Mutex<Vec<Arc<Arriving>>>>);

struct Arriving {
    vm: String,
    needed: u64,
    /// Where it lands, once there is a QEMU for it. Gone when the migration is over.
    memory: OnceLock<Weak<attach::Memory>>,
}

/// A VM's memory, kept free for it until it has landed or is dropped.
pub(crate) struct Place {
    arrivals: Arrivals,
    arriving: Arc<Arriving>,
}

impl Arrivals {
    /// Waits until no earlier try to take this VM in keeps its name and its memory: a source that has given
    /// one up may begin the next before all of the last one is taken back.
    pub(crate) fn wait_for_earlier(&self, vm: &str) {
        let end = Instant::now() + TAKEN_BACK;
        while self.is_arriving(vm) && Instant::now() < end {
            sleep(LOOK);
        }
    }

    fn is_arriving(&self, vm: &str) -> bool {
        let mut all = self.locked();
        outstanding(&mut all);
        all.iter().any(|arriving| arriving.vm == vm)
    }

    /// What all that are arriving will still take.
    pub(crate) fn outstanding(&self) -> u64 {
        outstanding(&mut self.locked())
    }

    /// Keeps so much free for a VM, unless it is not there. `overcommit` as in [`room::refuses`].
    pub(crate) fn reserve(&self, vm: &str, needed: u64, overcommit: u32) -> Result<Place, String> {
        self.reserve_within(vm, needed, overcommit, room::least)
    }

    fn reserve_within(
        &self,
        vm: &str,
        needed: u64,
        overcommit: u32,
        room: impl FnOnce() -> Room,
    ) -> Result<Place, String> {
        let mut all = self.locked();
        // What has landed is no longer free: in this order it is counted twice rather than not at all.
        let reserved = outstanding(&mut all);
        if let Some(why) = room::refuses(&room(), needed, reserved, overcommit) {
            return Err(why);
        }
        let arriving = Arc::new(Arriving { vm: vm.to_owned(), needed, memory: OnceLock::new() });
        all.push(arriving.clone());
        Ok(Place { arrivals: self.clone(), arriving })
    }

    fn locked(&self) -> MutexGuard<'_, Vec<Arc<Arriving>>> {
        self.0.locked()
    }
}

/// What all of them will still take. Those that are over are forgotten.
fn outstanding(all: &mut Vec<Arc<Arriving>>) -> u64 {
    let mut sum = 0u64;
    all.retain(|arriving| {
        let taken = match arriving.memory.get().map(Weak::upgrade) {
            None => 0,
            Some(None) => return false,
            Some(Some(memory)) => memory.allocated(),
        };
        sum = sum.saturating_add(arriving.needed.saturating_sub(taken));
        true
    });
    sum
}

impl Place {
    /// It lands there: the place is kept as long as somebody has that.
    pub(crate) fn lands_in(self, memory: &Arc<attach::Memory>) {
        let _ = self.arriving.memory.set(Arc::downgrade(memory));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.arriving.memory.get().is_none() {
            self.arrivals.locked().retain(|arriving| !Arc::ptr_eq(arriving, &self.arriving));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn two_that_fit_one_by_one_are_not_both_taken() {
        let arrivals = Arrivals::default();
        let room = || Room { left: 10 << 30, of: 16 << 30, place: "here".to_owned() };
        let first = arrivals.reserve_within("a", 6 << 30, 100, room).ok().unwrap();
        let why = arrivals.reserve_within("b", 6 << 30, 100, room).err().unwrap();
        assert!(why.contains("needs 6.0 GiB") && why.contains("arriving will take 6.0 GiB of that"), "{why}");
        assert!(arrivals.reserve_within("b", 6 << 30, 150, room).is_ok(), "a host that overcommits takes it");
        drop(first);
        assert!(
            arrivals.reserve_within("b", 6 << 30, 100, room).is_ok(),
            "one that came to nothing keeps nothing"
        );
    }
    #[test]
    fn the_next_try_waits_until_the_last_one_is_taken_back() {
        let arrivals = Arrivals::default();
        let room = || Room { left: 10 << 30, of: 16 << 30, place: "here".to_owned() };
        let given_up = arrivals.reserve_within("a", 6 << 30, 100, room).ok().unwrap();
        let other = arrivals.reserve_within("b", 1 << 30, 100, room);
        let next = thread::scope(|scope| {
            let next = scope.spawn(|| {
                arrivals.wait_for_earlier("a");
                arrivals.reserve_within("a", 6 << 30, 100, room)
            });
            sleep(LOOK * 4);
            assert!(!next.is_finished(), "it has not waited");
            drop(given_up);
            next.join().unwrap()
        });
        assert!(next.is_ok() && other.is_ok());
    }
}
