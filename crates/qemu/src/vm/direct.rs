//! Disks that QEMU reads directly (`cache=none`, `cache.direct=on`).
//!
//! A direct read pins the guest's pages when it is submitted, and its data lands there later, through no page
//! table: no tracker sees it. While a VM is moved its disks go through the page cache: QEMU opens them anew
//! without `O_DIRECT`, which takes a millisecond and waits for what is in flight, and from then on copies to
//! the guest's memory as anybody does. `aio=native` and `aio=io_uring` work on such files, too. Only the node
//! that opens the file is changed: what lies above keeps its options. File systems that two hosts share keep
//! their page caches coherent; block devices are not moved at all.

use super::Vm;
use crate::{qmp::Qmp, recipe::is_id};
use serde_json::{Value, json};
use std::{collections::BTreeMap, time::Duration};

/// How long one file may take: QEMU waits for what the guest has asked of it. Its monitor is not answered
/// meanwhile.
const REOPEN: Duration = Duration::from_secs(30);

/// The nodes that open files, each with whether it does so directly.
fn nodes(qmp: &mut Qmp) -> Result<BTreeMap<String, bool>, String> {
    let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true }));
    let nodes = nodes.map_err(|error| error.to_string())?;
    let files = nodes.as_array().into_iter().flatten().filter(|node| node["drv"] == "file");
    let look = |node: &Value| Some((node["node-name"].as_str()?.to_owned(), node["cache"]["direct"] == true));
    Ok(files.filter_map(look).collect())
}

/// Has QEMU open the file of a node anew.
fn reopen(qmp: &mut Qmp, node: &str, direct: bool) -> Result<(), String> {
    if !is_id(node.strip_prefix('#').unwrap_or(node)) {
        return Err(format!("block node {node:?} has no name that QEMU's monitor takes"));
    }
    // `blockdev-reopen` wants every option anew, and does not take nodes that QEMU has named itself.
    let word = if direct { "on" } else { "off" };
    let line = format!("qemu-io {node} \"reopen -o cache.direct={word}\"");
    let asked = json!({ "command-line": line });
    let said =
        qmp.execute_within("human-monitor-command", asked, REOPEN).map_err(|error| error.to_string())?;
    match said.as_str().map(str::trim) {
        Some("") => Ok(()),
        said => Err(format!("block node {node}: {}", said.unwrap_or("QEMU does not say whether it did"))),
    }
}

impl Vm {
    /// The block nodes that read their files directly. They must not while it is moved: see [`Self::buffer`].
    pub fn reads_directly(&mut self) -> Result<Vec<String>, String> {
        let direct = nodes(&mut self.qmp)?.into_iter().filter(|(_, direct)| *direct);
        Ok(direct.map(|(node, _)| node).collect())
    }

    /// Has these nodes use the page cache until [`Self::read_directly`]. Before anything watches its memory:
    /// what is in flight lands before this returns. If that cannot be, they are as they were.
    pub fn buffer(&mut self, names: &[String]) -> Result<(), String> {
        let buffered = (|| {
            names.iter().try_for_each(|node| reopen(&mut self.qmp, node, false))?;
            match self.reads_directly()?.first() {
                None => {
                    self.buffered = !names.is_empty();
                    Ok(())
                }
                Some(left) => Err(format!("block node {left} still reads its file directly")),
            }
        })();
        buffered.map_err(|why| {
            let back = self.read_directly(names).err().map_or(String::new(), |why| {
                format!(
                    "; and back: \
                                                                                            {why}"
                )
            });
            format!(
                "a disk is read directly (cache=none), and could not be opened anew for the migration: \
                 {why}{back}; start the VM with cache=writeback"
            )
        })
    }

    /// Has these nodes read their files directly again, those that are still there.
    pub fn read_directly(&mut self, names: &[String]) -> Result<(), String> {
        if names.is_empty() {
            return Ok(());
        }
        let there = nodes(&mut self.qmp)?;
        let buffered = names.iter().filter(|node| there.get(*node) == Some(&false));
        let mut wrong = buffered.filter_map(|node| reopen(&mut self.qmp, node, true).err());
        wrong.next().map_or(Ok(()), Err)
    }
}
