//! The laboratory: hosts and clients as network namespaces around one switch.
//!
//! ```text
//!   host a            switch                host b
//!   mgmt 10.77.0.1 ── bridge "mgmt" ──────── mgmt 10.77.0.2      agents talk here
//!   br0 ── uplink ─── bridge "guests" ────── uplink ── br0       guests live here, wherever they run
//!                        └── client eth0 10.78.0.201             and are talked to from here
//! ```

use crate::{
    Doing, Namespace, Result,
    namespace::run,
    reaper::{PREFIX, Reaper, reap_leftovers},
};
use std::{
    fs,
    io::Write,
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{self, Command, Stdio},
    sync::atomic::{AtomicU8, AtomicU32, Ordering},
};
use units::Rate;

/// Several hosts on one table. Dropping it (or the death of this process) ends every process in it and
/// removes every trace.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    dir: PathBuf,
    switch: Namespace,
    hosts: Vec<Host>,
    clients: AtomicU8,
    _reaper: Reaper,
}

/// One host.
#[derive(Clone, Debug)]
pub struct Host {
    /// Its name, such as `a`.
    pub name: String,
    /// Where its processes run.
    pub namespace: Namespace,
    /// Where its agent listens for other agents.
    pub address: Ipv4Addr,
    /// A directory of its own; its certificate and key are in `tls` there.
    pub dir: PathBuf,
    switch: Namespace,
    port: String,
}

/// Bytes that went through a host's management interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Traffic {
    /// Towards the host.
    pub received: u64,
    /// From the host.
    pub sent: u64,
}

/// Longer than any laboratory, and than what agents warn of.
const DAYS: u32 = 90;

static LABS: AtomicU32 = AtomicU32::new(0);

impl Lab {
    /// A laboratory with these hosts. Their names are the agents' names too.
    pub fn new(hosts: &[&str]) -> Result<Self> {
        reap_leftovers();
        // Short, because the paths of unix sockets below may have 107 bytes only.
        let prefix = format!("{PREFIX}{}-{}-", process::id(), LABS.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(prefix.trim_end_matches('-'));
        let _reaper = Reaper::new(&prefix, &dir)?;
        fs::create_dir_all(&dir).doing(format!("make {}", dir.display()))?;
        // QEMU is another user, and makes an overlay here when it is told to.
        let all = fs::Permissions::from_mode(0o777);
        fs::set_permissions(&dir, all).doing(format!("open {}", dir.display()))?;
        let switch = Namespace::create(format!("{prefix}switch"))?;
        for bridge in ["mgmt", "guests"] {
            add_bridge(&switch, bridge)?;
        }
        pki::init(&dir.join("ca"), "laboratory").doing("make a CA")?;
        let mut lab = Self { prefix, dir, switch, hosts: Vec::new(), clients: AtomicU8::new(0), _reaper };
        for (i, name) in hosts.iter().enumerate() {
            let host = lab.add_host(name, i as u8)?;
            lab.hosts.push(host);
        }
        Ok(lab)
    }

    fn add_host(&self, name: &str, i: u8) -> Result<Host> {
        let namespace = Namespace::create(format!("{}{name}", self.prefix))?;
        let (address, port) = (Ipv4Addr::new(10, 77, 0, i + 1), format!("mgmt{i}"));
        self.plug(&port, "mgmt", &namespace, "mgmt")?;
        self.plug(&format!("up{i}"), "guests", &namespace, "uplink")?;
        namespace.ip(&format!("address add {address}/24 dev mgmt"))?;
        add_bridge(&namespace, "br0")?;
        namespace.ip("link set uplink master br0")?;
        let dir = self.dir.join(name);
        fs::create_dir_all(&dir).doing(format!("make {}", dir.display()))?;
        // As root's own: what belongs to the agent is in it, and QEMU does not get there.
        let own = fs::Permissions::from_mode(0o700);
        fs::set_permissions(&dir, own).doing(format!("close {}", dir.display()))?;
        let tls = dir.join("tls");
        let issued = pki::issue(&self.dir.join("ca"), name, &[address.to_string()], DAYS, &tls);
        issued.doing(format!("issue a certificate for {name}"))?;
        Ok(Host { name: name.to_owned(), namespace, address, dir, switch: self.switch.clone(), port })
    }

    /// A cable from a bridge of the switch to an interface of `namespace`.
    fn plug(&self, port: &str, bridge: &str, namespace: &Namespace, interface: &str) -> Result<()> {
        let (switch, other) = (self.switch.name(), namespace.name());
        let veth = format!("link add {port} netns {switch} type veth peer name {interface} netns {other}");
        run(Command::new("ip").args(veth.split_whitespace()))?;
        self.switch.ip(&format!("link set {port} master {bridge} up"))?;
        namespace.ip(&format!("link set {interface} up")).map(drop)
    }

    /// The host with this name. Panics where there is none: the story is wrong then.
    pub fn host(&self, name: &str) -> &Host {
        self.hosts
            .iter()
            .find(|host| host.name == name)
            .unwrap_or_else(|| panic!("no host {name} in this lab"))
    }

    /// All hosts, in the order in which they were named.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The laboratory's own directory, seen by all hosts alike.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A further namespace on the guests' network, from which guests can be talked to.
    pub fn client(&self) -> Result<Namespace> {
        let i = self.clients.fetch_add(1, Ordering::Relaxed);
        let namespace = Namespace::create(format!("{}client{i}", self.prefix))?;
        self.plug(&format!("client{i}"), "guests", &namespace, "eth0")?;
        namespace.ip(&format!("address add 10.78.0.{}/24 dev eth0", 201 + i))?;
        Ok(namespace)
    }

    /// The last lines of every log in the laboratory, for a story that went wrong.
    pub fn print_logs(&self, lines: usize) {
        let mut err = std::io::stderr().lock();
        for path in logs_below(&self.dir) {
            let text = fs::read(&path).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let all: Vec<_> = text.lines().collect();
            let _ = writeln!(err, "--- {} ({} lines)", path.display(), all.len());
            for line in &all[all.len().saturating_sub(lines)..] {
                let _ = writeln!(err, "    {line}");
            }
        }
    }
}

fn logs_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => found.extend(logs_below(&path)),
            Ok(kind) if kind.is_file() && path.extension().is_some_and(|end| end == "log") => {
                found.push(path)
            }
            _ => {}
        }
    }
    found.sort();
    found
}

fn add_bridge(namespace: &Namespace, name: &str) -> Result<()> {
    // No spanning tree and no snooping: a port forwards from its first moment.
    let kind = "type bridge forward_delay 0 stp_state 0 mcast_snooping 0";
    namespace.ip(&format!("link add {name} {kind}"))?;
    namespace.ip(&format!("link set {name} up")).map(drop)
}

impl Host {
    /// Limits the host's management link to `rate`, both ways, by a token bucket; `None` lifts the limit.
    pub fn shape(&self, rate: Option<Rate>) -> Result<()> {
        for (namespace, interface) in [(&self.namespace, "mgmt"), (&self.switch, self.port.as_str())] {
            let Some(Rate(bytes)) = rate else {
                // It may have had none: that is no error.
                let _ = namespace.tc(&format!("qdisc del dev {interface} root"));
                continue;
            };
            // A bucket of a hundredth of a second passes bursts as a switch would, and never less than a
            // segment. The limit that was there is changed: without any, for a moment, all that waits passes.
            let (bits, burst) = (bytes * 8, (bytes / 100).max(64 << 10));
            namespace.tc(&format!(
                "qdisc replace dev {interface} root tbf rate {bits}bit burst {burst} latency 50ms"
            ))?;
        }
        Ok(())
    }

    /// Cuts the host off from all other hosts: what it sends and what is sent to it vanishes without a word.
    pub fn cut(&self) -> Result<()> {
        self.forward(false)
    }

    /// Ends [`Host::cut`].
    pub fn mend(&self) -> Result<()> {
        self.forward(true)
    }

    /// A disabled bridge port drops everything while both ends still see a carrier. (Only `bridge` can set
    /// it: `ip link` accepts the words and does nothing.)
    fn forward(&self, yes: bool) -> Result<()> {
        let state = if yes { "3" } else { "0" };
        let port = ["-n", self.switch.name(), "link", "set", "dev", &self.port, "state", state];
        run(Command::new("bridge").args(port)).map(drop)
    }

    /// Its management link carries packets of 9000 bytes from now on, each by itself.
    pub fn carry_large(&self) -> Result<()> {
        self.switch.ip(&format!("link set {} mtu 9000", self.port))?;
        self.namespace.ip("link set mgmt mtu 9000")?;
        // Packets that are cut up only by the receiver's card would pass whatever their size.
        self.namespace.ip("link set mgmt gso_max_segs 1").map(drop)
    }

    /// What it sends in packets of more than 1500 bytes, and is sent, vanishes without a word; it knows
    /// nothing of that.
    pub fn drop_large(&self) -> Result<()> {
        self.switch.ip(&format!("link set {} mtu 1500", self.port)).map(drop)
    }

    /// Cuts only the link between this host and `peer`, silently, both ways.
    pub fn cut_from(&self, peer: &Host) -> Result<()> {
        // Each believes the other at an address that nobody has.
        for (here, there) in [(self, peer), (peer, self)] {
            let nobody = "lladdr 02:de:ad:00:00:00 nud permanent";
            here.namespace.ip(&format!("neigh replace {} {nobody} dev mgmt", there.address))?;
        }
        Ok(())
    }

    /// Ends [`Host::cut_from`].
    pub fn mend_to(&self, peer: &Host) -> Result<()> {
        for (here, there) in [(self, peer), (peer, self)] {
            here.namespace.ip(&format!("neigh del {} dev mgmt", there.address))?;
        }
        Ok(())
    }

    /// Ends the one TCP connection to `peer` that has carried most, as a firewall does that has forgotten it.
    pub fn end_busiest_connection(&self, peer: &Host) -> Result<()> {
        let to = peer.address.to_string();
        let ss = |arguments: &[&str]| {
            let said = run(self.namespace.command("ss").args(arguments));
            // A line of addresses, and an indented one of figures.
            said.map(|said| said.replace("\n\t", " "))
        };
        let list = ss(&["-Htni", "state", "established", "dst", &to])?;
        let sent = |line: &str| {
            let bytes = line.split_whitespace().find_map(|word| word.strip_prefix("bytes_sent:"));
            bytes.and_then(|bytes| bytes.parse::<u64>().ok()).unwrap_or(0)
        };
        let busiest = list.lines().max_by_key(|line| sent(line)).doing("find a connection")?;
        let port = busiest.split_whitespace().nth(2).and_then(|here| here.rsplit(':').next());
        let port = port.doing(format!("read a port of {busiest}"))?;
        let ended = ss(&["-HtnK", "dst", &to, "sport", "=", &format!(":{port}")])?;
        crate::ensure!(
            ended.contains(port),
            "ss ended no connection: its kernel lacks CONFIG_INET_DIAG_DESTROY"
        );
        Ok(())
    }

    /// What has gone through its management interface so far.
    pub fn traffic(&self) -> Result<Traffic> {
        let said = self.namespace.ip("-statistics -json link show dev mgmt")?;
        let links: serde_json::Value = serde_json::from_str(&said).doing("read the counters of ip")?;
        let bytes =
            |way: &str| links[0]["stats64"][way]["bytes"].as_u64().doing(format!("read {way} of {said}"));
        Ok(Traffic { received: bytes("rx")?, sent: bytes("tx")? })
    }

    /// A TAP interface on `br0`, for a machine that is started by hand.
    pub fn add_tap(&self, name: &str) -> Result<()> {
        self.add_tap_with(name, "")
    }

    /// The same, made with these further words of `ip tuntap add`.
    pub fn add_tap_with(&self, name: &str, words: &str) -> Result<()> {
        self.namespace.ip(&format!("tuntap add dev {name} mode tap {words}"))?;
        self.namespace.ip(&format!("link set {name} master br0 up")).map(drop)
    }

    /// Starts a process on this host; what it writes goes to `NAME.log` in the host's directory.
    pub fn spawn(&self, name: &str, command: &mut Command) -> Result<crate::Process> {
        let path = self.dir.join(format!("{name}.log"));
        let log = fs::OpenOptions::new().create(true).append(true).open(&path);
        let log = log.doing(format!("open {}", path.display()))?;
        let twin = log.try_clone().doing("share a log")?;
        command.stdin(Stdio::null()).stdout(log).stderr(twin);
        crate::Process::spawn(name, command, path)
    }
}
