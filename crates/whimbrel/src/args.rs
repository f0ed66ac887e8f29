//! What may be said on the command line. The help teaches: what a command does, and how it is used.

use crate::{doctor::Doctor, pki_command::Pki};
use agent::{
    config::{Address, Group, Tracker},
    log::Format,
};
use clap::{ArgAction, Parser, Subcommand, ValueEnum};
use engine::report::{Compression, Mode, Promise};
use std::{net::SocketAddr, path::PathBuf, time::Duration};
use units::Rate;

/// Moves running virtual machines between hosts, without the machine noticing.
///
/// Every host runs an agent; every other command talks to the agent of the host it is typed on.
#[derive(Parser, Debug)]
#[command(
    name = "whimbrel",
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  whimbrel doctor                          can this host do it?
  whimbrel pki init                        make certificates, so that hosts know each other
  whimbrel agent --config agent.toml       be this host's agent
  whimbrel run web1.toml                   start a VM
  whimbrel plan web1 --to hostb            what would moving it take?
  whimbrel migrate web1 --to hostb         move it to another host
  whimbrel list                            what runs here

Exit status: 0 done · 1 failed, the VM still runs where it was · 2 wrong use · 3 in doubt who runs
the VM · 130 cancelled"
)]
pub(crate) struct Args {
    /// The agent's socket [default: /run/whimbrel/agent.sock].
    #[arg(long, global = true, value_name = "PATH", env = "WHIMBREL_SOCKET")]
    pub(crate) socket: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Say whether this host can migrate VMs, and how to mend what is missing.
    Doctor(Doctor),
    Pki(Pki),
    Agent(Agent),
    Run(Run),
    Adopt(Adopt),
    /// List the VMs of this host.
    List(List),
    /// Show one VM.
    Show(Show),
    Stop(Stop),
    Plan(Plan),
    Migrate(Migrate),
    /// Show where a VM's migration stands, or how its last one ended.
    Status(Status),
    Cancel(Cancel),
    Resolve(Resolve),
    /// Started by an agent for each of its migrations.
    #[command(hide = true, name = host::watchdog::COMMAND)]
    Watchdog,
}

impl Command {
    /// Whether programs read the output.
    pub(crate) fn json(&self) -> bool {
        match self {
            Self::Doctor(doctor) => doctor.json,
            Self::Pki(pki) => pki.json(),
            Self::Agent(_) | Self::Watchdog => false,
            Self::Run(Run { json, .. })
            | Self::Adopt(Adopt { json, .. })
            | Self::List(List { json })
            | Self::Show(Show { json, .. })
            | Self::Stop(Stop { json, .. })
            | Self::Plan(Plan { json, .. })
            | Self::Migrate(Migrate { json, .. })
            | Self::Status(Status { json, .. })
            | Self::Cancel(Cancel { json, .. })
            | Self::Resolve(Resolve { json, .. }) => *json,
        }
    }
}

/// Be the agent of this host, until SIGTERM.
///
/// It keeps the VMs of this host, moves them, and takes in those of other hosts.
///
/// It ends at SIGTERM without harming any VM: a migration that has not switched over is rolled back first, and the
/// VMs run on. An agent that is started again finds them.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
A configuration file; every line may be left out, flags win over it:
  name = \"hosta\"                      # default: the host's name
  state-dir = \"/var/lib/whimbrel\"
  runtime-dir = \"/run/whimbrel\"
  listen = \"0.0.0.0:7471\"
  qemu = \"qemu-system-x86_64\"
  tracker = \"auto\"                    # or synchronous; see below
  group = \"auto\"                      # or 1, 2, 4 … 512 pages
  [tls]                               # this host's certificate; `whimbrel pki` makes them
  ca = \"/etc/whimbrel/tls/ca.crt\"
  cert = \"/etc/whimbrel/tls/host.crt\"
  key = \"/etc/whimbrel/tls/host.key\"
  [peers]                             # hosts that `migrate --to` knows by name
  hostb = \"10.0.0.2:7471\"
  [allow]                             # what VMs that other hosts send may use here
  disks = [\"/shared\", \"/var/lib/whimbrel/disks\", \"/var/lib/libvirt/images\"]
  boot = [\"/boot\", \"/shared\", \"/var/lib/whimbrel/boot\"]
  bridges = [\"br0\"]                   # default: whichever there are
  devices = [\"virtio-*\"]              # default: all that are known to be harmless
  options = [\"-device\", \"-kernel\"]    # the same, of QEMU's options

Examples:
  whimbrel agent --config /etc/whimbrel/agent.toml
  whimbrel agent --name hosta --peer hostb=10.0.0.2:7471 --log-format json
  WHIMBREL_LOG=debug whimbrel agent")]
pub(crate) struct Agent {
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// What other hosts call this one.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Where what must survive is kept.
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Where sockets are made.
    #[arg(long, value_name = "DIR")]
    pub(crate) runtime_dir: Option<PathBuf>,
    /// Where other agents find this one.
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// Where ca.crt, host.crt and host.key are [default: /etc/whimbrel/tls].
    #[arg(long, value_name = "DIR")]
    pub(crate) tls: Option<PathBuf>,
    /// Neither encrypt connections nor check who is at their other end. All hosts must do the same. Only for a network that
    /// nobody else can reach.
    #[arg(long, conflicts_with = "tls")]
    pub(crate) insecure_plaintext: bool,
    /// The QEMU binary.
    #[arg(long, value_name = "PATH")]
    pub(crate) qemu: Option<PathBuf>,
    /// How the writes of guests are seen that leave this host: auto, or synchronous [default: auto].
    ///
    /// auto lets the kernel keep book of them (Linux 6.7) until a guest writes faster than the link carries. From then on, and where
    /// the kernel cannot (Linux 5.19 to 6.6), the agent hears of the first write to each group of pages, and so can make a
    /// writer wait; that costs 17 to 42 µs a group. synchronous is like that from the start.
    #[arg(long, value_name = "WHICH")]
    pub(crate) tracker: Option<Tracker>,
    /// How many pages are opened by one write that the agent hears of: auto, or a power of two up to 512 [default: auto].
    ///
    /// auto learns it, region by region: more where many writes are heard of, fewer where pages were sent that had not changed.
    #[arg(long, value_name = "PAGES")]
    pub(crate) group: Option<Group>,
    /// Another host and where its agent listens; may be given several times.
    #[arg(long = "peer", value_name = "NAME=ADDR:PORT", value_parser = peer)]
    pub(crate) peers: Vec<(String, Address)>,
    /// How log lines look: text or json.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub(crate) log_format: Format,
}

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
    /// Print the VM as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Take charge of a QEMU that something else started.
///
/// From then on it can be migrated. Its guest memory must be shared: `-object memory-backend-memfd,share=on`. What else cannot be handled is said,
/// with the option that would mend it. Nothing about the VM is changed.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Example:
  qemu-system-x86_64 … -qmp unix:/run/web1.qmp,server=on,wait=off
  whimbrel adopt web1 --qmp /run/web1.qmp")]
pub(crate) struct Adopt {
    /// What to call it.
    pub(crate) name: String,
    /// Its QMP socket.
    #[arg(long, value_name = "SOCKET")]
    pub(crate) qmp: PathBuf,
    /// Print the VM as one JSON object.
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

/// How memory travels.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum ModeArg {
    /// Pre-copy until the pause is short enough; then, if allowed, post-copy.
    Auto,
    /// All memory while the VM runs here.
    PreCopy,
    /// All memory while the VM runs there.
    PostCopy,
    /// One pass while it runs here, the rest while it runs there.
    Hybrid,
}

impl From<ModeArg> for Mode {
    fn from(mode: ModeArg) -> Self {
        match mode {
            ModeArg::Auto => Self::Auto,
            ModeArg::PreCopy => Self::PreCopy,
            ModeArg::PostCopy => Self::PostCopy,
            ModeArg::Hybrid => Self::Hybrid,
        }
    }
}

#[derive(clap::ValueEnum, Clone, Copy, Debug)]
pub(crate) enum CompressArg {
    /// What moves most guest memory a second, measured on the way.
    Auto,
    /// Nothing.
    None,
    /// LZ4 always.
    Lz4,
    /// Zstandard always, at the level that suits the link.
    Zstd,
}

impl From<CompressArg> for Compression {
    fn from(compress: CompressArg) -> Self {
        match compress {
            CompressArg::Auto => Self::Auto,
            CompressArg::None => Self::None,
            CompressArg::Lz4 => Self::Lz4,
            CompressArg::Zstd => Self::Zstd,
        }
    }
}

/// What the user is promised.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
pub(crate) enum PromiseArg {
    /// The pause.
    Downtime,
    /// The end.
    Time,
    /// The wait of a writer.
    Stall,
}

impl From<PromiseArg> for Promise {
    fn from(promise: PromiseArg) -> Self {
        match promise {
            PromiseArg::Downtime => Self::Downtime,
            PromiseArg::Time => Self::Time,
            PromiseArg::Stall => Self::Stall,
        }
    }
}

/// What a migration is to be like.
#[derive(clap::Args, Debug)]
pub(crate) struct How {
    /// The VM.
    pub(crate) vm: String,
    /// The host to move it to: a name from the agent's `[peers]`, or ADDR:PORT.
    #[arg(long, value_name = "HOST")]
    pub(crate) to: String,
    /// How memory travels.
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) mode: ModeArg,
    /// Let `auto` end in post-copy when pre-copy does not get there.
    #[arg(long)]
    pub(crate) allow_post_copy: bool,
    /// The pause that is acceptable, like 20ms [default: 20ms].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) max_downtime: Option<Duration>,
    /// How long all of it may take, like 60s.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) max_time: Option<Duration>,
    /// A guest that writes faster than the link carries is slowed, so that pre-copy ends: whoever writes to one more page waits,
    /// but never longer than this at a time, like 5ms [default: 5ms].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) max_stall: Option<Duration>,
    /// Where not all of --max-downtime, --max-time and --max-stall can hold: which is kept first. The last one gives way first, and
    /// that is said before anything moves.
    #[arg(
        long,
        value_name = "PROMISES",
        value_enum,
        value_delimiter = ',',
        default_value = "downtime,time,stall"
    )]
    pub(crate) keep: Vec<PromiseArg>,
    /// How long a link that was lost is waited for, with the VM running on here, like 60s; 0s ends the migration at once. Once the VM
    /// may run on the target it is waited for as long as it takes [default: 60s].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) give_up: Option<Duration>,
    /// The most that may be put on the wire, like 1Gbit or 50MiB/s.
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) bandwidth: Option<Rate>,
    /// How many data connections [default: from 2 to the number of cores, 8 at most: as many as it pays to use].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) streams: Option<u16>,
    /// What pages may be compressed with. `auto` finds out what moves most over this link.
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) compress: CompressArg,
    /// The most cores that may compress at a time [default: those that the VM leaves idle, at least 1].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) cpu: Option<u32>,
}

/// Say what a migration would take: how long, how much traffic, which pause, what the guest would feel.
///
/// Watches what the guest writes for a second, looks at some of its memory, and sends the target as much as the link carries in
/// a sixth of a second. Moves nothing and does not disturb the guest. Takes the options of `migrate`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  whimbrel plan web1 --to hostb
  whimbrel plan web1 --to hostb --allow-post-copy --max-time 30s
  whimbrel plan web1 --to hostb --json | jq .takes")]
pub(crate) struct Plan {
    #[command(flatten)]
    pub(crate) how: How,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Move a running VM to another host.
///
/// Shows what happens while it happens, and ends with a report. Until the VM has switched over, whatever goes wrong
/// leaves it running here. Ctrl-C cancels.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  whimbrel migrate web1 --to hostb
  whimbrel migrate web1 --to 10.0.0.2:7471 --mode post-copy
  whimbrel migrate web1 --to hostb --max-downtime 10ms --bandwidth 1Gbit --verify
  whimbrel migrate web1 --to hostb --detach && whimbrel status web1 --follow
  whimbrel migrate web1 --to hostb --json | tail -n 1      # the report

With --json every line is an event (it has \"event\"), except the last one: the report.")]
pub(crate) struct Migrate {
    #[command(flatten)]
    pub(crate) how: How,
    /// Compare all memory of both sides while the VM is stopped: takes longer.
    #[arg(long)]
    pub(crate) verify: bool,
    /// Print events and the report, one JSON object a line.
    #[arg(long)]
    pub(crate) json: bool,
    /// Return as soon as it has begun.
    #[arg(long)]
    pub(crate) detach: bool,
}

#[derive(clap::Args, Debug)]
pub(crate) struct Status {
    /// The VM.
    pub(crate) vm: String,
    /// Watch it to its end. Ctrl-C ends the watching, not the migration.
    #[arg(long)]
    pub(crate) follow: bool,
    /// Print JSON: with --follow events and the report, without it the latest of them.
    #[arg(long)]
    pub(crate) json: bool,
}

/// End a VM's migration, and wait until the VM is as it was before.
#[derive(clap::Args, Debug)]
pub(crate) struct Cancel {
    /// The VM.
    pub(crate) vm: String,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Say who runs a VM after its migration ended in doubt.
///
/// That happens when the target was lost just as it was to take over. The source goes on asking the target, and everything resolves itself once it answers. Only if it is lost for
/// good, fence it (cut its power, so that it can never run the VM again), and say so here.
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

fn peer(text: &str) -> Result<(String, Address), String> {
    let (name, address) = text.split_once('=').ok_or("write NAME=ADDR:PORT, like hostb=10.0.0.2:7471")?;
    agent::name::check(name)?;
    Ok((name.to_owned(), address.parse()?))
}

fn rate(text: &str) -> Result<Rate, String> {
    match text.parse::<Rate>() {
        Ok(Rate(0)) => Err("nothing moves at that rate".to_owned()),
        Ok(rate) => Ok(rate),
        Err(error) => Err(error.to_string()),
    }
}

/// `20ms`, `1.5s`, `500us`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time; write one like 20ms, 500us or 1s");
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
    let number: f64 = text[..split].parse().map_err(|_| wrong())?;
    let seconds = match text[split..].trim() {
        "us" | "µs" => number / 1e6,
        "ms" => number / 1e3,
        "s" => number,
        _ => return Err(wrong()),
    };
    let time = Duration::try_from_secs_f64(seconds).map_err(|_| wrong())?;
    if time.is_zero() { Err("a pause of nothing cannot be had".to_owned()) } else { Ok(time) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn times_have_a_unit() {
        assert_eq!(duration("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(duration("0.5 s"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("500us"), Ok(Duration::from_micros(500)));
        for bad in ["", "20", "ms", "-1ms", "1h", "0ms", "1e3ms", "99999999999999999999s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
