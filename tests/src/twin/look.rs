//! What a VM looks like from outside: everything by which a moved one and its twin must be the same.

use super::{
    guest::{Words, address_of, words},
    vm::CHARDEV,
};
use crate::{Doing, Qmp, Result};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs::File,
    hash::{DefaultHasher, Hash, Hasher},
    os::unix::fs::FileExt,
};

/// A look at one VM: what was asked, and each line of the answer.
#[derive(Clone, Debug)]
pub(super) struct Look(BTreeMap<String, Vec<String>>);

/// A line in which two VMs differ.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    /// Where: what was asked.
    pub section: String,
    /// The line of the VM that was never moved.
    pub stayed: Option<String>,
    /// The line of the one that was.
    pub moved: Option<String>,
}

/// Answers for people that have no counterpart for programs. All of them together take 10 ms.
const FOR_PEOPLE: [&str; 9] = [
    "info qtree",
    "info mtree -f",
    "info ramblock",
    "info roms",
    "info network",
    "info pci",
    "info usb",
    "info memory_size_summary",
    "info registers",
];

/// What the guest says of itself.
pub(super) const SAID: &str = "the guest";

/// A guest that ends in one of these is stopped a few instructions sooner or later; one that was reset or
/// that QEMU's own migration has taken may have been in one of the others.
const STOPPED_ANYWHERE: [&str; 5] = ["guest-panicked", "postmigrate", "prelaunch", "shutdown", "suspended"];

/// What is plugged in, and what else was made.
const TREES: [&str; 3] = ["/machine/peripheral", "/machine/peripheral-anon", "/objects"];

/// Its parts come in the order of a hash table.
const UNORDERED: &str = "info mtree -f";

/// Its blocks come in the order in which they were made, and so does where each begins in QEMU's own count:
/// what was plugged in has come later than on the target, which has it from its start.
const BLOCKS: &str = "info ramblock";

/// How much of a file is allocated is its file system's business, and comes late.
const ALLOCATED: &str = ".image.actual-size";

/// Its nodes come in the order in which they were made: a target has them all at its start.
const NODES: &str = "query-named-block-nodes";

/// Monitors are among them, which are each host's own.
const PORTS: &str = "query-chardev";

/// Answers for programs.
const FOR_PROGRAMS: [&str; 14] = [
    "query-status",
    "query-block",
    "query-named-block-nodes",
    "query-block-jobs",
    "query-jobs",
    "query-cpus-fast",
    "query-memory-devices",
    "query-iothreads",
    "query-current-machine",
    "query-block-exports",
    PORTS,
    "query-rx-filter",
    "query-name",
    "query-uuid",
];

/// Guest memory that two guests have alike once they rest: where they start, and where they write; and the
/// firmware's ROM, which the next reset starts from. What is left out is the firmware's own: times, and what
/// it found on its stack.
const MEMORY: [(&str, u64, u64); 3] =
    [("RAM", 0x10000, 0x80000), ("high RAM", 0x100000, 0xe00000), ("firmware", 0xfffc_0000, 0x40000)];

impl Look {
    /// Looks at the VM behind this monitor.
    pub(super) fn at(qmp: &mut Qmp, pid: u32, plain: impl Fn(&str) -> String) -> Result<Self> {
        let mut all = BTreeMap::new();
        for path in TREES {
            let answer = qmp.execute("qom-list", json!({"path": path}))?;
            let mut lines = Vec::new();
            flatten("", &answer, &mut lines);
            all.insert(format!("qom-list {path}"), lines);
        }
        for command in FOR_PROGRAMS {
            let mut answer = qmp.execute(command, json!({}))?;
            if let Some(all) = answer.as_array_mut().filter(|_| command == PORTS) {
                all.retain(|one| one["label"] == CHARDEV);
            }
            let mut lines = Vec::new();
            match answer.as_array().filter(|_| command == NODES) {
                None => flatten("", &answer, &mut lines),
                Some(nodes) => lines = in_order(nodes, &plain),
            }
            lines.retain(|line| !line.contains(ALLOCATED));
            all.insert(command.to_owned(), lines);
        }
        for command in FOR_PEOPLE {
            let answer = qmp.human(command)?;
            let mut lines: Vec<_> = answer.lines().map(|line| line.trim_end().to_owned()).collect();
            if command == BLOCKS {
                lines.iter_mut().for_each(|line| *line = without_offset(line));
                lines.sort_unstable();
            }
            if command == UNORDERED {
                lines.retain(|line| !line.starts_with("FlatView"));
                lines.sort_unstable();
            }
            all.insert(command.to_owned(), lines);
        }
        let memory = File::open(format!("/proc/{pid}/mem")).doing("open QEMU's memory")?;
        let mut lines = Vec::new();
        for (name, at, size) in MEMORY {
            lines.push(format!("{name}: {:016x}", sum(qmp, &memory, at, size)?));
        }
        let said: Words = words(qmp)?;
        all.insert("memory".to_owned(), lines);
        all.insert(SAID.to_owned(), vec![format!("{said:?}")]);
        let mut look = Self(all);
        for lines in look.0.values_mut() {
            lines.iter_mut().for_each(|line| *line = plain(line));
        }
        if STOPPED_ANYWHERE.contains(&look.state().as_str()) {
            look.0.remove("info registers");
            look.0.remove(SAID);
        }
        Ok(look)
    }

    /// Its run state.
    pub(super) fn state(&self) -> String {
        let status = self.0.get("query-status").into_iter().flatten();
        let words = status.filter_map(|line| line.strip_prefix(".status = "));
        words.map(|word| word.trim_matches('"').to_owned()).collect()
    }

    /// In what the moved one differs from the one that stayed.
    pub(super) fn differences(&self, moved: &Self) -> Vec<Difference> {
        let mut all = Vec::new();
        for (section, ours) in &self.0 {
            let theirs = moved.0.get(section).map(Vec::as_slice).unwrap_or_default();
            differ(section, ours, theirs, &mut all);
        }
        all
    }
}

/// Line by line where both have as many lines, else by which lines only one of them has.
fn differ(section: &str, stayed: &[String], moved: &[String], all: &mut Vec<Difference>) {
    let mut add = |stayed: Option<&String>, moved: Option<&String>| {
        let section = section.to_owned();
        all.push(Difference { section, stayed: stayed.cloned(), moved: moved.cloned() });
    };
    if stayed.len() == moved.len() {
        let pairs = stayed.iter().zip(moved).filter(|(a, b)| a != b);
        return pairs.for_each(|(a, b)| add(Some(a), Some(b)));
    }
    let only = |these: &[String], others: &[String]| -> Vec<String> {
        let mut others = others.to_vec();
        let mut left = Vec::new();
        for line in these {
            match others.iter().position(|other| other == line) {
                Some(at) => drop(others.remove(at)),
                None => left.push(line.clone()),
            }
        }
        left
    };
    only(stayed, moved).iter().for_each(|line| add(Some(line), None));
    only(moved, stayed).iter().for_each(|line| add(None, Some(line)));
}

/// Items whose order means nothing, each as its lines.
fn in_order(items: &[Value], plain: impl Fn(&str) -> String) -> Vec<String> {
    let mut all: Vec<Vec<String>> = items
        .iter()
        .map(|item| {
            let mut lines = Vec::new();
            flatten("[]", item, &mut lines);
            lines.iter().map(|line| plain(line)).collect()
        })
        .collect();
    all.sort_unstable();
    all.concat()
}

/// A value as lines, each with the way to it.
fn flatten(way: &str, value: &Value, lines: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| flatten(&format!("{way}.{name}"), value, lines));
        }
        Value::Array(items) => {
            lines.push(format!("{way}[] = {}", items.len()));
            items.iter().for_each(|item| flatten(&format!("{way}[]"), item, lines));
        }
        value => lines.push(format!("{way} = {}", without_number(&value.to_string()))),
    }
}

/// `NAME  4 KiB  OFFSET USED TOTAL …` without where it begins.
fn without_offset(line: &str) -> String {
    let mut first = true;
    let words = line.split_whitespace().filter(|word| !word.starts_with("0x") || !std::mem::take(&mut first));
    words.collect::<Vec<_>>().join(" ")
}

/// A node's name that QEMU has made up ends in a number that nobody can rely on.
fn without_number(value: &str) -> String {
    match value.split_once("#block") {
        Some((before, after)) => {
            let rest = after.trim_start_matches(|c: char| c.is_ascii_digit());
            format!("{before}#block{rest}")
        }
        None => value.to_owned(),
    }
}

/// What is in the guest's memory there, read out of QEMU's: no file and no monitor's limit is in the way.
fn sum(qmp: &mut Qmp, memory: &File, at: u64, size: u64) -> Result<u64> {
    let address = address_of(qmp, at)?;
    let mut bytes = vec![0; size as usize];
    memory.read_exact_at(&mut bytes, address).doing(format!("read guest memory at {at:#x}"))?;
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_known_by_its_name_and_size() {
        assert_eq!(without_offset("   ram0    4 KiB  0x10 0x20 0x30 "), "ram0 4 KiB 0x20 0x30");
    }

    #[test]
    fn lines_differ_where_they_do() {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let mut found = Vec::new();
        differ("x", &lines("a\nb\nc"), &lines("a\nB\nc"), &mut found);
        differ("x", &lines("a\nb\nc"), &lines("a\nc"), &mut found);
        let shown: Vec<_> = found.iter().map(|d| (d.stayed.as_deref(), d.moved.as_deref())).collect();
        assert_eq!(shown, [(Some("b"), Some("B")), (Some("b"), None)]);
    }
}
