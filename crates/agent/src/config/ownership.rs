//! `[ownership]`: where hosts ask who owns a VM.

use super::ConfigError;
use serde::Deserialize;
use std::path::PathBuf;

/// Where the record is that says who owns a VM.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub enum OwnershipPlace {
    /// The target of each migration keeps it.
    #[default]
    Target,
    /// A directory that all hosts share.
    Directory(PathBuf),
    /// An etcd cluster with these end points.
    Etcd(Vec<String>),
}

#[derive(Clone, Default, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Table {
    directory: Option<PathBuf>,
    etcd: Option<Vec<String>>,
}

impl Table {
    /// The one place that it names.
    pub(super) fn place(self) -> Result<OwnershipPlace, ConfigError> {
        let wrong = |why: &str| Err(ConfigError::Flag(format!("[ownership] {why}")));
        match (self.directory, self.etcd) {
            (None, None) => Ok(OwnershipPlace::Target),
            (Some(_), Some(_)) => wrong("names a directory and etcd; one record decides"),
            (Some(directory), None) if directory.is_absolute() => Ok(OwnershipPlace::Directory(directory)),
            (Some(_), None) => wrong("directory must be an absolute path"),
            (None, Some(etcd)) if etcd.is_empty() => wrong("etcd must name at least one end point"),
            (None, Some(etcd)) => match etcd.iter().find(|end| !end.starts_with("http://")) {
                None => Ok(OwnershipPlace::Etcd(etcd)),
                Some(end) => {
                    wrong(&format!("etcd end point {end:?} must be http://HOST:PORT; https is not supported"))
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, tests::load};

    #[test]
    fn one_record_says_who_owns_a_vm() {
        let place = |text: &str| load(text, Flags::default()).map(|config| config.ownership);
        assert_eq!(place("").unwrap(), OwnershipPlace::Target);
        let directory = OwnershipPlace::Directory("/shared/w".into());
        assert_eq!(place("[ownership]\ndirectory = \"/shared/w\"\n").unwrap(), directory);
        let etcd = OwnershipPlace::Etcd(vec!["http://10.0.0.9:2379".into()]);
        assert_eq!(place("[ownership]\netcd = [\"http://10.0.0.9:2379\"]\n").unwrap(), etcd);
        for (bad, says) in [
            ("directory = \"/a\"\netcd = [\"http://b\"]", "one record"),
            ("directory = \"a\"", "absolute"),
            ("etcd = []", "at least one"),
            ("etcd = [\"https://b\"]", "not supported"),
        ] {
            let error = place(&format!("[ownership]\n{bad}\n")).unwrap_err().to_string();
            assert!(error.contains(says), "{bad}: {error}");
        }
    }
}
