//! An agent on a host of the laboratory.

use crate::{Cli, Doing, Error, Host, Process, Result, Tools, wait_for};
use rustix::process::Signal;
use serde_json::Value;
use std::{
    fmt::Write as _,
    fs,
    io::{Read, Write},
    net::Ipv4Addr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

/// Where agents listen for each other.
pub const PORT: u16 = 7471;
/// How long an agent may take to be ready, or to end after SIGTERM.
const PATIENCE: Duration = Duration::from_secs(20);

/// How an agent of a story differs from the others.
#[derive(Clone, Debug, Default)]
pub struct Oddity {
    /// Further lines at the top of its configuration.
    pub lines: String,
    /// What VMs of other hosts may use there: the lines of `[allow]`. None: all that the laboratory's VMs are
    /// made of.
    pub allow: Option<String>,
    /// Its connections are not protected.
    pub plaintext: bool,
    /// Shell commands run before it, in a mount namespace of its own: to hide a file, or to show it another
    /// one.
    pub prelude: String,
}

/// An agent with a state and a runtime directory of its own. Dropping it kills it, as a crash would; its VMs
/// run on.
#[derive(Debug)]
pub struct Agent {
    host: Host,
    tools: Tools,
    config: PathBuf,
    prelude: String,
    process: Option<Process>,
}

impl Agent {
    /// Starts one on `host` that knows `peers` by name.
    pub fn start(host: &Host, peers: &[Host], tools: &Tools) -> Result<Self> {
        Self::start_odd(host, peers, tools, Oddity::default())
    }

    /// The same, with something odd about it.
    pub fn start_odd(host: &Host, peers: &[Host], tools: &Tools, odd: Oddity) -> Result<Self> {
        let Oddity { lines, allow, plaintext, prelude } = odd;
        let config = host.dir.join("agent.toml");
        let (dir, name) = (host.dir.display(), &host.name);
        let mut text = format!(
            "name = {name:?}\nstate-dir = \"{dir}/state\"\nruntime-dir = \"{dir}/run\"\n\
             listen = \"{}:{PORT}\"\n{}\n{lines}\n",
            host.address,
            if plaintext { "insecure-plaintext = true" } else { "" },
        );
        let files = pki::Files::within(&host.dir.join("tls"));
        // Writing to a string cannot fail.
        let _ = writeln!(text, "[tls]\nca = {:?}\ncert = {:?}\nkey = {:?}", files.ca, files.cert, files.key);
        // What the laboratory's VMs are made of.
        let above = |path: &Path| path.parent().map(Path::to_owned).unwrap_or_default();
        let (all, kernel, initrd) = (above(&host.dir), above(&tools.kernel), above(&tools.initrd));
        let usual = || {
            format!(
                "disks = [{all:?}]\nboot = [{all:?}, {kernel:?}, {initrd:?}, \"/usr/share/OVMF\"]\nspool = \
                 [{all:?}]"
            )
        };
        let _ = writeln!(text, "[allow]\n{}\n[peers]", allow.unwrap_or_else(usual));
        for peer in peers.iter().filter(|peer| peer.name != host.name) {
            let _ = writeln!(text, "{} = \"{}:{PORT}\"", peer.name, peer.address);
        }
        // Where a peer should be and nobody is.
        let _ = writeln!(text, "nowhere = \"{}:{PORT}\"", Ipv4Addr::new(10, 77, 0, 250));
        fs::write(&config, text).doing(format!("write {}", config.display()))?;
        let mut agent = Self { host: host.clone(), tools: tools.clone(), config, prelude, process: None };
        agent.begin()?;
        Ok(agent)
    }

    /// Starts it again after it was ended or killed.
    pub fn begin(&mut self) -> Result<()> {
        let mut command = self.host.namespace.command("sh");
        command.args(["-ec", &format!("{}\nexec \"$@\"", self.prelude), "sh"]).arg(&self.tools.whimbrel);
        command.arg("agent").arg("--config").arg(&self.config).env("WHIMBREL_LOG", "debug");
        let mut process = self.host.spawn("agent", &mut command)?;
        wait_for(&format!("the agent of {}", self.host.name), PATIENCE, || {
            process.must_live()?;
            Ok(ask(&self.socket(), "/v1/host").ok())
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// Kills it, as a crash would.
    pub fn crash(&mut self) -> Result<()> {
        self.process.take().doing("crash an agent that runs")?.kill()
    }

    /// Asks it to end and waits until it has.
    pub fn end(&mut self) -> Result<()> {
        let mut process = self.process.take().doing("end an agent that runs")?;
        process.signal(Signal::TERM)?;
        let status = process.wait(PATIENCE)?;
        let what = format!("the agent of {}", self.host.name);
        if status.success() { Ok(()) } else { Err(Error::new(what, format!("ended with {status}"))) }
    }

    /// Stops it without ending it: from outside it looks as if it had gone silent.
    pub fn freeze(&self) -> Result<()> {
        self.process.as_ref().doing("freeze an agent that runs")?.signal(Signal::STOP)
    }

    /// Ends [`Agent::freeze`].
    pub fn thaw(&self) -> Result<()> {
        self.process.as_ref().doing("thaw an agent that runs")?.signal(Signal::CONT)
    }

    /// Its process.
    pub fn process(&mut self) -> Result<&mut Process> {
        self.process.as_mut().doing("find an agent that runs")
    }

    /// The host that it runs on.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Where its API is.
    pub fn socket(&self) -> PathBuf {
        self.host.dir.join("run/agent.sock")
    }

    /// The command line that talks to it.
    pub fn cli(&self) -> Cli {
        Cli::new(&self.tools.whimbrel, Some(self.socket()))
    }

    /// What it says of itself.
    pub fn info(&self) -> Result<Value> {
        ask(&self.socket(), "/v1/host")
    }
}

/// One question to an agent's API, without the command line.
pub fn ask(socket: &Path, path: &str) -> Result<Value> {
    let what = || format!("ask {} for {path}", socket.display());
    let mut stream = UnixStream::connect(socket).doing(what())?;
    stream.set_read_timeout(Some(PATIENCE)).doing(what())?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: agent\r\nConnection: close\r\n\r\n").doing(what())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).doing(what())?;
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body).doing(what())?;
    serde_json::from_str(body).doing(what())
}
