//! What would become of a QEMU that somebody else started, told before anybody takes charge of it.

use super::{Looked, look};
use crate::{
    recipe::{Console, Recipe, Role},
    vm::{OpenError, Vm},
};
use std::path::Path;
use units::Bytes;

/// What is known of it by looking.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Examined {
    /// Its process.
    pub pid: i32,
    /// What goes with it to another host, in words.
    pub carried: Vec<String>,
    /// What will be different there.
    pub different: Vec<String>,
    /// What hinders it from being migrated, each with what mends it. Empty: it can be adopted.
    pub hindrances: Vec<String>,
}

impl Vm {
    /// Looks at the QEMU behind a QMP socket: asks its monitor and reads `/proc`, and neither attaches to it
    /// nor sets anything. What only attaching can show (a seccomp filter, say) is not seen.
    pub fn examine(name: &str, socket: &Path) -> Result<Examined, OpenError> {
        let Looked { process, recipe, reasons, notes, .. } = look(name, socket)?;
        Ok(Examined { pid: process.pid(), carried: carried(&recipe), different: notes, hindrances: reasons })
    }
}

/// What a recipe makes anew elsewhere.
fn carried(recipe: &Recipe) -> Vec<String> {
    let memory = Bytes(recipe.memory_bytes());
    let mut lines = vec![
        format!("machine {}, run by {} {}", recipe.machine_name(), recipe.accel.word(), recipe.qemu),
        format!("{}, {memory} of memory", counted(recipe.vcpus() as usize, "vCPU", "vCPUs")),
    ];
    for role in [Role::Disk, Role::Backing, Role::Boot] {
        for file in recipe.files.iter().filter(|file| file.role == role) {
            lines.push(format!("{} {}, {}", role.word(), file.path.display(), Bytes(file.bytes)));
        }
    }
    lines.extend(recipe.nets.iter().map(|net| format!("network {} on the bridge {}", net.id, net.bridge)));
    let devices = recipe.arguments.iter().filter(|argument| argument.option == "-device").count();
    if devices > 0 {
        lines.push(counted(devices, "device", "devices"));
    }
    if recipe.console != Console::None {
        lines.push("its first serial port".to_owned());
    }
    if !recipe.chardevs.is_empty() {
        lines.push(counted(recipe.chardevs.len(), "character device", "character devices"));
    }
    lines
}

fn counted(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}
