//! Files of a VM that comes from another host: opened, granted, and proven to be the source's.

use crate::{
    host::Host,
    limits::Limits,
    recipe::{Recipe, Role, SeenFile, backing_of, files::Opened, flash},
    sharing,
};
use std::{
    collections::{BTreeSet, HashSet},
    fs::{self, DirBuilder, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Opens them; adds to `reasons` what is not granted, and what is not shown to be the source's. A host that
/// has shown nothing is told the same whether a file is there or not, and whatever is in it; the log of this
/// host has what was found.
pub(crate) fn files(
    recipe: &Recipe,
    limits: &Limits,
    from: &str,
    migration: &str,
    reasons: &mut Vec<String>,
) -> Vec<Opened> {
    let (only_read, stores) = (recipe.only_read(), own_stores(recipe));
    let mut all = Vec::new();
    let mut seen = HashSet::new();
    for file in recipe.files.iter().filter(|file| seen.insert((&file.path, file.role))) {
        let is_store = file.role == Role::Disk && stores.contains(&*file.path.to_string_lossy());
        let read_only = file.role != Role::Disk || only_read.contains(&*file.path.to_string_lossy());
        if let Err(why) = limits.check_name(&file.path, file.role, read_only) {
            if !is_store {
                reasons.push(why);
            }
            continue;
        }
        let proven = Opened::open(&file.path, file.role, read_only).and_then(|opened| {
            limits.check_opened(&opened, read_only)?;
            sharing::prove(recipe, from, migration, file, &opened)?;
            Ok(opened)
        });
        match proven {
            Ok(opened) => all.push(opened),
            // It gets one of its own.
            Err(why) if is_store => tracing::debug!(vm = recipe.name, why, "a variable store is not shared"),
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
    limits.check_name(&next, Role::Backing, true)?;
    if recipe.files.iter().any(|file| file.role == Role::Backing && file.path == next) {
        return Ok(());
    }
    let (word, path, next) = (image.role.word(), image.path.display(), next.display());
    Err(format!(
        "{word} {path} has {next} behind it here, and not at the source; use the same chain on both hosts"
    ))
}

/// The most that a PC has: one of its two units of flash has the code.
const MOST_STORES: usize = 2;

/// The variable stores that can be a file of this host's own: small, and made of whole pages.
fn own_stores(recipe: &Recipe) -> BTreeSet<String> {
    let stores = flash::stores(recipe);
    let fits = |file: &SeenFile| (1..=flash::LARGEST).contains(&file.bytes);
    let files = recipe.files.iter().filter(|file| file.role == Role::Disk && fits(file));
    files
        .map(|file| file.path.to_string_lossy().into_owned())
        .filter(|path| stores.contains(path))
        .take(MOST_STORES)
        .collect()
}

/// Makes a file of this host's own for each variable store that is not shared with the source, and has the
/// recipe name it. QEMU fills it from its memory when the guest runs. It stays when the VM goes, as the
/// source's does: a VM that is started anew finds its variables. Only for a VM of whose name there is none
/// here.
pub fn make_stores(recipe: &mut Recipe, opened: &mut Vec<Opened>, host: &Host) -> Result<(), String> {
    for (number, store) in own_stores(recipe).into_iter().enumerate() {
        let store = PathBuf::from(store);
        if opened.iter().any(|file| file.path == store) {
            continue;
        }
        let bytes = recipe.files.iter().find(|file| file.path == store).map_or(0, |file| file.bytes);
        let path = host.stores().join(format!("{}-{number}.fd", recipe.name));
        make(&path, bytes).map_err(|error| format!("make the variable store {}: {error}", path.display()))?;
        flash::rename(recipe, &store, &path);
        opened.push(Opened::open(&path, Role::Disk, false)?);
        tracing::info!(vm = recipe.name, store = %path.display(), "a variable store of this host's own");
    }
    Ok(())
}

/// An empty file under this name. One that was there is another file then, whoever still has it open.
fn make(path: &Path, bytes: u64) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let new = path.with_extension("new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.set_len(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)
}

/// The recipe as it is kept on this host, which has these files.
pub fn settle(mut recipe: Recipe, opened: &[Opened]) -> Recipe {
    (recipe.proof, recipe.kvm_speed, recipe.allow_older_qemu) = (None, None, false);
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
            "put it, by this path on both hosts, on a file system that they share and that has locks (NFS \
             without nolock, CephFS, OCFS2)",
        ),
    };
    format!(
        "{word} {path} is not shown to be the file {what}: {remedy}; the log of this host says what it found"
    )
}
