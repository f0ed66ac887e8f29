//! A directory on a shared datastore in which everything goes wrong that can.
//!
//! Answers are lost after the work was done, also in the way in which NFS loses them (what comes back is what
//! a second attempt gets); look-ups and listings show what was there before; calls are not done, late, or
//! done while somebody is being killed.

use crate::{
    Doing, Result,
    datastore::view::{Belief, Call, Fate, Job, View, locked},
};
use fuser::Errno;
use std::{
    path::Path,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

/// What becomes of a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// It is done and answered.
    None,
    /// It is done, and the answer is lost (`EIO`).
    LostReply,
    /// It is done twice: the first answer was lost.
    Repeated,
    /// It is not done (`EIO`).
    NotDone,
    /// Only what was there at [`FaultyDir::remember`] is seen.
    Blind,
    /// It is done after this time.
    Late(Duration),
}

type Choose = Box<dyn FnMut(u64, Call) -> Trouble + Send>;

struct State {
    calls: u64,
    choose: Choose,
}

/// A mounted view.
pub struct FaultyDir {
    state: Arc<Mutex<State>>,
    view: View,
}

impl FaultyDir {
    /// Mounts a view of `over` at the new directory `at`. All is well with it at first.
    pub fn mount(at: &Path, over: &Path) -> Result<Self> {
        let state = Arc::new(Mutex::new(State { calls: 0, choose: Box::new(|_, _| Trouble::None) }));
        let view = View::mount(at, over, Belief::Nothing, Faults(state.clone()));
        Ok(Self { state, view: view.doing("mount a view of a directory")? })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.view.path()
    }

    /// From now on `choose` says what becomes of each call, of which it is told the number, from 0 on.
    pub fn trouble(&self, choose: impl FnMut(u64, Call) -> Trouble + Send + 'static) {
        *locked(&self.state) = State { calls: 0, choose: Box::new(choose) };
    }

    /// From now on all is well.
    pub fn well(&self) {
        self.trouble(|_, _| Trouble::None);
    }

    /// What is there now is what a blind look sees.
    pub fn remember(&self) {
        self.view.tree().remember();
    }

    /// How many calls there were since the last change of mind.
    pub fn calls(&self) -> u64 {
        locked(&self.state).calls
    }
}

impl Drop for FaultyDir {
    fn drop(&mut self) {
        self.well();
    }
}

struct Faults(Arc<Mutex<State>>);

impl Fate for Faults {
    fn meet(&self, call: Call, _: usize, mut job: Box<dyn Job>) {
        if matches!(call, Call::Attributes | Call::Resize | Call::Open) {
            return job.go();
        }
        let trouble = {
            let mut state = locked(&self.0);
            let number = state.calls;
            state.calls += 1;
            (state.choose)(number, call)
        };
        match trouble {
            Trouble::None => {}
            Trouble::NotDone => return job.fail(Errno::EIO),
            Trouble::LostReply => {
                job.work(false);
                return job.fail(Errno::EIO);
            }
            Trouble::Repeated => job.work(false),
            Trouble::Blind => {
                job.work(matches!(call, Call::LookUp | Call::List));
                return job.answer();
            }
            Trouble::Late(time) => thread::sleep(time),
        }
        job.go();
    }
}
