//! Real QEMUs are started with what passes the checks, made from what they say of their devices and objects,
//! and watched from outside.

use crate::input::Input;
use qemu::{
    Host, Recipe, Vm,
    recipe::{Argument, Backing, MemoryBlock, check, check_argument},
};
use rustix::fs::inotify;
use std::{
    collections::BTreeMap,
    env, fs,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};
use units::Locked;

/// As an ordinary test: a start takes a quarter of a second. libFuzzer starts as many as it has time for.
const MOST_IN_TESTS: usize = 12;

/// Devices and objects in one QEMU.
const MOST_PARTS: usize = 4;

/// Properties of each.
const MOST_PROPERTIES: usize = 6;

const MACHINES: [&str; 3] = ["q35", "pc", "microvm"];

/// A device or an object that QEMU knows.
struct Model {
    option: &'static str,
    name: String,
}

fn said(qemu: &Path, arguments: &[&str]) -> String {
    let output = Command::new(qemu).args(arguments).output();
    output.map_or(String::new(), |output| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn installed() -> Vec<PathBuf> {
    let other = env::var_os("WHIMBREL_QEMU_10").map(PathBuf::from);
    let all = [PathBuf::from("/usr/bin/qemu-system-x86_64")].into_iter().chain(other);
    all.filter(|path| path.is_file()).collect()
}

/// Every device and object of a QEMU that may be made at all. What is refused by its name is refused with any
/// property.
fn kinds() -> &'static [Model] {
    static KINDS: OnceLock<Vec<Model>> = OnceLock::new();
    KINDS.get_or_init(|| {
        let Some(qemu) = installed().into_iter().next() else { return vec![] };
        let devices = said(&qemu, &["-device", "help"]);
        let devices = devices.lines().filter_map(|line| line.strip_prefix("name \"")?.split('"').next());
        let objects = said(&qemu, &["-object", "help"]);
        let objects = objects.lines().map(str::trim).filter(|line| !line.is_empty() && !line.contains(' '));
        let all = devices.map(|name| ("-device", name)).chain(objects.map(|name| ("-object", name)));
        let known = all.filter(|(option, name)| {
            check_argument(&Argument::new(option, format!("{name},id=x")), &[]).is_ok()
        });
        known.map(|(option, name)| Model { option, name: name.to_owned() }).collect()
    })
}

/// Its properties: asked of each QEMU once, when one is to be made.
fn properties(qemu: &Path, kind: &Model) -> Vec<String> {
    type Known = BTreeMap<(PathBuf, String), Vec<String>>;
    static KNOWN: Mutex<Known> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.locked();
    let key = (qemu.to_owned(), kind.name.clone());
    let ask = || {
        let help = said(qemu, &[kind.option, &format!("{},help", kind.name)]);
        let name = |line: &str| Some(line.trim().split_once("=<")?.0.to_owned());
        help.lines().filter_map(name).collect()
    };
    known.entry(key).or_insert_with(ask).clone()
}

/// A directory that nobody has a reason to look into, and a file there.
struct Canary {
    folder: tempfile::TempDir,
    watch: OwnedFd,
}

impl Canary {
    fn new() -> std::io::Result<Self> {
        use inotify::{CreateFlags, WatchFlags};
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join("canary"), "sings")?;
        let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let all = WatchFlags::OPEN | WatchFlags::CREATE | WatchFlags::ACCESS | WatchFlags::MODIFY;
        inotify::add_watch(&watch, folder.path(), all)?;
        Ok(Self { folder, watch })
    }

    fn path(&self) -> String {
        self.folder.path().join("canary").display().to_string()
    }

    fn is_touched(&self) -> bool {
        let mut room = [MaybeUninit::uninit(); 4096];
        inotify::Reader::new(&self.watch, &mut room).next().is_ok()
    }
}

/// Starts a QEMU that waits for this VM, and watches what it opens, from outside: with the comparison by
/// which a target watches its own, and with a file that nobody may touch. Says what was seen that was not
/// granted.
pub fn seen(recipe: &Recipe, qemu: &Path, canary: &Path) -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    // As root, without a view of its own: what it tries to open is there.
    let root = rustix::process::geteuid().is_root().then(|| "root".to_owned());
    let host = Host { qemu: Some(qemu.to_owned()), user: root, ..Host::new(folder.path().join("run")) };
    // One that does not start with this has perhaps opened something all the same.
    let Ok(mut vm) = Vm::incoming(recipe, &host) else { return Ok(()) };
    let seen = vm.opens_no_more().map_err(|reasons| reasons.join("; "));
    let ended = ports::Machine::destroy(&mut vm).map_err(|error| error.to_string());
    let canary = canary.display();
    seen.and(ended).map_err(|why| format!("{why}; the canary is {canary}"))
}

/// A VM with these arguments, and what they may refer to.
pub fn recipe(machine: &str, arguments: Vec<Argument>) -> Recipe {
    let usual = [
        ("-blockdev", "driver=null-co,node-name=d0,read-zeroes=on,size=1048576"),
        ("-blockdev", "driver=null-co,node-name=d1,read-zeroes=on,size=1048576"),
        ("-chardev", "null,id=c0"),
        ("-chardev", "null,id=c1"),
        ("-object", "rng-builtin,id=r0"),
    ];
    let usual = usual.map(|(option, value)| Argument::new(option, value));
    Recipe {
        name: "opens".into(),
        memory: vec![MemoryBlock { id: "m0".into(), bytes: 64 << 20, backing: Backing::Memfd }],
        main_memory: Some("m0".into()),
        arguments: usual.into_iter().chain(arguments).collect(),
        ..Recipe::of(machine)
    }
}

/// The first byte is the QEMU, the second the machine; then parts: a kind (two bytes), how many properties,
/// each with its value.
pub(crate) fn run(data: &[u8]) -> bool {
    static STARTED: AtomicUsize = AtomicUsize::new(0);
    let (kinds, qemus) = (kinds(), installed());
    if kinds.is_empty() || !cfg!(feature = "libfuzzer") && STARTED.fetch_add(1, Relaxed) >= MOST_IN_TESTS {
        return true;
    }
    let mut input = Input::new(data);
    let qemu = &qemus[usize::from(input.u8()) % qemus.len()];
    let machine = input.one_of(&MACHINES);
    let canary = Canary::new().expect("a directory can be watched");
    let mut arguments = Vec::new();
    for n in 0..MOST_PARTS {
        if input.is_empty() {
            break;
        }
        let kind = &kinds[usize::from(input.u16()) % kinds.len()];
        let known = properties(qemu, kind);
        let mut value = format!("{},id=part{n}", kind.name);
        for _ in 0..usize::from(input.u8()) % MOST_PROPERTIES {
            let property = known.get(usize::from(input.u16()) % known.len().max(1));
            let given = given(&mut input, &canary.path());
            if let Some(property) = property {
                value.push_str(&format!(",{property}={given}"));
            }
        }
        arguments.push(Argument::new(kind.option, value));
    }
    // A part that does not pass would hide the others.
    arguments.retain(|argument| check_argument(argument, &[]).is_ok());
    let recipe = recipe(machine, arguments);
    if !check(&recipe).is_empty() {
        return false;
    }
    let seen = seen(&recipe, qemu, Path::new(&canary.path()));
    assert!(seen.is_ok() && !canary.is_touched(), "{:?}: {seen:?}", recipe.arguments);
    true
}

/// What a property may be set to, harmful where anything is.
fn given(input: &mut Input<'_>, canary: &str) -> String {
    let plain = [
        "on",
        "off",
        "0",
        "1",
        "4096",
        "d0",
        "d1",
        "c0",
        "c1",
        "r0",
        "auto",
        "whimbrel-qmp",
        "/dev/null",
        "file:/x",
        "fd:3",
        "tcp:127.0.0.1:9",
        "unix:/x",
        "127.0.0.1:9",
        "",
    ];
    let number = usize::from(input.u8());
    // Every third is the canary, by itself or in a form that some option takes.
    match number % 9 {
        0 => canary.to_owned(),
        3 => format!("file:{canary}"),
        6 => format!("unix:{canary}"),
        _ => plain[number % plain.len()].to_owned(),
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    // A few of the devices, on each machine: with nothing, and with words of each sort.
    let parts = |from: u16| {
        (0..MOST_PARTS as u16).flat_map(move |n| [((from + 37 * n) % 251) as u8, 0, 2, 3, 0, 5, 7, 0, 9])
    };
    (0..6_u8).map(|n| [n, n].into_iter().chain(parts(u16::from(n) * 11)).collect()).collect()
}
