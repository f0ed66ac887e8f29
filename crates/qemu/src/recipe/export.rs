//! Disks that a server on the network has: NBD, HTTP, iSCSI, SSH.
//!
//! Both hosts connect to the same address. That it means the same server to both is for who grants it to say
//! (`[allow] servers`): none of these has names of servers by which that could be shown, nor locks that QEMU
//! takes. What can be compared is: the disk's name, and its size.

use super::{
    check::{is_host, shown},
    options::get,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// The longest name of an export that is taken. NBD allows 4096 bytes.
const LONGEST_NAME: usize = 255;

/// The largest number of a unit of SCSI that is addressed in this way.
const MOST_UNITS: u32 = 255;

/// By which protocol a server is spoken to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Network block devices.
    #[default]
    Nbd,
    /// The web: its disks can only be read.
    Http,
    /// The same by TLS, with what each host trusts.
    Https,
    /// SCSI over TCP.
    Iscsi,
    /// SSH's transfer of files, with keys of each host's own.
    Ssh,
}

/// Whether one of QEMU's block drivers speaks one of these.
pub(crate) fn is_driver(name: &str) -> bool {
    Protocol::of_driver(name).is_some()
}

impl Protocol {
    const ALL: [Self; 5] = [Self::Nbd, Self::Http, Self::Https, Self::Iscsi, Self::Ssh];

    /// By the name of QEMU's block driver.
    pub(crate) fn of_driver(driver: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|protocol| protocol.word() == driver)
    }

    /// QEMU's name for it, and that of its URLs.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Nbd => "nbd",
            Self::Http => "http",
            Self::Https => "https",
            Self::Iscsi => "iscsi",
            Self::Ssh => "ssh",
        }
    }

    /// Where its servers listen if nothing else is said.
    fn usual_port(self) -> u16 {
        match self {
            Self::Nbd => 10809,
            Self::Http => 80,
            Self::Https => 443,
            Self::Iscsi => 3260,
            Self::Ssh => 22,
        }
    }

    /// What a node may be told besides its server.
    fn more(self) -> &'static [&'static str] {
        match self {
            Self::Nbd | Self::Http | Self::Https | Self::Ssh => &[],
            Self::Iscsi => &[INITIATOR, DIGEST],
        }
    }

    fn is_nbd(&self) -> bool {
        *self == Self::Nbd
    }

    /// What a node is told of its server: the keys that [`Export::options`] makes.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Nbd => &["export", "server.host", "server.port", "server.type"],
            Self::Http | Self::Https => &["url"],
            Self::Iscsi => &["transport", "portal", "target", "lun", INITIATOR, DIGEST],
            Self::Ssh => &["server.host", "server.port", "user", "path"],
        }
    }
}

/// By which name QEMU calls itself to a server of iSCSI, and whether what they say is summed up (`-iscsi`
/// says so to the nodes of URLs).
const INITIATOR: &str = "initiator-name";
const DIGEST: &str = "header-digest";

/// Whether this is what nodes are told besides their server.
pub(super) fn is_told(key: &str) -> bool {
    Protocol::ALL.iter().any(|protocol| protocol.more().contains(&key))
}

/// The longest name of an initiator (RFC 3720).
const LONGEST_INITIATOR: usize = 223;

/// Whether this may be said to a node besides its server.
fn fits(key: &str, value: &str) -> bool {
    match key {
        INITIATOR => {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-.:".contains(&byte);
            (1..=LONGEST_INITIATOR).contains(&value.len()) && value.bytes().all(plain)
        }
        DIGEST => ["crc32c", "none", "crc32c-none", "none-crc32c"].contains(&value),
        _ => false,
    }
}

/// An export.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// How the server is spoken to.
    #[serde(default, skip_serializing_if = "Protocol::is_nbd")]
    pub protocol: Protocol,
    /// The server, by its name or IPv4 address.
    pub host: String,
    /// The port it listens at.
    pub port: u16,
    /// What it calls the disk; may be empty. Of iSCSI: `TARGET/UNIT`; of SSH: `USER@PATH`, without the first
    /// slash.
    pub name: String,
    /// How large the disk is.
    pub bytes: u64,
    /// What its nodes are told besides.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub told: BTreeMap<String, String>,
}

impl Export {
    /// By QEMU's word for the file of a node, `nbd://HOST:PORT/NAME`; says why it cannot be used elsewhere.
    pub(crate) fn read(driver: &str, file: &str, bytes: u64) -> Result<Self, String> {
        let export = match Protocol::of_driver(driver) {
            Some(Protocol::Nbd) => Self::nbd(file)?,
            Some(protocol @ (Protocol::Http | Protocol::Https)) => Self::web(protocol, file)?,
            Some(Protocol::Iscsi) => Self::scsi(file)?,
            Some(Protocol::Ssh) => Self::ssh(file)?,
            None => return Err(format!("its driver {driver} is not carried over")),
        };
        let export = Self { bytes, ..export };
        export.check().map(|()| export)
    }

    fn nbd(file: &str) -> Result<Self, String> {
        if file.starts_with("nbd+unix:") {
            return Err(
                "its NBD server is reached by a socket of this host; have it listen on the network, \
                        and start the VM with nbd://HOST:PORT/NAME"
                    .to_owned(),
            );
        }
        if file.contains("tls-creds") {
            return Err(
                "its NBD server is reached with TLS credentials of this host, which are not carried \
                        over; start the VM without tls-creds, on a network of its own"
                    .to_owned(),
            );
        }
        let not =
            || "its NBD server is not called nbd://HOST:PORT/NAME, with an IPv4 address or a name".to_owned();
        let rest = file.strip_prefix("nbd://").ok_or_else(not)?;
        Self::at(Protocol::Nbd, rest).ok_or_else(not)
    }

    fn web(protocol: Protocol, file: &str) -> Result<Self, String> {
        let scheme = protocol.word();
        if file.starts_with("json:") {
            return Err(format!(
                "its server is told more than a URL (a user, a cookie, sslverify=off), which is not carried \
                 over; start the VM with {scheme}://HOST/PATH"
            ));
        }
        let not = || {
            format!(
                "its server is not called {scheme}://HOST/PATH, with an IPv4 address or a name, and without \
                 a user"
            )
        };
        let rest = file.strip_prefix(scheme).and_then(|rest| rest.strip_prefix("://")).ok_or_else(not)?;
        Self::at(protocol, rest).ok_or_else(not)
    }

    /// QEMU has words of its own for these, which hold what it was told.
    fn scsi(file: &str) -> Result<Self, String> {
        let not = || {
            "its iSCSI server is told more than its address, target, unit and initiator (a user), which is \
             not carried over; serve the disk by NBD from a host that both reach (qemu-nbd --shared=2)"
                .to_owned()
        };
        if let Some(rest) = file.strip_prefix("iscsi://") {
            return Self::at(Protocol::Iscsi, rest).ok_or_else(not);
        }
        let said: Value =
            file.strip_prefix("json:").and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        let word = |key: &str| match &said[key] {
            Value::String(text) => text.clone(),
            Value::Number(number) => number.to_string(),
            _ => String::new(),
        };
        let known = |key: &String| key == "driver" || Protocol::Iscsi.keys().contains(&key.as_str());
        let all = said.as_object().is_some_and(|said| said.keys().all(known));
        if !all || word("transport") != "tcp" {
            return Err(not());
        }
        let more = Protocol::Iscsi.more().iter().map(|key| ((*key).to_owned(), word(key)));
        let told = more.filter(|(_, value)| !value.is_empty()).collect();
        let unit = if word("lun").is_empty() { "0".to_owned() } else { word("lun") };
        let server = format!("{}/{}/{unit}", word("portal"), word("target"));
        Self::at(Protocol::Iscsi, &server).map(|export| Self { told, ..export }).ok_or_else(not)
    }

    /// The target's QEMU logs in with keys of its own user, and knows the server by that user's
    /// `known_hosts`.
    fn ssh(file: &str) -> Result<Self, String> {
        if file.contains("host_key_check=") {
            return Err("how its SSH server's key is checked is not carried over: the target's QEMU looks \
                        into known_hosts; start the VM without host_key_check"
                .to_owned());
        }
        let not = || {
            "its SSH server is not called ssh://USER@HOST:PORT/PATH, with an IPv4 address or a name"
                .to_owned()
        };
        let (user, rest) =
            file.strip_prefix("ssh://").and_then(|rest| rest.split_once('@')).ok_or_else(not)?;
        let export = Self::at(Protocol::Ssh, rest).ok_or_else(not)?;
        Ok(Self { name: format!("{user}@{}", export.name), ..export })
    }

    /// `HOST[:PORT][/NAME]`.
    fn at(protocol: Protocol, rest: &str) -> Option<Self> {
        let (server, name) = rest.split_once('/').unwrap_or((rest, ""));
        let (host, port) = match server.split_once(':') {
            Some((host, port)) => (host, port.parse().ok()?),
            None => (server, protocol.usual_port()),
        };
        Some(Self {
            protocol,
            host: host.to_owned(),
            port,
            name: name.to_owned(),
            bytes: 0,
            told: BTreeMap::new(),
        })
    }

    /// Whether it is well formed; says why not.
    pub(crate) fn check(&self) -> Result<(), String> {
        let more: &[u8] = match self.protocol {
            Protocol::Nbd => b"-_./",
            Protocol::Http | Protocol::Https => b"-_./~%?=&+",
            Protocol::Iscsi => b"-_.:/",
            Protocol::Ssh => b"-_./@",
        };
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || more.contains(&byte);
        if !is_host(&self.host) || self.port == 0 {
            return Err(format!("{:?} is no name or IPv4 address of a server", shown(&self.host)));
        }
        if self.name.len() > LONGEST_NAME || !self.name.bytes().all(plain) {
            return Err(format!(
                "the name of the export {:?} is not made of letters, digits, and any of {}",
                shown(&self.name),
                String::from_utf8_lossy(more)
            ));
        }
        let more = self.protocol.more();
        if let Some((key, value)) =
            self.told.iter().find(|(key, value)| !more.contains(&key.as_str()) || !fits(key, value))
        {
            return Err(format!("{}={} is not for a disk of a server", shown(key), shown(value)));
        }
        if self.protocol == Protocol::Ssh {
            let (user, path) = self.name.split_once('@').unwrap_or_default();
            if user.is_empty() || user.contains('/') || path.is_empty() || path.contains('@') {
                return Err(format!("{:?} is no USER@PATH of SSH", shown(&self.name)));
            }
        }
        if self.protocol == Protocol::Iscsi {
            let unit = self.unit().and_then(|(target, unit)| Some((target, unit.parse::<u32>().ok()?)));
            let fits = unit.is_some_and(|(target, unit)| {
                !target.is_empty() && !target.contains('/') && unit <= MOST_UNITS
            });
            if !fits {
                return Err(format!("{:?} is no TARGET/UNIT of iSCSI", shown(&self.name)));
            }
        }
        Ok(())
    }

    /// The target of iSCSI, and its unit.
    fn unit(&self) -> Option<(&str, &str)> {
        self.name.rsplit_once('/')
    }

    /// As people and QEMU call it.
    pub(crate) fn url(&self) -> String {
        let Self { protocol, host, port, name, .. } = self;
        let scheme = protocol.word();
        // A web server may know itself by what it is called without a port only.
        match protocol {
            Protocol::Http | Protocol::Https if *port == protocol.usual_port() => {
                format!("{scheme}://{host}/{name}")
            }
            Protocol::Ssh => {
                let (user, path) = name.split_once('@').unwrap_or_default();
                format!("{scheme}://{user}@{host}:{port}/{path}")
            }
            _ => format!("{scheme}://{host}:{port}/{name}"),
        }
    }

    /// The options of a node that opens it, after `prefix`.
    pub(crate) fn options(&self, prefix: &str) -> Vec<(String, String)> {
        let pair = |key: &str, value: &str| (format!("{prefix}{key}"), value.to_owned());
        let mut all = match self.protocol {
            Protocol::Nbd => {
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
            Protocol::Http | Protocol::Https => vec![pair("url", &self.url())],
            Protocol::Ssh => {
                let (user, path) = self.name.split_once('@').unwrap_or_default();
                vec![
                    pair("server.host", &self.host),
                    pair("server.port", &self.port.to_string()),
                    pair("user", user),
                    pair("path", &format!("/{path}")),
                ]
            }
            Protocol::Iscsi => {
                let (target, unit) = self.unit().unwrap_or_default();
                vec![
                    pair("transport", "tcp"),
                    pair("portal", &format!("{}:{}", self.host, self.port)),
                    pair("target", target),
                    pair("lun", unit),
                ]
            }
        };
        all.extend(self.told.iter().map(|(key, value)| pair(key, value)));
        all
    }

    /// Whether these options of a node open it, all that it is told of its server.
    pub(super) fn is_opened_by(&self, told: &[(String, String)], prefix: &str) -> bool {
        let options = self.options(prefix);
        let is_there = |(key, value): &(String, String)| get(&options, key) == Some(value);
        options.iter().all(|(key, value)| get(told, key) == Some(value))
            // An export without a name may be said to have none.
            && told.iter().all(|one| is_there(one) || one.1.is_empty())
    }
}

/// What a node of this driver is told of its server; none of another driver.
pub(super) fn keys_of(driver: &str) -> &'static [&'static str] {
    Protocol::of_driver(driver).map_or(&[], Protocol::keys)
}

/// Options by which nodes are told a server, in any of the ways there are; what they say is in the node's
/// file.
pub(crate) fn is_old(key: &str, prefix: &str) -> bool {
    let key = key.strip_prefix(prefix).unwrap_or_default();
    let all = ["host", "port", "path", "filename"];
    let keys = || Protocol::ALL.iter().flat_map(|protocol| protocol.keys());
    all.contains(&key) || key.starts_with("server.") || keys().any(|known| *known == key)
}

/// Whether an option's value names a server.
pub(crate) fn is_server(file: &str) -> bool {
    if let Some(text) = file.strip_prefix("json:") {
        return serde_json::from_str(text).is_ok_and(|said| has_server(&said));
    }
    // QEMU's old word for a server of NBD has no slashes, and a socket's has a word of its own.
    let (scheme, rest) = file.split_once(':').unwrap_or_default();
    matches!(scheme, "nbd" | "nbd+unix") || is_driver(scheme) && rest.starts_with("//")
}

/// Whether a node, or what it lies on, is told a server.
fn has_server(said: &Value) -> bool {
    match said {
        Value::Object(said) => {
            let its_own = said.get("driver").and_then(Value::as_str).is_some_and(is_driver);
            its_own || said.values().any(has_server)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests;
