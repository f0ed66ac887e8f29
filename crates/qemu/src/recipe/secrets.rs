//! Secrets by which QEMU opens disks that it encrypts (LUKS). A recipe says which there are; what they are it
//! holds only while it is on its way to the target, over a link that is encrypted.

use super::{
    allow::{RESERVED, is_id},
    check::shown,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// More than the disks of any VM need.
pub(super) const MOST: usize = 64;

/// The longest content of one, in bytes: QEMU takes passphrases, and keys of some hundred bits.
pub(crate) const LONGEST: usize = 4096;

/// The longest initialization vector, in base64: AES has 16 bytes.
const LONGEST_VECTOR: usize = 64;

/// One secret.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSecret {
    /// The id of its object, which a disk refers to.
    pub id: String,
    /// Whether its content is in base64.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub base64: bool,
    /// The secret with which its content is encrypted, and the vector that begins that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<(String, String)>,
    /// Its content; none but on its way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Hidden>,
}

/// Bytes that no message and no log shows.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Hidden(String);

impl Hidden {
    /// These bytes.
    pub(crate) fn new(bytes: &[u8]) -> Self {
        Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// What they are; `None`: somebody else's JSON held none.
    pub(crate) fn bytes(&self) -> Option<Vec<u8>> {
        let text = self.0.as_bytes();
        if !text.len().is_multiple_of(2) || text.len() > 2 * LONGEST {
            return None;
        }
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        text.chunks(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
    }
}

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hidden(…)")
    }
}

impl DiskSecret {
    /// Its options for QEMU, which finds its content by this descriptor.
    pub(super) fn argument(&self, fd: i32) -> String {
        // QEMU reads it by the C library, which knows nothing of its sets of descriptors.
        let mut text = format!("secret,id={},file=/proc/self/fd/{fd}", self.id);
        if self.base64 {
            text.push_str(",format=base64");
        }
        if let Some((key, vector)) = &self.key {
            text.push_str(&format!(",keyid={key},iv={vector}"));
        }
        text
    }

    fn check(&self, before: &[Self]) -> Result<(), String> {
        let usable = |id: &str| is_id(id) && !id.starts_with(RESERVED);
        let wrong = |why: &str| Err(format!("secret {:?} {why}", shown(&self.id)));
        if !usable(&self.id) {
            return wrong("has no usable id");
        }
        if before.iter().any(|other| other.id == self.id) {
            return wrong("is there twice");
        }
        if let Some((key, vector)) = &self.key {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte);
            if !before.iter().any(|other| other.id == *key) {
                return wrong("is encrypted with one that does not come before it");
            }
            if vector.is_empty() || vector.len() > LONGEST_VECTOR || !vector.bytes().all(plain) {
                return wrong("has no usable initialization vector");
            }
        }
        match self.content.as_ref().map(Hidden::bytes) {
            Some(None) => wrong("has content that cannot be read"),
            _ => Ok(()),
        }
    }
}

/// What is wrong with a VM's secrets.
pub(super) fn check(secrets: &[DiskSecret]) -> Vec<String> {
    if secrets.len() > MOST {
        return vec![format!("{} secrets are too many", secrets.len())];
    }
    let each = secrets.iter().enumerate().map(|(n, secret)| secret.check(&secrets[..n]));
    each.filter_map(Result::err).collect()
}

/// `-object`, for each of them whose content QEMU inherits by a descriptor.
pub(super) fn arguments(secrets: &[DiskSecret], fds: &BTreeMap<String, i32>) -> Vec<String> {
    secrets.iter().filter_map(|secret| Some(secret.argument(*fds.get(&secret.id)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(id: &str, key: Option<&str>) -> DiskSecret {
        let key = key.map(|key| (key.to_owned(), "AAAA+/8=".to_owned()));
        DiskSecret { id: id.to_owned(), base64: key.is_some(), key, content: None }
    }

    #[test]
    fn a_secret_is_hidden_from_all_but_the_target() {
        let content = Hidden::new(b"geheim\0\xff");
        assert_eq!(content.bytes().as_deref(), Some(&b"geheim\0\xff"[..]));
        let mut told = secret("s", None);
        assert!(!serde_json::to_string(&told).unwrap().contains("content"));
        told.content = Some(content);
        assert!(!format!("{told:?}").contains("676568"), "{told:?}");
        let sent = serde_json::to_string(&told).unwrap();
        assert_eq!(serde_json::from_str::<DiskSecret>(&sent).unwrap(), told);
        assert_eq!(told.argument(7), "secret,id=s,file=/proc/self/fd/7");
        let fds = BTreeMap::from([("k".to_owned(), 5), ("s".to_owned(), 6)]);
        assert_eq!(
            arguments(&[secret("k", None), secret("s", Some("k")), secret("lost", None)], &fds),
            [
                "secret,id=k,file=/proc/self/fd/5",
                "secret,id=s,file=/proc/self/fd/6,format=base64,keyid=k,iv=AAAA+/8="
            ]
        );
    }

    #[test]
    fn a_secret_of_a_peer_is_no_option_and_no_name() {
        let mut comma = secret("s", Some("k"));
        comma.key = Some(("k".to_owned(), "AA,file=/etc/shadow".to_owned()));
        let mut odd = secret("s", None);
        odd.content = Some(Hidden("abc".to_owned()));
        let mut long = secret("s", None);
        long.content = Some(Hidden("00".repeat(LONGEST + 1)));
        let rows = [
            (vec![secret("k", None), secret("s", Some("k"))], None),
            (vec![secret("s", Some("k")), secret("k", None)], Some("does not come before it")),
            (vec![secret("a,b", None)], Some("no usable id")),
            (vec![secret("whimbrel-a", None)], Some("no usable id")),
            (vec![secret("k", None), comma], Some("initialization vector")),
            (vec![secret("s", None), secret("s", None)], Some("twice")),
            (vec![odd], Some("cannot be read")),
            (vec![long], Some("cannot be read")),
            (vec![secret("s", None); MOST + 1], Some("too many")),
        ];
        for (secrets, why) in rows {
            let wrong = check(&secrets);
            let told = wrong.first().map(String::as_str);
            assert_eq!(told.is_some(), why.is_some(), "{wrong:?}");
            assert!(why.is_none_or(|why| told.is_some_and(|told| told.contains(why))), "{why:?}: {wrong:?}");
        }
    }
}
