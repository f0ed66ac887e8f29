//! `[spool]`: the file on a datastore that memory goes by, too.

use api::Robust;
use serde::Deserialize;
use std::path::PathBuf;

/// The file that migrations from here use, unless a migration names another.
#[derive(Clone, Default, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Table {
    pub(super) directory: Option<PathBuf>,
    pub(super) robust: Option<Robust>,
}
