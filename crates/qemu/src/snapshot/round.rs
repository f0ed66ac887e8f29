//! The questions of a snapshot, asked in one go, and what their answers come to.

use super::{Setting, Snapshot};
use crate::{
    adopt::{chardevs::debugger, nets::hub_port, properties, throttles},
    qmp::{Qmp, QmpError},
    recipe::LIMITS,
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, time::Duration};

/// How long QEMU may take for all answers. In a pause the guest stands still meanwhile: then the migration
/// ends and it runs on.
pub(crate) const WITHIN: Duration = Duration::from_secs(2);

/// More things of a kind than a VM has; whoever says more is not QEMU. What is beyond is not looked at.
const MOST: usize = 4096;

/// How much is asked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Depth {
    /// In a pause: what can be changed without an event, whether somebody uses the disks, and whether QEMU's
    /// own migration takes the guest. A job and an export have a connection in the block graph; a new vCPU
    /// and new memory are devices.
    Short,
    /// All of it: 15 questions, of 0.1 to 0.4 ms each.
    Whole,
}

type Things = BTreeMap<String, String>;
type Parse = fn(&Value) -> Things;

struct Question {
    command: &'static str,
    arguments: fn() -> Value,
    kind: Setting,
    parse: Parse,
    /// From this depth on it is asked.
    from: Depth,
}

const fn plain(command: &'static str, kind: Setting, parse: Parse) -> Question {
    Question { command, arguments: || json!({}), kind, parse, from: Depth::Whole }
}

const fn from(depth: Depth, question: Question) -> Question {
    Question { from: depth, ..question }
}

const fn tree(arguments: fn() -> Value, kind: Setting, parse: Parse) -> Question {
    Question { command: "qom-list", arguments, kind, parse, from: Depth::Whole }
}

const QUESTIONS: [Question; 15] = [
    from(Depth::Short, plain("x-debug-query-block-graph", Setting::Edge, edges)),
    from(Depth::Short, tree(|| json!({ "path": "/machine/peripheral" }), Setting::Device, devices)),
    from(Depth::Short, tree(|| json!({ "path": "/machine/peripheral-anon" }), Setting::Device, devices)),
    // None of these two has an event: `object-add`, `block_set_io_throttle`.
    from(Depth::Short, tree(|| json!({ "path": "/objects" }), Setting::Object, objects)),
    plain("query-memdev", Setting::Memory, memory),
    plain("query-memory-devices", Setting::MemoryDevice, memory_devices),
    plain("query-cpus-fast", Setting::Cpu, cpus),
    // Nor have `chardev-add`, `chardev-change` and `netdev_add`. (Where one leads to changes with who is
    // connected.)
    from(Depth::Short, plain("query-chardev", Setting::Chardev, chardevs)),
    from(Depth::Short, plain("query-block", Setting::Drive, drives)),
    Question {
        command: "query-named-block-nodes",
        arguments: || json!({ "flat": true }),
        kind: Setting::Node,
        parse: nodes,
        from: Depth::Whole,
    },
    plain("query-jobs", Setting::Job, jobs),
    plain("query-block-exports", Setting::Export, exports),
    Question {
        command: "human-monitor-command",
        arguments: || json!({ "command-line": "info network" }),
        kind: Setting::Network,
        parse: networks,
        from: Depth::Short,
    },
    // In a pause the last one before the device state is saved.
    from(Depth::Short, plain("query-migrate", Setting::Migration, migration)),
    from(Depth::Short, plain("query-migrate", Setting::Blocker, blockers)),
];

impl Snapshot {
    /// Takes one: all questions are written before the first answer is read.
    pub(crate) fn take(qmp: &mut Qmp, depth: Depth) -> Result<Self, QmpError> {
        let lines = Self::lines(depth);
        let answers = qmp.execute_all(&lines, WITHIN)?;
        let mut taken = Self::read(depth, &lines, answers)?;
        if depth == Depth::Whole {
            taken.ask_groups(qmp)?;
            taken.ask_properties(qmp)?;
        }
        Ok(taken)
    }

    /// What `qom-set` changes of threads and balloons, without an event.
    fn ask_properties(&mut self, qmp: &mut Qmp) -> Result<(), QmpError> {
        let of = |kind| self.kinds.get(&kind).into_iter().flatten();
        let threads = of(Setting::Object).filter(|(_, kind)| *kind == properties::THREAD);
        let balloons = of(Setting::Device).filter_map(|(name, kind)| properties::of_device(name, kind));
        let asked: Vec<_> =
            threads.flat_map(|(id, _)| properties::of_thread(id)).chain(balloons).take(MOST).collect();
        let lines: Vec<_> = asked.iter().map(|property| property.line()).collect();
        let answers = qmp.execute_all(&lines, WITHIN)?;
        let told = asked.iter().zip(answers);
        // An older QEMU has not all of them.
        let told = told.filter_map(|(property, now)| Some((property.words(), now.ok()?.to_string())));
        self.add(Setting::Property, told.collect());
        Ok(())
    }

    /// The limits of each throttle group, which `qom-set` changes without an event.
    fn ask_groups(&mut self, qmp: &mut Qmp) -> Result<(), QmpError> {
        let objects = self.kinds.get(&Setting::Object).into_iter().flatten();
        let groups: Vec<String> =
            objects.filter(|(_, kind)| *kind == throttles::GROUP).map(|(name, _)| name.clone()).collect();
        let limits = |id| ("qom-get", json!({ "path": format!("/objects/{id}"), "property": "limits" }));
        let answers = qmp.execute_all(&groups.iter().map(limits).collect::<Vec<_>>(), WITHIN)?;
        // One that cannot be asked was removed just now: the next look tells.
        let told =
            groups.into_iter().zip(answers).filter_map(|(id, limits)| Some((id, group(&limits.ok()?))));
        self.add(Setting::ThrottleGroup, told.collect());
        Ok(())
    }

    /// The questions.
    pub(crate) fn lines(depth: Depth) -> Vec<(&'static str, Value)> {
        let mut lines: Vec<(&str, Value)> = vec![("query-status", json!({}))];
        for question in QUESTIONS.iter().filter(|question| question.from <= depth) {
            let line = (question.command, (question.arguments)());
            if lines.last() != Some(&line) {
                lines.push(line);
            }
        }
        lines
    }

    /// What the answers to them come to.
    pub(crate) fn read(
        depth: Depth,
        lines: &[(&str, Value)],
        answers: Vec<Result<Value, QmpError>>,
    ) -> Result<Self, QmpError> {
        let asked = || QUESTIONS.iter().filter(|question| question.from <= depth);
        let mut taken = Self::default();
        for ((command, arguments), answer) in lines.iter().zip(answers) {
            let answer = match answer {
                Ok(answer) => answer,
                // An older QEMU has nothing of the kind.
                Err(error) if error.is_unknown_command() => continue,
                Err(error) => return Err(error),
            };
            if *command == "query-status" {
                taken.run_state = answer["status"].as_str().unwrap_or("unknown").to_owned();
            }
            for question in asked().filter(|q| q.command == *command && (q.arguments)() == *arguments) {
                taken.add(question.kind, (question.parse)(&answer));
            }
        }
        Ok(taken)
    }

    /// What several questions find of one kind is one list.
    fn add(&mut self, kind: Setting, things: Things) {
        self.kinds.entry(kind).or_default().extend(things.into_iter().take(MOST));
    }
}

fn list(answer: &Value) -> impl Iterator<Item = &Value> {
    answer.as_array().into_iter().flatten()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn migration(answer: &Value) -> Things {
    let status = answer["status"].as_str().unwrap_or("none");
    Things::from([("status".to_owned(), status.to_owned())])
}

fn blockers(answer: &Value) -> Things {
    list(&answer["blocked-reasons"])
        .map(|why| (why.as_str().unwrap_or("?").to_owned(), String::new()))
        .collect()
}

/// The children of a place in QEMU's object tree.
fn children(answer: &Value) -> impl Iterator<Item = (String, String)> {
    list(answer).filter_map(|child| {
        let kind = text(child, "type").strip_prefix("child<")?.strip_suffix('>')?;
        Some((text(child, "name").to_owned(), kind.to_owned()))
    })
}

fn devices(answer: &Value) -> Things {
    children(answer).collect()
}

/// Each with its kind, which its file name begins with. Who is connected counts of a debugger only.
fn chardevs(answer: &Value) -> Things {
    let named = |one: &Value| {
        let (label, file) = (text(one, "label"), text(one, "filename"));
        let kind = file.trim_start_matches("disconnected:").split(':').next().unwrap_or_default();
        let more = if debugger(label, file).is_some() { ", with a debugger connected" } else { "" };
        (label.to_owned(), format!("{kind}{more}"))
    };
    list(answer).map(named).collect()
}

/// Secrets and the like concern this host's connections only: a manager adds one for each of its own.
fn objects(answer: &Value) -> Things {
    let of_this_host = |kind: &str| ["secret", "tls-", "authz-"].iter().any(|stem| kind.starts_with(stem));
    children(answer).filter(|(_, kind)| !of_this_host(kind)).collect()
}

fn memory(answer: &Value) -> Things {
    list(answer).map(|one| (text(one, "id").to_owned(), format!("{} bytes", one["size"]))).collect()
}

fn memory_devices(answer: &Value) -> Things {
    let named = |(n, one): (usize, &Value)| {
        let data = &one["data"];
        let id = data["id"].as_str().map_or_else(|| format!("number {n}"), str::to_owned);
        // Of virtio-mem the guest has more or less of it, as it likes.
        let size = if data["max-size"].is_u64() { &data["max-size"] } else { &data["size"] };
        (id, format!("{}, {size} bytes", text(one, "type")))
    };
    list(answer).enumerate().map(named).collect()
}

fn cpus(answer: &Value) -> Things {
    list(answer).map(|cpu| (cpu["cpu-index"].to_string(), String::new())).collect()
}

fn drives(answer: &Value) -> Things {
    list(answer).map(|one| (drive_name(one), drive(one))).collect()
}

/// What a drive is called by users: the device's id, or the drive's where the device has none.
pub(crate) fn drive_name(one: &Value) -> String {
    let device = one["qdev"].as_str().unwrap_or_default();
    let named = device.strip_prefix("/machine/peripheral/").unwrap_or(device).split('/').next();
    let name = named.filter(|name| !name.is_empty()).unwrap_or(text(one, "device"));
    if device.starts_with("/machine/peripheral-anon") || device.starts_with("/machine/unattached") {
        return if text(one, "device").is_empty() {
            device.to_owned()
        } else {
            text(one, "device").to_owned()
        };
    }
    name.to_owned()
}

/// A limit is there if it is not zero.
fn limit(inserted: &Value, name: &str) -> Option<u64> {
    inserted[name].as_u64().filter(|limit| *limit > 0)
}

/// The limits of a throttle group.
fn group(limits: &Value) -> String {
    throttles::set(limits).map(|(name, limit)| format!("{name}={limit}")).collect::<Vec<_>>().join(", ")
}

fn drive(one: &Value) -> String {
    let inserted = &one["inserted"];
    let Some(node) = inserted["node-name"].as_str() else { return "empty".to_owned() };
    let limits = LIMITS.iter().filter_map(|name| Some(format!(", {name}={}", limit(inserted, name)?)));
    let limits = limits.chain(bitmaps(inserted).map(|bitmap| format!(", {bitmap}")));
    // A resized disk is none that the target's controllers know, and has no event.
    let size = inserted["image"]["virtual-size"].as_u64().map(|bytes| format!(", {bytes} bytes"));
    let size = size.unwrap_or_default();
    format!("node {node} ({}){size}{}", text(inserted, "file"), limits.collect::<String>())
}

/// Those that have a name; without one they are QEMU's own.
fn bitmaps(of: &Value) -> impl Iterator<Item = String> {
    list(&of["dirty-bitmaps"]).filter(|bitmap| bitmap["name"].is_string()).map(|bitmap| {
        let kind = if bitmap["persistent"] == true { "persistent bitmap" } else { "bitmap" };
        format!("{kind} {} of {} bytes", text(bitmap, "name"), bitmap["granularity"])
    })
}

fn nodes(answer: &Value) -> Things {
    list(answer).map(|one| (text(one, "node-name").to_owned(), node(one))).collect()
}

fn node(one: &Value) -> String {
    let driver = text(one, "drv");
    let mut words = vec![driver.to_owned(), text(one, "file").to_owned()];
    words.push(if one["ro"] == true { "read only" } else { "writable" }.to_owned());
    if matches!(driver, "raw" | "qcow2") {
        // An image's file grows by itself; what the guest sees of it does not.
        words.push(format!("{} bytes", one["image"]["virtual-size"]));
    }
    for flag in ["direct", "no-flush"] {
        if one["cache"][flag] == true {
            words.push(format!("cache.{flag}"));
        }
    }
    if let Some(backing) = one["backing_file"].as_str() {
        words.push(format!("on {backing}"));
    }
    words.extend(bitmaps(one));
    words.join(", ")
}

/// Who leads to whom, by names: QEMU's numbers are another each time. Back ends without a name are those of
/// jobs and exports. A node may be there that nobody uses.
fn edges(answer: &Value) -> Things {
    let names: BTreeMap<u64, (&str, &str)> = list(&answer["nodes"])
        .filter_map(|node| Some((node["id"].as_u64()?, (text(node, "type"), text(node, "name")))))
        .collect();
    let named = |id: &Value| id.as_u64().and_then(|id| names.get(&id).copied()).unwrap_or_default();
    let mut edges = Things::new();
    for node in list(&answer["nodes"]) {
        let (kind, name) = (text(node, "type"), text(node, "name"));
        match kind {
            "block-job" => drop(edges.insert(format!("job {name}"), String::new())),
            "block-driver" => drop(edges.insert(format!("node {name}"), String::new())),
            _ => {}
        }
    }
    for edge in list(&answer["edges"]).take(MOST) {
        let ((kind, parent), (_, child)) = (named(&edge["parent"]), named(&edge["child"]));
        let parent = match (kind, parent) {
            ("block-backend", "") => "a user without a name".to_owned(),
            ("block-backend", name) => format!("drive {}", name.trim_start_matches("/machine/peripheral/")),
            ("block-job", name) => format!("job {name}"),
            (_, name) => format!("node {name}"),
        };
        let mut key = format!("{parent} → {} {child}", text(edge, "name"));
        while edges.contains_key(&key) {
            key.push_str(", once more");
        }
        edges.insert(key, String::new());
    }
    edges
}

/// Those that have an end still wait for somebody to take note of it: nothing of them is lost.
fn jobs(answer: &Value) -> Things {
    let alive = |job: &&Value| !matches!(text(job, "status"), "concluded" | "null" | "undefined");
    list(answer).filter(alive).map(|job| (text(job, "id").to_owned(), text(job, "type").to_owned())).collect()
}

fn exports(answer: &Value) -> Things {
    let said = |one: &Value| format!("{} of node {}", text(one, "type"), text(one, "node-name"));
    list(answer).map(|one| (text(one, "id").to_owned(), said(one))).collect()
}

/// Of a card only that it is there: the guest may give it another address.
fn networks(answer: &Value) -> Things {
    let mut found = Things::new();
    for line in answer.as_str().unwrap_or_default().lines() {
        if let Some(port) = hub_port(line) {
            found.insert(port.to_owned(), "hubport".to_owned());
        }
        let line = line.trim().trim_start_matches(['\\', ' ']);
        let Some((id, rest)) = line.split_once(": index=") else { continue };
        let field = |key: &str| rest.split(',').find_map(|field| field.strip_prefix(key));
        let queue = rest.split(',').next().unwrap_or_default();
        let kind = field("type=").unwrap_or_default();
        let tap = field("ifname=").map_or(String::new(), |tap| format!(" {tap}"));
        found.insert(format!("{id} queue {queue}"), format!("{kind}{tap}"));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names and values.
    type Kept = &'static [(&'static str, &'static str)];

    fn things(parse: Parse, answer: Value) -> Vec<(String, String)> {
        parse(&answer).into_iter().collect()
    }

    fn row(name: &str, value: &str) -> (String, String) {
        (name.to_owned(), value.to_owned())
    }

    #[test]
    fn what_counts_is_kept_and_what_changes_by_itself_is_not() {
        let bitmap = json!({ "name": "b", "granularity": 65536, "count": 7, "persistent": false });
        let own = json!({ "granularity": 65536, "persistent": false });
        let medium = json!({ "node-name": "#block1", "file": "/a.iso", "bps": 5, "iops": 0,
            "image": { "actual-size": 7, "virtual-size": 9 },
                             "dirty-bitmaps": [bitmap, own] });
        let disk = "/machine/peripheral/blk0/virtio-backend";
        let table: [(Parse, Value, Kept); 12] = [
            (migration, json!({}), &[("status", "none")]),
            (migration, json!({ "status": "active", "ram": { "transferred": 7 } }), &[("status", "active")]),
            (blockers, json!({ "blocked-reasons": ["no"] }), &[("no", "")]),
            (
                devices,
                json!([{ "name": "type", "type": "string" }, { "name": "cd", "type": "child<ide-cd>" }]),
                &[("cd", "ide-cd")],
            ),
            (objects, json!([{ "name": "s", "type": "child<secret>" }]), &[]),
            (
                chardevs,
                json!([{ "label": "n", "filename": "null", "frontend-open": true },
                       { "label": "q", "filename": "disconnected:unix:/q,server=on" },
                       { "label": "t", "filename": "tcp:10.0.0.1:7,server=on <-> 10.0.0.2:9" },
                       { "label": "gdb", "filename": "tcp:10.0.0.1:8,server=on <-> 10.0.0.2:9" }]),
                &[("gdb", "tcp, with a debugger connected"), ("n", "null"), ("q", "unix"), ("t", "tcp")],
            ),
            (
                drives,
                json!([{ "device": "cd0", "qdev": "cd", "inserted": medium }, { "device": "", "qdev": disk },
                       { "device": "d", "qdev": "/machine/peripheral-anon/device[0]/virtio-backend" }]),
                &[
                    ("blk0", "empty"),
                    ("cd", "node #block1 (/a.iso), 9 bytes, bps=5, bitmap b of 65536 bytes"),
                    ("d", "empty"),
                ],
            ),
            (
                nodes,
                json!([{ "node-name": "d0", "drv": "raw", "file": "/d", "ro": false,
                    "image": { "virtual-size": 9, "actual-size": 3 },
                         "cache": { "direct": false, "no-flush": true, "writeback": true },
                         "dirty-bitmaps": [bitmap] },
                       { "node-name": "f0", "drv": "file", "file": "/d", "ro": true,
                           "image": { "virtual-size": 9 } }]),
                &[
                    ("d0", "raw, /d, writable, 9 bytes, cache.no-flush, bitmap b of 65536 bytes"),
                    ("f0", "file, /d, read only"),
                ],
            ),
            (
                jobs,
                json!([{ "id": "b0", "type": "backup", "status": "running", "current-progress": 7 },
                       { "id": "old", "type": "mirror", "status": "concluded" }]),
                &[("b0", "backup")],
            ),
            (exports, json!([{ "id": "e0", "type": "nbd", "node-name": "d0" }]), &[("e0", "nbd of node d0")]),
            (
                memory_devices,
                json!([{ "type": "dimm", "data": { "id": "dimm0", "size": 9, "addr": 7 } },
                       { "type": "virtio-mem", "data": { "id": "m", "size": 3, "max-size": 9 } }]),
                &[("dimm0", "dimm, 9 bytes"), ("m", "virtio-mem, 9 bytes")],
            ),
            (
                networks,
                json!(
                    "n.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n \\ net0: \
                     index=0,type=tap,ifname=t0,script=no\r\nhub 1\r\n \\ p0\r\n"
                ),
                &[("n.0 queue 0", "nic"), ("net0 queue 0", "tap t0"), ("p0", "hubport")],
            ),
        ];
        for (parse, answer, kept) in table {
            let kept: Vec<_> = kept.iter().map(|(name, value)| row(name, value)).collect();
            assert_eq!(things(parse, answer.clone()), kept, "{answer}");
        }
    }

    #[test]
    fn the_block_graph_is_known_by_names_and_not_by_qemus_numbers() {
        let graph = |first: u64| {
            json!({
                "nodes": [{ "id": first, "type": "block-backend", "name": "" },
                    { "id": first + 1, "type": "block-driver", "name": "d0" },
                          { "id": first + 2, "type": "block-job", "name": "b0" }],
                "edges": [{ "parent": first, "child": first + 1, "name": "root", "perm": [] },
                          { "parent": first, "child": first + 1, "name": "root" },
                          { "parent": first + 2, "child": first + 1, "name": "source" }]
            })
        };
        let kept = [
            "a user without a name → root d0",
            "a user without a name → root d0, once more",
            "job b0",
            "job b0 → source d0",
            "node d0",
        ];
        assert_eq!(edges(&graph(1)).into_keys().collect::<Vec<_>>(), kept);
        assert_eq!(edges(&graph(1)), edges(&graph(77)));
        assert_eq!(edges(&json!({ "edges": [{ "parent": -1 }], "nodes": [7] })).len(), 1);
    }
}
