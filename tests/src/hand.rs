//! Machines that a story starts by hand, as something other than whimbrel would.

use crate::{Console, Doing, Host, Process, QEMU, Qmp, Result, Spec, Tools, wait_for};
use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};
use units::Bytes;

/// What backs the guest's RAM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ram {
    /// One shared memfd.
    Memfd,
    /// A shared file in this directory.
    File(PathBuf),
    /// Two shared memfds of the same size, which only QEMU can tell apart.
    TwoMemfds,
    /// Memory of QEMU's own, which nobody else can reach.
    Private,
    /// A memfd of huge pages.
    HugePages,
    /// `-mem-path` of a hugetlbfs here, as most people ask for them: private to QEMU.
    HugePath(PathBuf),
}

/// How to start it. The default is what a story about nothing in particular wants.
#[derive(Clone, Debug)]
pub struct HandStart {
    /// The guest inside.
    pub guest: Spec,
    /// `q35` or `microvm`.
    pub machine: String,
    /// All of its RAM.
    pub memory: Bytes,
    /// Where that lives.
    pub ram: Ram,
    /// How many vCPUs.
    pub vcpus: u32,
    /// Pairs of queues of its network card.
    pub queues: u16,
    /// A worker of the kernel's carries its packets.
    pub vhost: bool,
    /// A VGA card, with video RAM of QEMU's own.
    pub vga: bool,
    /// Another user than root.
    pub user: Option<String>,
    /// Another QEMU than the system's.
    pub qemu: PathBuf,
    /// Whatever else the command line is to say.
    pub extra: Vec<String>,
}

/// A QEMU process that whimbrel did not start.
#[derive(Debug)]
pub struct HandStarted {
    process: Process,
    dir: PathBuf,
}

impl HandStart {
    /// A `q35` with one vCPU and 256 MiB in one memfd.
    pub fn new(guest: Spec) -> Self {
        Self {
            guest,
            machine: "q35".to_owned(),
            memory: Bytes(256 << 20),
            ram: Ram::Memfd,
            vcpus: 1,
            queues: 1,
            vhost: false,
            vga: false,
            user: None,
            qemu: QEMU.into(),
            extra: Vec::new(),
        }
    }

    /// With a raw disk on virtio.
    pub fn disk(mut self, path: &Path, options: &str) -> Self {
        let bus = if self.machine == "microvm" { "virtio-blk-device" } else { "virtio-blk-pci" };
        let comma = if options.is_empty() { "" } else { "," };
        self.extra.extend([
            "-drive".to_owned(),
            format!("file={},format=raw,if=none,id=disk0{comma}{options}", path.display()),
            "-device".to_owned(),
            format!("{bus},drive=disk0"),
        ]);
        self
    }

    /// Starts it on `host`.
    pub fn start(self, host: &Host, tools: &Tools) -> Result<HandStarted> {
        self.start_named(host, tools, &format!("hand{}", self.guest.number))
    }

    /// Starts it on `host`, its directory and its TAP under a name of their own: for a second process of the
    /// same guest.
    pub fn start_named(&self, host: &Host, tools: &Tools, name: &str) -> Result<HandStarted> {
        let dir = host.dir.join(name);
        std::fs::create_dir_all(&dir).doing(format!("make {}", dir.display()))?;
        let tap = format!("t-{name}");
        host.add_tap_with(&tap, if self.queues > 1 { "multi_queue" } else { "" })?;
        let mut command = host.namespace.command(&self.qemu);
        self.arguments(&mut command, tools, &dir, &tap);
        let process = host.spawn(name, &mut command)?;
        let mut started = HandStarted { process, dir };
        let socket = started.qmp_socket();
        wait_for("QEMU's monitor", Duration::from_secs(20), || {
            started.process.must_live()?;
            // One that is there may not be listened to yet.
            Ok(UnixStream::connect(&socket).is_ok().then_some(()))
        })?;
        Ok(started)
    }

    fn arguments(&self, command: &mut Command, tools: &Tools, dir: &Path, tap: &str) {
        let (name, micro) = (format!("hand{}", self.guest.number), self.machine == "microvm");
        let at = |file: &str| dir.join(file).display().to_string();
        command.args(["-name", &name, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]);
        command.args(["-smp", &self.vcpus.to_string(), "-m", &format!("{}B", self.memory.0)]);
        self.ram_arguments(command, &self.machine);
        command.arg("-kernel").arg(&tools.kernel).arg("-initrd").arg(&tools.initrd);
        command.args(["-append", &self.guest.command_line(&self.machine)]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", at("qmp.sock"))]);
        command.args(["-serial", &format!("unix:{},server=on,wait=off", at("serial.sock"))]);
        let (queues, vectors) = match self.queues {
            ..=1 => (String::new(), String::new()),
            queues => (format!(",queues={queues}"), format!(",mq=on,vectors={}", 2 * queues + 2)),
        };
        let vhost = if self.vhost { ",vhost=on" } else { "" };
        let netdev = format!("tap,id=net0,ifname={tap},script=no,downscript=no{vhost}{queues}");
        command.args(["-netdev", &netdev]);
        let card = if micro { "virtio-net-device" } else { "virtio-net-pci" };
        command.args(["-device", &format!("{card},netdev=net0,mac={}{vectors}", self.guest.mac())]);
        if self.vga {
            command.args(["-device", "VGA"]);
        }
        if let Some(user) = &self.user {
            command.args(["-runas", user]);
        }
        command.args(&self.extra);
    }

    fn ram_arguments(&self, command: &mut Command, machine: &str) {
        let Bytes(size) = self.memory;
        let one =
            |backend: String| (vec![backend], format!("{machine},memory-backend=ram0"), Vec::<&str>::new());
        let (objects, machine, nodes) = match &self.ram {
            Ram::Memfd => one(format!("memory-backend-memfd,id=ram0,size={size},share=on")),
            Ram::HugePages => one(format!("memory-backend-memfd,id=ram0,size={size},share=on,hugetlb=on")),
            Ram::File(dir) => {
                let path = dir.join(format!("ram{}", self.guest.number));
                one(format!("memory-backend-file,id=ram0,size={size},share=on,mem-path={}", path.display()))
            }
            Ram::Private => (Vec::new(), machine.to_owned(), Vec::new()),
            Ram::HugePath(at) => {
                command.arg("-mem-path").arg(at);
                (Vec::new(), machine.to_owned(), Vec::new())
            }
            Ram::TwoMemfds => {
                let half = |id| format!("memory-backend-memfd,id=ram{id},size={},share=on", size / 2);
                let nodes = vec!["node,memdev=ram0", "node,memdev=ram1"];
                (vec![half(0), half(1)], machine.to_owned(), nodes)
            }
        };
        command.args(["-machine", &machine]);
        for object in &objects {
            command.args(["-object", object]);
        }
        for node in nodes {
            command.args(["-numa", node]);
        }
    }
}

impl HandStarted {
    /// Where its monitor listens.
    pub fn qmp_socket(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }

    /// A connection to its monitor. Drop it before whimbrel is to adopt the machine.
    pub fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.qmp_socket())
    }

    /// Its serial console.
    pub fn console(&self) -> Result<Console> {
        Console::listen(&self.dir.join("serial.sock"))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The process itself.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
