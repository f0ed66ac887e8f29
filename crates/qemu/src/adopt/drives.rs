//! The drives of a recipe as they are now: media that were changed or ejected, overlays of snapshots, nodes
//! that were added.
//!
//! The block graph is QEMU's: a node is a part of an image (its driver, its file, what it lies on), a drive
//! shows one node to the guest. A recipe makes them by `-drive` (one option for all) or by `-blockdev`, one
//! for each node that has a name. Nodes with automatic names (`#block123`) are made by those that need them.

use super::dialect::DriveNames;
use crate::{
    recipe::{
        Argument, Export, is_id, is_old_server, is_server, is_server_driver,
        options::{self, get},
    },
    snapshot::drive_name,
};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Chains of nodes are followed so deep. QEMU's own limit is 200 files open for a chain.
const DEEPEST: usize = 64;

/// What QEMU says of drives and nodes.
#[derive(Debug, Default)]
pub(super) struct Live {
    drives: Vec<Drive>,
    nodes: BTreeMap<String, Node>,
}

#[derive(Debug, Default)]
struct Drive {
    /// The `id` of `-drive`; empty for one of `-device …,drive=NODE`.
    backend: String,
    /// What users call it.
    name: String,
    /// The node that the guest sees; none: no medium.
    shows: Option<String>,
    /// What uses it, in QEMU's object tree; empty: nothing does.
    user: String,
    /// Whether each write waits for the disk.
    write_through: bool,
}

#[derive(Debug, Default)]
struct Node {
    driver: String,
    file: String,
    bytes: u64,
    /// What it is told besides its server ([`Export::told`]).
    told: BTreeMap<String, String>,
    read_only: bool,
    detect_zeroes: Option<String>,
    /// How it is cached, where that is not usual.
    cache: Vec<&'static str>,
    /// What its content depends on, beside its driver and file: where an image begins in its file, and so on.
    options: Vec<(String, String)>,
    /// By what they are to it: `file`, `backing`.
    children: BTreeMap<String, String>,
}

impl Node {
    /// What a server has for it.
    fn export(&self) -> Result<Export, String> {
        let export = Export::read(&self.driver, &self.file, self.bytes)?;
        Ok(Export { told: self.told.clone(), ..export })
    }
}

impl Live {
    /// From `query-block`, `query-named-block-nodes` and `x-debug-query-block-graph`.
    pub(super) fn read(drives: &Value, nodes: &Value, graph: &Value) -> Self {
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let drive = |one: &Value| Drive {
            backend: text(&one["device"]),
            name: drive_name(one),
            shows: one["inserted"]["node-name"].as_str().map(str::to_owned),
            user: text(&one["qdev"]),
            write_through: one["inserted"]["cache"]["writeback"] == false,
        };
        let mut live = Self { drives: list(drives).iter().map(drive).collect(), nodes: BTreeMap::new() };
        for node in list(nodes) {
            let (driver, mut file) = (text(&node["drv"]), text(&node["file"]));
            let mut told = BTreeMap::new();
            // QEMU has several words for the same server.
            if is_server_driver(&driver)
                && let Ok(export) = Export::read(&driver, &file, 0)
            {
                file = export.url();
                told = export.told;
            }
            let read_only = node["ro"] == true;
            let detect_zeroes = node["detect_zeroes"].as_str().map(str::to_owned);
            let options = options_of(&file);
            let children = BTreeMap::new();
            let bytes = node["image"]["virtual-size"].as_u64().unwrap_or(0);
            let cache = [("direct", "cache.direct"), ("no-flush", "cache.no-flush")];
            let cache = cache.into_iter().filter(|(flag, _)| node["cache"][*flag] == true);
            let cache = cache.map(|(_, key)| key).collect();
            let found =
                Node { driver, file, bytes, told, read_only, detect_zeroes, cache, options, children };
            live.nodes.insert(text(&node["node-name"]), found);
        }
        let names: BTreeMap<u64, String> = list(&graph["nodes"])
            .iter()
            .filter(|node| node["type"] == "block-driver")
            .filter_map(|node| Some((node["id"].as_u64()?, text(&node["name"]))))
            .collect();
        let named = |id: &Value| id.as_u64().and_then(|id| names.get(&id));
        for edge in list(&graph["edges"]) {
            if let (Some(parent), Some(child)) = (named(&edge["parent"]), named(&edge["child"]))
                && let Some(parent) = live.nodes.get_mut(parent)
            {
                parent.children.insert(text(&edge["name"]), child.clone());
            }
        }
        live
    }

    /// The file of an image: that of the node which opens it. An image's own word for it may hold options.
    fn path(&self, node: &str) -> &str {
        self.lowest(node).map_or("", |node| node.file.as_str())
    }

    /// The node that opens a file.
    fn lowest(&self, node: &str) -> Option<&Node> {
        let mut at = self.nodes.get(node);
        for _ in 0..DEEPEST {
            let Some(child) = at.and_then(|node| self.nodes.get(node.children.get("file")?)) else { break };
            at = Some(child);
        }
        at
    }

    /// The files of this image: its own, and those of the images that it lies on.
    pub(super) fn chain(&self, top: &str) -> Vec<&str> {
        let (mut files, mut at) = (Vec::new(), Some(top));
        while let Some((name, node)) =
            at.and_then(|name| Some((name, self.nodes.get(name)?))).filter(|_| files.len() < DEEPEST)
        {
            files.push(self.path(name));
            at = node.children.get("backing").map(String::as_str);
        }
        files
    }

    /// The disks that servers on the network have; what is wrong with those that other hosts cannot use.
    pub(super) fn exports(&self) -> (Vec<Export>, Vec<String>) {
        let (mut found, mut reasons) = (BTreeSet::new(), Vec::new());
        for node in self.nodes.values().filter(|node| is_of_a_server(node)) {
            match node.export() {
                Ok(export) => drop(found.insert(export)),
                Err(why) => reasons.push(format!("disk {}: {why}", node.file)),
            }
        }
        (found.into_iter().collect(), reasons)
    }

    /// The qcow2 images: what they lie on the target's QEMU finds in their headers.
    pub(super) fn images(&self) -> impl Iterator<Item = &str> {
        self.nodes.iter().filter(|(_, node)| node.driver == "qcow2").map(|(name, _)| name.as_str())
    }

    /// The nodes that others lie on, and that QEMU decrypts.
    pub(super) fn encrypted_below(&self) -> impl Iterator<Item = &str> {
        let behind = self.behind();
        let is_one = move |(name, node): &(&String, &Node)| {
            behind.contains(*name)
                && node.options.iter().any(|(key, _)| OF_ENCRYPTION.contains(&key.as_str()))
        };
        self.nodes.iter().filter(is_one).map(|(name, _)| self.path(name))
    }

    /// The nodes that others lie on, with all below them. QEMU opens them with those.
    fn behind(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for backing in self.nodes.values().filter_map(|node| node.children.get("backing")) {
            self.below(backing, &mut found);
        }
        found
    }

    /// This node and all that it lies on.
    fn below(&self, top: &str, found: &mut BTreeSet<String>) {
        if found.len() < self.nodes.len() && found.insert(top.to_owned()) {
            for child in self.nodes.get(top).into_iter().flat_map(|node| node.children.values()) {
                self.below(child, found);
            }
        }
    }
}

/// Whether a server on the network has it.
fn is_of_a_server(node: &Node) -> bool {
    is_server_driver(&node.driver)
}

/// What decides of a node's content, beside its driver and its file.
const DECIDING: [&str; 6] =
    ["encrypt.key-secret", "key-secret", "latency-ns", "offset", "read-zeroes", "size"];

/// What an image that QEMU encrypts is told.
const OF_ENCRYPTION: [&str; 3] = ["encrypt.format", "encrypt.key-secret", "key-secret"];

/// QEMU's word for a node's file is `json:{…}` where the node has options that decide of its content.
fn options_of(file: &str) -> Vec<(String, String)> {
    let said = file.strip_prefix("json:").and_then(|text| serde_json::from_str::<Value>(text).ok());
    let word = |value: &Value| match value {
        Value::Bool(on) => Some(if *on { "on" } else { "off" }.to_owned()),
        Value::Number(number) => Some(number.to_string()),
        Value::String(text) => Some(text.clone()),
        _ => None,
    };
    let named = |name: &str| Some((name.to_owned(), word(said.as_ref()?.get(name)?)?));
    DECIDING.iter().filter_map(|name| named(name)).collect()
}

/// Stands for an encrypted image that others lie on.
pub(super) const ENCRYPTED_BELOW: &str = "luks below";

/// What is said of a disk that is opened by a driver whose disks are not moved.
pub(super) fn refused(driver: &str, path: &str) -> String {
    let lead = format!("disk {path} is opened by driver {driver}");
    match driver {
        ENCRYPTED_BELOW => format!(
            "disk {path} lies on an image that QEMU decrypts (LUKS), of whose secret an image that names it \
             in its header knows nothing; flatten it (qemu-img rebase -b '')"
        ),
        "aes" => format!(
            "{lead}'s old encryption, which QEMU itself no longer runs; convert it with qemu-img convert"
        ),
        "rbd" | "ftp" | "ftps" | "nfs" | "gluster" | "curl" | "nvme" => {
            format!(
                "{lead}, which is not carried over; serve the disk by NBD from a host that both reach \
             (qemu-nbd --shared=2), and start the VM with nbd://HOST:PORT/NAME"
            )
        }
        // Drivers that only block jobs put there.
        "mirror_top" | "commit_top" => format!(
            "disk {path} is under a job that runs ({driver}); wait for its end, or cancel it (job-cancel)"
        ),
        _ => format!(
            "{lead}, which has no image locks between hosts; use a raw or qcow2 file on a shared file system"
        ),
    }
}

/// A recipe's arguments that make the drives and nodes as they are; and what stands in the way.
pub(super) fn follow(arguments: &[Argument], machine: &str, live: &Live) -> (Vec<Argument>, Vec<String>) {
    let mut names = DriveNames::on(machine);
    let mut following =
        Following { live, old: BTreeMap::new(), made: BTreeMap::new(), out: vec![], reasons: vec![] };
    let mut followed = Vec::new();
    // What `-drive` makes, with all below it; and what other images lie on.
    let mut theirs = BTreeSet::new();
    let mut told = BTreeSet::new();
    for argument in arguments {
        let value = argument.value.as_deref().unwrap_or_default();
        match argument.option.as_str() {
            "-drive" => {
                let parsed = options::parse(value, "");
                let id = names.next(&parsed).unwrap_or_default();
                told.insert(id.clone());
                match live.drives.iter().find(|drive| !id.is_empty() && drive.backend == id) {
                    Some(drive) => {
                        if let Some(top) = &drive.shows {
                            live.below(top, &mut theirs);
                        }
                        let followed_drive = following.drive(&parsed, &id, drive);
                        followed.push(with(argument, "", &parsed, &followed_drive));
                    }
                    // It has gone with its device.
                    None if get(&parsed, "id").is_some() => {}
                    None => {
                        following.unnamed(&parsed);
                        followed.push(argument.clone());
                    }
                }
            }
            "-blockdev" => {
                let parsed = options::parse(value, "driver");
                if let Some(name) = get(&parsed, "node-name") {
                    following.old.insert(name.to_owned(), argument.clone());
                }
                followed.push(argument.clone());
            }
            _ => followed.push(argument.clone()),
        }
    }
    for drive in live.drives.iter().filter(|drive| !told.contains(&drive.backend)) {
        if let Some(added) = following.added(drive, &followed) {
            drive.shows.iter().for_each(|top| live.below(top, &mut theirs));
            followed.push(added);
        }
    }
    theirs.extend(live.behind());
    // In the recipe's own order where it has them: children come before their parents there.
    let order: Vec<String> = followed
        .iter()
        .filter_map(node_of)
        .filter(|name| live.nodes.contains_key(name) && !theirs.contains(name))
        .collect();
    for name in &order {
        following.make(name, 0);
    }
    let others = live.nodes.keys().filter(|name| is_id(name) && !theirs.contains(*name));
    for name in others.cloned().collect::<Vec<_>>() {
        following.make(&name, 0);
    }
    for argument in followed.iter_mut().filter(|argument| argument.option == "-device") {
        following.device(argument);
    }
    // Nodes that are no more are made no more.
    let at = followed.iter().position(|argument| argument.option == "-blockdev").unwrap_or(0);
    followed.retain(|argument| node_of(argument).is_none());
    followed.splice(at..at, following.out);
    (followed, following.reasons)
}

/// The files that the arguments name.
pub(super) fn named(arguments: &[Argument]) -> BTreeSet<String> {
    let mut files = BTreeSet::new();
    for argument in arguments {
        let (implied, names): (_, &[&str]) = match argument.option.as_str() {
            "-drive" => ("", &["file"]),
            "-blockdev" => ("driver", &["filename", "file.filename"]),
            _ => continue,
        };
        let parsed = options::parse(argument.value.as_deref().unwrap_or_default(), implied);
        files.extend(
            parsed
                .into_iter()
                .filter(|(key, path)| names.contains(&key.as_str()) && !is_server(path))
                .map(|(_, path)| path),
        );
    }
    files
}

/// The node that an argument makes.
fn node_of(argument: &Argument) -> Option<String> {
    if argument.option != "-blockdev" {
        return None;
    }
    let parsed = options::parse(argument.value.as_deref()?, "driver");
    get(&parsed, "node-name").map(str::to_owned)
}

struct Following<'a> {
    live: &'a Live,
    /// The recipe's nodes, by their names.
    old: BTreeMap<String, Argument>,
    /// The names under which the target makes nodes, by their names here.
    made: BTreeMap<String, String>,
    out: Vec<Argument>,
    reasons: Vec<String>,
}

type Parsed = Vec<(String, String)>;

fn set(parsed: &mut Parsed, key: &str, value: &str) {
    match parsed.iter_mut().rev().find(|(name, _)| name == key) {
        Some((_, old)) => value.clone_into(old),
        None => parsed.push((key.to_owned(), value.to_owned())),
    }
}

/// Whether QEMU's word for a file is this one: relative to where it was started, it is shorter.
fn is_same(path: &str, live: &str) -> bool {
    path == live || (!live.starts_with('/') && path.ends_with(&format!("/{}", live.trim_start_matches("./"))))
}

fn follow_path(parsed: &mut Parsed, key: &str, live: &str) {
    if !get(parsed, key).is_some_and(|path| is_same(path, live)) {
        set(parsed, key, live);
    }
}

/// Whether two values are the same size, or the same word.
fn is_worth(one: &str, other: &str) -> bool {
    let size = |text: &str| {
        let (digits, unit) = text.split_at(text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).len());
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            "t" => 40,
            _ => return None,
        };
        digits.parse::<u64>().ok()?.checked_mul(1 << shift)
    };
    one == other || size(one).is_some_and(|bytes| size(other) == Some(bytes))
}

/// What decides of a node's content is what it is now, whatever it was made with.
fn follow_options(parsed: &mut Parsed, node: &Node) {
    for name in DECIDING {
        match node.options.iter().find(|(known, _)| known == name) {
            Some((_, now)) if get(parsed, name).is_some_and(|before| is_worth(before, now)) => {}
            Some((_, now)) => set(parsed, name, now),
            None => forget(parsed, &[name]),
        }
    }
    let zeroes = node.detect_zeroes.as_deref();
    if let Some(now) = zeroes.filter(|now| *now != get(parsed, "detect-zeroes").unwrap_or("off")) {
        set(parsed, "detect-zeroes", now);
    }
}

/// What an encrypted image is told; qcow2 also wants to know that it is LUKS.
fn follow_encryption(parsed: &mut Parsed, node: &Node) {
    for (key, value) in node.options.iter().filter(|(key, _)| OF_ENCRYPTION.contains(&key.as_str())) {
        set(parsed, key, value);
        if key == "encrypt.key-secret" {
            set(parsed, "encrypt.format", "luks");
        }
    }
}

/// How a node that was added is cached, and what it makes of zeros.
fn follow_cache(parsed: &mut Parsed, node: &Node) {
    node.cache.iter().for_each(|key| set(parsed, key, "on"));
    let zeroes = node.detect_zeroes.as_deref().filter(|zeroes| *zeroes != "off");
    if let Some(zeroes) = zeroes {
        set(parsed, "detect-zeroes", zeroes);
    }
    if zeroes == Some("unmap") {
        // QEMU allows that only together.
        set(parsed, "discard", "unmap");
    }
}

fn forget(parsed: &mut Parsed, keys: &[&str]) {
    parsed.retain(|(name, _)| !keys.contains(&name.as_str()));
}

/// An argument like this one with these options; itself where they are the same.
fn with(argument: &Argument, implied: &str, before: &Parsed, after: &Parsed) -> Argument {
    if before == after {
        argument.clone()
    } else {
        Argument::new(&argument.option, options::join(after, implied))
    }
}

impl Following<'_> {
    /// The options of a `-drive` with the medium that it has, its format and the name that it has.
    fn drive(&mut self, before: &Parsed, id: &str, drive: &Drive) -> Parsed {
        let mut after = before.clone();
        set(&mut after, "id", id);
        let node = drive.shows.as_ref().and_then(|name| Some((name, self.live.nodes.get(name)?)));
        match node {
            None => {
                forget(&mut after, &["file", "format", "readonly", "read-only", "node-name"]);
                forget(&mut after, &OF_ENCRYPTION);
            }
            // It was given them on the command line, where raw has them too.
            Some((name, node)) if node.options.iter().any(|(key, value)| get(before, key) != Some(value)) => {
                let all = node.options.iter().map(|(key, value)| format!("{key}={value}"));
                self.reasons.push(format!(
                    "drive {} shows node {name}, whose {} a -drive cannot be given; eject it \
                     (blockdev-remove-medium)",
                    drive.name,
                    all.collect::<Vec<_>>().join(" and ")
                ))
            }
            Some((name, node))
                if get(&after, "file").is_some_and(|file| is_same(file, self.live.path(name)))
                    && get(&after, "format").is_none_or(|format| format == node.driver) =>
            {
                // QEMU has looked what it is; the guest may have written something else there since.
                set(&mut after, "format", &node.driver);
            }
            Some((name, node)) => {
                after.retain(|(key, _)| key != "file.driver" && !is_old_server(key, "file."));
                set(&mut after, "file", self.live.path(name));
                set(&mut after, "format", &node.driver);
                forget(&mut after, &["readonly", "read-only", "node-name"]);
                forget(&mut after, &OF_ENCRYPTION);
                follow_encryption(&mut after, node);
                if node.read_only {
                    set(&mut after, "readonly", "on");
                }
                if is_id(name) {
                    set(&mut after, "node-name", name);
                }
            }
        }
        // Elsewhere no `-iscsi` says it.
        let server = drive.shows.as_deref().and_then(|node| self.live.lowest(node));
        for (key, value) in server.into_iter().flat_map(|node| &node.told) {
            set(&mut after, &format!("file.{key}"), value);
        }
        after
    }

    /// A drive that was added without a node of its own (`drive_add`); `None`: it is no such, or the
    /// machine's own.
    fn added(&self, drive: &Drive, arguments: &[Argument]) -> Option<Argument> {
        let devices = arguments.iter().filter(|argument| argument.option == "-device");
        let mut parsed =
            devices.map(|device| options::parse(device.value.as_deref().unwrap_or_default(), "driver"));
        let used = parsed.any(|device| {
            get(&device, "drive") == Some(&drive.backend) || get(&device, "id") == Some(&drive.name)
        });
        let node = drive.shows.as_ref().and_then(|name| Some((name, self.live.nodes.get(name)?)));
        // Those that nobody uses are the user's if there is something in them.
        if !is_id(&drive.backend) || !(used || drive.user.is_empty() && node.is_some()) {
            return None;
        }
        let mut made = vec![("if".to_owned(), "none".to_owned()), ("id".to_owned(), drive.backend.clone())];
        if let Some((name, node)) = node {
            set(&mut made, "file", self.live.path(name));
            set(&mut made, "format", &node.driver);
            node.options.iter().for_each(|(key, value)| set(&mut made, key, value));
            follow_encryption(&mut made, node);
            if node.read_only {
                set(&mut made, "readonly", "on");
            }
            if is_id(name) {
                set(&mut made, "node-name", name);
            }
            if drive.write_through {
                set(&mut made, "cache.writeback", "off");
            }
            follow_cache(&mut made, node);
        }
        Some(Argument::new("-drive", options::join(&made, "")))
    }

    /// A `-drive` that cannot be told from others must have what it was started with.
    fn unnamed(&mut self, drive: &Parsed) {
        let Some(file) = get(drive, "file") else { return };
        if !self.live.nodes.keys().any(|node| is_same(file, self.live.path(node))) {
            self.reasons.push(format!(
                "the drive of {file} has no id (-drive id=), and something else in it now; restart the VM \
                 with what it is to have"
            ));
        }
    }

    /// A `-device` whose `drive=` is a node, with the node that it shows.
    fn device(&mut self, argument: &mut Argument) {
        let before = options::parse(argument.value.as_deref().unwrap_or_default(), "driver");
        let Some(id) = get(&before, "id") else { return self.nameless(&before) };
        let Some(drive) = self.live.drives.iter().find(|drive| drive.name == id) else { return };
        let mut after = before.clone();
        if !drive.backend.is_empty() {
            // Of some devices QEMU does not say it (usb-storage).
            if get(&before, "drive").is_none() {
                set(&mut after, "drive", &drive.backend);
            }
            *argument = with(argument, "driver", &before, &after);
            return;
        }
        match &drive.shows {
            None => forget(&mut after, &["drive"]),
            Some(node) => match self.make(node, 0) {
                Some(name) => set(&mut after, "drive", &name),
                None => return,
            },
        }
        *argument = with(argument, "driver", &before, &after);
    }

    /// One without an id cannot be told from others: it must show what it showed when it was made.
    fn nameless(&mut self, device: &Parsed) {
        let Some(node) = get(device, "drive").filter(|node| self.old.contains_key(*node)) else { return };
        if !self.live.drives.iter().any(|drive| drive.shows.as_deref() == Some(node)) {
            self.reasons.push(format!(
                "device {} has no id, and shows another node than {node} now; restart the VM with id= for it",
                get(device, "driver").unwrap_or("?")
            ));
        }
    }

    /// A name for a node that has none of its own.
    fn unused_name(&self) -> String {
        let taken =
            |name: &String| self.live.nodes.contains_key(name) || self.made.values().any(|made| made == name);
        (0..).map(|n| format!("medium{n}")).find(|name| !taken(name)).unwrap_or_default()
    }

    /// Makes a node and what it lies on; its name on the target. `None` and a reason where that cannot be
    /// done.
    fn make(&mut self, name: &str, depth: usize) -> Option<String> {
        if let Some(made) = self.made.get(name) {
            return Some(made.clone());
        }
        let node = self.live.nodes.get(name).filter(|_| depth < DEEPEST)?;
        let is_known =
            matches!(node.driver.as_str(), "file" | "raw" | "qcow2" | "null-co" | "throttle" | "luks");
        if !is_known && !is_of_a_server(node) {
            // It is refused for what it is, elsewhere.
            return None;
        }
        let own = if is_id(name) { name.to_owned() } else { self.unused_name() };
        let old = self.old.get(name).cloned();
        let before =
            options::parse(old.as_ref().and_then(|old| old.value.as_deref()).unwrap_or_default(), "driver");
        let mut after = before.clone();
        if old.is_none() {
            after = vec![("driver".to_owned(), node.driver.clone()), ("node-name".to_owned(), own.clone())];
            if node.read_only {
                set(&mut after, "read-only", "on");
            }
            follow_cache(&mut after, node);
        }
        follow_options(&mut after, node);
        follow_encryption(&mut after, node);
        if is_of_a_server(node) {
            // It is refused for what it is, elsewhere.
            let export = node.export().ok()?;
            after.retain(|(key, _)| !is_old_server(key, ""));
            after.extend(export.options(""));
        } else if node.driver == "file" {
            follow_path(&mut after, "filename", &node.file);
        } else if let Some(child) = node.children.get("file") {
            self.file(&mut after, child, depth)?;
        }
        // What it lies on its image names, and both hosts look at that.
        forget(&mut after, &["backing"]);
        let argument = match &old {
            Some(old) => with(old, "driver", &before, &after),
            None => Argument::new("-blockdev", options::join(&after, "driver")),
        };
        self.out.push(argument);
        self.made.insert(name.to_owned(), own.clone());
        Some(own)
    }

    /// What a format lies on: a node with a name, or one of its own.
    fn file(&mut self, after: &mut Parsed, child: &str, depth: usize) -> Option<()> {
        // A filter lies on a format, which may lie on more.
        let below = self.live.nodes.get(child);
        if let Some(node) = below.filter(|node| is_of_a_server(node) && !is_id(child)) {
            let export = node.export().ok()?;
            after.retain(|(key, _)| !is_old_server(key, "file."));
            forget(after, &["file"]);
            set(after, "file.driver", &node.driver);
            after.extend(export.options("file."));
            return Some(());
        }
        if is_id(child) || below.is_none_or(|node| node.driver != "file") {
            let made = self.make(child, depth + 1)?;
            after.retain(|(key, _)| !key.starts_with("file."));
            set(after, "file", &made);
            return Some(());
        }
        if get(after, "file").is_some() {
            forget(after, &["file"]);
        }
        set(after, "file.driver", "file");
        follow_path(after, "file.filename", self.live.path(child));
        Some(())
    }
}

#[cfg(test)]
mod tests;
