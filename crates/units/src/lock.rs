//! What becomes of a lock whose holder panicked.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes a lock, also after its holder panicked: a guest may depend on whoever takes it next. So whoever
/// holds a lock leaves what it protects whole at each step.
pub trait Locked<T: ?Sized> {
    /// Waits for the lock and takes it.
    fn locked(&self) -> MutexGuard<'_, T>;
}

impl<T: ?Sized> Locked<T> for Mutex<T> {
    fn locked(&self) -> MutexGuard<'_, T> {
        self.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    #[test]
    fn a_lock_outlives_whoever_panicked_with_it() {
        let lock = Mutex::new(7);
        let panics = || {
            let _held = lock.locked();
            panic!("wanted by the test");
        };
        assert!(catch_unwind(AssertUnwindSafe(panics)).is_err());
        assert_eq!(*lock.locked(), 7);
    }
}
