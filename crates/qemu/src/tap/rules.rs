//! Rules for packets that somebody has made for a TAP. They are this host's own and do not go with the VM.

use super::tools::{run_if_there, understand};
use serde::Deserialize;
use serde_json::Value;

/// What lists the rules of each firewall; one that is not installed has none.
const FIREWALLS: &[(&str, &[&str])] = &[
    ("iptables-save", &[]),
    ("ip6tables-save", &[]),
    ("ebtables-save", &[]),
    ("iptables-legacy-save", &[]),
    ("ebtables-legacy-save", &[]),
];

/// A queueing discipline, as `tc -json qdisc show` tells of it.
#[derive(Deserialize)]
struct Discipline {
    kind: String,
    #[serde(default)]
    handle: String,
}

/// An entry of the bridge's forwarding table, as `bridge -json fdb show` tells of it.
#[derive(Deserialize)]
struct Entry {
    mac: String,
    #[serde(default)]
    master: Option<String>,
    #[serde(default)]
    state: String,
}

/// Everything of this kind that the TAP has.
pub(super) fn rules(tap: &str, own: &str, bridge: &str) -> Vec<String> {
    let mut found = Vec::new();
    if let Some(said) = run_if_there("tc", &["-json", "qdisc", "show", "dev", tap]) {
        found.extend(disciplines(tap, &said));
    }
    if let Some(said) = run_if_there("bridge", &["-json", "fdb", "show", "brport", tap]) {
        found.extend(entries(tap, own, &said));
    }
    if let Some(said) = run_if_there("bridge", &["-json", "mdb", "show", "dev", bridge]) {
        found.extend(groups(tap, &said));
    }
    if let Some(said) = run_if_there("nft", &["-j", "list", "ruleset"]) {
        found.extend(nft(tap, &said));
    }
    for (program, arguments) in FIREWALLS {
        if let Some(said) = run_if_there(program, arguments) {
            found.extend(saved(tap, program, &said));
        }
    }
    found
}

/// Disciplines that somebody has chosen: the kernel's own have no handle.
fn disciplines(tap: &str, said: &str) -> Vec<String> {
    let all: Vec<Discipline> = understand(said).unwrap_or_default();
    let chosen = all.iter().filter(|one| one.handle != "0:" && !one.handle.is_empty());
    let words = |one: &Discipline| {
        let place = if matches!(one.kind.as_str(), "ingress" | "clsact") { &one.kind } else { "root" };
        let kind = &one.kind;
        format!(
            "its TAP {tap} has the traffic control {kind}, which is not carried over: tc qdisc del dev {tap} \
             {place}"
        )
    };
    // One that has classes has others below it.
    chosen.take(2).map(words).collect()
}

/// Addresses that somebody has tied to the port.
fn entries(tap: &str, own: &str, said: &str) -> Vec<String> {
    let all: Vec<Entry> = understand(said).unwrap_or_default();
    let tied = |entry: &&Entry| {
        entry.master.is_some() && matches!(entry.state.as_str(), "static" | "permanent") && entry.mac != own
    };
    let words = |entry: &Entry| {
        let mac = &entry.mac;
        format!(
            "the address {mac} is tied to its TAP {tap}, which is not carried over: bridge fdb del {mac} dev \
             {tap} master"
        )
    };
    all.iter().filter(tied).map(words).collect()
}

/// Multicast groups that somebody has tied to the port.
fn groups(tap: &str, said: &str) -> Vec<String> {
    let all: Vec<Value> = understand(said).unwrap_or_default();
    let entries = all.iter().filter_map(|one| one["mdb"].as_array()).flatten();
    let tied = entries.filter(|entry| entry["port"] == tap && entry["state"] == "permanent");
    let words = |entry: &Value| {
        let group = entry["grp"].as_str().unwrap_or("?");
        format!(
            "the multicast group {group} is tied to its TAP {tap}, which is not carried over (bridge mdb del)"
        )
    };
    tied.map(words).collect()
}

/// Rules, chains and sets of nftables that name the TAP.
fn nft(tap: &str, said: &str) -> Vec<String> {
    let Ok(all) = serde_json::from_str::<Value>(said) else { return Vec::new() };
    let items = all["nftables"].as_array().into_iter().flatten().filter_map(Value::as_object).flatten();
    let naming = items.filter(|(_, item)| names(tap, item));
    let words = |(kind, item): (&String, &Value)| {
        let text = |key: &str| item[key].as_str().unwrap_or_default().to_owned();
        let place = [text("family"), text("table"), text("chain") + &text("name")].join(" ");
        format!(
            "the nftables {kind} in {} names its TAP {tap}, and is not carried over: name the bridge's side \
             or the guest's addresses instead",
            place.trim()
        )
    };
    let mut found: Vec<_> = naming.map(words).collect();
    found.dedup();
    found
}

/// Whether any text in it is the TAP's name, or the beginning of it with an asterisk.
fn names(tap: &str, value: &Value) -> bool {
    match value {
        Value::String(text) => is_named(tap, text, '*'),
        Value::Array(items) => items.iter().any(|item| names(tap, item)),
        // What people call a table or a chain is no interface.
        Value::Object(fields) => fields.iter().any(|(key, item)| {
            !matches!(key.as_str(), "family" | "table" | "chain" | "name" | "comment") && names(tap, item)
        }),
        _ => false,
    }
}

/// Rules of the older firewalls that name the TAP.
fn saved(tap: &str, program: &str, said: &str) -> Vec<String> {
    let firewall = program.trim_end_matches("-save");
    let naming = said.lines().filter(|line| line.starts_with("-A"));
    let naming =
        naming.filter(|line| line.split_whitespace().any(|word| is_named(tap, word.trim_matches('"'), '+')));
    let words = |line: &str| {
        let line: String = line.chars().take(120).collect();
        format!(
            "the {firewall} rule {line:?} names its TAP {tap}, and is not carried over: name the bridge's \
             side or the guest's addresses instead"
        )
    };
    naming.map(words).collect()
}

fn is_named(tap: &str, word: &str, any: char) -> bool {
    match word.strip_suffix(any) {
        Some(stem) => !stem.is_empty() && tap.starts_with(stem),
        None => word == tap,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_made_for_a_tap_is_found_and_named() {
        let qdiscs =
            r#"[{"kind":"mq","handle":"0:","root":true},{"kind":"pfifo_fast","handle":"0:","parent":":1"}]"#;
        let shaped = r#"[{"kind":"tbf","handle":"8001:","root":true},{"kind":"ingress","handle":"ffff:"}]"#;
        let fdb = r#"[{"mac":"fe:00:00:00:00:01","master":"br0","state":"permanent"},
            {"mac":"52:54:00:00:00:07","master":"br0","state":""},
            {"mac":"52:54:00:00:00:01","master":"br0","state":"static"},
            {"mac":"33:33:00:00:00:01","flags":["self"],"state":"permanent"}]"#;
        let mdb = r#"[{"mdb":[{"dev":"br0","port":"t0","grp":"239.1.1.1","state":"permanent"},
            {"dev":"br0","port":"t0","grp":"239.1.1.2","state":"temp"}],"router":{}}]"#;
        let rule = |to: &str| {
            format!(
                r#"{{"nftables":[{{"metainfo":{{}}}},{{"table":{{"family":"bridge","name":"t0"}}}},
                {{"rule":{{"family":"bridge","table":"f","chain":"c",
                "expr":[{{"match":{{"op":"==","left":{{"meta":{{"key":"iifname"}}}},
                "right":{to}}}}}]}}}}]}}"#
            )
        };
        let save = "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -m physdev --physdev-in t+ -j DROP\n-A \
                    FORWARD -i t01\n";
        let cases = [
            (disciplines("t0", qdiscs), vec![]),
            (disciplines("t0", shaped), vec!["tbf", "ingress"]),
            (disciplines("t0", ""), vec![]),
            (entries("t0", "fe:00:00:00:00:01", fdb), vec!["52:54:00:00:00:01"]),
            (groups("t0", mdb), vec!["239.1.1.1"]),
            (nft("t0", &rule("\"t0\"")), vec!["rule in bridge f c"]),
            (nft("t0", &rule("{\"set\":[\"t1\",\"t*\"]}")), vec!["rule in bridge f c"]),
            (nft("t0", &rule("\"t01\"")), vec![]),
            (nft("t0", "?"), vec![]),
            (saved("t0", "iptables-save", save), vec!["iptables rule"]),
            (saved("x0", "iptables-save", save), vec![]),
        ];
        for (found, wanted) in cases {
            assert_eq!(found.len(), wanted.len(), "{found:?}");
            for (found, wanted) in found.iter().zip(wanted) {
                assert!(found.contains(wanted) && found.contains("t0"), "{found}");
            }
        }
    }
}
