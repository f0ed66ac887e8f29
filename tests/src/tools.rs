//! What the laboratory needs of the machine and of the build.

use crate::{Error, Result};
use std::{
    env,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Everything that a story about a real VM needs. `./dev test` sets the variables.
#[derive(Clone, Debug)]
pub struct Tools {
    /// The program under test: `WHIMBREL_BIN`.
    pub whimbrel: PathBuf,
    /// The kernel that guests boot: `WHIMBREL_GUEST_KERNEL`.
    pub kernel: PathBuf,
    /// Their initramfs, with our `init`: `WHIMBREL_GUEST_INITRD`.
    pub initrd: PathBuf,
    /// A QEMU 10 beside the system's: `WHIMBREL_QEMU_10`.
    pub qemu_10: Option<PathBuf>,
    /// A directory with Linux 6.12 and modules of it: `WHIMBREL_LINUX_6_12`.
    pub linux_6_12: Option<PathBuf>,
}

impl Tools {
    /// Looks for all of it. The error names everything that is missing, each with what would mend it.
    pub fn find() -> Result<Self> {
        let mut missing = machine_lacks();
        let mut file = |variable: &str, what: &str| {
            let path = env::var_os(variable).map(PathBuf::from).unwrap_or_default();
            if !path.is_file() {
                missing.push(format!("{variable} must name {what} (./dev test sets it)"));
            }
            path
        };
        let tools = Self {
            whimbrel: file("WHIMBREL_BIN", "the built whimbrel binary"),
            kernel: file("WHIMBREL_GUEST_KERNEL", "a guest kernel"),
            initrd: file("WHIMBREL_GUEST_INITRD", "the guest's initramfs"),
            qemu_10: env::var_os("WHIMBREL_QEMU_10").map(PathBuf::from).filter(|path| path.is_file()),
            linux_6_12: env::var_os("WHIMBREL_LINUX_6_12").map(PathBuf::from).filter(|path| path.is_dir()),
        };
        if missing.is_empty() { Ok(tools) } else { Err(Error::new("this machine lacks", missing.join("; "))) }
    }
}

/// What the laboratory's networks and hand-started machines need, the build apart.
pub fn machine_lacks() -> Vec<String> {
    let mut missing = Vec::new();
    if !rustix::process::geteuid().is_root() {
        missing.push("root, to make network namespaces".to_owned());
    }
    for (program, package) in [
        ("ip", "iproute2"),
        ("tc", "iproute2"),
        ("bridge", "iproute2"),
        ("qemu-img", "qemu-utils"),
        ("swtpm", "swtpm"),
        (QEMU, "qemu-system-x86"),
    ] {
        if !is_program(program) {
            missing.push(format!("the program {program} (apt-get install {package})"));
        }
    }
    if !Path::new("/dev/net/tun").exists() {
        missing.push("/dev/net/tun (modprobe tun)".to_owned());
    }
    missing
}

/// The system's QEMU.
pub const QEMU: &str = "qemu-system-x86_64";

fn is_program(name: &str) -> bool {
    let quiet = |command: &mut Command| {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
    };
    quiet(Command::new(name).arg("-V")) || quiet(Command::new(name).arg("--version"))
}

/// Says loudly that a story was skipped; where nothing may be skipped (`WHIMBREL_MUST_RUN=1`, as `./dev test`
/// sets it), that is a failure.
pub fn skip(story: &str, why: &dyn std::fmt::Display) {
    assert!(env::var_os("WHIMBREL_MUST_RUN").is_none(), "{story} MUST RUN and cannot: {why}");
    // Not by a macro: what those print is shown of failing tests only.
    let _ = writeln!(std::io::stderr(), "\n*** SKIPPED: {story}: {why} ***");
}
