//! `[tls]`: this host's certificate and key.

use super::TLS;
use pki::Files;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// Where this host's certificate and key are.
#[derive(Clone, Default, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Table {
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl Table {
    /// All three of them, the usual ones below. A flag that names a directory wins over whatever is named
    /// here.
    pub(super) fn files(self, flag: Option<&Path>) -> Files {
        let named = if flag.is_some() { Self::default() } else { self };
        let usual = Files::within(flag.unwrap_or(Path::new(TLS)));
        Files {
            ca: named.ca.unwrap_or(usual.ca),
            cert: named.cert.unwrap_or(usual.cert),
            key: named.key.unwrap_or(usual.key),
        }
    }
}
