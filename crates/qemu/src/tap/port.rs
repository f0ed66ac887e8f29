//! How a TAP is plugged in: what its host has set on the interface and on the bridge's port, read here and
//! set there.

use super::{link::Link, ovs::OvsPort};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, ops::RangeInclusive};

/// Switches of a bridge's port, by `ip link`'s names for them, and how a port begins.
const FLAGS: &[(&str, bool)] = &[
    ("hairpin", false),
    ("guard", false),
    ("root_block", false),
    ("fastleave", false),
    ("learning", true),
    ("flood", true),
    ("mcast_flood", true),
    ("bcast_flood", true),
    ("mcast_to_unicast", false),
    ("neigh_suppress", false),
    ("isolated", false),
    ("locked", false),
    ("proxy_arp", false),
    ("proxy_arp_wifi", false),
];

/// What an Ethernet interface may have, as the kernel says.
const MTUS: RangeInclusive<u32> = 68..=65535;

/// The largest that a TAP may have (`ETH_MAX_MTU` without its header).
const LARGEST_TAP: u32 = 65521;

/// How a port begins, and an interface.
const PRIORITY: u8 = 32;
const MULTICAST_ROUTER: u8 = 1;
const QUEUE: u32 = 1000;

/// The kernel's `IFALIASZ`, and a transmit queue beyond which nobody goes.
const LONGEST_ALIAS: usize = 255;
const LONGEST_QUEUE: u32 = 1 << 20;

/// VLANs of one port, at most, each named once.
const MOST_VLANS: usize = 4094;

/// How a TAP is plugged in on its host. What is as it begins is left out.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Port {
    /// The TAP's MTU; 0: as its bridge's.
    pub mtu: u32,
    /// The bridge's; 0: not known.
    pub bridge_mtu: u32,
    /// Whether somebody has set it down.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub down: bool,
    /// How many packets wait in it for QEMU, at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub txqlen: Option<u32>,
    /// What people call it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
    /// Switches that differ from how a port begins.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub flags: BTreeMap<String, bool>,
    /// Its priority in the spanning tree.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<u8>,
    /// Whether routers of multicasts are behind it: 0, 1 or 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mcast_router: Option<u8>,
    /// Its VLANs; `None`: its bridge filters none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vlans: Option<Vec<Vlan>>,
    /// What Open vSwitch has of it; `None`: its bridge is the kernel's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ovs: Option<OvsPort>,
}

/// VLANs that a port is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vlan {
    /// The first.
    pub first: u16,
    /// The last: the same for a single one.
    pub last: u16,
    /// Where frames go that come without a tag.
    #[serde(default)]
    pub pvid: bool,
    /// Whether its frames leave without a tag.
    #[serde(default)]
    pub untagged: bool,
}

/// What `bridge -json vlan show` says of a port.
#[derive(Deserialize)]
pub(super) struct PortVlans {
    ifname: String,
    #[serde(default)]
    vlans: Vec<ShownVlan>,
}

#[derive(Deserialize)]
struct ShownVlan {
    vlan: u16,
    #[serde(rename = "vlanEnd")]
    end: Option<u16>,
    #[serde(default)]
    flags: Vec<String>,
}

/// The VLANs of one port among all that `bridge` tells of.
pub(super) fn vlans_of(tap: &str, shown: Vec<PortVlans>) -> Vec<Vlan> {
    let ours = shown.into_iter().filter(|port| port.ifname == tap).flat_map(|port| port.vlans);
    let vlan = |shown: ShownVlan| Vlan {
        first: shown.vlan,
        last: shown.end.unwrap_or(shown.vlan),
        pvid: shown.flags.iter().any(|flag| flag == "PVID"),
        untagged: shown.flags.iter().any(|flag| flag == "Egress Untagged"),
    };
    ours.map(vlan).collect()
}

/// Whether a bridge filters VLANs.
pub(super) fn filters(bridge: &Link) -> bool {
    bridge.linkinfo.info_data["vlan_filtering"].as_u64() == Some(1)
}

impl Port {
    /// How this TAP is plugged in; else all of it that cannot be carried over.
    pub(super) fn read(tap: &Link, bridge: &Link, vlans: Option<Vec<Vlan>>) -> Result<Self, Vec<String>> {
        let (name, data) = (&tap.ifname, &tap.linkinfo.info_slave_data);
        let mut reasons = Vec::new();
        if let Some(backup) = data["backup_port"].as_str() {
            let undo = format!("ip link set {name} type bridge_slave nobackup_port");
            reasons.push(format!(
                "its TAP {name} has the backup port {backup}, which is not carried over; {undo}"
            ));
        }
        if data["vlan_tunnel"].as_bool() == Some(true) {
            let undo = format!("ip link set {name} type bridge_slave vlan_tunnel off");
            reasons.push(format!("its TAP {name} maps VLANs to tunnels, which is not carried over; {undo}"));
        }
        if data["group_fwd_mask"].as_str().is_some_and(|mask| !matches!(mask, "0" | "0x0")) {
            let undo = format!("ip link set {name} type bridge_slave group_fwd_mask 0");
            reasons.push(format!("its TAP {name} has a group_fwd_mask, which is not carried over; {undo}"));
        }
        if tap.xdp.is_some() {
            let undo = format!("ip link set {name} xdp off");
            reasons.push(format!("its TAP {name} has an XDP program, which is not carried over; {undo}"));
        }
        if !reasons.is_empty() {
            return Err(reasons);
        }
        let switched = |(flag, begins): &(&str, bool)| {
            let is = data[*flag].as_bool().filter(|is| is != begins)?;
            Some(((*flag).to_owned(), is))
        };
        let small = |key: &str| data[key].as_u64().and_then(|number| u8::try_from(number).ok());
        Ok(Self {
            mtu: tap.mtu,
            bridge_mtu: bridge.mtu,
            down: !tap.is_up(),
            txqlen: tap.txqlen.filter(|length| *length != QUEUE),
            alias: tap.ifalias.clone().filter(|alias| !alias.is_empty()),
            flags: FLAGS.iter().filter_map(switched).collect(),
            priority: small("priority").filter(|priority| *priority != PRIORITY),
            mcast_router: small("multicast_router").filter(|router| *router != MULTICAST_ROUTER),
            vlans,
            ovs: None,
        })
    }

    /// Everything that no port can be; empty when it may be used. From a peer it is hostile until then.
    pub(crate) fn check(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut must = |holds: bool, what: &str| {
            if !holds {
                wrong.push(format!("a network card's {what} is out of bounds"));
            }
        };
        must([self.mtu, self.bridge_mtu].iter().all(|mtu| *mtu == 0 || MTUS.contains(mtu)), "MTU");
        must(self.txqlen.is_none_or(|length| length <= LONGEST_QUEUE), "transmit queue");
        let alias = self.alias.as_deref().unwrap_or_default();
        must(alias.len() <= LONGEST_ALIAS && !alias.contains(char::is_control), "alias");
        must(self.flags.keys().all(|key| FLAGS.iter().any(|(flag, _)| flag == key)), "list of port flags");
        must(self.priority.is_none_or(|priority| priority < 64), "priority");
        must(self.mcast_router.is_none_or(|router| router <= 2), "multicast router");
        let vlans = self.vlans.as_deref().unwrap_or_default();
        let sane = |vlan: &Vlan| (1..=4094).contains(&vlan.first) && (vlan.first..=4094).contains(&vlan.last);
        let one = |vlan: &Vlan| !vlan.pvid || vlan.first == vlan.last;
        let few =
            || vlans.iter().map(|vlan| usize::from(vlan.last - vlan.first) + 1).sum::<usize>() <= MOST_VLANS;
        let all = vlans.len() <= MOST_VLANS && vlans.iter().all(|vlan| sane(vlan) && one(vlan));
        must(all && few(), "list of VLANs");
        must(vlans.iter().filter(|vlan| vlan.pvid).count() <= 1, "list of VLANs without a tag");
        wrong.extend(self.ovs.iter().flat_map(OvsPort::check));
        wrong
    }

    /// Why this bridge, of Open vSwitch or the kernel's own, cannot have such a port.
    pub(super) fn misfits(&self, bridge: &Link, is_ovs: bool) -> Vec<String> {
        let (name, here) = (&bridge.ifname, bridge.mtu);
        let mut reasons = Vec::new();
        // Whatever a peer says of its own: on another one a port without VLANs would be in all of them.
        if self.ovs.is_some() != is_ovs {
            let (here, there) = if is_ovs { ("", "not ") } else { ("not ", "") };
            reasons.push(format!(
                "the bridge {name} is {here}one of Open vSwitch here, and {there}where the VM runs; make \
                 both alike"
            ));
        }
        // What the guest can use where it runs: a bridge that is smaller than its port holds it back.
        let used = if self.bridge_mtu == 0 { self.mtu } else { self.mtu.min(self.bridge_mtu) };
        if here < used {
            reasons.push(format!(
                "the bridge {name} has an MTU of {here} here, and the VM's network one of {used}: set it, \
                 and that of its other ports, with ip link set {name} mtu {used}"
            ));
        }
        match (&self.vlans, filters(bridge)) {
            _ if is_ovs => {}
            (Some(vlans), false) => reasons.push(format!(
                "the bridge {name} filters no VLANs here, and the VM's port is in {}: ip link set {name} \
                 type bridge vlan_filtering 1",
                words(vlans)
            )),
            // Of the target's own choice, which may be another network than that of the source.
            (None, true) if self.bridge_mtu != 0 => reasons.push(format!(
                "the bridge {name} filters VLANs here, and not where the VM runs; make both alike with ip \
                 link set {name} type bridge vlan_filtering 0, or 1 there"
            )),
            _ => {}
        }
        reasons
    }

    /// The MTU that the TAP has on this bridge: never one by which the bridge's own would fall.
    pub(super) fn mtu_on(&self, bridge: &Link) -> u32 {
        self.mtu.max(bridge.mtu).clamp(*MTUS.start(), LARGEST_TAP)
    }

    /// What `ip` is told of the TAP before it joins its bridge.
    pub(super) fn before_joining(&self, tap: &str, address: &str, bridge: &Link) -> Vec<String> {
        let mtu = self.mtu_on(bridge).to_string();
        let mut words =
            ["link", "set", "dev", tap, "address", address, "mtu", &mtu].map(str::to_owned).to_vec();
        let txqlen = self.txqlen.map(|length| length.to_string());
        for (key, value) in [("txqueuelen", &txqlen), ("alias", &self.alias)] {
            words.extend(value.iter().flat_map(|value| [key.to_owned(), value.clone()]));
        }
        words
    }

    /// What `ip` is told of the port once it is one; nothing where it is as it begins.
    pub(super) fn after_joining(&self, tap: &str) -> Option<Vec<String>> {
        let mut settings = Vec::new();
        for (flag, on) in &self.flags {
            settings.extend([flag.clone(), if *on { "on" } else { "off" }.to_owned()]);
        }
        for (key, value) in [("priority", self.priority), ("mcast_router", self.mcast_router)] {
            settings.extend(value.iter().flat_map(|value| [key.to_owned(), value.to_string()]));
        }
        let start = ["link", "set", "dev", tap, "type", "bridge_slave"].map(str::to_owned);
        (!settings.is_empty()).then(|| [start.to_vec(), settings].concat())
    }

    /// What `bridge` is told so that the port leaves the VLANs that it began with and is in its own.
    pub(super) fn vlan_commands(&self, tap: &str, begins: &[Vlan]) -> Vec<Vec<String>> {
        let Some(vlans) = &self.vlans else { return Vec::new() };
        let command = |verb: &str, vlan: &Vlan| {
            let range = match vlan.last == vlan.first {
                true => vlan.first.to_string(),
                false => format!("{}-{}", vlan.first, vlan.last),
            };
            ["vlan", verb, "dev", tap, "vid", &range].map(str::to_owned).to_vec()
        };
        let leave = begins.iter().filter(|vlan| !vlans.contains(vlan)).map(|vlan| command("del", vlan));
        let join = vlans.iter().filter(|vlan| !begins.contains(vlan)).map(|vlan| {
            let mut words = command("add", vlan);
            let flags = [(vlan.pvid, "pvid"), (vlan.untagged, "untagged")];
            words.extend(flags.iter().filter(|(is, _)| *is).map(|(_, word)| (*word).to_owned()));
            words
        });
        leave.chain(join).collect()
    }

    /// VLANs of this port that none of these ranges has.
    pub(crate) fn vlans_beyond(&self, granted: &[RangeInclusive<u16>]) -> Vec<u16> {
        let vlans = self.vlans.iter().flatten().flat_map(|vlan| vlan.first..=vlan.last);
        let vlans = vlans.chain(self.ovs.iter().flat_map(OvsPort::vlans));
        vlans.filter(|vlan| !granted.iter().any(|range| range.contains(vlan))).collect()
    }
}

/// A list of VLANs for people.
fn words(vlans: &[Vlan]) -> String {
    if vlans.is_empty() {
        return "none".to_owned();
    }
    let one = |vlan: &Vlan| {
        let range = if vlan.first == vlan.last { String::new() } else { format!("-{}", vlan.last) };
        let untagged = if vlan.pvid { " (untagged)" } else { "" };
        format!("VLAN {}{range}{untagged}", vlan.first)
    };
    vlans.iter().map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
