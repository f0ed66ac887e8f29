//! Network interfaces, as `ip -details -json link show` describes them.

use super::tools::{ip, understand};
use serde::Deserialize;
use serde_json::Value;

/// One interface.
#[derive(Clone, Deserialize, Debug, Default)]
pub(super) struct Link {
    pub(super) ifname: String,
    #[serde(default)]
    pub(super) flags: Vec<String>,
    #[serde(default)]
    pub(super) mtu: u32,
    #[serde(default)]
    pub(super) master: Option<String>,
    #[serde(default)]
    pub(super) txqlen: Option<u32>,
    #[serde(default)]
    pub(super) ifalias: Option<String>,
    #[serde(default)]
    pub(super) address: Option<String>,
    #[serde(default)]
    pub(super) linkinfo: Info,
    /// A program that sees each packet before all others.
    #[serde(default)]
    pub(super) xdp: Option<Value>,
}

/// What depends on the interface's kind, and on that of its master.
#[derive(Clone, Deserialize, Debug, Default)]
pub(super) struct Info {
    #[serde(default)]
    pub(super) info_kind: String,
    #[serde(default)]
    pub(super) info_data: Value,
    #[serde(default)]
    pub(super) info_slave_kind: String,
    #[serde(default)]
    pub(super) info_slave_data: Value,
}

impl Link {
    /// Whether somebody has set it up.
    pub(super) fn is_up(&self) -> bool {
        self.flags.iter().any(|flag| flag == "UP")
    }

    /// A bridge port's state, such as `listening`.
    pub(super) fn port_state(&self) -> &str {
        self.linkinfo.info_slave_data["state"].as_str().unwrap_or_default()
    }

    /// Its address as a number; 0 if it has none.
    pub(super) fn address_number(&self) -> u64 {
        let text = self.address.as_deref().unwrap_or_default();
        let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
        bytes.unwrap_or_default().iter().take(6).fold(0, |number, byte| number << 8 | u64::from(*byte))
    }
}

/// The interface of this name.
pub(super) fn link(name: &str) -> Result<Link, String> {
    let links: Vec<Link> = understand(&ip(&["-details", "-json", "link", "show", "dev", name])?)?;
    links.into_iter().next().ok_or_else(|| format!("ip does not know {name}"))
}

/// All bridges.
pub(super) fn bridges() -> Result<Vec<Link>, String> {
    understand(&ip(&["-details", "-json", "link", "show", "type", "bridge"])?)
}
