//! A Linux guest that uses what its machine has, and whether that is right wherever it is.

use super::{Case, Use};
use crate::{Channel, Doing, Guest, Qmp, Result, Spec, Stage, ensure, wait_for};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

const SOON: Duration = Duration::from_secs(60);

/// The port of a guest's agent.
const AGENT: &str = "org.qemu.guest_agent.0";

const MIB: u64 = 1 << 20;

/// What the host leaves the guest of its memory, in MiB, in one migration after the other.
const LEFT: [u64; 3] = [176, 256, 160];

/// What the host lets it have of its memory device, in MiB, in one migration after the other.
const GIVEN: [u64; 3] = [192, 32, 128];

/// That device.
const DEVICE: &str = "virtiomem0";

/// A variable of its firmware.
const VARIABLE: &str = "WhimbrelField";

/// Where guests of cases get their addresses from.
const FIRST: usize = 100;

/// What runs in the VM, and what it should find.
pub(super) struct Linux<'a> {
    guest: Guest,
    uses: &'a [Use],
    dir: PathBuf,
    /// The character device of its agent's channel.
    channel: String,
    /// How often its agent was asked.
    asked: u64,
    /// What is in the CD drive; nothing if it is empty.
    disc: Option<&'static str>,
    screen: Vec<u8>,
    pcrs: String,
    step: usize,
}

/// Who it is.
pub(super) fn spec(n: usize, case: &Case) -> Spec {
    let agent =
        if case.uses.contains(&Use::Agent) { format!(" whimbrel.agent={AGENT}") } else { String::new() };
    // Memory that is plugged in is used at once, in a way in which it can be given back.
    let memory = if case.uses.contains(&Use::Memory) { " memhp_default_state=online_movable" } else { "" };
    Spec::new((FIRST + n) as u8, format!("whimbrel.check=24M,rate=4M{agent}{memory}"))
}

/// What makes the VM boot it.
pub(super) fn words(stage: &Stage, spec: &Spec) -> Vec<String> {
    let file = |path: &Path| path.display().to_string();
    let (kernel, initrd) = (file(&stage.tools.kernel), file(&stage.tools.initrd));
    ["-kernel", &kernel, "-initrd", &initrd, "-append", &spec.command_line("q35")].map(str::to_owned).into()
}

impl<'a> Linux<'a> {
    /// Waits until it has booted.
    pub(super) fn reach(stage: &Stage, case: &'a Case, spec: &Spec, dir: &Path) -> Result<Self> {
        let guest = Guest::reach(&stage.client, spec)?;
        let line =
            case.command.lines().find(|line| line.contains("path={dir}/agent.sock")).unwrap_or_default();
        let channel = line.split(['"', ',', ' ', ':']).find_map(|word| word.strip_prefix("id="));
        let linux = Self {
            guest,
            uses: &case.uses,
            dir: dir.to_owned(),
            channel: channel.unwrap_or_default().to_owned(),
            asked: 0,
            disc: Some("cd.iso"),
            screen: Vec::new(),
            pcrs: String::new(),
            step: 0,
        };
        if linux.does(Use::Variables) {
            linux.guest.order(&format!("keep {VARIABLE} {}", spec.number))?;
        }
        Ok(linux)
    }

    fn does(&self, what: Use) -> bool {
        self.uses.contains(&what)
    }

    /// What it does before it is moved once more, through the monitor of its QEMU.
    pub(super) fn before(&mut self, qmp: &mut Qmp) -> Result<()> {
        if self.does(Use::Disc) {
            self.change_disc(qmp)?;
            self.reads_disc()?;
        }
        if self.does(Use::Screen) {
            let answer = self.guest.ask(&format!("draw {}", self.step))?;
            ensure!(answer.starts_with("ok"), "it draws: {answer}");
            let before = std::mem::replace(&mut self.screen, qmp.picture()?);
            ensure!(before != self.screen, "another picture than before");
        }
        if self.does(Use::Tpm) && self.pcrs.is_empty() {
            self.pcrs = self.guest.ask("pcrs")?;
            ensure!(self.pcrs.split(' ').count() == 24, "PCRs: {}", self.pcrs);
        }
        if self.does(Use::Balloon) {
            // It moves while its VM does.
            qmp.execute("balloon", json!({ "value": LEFT[self.step % LEFT.len()] * MIB }))?;
        }
        if self.does(Use::Memory) {
            let asked = GIVEN[self.step % GIVEN.len()] * MIB;
            let path = format!("/machine/peripheral/{DEVICE}");
            let set = json!({ "path": path, "property": "requested-size", "value": asked });
            qmp.execute("qom-set", set)?;
        }
        self.step += 1;
        Ok(())
    }

    /// What must hold where it is now: `shown` is what its agent's host says of the VM.
    pub(super) fn after(&mut self, qmp: &mut Qmp, shown: &Value) -> Result<()> {
        self.guest.runs()?;
        self.guest.verify()?;
        if self.does(Use::Disc) {
            self.reads_disc()?;
        }
        if self.does(Use::Screen) {
            ensure!(qmp.picture()? == self.screen, "the screen shows what it showed");
        }
        if self.does(Use::Tpm) {
            ensure!(self.guest.ask("pcrs")? == self.pcrs, "its TPM is what it was");
        }
        if self.does(Use::Balloon) {
            let wanted = LEFT[(self.step - 1) % LEFT.len()] * MIB;
            wait_for("the balloon at the size that was asked for", SOON, || {
                let said = qmp.execute("query-balloon", json!({}))?;
                Ok((said["actual"] == wanted).then_some(()))
            })?;
            self.guest.verify()?;
        }
        if self.does(Use::Memory) {
            let wanted = GIVEN[(self.step - 1) % GIVEN.len()] * MIB;
            wait_for("the memory that was asked for", SOON, || {
                let said = qmp.execute("query-memory-devices", json!({}))?;
                let mut devices = said.as_array().into_iter().flatten().map(|device| &device["data"]);
                Ok(devices.any(|data| data["id"] == DEVICE && data["size"] == wanted).then_some(()))
            })?;
            self.guest.verify()?;
        }
        if self.does(Use::Agent) {
            let ports = shown["ports"].as_array().into_iter().flatten();
            let link = ports
                .filter(|port| port["id"] == self.channel.as_str())
                .find_map(|port| port["link"].as_str());
            self.talks(Path::new(link.doing(format!("find the port {} in {shown}", self.channel))?))?;
        }
        self.remembers()
    }

    /// It talks to its host over the agent's channel.
    pub(super) fn begins(&mut self) -> Result<()> {
        if self.does(Use::Agent) {
            self.talks(&self.dir.join("agent.sock"))?;
        }
        Ok(())
    }

    fn talks(&mut self, socket: &Path) -> Result<()> {
        let count = Channel::connect(socket)?.ask("hello")?;
        ensure!(count == self.asked, "the agent was asked {count} times before, not {}", self.asked);
        self.asked += 1;
        Ok(())
    }

    /// Its firmware keeps its variable.
    fn remembers(&self) -> Result<()> {
        if self.does(Use::Variables) {
            let said = self.guest.ask(&format!("kept {VARIABLE}"))?;
            ensure!(said == format!("ok {}", self.guest.spec().number), "a variable: {said}");
        }
        Ok(())
    }

    /// Boots it once more, where that is to be shown.
    pub(super) fn reboots(&mut self, stage: &Stage, qmp: &mut Qmp) -> Result<()> {
        if !self.does(Use::Variables) {
            return Ok(());
        }
        qmp.execute("system_reset", json!({}))?;
        qmp.named("RESET")?;
        self.guest = Guest::reach(&stage.client, &self.guest.spec().clone())?;
        self.remembers()
    }

    /// First the medium of the command line; then none; then another one.
    fn change_disc(&mut self, qmp: &mut Qmp) -> Result<()> {
        let drives = qmp.execute("query-block", json!({}))?;
        let mut drives = drives.as_array().into_iter().flatten();
        let drive = drives.find(|drive| !drive["tray_open"].is_null()).doing("find a CD drive")?;
        let id = &drive["qdev"];
        match self.step {
            0 => {}
            1 => {
                qmp.execute("eject", json!({ "id": id, "force": true }))?;
                self.disc = None;
            }
            _ => {
                let file = self.dir.join(OTHER);
                let medium = json!({ "id": id, "filename": file, "format": "raw", "force": true });
                qmp.execute("blockdev-change-medium", medium)?;
                self.disc = Some(OTHER);
            }
        }
        Ok(())
    }

    fn reads_disc(&self) -> Result<()> {
        let wanted = match self.disc {
            None => "empty".to_owned(),
            Some(name) => {
                let bytes = fs::read(self.dir.join(name)).doing("read a medium")?;
                format!("ok {} {:016x}", bytes.len(), sum(&bytes))
            }
        };
        let said = self.guest.ask("disc")?;
        ensure!(said == wanted, "the CD: {said}, not {wanted}");
        Ok(())
    }
}

/// The other medium.
pub(super) const OTHER: &str = "other.iso";

/// FNV-1a, as the guest adds up.
fn sum(bytes: &[u8]) -> u64 {
    let offset = 0xcbf2_9ce4_8422_2325;
    bytes.iter().fold(offset, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
