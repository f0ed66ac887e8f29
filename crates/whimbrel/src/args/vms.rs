//! Of the commands about the VMs of this host.

use clap::ArgAction;
use std::path::PathBuf;

/// Start a VM that a file describes.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
A VM file:
  name = \"web1\"
  vcpus = 2
  memory = \"1GiB\"
  machine = \"q35\"                     # or microvm
  kernel = \"/boot/vmlinuz\"            # or boot from the first disk
  initrd = \"/boot/initrd.img\"
  cmdline = \"console=ttyS0\"
  [[disk]]
  path = \"/shared/web1.img\"           # where both hosts see it
  format = \"raw\"
  [[net]]
  bridge = \"br0\"
  mac = \"52:54:00:12:34:56\"

Example:
  whimbrel run web1.toml")]
pub(crate) struct Run {
    /// The VM file; paths in it are relative to its directory. `-` reads standard input.
    pub(crate) file: PathBuf,
    /// Take it from HOST, to which it belongs by the shared ownership record: it is off, and will never run
    /// it again.
    #[arg(long, value_name = "HOST")]
    pub(crate) i_have_fenced: Option<String>,
    /// Print the VM as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Take charge of a QEMU that something else started.
///
/// From then on it can be migrated. What cannot be handled is said, with the option that would mend it.
/// Nothing about the VM is changed. With --check it is only looked at: what would go with it, what would be
/// different on another host, what hinders it (exit status 1).
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Example:
  qemu-system-x86_64 … -qmp unix:/run/web1.qmp,server=on,wait=off
  whimbrel adopt --check --qmp /run/web1.qmp
  whimbrel adopt web1 --qmp /run/web1.qmp")]
pub(crate) struct Adopt {
    /// What to call it.
    #[arg(required_unless_present = "check")]
    pub(crate) name: Option<String>,
    /// Only say what would become of it.
    #[arg(long)]
    pub(crate) check: bool,
    /// Its QMP socket.
    #[arg(long, value_name = "SOCKET")]
    pub(crate) qmp: PathBuf,
    /// Print the VM, or what was found of it, as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(clap::Args, Debug)]
pub(crate) struct List {
    /// Print a JSON array.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(clap::Args, Debug)]
pub(crate) struct Show {
    /// The VM.
    pub(crate) vm: String,
    /// Print the VM as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// End a VM: its QEMU is ended, as if its power was cut; its disks stay.
#[derive(clap::Args, Debug)]
pub(crate) struct Stop {
    /// The VM.
    pub(crate) vm: String,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Say who runs a VM after its migration ended in doubt.
///
/// That happens when the target was lost just as it was to take over. The source goes on asking the target,
/// and everything resolves itself once it answers. Only if it is lost for good, fence it (cut its power, so
/// that it can never run the VM again), and say so here.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Example, on the source, after hostb was powered off for good:
  whimbrel resolve web1 --here --i-have-fenced hostb")]
pub(crate) struct Resolve {
    /// The VM.
    pub(crate) vm: String,
    /// It is to run on this host.
    #[arg(long, required = true, action = ArgAction::SetTrue)]
    pub(crate) here: bool,
    /// The target, which can never run it again: that is your promise.
    #[arg(long, value_name = "HOST", required = true)]
    pub(crate) i_have_fenced: String,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}
