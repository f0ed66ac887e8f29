//! Images of one VM that have changed names before anybody looked: each name leads to a file that QEMU has
//! open, but to another one.
//!
//! QEMU does not tell which descriptor a node has. It tells how much of the node's file is allocated, by that
//! descriptor; so a name whose file has another size on the disk is the wrong one. Images that look alike in
//! this, too, cannot be told apart.

use super::Held;
use crate::{
    qmp::{Qmp, QmpError},
    recipe::{Role, files::Identity},
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, fs, os::unix::fs::MetadataExt, path::Path};

/// So often it is asked, where a guest writes meanwhile: a file only grows between two looks, but for what
/// the guest discards.
const TRIES: usize = 3;

/// What `st_blocks` counts in (`stat(2)`).
const UNIT: u64 = 512;

/// Every disk whose name leads to another file than the one that its node has open.
pub(crate) fn up(qmp: &mut Qmp, held: &Held) -> Result<Vec<String>, QmpError> {
    let mut reasons = Vec::new();
    for _ in 0..TRIES {
        let before = held.allocated();
        let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true }))?;
        let after = held.allocated();
        let nodes = nodes.as_array().map(Vec::as_slice).unwrap_or_default();
        reasons = nodes.iter().filter_map(|node| wrong(node, held, &before, &after)).collect();
        if reasons.is_empty() {
            break;
        }
    }
    Ok(reasons)
}

fn wrong(
    node: &Value,
    held: &Held,
    before: &BTreeMap<Identity, u64>,
    after: &BTreeMap<Identity, u64>,
) -> Option<String> {
    let name = node["file"].as_str().filter(|_| node["drv"] == "file")?;
    let told = node["image"]["actual-size"].as_u64()?;
    // What leads nowhere is told of elsewhere.
    let path = held.find(Role::Disk.word(), Path::new(name)).ok()?;
    let id = Identity::at(&path).ok()?;
    let (one, other) = (*before.get(&id)?, *after.get(&id)?);
    if (one.min(other)..=one.max(other)).contains(&told) {
        return None;
    }
    Some(format!(
        "disk {name} is not the file that QEMU has open by this name ({told} bytes of that are allocated, \
         {other} of this): they were renamed; give the images of this VM their names back"
    ))
}

impl Held {
    /// How many bytes of each file are on its disk.
    fn allocated(&self) -> BTreeMap<Identity, u64> {
        let look = |(id, file): (&Identity, &super::HeldFile)| {
            let metadata = fs::metadata(self.process.join("fd").join(&file.number)).ok()?;
            (Identity::of(&metadata) == *id).then(|| (*id, metadata.blocks() * UNIT))
        };
        self.files.iter().filter_map(look).collect()
    }
}
