//! From power-on to a usable Linux: mounts, modules, network; and off again.

use crate::{netlink, say, words::Wish};
use rustix::{
    mount::{MountFlags, mount},
    system::{RebootCommand, finit_module, reboot},
};
use std::{ffi::CStr, fs, io, path::Path, thread};

/// Modules in the order in which they are to be loaded, one file name a line; written by `initramfs.sh`.
/// Those that most guests do without are in lists of their own, named behind a dot.
const MODULES: &str = "/modules/order";

/// The file systems that programs expect.
pub(crate) fn mounts() -> Result<(), String> {
    for (kind, at) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        fs::create_dir_all(at).map_err(|e| format!("{at}: {e}"))?;
        match mount(kind, at, kind, MountFlags::empty(), None::<&CStr>) {
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(e) => return Err(format!("mounting {kind} on {at}: {e}")),
        }
    }
    Ok(())
}

/// Loads what the initramfs brought along; a kernel with everything built in brings nothing.
pub(crate) fn modules() -> Result<(), String> {
    load_list(MODULES)
}

/// Loads what only some guests need.
pub(crate) fn load(group: &str) -> Result<(), String> {
    load_list(&format!("{MODULES}.{group}"))
}

fn load_list(list: &str) -> Result<(), String> {
    let order = match fs::read_to_string(list) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(format!("{list}: {e}")),
    };
    for name in order.lines() {
        let path = Path::new("/modules").join(name);
        let file = fs::File::open(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        match finit_module(&file, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(format!("loading {}: {e}", path.display())),
        }
    }
    Ok(())
}

/// Loopback, and the first network card if an address was given.
pub(crate) fn network(wish: &Wish) -> Result<(), String> {
    netlink::up(interface("lo")?).map_err(|e| format!("switching lo on: {e}"))?;
    if let Some((ip, bits)) = wish.ip {
        let card = interface("eth0")?;
        netlink::up(card).map_err(|e| format!("switching eth0 on: {e}"))?;
        netlink::address(card, ip, bits).map_err(|e| format!("giving eth0 {ip}/{bits}: {e}"))?;
    }
    if let Some(gateway) = wish.gateway {
        netlink::default_route(gateway).map_err(|e| format!("the route through {gateway}: {e}"))?;
    }
    Ok(())
}

fn interface(name: &str) -> Result<u32, String> {
    let path = format!("/sys/class/net/{name}/ifindex");
    let text = fs::read_to_string(&path).map_err(|e| {
        format!("there is no network card {name} ({path}: {e}); has the machine a virtio-net device?")
    })?;
    text.trim().parse().map_err(|_| format!("{path}: \"{}\" is not a number", text.trim()))
}

/// How many vCPUs may be used.
pub(crate) fn cpus() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Switches the machine off, or at least restarts it (`-no-reboot` makes QEMU end on that).
pub(crate) fn power_off() -> ! {
    say!("WHIMBREL off");
    rustix::fs::sync();
    for way in [RebootCommand::PowerOff, RebootCommand::Restart] {
        if let Err(e) = reboot(way) {
            say!("WHIMBREL error {way:?}: {e}");
        }
    }
    loop {
        thread::park();
    }
}
