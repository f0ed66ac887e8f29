//! Where another agent listens.

use super::PORT;
use serde::{Deserialize, Deserializer, de::Error as _};
use std::{fmt, net::Ipv6Addr, str::FromStr};

/// Where another agent listens: `host:port`, `[v6]:port`, or several of these with commas between them. Names
/// are looked up when it is called.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Address(String);

impl Address {
    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Each of them as it is looked up, with the host that its certificate must be for: a name, or an address
    /// without brackets.
    pub fn each(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.split(',').map(|one| (one, parts(one).map_or(one, |(host, _)| host)))
    }
}

/// The host and the port of one address.
fn parts(one: &str) -> Option<(&str, u16)> {
    let (host, port) = one.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port > 0)?;
    let host = match host.strip_prefix('[') {
        // Which interface leads there is this host's own business.
        Some(rest) => {
            let inner = rest.strip_suffix(']')?;
            let address = inner.split_once('%').map_or(inner, |(address, _)| address);
            address.parse::<Ipv6Addr>().ok().map(|_| address)?
        }
        None => Some(host).filter(|host| !host.is_empty() && !host.contains([':', ']', '/']))?,
    };
    (!host.contains(char::is_whitespace)).then_some((host, port))
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split(',').find(|one| parts(one).is_none()) {
            None => Ok(Self(text.to_owned())),
            Some(one) => {
                let all = if one == text { String::new() } else { format!(" (of {text:?})") };
                Err(format!(
                    "{one:?}{all} is no address; write host:port, like 10.0.0.2:{PORT} or [fd00::2]:{PORT}"
                ))
            }
        }
    }
}

impl<'d> Deserialize<'d> for Address {
    fn deserialize<D: Deserializer<'d>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_host_and_a_port() {
        for good in
            ["10.0.0.2:7471", "host:1", "[fe80::1]:7471", "[fe80::1%2]:7471", "host:1,10.0.0.2:1,[::1]:1"]
        {
            assert!(good.parse::<Address>().is_ok(), "{good}");
        }
        let bad = [
            ("", ""),
            ("host", "host"),
            (":1", ":1"),
            ("host:0", "host:0"),
            ("host:99999", "host:99999"),
            ("fe80::1:7471", "fe80::1:7471"),
            ("[fe80::1]", "[fe80::1]"),
            ("[host]:1", "[host]:1"),
            ("a b:1", "a b:1"),
            ("host:1,", ""),
            ("host:1, other:1", " other:1"),
            ("host:1,10.0.0.2", "10.0.0.2"),
        ];
        for (text, wrong) in bad {
            let why = text.parse::<Address>().unwrap_err();
            assert!(why.starts_with(&format!("{wrong:?}")) && why.contains("write host:port"), "{why}");
        }
    }

    #[test]
    fn each_address_has_its_own_host() {
        let table: &[(&str, &[(&str, &str)])] = &[
            ("10.0.0.2:7471", &[("10.0.0.2:7471", "10.0.0.2")]),
            ("10.0.0.2:7471,10.1.0.2:1", &[("10.0.0.2:7471", "10.0.0.2"), ("10.1.0.2:1", "10.1.0.2")]),
            ("[fd00::2]:7471,b.example:2", &[("[fd00::2]:7471", "fd00::2"), ("b.example:2", "b.example")]),
            ("[fe80::2%3]:7471", &[("[fe80::2%3]:7471", "fe80::2")]),
        ];
        for (text, wanted) in table {
            assert_eq!(text.parse::<Address>().unwrap().each().collect::<Vec<_>>(), *wanted, "{text}");
        }
    }
}
