//! Disks whose flushes QEMU leaves out (`cache=unsafe`, `cache.no-flush=on`). The guest does not care whether
//! what it wrote is on the disk or in this host's memory; the host that it moves to does. So it is flushed
//! from outside, by descriptors of our own.

use crate::{
    held::Held,
    qmp::{Qmp, QmpError},
    recipe::{Recipe, Role},
};
use serde_json::json;
use std::{fs::File, io};

/// Whether this QEMU leaves out any.
pub(crate) fn is_left_out(qmp: &mut Qmp) -> Result<bool, QmpError> {
    let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true }))?;
    Ok(nodes.as_array().into_iter().flatten().any(|node| node["cache"]["no-flush"] == true))
}

/// The files that its guest writes, as it has them open.
pub(crate) fn files(recipe: &Recipe, held: &Held) -> Result<Vec<File>, Vec<String>> {
    let only_read = recipe.only_read();
    let disks = recipe
        .files
        .iter()
        .filter(|file| file.role == Role::Disk && !only_read.contains(&*file.path.to_string_lossy()));
    let (mut files, mut reasons) = (Vec::new(), Vec::new());
    for file in disks {
        match held.open(file.role.word(), &file.path, file.identity(), false) {
            Ok(opened) => files.push(opened),
            Err(why) => reasons.push(why),
        }
    }
    if reasons.is_empty() { Ok(files) } else { Err(reasons) }
}

/// Returns once all that was written to them is on the disk.
pub(crate) fn all(files: &[File]) -> io::Result<()> {
    files.iter().try_for_each(File::sync_data)
}
