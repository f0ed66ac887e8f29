//! `[ownership]`: where hosts ask who owns a VM.

use super::ConfigError;
use pki::ClientFiles;
use serde::Deserialize;
use std::{net::IpAddr, path::PathBuf};

/// Where the record is that says who owns a VM.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub enum OwnershipPlace {
    /// The target of each migration keeps it.
    #[default]
    Target,
    /// A directory that all hosts share.
    Directory(PathBuf),
    /// An etcd cluster.
    Etcd(EtcdPlace),
}

/// How an etcd cluster is asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EtcdPlace {
    /// `https://HOST:PORT` each, or `http://HOST:PORT` without TLS.
    pub endpoints: Vec<String>,
    /// With what it is asked by `https`.
    pub tls: Option<ClientFiles>,
}

#[derive(Clone, Default, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Table {
    directory: Option<PathBuf>,
    etcd: Option<Vec<String>>,
    etcd_ca: Option<PathBuf>,
    etcd_cert: Option<PathBuf>,
    etcd_key: Option<PathBuf>,
}

impl Table {
    /// The one place that it names. Who may speak in plaintext to other hosts may do so to etcd.
    pub(super) fn place(self, plaintext: bool) -> Result<OwnershipPlace, ConfigError> {
        let wrong = |why: &str| Err(ConfigError::Flag(format!("[ownership] {why}")));
        let files = [&self.etcd_ca, &self.etcd_cert, &self.etcd_key];
        if files.into_iter().flatten().any(|path| !path.is_absolute()) {
            return wrong("etcd-ca, etcd-cert and etcd-key must be absolute paths");
        }
        let secure = self.etcd.iter().flatten().any(|end| end.starts_with("https://"));
        if !secure && files.into_iter().any(Option::is_some) {
            return wrong("names files for TLS: write the end points of etcd as https://HOST:PORT");
        }
        let tls = match (self.etcd_ca, self.etcd_cert, self.etcd_key) {
            (Some(ca), None, None) => Some(ClientFiles { ca, client: None }),
            (Some(ca), Some(cert), Some(key)) => Some(ClientFiles { ca, client: Some((cert, key)) }),
            (None, None, None) if !secure => None,
            (None, ..) => return wrong("lacks etcd-ca, the certificate of whoever vouches for the cluster"),
            _ => return wrong("etcd-cert and etcd-key belong together"),
        };
        match (self.directory, self.etcd) {
            (None, None) => Ok(OwnershipPlace::Target),
            (Some(_), Some(_)) => wrong("names a directory and etcd; one record decides"),
            (Some(directory), None) if directory.is_absolute() => Ok(OwnershipPlace::Directory(directory)),
            (Some(_), None) => wrong("directory must be an absolute path"),
            (None, Some(etcd)) if etcd.is_empty() => wrong("etcd must name at least one end point"),
            (None, Some(endpoints)) => {
                let scheme = if secure { "https://" } else { "http://" };
                if let Some(end) = endpoints.iter().find(|end| !end.starts_with(scheme)) {
                    return wrong(&format!(
                        "etcd end point {end:?} must be {scheme}HOST:PORT, as the others"
                    ));
                }
                if let Some(end) = endpoints.iter().find(|end| !secure && !plaintext && !is_loopback(end)) {
                    return wrong(&format!(
                        "etcd end point {end:?} would be asked in plaintext, and whoever hears or changes \
                         that can take VMs: write https://HOST:PORT, and name etcd-ca"
                    ));
                }
                Ok(OwnershipPlace::Etcd(EtcdPlace { endpoints, tls }))
            }
        }
    }
}

/// Whether an end point is on this host: nobody hears what is said to it.
fn is_loopback(end: &str) -> bool {
    let rest = end.strip_prefix("http://").unwrap_or(end).trim_end_matches('/');
    let host = rest.rsplit_once(':').map_or(rest, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
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
        let etcd = |end: &str, tls| OwnershipPlace::Etcd(EtcdPlace { endpoints: vec![end.into()], tls });
        let files = |client| Some(ClientFiles { ca: "/e/ca".into(), client });
        let both = Some(("/e/c".into(), "/e/k".into()));
        let with = "etcd-ca = \"/e/ca\"";
        let rows = [
            ("etcd = [\"http://127.0.0.1:2379\"]".to_owned(), etcd("http://127.0.0.1:2379", None)),
            ("etcd = [\"http://[::1]:2379/\"]".to_owned(), etcd("http://[::1]:2379/", None)),
            (format!("etcd = [\"https://e:2379\"]\n{with}"), etcd("https://e:2379", files(None))),
            (
                format!("etcd = [\"https://e:2379\"]\n{with}\netcd-cert = \"/e/c\"\netcd-key = \"/e/k\""),
                etcd("https://e:2379", files(both)),
            ),
        ];
        for (text, found) in rows {
            assert_eq!(place(&format!("[ownership]\n{text}\n")).unwrap(), found, "{text}");
        }
        let open = "insecure-plaintext = true\n[ownership]\netcd = [\"http://10.0.0.9:2379\"]\n";
        assert_eq!(place(open).unwrap(), etcd("http://10.0.0.9:2379", None));
        for (bad, says) in [
            ("directory = \"/a\"\netcd = [\"http://b\"]", "one record"),
            ("directory = \"a\"", "absolute"),
            ("etcd = []", "at least one"),
            ("etcd = [\"http://10.0.0.9:2379\"]", "in plaintext"),
            ("etcd = [\"https://b\"]", "lacks etcd-ca"),
            ("etcd = [\"https://b\", \"http://c\"]\netcd-ca = \"/a\"", "as the others"),
            ("etcd = [\"https://b\"]\netcd-ca = \"/a\"\netcd-key = \"/k\"", "belong together"),
            ("etcd = [\"https://b\"]\netcd-ca = \"a\"", "absolute"),
            ("etcd = [\"http://localhost:1\"]\netcd-ca = \"/a\"", "files for TLS"),
        ] {
            let error = place(&format!("[ownership]\n{bad}\n")).unwrap_err().to_string();
            assert!(error.contains(says), "{bad}: {error}");
        }
    }
}
