//! What takes bytes from strangers in here, as functions of bytes: for the crate `fuzz`, and for nothing
//! else.
//!
//! Not behind a feature: cargo builds the workspace with all features that anybody asks for, and what is
//! tested would not be what is shipped.

use crate::{
    adopt::{self, live, names::Names},
    cpu,
    disks::Queues,
    find,
    limits::Limits,
    private,
    qmp::{Qmp, QmpError},
    ram,
    recipe::{Recipe, backing_files},
    snapshot::{Depth, Snapshot},
    state,
};
use rustix::fs::{MemfdFlags, memfd_create};
use std::{
    fs::File,
    io::Write,
    net::Shutdown,
    os::fd::{AsFd, AsRawFd},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};
use sys::process::PidFd;

/// A question that QEMU is asked, by which its answers are read in as many ways.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Question {
    /// Where its RAM blocks lie.
    Layout,
    /// What hinders it from being migrated.
    Hindrances,
    /// In what it differs from its command line.
    Differences,
    /// What its guest is shown.
    Cpu,
    /// Its threads, and by them its process.
    Process,
    /// A descriptor that it is given.
    Descriptor,
    /// Private memory.
    Private,
    /// Whether it has loaded its device state.
    Loaded,
    /// What others can change, and whether they have.
    Changes,
    /// What its disks do.
    Disks,
}

/// All of them.
pub const QUESTIONS: [Question; 10] = [
    Question::Layout,
    Question::Hindrances,
    Question::Differences,
    Question::Cpu,
    Question::Process,
    Question::Descriptor,
    Question::Private,
    Question::Loaded,
    Question::Changes,
    Question::Disks,
];

/// A QEMU's side of a monitor connection: the greeting first, then whatever follows, then the end. Says where
/// that led.
pub fn monitor(said: &[u8], question: Question) -> Result<(), String> {
    let failed = |error: std::io::Error| error.to_string();
    let (ours, mut theirs) = UnixStream::pair().map_err(failed)?;
    // What the socket's buffer does not take is not said.
    theirs.set_nonblocking(true).map_err(failed)?;
    let _ = theirs.write_all(said);
    theirs.shutdown(Shutdown::Write).map_err(failed)?;
    let mut qmp = Qmp::greet(Path::new("/fuzz"), ours, Duration::from_secs(5)).map_err(|e| e.to_string())?;
    let me = PidFd::open(std::process::id().cast_signed()).map_err(failed)?;
    let mut reasons = Vec::new();
    let answered: Result<(), QmpError> = match question {
        Question::Layout => return ram::layout(&mut qmp).map(drop).map_err(|e| e.to_string()),
        Question::Hindrances => live::state(&mut qmp, &mut reasons),
        Question::Differences => {
            let argv = ["qemu", "-nodefaults", "-device", "virtio-rng-pci,id=rng", "-smp", "2"];
            adopt::understand(&mut qmp, &me, &argv.map(str::to_owned), &Names::In(Path::new("/nowhere")))
                .map(drop)
        }
        Question::Cpu => cpu::pinned_machine(&mut qmp)
            .and_then(|_| cpu::features(&mut qmp))
            .map(|it| drop(cpu::missing(&it, &[]))),
        Question::Process => return find::process_of(&mut qmp).map(drop).map_err(|e| e.to_string()),
        Question::Descriptor => {
            let null = File::open("/dev/null").map_err(failed)?;
            qmp.add_fd(null.as_fd()).and_then(|set| qmp.remove_fd_set(set))
        }
        Question::Private => {
            let layout = ram::layout(&mut qmp).map_err(|e| e.to_string())?;
            return private::Places::new(&layout).ask(&mut qmp).map_err(|e| e.to_string());
        }
        // Not by `Known`, which first takes in what came unasked: here all answers are there before their
        // questions.
        Question::Changes => Snapshot::take(&mut qmp, Depth::Whole).and_then(|was| {
            drop(was.hindrances());
            Snapshot::take(&mut qmp, Depth::Short).map(|now| drop(was.differences(&now)))
        }),
        Question::Disks => Queues::find(&mut qmp).and_then(|queues| queues.look(&mut qmp)).map(drop),
        Question::Loaded => return state::wait_loaded(&mut qmp).map_err(|e| e.to_string()),
    };
    answered.map_err(|e| e.to_string())
}

/// Reads a QEMU's command line; relative paths begin in `folder`.
pub fn command_line(argv: &[String], folder: &Path) -> (Recipe, Vec<String>) {
    adopt::read(argv, folder)
}

/// What of a recipe is not granted, files and bridges apart.
pub fn granted(recipe: &Recipe, limits: &Limits) -> Vec<String> {
    limits.check(recipe)
}

/// The backing files of an image with this content.
pub fn image(content: &[u8]) -> Result<usize, String> {
    let memfd = memfd_create("image", MemfdFlags::CLOEXEC).map_err(|e| e.to_string())?;
    let mut file = File::from(memfd);
    file.write_all(content).map_err(|e| e.to_string())?;
    backing_files(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd()))).map(|files| files.len())
}

/// Unpacks private memory of a size that this side knows.
pub fn private(packed: &[u8], size: usize) -> Result<Vec<bool>, String> {
    private::unpack(packed, &mut vec![0; size])
}

/// Packs private memory, zeros left out.
pub fn pack_private(bytes: &[u8]) -> Vec<u8> {
    let pages: Vec<&[u8]> = bytes.chunks(units::PAGE_SIZE).collect();
    private::pack(bytes, |page| !private::is_zero(pages[page]))
}
