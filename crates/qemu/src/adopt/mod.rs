//! Taking charge of a QEMU that somebody else started.
//!
//! Its command line says what it was, its monitor what it is now. Where both agree and nothing in it would be lost on
//! the way, that gives the recipe for the target; else every reason is told, each with what would mend it.

pub(crate) mod cmdline;
pub(crate) mod live;
pub(crate) mod nets;

use crate::{
    cpu, find,
    launch::Belongings,
    qmp::{Qmp, QmpError},
    ram::{self, Layout, RamError},
    recipe,
    vm::{OpenError, Vm},
};
use serde_json::json;
use std::path::Path;
use sys::process::PidFd;

/// A VM that was taken charge of.
#[derive(Debug)]
pub struct Adopted {
    /// The VM.
    pub vm: Vm,
    /// What will be different on the target, in words: a display, a socket, a log that stays behind.
    pub notes: Vec<String>,
}

impl Vm {
    /// Takes charge of the QEMU behind a QMP socket. Changes nothing about its guest.
    pub fn adopt(name: &str, socket: &Path) -> Result<Adopted, OpenError> {
        let mut qmp = Qmp::connect(socket)?;
        let process = find::process_of(&mut qmp)?;
        let mut reasons = Vec::new();

        let layout = match ram::layout(&mut qmp) {
            Ok(layout) => layout,
            Err(error @ RamError::Private { .. }) => {
                reasons.push(error.to_string());
                Layout::default()
            }
            Err(error) => return Err(error.into()),
        };
        let argv = find::command_line(&process)
            .map_err(|cause| OpenError::Refused { vm: name.to_owned(), reasons: vec![cause.to_string()] })?;
        let folder = std::fs::read_link(process.proc_path("cwd")).unwrap_or_default();
        let (read, wrong) = understand(&mut qmp, &process, &argv, &folder)?;
        reasons.extend(wrong);

        let mut recipe = read.recipe;
        recipe.name = name.to_owned();
        recipe.qemu = qmp.version();
        recipe.machine = cpu::with_machine(&recipe.machine, &cpu::pinned_machine(&mut qmp)?);
        recipe.accel = live::accel(&mut qmp)?;
        recipe.cpu_features = cpu::features(&mut qmp)?;
        if !layout.main.is_empty() {
            reasons.extend(recipe::check(&recipe));
        }
        // A device that is refused by its kind is refused as an argument too: the better explained reason stands.
        let mut told = std::collections::BTreeSet::new();
        reasons.retain(|reason| told.insert(reason.clone()));
        if !reasons.is_empty() {
            return Err(OpenError::Refused { vm: name.to_owned(), reasons });
        }
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        qmp.execute("migrate-set-capabilities", events)?;
        let belongings = Belongings { qmp: socket.to_owned(), ..Belongings::default() };
        Ok(Adopted { vm: Vm::new(qmp, process, recipe, belongings, layout), notes: read.notes })
    }
}

/// What a QEMU was by its command line, and everything that hinders it from being migrated, by that and by its own word.
pub(crate) fn understand(
    qmp: &mut Qmp,
    process: &PidFd,
    argv: &[String],
    folder: &Path,
) -> Result<(cmdline::Read, Vec<String>), QmpError> {
    let mut read = cmdline::read(argv, folder);
    let mut reasons = std::mem::take(&mut read.reasons);
    reasons.extend(live::differences(qmp, process, &mut read)?);
    Ok((read, reasons))
}

/// See [`crate::fuzz::command_line`].
pub(crate) fn read(argv: &[String], folder: &Path) -> (crate::Recipe, Vec<String>) {
    let read = cmdline::read(argv, folder);
    (read.recipe, read.reasons)
}
