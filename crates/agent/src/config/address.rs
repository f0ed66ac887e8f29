//! Where another agent listens.

use super::PORT;
use serde::{Deserialize, Deserializer, de::Error as _};
use std::{fmt, str::FromStr};

/// Where another agent listens: `host:port`, `[v6]:port`. Names are looked up when it is called.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Address(String);

impl Address {
    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let good = |one: &str| {
            one.rsplit_once(':').is_some_and(|(host, port)| {
                let bracketed = host.starts_with('[') && host.ends_with(']');
                let host_good = !host.is_empty() && (bracketed || !host.contains(':'));
                let port_good = port.parse::<u16>().is_ok_and(|port| port > 0);
                host_good && !host.contains(char::is_whitespace) && port_good
            })
        };
        if text.split(',').all(good) {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!("{text:?} is no address; write host:port, like 10.0.0.2:{PORT}"))
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
        for good in ["10.0.0.2:7471", "host:1", "[fe80::1]:7471"] {
            assert!(good.parse::<Address>().is_ok(), "{good}");
        }
        for bad in ["", "host", ":1", "host:0", "host:99999", "fe80::1:7471", "a b:1"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}
