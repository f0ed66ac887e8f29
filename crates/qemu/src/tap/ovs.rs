//! TAPs on bridges of Open vSwitch: ports in a database, which stay there when their interfaces are gone.
//!
//! Its database is asked through `ovs-vsctl`, whose errors say what is wrong. Flows are a controller's, which
//! makes them for the port here, too.

use super::tools::run;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    io::{self, ErrorKind},
    ops::RangeInclusive,
    process::{Command, Stdio},
};

const PROGRAM: &str = "ovs-vsctl";

/// The exit status of `br-exists` for no.
const NO: i32 = 2;

/// How long its database, and the switch, may take.
const PATIENCE: &str = "--timeout=10";

/// Modes of a port's VLANs.
const MODES: [&str; 5] = ["access", "trunk", "native-tagged", "native-untagged", "dot1q-tunnel"];

/// A port without a tag is in all of these. What has no tag on the bridge has number 0.
const ALL: RangeInclusive<u16> = 1..=4094;

/// Managers set four or five.
const MOST_IDS: usize = 32;
const LONGEST_ID: usize = 255;

/// What Open vSwitch has of a port.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OvsPort {
    /// The VLAN of its frames without a tag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<u16>,
    /// VLANs whose frames it takes with their tags.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trunks: Vec<u16>,
    /// What these two mean, where that is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vlan_mode: Option<String>,
    /// By which managers know the interface (`iface-id`, `attached-mac`, …).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub external_ids: BTreeMap<String, String>,
}

impl OvsPort {
    /// Everything that no port can be. From a peer it is hostile until then.
    pub(super) fn check(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut must = |holds: bool, what: &str| {
            if !holds {
                wrong.push(format!("a network card's {what} is out of bounds"));
            }
        };
        let is_vlan = |vlan: &u16| *vlan <= *ALL.end();
        must(self.tag.iter().all(is_vlan), "tag");
        must(self.trunks.len() <= ALL.len() + 1 && self.trunks.iter().all(is_vlan), "list of trunks");
        must(self.vlan_mode.as_deref().is_none_or(|mode| MODES.contains(&mode)), "mode of VLANs");
        let plain = |text: &str, more: &[u8]| {
            (1..=LONGEST_ID).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || more.contains(&byte))
        };
        let ids = self.external_ids.iter().all(|(key, id)| plain(key, b"-_") && plain(id, b"-_.:/ "));
        must(ids && self.external_ids.len() <= MOST_IDS, "list of external ids");
        wrong
    }

    /// The VLANs that it is in. What has no tag counts as VLAN 1, which it is on bridges of the kernel's own.
    pub(super) fn vlans(&self) -> impl Iterator<Item = u16> {
        let tagged = self.trunks.iter().copied().chain(self.tag);
        let all = match (self.tag, self.trunks.is_empty(), self.vlan_mode.as_deref()) {
            // Only a port of one VLAN is in no others unless they are named.
            (Some(_), _, None | Some("access")) | (_, false, _) => None,
            _ => Some(ALL),
        };
        tagged.map(|vlan| vlan.max(1)).chain(all.into_iter().flatten())
    }

    /// The words of `ovs-vsctl` that make a port like it.
    fn words(&self, bridge: &str, tap: &str) -> Vec<String> {
        let mut words = [PATIENCE, "add-port", bridge, tap].map(str::to_owned).to_vec();
        words.extend(self.tag.map(|tag| format!("tag={tag}")));
        let trunks: Vec<_> = self.trunks.iter().map(u16::to_string).collect();
        if !trunks.is_empty() {
            words.push(format!("trunks={}", trunks.join(",")));
        }
        words.extend(self.vlan_mode.as_ref().map(|mode| format!("vlan_mode={mode}")));
        if !self.external_ids.is_empty() {
            words.extend(["--", "set", "Interface", tap].map(str::to_owned));
            words.extend(self.external_ids.iter().map(|(key, id)| format!("external_ids:{key}=\"{id}\"")));
        }
        words
    }
}

/// What its database says, for a question whose answer may be no; `None`: that, or nobody has installed it.
fn ask(words: &[&str]) -> Result<Option<String>, String> {
    let done = Command::new(PROGRAM).arg(PATIENCE).args(words).stdin(Stdio::null()).output();
    let done = match done {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        done => done.map_err(|error| format!("cannot run {PROGRAM}: {error}"))?,
    };
    let said = String::from_utf8_lossy(&done.stderr);
    if done.status.success() {
        Ok(Some(String::from_utf8_lossy(&done.stdout).into_owned()))
    } else if done.status.code() == Some(NO) || said.contains("no interface named") {
        Ok(None)
    } else {
        Err(format!("Open vSwitch does not answer ({PROGRAM} {}: {})", words.join(" "), said.trim()))
    }
}

/// Whether there is a bridge of Open vSwitch of this name here.
pub(super) fn is_bridge(name: &str) -> Result<bool, String> {
    Ok(ask(&["br-exists", name])?.is_some())
}

/// The bridge that a TAP is a port of, and how; `None`: of none. Else what of it cannot be carried over.
pub(super) fn read(tap: &str) -> Result<Option<(String, OvsPort)>, Vec<String>> {
    let bridge = ask(&["iface-to-br", tap]).map_err(|why| vec![format!("its TAP {tap}: {why}")])?;
    let Some(bridge) = bridge else { return Ok(None) };
    let bridge = bridge.trim().to_owned();
    let row = |table: &str| -> Result<BTreeMap<String, Value>, Vec<String>> {
        let found = run(PROGRAM, &[PATIENCE, "--format=json", "find", table, &format!("name=\"{tap}\"")]);
        found.and_then(|text| first_row(&text, table, tap)).map_err(|why| vec![why])
    };
    let port = of_rows(tap, &row("Port")?, &row("Interface")?)?;
    Ok(Some((bridge, port)))
}

/// The first row of a table, by its columns.
fn first_row(text: &str, table: &str, tap: &str) -> Result<BTreeMap<String, Value>, String> {
    let said: Value = serde_json::from_str(text)
        .map_err(|error| format!("{PROGRAM} answers something else than expected: {error}"))?;
    let names = said["headings"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let row = said["data"][0].as_array().filter(|row| !row.is_empty());
    // The interface of a bond is no port.
    let row = row.ok_or_else(|| {
        format!(
            "its TAP {tap} has no {table} of its own in Open vSwitch (a bond?), which is not carried over"
        )
    })?;
    Ok(names.map(str::to_owned).zip(row.iter().cloned()).collect())
}

/// What may be set on a port, or on an interface, and is not carried over; and how to take it away.
const LEFT: [(&str, &[&str]); 2] = [
    ("Port", &["qos", "other_config", "bond_mode", "mac", "cvlans"]),
    ("Interface", &["options", "other_config", "bfd", "cfm_mpid", "lldp", "ofport_request"]),
];

/// Limits, which are 0 where there are none.
const POLICING: &[&str] = &["ingress_policing_rate", "ingress_policing_kpkts_rate"];

fn of_rows(
    tap: &str,
    port: &BTreeMap<String, Value>,
    interface: &BTreeMap<String, Value>,
) -> Result<OvsPort, Vec<String>> {
    let mut reasons = Vec::new();
    for ((table, columns), row) in LEFT.into_iter().zip([port, interface]) {
        for column in columns.iter().filter(|column| row.get(**column).is_some_and(|value| !is_empty(value)))
        {
            reasons.push(format!(
                "its TAP {tap} has {column} in Open vSwitch, which is not carried over; {PROGRAM} clear \
                 {table} {tap} {column}"
            ));
        }
    }
    for column in POLICING.iter().filter(|column| interface.get(**column).is_some_and(|rate| *rate != 0)) {
        reasons.push(format!(
            "its TAP {tap} has {column} in Open vSwitch, which is not carried over; {PROGRAM} set Interface \
             {tap} {column}=0"
        ));
    }
    if port.get("protected") == Some(&Value::Bool(true)) {
        reasons.push(format!(
            "its TAP {tap} is protected in Open vSwitch, which is not carried over; {PROGRAM} set Port {tap} \
             protected=false"
        ));
    }
    if !reasons.is_empty() {
        return Err(reasons);
    }
    let vlan = |value: &Value| value.as_u64().and_then(|vlan| u16::try_from(vlan).ok());
    let words = |(key, id): (&Value, &Value)| Some((key.as_str()?.to_owned(), id.as_str()?.to_owned()));
    // What a controller has noted of what it did on this host.
    let travels = |(key, _): &(String, String)| !key.starts_with("ovn-");
    Ok(OvsPort {
        tag: port.get("tag").and_then(vlan),
        trunks: port
            .get("trunks")
            .map(|all| items(all).into_iter().filter_map(vlan).collect())
            .unwrap_or_default(),
        vlan_mode: port.get("vlan_mode").and_then(Value::as_str).map(str::to_owned),
        external_ids: interface
            .get("external_ids")
            .map(|ids| pairs(ids).into_iter().filter_map(words).filter(travels).collect())
            .unwrap_or_default(),
    })
}

/// The elements of a set of OVSDB's (RFC 7047, 5.1): one alone stands for itself.
fn items(value: &Value) -> Vec<&Value> {
    match (value[0].as_str(), value[1].as_array()) {
        (Some("set"), Some(all)) => all.iter().collect(),
        _ => vec![value],
    }
}

fn pairs(value: &Value) -> Vec<(&Value, &Value)> {
    let all = (value[0] == "map").then(|| value[1].as_array()).flatten();
    all.into_iter().flatten().map(|pair| (&pair[0], &pair[1])).collect()
}

fn is_empty(value: &Value) -> bool {
    matches!(value[0].as_str(), Some("set" | "map")) && value[1].as_array().is_some_and(Vec::is_empty)
}

/// Makes a TAP a port of a bridge, as it was where its VM comes from.
pub(super) fn add(bridge: &str, tap: &str, port: &OvsPort) -> Result<(), String> {
    let words = port.words(bridge, tap);
    run(PROGRAM, &words.iter().map(String::as_str).collect::<Vec<_>>()).map(drop)
}

/// Takes a port away, if it is one; it outlives its TAP. An error: it may still be there.
pub(super) fn remove(tap: &str) -> io::Result<()> {
    ask(&["--no-wait", "--if-exists", "del-port", tap]).map(drop).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// As Open vSwitch 3.1 says it.
    fn rows(port: Value, interface: Value) -> [BTreeMap<String, Value>; 2] {
        let none = json!(["set", []]);
        let usual = json!({ "qos": none, "other_config": ["map", []], "bond_mode": none, "mac": none,
            "tag": none, "trunks": none, "vlan_mode": none, "options": ["map", []], "bfd": ["map", []],
            "lldp": ["map", []], "cvlans": none,
            "protected": false, "cfm_mpid": none, "ofport_request": none, "ingress_policing_rate": 0,
            "external_ids": ["map", []] });
        [port, interface].map(|more| {
            let mut row: BTreeMap<String, Value> = serde_json::from_value(usual.clone()).unwrap();
            row.extend(serde_json::from_value::<BTreeMap<String, Value>>(more).unwrap());
            row
        })
    }

    #[test]
    fn a_port_of_open_vswitch_is_made_as_it_was_read() {
        let ids = json!([
            "map",
            [["ovn-installed", "true"], ["attached-mac", "52:54:00:00:00:01"], ["iface-id", "abc"]]
        ]);
        let [port, interface] = rows(
            json!({ "tag": 20, "trunks": ["set", [30, 31]], "vlan_mode": "native-tagged" }),
            json!({ "external_ids": ids }),
        );
        let read = of_rows("t0", &port, &interface).unwrap();
        assert_eq!(
            read.words("br0", "w1").join(" "),
            "--timeout=10 add-port br0 w1 tag=20 trunks=30,31 vlan_mode=native-tagged -- set Interface w1 \
             external_ids:attached-mac=\"52:54:00:00:00:01\" external_ids:iface-id=\"abc\""
        );
        let [port, interface] = rows(json!({ "trunks": 7 }), json!({}));
        let read = of_rows("t0", &port, &interface).unwrap();
        assert_eq!(read.words("br0", "w1").join(" "), "--timeout=10 add-port br0 w1 trunks=7");
        for (port, interface, what) in [
            (json!({ "qos": ["uuid", "c"] }), json!({}), "clear Port t0 qos"),
            (json!({ "cvlans": 7 }), json!({}), "clear Port t0 cvlans"),
            (json!({ "protected": true }), json!({}), "Port t0 protected=false"),
            (json!({}), json!({ "ingress_policing_rate": 100 }), "Interface t0 ingress_policing_rate=0"),
            (json!({}), json!({ "options": ["map", [["a", "b"]]] }), "clear Interface t0 options"),
        ] {
            let [port, interface] = rows(port, interface);
            let reasons = of_rows("t0", &port, &interface).unwrap_err();
            assert!(reasons.len() == 1 && reasons[0].contains(what), "{reasons:?}");
        }
        assert!(first_row(r#"{"data":[],"headings":["name"]}"#, "Port", "t0").unwrap_err().contains("bond"));
    }

    #[test]
    fn a_port_without_a_tag_is_in_every_vlan() {
        let port = |tag: Option<u16>, trunks: &[u16], mode: Option<&str>| OvsPort {
            tag,
            trunks: trunks.to_vec(),
            vlan_mode: mode.map(str::to_owned),
            ..OvsPort::default()
        };
        let count = |port: OvsPort| port.vlans().collect::<std::collections::BTreeSet<_>>().len();
        for (tag, trunks, mode, vlans) in [
            (None, &[][..], None, 4094),
            (Some(20), &[], None, 1),
            (Some(20), &[], Some("access"), 1),
            (Some(20), &[], Some("native-untagged"), 4094),
            (None, &[], Some("trunk"), 4094),
            (None, &[30, 31], None, 2),
            (None, &[0, 30], None, 2),
            (Some(0), &[], None, 1),
            (Some(20), &[30], Some("native-tagged"), 2),
        ] {
            assert_eq!(count(port(tag, trunks, mode)), vlans, "{tag:?} {trunks:?} {mode:?}");
        }
        let with = |key: &str, id: &str| OvsPort {
            external_ids: BTreeMap::from([(key.to_owned(), id.to_owned())]),
            ..OvsPort::default()
        };
        assert_eq!(with("iface-id", "a-b").check(), Vec::<String>::new());
        for wrong in [
            with("iface-id", "a\" -- del-br br0"),
            with("a=b", "c"),
            with("iface-id", ""),
            port(Some(4095), &[], None),
            port(None, &[4095], None),
            port(None, &[], Some("none")),
        ] {
            assert_eq!(wrong.check().len(), 1, "{wrong:?}");
        }
    }
}
