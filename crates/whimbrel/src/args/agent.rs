//! Of `whimbrel agent`.

use ::agent::{
    config::{Address, Group, Tracker},
    log::Format,
};
use std::{net::SocketAddr, path::PathBuf};

/// Be the agent of this host, until SIGTERM.
///
/// It keeps the VMs of this host, moves them, and takes in those of other hosts.
///
/// It ends at SIGTERM without harming any VM: a migration that has not switched over is rolled back first,
/// and the VMs run on. An agent that is started again finds them.
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
  [ownership]                         # where hosts ask who owns a VM; the same on all of them
  directory = \"/shared/whimbrel\"     # or etcd = [\"https://10.0.0.9:2379\", …]; default: the target
  [allow]                             # what VMs that other hosts send may use here
  disks = [\"/shared\", \"/var/lib/whimbrel/disks\", \"/var/lib/libvirt/images\"]
  boot = [\"/boot\", \"/shared\", \"/var/lib/whimbrel/boot\"]
  bridges = [\"br0\", \"br1:20-29\"]    # and VLANs, where a bridge filters them; default: whichever there are
  devices = [\"virtio-*\"]              # default: all that are known to be harmless
  options = [\"-device\", \"-kernel\"]    # the same, of QEMU's options
  spool = [\"/shared\", \"/var/lib/whimbrel/spool\"]   # where memory may come by, too
  [spool]                             # what `migrate --spool` and `--robust` are unless they are given
  directory = \"/shared/spool\"
  robust = \"strict\"                   # or \"relaxed\"

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
    /// Neither encrypt connections nor check who is at their other end. All hosts must do the same. Only for
    /// a network that nobody else can reach.
    #[arg(long, conflicts_with = "tls")]
    pub(crate) insecure_plaintext: bool,
    /// The QEMU binary.
    #[arg(long, value_name = "PATH")]
    pub(crate) qemu: Option<PathBuf>,
    /// How the writes of guests are seen that leave this host: auto, or synchronous [default: auto].
    ///
    /// auto lets the kernel keep book of them (Linux 6.7) until a guest writes faster than the link carries.
    /// From then on, and where the kernel cannot (Linux 5.19 to 6.6), the agent hears of the first write to
    /// each group of pages, and so can make a writer wait; that costs 17 to 42 µs a group. synchronous is
    /// like that from the start.
    #[arg(long, value_name = "WHICH")]
    pub(crate) tracker: Option<Tracker>,
    /// How many pages are opened by one write that the agent hears of: auto, or a power of two up to 512
    /// [default: auto].
    ///
    /// auto learns it, region by region: more where many writes are heard of, fewer where pages were sent
    /// that had not changed.
    #[arg(long, value_name = "PAGES")]
    pub(crate) group: Option<Group>,
    /// Another host and where its agent listens; may be given several times.
    #[arg(long = "peer", value_name = "NAME=ADDR:PORT", value_parser = peer)]
    pub(crate) peers: Vec<(String, Address)>,
    /// How log lines look: text or json.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub(crate) log_format: Format,
}

fn peer(text: &str) -> Result<(String, Address), String> {
    let (name, address) = text.split_once('=').ok_or("write NAME=ADDR:PORT, like hostb=10.0.0.2:7471")?;
    ::agent::name::check(name)?;
    Ok((name.to_owned(), address.parse()?))
}
