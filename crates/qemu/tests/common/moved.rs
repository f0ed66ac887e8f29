//! A VM that is taken over to another host, without an agent; and whether it is there what it was.

use super::{hand::ByHand, host};
use attach::{Source, Target};
use ports::{GuestMemory, Machine};
use qemu::{Vm, ports::PortKind, qmp::Qmp};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    fs::File,
    io::{Read, Seek},
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    time::{Duration, Instant},
};
use units::BlockId;

/// What the guest can see of its machine, and what it is called: the devices with all their properties, the
/// buses, the drives.
fn look(vm: &mut Vm) -> Vec<(&'static str, String)> {
    let mut asked = |line| (line, vm.qmp().human(line).unwrap());
    vec![asked("info qtree"), asked("info pci"), ("info block", drives(&asked("info block").1))]
}

/// What the guest shows, as QEMU's `screendump` writes it; nothing if there is no screen.
fn screen(qmp: &mut Qmp) -> Vec<u8> {
    // A QEMU of ours has no place to write to but what it is handed.
    let mut file = tempfile::tempfile().unwrap();
    let writes = File::options().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    let set = qmp.add_fd(writes.as_fd()).unwrap();
    drop(qmp.execute("screendump", json!({ "filename": format!("/dev/fdset/{set}") })));
    qmp.remove_fd_set(set).unwrap();
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).unwrap();
    bytes
}

/// Waits until the guest has drawn something: more than one colour.
pub(crate) fn drawn(qmp: &mut Qmp) -> Result<(), String> {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let colours: BTreeSet<u8> = screen(qmp).into_iter().skip(64).collect();
        if colours.len() > 1 {
            return Ok(());
        }
        if Instant::now() > end {
            return Err("nothing is drawn".to_owned());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The pictures of a screen whose guest stands still: a cursor of text blinks, by the host's clock.
fn screens(qmp: &mut Qmp) -> BTreeSet<Vec<u8>> {
    let first = screen(qmp);
    let mut seen = BTreeSet::from([first]);
    let end = Instant::now() + Duration::from_millis(700);
    while seen.len() < 2 && seen.iter().any(|picture| picture.len() > 64) && Instant::now() < end {
        seen.insert(screen(qmp));
        std::thread::sleep(Duration::from_millis(20));
    }
    seen
}

/// Without the names that QEMU makes up anew each time. Their order is that in which they were added, and
/// says nothing.
fn drives(text: &str) -> String {
    let plain = |line: &str| match line.split_once(" (#block") {
        Some((name, rest)) => format!("{name} {}", rest.split_once(')').map_or("", |(_, rest)| rest)),
        None => line.to_owned(),
    };
    // Before the guest runs, the disks are not its.
    let text = text.replace(", inactive)", ")").lines().map(plain).collect::<Vec<_>>().join("\n");
    let mut drives: Vec<&str> = text.split("\n\n").map(str::trim).collect();
    drives.sort_unstable();
    drives.join("\n\n")
}

/// What is said of this host's end of a device, not of the device. What the cache is said to be follows from
/// what the guest has agreed on with the device, and is set anew when it does so again: QEMU's own migration
/// does the same.
///
/// A USB device's port is said there, where QEMU had chosen it.
fn is_of_the_host(line: &str) -> bool {
    ["chardev", "netdev = ", "drive = ", "Cache mode:", "port = \""]
        .iter()
        .any(|key| line.trim_start().starts_with(key))
}

/// Copies the guest's memory, which stands still.
pub(crate) fn copy(from: &Vm, to: &Vm) {
    let source = Source::open(from.process().pid(), from.ram_blocks()).unwrap().memory();
    let target = Target::open(to.process().pid(), to.ram_blocks()).unwrap().memory();
    for id in (0..source.blocks().len()).map(|id| BlockId(id as u16)) {
        for run in source.present(id).unwrap().runs() {
            let mut bytes = vec![0; run.bytes().0 as usize];
            source.read(id, run, &mut bytes).unwrap();
            target.write(id, run, &bytes).unwrap();
        }
    }
}

/// The sockets and terminals of a VM are this host's own, and each can be used.
fn hears_only_here(vm: &Vm) -> Result<(), String> {
    let said = std::fs::read_to_string(vm.process().proc_path("cmdline")).unwrap();
    for word in said.split('\0').filter(|word| word.starts_with("socket,") || word.starts_with("file,")) {
        let folder = vm.belongings().qmp.parent().unwrap().display().to_string();
        if !word.contains(&folder) && !word.contains(",fd=") {
            return Err(format!("{word} is not below {folder}"));
        }
    }
    for port in &vm.belongings().ports {
        let link = port.link.as_deref().unwrap_or(&port.path);
        let found = match port.kind {
            PortKind::Socket | PortKind::Vnc => UnixStream::connect(link).map(drop),
            PortKind::Pty | PortKind::File => File::options().append(true).open(link).map(drop),
        };
        found.map_err(|error| format!("{port:?}: {error}"))?;
    }
    Ok(())
}

/// Takes a VM of these words over to another host, and says what is not the same there.
pub(crate) fn there(words: &[&str], program: Option<PathBuf>) -> Result<(), String> {
    take_over(words, &[], program, false)
}

/// The same once this was plugged in: arguments of `device_add` and its like, each after its command.
pub(crate) fn there_plugged(
    words: &[&str],
    plugged: &[(&str, Value)],
    program: Option<PathBuf>,
) -> Result<(), String> {
    take_over(words, plugged, program, false)
}

/// The same once the guest has drawn something, which is shown there, too.
pub(crate) fn there_drawn(words: &[&str], program: Option<PathBuf>) -> Result<(), String> {
    take_over(words, &[], program, true)
}

fn take_over(
    words: &[&str],
    plugged: &[(&str, Value)],
    program: Option<PathBuf>,
    draws: bool,
) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let usual = program.clone().unwrap_or("qemu-system-x86_64".into());
    let hand = ByHand::start_with(usual, &[&["-m", "64M"], words].concat());
    if draws {
        drawn(&mut Qmp::connect(&hand.qmp).map_err(|error| text(&error))?)?;
    }
    let mut qmp = Qmp::connect(&hand.qmp).map_err(|error| text(&error))?;
    for (command, arguments) in plugged {
        qmp.execute(command, arguments.clone()).map_err(|error| format!("{arguments}: {error}"))?;
    }
    drop(qmp);
    let mut vm = Vm::adopt("hand", &hand.qmp).map_err(|error| text(&error))?.vm;
    let target = host(hand.folder.path(), "target", program);
    let private = vm.copy_ahead().map_err(|error| text(&error))?;
    vm.stop().map_err(|error| text(&error))?;
    let before = look(&mut vm);
    let pictures = draws.then(|| screens(vm.qmp()));
    let state = vm.save().map_err(|error| text(&error))?.state;
    let mut next = Vm::incoming(vm.recipe(), &target).map_err(|error| text(&error))?;
    copy(&vm, &next);
    hears_only_here(&next)?;
    let loaded = next.take_ahead(&private).and_then(|()| next.load(&state)).map_err(|error| text(&error));
    let after = loaded.map(|()| look(&mut next));
    let picture = draws.then(|| screen(next.qmp()));
    next.destroy().map_err(|error| text(&error))?;
    let after = after?;
    if let Some((pictures, picture)) = pictures.zip(picture)
        && !pictures.contains(&picture)
    {
        let largest = pictures.iter().map(Vec::len).max().unwrap_or(0);
        return Err(format!("its screen is another one, {largest} and {} bytes", picture.len()));
    }
    for ((what, there), (_, here)) in before.iter().zip(after) {
        let lines = |text: &str| -> Vec<String> {
            let mut lines: Vec<_> =
                text.lines().filter(|line| !is_of_the_host(line)).map(str::to_owned).collect();
            // In the order in which they were made; their places are among their properties.
            if what == &"info qtree" {
                lines.sort();
            }
            lines
        };
        let (there, here) = (lines(there), lines(&here));
        let differs = there.iter().zip(&here).find(|(there, here)| there != here);
        if differs.is_some() || there.len() != here.len() {
            return Err(format!("{what}: {differs:?}, {} and {} lines", there.len(), here.len()));
        }
    }
    Ok(())
}
