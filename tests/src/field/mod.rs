//! VMs as people, managers and clouds start them: adopted, moved there and back in every mode, and compared.

mod case;

use crate::{Doing, Error, HugePages, Process, QEMU, Qmp, Result, Stage, bare, ensure, wait_for};
pub use case::{Case, Inside, cases};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

const SOON: Duration = Duration::from_secs(60);

/// There, back, and there again.
const MODES: [&str; 3] = ["pre-copy", "post-copy", "hybrid"];

/// What Debian's package installs.
const OVMF: &str = "/usr/share/OVMF";

/// The firmware that QEMU takes by itself.
const BIOS: &str = "/usr/share/seabios/bios-256k.bin";

/// What says what a machine is: its devices with their properties, its buses, its drives.
const LOOKS: [&str; 5] = ["info qtree", "info pci", "info block", "info chardev", "info network"];

/// What is said of this host's end of a device, not of the device.
///
/// `Cache mode` follows from what the guest has agreed on with its disk, and is set anew when it does so again; QEMU's own
/// migration does the same.
const OF_THE_HOST: [&str; 7] =
    ["audiodev = ", "chardev = ", "netdev = ", "drive = ", "Cache mode:", "ifname=", "filename="];

/// Lets one VM live: `n` tells its name and its places apart from those of others.
pub fn live(stage: &Stage, case: &Case, n: usize) -> Result<()> {
    let name = format!("field{n}");
    let dir = stage.lab.dir().join(&name);
    let tap = format!("t-{name}");
    let mut pages = None;
    if case.huge_mib > 0 {
        let Some(reserved) = HugePages::reserve(case.huge_mib << 20)? else { return Ok(()) };
        pages.insert(reserved).mount(&dir.join("huge"))?;
    }
    let taken = case.command.contains("{tap}");
    if taken {
        stage.lab.host("a").add_tap(&tap)?;
    }
    let lived = Life::begin(stage, case, &name, &dir, &tap).and_then(|mut life| life.goes());
    // Whatever has become of it.
    for host in ["a", "b"] {
        let _ = stage.agent(host).cli().run(["stop", &name]);
    }
    if taken {
        let _ = stage.lab.host("a").namespace.ip(&format!("link del {tap}"));
    }
    drop(pages);
    let _ = fs::remove_dir_all(&dir);
    lived.map_err(|error| Error::new(format!("{} ({}): {}", case.name, case.who, error.what), error.why))
}

struct Life<'a> {
    stage: &'a Stage<'a>,
    case: &'a Case,
    name: String,
    vcpus: usize,
    socket: PathBuf,
    // Ends with the case, if it was never moved.
    _process: Process,
}

impl<'a> Life<'a> {
    fn begin(stage: &'a Stage, case: &'a Case, name: &str, dir: &Path, tap: &str) -> Result<Self> {
        files(case, dir)?;
        let socket = dir.join("qmp.sock");
        let place = |line: &str| {
            line.replace("{dir}", &dir.display().to_string())
                .replace("{qmp}", &socket.display().to_string())
                .replace("{tap}", tap)
                .replace("{ovmf}", OVMF)
                .replace("{huge}", &dir.join("huge").display().to_string())
        };
        let host = stage.lab.host("a");
        let mut command = host.namespace.command(QEMU);
        let words = case.words(place);
        command.args(&words);
        let mut process = host.spawn(name, &mut command)?;
        let mut qmp = wait_for("a monitor", SOON, || {
            process.must_live()?;
            Ok(socket.exists().then(|| Qmp::connect(&socket).ok()).flatten())
        })?;
        let vcpus = qmp.vcpus()?.len();
        // A launcher that has it wait lets it go now.
        if words.iter().any(|word| word == "-S") {
            qmp.execute("cont", json!({}))?;
        }
        let life = Self { stage, case, name: name.to_owned(), vcpus, socket, _process: process };
        if case.guest == Inside::Bare {
            life.bare().works(&mut qmp, 1)?;
        }
        Ok(life)
    }

    fn bare(&self) -> bare::Guest {
        bare::Guest { vcpus: self.vcpus.min(bare::MOST_VCPUS) }
    }

    fn goes(&mut self) -> Result<()> {
        let socket = self.socket.to_string_lossy().into_owned();
        let answer = self.stage.agent("a").cli().run(["adopt", &self.name, "--qmp", &socket])?;
        if let Some(words) = &self.case.refused {
            return answer.exited(1)?.says(&[words]).map(drop);
        }
        answer.succeeded()?;
        let before = look(&mut Qmp::connect(&self.socket)?)?;
        let hosts = ["a", "b"];
        for (n, mode) in MODES.into_iter().enumerate() {
            let (from, to) = (hosts[n % 2], hosts[(n + 1) % 2]);
            let options = ["--mode", mode, "--verify"];
            let report = self.stage.start_migration(&self.name, from, to, &options)?.completed()?;
            ensure!(report.verified() == Some(true), "memory was compared: {}", report.0);
            let shown = self.stage.show(to, &self.name)?.doing("find it")?;
            let mut qmp = Qmp::connect(Path::new(shown["qmp"].as_str().doing("find its monitor")?))?;
            match self.case.guest {
                Inside::Bare => self.bare().goes_on(&mut qmp)?,
                Inside::Firmware => {
                    let status = qmp.execute("query-status", json!({}))?;
                    ensure!(status["status"] == "running", "it runs: {status}");
                }
            }
            self.compare(&before, &look(&mut qmp)?).map_err(|error| Error::new(mode, error))?;
        }
        self.stage.runs_only_on(&self.name, "b")
    }

    /// Two looks at it differ in what is listed only.
    fn compare(&self, before: &[Vec<String>], after: &[Vec<String>]) -> Result<()> {
        for ((what, before), after) in LOOKS.iter().zip(before).zip(after) {
            let by_right = |line: &&String| {
                OF_THE_HOST.iter().any(|key| line.contains(key))
                    || self.case.differs.iter().any(|differs| line.contains(&differs.line))
            };
            let only = |these: &[String], those: &[String]| -> Vec<String> {
                let mut rest = those.to_vec();
                let missing = |line: &&String| match rest.iter().position(|other| other == *line) {
                    Some(at) => {
                        rest.swap_remove(at);
                        false
                    }
                    None => true,
                };
                these.iter().filter(missing).filter(|line| !by_right(line)).cloned().collect()
            };
            let (gone, new) = (only(before, after), only(after, before));
            ensure!(gone.is_empty() && new.is_empty(), "{what}: gone {gone:#?}, new {new:#?}");
        }
        Ok(())
    }
}

/// What a VM is, line by line.
fn look(qmp: &mut Qmp) -> Result<Vec<Vec<String>>> {
    let mut all = Vec::new();
    for line in LOOKS {
        let said = qmp.human(line)?;
        let lines = said.lines().map(str::trim_end);
        all.push(match line {
            "info network" => lines.filter(|line| line.contains("type=nic")).map(card).collect(),
            _ => lines.map(without_numbers).collect(),
        });
    }
    Ok(all)
}

/// A network card, whatever it is plugged into on this host.
fn card(line: &str) -> String {
    let mut parts = line.trim_start_matches(" \\ ").rsplit(": ");
    let (what, name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    format!("{name}: {what}")
}

/// Without the names that QEMU makes up anew each time (`#block123`).
fn without_numbers(line: &str) -> String {
    let mut parts = line.split('#');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let kind = part.trim_start_matches(|c: char| c.is_ascii_alphabetic());
        let name = &part[..part.len() - kind.len()];
        text.push('#');
        text.push_str(name);
        text.push_str(if name.is_empty() {
            kind
        } else {
            kind.trim_start_matches(|c: char| c.is_ascii_digit())
        });
    }
    text
}

/// What its command line names.
fn files(case: &Case, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).doing(format!("make {}", dir.display()))?;
    let disk = bare::make_disk(dir)?;
    fs::rename(&disk, dir.join("disk.img")).doing("name the disk")?;
    if case.command.contains("disk.qcow2") {
        let convert = ["convert", "-q", "-f", "raw", "-O", "qcow2", "disk.img", "disk.qcow2"];
        crate::run(Command::new("qemu-img").args(convert).current_dir(dir))?;
    }
    fs::write(dir.join("cd.iso"), "a medium\n".repeat(1 << 16)).doing("make a medium")?;
    if case.command.contains("over.qcow2") {
        let base = dir.join("disk.img").display().to_string();
        let create = ["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", "over.qcow2"];
        crate::run(Command::new("qemu-img").args(create).current_dir(dir))?;
    }
    if case.command.contains("bios.bin") {
        let bios = Path::new(BIOS);
        fs::copy(bios, dir.join("bios.bin")).doing(format!("copy {}", bios.display()))?;
    }
    if case.command.contains("vars.fd") {
        let vars = Path::new(OVMF).join("OVMF_VARS_4M.fd");
        fs::copy(&vars, dir.join("vars.fd")).doing(format!("copy {}", vars.display()))?;
    }
    Ok(())
}
