//! The files of a VM, as its QEMU has them open.

use super::Vm;
use crate::{
    adopt, flush,
    held::{Held, mixed},
    recipe::{
        Role, SeenFile,
        files::{Identity, Opened},
    },
    sharing::{self, Shown},
};

impl Vm {
    /// Shows its files, as its QEMU has them open, to the target of a migration. Every reason why that cannot
    /// be.
    pub fn show_files(&mut self, from: &str, migration: &str) -> Result<Shown, Vec<String>> {
        let held = self.check()?;
        let left_out = flush::is_left_out(&mut self.qmp).map_err(|error| vec![error.to_string()])?;
        // What goes through the page cache only now is much at once, where a guest relies on writing
        // directly.
        if left_out || self.buffered {
            self.unflushed = flush::files(&self.recipe, &held)?;
        }
        let mut shown = sharing::show(&self.recipe, from, migration, &|file, write| {
            held.open(file.role.word(), &file.path, file.identity(), write)
        })?;
        adopt::secrets::read(&mut self.qmp, &self.process, &mut shown.recipe.secrets)?;
        Ok(shown)
    }

    /// Whether its files are still what its QEMU has open; every one that is not.
    pub fn check_files(&mut self) -> Result<(), Vec<String>> {
        self.check().map(drop)
    }

    fn check(&mut self) -> Result<Held, Vec<String>> {
        let held = self.held().map_err(|why| vec![why])?;
        let images = self.recipe.files.iter().filter(|file| file.role != Role::Boot);
        let open = |file: &SeenFile| held.open(file.role.word(), &file.path, file.identity(), false);
        let mut reasons: Vec<String> = images.filter_map(|file| open(file).err()).collect();
        if reasons.is_empty() {
            reasons = mixed::up(&mut self.qmp, &held).map_err(|error| vec![error.to_string()])?;
        }
        if reasons.is_empty() { Ok(held) } else { Err(reasons) }
    }

    /// Whether its QEMU has opened the files that were proven, and not what their names lead to since; and
    /// nothing but what was granted to it.
    pub fn uses(&self, opened: &[Opened]) -> Result<(), Vec<String>> {
        let held = self.held().map_err(|why| vec![why])?;
        let lacks = |file: &&Opened| file.role != Role::Boot && !held.has(file.identity);
        let mut reasons: Vec<String> = opened
            .iter()
            .filter(lacks)
            .map(|file| {
                format!("{} {} was replaced just now; try again", file.role.word(), file.path.display())
            })
            .collect();
        reasons.extend(self.opens_no_more().err().unwrap_or_default());
        if reasons.is_empty() { Ok(()) } else { Err(reasons) }
    }

    /// Whether a QEMU that was started to wait for this VM has opened nothing but what was granted to it;
    /// everything else that it has.
    pub fn opens_no_more(&self) -> Result<(), Vec<String>> {
        self.grants.as_ref().map_or(Ok(()), |grants| grants.check(&self.process))
    }

    /// Whether the names of its images still lead to the files that were proven.
    pub(super) fn check_names(&self) -> Result<(), String> {
        let known = self.recipe.files.iter().filter_map(|file| Some((file, file.identity()?)));
        for (file, identity) in known.filter(|(file, _)| file.role != Role::Boot) {
            if !Identity::at(&file.path).is_ok_and(|now| now == identity) {
                let (word, path) = (file.role.word(), file.path.display());
                return Err(format!(
                    "{word} {path} was renamed or replaced here while the VM was on its way; try again"
                ));
            }
        }
        Ok(())
    }

    fn held(&self) -> Result<Held, String> {
        Held::by(&self.process).map_err(|error| format!("cannot look which files its QEMU has open: {error}"))
    }
}
