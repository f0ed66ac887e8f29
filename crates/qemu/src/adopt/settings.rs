//! What monitors set at run time: read back where QEMU can be asked for it, else told.

use crate::recipe::{Argument, LIMITS, Setting, is_id, options};
use serde_json::Value;

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Whether the command line limits this drive.
fn is_limited(arguments: &[Argument], drive: &str) -> bool {
    let limits = |argument: &&Argument| {
        let parsed = options::parse(argument.value.as_deref().unwrap_or_default(), "");
        let limits = |key: &str| key.starts_with("throttling.") || LIMITS.contains(&key);
        argument.option == "-drive"
            && options::get(&parsed, "id") == Some(drive)
            && parsed.iter().any(|(key, _)| limits(key))
    };
    arguments.iter().any(|argument| limits(&argument))
}

/// From `query-block` and `query-named-block-nodes`; by `arguments` the target's QEMU is started.
pub(super) fn read(drives: &Value, nodes: &Value, arguments: &[Argument]) -> Vec<Setting> {
    let mut found = Vec::new();
    for drive in list(drives) {
        let inserted = &drive["inserted"];
        let limit =
            |name: &&str| Some(((*name).to_owned(), inserted[*name].as_u64().filter(|limit| *limit > 0)?));
        let limits: std::collections::BTreeMap<_, _> = LIMITS.iter().filter_map(limit).collect();
        // Lengths and sizes limit nothing by themselves.
        let limited = limits.keys().any(|name| !name.ends_with("length") && name != "iops_size");
        let (drive, device) = (text(&drive["device"]), text(&drive["qdev"]));
        // One whose limits were taken away must be told so.
        if limited || (inserted.is_object() && is_limited(arguments, &drive)) {
            let group = inserted["group"].as_str().map(str::to_owned);
            found.push(Setting::Throttle { drive, device, group, limits });
        }
    }
    for node in list(nodes) {
        let (name, bytes) = (text(&node["node-name"]), node["write_threshold"].as_u64().unwrap_or(0));
        if bytes > 0 && is_id(&name) {
            found.push(Setting::WriteThreshold { node: name, bytes });
        }
    }
    found
}

/// What cannot be carried over, in words.
pub(super) fn lost(nodes: &Value) -> Vec<String> {
    let mut notes = Vec::new();
    for node in list(nodes) {
        let name = text(&node["node-name"]);
        let lost = |bitmap: &&Value| bitmap["persistent"] != true && bitmap["name"].is_string();
        for bitmap in list(&node["dirty-bitmaps"]).filter(lost) {
            notes.push(format!(
                "dirty bitmap {} of node {name} stays behind, because it is not persistent: the next backup \
                 must be a full one",
                text(&bitmap["name"])
            ));
        }
        if node["write_threshold"].as_u64().is_some_and(|bytes| bytes > 0) && !is_id(&name) {
            notes.push(format!(
                "the write threshold of {} stays behind: its node has no name of its own",
                text(&node["file"])
            ));
        }
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_a_monitor_set_is_read_back_or_told() {
        let drives = json!([
            { "device": "", "qdev": "blk0",
                "inserted": { "bps": 5, "iops": 0, "bps_max_length": 1, "group": "g" } },
            { "device": "disk1", "qdev": "blk1", "inserted": { "bps": 0, "iops_max_length": 1 } },
            { "device": "cd0", "qdev": "cd" },
        ]);
        let bitmap = |name: &str, persistent: bool| json!({ "name": name, "persistent": persistent });
        let nodes = json!([
            { "node-name": "d0", "write_threshold": 9,
                "dirty-bitmaps": [bitmap("kept", true), bitmap("gone", false)] },
            { "node-name": "#block1", "file": "/d", "write_threshold": 9 },
        ]);
        for limit in ["throttling.bps-total=5", "bps=5", "iops_wr_max=5"] {
            let freed = Argument::new("-drive", format!("if=none,id=disk1,{limit}"));
            assert_eq!(read(&drives, &nodes, &[freed]).len(), 3, "the limits that were taken away, too");
        }
        let found = read(&drives, &nodes, &[]);
        let commands: Vec<_> =
            found.iter().filter_map(Setting::command).map(|(command, _)| command).collect();
        assert_eq!(commands, ["block_set_io_throttle", "block-set-write-threshold"], "{found:?}");
        assert!(found.iter().all(|setting| setting.check().is_ok()), "{found:?}");
        let told = lost(&nodes);
        assert!(told.len() == 2 && told[0].contains("gone") && told[1].contains("/d"), "{told:?}");
    }
}
