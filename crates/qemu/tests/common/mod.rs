//! Guests for the tests: a kernel of this machine with an init of our own making.

#![allow(dead_code)] // Each test binary uses its part.

use qemu::{Host, Recipe, VmFile};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// QEMU 10, where `tests/qemu-10.sh` has put it.
pub(crate) fn qemu_10() -> Option<PathBuf> {
    let path = std::env::var_os("WHIMBREL_QEMU_10").map(PathBuf::from).filter(|path| path.is_file());
    if path.is_none() {
        assert!(
            std::env::var_os("WHIMBREL_MUST_RUN").is_none(),
            "there is no QEMU 10, and nothing may be skipped"
        );
        eprintln!("*** SKIPPED: WHIMBREL_QEMU_10 names no QEMU 10; tests/qemu-10.sh gets one");
    }
    path
}

fn given(variable: &str) -> PathBuf {
    let path =
        std::env::var_os(variable).unwrap_or_else(|| panic!("{variable} is not set; ./dev test sets it"));
    PathBuf::from(path)
}

/// The kernel that guests boot.
pub(crate) fn kernel() -> PathBuf {
    given("WHIMBREL_GUEST_KERNEL")
}

/// An initramfs whose init counts aloud, and writes to the first disk if there is one: that of the other tests' guests, for
/// its drivers, with another init laid over it.
pub(crate) fn initramfs(folder: &Path) -> PathBuf {
    let root = folder.join("root");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("needs the package busybox-static");
    let init = String::from(
        "#!/bin/busybox sh\n\
        /bin/busybox --install -s /bin\n\
        mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys\n\
        for driver in $(cat /modules/order); do insmod /modules/$driver; done\n\
        n=0\n\
        while true; do\n\
        n=$((n+1)); echo tick $n\n\
        if [ -b /dev/vda ]; then echo $n | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null || echo DISK FAILED; fi\n\
        usleep 100000\n\
        done\n",
    );
    fs::write(root.join("init"), init).unwrap();
    let image = folder.join("initramfs");
    let drivers = given("WHIMBREL_GUEST_INITRD");
    let script = format!(
        "chmod 755 init bin/busybox; {{ cat {}; find . | cpio -o -H newc --quiet; }} > {}",
        drivers.display(),
        image.display()
    );
    let made =
        Command::new("sh").args(["-c", &script]).current_dir(&root).stdin(Stdio::null()).status().unwrap();
    assert!(made.success(), "needs cpio");
    image
}

/// The kernel command line of a guest on this kind of machine.
pub(crate) fn command_line(machine: &str) -> String {
    // A microvm has no timer by which Linux could find out how fast its TSC runs: under emulation it is the host's.
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap();
    let mhz = cpus
        .lines()
        .find_map(|line| line.strip_prefix("cpu MHz")?.rsplit(':').next()?.trim().parse::<f64>().ok());
    let clock = match mhz {
        Some(mhz) if machine == "microvm" => format!(" tsc_early_khz={:.0}", mhz * 1000.0),
        _ => String::new(),
    };
    format!("console=ttyS0 quiet panic=-1{clock}")
}

/// The number that the guest wrote last to its disk.
pub(crate) fn on_disk(disk: &Path) -> u64 {
    let bytes = fs::read(disk).unwrap();
    let text = String::from_utf8_lossy(&bytes[..16]).into_owned();
    text.lines().next().and_then(|line| line.trim().parse().ok()).unwrap_or(0)
}

/// A host whose sockets are in `folder`.
pub(crate) fn host(folder: &Path, name: &str, qemu: Option<PathBuf>) -> Host {
    Host { qemu, ..Host::new(folder.join(name)) }
}

/// The recipe of a VM file's text, on `host`.
pub(crate) fn recipe(text: &str, host: &Host) -> Recipe {
    let file = VmFile::parse(text, Path::new("test.toml")).unwrap();
    file.recipe(host).unwrap()
}

/// The number of the guest's last tick.
pub(crate) fn ticks(console: &Path) -> u64 {
    let text = fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(!text.contains("DISK FAILED") && !text.contains("Kernel panic"), "{text}");
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let tick = |line: &str| line.trim().strip_prefix("tick ")?.parse().ok();
    whole.lines().rev().find_map(tick).unwrap_or(0)
}

/// Waits until the guest has counted beyond `beyond`.
pub(crate) fn wait_ticks(console: &Path, beyond: u64) -> u64 {
    let end = Instant::now() + Duration::from_secs(90);
    loop {
        let now = ticks(console);
        if now > beyond {
            return now;
        }
        let text = fs::read(console).unwrap_or_default();
        let tail = String::from_utf8_lossy(&text[text.len().saturating_sub(1500)..]).into_owned();
        assert!(Instant::now() < end, "the guest counts no further than {now}:\n{tail}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
