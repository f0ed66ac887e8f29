//! What the guest sees of its machine just now, and taking what was plugged in into use.

use std::{fs, path::Path};

/// The vCPUs in use, all memory, and what is plugged in where.
pub(crate) fn json() -> String {
    let quoted = |names: Vec<String>| {
        let names: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
        format!("[{}]", names.join(","))
    };
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB"));
    let mib = kib.and_then(|kib| kib.trim().parse::<u64>().ok()).unwrap_or(0) >> 10;
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    let mut ports: Vec<String> = list("/sys/class/virtio-ports")
        .iter()
        .filter_map(|port| fs::read_to_string(format!("/sys/class/virtio-ports/{port}/name")).ok())
        .map(|name| name.trim().to_owned())
        .collect();
    ports.sort();
    format!(
        "{{\"cpus\":{},\"memory_mib\":{mib},\"pci\":{},\"disks\":{},\"cards\":{},\"ports\":{}}}",
        count(online.trim()),
        quoted(list("/sys/bus/pci/devices")),
        quoted(list("/sys/block")),
        quoted(list("/sys/class/net")),
        quoted(ports),
    )
}

/// Takes every vCPU and every piece of memory into use.
pub(crate) fn online() -> String {
    let mut wrong = Vec::new();
    for (folder, stem, file, word) in [
        ("/sys/devices/system/cpu", "cpu", "online", "1"),
        // Such as can be given back.
        ("/sys/devices/system/memory", "memory", "state", "online_movable"),
    ] {
        for name in list(folder) {
            let place = format!("{folder}/{name}/{file}");
            let number = name.strip_prefix(stem).is_some_and(|rest| rest.parse::<u32>().is_ok());
            // The first vCPU has no switch.
            if !number || !Path::new(&place).exists() {
                continue;
            }
            let is_off = || matches!(fs::read_to_string(&place).unwrap_or_default().trim(), "0" | "offline");
            // Linux may do it by itself just then.
            if is_off()
                && let Err(error) = fs::write(&place, word)
                && is_off()
            {
                wrong.push(format!("{place}: {error}"));
            }
        }
    }
    if wrong.is_empty() { "ok".to_owned() } else { format!("error {}", wrong.join("; ")) }
}

/// The names in a folder.
fn list(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// How many numbers are in a list such as `0-2,5`.
fn count(list: &str) -> u32 {
    let number = |text: &str| text.parse::<u32>().unwrap_or(0);
    let ranges = list.split(',').filter(|range| !range.is_empty());
    let count = |range: &str| match range.split_once('-') {
        Some((from, to)) => number(to).saturating_sub(number(from)) + 1,
        None => 1,
    };
    ranges.map(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_are_counted_as_linux_lists_them() {
        assert_eq!((count("0"), count("0-3"), count("0-1,4"), count("")), (1, 4, 3, 0));
    }
}
