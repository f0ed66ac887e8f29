//! The file that describes a VM to `whimbrel run`.

use crate::{Spec, Tools};
use std::{fmt::Write, path::PathBuf};

/// A VM file of the laboratory. Stories change what they need changed.
#[derive(Clone, Debug)]
pub struct VmFile {
    /// The VM's name.
    pub name: String,
    /// The guest inside.
    pub guest: Spec,
    /// `q35` or `microvm`.
    pub machine: String,
    /// Such as `512MiB`.
    pub memory: String,
    /// How many vCPUs.
    pub vcpus: u32,
    /// Pairs of queues of its network card.
    pub queues: u16,
    /// The kernel is to carry its packets, where that is proven to be safe.
    pub vhost: bool,
    /// Disk images, each with its format.
    pub disks: Vec<(PathBuf, String)>,
    /// Further lines, put at the top level.
    pub extra: String,
}

impl VmFile {
    /// A small `q35` with one vCPU.
    pub fn new(name: &str, guest: Spec) -> Self {
        Self {
            name: name.to_owned(),
            guest,
            machine: "q35".to_owned(),
            memory: "256MiB".to_owned(),
            vcpus: 1,
            queues: 1,
            vhost: false,
            disks: Vec::new(),
            extra: String::new(),
        }
    }

    /// The file's text.
    pub fn text(&self, tools: &Tools) -> String {
        let Self { name, guest, machine, memory, vcpus, queues, vhost, disks, extra } = self;
        let (kernel, initrd, words) = (&tools.kernel, &tools.initrd, guest.command_line(machine));
        let mut text = format!(
            "name = {name:?}\nvcpus = {vcpus}\nmemory = {memory:?}\nmachine = {machine:?}\naccel = \"tcg\"\n\
             kernel = {kernel:?}\ninitrd = {initrd:?}\ncmdline = {words:?}\n{extra}\n"
        );
        for (path, format) in disks {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "[[disk]]\npath = {path:?}\nformat = {format:?}");
        }
        let mac = guest.mac();
        let _ =
            writeln!(text, "[[net]]\nbridge = \"br0\"\nmac = {mac:?}\nqueues = {queues}\nvhost = {vhost}");
        text
    }
}
