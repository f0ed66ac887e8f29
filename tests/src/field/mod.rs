//! VMs as people, managers and clouds start them: adopted, moved there and back in every mode, and compared.

mod case; // a data file
mod linux; // a Linux guest that uses what it has

use crate::{Doing, Error, HugePages, Process, QEMU, Qmp, Result, Spec, Stage, bare, ensure, wait_for};
pub use case::{Case, Inside, Use, cases};
use linux::Linux;
use serde_json::{Value, json};
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
/// `Cache mode` follows from what the guest has agreed on with its disk, and is set anew when it does so
/// again; QEMU's own migration does the same.
const OF_THE_HOST: [&str; 7] =
    ["audiodev = ", "chardev = ", "netdev = ", "drive = ", "Cache mode:", "ifname=", "filename="];

/// Lets one VM live: `n` tells its name and its places apart from those of others.
pub fn live(stage: &Stage, case: &Case, n: usize) -> Result<()> {
    let name = format!("field{n}");
    let dir = stage.lab.dir().join(&name);
    let tap = format!("t-{name}");
    let mut pages = None;
    if case.huge_mib > 0 || case.huge_gib > 0 {
        let reserved = match case.huge_gib {
            0 => HugePages::reserve(case.huge_mib << 20)?,
            gib => HugePages::reserve_largest(gib << 30)?,
        };
        let Some(reserved) = reserved else { return Ok(()) };
        pages.insert(reserved).mount(&dir.join("huge"))?;
    }
    let taken = [&case.command, &case.launcher].iter().any(|text| text.contains("{tap}"));
    if taken {
        stage.lab.host("a").add_tap(&tap)?;
    }
    let lived = Life::begin(stage, case, n, &dir, &tap).and_then(|mut life| life.goes());
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

/// Who is in the VM.
enum Guest<'a> {
    Bare(bare::Guest),
    Linux(Box<Linux<'a>>),
    Firmware,
}

struct Life<'a> {
    stage: &'a Stage<'a>,
    case: &'a Case,
    name: String,
    guest: Guest<'a>,
    socket: PathBuf,
    // These end with the case, if it was never moved.
    _process: Process,
    _tpm: Option<Process>,
}

impl<'a> Life<'a> {
    fn begin(stage: &'a Stage, case: &'a Case, n: usize, dir: &Path, tap: &str) -> Result<Self> {
        let name = format!("field{n}");
        files(case, dir)?;
        let (socket, tpm) = (dir.join("qmp.sock"), dir.join("tpm.sock"));
        let place = |line: &str| {
            line.replace("{dir}", &dir.display().to_string())
                .replace("{qmp}", &socket.display().to_string())
                .replace("{tap}", tap)
                .replace("{ovmf}", OVMF)
                .replace("{huge}", &dir.join("huge").display().to_string())
                .replace("{tpm}", &tpm.display().to_string())
        };
        let swtpm = if case.command.contains("{tpm}") { Some(start_tpm(stage, &name, &tpm)?) } else { None };
        let host = stage.lab.host("a");
        let mut command = host.namespace.command("sh");
        command.args(["-ec", &format!("{}\nexec \"$@\"", place(&case.launcher)), "sh", QEMU]);
        let mut words = case.words(place);
        let spec = linux::spec(n, case);
        if case.guest == Inside::Linux {
            words.extend(linux::words(stage, &spec));
        }
        command.args(&words);
        let mut process = host.spawn(&name, &mut command)?;
        let mut qmp = wait_for("a monitor", SOON, || {
            process.must_live()?;
            Ok(socket.exists().then(|| Qmp::connect(&socket).ok()).flatten())
        })?;
        // A launcher that has it wait lets it go now.
        if words.iter().any(|word| word == "-S") {
            qmp.execute("cont", json!({}))?;
        }
        let guest = inhabitant(stage, case, &spec, dir, &mut qmp)?;
        Ok(Self { stage, case, name, guest, socket, _process: process, _tpm: swtpm })
    }

    fn goes(&mut self) -> Result<()> {
        let socket = self.socket.to_string_lossy().into_owned();
        let answer = self.stage.agent("a").cli().run(["adopt", &self.name, "--qmp", &socket])?;
        if let Some(words) = &self.case.refused {
            return answer.exited(1)?.says(&[words]).map(drop);
        }
        answer.succeeded()?;
        let hosts = ["a", "b"];
        for (n, mode) in MODES.into_iter().enumerate() {
            let (from, to) = (hosts[n % 2], hosts[(n + 1) % 2]);
            let (mut qmp, _) = self.monitor(from)?;
            if let Guest::Linux(guest) = &mut self.guest {
                guest.before(&mut qmp)?;
            }
            let before = look(&mut qmp)?;
            drop(qmp);
            let options = ["--mode", mode, "--verify"];
            let report = self.stage.start_migration(&self.name, from, to, &options)?.completed()?;
            ensure!(report.verified() == Some(true), "memory was compared: {}", report.0);
            let (mut qmp, shown) = self.monitor(to)?;
            self.compare(&before, &look(&mut qmp)?).map_err(|error| Error::new(mode, error))?;
            self.is_right(&mut qmp, &shown).map_err(|error| Error::new(mode, error))?;
        }
        if let Guest::Linux(guest) = &mut self.guest {
            let (socket, _) = monitor(self.stage, "b", &self.name)?;
            guest.reboots(self.stage, &mut Qmp::connect(&socket)?)?;
        }
        self.stage.runs_only_on(&self.name, "b")
    }

    /// A connection to its monitor, and what its host says of it.
    fn monitor(&self, host: &str) -> Result<(Qmp, Value)> {
        let (socket, shown) = monitor(self.stage, host, &self.name)?;
        Ok((Qmp::connect(&socket)?, shown))
    }

    /// Where it is now, its guest does and finds what it should.
    fn is_right(&mut self, qmp: &mut Qmp, shown: &Value) -> Result<()> {
        match &mut self.guest {
            Guest::Bare(guest) => {
                guest.goes_on(qmp)?;
                if self.case.blank.is_none() {
                    guest.shows_what_it_draws(qmp)?;
                }
                Ok(())
            }
            Guest::Linux(guest) => guest.after(qmp, shown),
            Guest::Firmware => {
                let status = qmp.execute("query-status", json!({}))?;
                ensure!(status["status"] == "running", "it runs: {status}");
                Ok(())
            }
        }
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

/// Who is in it, once he is at work.
fn inhabitant<'a>(
    stage: &Stage,
    case: &'a Case,
    spec: &Spec,
    dir: &Path,
    qmp: &mut Qmp,
) -> Result<Guest<'a>> {
    Ok(match case.guest {
        Inside::Bare => {
            let guest = bare::Guest { vcpus: qmp.vcpus()?.len().min(bare::MOST_VCPUS) };
            guest.works(qmp, 1)?;
            guest.shows_what_it_draws(qmp)?;
            Guest::Bare(guest)
        }
        Inside::Linux => {
            let mut guest = Linux::reach(stage, case, spec, dir)?;
            guest.begins()?;
            Guest::Linux(Box::new(guest))
        }
        Inside::Firmware => Guest::Firmware,
    })
}

/// Where its monitor is, and what its host says of it.
fn monitor(stage: &Stage, host: &str, name: &str) -> Result<(PathBuf, Value)> {
    let shown = stage.show(host, name)?.doing(format!("find {name} on {host}"))?;
    Ok((shown["qmp"].as_str().doing("find its monitor")?.into(), shown))
}

/// A TPM, as a launcher starts one.
fn start_tpm(stage: &Stage, name: &str, socket: &Path) -> Result<Process> {
    let host = stage.lab.host("a");
    let state = socket.with_extension("state");
    fs::create_dir_all(&state).doing(format!("make {}", state.display()))?;
    let mut command = host.namespace.command("swtpm");
    command.args(["socket", "--tpm2", "--tpmstate"]).arg(format!("dir={}", state.display()));
    command.arg("--ctrl").arg(format!("type=unixio,path={}", socket.display()));
    let mut swtpm = host.spawn(&format!("swtpm-{name}"), &mut command)?;
    wait_for("a TPM", SOON, || {
        swtpm.must_live()?;
        Ok(socket.exists().then_some(()))
    })?;
    Ok(swtpm)
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
    if [&case.command, &case.launcher].iter().any(|text| text.contains("disk.qcow2")) {
        let convert = ["convert", "-q", "-f", "raw", "-O", "qcow2", "disk.img", "disk.qcow2"];
        crate::run(Command::new("qemu-img").args(convert).current_dir(dir))?;
    }
    fs::write(dir.join("cd.iso"), "a medium\n".repeat(1 << 16)).doing("make a medium")?;
    if case.uses.contains(&Use::Disc) {
        fs::write(dir.join(linux::OTHER), "another medium\n".repeat(1 << 15)).doing("make another medium")?;
    }
    for (name, text) in &case.files {
        fs::write(dir.join(name), text.replace("{dir}", &dir.display().to_string())).doing(name)?;
    }
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
