//! QEMU's command line from a recipe.

use super::{
    Chardev, ChardevKind, Console, Recipe, Screen, allow,
    chain::{self, Chains},
    options::escape,
    secrets,
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// The id of our monitor's socket.
pub(crate) const MONITOR_ID: &str = "whimbrel-qmp";

/// The id of the first serial port's character device.
pub(crate) const CONSOLE_ID: &str = "whimbrel-console";

/// What one host adds to a recipe: names that mean something here only.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Paths {
    /// Where QEMU listens for us.
    pub qmp: PathBuf,
    /// The socket of that name, by the descriptor that QEMU inherits; none: it makes one.
    pub monitor: Option<i32>,
    /// A directory of this QEMU alone: it may make sockets there, and only it and the agent reach them.
    pub sockets: PathBuf,
    /// Where its character devices end, by their ids.
    pub chardevs: BTreeMap<String, Place>,
    /// The channel to its TPM, by the descriptor that QEMU inherits.
    pub tpm: Option<i32>,
    /// The content of each secret, by the descriptor that QEMU inherits.
    pub secrets: BTreeMap<String, i32>,
    /// Where VNC clients connect.
    pub vnc: PathBuf,
    /// The file of each memory block that is backed by one, or by memory that exists already, by the block's
    /// id.
    pub memory: BTreeMap<String, PathBuf>,
    /// The TAP of each network card, by the netdev's id.
    pub taps: BTreeMap<String, String>,
    /// Whether its networks get workers of the kernel's where they want them (`qemu::vhost`).
    pub vhost: bool,
    /// What its images lie on.
    pub(crate) chains: Chains,
}

/// Where a character device ends on this host.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Place {
    /// The socket, if it is one.
    pub socket: PathBuf,
    /// The file for what the guest says, if there is one.
    pub log: PathBuf,
}

/// `-chardev`.
fn chardev(chardev: &Chardev, place: &Place) -> String {
    let path = |path: &Path| escape(&path.to_string_lossy());
    let Chardev { id, kind, mux, .. } = chardev;
    let mut text = match kind {
        ChardevKind::Socket => format!("socket,id={id},path={},server=on,wait=off", path(&place.socket)),
        ChardevKind::Log => format!("file,id={id},path={},append=on", path(&place.log)),
        ChardevKind::Pty => format!("pty,id={id}"),
        ChardevKind::Null => format!("null,id={id}"),
    };
    if *mux {
        text.push_str(",mux=on");
    }
    if chardev.logged && *kind != ChardevKind::Log {
        text.push_str(&format!(",logfile={},logappend=on", path(&place.log)));
    }
    text
}

impl Recipe {
    /// The command line without the program's name. With `incoming`, QEMU waits for a device state and runs
    /// nothing.
    ///
    /// Devices keep the order of the recipe, on which their addresses depend; what they refer to QEMU makes
    /// first.
    pub fn argv(&self, paths: &Paths, incoming: bool) -> Vec<String> {
        let mut argv = Vec::new();
        let mut add = |option: &str, value: String| argv.extend([option.to_owned(), value]);
        add("-name", format!("guest={},process=qemu:{}", self.name, self.name));
        let mut machine = self.machine.clone();
        if let Some(main) = &self.main_memory {
            machine.push_str(&format!(",memory-backend={main}"));
        }
        add("-machine", machine);
        add("-accel", self.accel.word().to_owned());
        add("-cpu", self.cpu.clone());
        add("-smp", self.smp.clone());
        // In bytes: QEMU compares it with the backend's size.
        let memory = format!("size={}", self.memory_bytes() >> 10) + "K";
        add("-m", self.memory_options.clone().unwrap_or(memory));
        for block in &self.memory {
            let (id, bytes) = (&block.id, block.bytes);
            add(
                "-object",
                match paths.memory.get(id) {
                    Some(path) => {
                        let path = escape(&path.to_string_lossy());
                        format!("memory-backend-file,id={id},size={bytes},share=on,mem-path={path}")
                    }
                    None => format!("memory-backend-memfd,id={id},size={bytes},share=on"),
                },
            );
        }
        for secret in secrets::arguments(&self.secrets, &paths.secrets) {
            add("-object", secret);
        }
        for net in &self.nets {
            add("-netdev", net.netdev(paths.taps.get(&net.id).map_or("", String::as_str), paths.vhost));
        }
        let nowhere = Place::default();
        for device in self.all_chardevs() {
            let place = paths.chardevs.get(&device.id).unwrap_or(&nowhere);
            add("-chardev", chardev(&device, place));
        }
        if self.console != Console::None {
            add("-serial", format!("chardev:{CONSOLE_ID}"));
        }
        if let (Some(tpm), Some(channel)) = (&self.tpm, paths.tpm) {
            argv.extend(tpm.argv(channel));
        }
        for argument in &self.arguments {
            argv.push(argument.option.clone());
            argv.extend(
                allow::written(argument)
                    .map(|value| value + &chain::told(argument, &self.arguments, &paths.chains)),
            );
        }
        let mut add = |option: &str, value: String| argv.extend([option.to_owned(), value]);
        add("-display", "none".to_owned());
        if self.screen == Screen::Vnc {
            add("-vnc", format!("unix:{}", escape(&paths.vnc.to_string_lossy())));
        }
        let socket = match paths.monitor {
            Some(fd) => format!("fd={fd}"),
            None => format!("path={}", escape(&paths.qmp.to_string_lossy())),
        };
        add("-chardev", format!("socket,id={MONITOR_ID},{socket},server=on,wait=off"));
        add("-mon", format!("chardev={MONITOR_ID},mode=control"));
        // The stream of `xen-save-devices-state` has no configuration section.
        add("-global", "migration.send-configuration=off".to_owned());
        argv.push("-no-user-config".to_owned());
        if !self.defaults {
            argv.push("-nodefaults".to_owned());
        }
        if incoming {
            argv.extend(["-S", "-incoming", "defer"].map(str::to_owned));
        }
        argv
    }
}
