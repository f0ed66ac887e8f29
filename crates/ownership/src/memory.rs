//! What a host remembers of a shared record between two starts of its agent: enough to notice another one in
//! its place, and one that went backwards.

use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::{self, ErrorKind, Write},
    path::{Path, PathBuf},
    sync::Mutex,
};
use units::Locked;

/// One file in the agent's state directory.
#[derive(Debug)]
pub struct Memory {
    path: PathBuf,
    met: Mutex<Option<Met>>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Met {
    /// What the record was called.
    place: String,
    /// Who it said it was.
    identity: String,
    /// The newest of its own serial numbers that was seen.
    revision: u64,
}

impl Memory {
    /// What is remembered in this file, which need not exist yet.
    pub fn at(path: &Path) -> io::Result<Self> {
        let met = match fs::read(path) {
            Ok(bytes) => Some(serde_json::from_slice(&bytes).map_err(|e| {
                let why = format!(
                    "{} cannot be read: {e}; without it, the next answer is believed",
                    path.display()
                );
                io::Error::new(ErrorKind::InvalidData, why)
            })?),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(Self { path: path.to_owned(), met: Mutex::new(met) })
    }

    /// Whether something was met at this place before.
    pub(crate) fn has_met(&self, place: &str) -> bool {
        self.seen(place).is_some()
    }

    /// The newest revision that was seen at this place.
    pub(crate) fn seen(&self, place: &str) -> Option<u64> {
        let met = self.met.locked();
        met.as_ref().filter(|met| met.place == place).map(|met| met.revision)
    }

    /// At this place somebody calls itself so: an error if it was somebody else before. Durable when it
    /// returns, and so is the revision, where that matters.
    pub(crate) fn meet(&self, place: &str, identity: &str, revision: Option<u64>) -> io::Result<()> {
        let mut met = self.met.locked();
        let before = met.as_ref().filter(|met| met.place == place);
        if let Some(before) = before.filter(|before| before.identity != identity) {
            let why = format!(
                "{place} is not the one that it was: it calls itself {identity:?} now, and {:?} before. It \
                 was replaced or restored, and nothing is decided by it. If that is meant, end the agent, \
                 remove {}, and start it again",
                before.identity,
                self.path.display()
            );
            return Err(io::Error::new(ErrorKind::InvalidData, why));
        }
        let revision = revision.unwrap_or(0).max(before.map_or(0, |before| before.revision));
        let now = Met { place: place.to_owned(), identity: identity.to_owned(), revision };
        if met.as_ref() != Some(&now) {
            self.write(&now)?;
            *met = Some(now);
        }
        Ok(())
    }

    fn write(&self, now: &Met) -> io::Result<()> {
        let draft = self.path.with_extension("new");
        let mut file = File::create(&draft)?;
        file.write_all(&serde_json::to_vec(now)?)?;
        file.sync_all()?;
        fs::rename(&draft, &self.path)?;
        File::open(self.path.parent().unwrap_or(Path::new("/")))?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_in_anothers_place_is_noticed_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ownership.json");
        let memory = Memory::at(&path).unwrap();
        assert!(!memory.has_met("here"));
        memory.meet("here", "one", Some(7)).unwrap();
        memory.meet("here", "one", Some(3)).unwrap();
        drop(memory);
        let memory = Memory::at(&path).unwrap();
        assert_eq!(memory.seen("here"), Some(7), "the newest stays");
        let error = memory.meet("here", "two", Some(9)).unwrap_err().to_string();
        assert!(
            error.contains("two") && error.contains("one") && error.contains("ownership.json"),
            "{error}"
        );
        // Another place was configured: that is meant.
        memory.meet("there", "two", Some(1)).unwrap();
        assert_eq!((memory.seen("here"), memory.seen("there")), (None, Some(1)));
    }
}
