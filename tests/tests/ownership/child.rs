//! A claimer that is a process of its own, so that it can be killed.

use crate::places::{Where, known};
use ports::{Claim, Claimed};
use std::{
    env,
    io::{BufRead, BufReader, Read, Write},
    process::{Child, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
};
use units::{Epoch, MigrationId};

const TOLD: &str = "WHIMBREL_TEST_CLAIM";

/// Claims and says what came of it, then waits to be killed.
pub(crate) struct Claimer {
    child: Child,
    said: BufReader<ChildStdout>,
}

/// The process of a claimer, for whoever kills it from elsewhere; 0: there is none.
pub(crate) type Pid = Arc<AtomicU32>;

impl Claimer {
    /// Begins to claim. `pid` is set before it does anything.
    pub(crate) fn start(at: &Where, memory: &std::path::Path, claim: &Claim, pid: &Pid) -> Self {
        let told = [
            at.text(),
            memory.display().to_string(),
            claim.vm.clone(),
            claim.migration.to_string(),
            claim.expected.0.to_string(),
            claim.claimer.clone(),
        ];
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "child::be_a_claimer", "--nocapture"])
            .env(TOLD, told.join("\n"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        pid.store(child.id(), SeqCst);
        // It waits for this before its first question.
        child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        Self { child, said }
    }

    /// What it was told; `None` if it was killed before.
    pub(crate) fn answer(&mut self) -> Option<String> {
        let mut line = String::new();
        while self.said.read_line(&mut line).unwrap_or(0) > 0 {
            if let Some((_, answer)) = line.trim_end().split_once("ANSWER ") {
                return Some(answer.to_owned());
            }
            line.clear();
        }
        None
    }

    /// Kills it, if nobody has yet.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

impl Drop for Claimer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// An answer as a claimer prints it.
pub(crate) fn words(claimed: &Claimed) -> String {
    match claimed {
        Claimed::Yours(epoch) => format!("yours {epoch}"),
        Claimed::Lost(record) => format!("{} {}", record.owner, record.epoch),
    }
}

/// Not a test: what a claimer's process runs.
#[test]
fn be_a_claimer() {
    let Ok(told) = env::var(TOLD) else { return };
    let told: Vec<&str> = told.split('\n').collect();
    let [at, memory, vm, migration, expected, claimer] = told[..] else { panic!("{told:?}") };
    let claim = Claim {
        vm: vm.to_owned(),
        migration: migration.parse::<MigrationId>().unwrap(),
        expected: Epoch(expected.parse().unwrap()),
        claimer: claimer.to_owned(),
    };
    let mut go = String::new();
    std::io::stdin().read_line(&mut go).unwrap();
    let record = Where::parse(at).record(memory.as_ref());
    println!("ANSWER {}", words(&known(|| record.claim(&claim))));
    // Until it is killed, or the test's process ends.
    let _ = std::io::stdin().read(&mut [0]);
}
