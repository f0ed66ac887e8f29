//! Character devices: what a serial port, a guest agent's channel and their like end in on a host.
//!
//! A recipe says what kind of thing that is, and never by which name or address: each host makes its own (see
//! [`crate::ports`]).

use super::{
    Console,
    allow::{RESERVED, is_id},
    argv::CONSOLE_ID,
    check::shown,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// A recipe may have so many: a virtio-serial controller has 31 ports, and nobody has more than two.
pub(super) const MOST_CHARDEVS: usize = 64;

/// A character device.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chardev {
    /// Its id, which a `-device` or a `-serial` refers to.
    pub id: String,
    /// What it is made as.
    pub kind: ChardevKind,
    /// Whether several devices use it (`mux=on`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub mux: bool,
    /// Whether what the guest says is also written to a file.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub logged: bool,
}

/// What a character device is made as on the host where its VM is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChardevKind {
    /// A Unix socket that QEMU listens at.
    Socket,
    /// A file for what the guest says.
    Log,
    /// A pseudo-terminal.
    Pty,
    /// Nothing: what the guest says is lost, and nobody answers.
    Null,
}

impl Chardev {
    /// Of this id and kind, for one device.
    pub fn new(id: impl Into<String>, kind: ChardevKind) -> Self {
        Self { id: id.into(), kind, mux: false, logged: false }
    }

    /// Whether a file is made for what the guest says.
    pub(crate) fn has_log(&self) -> bool {
        self.logged || self.kind == ChardevKind::Log
    }
}

/// The first serial port as a character device; none if there is no such port.
pub(super) fn of_console(console: Console) -> Option<Chardev> {
    let kind = match console {
        Console::None => return None,
        Console::File => ChardevKind::Log,
        Console::Socket => ChardevKind::Socket,
        Console::Pty => ChardevKind::Pty,
    };
    Some(Chardev { id: CONSOLE_ID.to_owned(), kind, mux: false, logged: true })
}

/// Everything that is wrong with them; empty when they may be used.
pub(super) fn check(chardevs: &[Chardev]) -> Vec<String> {
    if chardevs.len() > MOST_CHARDEVS {
        return vec![format!("{} character devices are too many", chardevs.len())];
    }
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for Chardev { id, .. } in chardevs {
        if !is_id(id) || id.starts_with(RESERVED) {
            wrong.push(format!("the id {:?} of a character device is not usable", shown(id)));
        } else if !seen.insert(id) {
            wrong.push(format!("two character devices have the id {id}"));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_cannot_name_what_is_ours_nor_a_path() {
        let named = |id: &str| check(&[Chardev::new(id, ChardevKind::Socket)]);
        assert_eq!(named("charchannel0"), Vec::<String>::new());
        for id in ["", "../x", "/etc/x", "a,path=/x", "whimbrel-qmp", "whimbrel-console", "a:b", "a b"] {
            assert_eq!(named(id).len(), 1, "{id}");
        }
        let twice = [Chardev::new("a", ChardevKind::Pty), Chardev::new("a", ChardevKind::Log)];
        assert_eq!(check(&twice), ["two character devices have the id a"]);
        let many = vec![Chardev::new("a", ChardevKind::Null); MOST_CHARDEVS + 1];
        assert_eq!(check(&many).len(), 1);
        // Whatever else a peer says of one is not read.
        for more in [r#""path":"/x""#, r#""host":"h""#] {
            let text = format!(r#"{{"id":"a","kind":"socket",{more}}}"#);
            serde_json::from_str::<Chardev>(&text).unwrap_err();
        }
        serde_json::from_str::<Chardev>(r#"{"id":"a","kind":"tcp"}"#).unwrap_err();
    }
}
