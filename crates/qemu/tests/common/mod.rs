//! Guests for the tests, and hosts for them.

#![allow(dead_code)] // Each test binary uses its part.

pub(crate) mod ends;
pub(crate) mod hand;
pub(crate) mod moved;

use qemu::{Host, Limits, Recipe, VmFile, preflight, recipe::SeenFile, sharing};
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// QEMU 10, where `./dev test` says that it is.
pub(crate) fn qemu_10() -> Option<PathBuf> {
    found("WHIMBREL_QEMU_10", "a QEMU 10 (tests/qemu-10.sh unpacks one)")
}

/// The kernel and the initramfs of the test guest.
pub(crate) fn guest() -> Option<(PathBuf, PathBuf)> {
    let kernel = found("WHIMBREL_GUEST_KERNEL", "a guest kernel")?;
    Some((kernel, found("WHIMBREL_GUEST_INITRD", "the guest's initramfs")?))
}

/// Without it a test is skipped, unless nothing may be.
pub(crate) fn found(variable: &str, what: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_file());
    if path.is_none() {
        skip(what, &format!("{variable} must name {what} (./dev test sets it)"));
    }
    path
}

/// Says that a test was skipped, unless nothing may be.
pub(crate) fn skip(what: &str, why: &str) {
    assert!(std::env::var_os("WHIMBREL_MUST_RUN").is_none(), "{what} MUST RUN and cannot: {why}");
    // Not by a macro: what those print is shown of failing tests only.
    let _ = writeln!(std::io::stderr(), "\n*** SKIPPED: {what}: {why} ***");
}

/// The kernel command line of a guest on this kind of machine.
pub(crate) fn command_line(machine: &str) -> String {
    // A microvm has no timer by which Linux could find out how fast its TSC runs: under emulation it is the
    // host's.
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap();
    let mhz = cpus
        .lines()
        .find_map(|line| line.strip_prefix("cpu MHz")?.rsplit(':').next()?.trim().parse::<f64>().ok());
    let clock = match mhz {
        Some(mhz) if machine == "microvm" => format!(" tsc_early_khz={:.0}", mhz * 1000.0),
        _ => String::new(),
    };
    format!(
        "console=ttyS0 quiet panic=-1{clock} whimbrel.beat=100ms whimbrel.disk=vda,set=4M,rate=100p,direct=on"
    )
}

/// A host whose sockets are in `folder`.
pub(crate) fn host(folder: &Path, name: &str, qemu: Option<PathBuf>) -> Host {
    // Whatever these tests use.
    let limits = Limits { disks: vec!["/".into()], boot: vec!["/".into()], ..Limits::default() };
    Host { qemu, limits, ..Host::new(folder.join(name)) }
}

/// The recipe of a VM file's text, on `host`.
pub(crate) fn recipe(text: &str, host: &Host) -> Recipe {
    let file = VmFile::parse(text, Path::new("test.toml")).unwrap();
    file.recipe(host).unwrap()
}

/// What `host` says to a VM of a source that sees the same files, and shows them.
pub(crate) fn preflight(recipe: &Recipe, host: &Host) -> Vec<String> {
    preflight_of(recipe, host, Path::to_owned)
}

/// The same of a source that has files elsewhere.
pub(crate) fn preflight_of(recipe: &Recipe, host: &Host, there: impl Fn(&Path) -> PathBuf) -> Vec<String> {
    let mut recipe = recipe.clone();
    let is_file = |file: &SeenFile| file.path.is_absolute() && there(&file.path).is_file();
    let (files, others) = recipe.files.into_iter().partition(is_file);
    recipe.files = files;
    let open = |file: &SeenFile, write: bool| {
        File::options().read(true).write(write).open(there(&file.path)).map_err(|error| error.to_string())
    };
    let shown = sharing::show(&recipe, "a", "1", &open);
    // What nobody can have, or show, is asked for nevertheless.
    let mut asked = shown.as_ref().map_or(recipe, |shown| shown.recipe.clone());
    asked.files.extend(others);
    preflight::check(&asked, host, "a", "1", || {}).err().unwrap_or_default()
}

/// What the guest has counted by its last heartbeat: heartbeats, and pages written to its disk.
pub(crate) fn counted(console: &Path) -> (u64, u64) {
    let text = fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(!text.contains("CORRUPT") && !text.contains("Kernel panic"), "{text}");
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let number = |line: &str, name: &str| {
        line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
    };
    let beat = |line: &str| Some((number(line, "beat")?, number(line, "disk_pages")?));
    whole.lines().rev().find_map(beat).unwrap_or((0, 0))
}

/// Waits until the guest has counted further than `beyond`, both its heartbeats and its disk's pages.
pub(crate) fn counts_beyond(console: &Path, beyond: (u64, u64)) {
    let end = Instant::now() + Duration::from_secs(120);
    loop {
        let now = counted(console);
        if now.0 > beyond.0 && now.1 > beyond.1 {
            return;
        }
        let text = fs::read(console).unwrap_or_default();
        let tail = String::from_utf8_lossy(&text[text.len().saturating_sub(1500)..]).into_owned();
        assert!(Instant::now() < end, "the guest counts no further than {now:?}:\n{tail}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
