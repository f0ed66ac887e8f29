//! What a QEMU is now, by its monitor and by `/proc`, against what its command line says.

use super::{
    chardevs,
    cmdline::Read,
    devices::{self, Device},
    drives::{self, Live},
    names::Names,
    nets, objects, properties, settings, throttles,
};
use crate::{
    qmp::{Qmp, QmpError},
    ram::{self, Backend},
    recipe::{
        Accel, Backing, ChardevKind, MemoryBlock, Recipe, Role, SeenFile, backing_files, files, is_server,
        is_server_driver, options, why_refused,
    },
    snapshot::own,
};
use ports::RunState;
use serde_json::{Value, json};
use std::{collections::BTreeMap, fs, path::Path};
use sys::{proc, process::PidFd};

/// Devices whose action a monitor can set, and nobody can ask for.
const WATCHDOGS: &[&str] = &["i6300esb", "ib700"];

/// Network cards whose device state does not hold that their link was set down, as all begin.
const LINKS_LOST: &[&str] = &["i8255", "i82562", "i82801", "ne2k_", "tulip"];

/// Everything in which the running VM cannot be migrated, or is not what its command line says.
pub(super) fn differences(
    qmp: &mut Qmp,
    process: &PidFd,
    names: &Names<'_>,
    read: &mut Read,
) -> Result<Vec<String>, QmpError> {
    let mut reasons = Vec::new();
    state(qmp, &mut reasons)?;
    devices(qmp, read, &mut reasons)?;
    places(qmp, read);
    super::tpm::look(qmp, read, &mut reasons)?;
    disks(qmp, process, names, read, &mut reasons)?;
    nets::networks(qmp, process, read, &mut reasons)?;
    chardevs::follow(qmp, &mut read.recipe, &read.chardevs, &mut reasons)?;
    memory(qmp, process, read, &mut reasons)?;
    Ok(reasons)
}

/// How the guest's instructions are executed.
pub(super) fn accel(qmp: &mut Qmp) -> Result<Accel, QmpError> {
    let answer = qmp.execute("query-kvm", json!({}))?;
    Ok(if answer["enabled"].as_bool() == Some(true) { Accel::Kvm } else { Accel::Tcg })
}

/// What hinders this QEMU from being migrated just now, whatever it consists of.
pub(crate) fn state(qmp: &mut Qmp, reasons: &mut Vec<String>) -> Result<(), QmpError> {
    let status = qmp.execute("query-status", json!({}))?;
    let state = RunState::from_name(status["status"].as_str().unwrap_or_default());
    let status = status["status"].as_str().unwrap_or("unknown");
    let migration = qmp.execute("query-migrate", json!({}))?;
    let own = migration["status"].as_str().unwrap_or("none");
    match own::elsewhere(status, own) {
        Some(why) => reasons.push(why.to_owned()),
        None => reasons.extend(state.hindrance()),
    }
    for reason in migration["blocked-reasons"].as_array().into_iter().flatten() {
        reasons.push(format!(
            "QEMU itself refuses to migrate it: {}",
            reason.as_str().unwrap_or("it does not say why")
        ));
    }
    let commands = qmp.execute("query-commands", json!({}))?;
    let known = |name: &str| commands.as_array().into_iter().flatten().any(|command| command["name"] == name);
    if !known("xen-save-devices-state") {
        reasons.push("this QEMU has no xen-save-devices-state; use a QEMU that was built with it".to_owned());
    }
    Ok(())
}

/// The devices and objects that users add, and those of the machine itself.
fn devices(qmp: &mut Qmp, read: &mut Read, reasons: &mut Vec<String>) -> Result<(), QmpError> {
    // Those that were added are asked for everything.
    properties::follow_threads(qmp, &mut read.recipe.arguments)?;
    objects::follow(qmp, &mut read.recipe.arguments, reasons)?;
    devices::follow(qmp, read, reasons)?;
    for (name, kind) in children(qmp, "/machine/unattached")?.into_iter().chain(children(qmp, "/machine")?) {
        refuse_kind(&name, &kind, reasons);
        read.notes.extend(lost_link(&name, &kind));
    }
    Ok(())
}

/// What is to be said of a device for what it is.
pub(super) fn look_at(qmp: &mut Qmp, device: &Device, read: &mut Read, reasons: &mut Vec<String>) {
    let Device { path: place, name, kind, plugged, .. } = device;
    match kind.as_str() {
        // What one that was plugged in leads to is not looked at.
        REDIRECTION if !plugged && redirects_nothing(qmp, read) => {}
        _ => refuse_kind(name, kind, reasons),
    }
    if kind == "ramfb" && flag(qmp, place, "x-migrate") != Some(true) {
        read.notes.push(
            "ramfb: where its picture lies QEMU carries from machines of version 8.2 on; the guest's screen \
             stays blank until it sets that again"
                .to_owned(),
        );
    }
    read.notes.extend(lost_link(name, kind));
    if WATCHDOGS.contains(&kind.as_str()) {
        read.notes.push(format!(
            "watchdog {name} ({kind}): QEMU cannot be asked what it does when it expires; what a monitor set \
             (watchdog-set-action) stays behind, the target does as the command line says"
        ));
    }
}

/// What is to be said of a network card whose link may be down.
fn lost_link(name: &str, kind: &str) -> Option<String> {
    LINKS_LOST.iter().any(|stem| kind.starts_with(stem)).then(|| {
        format!(
            "network card {name} ({kind}): QEMU neither tells nor carries whether its link was set down \
             (set_link); on the target it is up: set it down there, too"
        )
    })
}

/// A device's property that is on or off; `None`: it has none of this name.
fn flag(qmp: &mut Qmp, path: &str, property: &str) -> Option<bool> {
    qmp.execute("qom-get", json!({ "path": path, "property": property })).ok()?.as_bool()
}

/// Gives PCI devices that QEMU has made after all others the places that they got.
fn places(qmp: &mut Qmp, read: &mut Read) {
    for id in &read.late {
        let asked = json!({ "path": format!("/machine/peripheral/{id}"), "property": "addr" });
        // Others have no such property.
        let number = qmp.execute("qom-get", asked).ok().and_then(|answer| answer.as_u64());
        let Some(place) = number.map(|n| format!("{:02x}.{}", n >> 3, n & 7)) else { continue };
        let mut devices = read.recipe.arguments.iter_mut().filter(|argument| argument.option == "-device");
        let device = devices.find_map(|argument| {
            let parsed = options::parse(argument.value.as_deref()?, "driver");
            (options::get(&parsed, "id") == Some(id) && options::get(&parsed, "addr").is_none())
                .then_some((argument, parsed))
        });
        if let Some((argument, mut parsed)) = device {
            parsed.push(("addr".to_owned(), place));
            argument.value = Some(options::join(&parsed, "driver"));
        }
    }
}

/// A place for a USB device of a client's.
const REDIRECTION: &str = "usb-redir";

/// The number of SPICE's channels for such devices (`SPICE_CHANNEL_USBREDIR`).
const USB_CHANNEL: u64 = 9;

/// Whether such places are empty: they are SPICE's, and no client of that is there.
fn redirects_nothing(qmp: &mut Qmp, read: &Read) -> bool {
    let devices = read.recipe.arguments.iter().filter(|argument| argument.option == "-device");
    let mut used = devices.filter_map(|argument| {
        let parsed = options::parse(argument.value.as_deref()?, "driver");
        let ours = options::get(&parsed, "driver") == Some(REDIRECTION);
        ours.then(|| options::get(&parsed, "chardev").map(str::to_owned))
    });
    let is_empty = |id: Option<String>| {
        let mut chardevs = read.recipe.chardevs.iter();
        chardevs.any(|chardev| Some(&chardev.id) == id.as_ref() && chardev.kind == ChardevKind::Null)
    };
    if !used.all(is_empty) {
        return false;
    }
    // A QEMU without SPICE does not know the question, and has no such client.
    let spice = qmp.execute("query-spice", json!({})).unwrap_or_default();
    let mut channels = spice["channels"].as_array().into_iter().flatten();
    !channels.any(|channel| channel["channel-type"].as_u64() == Some(USB_CHANNEL))
}

pub(super) fn refuse_kind(name: &str, kind: &str, reasons: &mut Vec<String>) {
    if let Some(why) = why_refused(kind) {
        reasons.push(format!("device {name} ({kind}): {why}"));
    }
}

pub(super) fn has_drive(read: &Read, interface: &str) -> bool {
    let drives = read.recipe.arguments.iter().filter(|argument| argument.option == "-drive");
    drives
        .filter_map(|argument| argument.value.as_deref())
        .any(|value| options::get(&options::parse(value, "file"), "if") == Some(interface))
}

/// The children of a place in QEMU's object tree, with their types.
pub(super) fn children(qmp: &mut Qmp, path: &str) -> Result<Vec<(String, String)>, QmpError> {
    let answer = qmp.execute("qom-list", json!({ "path": path }))?;
    let child = |value: &Value| {
        let kind = value["type"].as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
        Some((value["name"].as_str()?.to_owned(), kind.to_owned()))
    };
    Ok(answer.as_array().into_iter().flatten().filter_map(child).collect())
}

/// The recipe's drives follow what QEMU has now; what it cannot have elsewhere is refused.
fn disks(
    qmp: &mut Qmp,
    process: &PidFd,
    names: &Names<'_>,
    read: &mut Read,
    reasons: &mut Vec<String>,
) -> Result<(), QmpError> {
    let drives = qmp.execute("query-block", json!({}))?;
    let mut nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true }))?;
    name_descriptors(qmp, process, &mut nodes, reasons)?;
    for node in nodes.as_array_mut().into_iter().flatten() {
        // By the names of this host. Of what is not found here, all that can be told is what QEMU calls it.
        let named = node["file"].as_str().filter(|name| !is_server(name));
        let found = named.and_then(|name| names.file(Role::Disk, name).ok());
        if let Some(path) = found {
            node["file"] = path.to_string_lossy().into();
        }
    }
    let graph = qmp.execute("x-debug-query-block-graph", json!({}))?;
    let live = Live::read(&drives, &nodes, &graph);
    let (followed, wrong) = drives::follow(&read.recipe.arguments, &read.recipe.machine, &live);
    reasons.extend(wrong);
    read.recipe.arguments = throttles::follow(followed, &throttles::ask(qmp)?);
    files(names, read, &live, reasons);
    let (exports, wrong) = live.exports();
    read.recipe.exports = exports;
    reasons.extend(wrong);
    read.notes.extend(read.recipe.exports.iter().map(|export| {
        format!(
            "disk {}: its server is not shown to be the same for both hosts; who grants its address there \
             says so, and it must take two clients at once",
            export.url()
        )
    }));
    reasons.extend(live.encrypted_below().map(|path| drives::refused(drives::ENCRYPTED_BELOW, path)));
    super::secrets::follow(qmp, read, reasons)?;
    read.recipe.settings = settings::read(&drives, &nodes, &read.recipe.arguments);
    read.recipe.settings.extend(properties::of_its_balloon(qmp, &read.recipe.arguments)?);
    read.notes.extend(settings::lost(&nodes));
    let known: Vec<&str> = read
        .recipe
        .files
        .iter()
        .filter(|file| file.role != Role::Boot)
        .filter_map(|file| file.path.to_str())
        .collect();
    for node in nodes.as_array().into_iter().flatten() {
        let driver = node["drv"].as_str().unwrap_or("?");
        let path = node["file"].as_str().unwrap_or("?");
        if driver == "file" && node["cache"]["direct"] == true {
            read.notes.push(format!(
                "disk {path} is read directly (cache=none): while the VM is moved it goes through the page \
                 cache of this host"
            ));
        }
        let format = node["image"]["format-specific"]["data"]["encrypt"]["format"].as_str();
        if node["encrypted"] == true && driver == "qcow2" && format.is_some_and(|format| format != "luks") {
            reasons.push(drives::refused("aes", path));
            continue;
        }
        match driver {
            "raw" | "qcow2" | "null-co" | "throttle" | "luks" => {}
            driver if is_server_driver(driver) => {}
            "file" if known.iter().any(|known| same_file(known, path)) => {}
            "file" => reasons.push(format!(
                "disk {path} is not on the command line: its medium was changed; restart the VM with it"
            )),
            _ => reasons.push(drives::refused(driver, path)),
        }
    }
    Ok(())
}

/// A node's file that is one of a set of descriptors gets the name of the file that it leads to.
///
/// When QEMU gives a disk up, it goes on with another descriptor of the set, one that only reads. Its locks
/// belong to the one before, which stays open in the set: nobody else could write the disk, and the guest
/// would stand still.
fn name_descriptors(
    qmp: &mut Qmp,
    process: &PidFd,
    nodes: &mut Value,
    reasons: &mut Vec<String>,
) -> Result<(), QmpError> {
    const SET: &str = "/dev/fdset/";
    let is_set = |node: &Value| node["file"].as_str().is_some_and(|file| file.starts_with(SET));
    if !nodes.as_array().into_iter().flatten().any(is_set) {
        return Ok(());
    }
    let sets = qmp.execute("query-fdsets", json!({}))?;
    for node in nodes.as_array_mut().into_iter().flatten() {
        let number = node["file"].as_str().and_then(|file| file.strip_prefix(SET)?.parse::<i64>().ok());
        let Some(number) = number else { continue };
        let set = sets.as_array().into_iter().flatten().find(|set| set["fdset-id"] == number);
        let Some(fds) = set.and_then(|set| set["fds"].as_array()) else { continue };
        let Some(fd) = fds.first().and_then(|fd| fd["fd"].as_i64()) else { continue };
        if let Ok(leads) = fs::read_link(process.proc_path(format!("fd/{fd}"))) {
            node["file"] = leads.to_string_lossy().into();
        }
        if fds.len() > 1 && node["drv"] == "file" && node["ro"] == false {
            reasons.push(format!(
                "disk {}: QEMU was given several descriptors of it (-add-fd, set {number}), and keeps its \
                 locks on one of them when the VM goes; start the VM with one descriptor of it and \
                 auto-read-only=off, or with its name",
                node["file"].as_str().unwrap_or("?")
            ));
        }
    }
    Ok(())
}

/// The files that the arguments name now, and those that their images name.
fn files(names: &Names<'_>, read: &mut Read, live: &Live, reasons: &mut Vec<String>) {
    let mut seen: Vec<SeenFile> =
        read.recipe.files.iter().filter(|file| file.role == Role::Boot).cloned().collect();
    let known = &read.known;
    let mut add = |file: SeenFile| {
        let before = known.iter().find(|known| known.path == file.path && known.role == file.role);
        let other =
            before.filter(|before| before.identity().is_some() && before.identity() != file.identity());
        let file = other.cloned().unwrap_or(file);
        if !seen.iter().any(|known| known.path == file.path && known.role == file.role) {
            seen.push(file);
        }
    };
    // One of a set of descriptors has no name; it is refused with all other files that are not known.
    let has_name = |path: &String| !path.starts_with("/dev/fdset/");
    for path in drives::named(&read.recipe.arguments).into_iter().filter(has_name) {
        match names.file(Role::Disk, &path).and_then(|path| files::look(&path, Role::Disk)) {
            Ok(file) => add(file),
            Err(why) => reasons.push(why),
        }
    }
    for image in live.images() {
        let chain = live.chain(image);
        let Some((top, behind)) = chain.split_first() else { continue };
        // Whatever is no file is told of by itself.
        if files::look(Path::new(top), Role::Disk).is_err() {
            continue;
        }
        match backing_files(Path::new(top)) {
            Ok(files) => {
                let told: Vec<&Path> = files.iter().map(|file| file.path.as_path()).collect();
                let same = told.len() == behind.len()
                    && told.iter().zip(behind).all(|(told, is)| same_file(&told.to_string_lossy(), is));
                if !same {
                    reasons.push(format!(
                        "disk {top} lies on {behind:?}, but names {told:?} in its header, which the target \
                         would open; mend the header (change-backing-file)"
                    ));
                }
                files.into_iter().for_each(&mut add);
            }
            Err(why) => reasons.push(why),
        }
    }
    read.recipe.files = seen;
    // What is not used any more need not be found.
    read.lost.clear();
}

fn same_file(known: &str, path: &str) -> bool {
    known == path || matches!((fs::canonicalize(known), fs::canonicalize(path)), (Ok(a), Ok(b)) if a == b)
}

fn memory(
    qmp: &mut Qmp,
    process: &PidFd,
    read: &mut Read,
    reasons: &mut Vec<String>,
) -> Result<(), QmpError> {
    backends(qmp, &mut read.recipe, reasons)?;
    let cpus = qmp.execute("query-cpus-fast", json!({}))?;
    let (live, told) = (cpus.as_array().map_or(0, Vec::len) as u64, u64::from(read.recipe.vcpus()));
    if live != told {
        reasons.push(format!(
            "it has {live} vCPUs, of {told} that it was started with and that were plugged in; plug those in \
             again that were unplugged"
        ));
    }
    // Told by its processes, because the option may say "on" without effect, or a launcher have locked it.
    let status = fs::read_to_string(process.proc_path("status")).unwrap_or_default();
    let locked = proc::value(&status, "VmLck").unwrap_or("0 kB");
    if locked != "0 kB" {
        read.notes.push(format!(
            "{locked} of its memory are locked here, and none on the target, where pages \
                                 come as they are needed"
        ));
    }
    Ok(())
}

/// Memory that was added becomes a part of the recipe, memory that was removed leaves it.
fn backends(qmp: &mut Qmp, recipe: &mut Recipe, reasons: &mut Vec<String>) -> Result<(), QmpError> {
    let live = ram::backends(qmp)?;
    let is_live = |block: &MemoryBlock| live.iter().any(|backend| backend.id == block.id);
    let main = recipe.main_memory.clone();
    let mut added = 0_u64;
    recipe.memory.retain(|block| main.as_ref() == Some(&block.id) || is_live(block));
    let kinds: BTreeMap<String, String> = children(qmp, "/objects")?.into_iter().collect();
    for Backend { id, bytes } in &live {
        if recipe.memory.iter().any(|block| block.id == *id) {
            continue;
        }
        // A machine that is given no memory makes some, under a name of its own.
        if recipe.main_memory.is_none() && main_memory(qmp)?.as_ref() == Some(id) {
            recipe.main_memory = Some(id.clone());
            recipe.memory.push(MemoryBlock { id: id.clone(), bytes: *bytes, backing: Backing::Memfd });
            continue;
        }
        let backing = match kinds.get(id).map_or("?", String::as_str) {
            "memory-backend-memfd" | "memory-backend-ram" | "memory-backend-shm" => Backing::Memfd,
            "memory-backend-file" => {
                let asked = json!({ "path": format!("/objects/{id}"), "property": "share" });
                let shared = qmp.execute("qom-get", asked)? == true;
                if shared { Backing::File } else { Backing::Memfd }
            }
            kind => {
                reasons.push(format!(
                    "memory {id} ({kind}) was added after the start and cannot follow the VM; use \
                     memory-backend-memfd"
                ));
                continue;
            }
        };
        added = added.saturating_add(*bytes);
        recipe.memory.push(MemoryBlock { id: id.clone(), bytes: *bytes, backing });
    }
    if added > 0 {
        // What the machine begins with is not what it has by now.
        let first = recipe.memory_bytes().saturating_sub(added);
        recipe.memory_options.get_or_insert_with(|| format!("size={}K", first >> 10));
    }
    Ok(())
}

/// The backend of the machine's main memory; none where NUMA nodes have one each.
fn main_memory(qmp: &mut Qmp) -> Result<Option<String>, QmpError> {
    let asked = json!({ "path": "/machine", "property": "memory-backend" });
    let answer = qmp.execute("qom-get", asked)?;
    Ok(answer.as_str().and_then(|path| path.strip_prefix("/objects/")).map(str::to_owned))
}

#[cfg(test)]
mod tests;
