//! VMs: run, adopt, list, show, stop, resolve.

use crate::{
    args::{Adopt, List, Resolve, Run, Show, Stop},
    client::{Client, encode, vm_path},
    trouble::{Trouble, WRONG_USE},
    words::{counted, table},
};
use agent::{
    api::{AdoptRequest, ResolveRequest, RunRequest, VmInfo, VmState},
    hypervisor::Examined,
    store::Origin,
};
use hyper::Method;
use serde_json::{Value, json};
use std::{
    fs,
    io::{self, Read, Write},
    path::{Path, PathBuf, absolute},
    process::ExitCode,
};
use units::Bytes;

pub(crate) fn run(client: &Client, args: &Run) -> Result<ExitCode, Trouble> {
    let shown = args.file.display().to_string();
    let unreadable = |error: io::Error| {
        Trouble::local(WRONG_USE, format!("cannot read the VM file {shown}"), error.to_string())
    };
    let (text, path) = if args.file == Path::new("-") {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).map_err(unreadable)?;
        (text, absolute("standard input").map_err(unreadable)?)
    } else {
        let text = fs::read_to_string(&args.file).map_err(unreadable)?;
        (text, absolute(&args.file).map_err(unreadable)?)
    };
    let request = RunRequest { text, path, fenced: args.i_have_fenced.clone() };
    let vm: VmInfo = Client::runtime()?.block_on(client.post("/v1/vms", &request))?;
    say(args.json, &vm, || format!("{} runs (QEMU is process {})\n", vm.name, pid(&vm)))
}

pub(crate) fn adopt(client: &Client, args: &Adopt) -> Result<ExitCode, Trouble> {
    let qmp = absolute(&args.qmp)?;
    let Some(name) = args.name.as_ref().filter(|_| !args.check) else {
        return check(client, args, qmp);
    };
    let path = vm_path(name, "/adopt")?;
    let vm: VmInfo = Client::runtime()?.block_on(client.post(&path, &AdoptRequest { qmp }))?;
    say(args.json, &vm, || {
        let adopted = format!("{} is adopted (QEMU is process {}); it can be migrated\n", vm.name, pid(&vm));
        adopted + &listed("different on another host:", &vm.different)
    })
}

/// Says what would become of it; fails if it could not be adopted.
fn check(client: &Client, args: &Adopt, qmp: PathBuf) -> Result<ExitCode, Trouble> {
    let qmp_shown = qmp.display().to_string();
    let vm: Examined = Client::runtime()?.block_on(client.post("/v1/check", &AdoptRequest { qmp }))?;
    let name = args.name.as_deref().unwrap_or("NAME");
    say(args.json, &vm, || {
        let verdict = match vm.hindrances.len() as u64 {
            0 => format!("QEMU (process {}) can be adopted and moved", vm.pid),
            n => format!(
                "QEMU (process {}) cannot be moved yet, for {}:",
                vm.pid,
                counted(n, "reason", "reasons")
            ),
        };
        let next = match vm.hindrances.is_empty() {
            true => format!("whimbrel adopt {name} --qmp {qmp_shown} takes charge of it\n"),
            false => String::new(),
        };
        listed(&verdict, &vm.hindrances)
            + &listed("goes with it:", &vm.carried)
            + &listed("different on another host:", &vm.different)
            + &next
    })?;
    Ok(if vm.hindrances.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A heading and its lines; nothing of an empty list but a verdict.
fn listed(heading: &str, lines: &[String]) -> String {
    if lines.is_empty() && heading.ends_with(':') {
        return String::new();
    }
    let lines = lines.iter().map(|line| format!("  - {line}\n"));
    std::iter::once(format!("{heading}\n")).chain(lines).collect()
}

pub(crate) fn list(client: &Client, args: &List) -> Result<ExitCode, Trouble> {
    let vms: Vec<VmInfo> = Client::runtime()?.block_on(client.get("/v1/vms"))?;
    say(args.json, &vms, || {
        if vms.is_empty() {
            return "no VMs; `whimbrel run` starts one, `whimbrel adopt` takes charge of a running QEMU\n"
                .to_owned();
        }
        let head = ["NAME", "STATE", "VCPUS", "MEMORY", "MACHINE", "PID", ""].map(str::to_owned);
        let rows = vms.iter().map(|vm| {
            let shape = Shape::of(&vm.recipe);
            vec![
                vm.name.clone(),
                state(vm.state).to_owned(),
                shape.vcpus,
                shape.memory,
                shape.machine,
                pid(vm),
                note(vm),
            ]
        });
        table(&[head.to_vec()].into_iter().chain(rows).collect::<Vec<_>>())
    })
}

pub(crate) fn show(client: &Client, args: &Show) -> Result<ExitCode, Trouble> {
    let vm: VmInfo = Client::runtime()?.block_on(client.get(&vm_path(&args.vm, "")?))?;
    say(args.json, &vm, || {
        let shape = Shape::of(&vm.recipe);
        let origin = match vm.origin {
            Origin::Run => "started by whimbrel run",
            Origin::Adopted => "adopted",
            Origin::Migrated => "brought by a migration",
        };
        let owner = match (&vm.owner, vm.epoch) {
            (Some(owner), Some(epoch)) => format!("{owner}, at epoch {epoch}"),
            _ => "-".to_owned(),
        };
        let rows = [
            ("name", vm.name.clone()),
            ("state", format!("{}  {}", state(vm.state), note(&vm))),
            ("vcpus", shape.vcpus),
            ("memory", shape.memory),
            ("machine", shape.machine),
            ("accel", shape.accel),
            ("qemu", format!("process {}", pid(&vm))),
            ("qmp", vm.qmp.display().to_string()),
            ("origin", origin.to_owned()),
            ("owner", owner),
        ];
        let rows = rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]);
        let ports = vm.ports.iter().map(|port| vec!["port".to_owned(), self::port(port)]);
        table(&rows.chain(ports).collect::<Vec<_>>())
    })
}

pub(crate) fn stop(client: &Client, args: &Stop) -> Result<ExitCode, Trouble> {
    Client::runtime()?.block_on(client.order(Method::DELETE, &vm_path(&args.vm, "")?, None))?;
    say(args.json, &json!({ "vm": args.vm, "stopped": true }), || format!("{} is stopped\n", args.vm))
}

pub(crate) fn resolve(client: &Client, args: &Resolve) -> Result<ExitCode, Trouble> {
    let path = vm_path(&args.vm, "/resolve")?;
    let body = encode(&ResolveRequest { here_fenced: args.i_have_fenced.clone() })?;
    Client::runtime()?.block_on(client.order(Method::POST, &path, Some(body)))?;
    say(args.json, &json!({ "vm": args.vm, "resolved": "here" }), || {
        format!("{} runs here again; {} must never start it\n", args.vm, args.i_have_fenced)
    })
}

/// The same for both readers.
fn say(
    as_json: bool,
    value: &impl serde::Serialize,
    words: impl FnOnce() -> String,
) -> Result<ExitCode, Trouble> {
    let mut out = io::stdout().lock();
    if as_json {
        out.write_all(&encode(value)?)?;
        out.write_all(b"\n")?;
    } else {
        out.write_all(words().as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn pid(vm: &VmInfo) -> String {
    vm.pid.map_or("-".to_owned(), |pid| pid.to_string())
}

/// Where a character device ends: under the name that stays the same, if it has one.
fn port(port: &Value) -> String {
    let text = |key: &str| port[key].as_str().unwrap_or_default();
    let place = port["link"].as_str().unwrap_or(text("path"));
    let log = match port["log"].as_str().filter(|log| *log != place) {
        Some(log) => format!(", written to {log}"),
        None => String::new(),
    };
    format!("{} ({}) {place}{log}", text("id"), text("kind"))
}

fn note(vm: &VmInfo) -> String {
    match (&vm.migration, &vm.note) {
        (Some(migration), _) => {
            format!("to {}; `whimbrel status {} --follow` watches it", migration.to, vm.name)
        }
        (None, note) => note.clone().unwrap_or_default(),
    }
}

fn state(state: VmState) -> &'static str {
    match state {
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Busy => "busy",
        VmState::Migrating => "migrating",
        VmState::Arriving => "arriving",
        VmState::Left => "left",
        VmState::InDoubt => "in doubt",
        VmState::Gone => "gone",
        VmState::Unknown => "unknown",
    }
}

/// What a recipe says of a VM's shape, as far as it is understood.
struct Shape {
    vcpus: String,
    memory: String,
    machine: String,
    accel: String,
}

impl Shape {
    fn of(recipe: &Value) -> Self {
        let unknown = || "-".to_owned();
        let words = |name: &str| recipe[name].as_str().map_or_else(unknown, str::to_owned);
        let first = |text: String| text.split(',').next().unwrap_or_default().to_owned();
        let blocks = recipe["memory"].as_array();
        let bytes = blocks.map(|blocks| blocks.iter().filter_map(|block| block["bytes"].as_u64()).sum());
        Self {
            vcpus: first(words("smp")).trim_start_matches("cpus=").to_owned(),
            memory: bytes.map_or_else(unknown, |bytes| Bytes(bytes).to_string()),
            machine: first(words("machine")),
            accel: words("accel"),
        }
    }
}
