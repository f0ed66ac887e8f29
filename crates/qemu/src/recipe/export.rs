//! Disks that a server on the network has (NBD).
//!
//! Both hosts connect to the same address. That it means the same server to both is for who grants it to say (`[allow] servers`): NBD
//! has no locks and no names of servers by which that could be shown. What can be compared is: the export's name, and its size.

use super::{
    check::{is_host, shown},
    options::get,
};
use serde::{Deserialize, Serialize};

/// Where NBD servers listen if nothing else is said.
const USUAL_PORT: u16 = 10809;

/// The longest name of an export that is taken. NBD allows 4096 bytes.
const LONGEST_NAME: usize = 255;

/// An export.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// The server, by its name or IPv4 address.
    pub host: String,
    /// The port it listens at.
    pub port: u16,
    /// What it calls the disk; may be empty.
    pub name: String,
    /// How large the disk is.
    pub bytes: u64,
}

impl Export {
    /// By QEMU's word for the file of a node, `nbd://HOST:PORT/NAME`; says why it cannot be used elsewhere.
    pub(crate) fn read(file: &str, bytes: u64) -> Result<Self, String> {
        if file.starts_with("nbd+unix:") {
            return Err("its NBD server is reached by a socket of this host; have it listen on the network, and start \
                        the VM with nbd://HOST:PORT/NAME"
                .to_owned());
        }
        if file.contains("tls-creds") {
            return Err("its NBD server is reached with TLS credentials of this host, which are not carried over; start \
                        the VM without tls-creds, on a network of its own"
                .to_owned());
        }
        let not =
            || "its NBD server is not called nbd://HOST:PORT/NAME, with an IPv4 address or a name".to_owned();
        let rest = file.strip_prefix("nbd://").ok_or_else(not)?;
        let (server, name) = rest.split_once('/').unwrap_or((rest, ""));
        let (host, port) = match server.split_once(':') {
            Some((host, port)) => (host, port.parse().map_err(|_| not())?),
            None => (server, USUAL_PORT),
        };
        let export = Self { host: host.to_owned(), port, name: name.to_owned(), bytes };
        export.check().map(|()| export)
    }

    /// Whether it is well formed; says why not.
    pub(crate) fn check(&self) -> Result<(), String> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte);
        if !is_host(&self.host) || self.port == 0 {
            return Err(format!("{:?} is no name or IPv4 address of a server", shown(&self.host)));
        }
        if self.name.len() > LONGEST_NAME || !self.name.bytes().all(plain) {
            return Err(format!(
                "the name of the export {:?} is not made of letters, digits, '-', '_', '.' and '/'",
                shown(&self.name)
            ));
        }
        Ok(())
    }

    /// As people and QEMU call it.
    pub(crate) fn url(&self) -> String {
        format!("nbd://{}:{}/{}", self.host, self.port, self.name)
    }

    /// The options of a node that opens it, after `prefix`.
    pub(crate) fn options(&self, prefix: &str) -> Vec<(String, String)> {
        let pair = |key: &str, value: &str| (format!("{prefix}{key}"), value.to_owned());
        let mut all = vec![
            pair("server.type", "inet"),
            pair("server.host", &self.host),
            pair("server.port", &self.port.to_string()),
        ];
        if !self.name.is_empty() {
            all.push(pair("export", &self.name));
        }
        all
    }

    /// Whether these options of a node open it.
    pub(super) fn is_opened_by(&self, parsed: &[(String, String)], prefix: &str) -> bool {
        let is = |key: &str, value: &str| get(parsed, &format!("{prefix}{key}")).unwrap_or_default() == value;
        is("server.type", "inet")
            && is("server.host", &self.host)
            && is("server.port", &self.port.to_string())
            && is("export", &self.name)
    }
}

/// What a node is told of its server: the keys that [`Export::options`] makes.
pub(super) const KEYS: [&str; 4] = ["export", "server.host", "server.port", "server.type"];

/// Options by which nodes are told a server in one of the older ways; what they say is in the node's file.
pub(crate) fn is_old(key: &str, prefix: &str) -> bool {
    let key = key.strip_prefix(prefix).unwrap_or_default();
    matches!(key, "host" | "port" | "path" | "export" | "filename") || key.starts_with("server.")
}

/// Whether an option's value names a server.
pub(crate) fn is_server(file: &str) -> bool {
    file.starts_with("nbd:") || file.starts_with("nbd+unix:") || file.contains("\"nbd\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_known_by_its_address_and_what_another_host_lacks_is_refused() {
        let export =
            |host: &str, port, name: &str| Export { host: host.into(), port, name: name.into(), bytes: 7 };
        for (file, read) in [
            ("nbd://10.0.0.1:10809/vol", Ok(export("10.0.0.1", 10809, "vol"))),
            ("nbd://storage-1:7", Ok(export("storage-1", 7, ""))),
            ("nbd://storage/a/b", Ok(export("storage", 10809, "a/b"))),
            ("nbd+unix:///vol?socket=/run/nbd", Err("by a socket of this host")),
            ("json:{\"driver\": \"nbd\", \"tls-creds\": \"t\"}", Err("TLS credentials")),
            ("nbd://[::1]:7/vol", Err("nbd://HOST:PORT/NAME")),
            ("nbd://10.0.0.1:port/vol", Err("nbd://HOST:PORT/NAME")),
            ("nbd://a b:7/vol", Err("no name or IPv4 address")),
            ("nbd://-a:7/vol", Err("no name or IPv4 address")),
            ("nbd://a:7/a?b", Err("the name of the export")),
        ] {
            match (Export::read(file, 7), read) {
                (Ok(is), Ok(right)) => assert_eq!(is, right, "{file}"),
                (Err(why), Err(part)) => assert!(why.contains(part), "{file}: {why}"),
                (is, right) => panic!("{file}: {is:?}, {right:?}"),
            }
        }
    }
}
