//! A worker that writes packets into the memory of a process of ours.

use super::{
    VhostError, abi,
    link::{BROADCAST, Link},
    step,
};
use crate::patient::Patient;
use nix::libc;
use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    io::{self, Write},
    ops::Range,
    os::fd::{FromRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};
use units::PAGE_SIZE;

/// The device that makes workers.
const DEVICE: &str = "/dev/vhost-net";

/// How long a packet may take: it takes 50 µs.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// Between two looks whether one has arrived.
const LOOK: Duration = Duration::from_micros(100);

/// Pages of the memory, from its beginning: what the worker's requests are told, its ring, and the first of
/// the buffers, each of which has a page, and one that nobody writes behind it.
const TOLD: u64 = 0;
pub(super) const DESCRIPTORS: u64 = 8;
pub(super) const AVAILABLE: u64 = 9;
pub(super) const USED: u64 = 16;
const BUFFERS: u64 = 32;

/// Bytes of a buffer: more than a packet has.
const BUFFER: u32 = 2048;

/// What a buffer holds that nothing was received in.
pub(super) const EMPTY: u8 = 0xee;

/// Whose memory it is that the worker writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Memory {
    /// A file's that others map, too.
    Shared,
    /// Its process' alone.
    Private,
}

/// The worker, its owner and its TAP. It ends with its owner.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) patient: Patient,
    pub(super) memory: Range<u64>,
    link: Link,
    kick: File,
    posted: u16,
    /// Buffers that a packet was received in.
    full: BTreeSet<u16>,
}

/// The page of a buffer.
pub(super) fn page_of(buffer: u16) -> u64 {
    BUFFERS + 2 * u64::from(buffer)
}

impl Worker {
    /// Starts one. Nothing has been received yet, and no buffer is there for it.
    pub(super) fn start(memory: Memory) -> Result<Self, VhostError> {
        let device = OpenOptions::new().read(true).write(true).open(DEVICE).map_err(|error| {
            match error.raw_os_error() {
                // Without a driver behind it, a node of a name is no device.
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => VhostError::Absent,
                _ => VhostError::Refused(error),
            }
        })?;
        let link = step("make a TAP to try it on", Link::make())?;
        let kick = step("make an eventfd", eventfd())?;
        let patient = step("start a process to try it on", Patient::start())?;
        let range = match memory {
            Memory::Shared => patient.map_ram(),
            Memory::Private => patient.map_private(),
        };
        let worker = Self {
            memory: step("map memory", range)?,
            patient,
            link,
            kick,
            posted: 0,
            full: BTreeSet::new(),
        };
        step("map memory", worker.patient.keep_plain(&worker.memory))?;
        step("set a worker up", worker.set_up(&device))?;
        Ok(worker)
    }

    fn set_up(&self, device: &File) -> io::Result<()> {
        let [vhost, tap, kick] =
            [self.patient.give(device)?, self.patient.give(self.link.tap())?, self.patient.give(&self.kick)?];
        for (n, buffer) in (0..abi::RING).zip((0_u64..).step_by(16)) {
            let descriptor = abi::descriptor(self.at(page_of(n)), BUFFER);
            self.write(self.at(DESCRIPTORS) + buffer, &descriptor)?;
        }
        self.write(self.at(AVAILABLE), &[0; PAGE_SIZE])?;
        self.write(self.at(USED), &[0; PAGE_SIZE])?;
        let bytes = self.memory.end - self.memory.start;
        let ring = abi::addresses(self.at(DESCRIPTORS), self.at(USED), self.at(AVAILABLE));
        self.patient.request(vhost, abi::SET_OWNER, 0)?;
        for (request, argument) in [
            (abi::SET_FEATURES, abi::FEATURES.to_ne_bytes().to_vec()),
            (abi::SET_MEM_TABLE, abi::memory(self.memory.start, bytes)),
            (abi::SET_VRING_NUM, abi::of_ring(abi::RING.into())),
            (abi::SET_VRING_BASE, abi::of_ring(0)),
            (abi::SET_VRING_ADDR, ring),
            (abi::SET_VRING_KICK, abi::of_ring(kick)),
            (abi::NET_SET_BACKEND, abi::of_ring(tap)),
        ] {
            self.write(self.at(TOLD), &argument)?;
            self.patient.request(vhost, request, self.at(TOLD))?;
        }
        Ok(())
    }

    /// The address of a page of its memory.
    pub(super) fn at(&self, page: u64) -> u64 {
        self.memory.start + page * PAGE_SIZE as u64
    }

    /// The addresses of its memory from this page on.
    pub(super) fn from(&self, page: u64) -> Range<u64> {
        self.at(page)..self.memory.end
    }

    pub(super) fn read(&self, address: u64, into: &mut [u8]) -> io::Result<()> {
        self.patient.process().read_memory(address, into)
    }

    pub(super) fn write(&self, address: u64, from: &[u8]) -> io::Result<()> {
        self.patient.process().write_memory(address, from)
    }

    /// Empties a buffer that has a packet, before it is used again.
    pub(super) fn clear(&mut self, buffer: u16) -> io::Result<()> {
        if !self.full.remove(&buffer) {
            // Perhaps nobody has touched it, and nobody is to.
            return Ok(());
        }
        self.write(self.at(page_of(buffer)), &[EMPTY; BUFFER as usize])
    }

    /// Lets it have a buffer, of which it is not told yet.
    pub(super) fn post(&mut self, buffer: u16) -> io::Result<()> {
        let entry = self.at(AVAILABLE) + 4 + 2 * u64::from(self.posted % abi::RING);
        self.write(entry, &buffer.to_le_bytes())?;
        self.posted = self.posted.wrapping_add(1);
        self.write(self.at(AVAILABLE) + abi::INDEX, &self.posted.to_le_bytes())
    }

    /// Tells it of buffers, and sends it a packet.
    pub(super) fn send(&self) -> io::Result<()> {
        (&self.kick).write_all(&1_u64.to_ne_bytes())?;
        self.link.send()
    }

    /// Whether it has received a packet into each buffer that it has got.
    pub(super) fn is_done(&self) -> io::Result<bool> {
        let mut index = [0; 2];
        self.read(self.at(USED) + abi::INDEX, &mut index)?;
        Ok(u16::from_le_bytes(index) == self.posted)
    }

    /// Waits for that.
    pub(super) fn await_done(&self) -> io::Result<()> {
        let end = Instant::now() + PATIENCE;
        while !self.is_done()? {
            if Instant::now() > end {
                let text = format!("no packet arrived within {PATIENCE:?}");
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Whether there is a packet in this buffer.
    pub(super) fn has_received(&mut self, buffer: u16) -> io::Result<bool> {
        let mut begin = [0; abi::HEADER_BYTES + BROADCAST.len()];
        self.read(self.at(page_of(buffer)), &mut begin)?;
        self.full.insert(buffer);
        Ok(begin[abi::HEADER_BYTES..] == BROADCAST)
    }
}

fn eventfd() -> io::Result<File> {
    // SAFETY: makes a descriptor and touches no memory.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}
