//! A disk whose storage takes its time: what is written to it is done at once, and said to be done later.

use crate::{
    Doing, Result,
    datastore::view::{Belief, Call, Fate, Job, View, locked},
    wait_for,
};
use std::{
    fs::{self, File, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

const FILE: &str = "disk.img";

/// A mounted directory with one file, `disk.img`, that nobody's cache knows.
pub struct LateDisk {
    path: PathBuf,
    state: Arc<Mutex<State>>,
    _view: View,
}

#[derive(Default)]
struct State {
    latency: Duration,
    /// Writes that were late.
    late: u64,
}

impl LateDisk {
    /// Mounts it at the new directory `at`; its writes are not late yet.
    pub fn mount(at: &Path, bytes: u64) -> Result<Self> {
        let (state, under) = (Arc::<Mutex<State>>::default(), at.with_extension("under"));
        let _view =
            View::mount(at, &under, Belief::Nothing, Late(state.clone())).doing("mount a late disk")?;
        let file = under.join(FILE);
        File::create(&file).and_then(|file| file.set_len(bytes)).doing("make a late disk")?;
        fs::set_permissions(&file, Permissions::from_mode(0o666)).doing("open a late disk to QEMU")?;
        Ok(Self { path: at.join(FILE), state, _view })
    }

    /// The file that a machine takes for its disk.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// From now on writes are done at once.
    pub fn takes_no_time(&self) {
        locked(&self.state).latency = Duration::ZERO;
    }

    /// From now on each write takes so long. Returns when some were seen that did.
    pub fn takes(&self, latency: Duration, within: Duration) -> Result<()> {
        let before = {
            let mut state = locked(&self.state);
            state.latency = latency;
            state.late
        };
        wait_for("late writes", within, || Ok((locked(&self.state).late > before + 2).then_some(())))
    }
}

struct Late(Arc<Mutex<State>>);

impl Fate for Late {
    fn meet(&self, call: Call, _: usize, mut job: Box<dyn Job>) {
        let latency = locked(&self.0).latency;
        if call != Call::Write || latency.is_zero() {
            return job.go();
        }
        let state = self.0.clone();
        thread::spawn(move || {
            job.work(false);
            thread::sleep(latency);
            job.answer();
            locked(&state).late += 1;
        });
    }
}
