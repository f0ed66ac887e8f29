//! What a person wishes of a running migration.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Duration,
};
use units::Locked;

/// What may be wished of a running migration.
#[derive(Clone, Default)]
pub struct Wishes {
    /// That it ends and the VM stays here.
    pub cancel: Wish,
    /// That a migration in doubt ends with the VM here: a person has fenced the target.
    pub resolve_here: Wish,
}

/// One wish: expressed once, known to everybody who holds a clone.
#[derive(Clone, Default)]
pub struct Wish(Arc<Inner>);

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    set: Condvar,
}

#[derive(Default)]
struct State {
    set: bool,
    then: Vec<Box<dyn FnOnce() + Send>>,
}

impl Wish {
    /// From now on it is wished. Harmless when repeated.
    pub fn express(&self) {
        let mut state = self.0.state.locked();
        state.set = true;
        let then = std::mem::take(&mut state.then);
        drop(state);
        self.0.set.notify_all();
        then.into_iter().for_each(|act| act());
    }

    /// Waits until it is wished, at most `time`; says whether it is.
    pub fn wait(&self, time: Duration) -> bool {
        let state = self.0.state.locked();
        let waited = self.0.set.wait_timeout_while(state, time, |state| !state.set);
        waited.unwrap_or_else(PoisonError::into_inner).0.set
    }

    /// Does `act` when it is wished, at once if it is already.
    pub fn then(&self, act: impl FnOnce() + Send + 'static) {
        let mut state = self.0.state.locked();
        if !state.set {
            state.then.push(Box::new(act));
            return;
        }
        drop(state);
        act();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::mpsc, thread};

    #[test]
    fn whoever_waits_for_a_wish_is_woken() {
        let wish = Wish::default();
        assert!(!wish.wait(Duration::ZERO));
        let (tell, told) = mpsc::channel();
        let early = tell.clone();
        wish.then(move || early.send("early").unwrap());
        let waiter = thread::spawn({
            let wish = wish.clone();
            move || wish.wait(Duration::from_secs(60))
        });
        wish.express();
        wish.express();
        assert!(waiter.join().unwrap());
        wish.then(move || tell.send("late").unwrap());
        assert_eq!(told.iter().collect::<Vec<_>>(), ["early", "late"]);
    }
}
