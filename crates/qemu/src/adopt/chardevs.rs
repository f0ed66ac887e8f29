//! Character devices by the command line, and by QEMU's own word: what they are, who uses them, and what
//! becomes of each on the target.

use crate::{
    qmp::{Qmp, QmpError},
    recipe::{
        Argument, Chardev, ChardevKind, Console, Recipe, is_id,
        options::{self, get, is_on},
    },
};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};

/// A character device as the command line says it.
#[derive(Debug)]
struct Said {
    id: String,
    backend: String,
    mux: bool,
    logged: bool,
    argument: Argument,
}

/// Everything on a command line that a character device stands behind.
#[derive(Debug, Default)]
pub(super) struct Ports {
    chardevs: Vec<Said>,
    serial: Vec<String>,
    parallel: Vec<String>,
    debug: Vec<String>,
    /// Ids that monitors use.
    monitors: Vec<String>,
    /// Monitors that stay behind without being ours.
    left: Vec<String>,
    /// Whether one of them is such as we use.
    has_control: bool,
    /// Ids whose users have a reason of their own.
    others: Vec<String>,
}

/// What a character device was, for people.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Was {
    pub(super) id: String,
    pub(super) words: String,
}

/// What is found out about them.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) notes: Vec<String>,
    pub(super) reasons: Vec<String>,
    pub(super) was: Vec<Was>,
    /// All ids of the command line.
    pub(super) known: BTreeSet<String>,
}

/// What a back end becomes on the target; or why it cannot follow.
fn kind(backend: &str) -> Result<ChardevKind, &'static str> {
    Ok(match backend {
        "socket" | "unix" | "tcp" | "telnet" | "tn3270" | "websocket" | "wss" | "vsock" | "fd" | "udp"
        | "pipe" | "serial" | "tty" | "parallel" | "parport" | "hub" => ChardevKind::Socket,
        "pty" => ChardevKind::Pty,
        "file" | "stdio" | "vc" | "con" | "console" | "stdout" => ChardevKind::Log,
        "null" | "spicevmc" | "spiceport" | "qemu-vdagent" | "dbus" | "braille" | "ringbuf" | "memory" => {
            ChardevKind::Null
        }
        "msmouse" | "wctablet" | "testdev" => return Err("QEMU does not move what it is in the middle of"),
        _ => return Err("it is not known what that is"),
    })
}

/// The back end in a short form such as `unix:PATH,server`.
fn short(text: &str) -> &str {
    match text.split([':', ',']).next().unwrap_or_default() {
        "" => "",
        device if device.starts_with("/dev/") => "serial",
        backend => backend,
    }
}

impl Ports {
    /// Takes an option if it concerns character devices; says whether it did.
    pub(super) fn take(&mut self, option: &str, value: &str) -> bool {
        match option {
            "-chardev" => {
                let parsed = options::parse(value, "backend");
                // In JSON, the kind is within.
                let backend = get(&parsed, "backend").or(get(&parsed, "backend.type"));
                self.chardevs.push(Said {
                    id: get(&parsed, "id").unwrap_or_default().to_owned(),
                    backend: backend.unwrap_or_default().to_owned(),
                    mux: get(&parsed, "mux").is_some_and(is_on),
                    logged: parsed.iter().any(|(key, _)| key.ends_with("logfile")),
                    argument: Argument::new(option, value),
                });
            }
            "-serial" => {
                let bare = self.with_monitor(value);
                self.serial.push(bare);
            }
            "-parallel" => {
                let bare = self.with_monitor(value);
                self.parallel.push(bare);
            }
            "-debugcon" => {
                let bare = self.with_monitor(value);
                self.debug.push(bare);
            }
            "-mon" | "-monitor" | "-qmp" | "-qmp-pretty" => self.monitor(option, value),
            _ => return false,
        }
        true
    }

    /// One that a device of another process' uses: it is told of with that.
    pub(super) fn used_elsewhere(&mut self, value: &str) {
        self.others.extend(get(&options::parse(value, "type"), "chardev").map(str::to_owned));
    }

    /// `mon:` puts a monitor beside a port.
    fn with_monitor(&mut self, value: &str) -> String {
        match value.strip_prefix("mon:") {
            Some(bare) => {
                self.left.push(value.to_owned());
                bare.to_owned()
            }
            None => value.to_owned(),
        }
    }

    fn monitor(&mut self, option: &str, value: &str) {
        if value == "none" {
            return;
        }
        let parsed = options::parse(value, "chardev");
        let used = get(&parsed, "chardev").unwrap_or_default();
        self.monitors.push(used.strip_prefix("chardev:").unwrap_or(used).to_owned());
        let control = option.starts_with("-qmp") || get(&parsed, "mode") == Some("control");
        if control && !self.has_control {
            self.has_control = true;
        } else {
            self.left.push(format!("{option} {value}"));
        }
    }

    /// Writes into the recipe what all of them are on the target. `nographic`: the machine's own serial port
    /// goes to a terminal.
    pub(super) fn finish(mut self, recipe: &mut Recipe, nographic: bool) -> Found {
        let mut found = Found::default();
        let users = Users::of(recipe, &self);
        // A PC has a serial port unless it is told to have none.
        if self.serial.is_empty() && recipe.defaults && !users.has_serial_device {
            let usual = if nographic { "stdio" } else { "vc" };
            self.serial.push(usual.to_owned());
        }
        if !self.left.is_empty() {
            found.notes.push(format!(
                "its monitors ({}) stay behind; `whimbrel show` says where the one on the target is",
                self.left.join(", ")
            ));
        }
        let mut taken = BTreeSet::new();
        let serial = std::mem::take(&mut self.serial);
        for (n, port) in serial.iter().enumerate() {
            let once = port.strip_prefix("chardev:").is_none_or(|id| users.count(id) == 1);
            if n == 0
                && once
                && let Some((id, console, words)) = self.console(port)
            {
                recipe.console = console;
                taken.extend(id);
                found.was.push(Was { id: crate::recipe::CONSOLE_ID.to_owned(), words });
                continue;
            }
            self.port("-serial", &format!("serial{n}"), port, recipe, &mut found);
        }
        for (n, port) in std::mem::take(&mut self.parallel).iter().enumerate() {
            self.port("-parallel", &format!("parallel{n}"), port, recipe, &mut found);
        }
        for port in std::mem::take(&mut self.debug) {
            self.port("-debugcon", "debugcon", &port, recipe, &mut found);
        }
        found.known.extend(self.chardevs.iter().map(|said| said.id.clone()));
        for said in self.chardevs {
            let idle = users.count(&said.id) == 0;
            let elsewhere = self.monitors.contains(&said.id) || self.others.contains(&said.id);
            if taken.contains(&said.id) || idle && elsewhere {
                continue;
            }
            if matches!(said.backend.as_str(), "ringbuf" | "memory") {
                recipe.arguments.insert(0, said.argument);
                continue;
            }
            match kind(&said.backend) {
                Ok(kind) => {
                    recipe.chardevs.push(Chardev {
                        id: said.id.clone(),
                        kind,
                        mux: said.mux && users.count(&said.id) > 1,
                        logged: said.logged,
                    });
                    found.was.push(Was { id: said.id, words: said.backend });
                }
                Err(why) => found
                    .reasons
                    .push(format!("character device {} ({}) cannot follow: {why}", said.id, said.backend)),
            }
        }
        found
    }

    /// The first serial port as the console: the chardev that it takes, what it is, and what it was; none if
    /// it is no such thing.
    fn console(&self, port: &str) -> Option<(Option<String>, Console, String)> {
        let of = |backend: &str| match kind(backend).ok()? {
            ChardevKind::Socket => Some(Console::Socket),
            ChardevKind::Pty => Some(Console::Pty),
            ChardevKind::Log => Some(Console::File),
            ChardevKind::Null => None,
        };
        match port.strip_prefix("chardev:") {
            Some(id) => {
                let said = self.chardevs.iter().find(|said| said.id == id)?;
                Some((Some(id.to_owned()), of(&said.backend)?, port.to_owned()))
            }
            None => Some((None, of(short(port))?, port.to_owned())),
        }
    }

    /// A port that is no console.
    fn port(&self, option: &str, id: &str, port: &str, recipe: &mut Recipe, found: &mut Found) {
        let mut pass = |value: String| match option {
            "-debugcon" if value == "none" => {}
            "-debugcon" => {
                let id = value.strip_prefix("chardev:").unwrap_or(id);
                let device = format!("isa-debugcon,iobase=0xe9,id=debugcon,chardev={id}");
                recipe.arguments.push(Argument::new("-device", device));
            }
            _ => recipe.arguments.push(Argument::new(option, value)),
        };
        if matches!(port, "none" | "null") && option != "-debugcon" || port == "none" {
            return pass(port.to_owned());
        }
        if let Some(used) = port.strip_prefix("chardev:") {
            if !self.chardevs.iter().any(|said| said.id == used) {
                found.reasons.push(format!("{option} {port}: there is no such character device"));
            }
            return pass(port.to_owned());
        }
        match kind(short(port)) {
            Ok(kind) => {
                let id = if self.chardevs.iter().any(|said| said.id == id) {
                    format!("{id}-port")
                } else {
                    id.to_owned()
                };
                pass(format!("chardev:{id}"));
                recipe.chardevs.push(Chardev::new(id.clone(), kind));
                found.was.push(Was { id, words: port.to_owned() });
            }
            Err(why) => found.reasons.push(format!("{option} {port} cannot follow: {why}")),
        }
    }
}

/// Who uses which character device.
struct Users {
    ids: Vec<String>,
    /// Whether there is a serial port that was asked for as a device.
    has_serial_device: bool,
}

impl Users {
    fn of(recipe: &Recipe, ports: &Ports) -> Self {
        let mut ids = Vec::new();
        let mut has_serial_device = false;
        for argument in recipe.arguments.iter().filter(|argument| argument.option == "-device") {
            let parsed = options::parse(argument.value.as_deref().unwrap_or_default(), "driver");
            has_serial_device |= get(&parsed, "driver") == Some("isa-serial");
            ids.extend(parsed.into_iter().filter(|(key, _)| key.starts_with("chardev")).map(|(_, id)| id));
        }
        let fixed = ports.serial.iter().chain(&ports.parallel).chain(&ports.debug);
        ids.extend(fixed.filter_map(|port| port.strip_prefix("chardev:").map(str::to_owned)));
        Self { ids, has_serial_device }
    }

    fn count(&self, id: &str) -> usize {
        self.ids.iter().filter(|used| *used == id).count()
    }
}

/// Has the recipe follow what QEMU has now: others can add character devices, and change them.
pub(super) fn follow(
    qmp: &mut Qmp,
    recipe: &mut Recipe,
    known: &BTreeSet<String>,
    reasons: &mut Vec<String>,
) -> Result<(), QmpError> {
    let answer = qmp.execute("query-chardev", json!({}))?;
    let list = answer.as_array().into_iter().flatten();
    let live: BTreeMap<String, String> = list
        .filter_map(|device| {
            Some((device["label"].as_str()?.to_owned(), device["filename"].as_str()?.to_owned()))
        })
        .collect();
    reasons.extend(compare(&live, recipe, known));
    reasons.extend(debugged(&live));
    // Those that were removed. (Of a port that is no character device of its own, the name here need not be
    // QEMU's.)
    let ours = known.is_empty();
    recipe.chardevs.retain(|device| {
        live.contains_key(&device.id) || !(ours || known.contains(&device.id)) || live.is_empty()
    });
    Ok(())
}

/// `live`: the names of what they lead to, by their ids.
fn compare(live: &BTreeMap<String, String>, recipe: &mut Recipe, known: &BTreeSet<String>) -> Vec<String> {
    let backend = |id: &str| {
        let name = live.get(id)?;
        // Several devices share what is called so.
        let name = if name == "mux" { live.get(&format!("{id}-base"))? } else { name };
        Some(short(name.strip_prefix("disconnected:").unwrap_or(name)).to_owned())
    };
    for device in &mut recipe.chardevs {
        if let Some(Ok(now)) = backend(&device.id).map(|backend| kind(&backend)) {
            device.kind = now;
        }
    }
    let in_arguments = recipe.arguments.iter().filter(|argument| argument.option == "-chardev");
    let mut told: BTreeSet<String> = in_arguments
        .filter_map(|argument| {
            get(&options::parse(argument.value.as_deref()?, "backend"), "id").map(str::to_owned)
        })
        .collect();
    told.extend(recipe.chardevs.iter().map(|device| device.id.clone()));
    told.extend(known.iter().cloned());
    let mut reasons = Vec::new();
    let by_qemu = |id: &str| is_made_by_qemu(id, live) || is_of_debugger(id, &live[id]);
    for id in live.keys().filter(|id| !told.contains(*id) && !by_qemu(id)) {
        match backend(id).map(|backend| (kind(&backend), backend)) {
            Some((Ok(kind), _)) if is_id(id) => recipe.chardevs.push(Chardev::new(id.clone(), kind)),
            Some((Ok(_), _)) | None => {}
            Some((Err(why), backend)) => {
                reasons.push(format!("character device {id} ({backend}) cannot follow: {why}"));
            }
        }
    }
    reasons
}

/// What QEMU calls the one by which debuggers reach it (`-gdb`, `gdbserver`).
const DEBUGGER: &str = "gdb";

/// From where a debugger is connected, if this character device is its port and one is.
pub(crate) fn debugger<'a>(id: &str, backend: &'a str) -> Option<&'a str> {
    backend.split_once(" <-> ").filter(|_| id == DEBUGGER).map(|(_, client)| client)
}

/// Whether QEMU prints there what a debugger asks of its monitor. It stays when the debugger's port is
/// closed.
fn is_of_debugger(id: &str, backend: &str) -> bool {
    id.starts_with('#') && backend == DEBUGGER
}

/// Why a VM with this debugger cannot be moved: under KVM its breakpoints are written into the guest's
/// memory.
fn debugged(live: &BTreeMap<String, String>) -> Option<String> {
    let client = debugger(DEBUGGER, live.get(DEBUGGER)?)?;
    Some(format!(
        "a debugger is connected to QEMU (from {client}), which cannot follow, and its breakpoints may be in \
         the guest's memory; detach it"
    ))
}

/// Whether it belongs to an option that gives it no id, to a monitor, or is ours.
fn is_made_by_qemu(id: &str, live: &BTreeMap<String, String>) -> bool {
    let numbered = |stem: &str| {
        id.strip_prefix(stem)
            .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
    };
    ["serial", "parallel", "compat_monitor", "vc"].into_iter().any(numbered)
        || matches!(id, "debugcon" | DEBUGGER)
        || id.starts_with("whimbrel-")
        || id.strip_suffix("-base").is_some_and(|stem| live.contains_key(stem))
}

/// What becomes of each on the target, in words, and by which name it is found there.
pub(super) fn notes(recipe: &Recipe, was: &[Was]) -> Vec<String> {
    let mut notes = Vec::new();
    for device in recipe.all_chardevs() {
        let before = was.iter().find(|was| was.id == device.id).map(|was| was.words.as_str());
        let console = device.id == crate::recipe::CONSOLE_ID;
        let what = match (console, before) {
            (true, Some(before)) => format!("the serial port ({before})"),
            (true, None) => "the serial port".to_owned(),
            (false, Some(before)) => {
                format!("character device {}{} ({before})", device.id, guest_name(recipe, &device.id))
            }
            (false, None) => format!("character device {}{}", device.id, guest_name(recipe, &device.id)),
        };
        let at = |ending: &str| crate::ports::name(&recipe.name, &device.id, ending);
        let place = match device.kind {
            ChardevKind::Socket => {
                format!("is a socket on the target, {}; who is connected here is cut off", at("sock"))
            }
            ChardevKind::Pty => format!("is a new pseudo-terminal on the target, {}", at("pty")),
            // One of our own VMs is what it was.
            ChardevKind::Log if before.is_none() => continue,
            ChardevKind::Log => format!("goes to a file on the target, {}", at("console")),
            ChardevKind::Null => match before {
                None | Some("null") => continue,
                Some(_) => "has nobody at its other end on the target".to_owned(),
            },
        };
        notes.push(format!("{what} {place}"));
    }
    if recipe.screen == crate::recipe::Screen::Vnc {
        notes.push(format!(
            "the guest's screen is shown by VNC on the target, at the socket {} without a password: only who \
             may use the agent's directory reaches it",
            crate::ports::name(&recipe.name, crate::ports::SCREEN, "vnc")
        ));
    }
    notes
}

/// What the guest calls the port that ends there: `org.qemu.guest_agent.0`.
fn guest_name(recipe: &Recipe, id: &str) -> String {
    let devices = recipe.arguments.iter().filter(|argument| argument.option == "-device");
    let name = devices.filter_map(|argument| {
        let parsed = options::parse(argument.value.as_deref()?, "driver");
        (get(&parsed, "chardev") == Some(id)).then(|| get(&parsed, "name").map(str::to_owned))?
    });
    name.map(|name| format!(" of {name}")).next().unwrap_or_default()
}

#[cfg(test)]
mod tests;
