//! A disk whose direct reads are finished only when the story says so.
//!
//! A direct read pins the guest's pages when it is submitted, and its data lands there later, through no page
//! table: no tracker sees it. With a real disk the moment is luck. Here a small file system holds the answer
//! back, so that a read can begin before one round of a migration and land after the next.

use crate::{
    Doing, Result,
    datastore::view::{Belief, Call, Fate, Job, View, locked},
    wait_for,
};
use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

const FILE: &str = "disk.img";

/// A mounted directory with one file, `disk.img`.
pub struct SlowDisk {
    path: PathBuf,
    state: Arc<Mutex<State>>,
    _view: View,
}

#[derive(Default)]
struct State {
    holding: bool,
    /// Direct reads that wait.
    held: Vec<Box<dyn Job>>,
    direct_reads: u64,
}

impl SlowDisk {
    /// Mounts it at the new directory `at`, with this content.
    pub fn mount(at: &Path, content: &[u8]) -> Result<Self> {
        let (state, under) = (Arc::<Mutex<State>>::default(), at.with_extension("under"));
        let view = View::mount(at, &under, Belief::Everything, Reads(state.clone()));
        let _view = view.doing("mount a slow disk")?;
        let file = under.join(FILE);
        fs::write(&file, content).doing("fill a slow disk")?;
        fs::set_permissions(&file, Permissions::from_mode(0o666)).doing("open a slow disk to QEMU")?;
        Ok(Self { path: at.join(FILE), state, _view })
    }

    /// The file that a machine takes for its disk.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// From now on direct reads wait.
    pub fn hold(&self) {
        locked(&self.state).holding = true;
    }

    /// Waits until a direct read waits.
    pub fn wait_held(&self, within: Duration) -> Result<()> {
        wait_for("a direct read", within, || Ok((!locked(&self.state).held.is_empty()).then_some(())))
    }

    /// Lets the waiting reads land, with the data that the file has now, and those to come at once.
    pub fn release(&self) {
        let mut state = locked(&self.state);
        state.holding = false;
        std::mem::take(&mut state.held).into_iter().for_each(|read| read.go());
    }

    /// How many direct reads there have been.
    pub fn direct_reads(&self) -> u64 {
        locked(&self.state).direct_reads
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // A read that waits for ever would make its reader unkillable.
        self.release();
    }
}

struct Reads(Arc<Mutex<State>>);

impl Fate for Reads {
    fn meet(&self, call: Call, _: usize, job: Box<dyn Job>) {
        let mut state = locked(&self.0);
        let direct = call == Call::DirectRead;
        state.direct_reads += u64::from(direct);
        if direct && state.holding { state.held.push(job) } else { job.go() }
    }
}
