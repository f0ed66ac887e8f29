//! TAP interfaces: made for a VM's network card, put on a bridge, and taken away with the VM.
//!
//! What a host has set on a TAP goes with the VM: `read` looks at it where the VM runs, `misfits` says
//! whether this host's bridge can have such a port, and `create` makes one like it.

mod link; // network interfaces
mod ovs; // bridges of Open vSwitch
mod port; // how a TAP is plugged in
mod rules; // rules for packets that stay behind
mod tools; // the programs of iproute2

pub use ovs::OvsPort;
pub use port::{Port, Vlan};

use crate::{random, recipe::Net, remove::sooner_or_later};
use link::{Link, bridges, link};
use std::{
    io,
    ops::RangeInclusive,
    process::{Command, Stdio},
};
use tools::{ip, run, understand};

/// Addresses of TAPs begin here and end below the multicast addresses. A bridge without a fixed address takes
/// the lowest of its ports', and would be lost to its neighbours for as long as they remember the one before.
const ADDRESSES: RangeInclusive<u64> = 0xfe00_0000_0000..=0xfeff_ffff_ffff;

/// Why a TAP could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a TAP on bridge {bridge}: {why}")]
pub struct TapError {
    /// The bridge.
    pub bridge: String,
    /// What `ip` said.
    pub why: String,
}

/// Why a network card cannot be put on a bridge.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BridgeError {
    /// There is none of this name.
    #[error("there is no bridge {0} here; make it with: ip link add {0} type bridge")]
    Absent(String),
    /// It is not known whether there is one.
    #[error("cannot look whether there is a bridge {bridge} here: {why}")]
    Unseen {
        /// The bridge.
        bridge: String,
        /// What was in the way.
        why: String,
    },
}

/// A name for a TAP of this VM, to be written down before it is made. It is new each time, so that source and
/// target of a migration can be one host.
pub fn name(vm: &str) -> io::Result<String> {
    // Interface names have at most 15 bytes.
    let stem: String = vm.chars().filter(char::is_ascii_alphanumeric).take(6).collect();
    Ok(format!("w{stem}-{:06x}", random::number()? & 0xff_ffff))
}

/// A bridge.
enum Bridge {
    /// The kernel's own.
    Linux(Link),
    /// One of Open vSwitch, by the interface that has its name.
    Ovs(Link),
}

impl Bridge {
    fn link(&self) -> &Link {
        match self {
            Self::Linux(link) | Self::Ovs(link) => link,
        }
    }
}

/// Makes a TAP of this name, plugged in as `net` says, which this user may open besides us.
pub fn create(tap: &str, net: &Net, user: Option<u32>) -> Result<(), TapError> {
    let failed = |why| TapError { bridge: net.bridge.clone(), why };
    let bridge = find_bridge(&net.bridge).map_err(|error| failed(error.to_string()))?;
    let random = random::number().map_err(|error| failed(format!("draw a random number: {error}")))?;
    let queues: &[&str] = if net.queues() > 1 { &["multi_queue"] } else { &[] };
    let user = user.map(|user| ["user".to_owned(), user.to_string()]);
    let user: Vec<&str> = user.iter().flatten().map(String::as_str).collect();
    ip(&[&["tuntap", "add", "dev", tap, "mode", "tap"], &*user, queues].concat()).map_err(failed)?;
    plug_in(tap, net, &bridge, &address(bridge.link().address_number(), random)).map_err(|why| {
        remove(tap);
        failed(why)
    })
}

/// In this order: no setting of the TAP's can reach its bridge, and no packet a port that is not yet as it
/// must be.
fn plug_in(tap: &str, net: &Net, bridge: &Bridge, address: &str) -> Result<(), String> {
    let tell =
        |program: &str, words: &[String]| run(program, &words.iter().map(String::as_str).collect::<Vec<_>>());
    tell("ip", &net.port.before_joining(tap, address, bridge.link()))?;
    if let Bridge::Ovs(_) = bridge {
        ovs::add(&net.bridge, tap, &net.port.ovs.clone().unwrap_or_default())?;
    } else {
        ip(&["link", "set", "dev", tap, "master", &net.bridge])?;
        if let Some(words) = net.port.after_joining(tap) {
            tell("ip", &words)?;
        }
        if net.port.vlans.is_some() {
            for words in net.port.vlan_commands(tap, &vlans(tap)?) {
                tell("bridge", &words)?;
            }
        }
    }
    if !net.port.down {
        ip(&["link", "set", "dev", tap, "up"])?;
    }
    Ok(())
}

/// An address for a TAP on a bridge with this address: above it, as long as there is room.
fn address(bridge: u64, random: u64) -> String {
    let (lowest, highest) = (*ADDRESSES.start(), *ADDRESSES.end());
    let above = bridge.clamp(lowest, highest - 1) + 1;
    let number = above + random % (highest - above + 1);
    let bytes = number.to_be_bytes();
    bytes[2..].iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// How the TAP of a network card is plugged in here; else everything about it that cannot go with the VM.
/// Each reason says what would mend it.
pub(crate) fn read(id: &str, tap: &str) -> Result<(String, Port), Vec<String>> {
    let of_card = |why: String| format!("network {id}: {why}");
    let one = |why: String| vec![of_card(why)];
    let found = link(tap).map_err(|why| one(format!("cannot look at its TAP {tap}: {why}")))?;
    let kind = found.linkinfo.info_kind.as_str();
    if kind != "tun" {
        return Err(one(format!("{tap} is no TAP but of kind {kind:?}; use a TAP on a bridge")));
    }
    // Where Open vSwitch is no part of the kernel, its ports have no master.
    if found.master.is_none() || found.linkinfo.info_slave_kind == "openvswitch" {
        let of_all = |whys: Vec<String>| whys.into_iter().map(of_card).collect::<Vec<_>>();
        if let Some((name, port)) = ovs::read(tap).map_err(of_all)? {
            return of_ovs(tap, &found, name, port).map_err(of_all);
        }
    }
    if found.linkinfo.info_slave_kind == "openvswitch" {
        let why =
            format!("its TAP {tap} is a port of Open vSwitch, which does not say of what (ovs-vsctl show)");
        return Err(one(why));
    }
    let Some(name) = found.master.clone() else {
        return Err(one(format!("its TAP {tap} is on no bridge; ip link set {tap} master BRIDGE")));
    };
    let kind = found.linkinfo.info_slave_kind.as_str();
    if kind != "bridge" {
        return Err(one(format!(
            "its TAP {tap} is a port of {name}, which is of kind {kind:?} and no Linux bridge; only those \
             can be carried over: ip link set {tap} master BRIDGE"
        )));
    }
    let bridge = link(&name).map_err(|why| one(format!("cannot look at its bridge {name}: {why}")))?;
    let vlans = port::filters(&bridge).then(|| vlans(tap)).transpose().map_err(one)?;
    let own = found.address.clone().unwrap_or_default();
    let rules = rules::rules(tap, &own, &name);
    match Port::read(&found, &bridge, vlans) {
        Ok(port) if rules.is_empty() => Ok((name, port)),
        Ok(_) => Err(rules.into_iter().map(of_card).collect()),
        Err(reasons) => Err(reasons.into_iter().chain(rules).map(of_card).collect()),
    }
}

/// The same of a port of Open vSwitch.
fn of_ovs(tap: &str, found: &Link, name: String, port: OvsPort) -> Result<(String, Port), Vec<String>> {
    let bridge = link(&name).map_err(|why| vec![format!("cannot look at its bridge {name}: {why}")])?;
    let own = found.address.clone().unwrap_or_default();
    let rules = rules::rules(tap, &own, &name);
    let read = Port::read(found, &bridge, None).map(|read| Port { ovs: Some(port), ..read });
    match read {
        Ok(port) if rules.is_empty() => Ok((name, port)),
        Ok(_) => Err(rules),
        Err(reasons) => Err(reasons.into_iter().chain(rules).collect()),
    }
}

/// Whether packets come with a header in which QEMU and the TAP agree on offloads (`vnet_hdr`).
pub(crate) fn has_header(tap: &str) -> Result<bool, String> {
    Ok(link(tap)?.linkinfo.info_data["vnet_hdr"] == true)
}

fn vlans(tap: &str) -> Result<Vec<Vlan>, String> {
    Ok(port::vlans_of(tap, understand(&run("bridge", &["-json", "vlan", "show", "dev", tap])?)?))
}

/// Why the network card cannot be plugged in here as it is where the VM runs.
pub(crate) fn misfits(net: &Net) -> Vec<String> {
    match find_bridge(&net.bridge) {
        Ok(Bridge::Linux(bridge)) => net.port.misfits(&bridge, false),
        Ok(Bridge::Ovs(bridge)) => net.port.misfits(&bridge, true),
        Err(error) => vec![error.to_string()],
    }
}

/// The first of these TAPs that a guest would not be heard through yet: its bridge's spanning tree lets no
/// packet pass for twice its forward delay. In words.
pub(crate) fn silent(taps: &[String]) -> Option<String> {
    taps.iter().find_map(|tap| {
        let found = link(tap).ok()?;
        let state = found.port_state();
        let waits = found.is_up() && matches!(state, "listening" | "learning" | "blocking");
        waits.then(|| {
            let bridge = found.master.as_deref().unwrap_or("its bridge");
            format!("the port of {bridge} is {state} and does not forward yet (STP)")
        })
    })
}

/// Takes a TAP away; harmless when it is gone.
pub fn remove(tap: &str) {
    let name = tap.to_owned();
    sooner_or_later(format!("TAP {tap}, by ip (package iproute2)"), move || try_to_remove(&name));
}

/// An error: nobody could be asked.
fn try_to_remove(tap: &str) -> io::Result<()> {
    let is_kernels = link(tap).is_ok_and(|found| found.linkinfo.info_slave_kind == "bridge");
    let asked = Command::new("ip").args(["link", "delete", "dev", tap]).stdin(Stdio::null()).output()?;
    if !is_kernels {
        ovs::remove(tap)?;
    }
    if !asked.status.success() {
        tracing::debug!(tap, why = %String::from_utf8_lossy(&asked.stderr).trim(), "there is no such TAP");
    }
    Ok(())
}

/// Looks for a bridge of this name in our network namespace.
fn find_bridge(name: &str) -> Result<Bridge, BridgeError> {
    let unseen = |why| BridgeError::Unseen { bridge: name.to_owned(), why };
    match is_among(name, bridges()) {
        Err(BridgeError::Absent(_)) if ovs::is_bridge(name).map_err(unseen)? => {
            link(name).map(Bridge::Ovs).map_err(unseen)
        }
        found => found.map(Bridge::Linux),
    }
}

/// The bridge among those that `ip` lists.
fn is_among(name: &str, listed: Result<Vec<Link>, String>) -> Result<Link, BridgeError> {
    let listed = listed.map_err(|why| BridgeError::Unseen { bridge: name.to_owned(), why })?;
    let found = listed.into_iter().find(|link| link.ifname == name);
    found.ok_or_else(|| BridgeError::Absent(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bridge_that_is_not_listed_is_absent() {
        let listed = || understand(r#"[{"ifname":"br0","mtu":1500},{"ifname":"br1","link":"if4"}]"#);
        let look = |name: &str, listed: Result<Vec<Link>, String>| {
            is_among(name, listed).map(|found| found.ifname).map_err(|error| error.to_string())
        };
        assert_eq!(look("br0", listed()), Ok("br0".to_owned()));
        assert_eq!(look("br1", listed()), Ok("br1".to_owned()));
        for (name, listed) in [("br", listed()), ("br9", listed()), ("br0", understand(""))] {
            let why = look(name, listed).unwrap_err();
            assert!(why.starts_with(&format!("there is no bridge {name} here; make it")), "{why}");
        }
        let why = Err("cannot run ip: Too many open files (os error 24)".to_owned());
        let why = look("br0", why).unwrap_err();
        assert!(why.starts_with("cannot look whether there is a bridge br0 here: "), "{why}");
        assert!(why.contains("Too many open files") && !why.contains("make it"), "{why}");
    }

    #[test]
    fn no_tap_takes_its_bridges_address_over() {
        let bridges =
            [0, 0x0200_0000_0001, 0x5254_0012_3456, 0xfdff_ffff_ffff, 0xfe00_0000_0000, 0xfe80_0000_0000];
        for bridge in bridges {
            for random in [0, 1, 7 << 40, u64::MAX] {
                let text = address(bridge, random);
                let number = Link { address: Some(text.clone()), ..Link::default() }.address_number();
                assert!(text.starts_with("fe:") && number > bridge, "{text} on {bridge:x}");
            }
        }
        // Without room above it there is no lower one either.
        assert_eq!(address(0xfeff_ffff_ffff, 5), "fe:ff:ff:ff:ff:ff");
    }
}
