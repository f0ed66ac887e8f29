//! Files of a VM that comes from another host: opened, granted, and proven to be the source's.

use crate::{
    limits::Limits,
    recipe::{Recipe, Role, SeenFile, backing_of, files::Opened},
    sharing,
};
use std::collections::HashSet;

/// Opens them; adds to `reasons` what is not granted, and what is not shown to be the source's. A host that has shown nothing
/// is told the same whether a file is there or not, and whatever is in it; the log of this host has what was found.
pub(crate) fn files(
    recipe: &Recipe,
    limits: &Limits,
    from: &str,
    migration: &str,
    reasons: &mut Vec<String>,
) -> Vec<Opened> {
    let only_read = recipe.only_read();
    let mut all = Vec::new();
    let mut seen = HashSet::new();
    for file in recipe.files.iter().filter(|file| seen.insert((&file.path, file.role))) {
        if let Err(why) = limits.check_name(&file.path, file.role) {
            reasons.push(why);
            continue;
        }
        let read_only = file.role != Role::Disk || only_read.contains(&*file.path.to_string_lossy());
        let proven = Opened::open(&file.path, file.role, read_only).and_then(|opened| {
            limits.check_opened(&opened)?;
            sharing::prove(recipe, from, migration, file, &opened)?;
            Ok(opened)
        });
        match proven {
            Ok(opened) => all.push(opened),
            Err(why) => {
                let path = file.path.display();
                tracing::warn!(vm = recipe.name, from, %path, why, "a file is not shown to be the source's");
                reasons.push(not_shown(file, read_only));
            }
        }
    }
    for image in all.iter().filter(|opened| opened.role != Role::Boot) {
        if let Err(why) = behind(image, recipe, limits) {
            reasons.push(why);
        }
    }
    all
}

/// What an image itself says is behind it, not what its sender says of it: that was looked at, too.
fn behind(image: &Opened, recipe: &Recipe, limits: &Limits) -> Result<(), String> {
    let Some(next) = backing_of(&image.file, &image.path)? else { return Ok(()) };
    limits.check_name(&next, Role::Backing)?;
    if recipe.files.iter().any(|file| file.role == Role::Backing && file.path == next) {
        return Ok(());
    }
    let (word, path, next) = (image.role.word(), image.path.display(), next.display());
    Err(format!(
        "{word} {path} has {next} behind it here, and not at the source; use the same chain on both hosts"
    ))
}

/// The recipe as it is kept on this host, which has these files.
pub fn settle(mut recipe: Recipe, opened: &[Opened]) -> Recipe {
    (recipe.proof, recipe.kvm_speed) = (None, None);
    for file in &mut recipe.files {
        // Sealed for this migration only.
        file.digest = None;
        let Some(here) = opened.iter().find(|here| here.path == file.path && here.role == file.role) else {
            continue;
        };
        (file.device, file.inode) = (here.identity.device, here.identity.inode);
        if file.role == Role::Boot {
            // Known already: it was compared.
            file.digest = sharing::content_of(&here.file).ok();
        }
    }
    recipe
}

fn not_shown(file: &SeenFile, read_only: bool) -> String {
    let (word, path) = (file.role.word(), file.path.display());
    let (what, remedy) = match file.role {
        Role::Boot => ("with the source's content", "copy it to this path"),
        Role::Disk if read_only => {
            ("with the source's content", "share it, or copy it to this path; it must be readable there")
        }
        Role::Disk | Role::Backing => (
            "that the source uses",
            "put it, by this path on both hosts, on a file system that they share and that has locks (NFS without nolock, \
             CephFS, OCFS2)",
        ),
    };
    format!(
        "{word} {path} is not shown to be the file {what}: {remedy}; the log of this host says what it found"
    )
}
