//! Taking charge of a QEMU that somebody else started.
//!
//! Its command line says what it was, its monitor what it is now. Where both agree and nothing in it would be
//! lost on the way, that gives the recipe for the target; else every reason is told, each with what would
//! mend it.

pub(crate) mod chardevs;
pub(crate) mod cmdline;
mod confined;
mod devices;
mod dialect;
mod drives;
mod examine;
pub(crate) mod live;
pub(crate) mod names;
pub(crate) mod netdevs;
pub(crate) mod nets;
mod objects;
pub(crate) mod properties;
pub(crate) mod secrets;
mod settings;
pub(crate) mod throttles;
mod tpm;
mod words;

use crate::{
    cpu, find,
    held::{Held, mixed},
    launch::Belongings,
    made_up,
    qmp::{Qmp, QmpError},
    ram::{self, MemoryError},
    recipe::{self, Argument, Recipe},
    vm::{OpenError, Vm},
};
pub use examine::Examined;
use names::Names;
use serde_json::json;
use std::{collections::BTreeMap, path::Path};
use sys::process::PidFd;

/// A VM that was taken charge of.
#[derive(Debug)]
pub struct Adopted {
    /// The VM.
    pub vm: Vm,
    /// What will be different on the target, in words: a display, a socket, a log that stays behind.
    pub notes: Vec<String>,
}

/// A QEMU that was looked at, and nothing more.
struct Looked {
    qmp: Qmp,
    process: PidFd,
    layout: ram::Layout,
    recipe: Recipe,
    reasons: Vec<String>,
    notes: Vec<String>,
}

impl Vm {
    /// Takes charge of the QEMU behind a QMP socket. Changes nothing about its guest.
    pub fn adopt(name: &str, socket: &Path) -> Result<Adopted, OpenError> {
        let Looked { mut qmp, process, layout, recipe, mut reasons, notes } = look(name, socket)?;
        // Last: it is the only thing that QEMU could notice.
        if reasons.is_empty() {
            let tried = attach::Source::open(process.pid(), &layout.main)
                .and_then(|source| source.with_discards(recipe.throws_memory_away()).try_out());
            reasons.extend(tried.err().map(|error| MemoryError(error).to_string()));
        }
        if !reasons.is_empty() {
            return Err(OpenError::Refused { vm: name.to_owned(), reasons });
        }
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        qmp.execute("migrate-set-capabilities", events)?;
        let belongings = Belongings { qmp: socket.to_owned(), ..Belongings::default() };
        Ok(Adopted { vm: Vm::new(qmp, process, recipe, belongings, layout), notes })
    }
}

/// What the QEMU behind a QMP socket is, and what hinders it from being migrated. Asks its monitor and reads
/// `/proc`.
fn look(name: &str, socket: &Path) -> Result<Looked, OpenError> {
    let mut qmp = Qmp::connect(socket)?;
    let process = find::process_of(&mut qmp)?;
    let layout = ram::layout(&mut qmp)?;
    let refused = |why: String| OpenError::Refused { vm: name.to_owned(), reasons: vec![why] };
    let argv = find::command_line(&process).map_err(|cause| refused(cause.to_string()))?;
    let held = Held::by(&process)
        .map_err(|cause| refused(format!("cannot look which files it has open: {cause}")))?
        .with_sets(&mut qmp)?;
    let (read, mut reasons) = understand(&mut qmp, &process, &argv, &Names::Of(&held))?;
    reasons.extend(mixed::up(&mut qmp, &held)?);

    let mut recipe = read.recipe;
    recipe.name = name.to_owned();
    recipe.qemu = qmp.version();
    recipe.machine = cpu::with_machine(&recipe.machine, &cpu::pinned_machine(&mut qmp)?);
    recipe.accel = live::accel(&mut qmp)?;
    recipe.cpu_features = cpu::features(&mut qmp)?;
    reasons.extend(unusable(&recipe));
    let mut told = std::collections::BTreeSet::new();
    reasons.retain(|reason| told.insert(reason.clone()));
    let mut notes = read.notes;
    notes.extend(chardevs::notes(&recipe, &read.was));
    if let Ok(source) = attach::Source::open(process.pid(), &layout.main) {
        notes.extend(of_memory(&source));
    }
    notes.extend(recipe::flash::stores(&recipe).into_iter().map(|store| {
        format!(
            "variable store {store}: a target that does not share it makes a file of its own, which has \
                 the same variables"
        )
    }));
    notes.extend(recipe.what_throws_memory_away().map(|what| {
        format!(
            "it has {what}: while it is moved its writers cannot be slowed, so it may have to move by \
                 post-copy"
        )
    }));
    Ok(Looked { qmp, process, layout, recipe, reasons, notes })
}

/// What of a recipe cannot be used, devices apart that were refused for what they are: one reason is enough.
fn unusable(recipe: &Recipe) -> Vec<String> {
    let refused = |argument: &Argument| {
        let driver = argument.value.as_deref().map(recipe::device_driver).unwrap_or_default();
        argument.option == "-device" && recipe::why_refused(&driver).is_some()
    };
    let arguments = recipe.arguments.iter().filter(|argument| !refused(argument)).cloned().collect();
    recipe::check(&Recipe { arguments, ..recipe.clone() })
}

/// What is special about the memory of a VM.
fn of_memory(source: &attach::Source) -> Vec<String> {
    let mut notes = Vec::new();
    if let Ok(Some(block)) = source.on_disk() {
        notes.push(format!(
            "RAM block {block} is a file on a disk: its writers cannot be slowed, so it may have to move by \
             post-copy; put its mem-path on a tmpfs, or use memory-backend-memfd"
        ));
    }
    if let Some((block, bytes)) = source.huge() {
        let size = units::Bytes(bytes);
        notes.push(format!(
            "RAM block {block} consists of huge pages ({size}), plain ones on the target; a write marks all \
             of one, and its writers cannot be slowed, so it may have to move by post-copy"
        ));
    }
    if let Some(block) = source.private() {
        notes.push(format!(
            "RAM block {block} is private to this QEMU; on the target it is shared memory (memfd). If it \
             moves by post-copy, this process keeps what has not arrived yet: it must live until all of it \
             has"
        ));
    }
    notes
}

/// What a QEMU was by its command line, and everything that hinders it from being migrated, by that and by
/// its own word.
pub(crate) fn understand(
    qmp: &mut Qmp,
    process: &PidFd,
    argv: &[String],
    names: &Names<'_>,
) -> Result<(cmdline::Read, Vec<String>), QmpError> {
    let mut read = cmdline::read(argv, names);
    let mut reasons = std::mem::take(&mut read.reasons);
    reasons.extend(live::differences(qmp, process, names, &mut read)?);
    made_up::carry(qmp, &mut read.recipe)?;
    read.notes.extend(confined::notes(process, argv));
    Ok((read, reasons))
}

/// What a VM is now.
pub(crate) struct Again {
    /// What the target needs.
    pub(crate) recipe: Recipe,
    /// Why it cannot be migrated.
    pub(crate) reasons: Vec<String>,
    /// What will be different on the target.
    pub(crate) notes: Vec<String>,
    /// Its TAPs, by the ids of its networks.
    pub(crate) taps: BTreeMap<String, netdevs::Tap>,
}

/// A VM as it is now. Of one that we started the command line is ours, and `known` says what was meant by it;
/// of others it is read again.
pub(crate) fn again(
    qmp: &mut Qmp,
    process: &PidFd,
    known: &Recipe,
    started_by_us: bool,
) -> Result<Again, QmpError> {
    let unread = |why: String| {
        Ok(Again { recipe: known.clone(), reasons: vec![why], notes: vec![], taps: BTreeMap::new() })
    };
    let held = match Held::by(process) {
        Ok(held) => held.with_sets(qmp)?,
        Err(cause) => return unread(format!("cannot look which files it has open: {cause}")),
    };
    let names = Names::Of(&held);
    let mut read = if started_by_us {
        cmdline::Read::of(known.clone())
    } else {
        let argv = match find::command_line(process) {
            Ok(argv) => argv,
            Err(cause) => return unread(format!("its command line: {cause}")),
        };
        let mut read = cmdline::read_again(&argv, &names, known);
        // What nobody has said there.
        made_up::carry(qmp, &mut read.recipe)?;
        read.notes.extend(confined::notes(process, &argv));
        read
    };
    let mut reasons = std::mem::take(&mut read.reasons);
    reasons.extend(live::differences(qmp, process, &names, &mut read)?);
    reasons.extend(unusable(&read.recipe));
    let mut told = std::collections::BTreeSet::new();
    reasons.retain(|reason| told.insert(reason.clone()));
    read.notes.extend(chardevs::notes(&read.recipe, &read.was));
    let cmdline::Read { recipe, notes, all_taps: taps, .. } = read;
    Ok(Again { recipe, reasons, notes, taps })
}

/// See [`crate::fuzz::command_line`].
pub(crate) fn read(argv: &[String], folder: &Path) -> (crate::Recipe, Vec<String>) {
    let cmdline::Read { recipe, reasons, lost, .. } = cmdline::read(argv, &Names::In(folder));
    (recipe, reasons.into_iter().chain(lost.into_iter().map(|(_, why)| why)).collect())
}
