//! All runs, on disk too: what was interrupted goes on where it was.

use crate::run::Run;
use lab::{Doing, Result};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// All runs so far.
#[derive(Debug, Default)]
pub(crate) struct Results {
    pub(crate) runs: Vec<Run>,
    path: Option<PathBuf>,
    /// Which of them are looked at: those with TLS, or those without.
    tls: bool,
}

impl Results {
    /// Those of an earlier bench, if there is such a file.
    pub(crate) fn open(path: Option<&Path>, tls: bool) -> Result<Self> {
        let mut results = Self { path: path.map(Path::to_owned), tls, ..Self::default() };
        let Some(path) = path else { return Ok(results) };
        match fs::read(path) {
            Ok(text) => {
                results.runs = serde_json::from_slice(&text).doing(format!("read {}", path.display()))?
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).doing(format!("read {}", path.display())),
        }
        Ok(results)
    }

    /// Whether a run is there already.
    pub(crate) fn has(&self, workload: &str, link: &str, contender: &str, n: u32) -> bool {
        self.of(workload, link, contender).any(|run| run.run == n)
    }

    /// The runs of a contender, with TLS or without.
    pub(crate) fn of(&self, workload: &str, link: &str, contender: &str) -> impl Iterator<Item = &Run> {
        self.runs
            .iter()
            .filter(|run| run.tls == self.tls)
            .filter(move |run| run.workload == workload && run.link == link && run.contender == contender)
    }

    /// Adds a run. The file has it when this returns, or is as it was.
    pub(crate) fn add(&mut self, run: Run) -> Result<()> {
        self.runs.push(Run { tls: self.tls, ..run });
        let Some(path) = &self.path else { return Ok(()) };
        let mut new = path.clone().into_os_string();
        new.push(".new");
        let what = || format!("write {}", path.display());
        let text = serde_json::to_vec_pretty(&self.runs).doing(what())?;
        fs::write(&new, text).and_then(|()| fs::rename(&new, path)).doing(what())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_run_is_there_after_an_interruption() {
        let path = std::env::temp_dir().join(format!("whb-results-{}.json", std::process::id()));
        let run = |n| Run {
            workload: "idle".into(),
            link: "1gbit".into(),
            contender: "c".into(),
            run: n,
            ..Run::default()
        };
        let mut results = Results::open(Some(&path), false).unwrap();
        results.add(run(1)).unwrap();
        results.add(run(3)).unwrap();
        let again = Results::open(Some(&path), false);
        let protected = Results::open(Some(&path), true);
        fs::remove_file(&path).unwrap();
        let again = again.unwrap();
        assert_eq!(again.runs, [run(1), run(3)]);
        assert!(again.has("idle", "1gbit", "c", 3) && !protected.unwrap().has("idle", "1gbit", "c", 3));
        for (workload, link, contender, n) in [
            ("idle", "1gbit", "c", 2),
            ("idle", "1gbit", "d", 1),
            ("idle", "unshaped", "c", 1),
            ("redis", "1gbit", "c", 1),
        ] {
            assert!(!again.has(workload, link, contender, n));
        }
    }
}
