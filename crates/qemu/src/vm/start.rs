//! A VM's QEMU is started, or found again.

use super::{Handle, OpenError, Vm, lives};
use crate::{
    adopt::properties,
    cpu,
    find::{self, FindError},
    host::Host,
    launch::{self, LaunchError, Started},
    made_up, preflight,
    qmp::{Qmp, QmpError},
    ram,
    recipe::{Recipe, Setting, files::Opened},
    sharing::servers,
    state,
};
use serde_json::json;

impl Vm {
    /// Starts a VM; it runs when this returns.
    pub fn run(recipe: &Recipe, host: &Host) -> Result<Self, LaunchError> {
        Self::start(recipe, host, false, None)
    }

    /// Starts a QEMU that waits for this VM's memory and device state, and runs nothing.
    pub fn incoming(recipe: &Recipe, host: &Host) -> Result<Self, LaunchError> {
        Self::wait_for(recipe, host, None)
    }

    /// The same, with these files: whatever their names lead to by now.
    pub fn incoming_with(recipe: &Recipe, host: &Host, opened: &[Opened]) -> Result<Self, LaunchError> {
        Self::wait_for(recipe, host, Some(opened))
    }

    /// The files of a recipe, by what their names lead to now: for [`Vm::incoming_with`].
    pub fn open_files(recipe: &Recipe) -> Result<Vec<Opened>, Vec<String>> {
        launch::open(recipe)
    }

    fn wait_for(recipe: &Recipe, host: &Host, opened: Option<&[Opened]>) -> Result<Self, LaunchError> {
        let mut vm = Self::start(recipe, host, true, opened)?;
        let opened = vm
            .set(&recipe.settings)
            .and_then(|()| vm.sees_its_exports())
            .and_then(|()| state::open_door(&mut vm.qmp).map_err(|error| error.to_string()));
        match opened {
            Ok(door) => {
                vm.door = Some(door);
                Ok(vm)
            }
            Err(error) => {
                launch::kill(&vm.process);
                vm.belongings.remove_all();
                Err(LaunchError::Unusable { vm: recipe.name.clone(), reasons: vec![error] })
            }
        }
    }

    /// Whether what servers on the network have for it is what they have for its source.
    fn sees_its_exports(&mut self) -> Result<(), String> {
        if self.recipe.exports.is_empty() {
            return Ok(());
        }
        let asked = json!({ "flat": true });
        let nodes = self.qmp.execute("query-named-block-nodes", asked).map_err(|error| error.to_string())?;
        servers::opened(&self.recipe.exports, &nodes).map_or(Ok(()), Err)
    }

    /// Sets what monitors had set where it comes from.
    fn set(&mut self, settings: &[Setting]) -> Result<(), String> {
        for setting in settings {
            let set = match (setting, setting.command()) {
                (_, Some((command, arguments))) => self.qmp.execute(command, arguments).map(drop),
                (Setting::BalloonStatistics { seconds }, None) => {
                    properties::set_balloon(&mut self.qmp, *seconds)
                }
                (_, None) => Ok(()),
            };
            set.map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn start(
        recipe: &Recipe,
        host: &Host,
        incoming: bool,
        opened: Option<&[Opened]>,
    ) -> Result<Self, LaunchError> {
        let Started { mut qmp, process, belongings, grants } = launch::start(recipe, host, incoming, opened)?;
        let ready = prepare(&mut qmp, incoming)
            .and_then(|()| Ok((cpu::pinned_machine(&mut qmp)?, cpu::features(&mut qmp)?)));
        let opened = ready.map_err(OpenError::Qmp).and_then(|ready| Ok((ready, ram::layout(&mut qmp)?)));
        match opened {
            Ok(((machine, features), layout)) => {
                let mut recipe = recipe.clone();
                // An incoming VM keeps what its source recorded: the guest saw that.
                if !incoming {
                    recipe.machine = cpu::with_machine(&recipe.machine, &machine);
                    recipe.cpu_features = features;
                    if let Err(error) = made_up::carry(&mut qmp, &mut recipe) {
                        tracing::warn!(vm = recipe.name, %error, "what QEMU made up is not known");
                    }
                }
                let is_older = preflight::is_older(qmp.version(), recipe.qemu);
                recipe.qemu = qmp.version();
                let vm = Self::new(qmp, process, recipe, belongings, layout);
                Ok(Self { is_older, grants: incoming.then_some(grants), ..vm })
            }
            Err(error) => {
                launch::kill(&process);
                let words =
                    belongings.last_words().map_or(String::new(), |words| format!(" (QEMU said: {words})"));
                belongings.remove_all();
                let reasons = vec![format!("{error}{words}")];
                Err(LaunchError::Unusable { vm: recipe.name.clone(), reasons })
            }
        }
    }

    /// Finds a VM again whose QEMU outlived us.
    pub fn reopen(handle: &Handle) -> Result<Self, OpenError> {
        let gone = || OpenError::Gone { vm: handle.recipe.name.clone(), pid: handle.pid };
        let unseen = |cause| FindError::System {
            socket: handle.belongings.qmp.display().to_string(),
            what: format!("process {}", handle.pid),
            cause,
        };
        if !lives(handle).map_err(unseen)? {
            return Err(gone());
        }
        let mut qmp = Qmp::connect(&handle.belongings.qmp)?;
        let process = find::process_of(&mut qmp)?;
        if process.pid() != handle.pid {
            return Err(gone());
        }
        let layout = ram::layout(&mut qmp)?;
        Ok(Self::new(qmp, process, handle.recipe.clone(), handle.belongings.clone(), layout))
    }
}

/// What must be set before a migration touches it.
fn prepare(qmp: &mut Qmp, incoming: bool) -> Result<(), QmpError> {
    let on = |name: &str| json!({ "capability": name, "state": true });
    let mut capabilities = vec![on("events")];
    if incoming {
        // Disks stay the source's until `cont`.
        capabilities.push(on("late-block-activate"));
    }
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": capabilities })).map(drop)
}
