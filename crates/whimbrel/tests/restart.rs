//! An agent's end and its next start, with a real QEMU: it must not notice either.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::{
    cell::Cell,
    fs,
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

const WHIMBREL: &str = env!("CARGO_BIN_EXE_whimbrel");
const PATIENCE: Duration = Duration::from_secs(60);

struct Host {
    dir: tempfile::TempDir,
    agent: Child,
    // The VM's process, once it was seen.
    vm: Cell<Option<Pid>>,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let agent = spawn(dir.path());
        Self { dir, agent, vm: Cell::new(None) }
    }

    fn restart(&mut self, signal: Signal) {
        kill_process(Pid::from_child(&self.agent), signal).unwrap();
        self.agent.wait().unwrap();
        self.agent = spawn(self.dir.path());
    }

    fn type_in(&self, line: &str) -> Output {
        let mut command = Command::new(WHIMBREL);
        command.args(line.split(' ')).current_dir(self.dir.path()).stdin(Stdio::null());
        command.env("WHIMBREL_SOCKET", self.dir.path().join("run/agent.sock")).output().unwrap()
    }

    fn show(&self) -> Value {
        let shown: Value = serde_json::from_slice(&self.type_in("show web1 --json").stdout).unwrap();
        if let Some(pid) = shown["pid"].as_i64() {
            self.vm.set(Pid::from_raw(pid as i32));
        }
        shown
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.type_in("stop web1");
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        // An agent that failed has not stopped it.
        if let Some(vm) = self.vm.get() {
            let words = fs::read(format!("/proc/{}/cmdline", vm.as_raw_nonzero())).unwrap_or_default();
            if String::from_utf8_lossy(&words).contains(&*self.dir.path().to_string_lossy()) {
                let _ = kill_process(vm, Signal::KILL);
            }
        }
    }
}

/// An agent that answers.
fn spawn(dir: &Path) -> Child {
    if !dir.join("tls").exists() {
        for line in ["pki init --dir ca", "pki issue hosta --dir ca --out tls"] {
            let made = Command::new(WHIMBREL).args(line.split(' ')).current_dir(dir).output().unwrap();
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        }
    }
    let mut agent = Command::new(WHIMBREL)
        .args(["agent", "--name", "hosta", "--listen", "127.0.0.1:0", "--state-dir"])
        .arg(dir.join("state"))
        .arg("--runtime-dir")
        .arg(dir.join("run"))
        .arg("--tls")
        .arg(dir.join("tls"))
        .env_remove("WHIMBREL_SOCKET")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let end = Instant::now() + PATIENCE;
    while std::os::unix::net::UnixStream::connect(dir.join("run/agent.sock")).is_err() {
        if Instant::now() > end {
            let _ = agent.kill();
            panic!("the agent does not start");
        }
        thread::sleep(Duration::from_millis(10));
    }
    agent
}

#[test]
fn a_vm_outlives_its_agent_and_is_found_again() {
    if Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_err() {
        return eprintln!("SKIPPED: needs qemu-system-x86_64");
    }
    let mut host = Host::new();
    // Its firmware finds nothing to boot, and waits.
    let file = "name = \"web1\"\nvcpus = 1\nmemory = \"128MiB\"\n";
    fs::write(host.dir.path().join("web1.toml"), file).unwrap();
    let run = host.type_in("run web1.toml");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let before = host.show();
    assert_eq!(before["state"], "running");

    for signal in [Signal::TERM, Signal::KILL] {
        host.restart(signal);
        assert_eq!(host.show(), before, "after {signal:?}");
    }

    let qemu = Pid::from_raw(before["pid"].as_i64().unwrap() as i32).unwrap();
    kill_process(qemu, Signal::KILL).unwrap();
    let end = Instant::now() + PATIENCE;
    while host.show()["state"] != "gone" {
        assert!(Instant::now() < end, "{}", host.show());
        thread::sleep(Duration::from_millis(20));
    }
    host.restart(Signal::TERM);
    assert_eq!(host.show()["state"], "gone");
    assert!(host.type_in("stop web1").status.success());
    let left: Vec<_> = fs::read_dir(host.dir.path().join("run"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".qmp") || name.ends_with(".log"))
        .collect();
    assert_eq!(left, Vec::<String>::new(), "what belonged to it is gone with it");
}
