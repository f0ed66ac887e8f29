//! A QEMU without a machine, started only to be asked.

use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

/// How long a QEMU may take for all its answers: it needs 50 ms; a host in trouble may need seconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// More than this is no answer to these questions: 7.2 says 60 KB.
const ANSWER_LIMIT: u64 = 8 << 20;

/// What a QEMU says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Answers {
    pub(super) version: (u32, u32, u32),
    /// What the alias `q35` stands for.
    pub(super) q35: Option<String>,
    pub(super) microvm: Option<String>,
    pub(super) saves_device_state: bool,
    pub(super) ignores_shared: bool,
    pub(super) memfd_backend: bool,
    pub(super) file_backend: bool,
}

/// Starts the binary, asks, ends it.
pub(super) fn ask(binary: &Path) -> Result<Answers, String> {
    let questions = [
        json!({"execute": "qmp_capabilities"}),
        json!({"execute": "query-version"}),
        json!({"execute": "query-machines"}),
        json!({"execute": "query-commands"}),
        json!({"execute": "query-migrate-capabilities"}),
        json!({"execute": "qom-list-types", "arguments": {"implements": "memory-backend"}}),
    ];
    let replies = talk(binary, &questions)?;
    understand(&replies[1..]).ok_or_else(|| "its answers are not those of a QEMU".to_owned())
}

/// Ends its process however it is left.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // Killed: it has nothing that could be lost. An error means that it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The replies to `questions`, in their order.
fn talk(binary: &Path, questions: &[Value]) -> Result<Vec<Value>, String> {
    let child = Command::new(binary)
        .args(["-M", "none", "-S", "-display", "none", "-nodefaults", "-no-user-config", "-qmp", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    let mut qemu = Ended(child);
    let (Some(mut stdin), Some(stdout), Some(stderr)) =
        (qemu.0.stdin.take(), qemu.0.stdout.take(), qemu.0.stderr.take())
    else {
        return Err("no pipes to it".to_owned());
    };
    // The readers end with the process: it holds the other ends.
    let (lines, said) = channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout.take(ANSWER_LIMIT)).lines().map_while(Result::ok) {
            if lines.send(line).is_err() {
                return;
            }
        }
    });
    let complaint = thread::spawn(move || {
        let mut text = String::new();
        let _ = BufReader::new(stderr.take(ANSWER_LIMIT)).read_to_string(&mut text);
        text
    });

    let text: String = questions.iter().map(|q| format!("{q}\n")).collect();
    // All of it fits in a pipe, so this waits for nobody; where it died at once, its silence below is the
    // error.
    let _ = stdin.write_all(text.as_bytes());
    let until = Instant::now() + PATIENCE;
    let mut replies = Vec::new();
    while replies.len() < questions.len() {
        match said.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) => replies.extend(reply(&line)),
            Err(RecvTimeoutError::Timeout) => return Err(format!("no answer within {PATIENCE:?}")),
            Err(RecvTimeoutError::Disconnected) => {
                drop(qemu);
                let complaint = complaint.join().unwrap_or_default();
                let last =
                    complaint.lines().rfind(|l| !l.trim().is_empty()).unwrap_or("it ended without an answer");
                return Err(last.trim().to_owned());
            }
        }
    }
    Ok(replies)
}

/// What a line says if it answers a question; the greeting and events do not. An error is an answer without
/// content.
fn reply(line: &str) -> Option<Value> {
    let mut value: Value = serde_json::from_str(line).ok()?;
    let answer = value.get_mut("return").map(Value::take);
    answer.or_else(|| value.get("error").map(|_| Value::Null))
}

/// What the replies to all questions but the first say; `None` when the essential ones say nothing.
fn understand(replies: &[Value]) -> Option<Answers> {
    let [version, machines, commands, capabilities, backends] = replies else { return None };
    let part = |name: &str| version["qemu"][name].as_u64().and_then(|n| u32::try_from(n).ok());
    let machines = machines.as_array()?;
    // An entry may be the alias itself or the machine that it stands for.
    let pinned = |name: &str| {
        machines.iter().find(|m| m["alias"] == name || m["name"] == name)?["name"].as_str().map(str::to_owned)
    };
    let has = |list: &Value, key: &str, wanted: &str| {
        list.as_array().is_some_and(|all| all.iter().any(|entry| entry[key] == wanted))
    };
    Some(Answers {
        version: (part("major")?, part("minor")?, part("micro")?),
        q35: pinned("q35"),
        microvm: pinned("microvm"),
        saves_device_state: has(commands, "name", "xen-save-devices-state"),
        ignores_shared: has(capabilities, "capability", "x-ignore-shared"),
        memfd_backend: has(backends, "name", "memory-backend-memfd"),
        file_backend: has(backends, "name", "memory-backend-file"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_from_greetings_events_and_noise() {
        assert_eq!(reply(r#"{"QMP": {"version": {}}}"#), None);
        assert_eq!(reply(r#"{"event": "STOP"}"#), None);
        assert_eq!(reply("Segmentation fault"), None);
        assert_eq!(reply(r#"{"return": 3}"#), Some(json!(3)));
        assert_eq!(reply(r#"{"error": {"class": "CommandNotFound"}}"#), Some(Value::Null));
    }

    #[test]
    fn answers_of_any_shape_are_understood_or_refused() {
        let version = json!({"qemu": {"major": 7, "minor": 2, "micro": 22}});
        let machines = json!([{"name": "pc-q35-7.2", "alias": "q35"}, {"name": "none"}]);
        let commands = json!([{"name": "xen-save-devices-state"}]);
        let answers = understand(&[version.clone(), machines, commands, Value::Null, json!({})]).unwrap();
        assert_eq!(answers.version, (7, 2, 22));
        assert_eq!((answers.q35.as_deref(), answers.microvm), (Some("pc-q35-7.2"), None));
        assert!(answers.saves_device_state && !answers.ignores_shared && !answers.memfd_backend);

        let nothing = || vec![Value::Null; 5];
        assert_eq!(understand(&nothing()), None);
        assert_eq!(understand(&nothing()[1..]), None);
        let mut negative = nothing();
        negative[0] = json!({"qemu": {"major": -7, "minor": 2, "micro": 22}});
        assert_eq!(understand(&negative), None);
    }
}
