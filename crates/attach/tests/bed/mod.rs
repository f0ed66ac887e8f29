//! A real QEMU to attach to, its monitor, and its gdb stub: with the latter QEMU itself reads and writes
//! guest RAM.
#![allow(dead_code, unreachable_pub, reason = "each test program uses its own part of this")]

use attach::{Memory, RamBlock};
use ports::{GuestMemory, Tracker};
use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};
use units::{BlockId, MemorySet, PAGE_SIZE, PageIndex, PageRange};

/// Longer than any answer takes, unless nothing answers.
pub const SOON: Duration = Duration::from_secs(30);

pub const MIB: u64 = 1 << 20;

pub struct Qemu {
    child: Ended,
    monitor: BufReader<UnixStream>,
    gdb: UnixStream,
    sockets: PathBuf,
}

/// A kernel that a guest can boot: the one of the laboratory, or this machine's own. Without one, a test that
/// needs it is void.
fn kernel() -> Option<PathBuf> {
    let own = || Some(std::fs::read_dir("/boot").ok()?.filter_map(|entry| Some(entry.ok()?.path())));
    let is_kernel = |path: &PathBuf| path.to_string_lossy().contains("/vmlinuz-");
    let found = std::env::var_os("WHIMBREL_GUEST_KERNEL").map(PathBuf::from).filter(|path| path.is_file());
    let found = found.or_else(|| own()?.find(is_kernel));
    if found.is_none() {
        eprintln!("no kernel for a guest (WHIMBREL_GUEST_KERNEL, /boot): skipped");
    }
    found
}

/// A QEMU whose guest is about to boot a kernel, which writes all it can.
pub fn booting() -> Option<Qemu> {
    booting_on(&memfd(256))
}

/// The same with another memory backend.
pub fn booting_on(object: &str) -> Option<Qemu> {
    let kernel = kernel()?;
    let more = ["-kernel", kernel.to_str().unwrap(), "-append", "panic=0", "-smp", "2"];
    Some(Qemu::start(object, &more))
}

/// Mirrors the first RAM block of a running guest by what its tracker says, for so long and until it is
/// stopped; then no page may differ. `during` may do something in each round.
pub fn mirror<T: Tracker>(
    qemu: &mut Qemu,
    memory: &Memory,
    tracker: &mut T,
    time: Duration,
    mut during: impl FnMut(Duration, &mut T),
) {
    const RAM: BlockId = BlockId(0);
    let pages = memory.blocks()[0].pages;
    let mut mirror = vec![0_u8; pages as usize * PAGE_SIZE];
    tracker.begin().unwrap();
    let mut dirty = MemorySet::from_blocks(vec![memory.present(RAM).unwrap()]);
    let began = Instant::now();
    let (mut rounds, mut last) = (0, false);
    loop {
        for run in dirty.block(RAM).runs() {
            let at = run.start.offset() as usize;
            memory.read(RAM, run, &mut mirror[at..at + run.bytes().0 as usize]).unwrap();
        }
        dirty.clear();
        if last {
            break;
        }
        during(began.elapsed(), tracker);
        if began.elapsed() > time {
            qemu.qmp("stop", json!({}));
            last = true;
        }
        tracker.collect(&mut dirty).unwrap();
        rounds += 1;
    }
    assert!(rounds > 10, "{rounds}");
    let mut all = vec![0_u8; mirror.len()];
    memory.read(RAM, PageRange::new(PageIndex(0), pages), &mut all).unwrap();
    let different = (0..pages as usize).filter(|page| {
        let bytes = page * PAGE_SIZE..(page + 1) * PAGE_SIZE;
        mirror[bytes.clone()] != all[bytes]
    });
    assert_eq!(different.count(), 0, "pages were missed in {rounds} rounds");
}

impl Qemu {
    /// Starts a q35 with `memory` as the memory backend (an `-object`) and further arguments, its guest
    /// stopped.
    pub fn start(memory: &str, more: &[&str]) -> Self {
        let machine = ["-machine", "q35,memory-backend=mem", "-object", memory];
        Self::start_machine(&[&machine[..], more].concat())
    }

    /// Starts any machine.
    pub fn start_machine(arguments: &[&str]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let sockets = std::env::temp_dir().join(format!("attach-{}-{n}", std::process::id()));
        std::fs::create_dir(&sockets).unwrap();
        let listen = |name: &str| UnixListener::bind(sockets.join(name)).unwrap();
        // QEMU connects to us, so there is nothing to poll for.
        let (monitors, gdbs) = (listen("qmp"), listen("gdb"));
        let child = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg", "-display", "none", "-nodefaults", "-S"])
            .args(arguments)
            .arg("-qmp")
            .arg(format!("unix:{}", sockets.join("qmp").display()))
            .arg("-gdb")
            .arg(format!("unix:{}", sockets.join("gdb").display()))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        // From here on it ends with us, whatever happens.
        let mut child = Ended(child);
        let accept = |listener: UnixListener, Ended(child): &mut Ended| {
            listener.set_nonblocking(true).unwrap();
            for _ in 0..3000 {
                if let Ok((socket, _)) = listener.accept() {
                    socket.set_nonblocking(false).unwrap();
                    socket.set_read_timeout(Some(SOON)).unwrap();
                    return socket;
                }
                assert_eq!(child.try_wait().unwrap(), None, "QEMU ended");
                std::thread::sleep(Duration::from_millis(10));
            }
            panic!("QEMU does not connect");
        };
        let monitor = BufReader::new(accept(monitors, &mut child));
        let gdb = accept(gdbs, &mut child);
        let mut qemu = Self { child, monitor, gdb, sockets };
        qemu.read_monitor();
        qemu.qmp("qmp_capabilities", json!({}));
        qemu
    }

    pub fn pid(&self) -> i32 {
        self.child.0.id() as i32
    }

    fn read_monitor(&mut self) -> Value {
        let mut line = String::new();
        self.monitor.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    pub fn qmp(&mut self, command: &str, arguments: Value) -> Value {
        let text = json!({"execute": command, "arguments": arguments}).to_string();
        self.monitor.get_mut().write_all(text.as_bytes()).unwrap();
        loop {
            let mut answer = self.read_monitor();
            assert_eq!(answer.get("error"), None, "{command}");
            if let Some(value) = answer.get_mut("return") {
                return value.take();
            }
        }
    }

    /// The RAM block at guest address `gpa`.
    pub fn block(&mut self, name: &str, bytes: u64, gpa: u64) -> RamBlock {
        let answer = self.qmp("human-monitor-command", json!({"command-line": format!("gpa2hva {gpa:#x}")}));
        let text = answer.as_str().unwrap();
        let (_, hva) = text.trim().rsplit_once("0x").unwrap_or_else(|| panic!("{text}"));
        RamBlock { name: name.into(), bytes, hva: u64::from_str_radix(hva, 16).unwrap() }
    }

    pub fn gdb_send(&mut self, packet: &str) {
        let sum = packet.bytes().fold(0_u8, u8::wrapping_add);
        self.gdb.write_all(format!("${packet}#{sum:02x}").as_bytes()).unwrap();
    }

    pub fn gdb_answer(&mut self) -> String {
        let mut bytes = Vec::new();
        let mut byte = [0];
        loop {
            self.gdb.read_exact(&mut byte).unwrap();
            bytes.push(byte[0]);
            if let [.., b'#', _, _] = bytes[..] {
                break;
            }
        }
        self.gdb.write_all(b"+").unwrap();
        let text = String::from_utf8(bytes).unwrap();
        text[text.find('$').unwrap() + 1..text.len() - 3].to_owned()
    }

    /// Has QEMU write a byte at the beginning of a page.
    pub fn poke(&mut self, page: u64, value: u8) {
        self.gdb_send(&format!("M{:x},1:{value:02x}", page * PAGE_SIZE as u64));
        assert_eq!(self.gdb_answer(), "OK");
    }

    /// Has QEMU read the first byte of a page; `gdb_answer` gives it.
    pub fn send_peek(&mut self, page: u64) {
        self.gdb_send(&format!("m{:x},1", page * PAGE_SIZE as u64));
    }

    pub fn peek(&mut self, page: u64) -> u8 {
        self.send_peek(page);
        u8::from_str_radix(&self.gdb_answer(), 16).unwrap()
    }

    pub fn gdb_is_silent(&mut self, time: Duration) -> bool {
        self.gdb.set_read_timeout(Some(time)).unwrap();
        let mut byte = [0];
        // An acknowledgement is sent before the order is carried out.
        let silent = loop {
            match self.gdb.read(&mut byte) {
                Ok(1) if byte == *b"+" => {}
                Ok(_) => break false,
                Err(_) => break true,
            }
        };
        self.gdb.set_read_timeout(Some(SOON)).unwrap();
        silent
    }
}

/// A process that ends with its test, also when that panics.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.sockets));
    }
}

/// One memfd of this size.
pub(crate) fn memfd(mib: u64) -> String {
    format!("memory-backend-memfd,id=mem,share=on,size={mib}M")
}
