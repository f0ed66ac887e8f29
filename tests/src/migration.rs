//! A migration under way, seen through the events of `migrate --json`, and its report.

use crate::{Answer, Cli, Doing, Error, Result, wait_for};
use serde_json::Value;
use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// No migration of the laboratory takes longer.
const PATIENCE: Duration = Duration::from_secs(180);

/// A running `whimbrel migrate … --json`.
#[derive(Debug)]
pub struct Migration {
    name: String,
    child: Child,
    events: Arc<Mutex<Vec<Value>>>,
    reader: Option<JoinHandle<()>>,
    complaints: Option<JoinHandle<String>>,
}

/// The last word on a migration: the report's JSON, field by field.
#[derive(Clone, PartialEq, Debug)]
pub struct Report(pub Value);

impl Migration {
    /// Starts `migrate VM --to TO` with these further options.
    pub fn start(cli: &Cli, vm: &str, to: &str, options: &[&str]) -> Result<Self> {
        let name = format!("migrate {vm} --to {to} {}", options.join(" "));
        let mut command = cli.command(["migrate", vm, "--to", to, "--json"].iter().chain(options));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().doing(&name)?;
        let events = Arc::new(Mutex::new(Vec::new()));
        let reader = child.stdout.take().map(|stdout| {
            let events = events.clone();
            thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(|line| line.ok()) {
                    // What is no JSON stays visible as text.
                    let event = serde_json::from_str(&line).unwrap_or(Value::String(line));
                    locked(&events).push(event);
                }
            })
        });
        let complaints = child.stderr.take().map(|mut stderr| {
            thread::spawn(move || {
                let mut text = Vec::new();
                let _ = stderr.read_to_end(&mut text);
                String::from_utf8_lossy(&text).into_owned()
            })
        });
        Ok(Self { name, child, events, reader, complaints })
    }

    /// Everything so far.
    pub fn events(&self) -> Vec<Value> {
        locked(&self.events).clone()
    }

    /// Waits until some event is as wanted; an error if the migration ends before.
    pub fn until(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        wait_for(&format!("{what} in {}", self.name), PATIENCE, || {
            let found = locked(&self.events).iter().find(|event| wanted(event)).cloned();
            if found.is_none() && self.child.try_wait().doing(&self.name)?.is_some() {
                let said: Vec<_> = self.events().iter().map(Value::to_string).collect();
                return Err(Error::new(format!("{} ended before {what}", self.name), said.join("\n")));
            }
            Ok(found)
        })
    }

    /// Waits until a phase begins: `preflight`, `pre-copy`, `switchover`, `post-copy`, `done`.
    pub fn until_phase(&mut self, phase: &str) -> Result<()> {
        self.until(&format!("phase {phase}"), |event| event["event"] == "phase" && event["phase"] == phase)
            .map(drop)
    }

    /// Waits until some memory has been moved in this phase.
    pub fn until_moving(&mut self, phase: &str) -> Result<()> {
        let moving = |event: &Value| {
            let (left, of) = (event["left_bytes"].as_u64(), event["of_bytes"].as_u64());
            event["event"] == "tick" && event["phase"] == phase && left < of
        };
        self.until(&format!("memory moving in {phase}"), moving).map(drop)
    }

    /// Waits until something was said to the user.
    pub fn until_note(&mut self, words: &str) -> Result<()> {
        self.until_notes(words, 1)
    }

    /// The same, until it was said so often.
    pub fn until_notes(&mut self, words: &str, times: usize) -> Result<()> {
        let says = |event: &&Value| event["text"].as_str().is_some_and(|text| text.contains(words));
        wait_for(&format!("{words:?} in {}", self.name), PATIENCE, || {
            let said = locked(&self.events).iter().filter(says).count();
            if said < times && self.child.try_wait().doing(&self.name)?.is_some() {
                return Err(Error::new(format!("{} ended before {words:?}", self.name), "it was not said"));
            }
            Ok((said >= times).then_some(()))
        })
    }

    /// Waits until round `n` is over.
    pub fn until_round(&mut self, n: u64) -> Result<()> {
        let round = |event: &Value| event["event"] == "round" && event["n"].as_u64() >= Some(n);
        self.until(&format!("the end of round {n}"), round).map(drop)
    }

    /// Presses Ctrl-C.
    pub fn interrupt(&self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        let pid = pid.doing("name a process")?;
        rustix::process::kill_process(pid, rustix::process::Signal::INT).doing("interrupt the command")
    }

    /// Waits for its end, but not longer. Whether it has come.
    pub fn ends_within(&mut self, within: Duration) -> Result<bool> {
        let end = Instant::now() + within;
        while self.child.try_wait().doing(&self.name)?.is_none() {
            if Instant::now() > end {
                return Ok(false);
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(true)
    }

    /// Waits for its end; its exit status and its report.
    pub fn end(mut self) -> Result<(i32, Report)> {
        let status =
            wait_for(&format!("the end of {}", self.name), PATIENCE, || self.child.try_wait().doing("wait"))?;
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        let complaints = self.complaints.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        let last = self.events().pop().doing(format!("read the report of {}: {complaints}", self.name))?;
        Ok((status.code().unwrap_or(-1), Report(last)))
    }

    /// Waits for its end, which must be a completed migration.
    pub fn completed(self) -> Result<Report> {
        let name = self.name.clone();
        let (status, report) = self.end()?;
        if status == 0 && report.outcome() == "completed" {
            return Ok(report);
        }
        Err(Error::new(name, format!("exit status {status}: {}", report.0)))
    }

    /// Waits for its end, which must be this outcome with this exit status.
    pub fn ended(self, outcome: &str, status: i32) -> Result<Report> {
        let name = self.name.clone();
        let (real, report) = self.end()?;
        if real == status && report.outcome() == outcome {
            return Ok(report);
        }
        let words = format!("exit status {real}, not {status} with outcome {outcome}: {}", report.0);
        Err(Error::new(name, words))
    }
}

impl Drop for Migration {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Report {
    /// The report in the last line of a finished command.
    pub fn of(answer: &Answer) -> Result<Self> {
        answer.json().map(Self)
    }

    /// `completed`, `failed`, `cancelled` or `in-doubt`.
    pub fn outcome(&self) -> &str {
        self.0["outcome"].as_str().unwrap_or("none")
    }

    /// The mode that it ended in.
    pub fn mode(&self) -> &str {
        self.0["mode"].as_str().unwrap_or("none")
    }

    /// A number, by its path such as `pages.zero`.
    pub fn number(&self, path: &str) -> Result<f64> {
        let found = path.split('.').fold(&self.0, |value, key| &value[key]);
        found.as_f64().doing(format!("find {path} in the report {}", self.0))
    }

    /// Whether both sides' memory was compared and the same.
    pub fn verified(&self) -> Option<bool> {
        self.0["verified"].as_bool()
    }

    /// Its error: what, where, why in one string.
    pub fn error(&self) -> String {
        self.0["error"].to_string()
    }

    /// Who runs the VM after a failure.
    pub fn vm_runs_on(&self) -> Option<&str> {
        self.0["error"]["vm_runs_on"].as_str()
    }
}

fn locked(events: &Mutex<Vec<Value>>) -> MutexGuard<'_, Vec<Value>> {
    events.lock().unwrap_or_else(PoisonError::into_inner)
}
