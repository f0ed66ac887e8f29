//! Disks that a server on the network has: NBD, HTTP, iSCSI.
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
}

/// The block drivers of QEMU that speak these.
pub(crate) const DRIVERS: [&str; 4] = ["nbd", "http", "https", "iscsi"];

impl Protocol {
    /// By the name of QEMU's block driver.
    pub(crate) fn of_driver(driver: &str) -> Option<Self> {
        let all = [Self::Nbd, Self::Http, Self::Https, Self::Iscsi];
        DRIVERS.iter().position(|known| *known == driver).map(|at| all[at])
    }

    /// QEMU's name for it, and that of its URLs.
    pub(crate) fn word(self) -> &'static str {
        DRIVERS[self as usize]
    }

    /// Where its servers listen if nothing else is said.
    fn usual_port(self) -> u16 {
        [10809, 80, 443, 3260][self as usize]
    }

    fn is_nbd(&self) -> bool {
        *self == Self::Nbd
    }

    /// What a node is told of its server: the keys that [`Export::options`] makes.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Nbd => &["export", "server.host", "server.port", "server.type"],
            Self::Http | Self::Https => &["url"],
            Self::Iscsi => &["transport", "portal", "target", "lun"],
        }
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
    /// What it calls the disk; may be empty. Of iSCSI: `TARGET/UNIT`.
    pub name: String,
    /// How large the disk is.
    pub bytes: u64,
}

impl Export {
    /// By QEMU's word for the file of a node, `nbd://HOST:PORT/NAME`; says why it cannot be used elsewhere.
    pub(crate) fn read(driver: &str, file: &str, bytes: u64) -> Result<Self, String> {
        let export = match Protocol::of_driver(driver) {
            Some(Protocol::Nbd) => Self::nbd(file)?,
            Some(protocol @ (Protocol::Http | Protocol::Https)) => Self::web(protocol, file)?,
            Some(Protocol::Iscsi) => Self::scsi(file)?,
            None => return Err(format!("its driver {driver} is not carried over")),
        };
        let export = Self { bytes, ..export };
        export.check().map(|()| export)
    }

    fn nbd(file: &str) -> Result<Self, String> {
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
        Self::at(Protocol::Nbd, rest).ok_or_else(not)
    }

    fn web(protocol: Protocol, file: &str) -> Result<Self, String> {
        let scheme = protocol.word();
        if file.starts_with("json:") {
            return Err(format!(
                "its server is told more than a URL (a user, a cookie, sslverify=off), which is not carried over; start the VM with \
                 {scheme}://HOST/PATH"
            ));
        }
        let not = || {
            format!(
                "its server is not called {scheme}://HOST/PATH, with an IPv4 address or a name, and without a user"
            )
        };
        let rest = file.strip_prefix(scheme).and_then(|rest| rest.strip_prefix("://")).ok_or_else(not)?;
        Self::at(protocol, rest).ok_or_else(not)
    }

    /// QEMU has words of its own for these, which hold what it was told.
    fn scsi(file: &str) -> Result<Self, String> {
        let not = || {
            "its iSCSI server is told more than its address, target and unit (a user, an initiator's name), which is not carried \
             over; serve the disk by NBD from a host that both reach (qemu-nbd --shared=2)"
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
        let known = ["driver", "transport", "portal", "target", "lun"];
        let all = said.as_object().is_some_and(|said| said.keys().all(|key| known.contains(&key.as_str())));
        if !all || word("transport") != "tcp" {
            return Err(not());
        }
        let unit = if word("lun").is_empty() { "0".to_owned() } else { word("lun") };
        Self::at(Protocol::Iscsi, &format!("{}/{}/{unit}", word("portal"), word("target"))).ok_or_else(not)
    }

    /// `HOST[:PORT][/NAME]`.
    fn at(protocol: Protocol, rest: &str) -> Option<Self> {
        let (server, name) = rest.split_once('/').unwrap_or((rest, ""));
        let (host, port) = match server.split_once(':') {
            Some((host, port)) => (host, port.parse().ok()?),
            None => (server, protocol.usual_port()),
        };
        Some(Self { protocol, host: host.to_owned(), port, name: name.to_owned(), bytes: 0 })
    }

    /// Whether it is well formed; says why not.
    pub(crate) fn check(&self) -> Result<(), String> {
        let more: &[u8] = match self.protocol {
            Protocol::Nbd => b"-_./",
            Protocol::Http | Protocol::Https => b"-_./~%?=&+",
            Protocol::Iscsi => b"-_.:/",
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
            _ => format!("{scheme}://{host}:{port}/{name}"),
        }
    }

    /// The options of a node that opens it, after `prefix`.
    pub(crate) fn options(&self, prefix: &str) -> Vec<(String, String)> {
        let pair = |key: &str, value: &str| (format!("{prefix}{key}"), value.to_owned());
        match self.protocol {
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
            Protocol::Iscsi => {
                let (target, unit) = self.unit().unwrap_or_default();
                vec![
                    pair("transport", "tcp"),
                    pair("portal", &format!("{}:{}", self.host, self.port)),
                    pair("target", target),
                    pair("lun", unit),
                ]
            }
        }
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
    let all = ["host", "port", "path", "export", "filename", "url", "transport", "portal", "target", "lun"];
    all.contains(&key) || key.starts_with("server.")
}

/// Whether an option's value names a server.
pub(crate) fn is_server(file: &str) -> bool {
    file.starts_with("nbd:")
        || file.starts_with("nbd+unix:")
        || DRIVERS.iter().any(|driver| {
            file.strip_prefix(driver).is_some_and(|rest| rest.starts_with("://"))
                || file.contains(&format!("\"driver\": \"{driver}\""))
        })
        || file.contains("\"nbd\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_known_by_its_address_and_what_another_host_lacks_is_refused() {
        let export = |host: &str, port, name: &str| Export {
            protocol: Protocol::Nbd,
            host: host.into(),
            port,
            name: name.into(),
            bytes: 7,
        };
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
            match (Export::read("nbd", file, 7), read) {
                (Ok(is), Ok(right)) => assert_eq!(is, right, "{file}"),
                (Err(why), Err(part)) => assert!(why.contains(part), "{file}: {why}"),
                (is, right) => panic!("{file}: {is:?}, {right:?}"),
            }
        }
    }
    #[test]
    fn web_servers_and_scsi_are_called_by_what_opens_them() {
        let export = |protocol, host: &str, port, name: &str| Export {
            protocol,
            host: host.into(),
            port,
            name: name.into(),
            bytes: 7,
        };
        let iqn = "iqn.2001-04.com.example:storage.disk1";
        let json = |more: &str| {
            format!(
                "json:{{\"driver\": \"iscsi\", \"transport\": \"tcp\", \"portal\": \"10.0.0.1\", \"target\": \"{iqn}\"{more}}}"
            )
        };
        let unit = |port, unit: &str| Ok(export(Protocol::Iscsi, "10.0.0.1", port, &format!("{iqn}/{unit}")));
        for (driver, file, read) in [
            ("http", "http://10.0.0.1/a.iso".to_owned(), Ok(export(Protocol::Http, "10.0.0.1", 80, "a.iso"))),
            (
                "https",
                "https://mirror:8443/a/b.img?x=1&y=%20".to_owned(),
                Ok(export(Protocol::Https, "mirror", 8443, "a/b.img?x=1&y=%20")),
            ),
            ("https", "https://u:p@mirror/a".to_owned(), Err("HOST/PATH")),
            ("https", "http://mirror/a".to_owned(), Err("HOST/PATH")),
            ("http", "http://mirror/a b".to_owned(), Err("the name of the export")),
            (
                "http",
                "json:{\"driver\": \"http\", \"url\": \"http://m/a\"}".to_owned(),
                Err("more than a URL"),
            ),
            ("iscsi", json(", \"lun\": \"3\""), unit(3260, "3")),
            ("iscsi", json(", \"lun\": 3"), unit(3260, "3")),
            ("iscsi", json(""), unit(3260, "0")),
            ("iscsi", format!("iscsi://10.0.0.1:7/{iqn}/1"), unit(7, "1")),
            ("iscsi", json(", \"user\": \"u\", \"password-secret\": \"s\""), Err("told more")),
            ("iscsi", json(", \"lun\": 256"), Err("no TARGET/UNIT")),
            ("iscsi", "iscsi://10.0.0.1/1".to_owned(), Err("no TARGET/UNIT")),
            ("rbd", "rbd:pool/vol".to_owned(), Err("not carried over")),
        ] {
            match (Export::read(driver, &file, 7), read) {
                (Ok(is), Ok(right)) => {
                    assert_eq!(is, right, "{file}");
                    assert_eq!(Export::read(driver, &is.url(), 7).as_ref(), Ok(&is), "{}", is.url());
                    assert!(is.is_opened_by(&is.options("file."), "file.") && is_server(&file));
                    let mut more = is.options("");
                    more.push(("url".to_owned(), "http://other/".to_owned()));
                    assert!(!is.is_opened_by(&more, ""), "{more:?}");
                    assert!(!is.is_opened_by(&is.options("")[1..], ""));
                }
                (Err(why), Err(part)) => assert!(why.contains(part), "{file}: {why}"),
                (is, right) => panic!("{file}: {is:?}, {right:?}"),
            }
        }
        // As earlier versions wrote it down.
        let old = r#"{"host":"a","port":1,"name":"x","bytes":2}"#;
        let read: Export = serde_json::from_str(old).unwrap();
        assert_eq!((read.protocol, serde_json::to_string(&read).unwrap().as_str()), (Protocol::Nbd, old));
    }
}
