//! A case of the field suite: who starts VMs like this, and how.

use crate::{Doing, Result};
use serde::Deserialize;
use std::{collections::BTreeMap, fs, path::Path};

/// One data file of `tests/field`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// The file's name.
    #[serde(skip)]
    pub name: String,
    /// Who starts VMs like this.
    pub who: String,
    /// Whether it is among those that everybody has: these are part of `./dev test`.
    #[serde(default)]
    pub everyday: bool,
    /// What runs in it.
    #[serde(default)]
    pub guest: Inside,
    /// QEMU's command line: a line for each option, a blank between the option and its value.
    ///
    /// `{dir}` is a directory of this case with `disk.img`, `disk.qcow2`, `over.qcow2` on the first of these,
    /// `bios.bin` and `cd.iso`, `{qmp}` the socket of a monitor, `{tap}` a TAP on a bridge, `{ovmf}` where
    /// OVMF's images are, `{huge}` a hugetlbfs, `{tpm}` the socket of a swtpm. What needs KVM is run by
    /// QEMU's translation.
    pub command: String,
    /// What its launcher does before it becomes QEMU: a shell's words, in a mount namespace of their own.
    #[serde(default)]
    pub launcher: String,
    /// Further files in its directory.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
    /// What a Linux guest uses, before it is moved and wherever it is then.
    #[serde(default)]
    pub uses: Vec<Use>,
    /// Why its screen shows nothing on another host until the guest sets it anew.
    #[serde(default)]
    pub blank: Option<String>,
    /// How much memory of explicit huge pages it takes. Where the machine has none to spare, the case is
    /// skipped, and that is said.
    #[serde(default)]
    pub huge_mib: u64,
    /// Of pages of 1 GiB, the same.
    #[serde(default)]
    pub huge_gib: u64,
    /// What is different on another host by right: a part of the line that shows it, and why.
    #[serde(default)]
    pub differs: Vec<Differs>,
    /// What `adopt` says, if it is refused.
    #[serde(default)]
    pub refused: Option<String>,
}

/// What runs in a VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Inside {
    /// The guest that works its memory and checks it, and draws on its screen.
    #[default]
    Bare,
    /// Linux, which checks its memory and uses what it has.
    Linux,
    /// The firmware alone.
    Firmware,
}

/// What a guest can use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Use {
    /// It reads its CD, which is taken out and replaced by another one.
    Disc,
    /// It draws.
    Screen,
    /// It answers its host on the channel of a guest agent (`{dir}/agent.sock`).
    Agent,
    /// Its balloon takes memory and gives it back, while it is moved.
    Balloon,
    /// Its memory device (`virtiomem0`) gives it memory and takes it away, while it is moved.
    Memory,
    /// Its firmware keeps a variable, also when it boots again at its last host.
    Variables,
    /// The PCRs of its TPM are what they were.
    Tpm,
}

/// A difference by right.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Differs {
    /// What is in the line that shows it.
    pub line: String,
    /// Why that is right. For readers.
    pub why: String,
}

/// All cases, by their names.
pub fn cases() -> Result<Vec<Case>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("field");
    let mut all = Vec::new();
    for entry in fs::read_dir(&folder).doing(format!("read {}", folder.display()))?.flatten() {
        let path = entry.path();
        let text = fs::read_to_string(&path).doing(format!("read {}", path.display()))?;
        let mut case: Case = toml::from_str(&text).doing(format!("understand {}", path.display()))?;
        case.name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        all.push(case);
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

impl Case {
    /// Its words, with what stands for places and without KVM.
    pub(super) fn words(&self, place: impl Fn(&str) -> String) -> Vec<String> {
        let mut words = Vec::new();
        for line in self.command.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let line = place(line);
            let (option, value) = match line.split_once(' ') {
                Some((option, value)) => (option.to_owned(), Some(value.trim().to_owned())),
                None => (line, None),
            };
            match (option.as_str(), value) {
                // Its process is watched here.
                ("-daemonize", _) => {}
                ("-enable-kvm", _) => words.extend(["-accel", "tcg"].map(str::to_owned)),
                ("-accel", Some(_)) => words.extend([option, "tcg".to_owned()]),
                ("-machine" | "-M", Some(value)) => {
                    words.extend([
                        option,
                        value.replace("accel=kvm:tcg", "accel=tcg").replace("accel=kvm", "accel=tcg"),
                    ]);
                }
                // What only KVM can show a guest.
                ("-cpu", Some(value)) if value.starts_with("host") => {
                    words.extend([option, "max".to_owned()])
                }
                ("-cpu", Some(value)) => {
                    let of_kvm =
                        |key: &&str| !key.contains("kvm") && !key.contains("hv_") && !key.contains("hv-");
                    let kept: Vec<_> = value.split(',').filter(of_kvm).collect();
                    words.extend([
                        option,
                        if value.starts_with("kvm64") { "qemu64".to_owned() } else { kept.join(",") },
                    ]);
                }
                (_, value) => words.extend([option].into_iter().chain(value)),
            }
        }
        words
    }
}
