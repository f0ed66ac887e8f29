//! A TAP in a network namespace of its own, which nobody else sees, and who sends packets to it. Both end
//! with their descriptors, and the namespace with them.

use crate::ioctl::{self, WRITE, number};
use nix::libc;
use std::{
    fs::OpenOptions,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    thread,
};

/// `TUNSETIFF` of `<linux/if_tun.h>`.
const TUNSETIFF: u32 = number(WRITE, b'T' as u32, 202, size_of::<libc::c_int>());

/// Below the least that IPv6 works with, the kernel sends no packets of its own.
const MTU: i32 = 1000;

const NAME: &[u8; 9] = b"whimbrel0";

/// A type of packets for experiments (IEEE 802, local experimental).
const EXPERIMENT: [u8; 2] = [0x88, 0xb5];

/// To whom a packet is sent: everybody; by whom: an address of no maker's; and what it says.
pub(super) const BROADCAST: [u8; 6] = [0xff; 6];
const SENDER: [u8; 6] = [0x02, 0, 0, 0, 0, 1];
const SAID: [u8; 50] = [0x5a; 50];

#[derive(Debug)]
pub(super) struct Link {
    tap: OwnedFd,
    sender: OwnedFd,
    index: i32,
}

/// `struct ifreq`.
#[repr(C)]
struct Request {
    name: [u8; 16],
    value: [u8; 24],
}

impl Request {
    fn new(value: &[u8]) -> Self {
        let mut this = Self { name: [0; 16], value: [0; 24] };
        this.name[..NAME.len()].copy_from_slice(NAME);
        this.value[..value.len()].copy_from_slice(value);
        this
    }

    fn of(value: i32) -> Self {
        Self::new(&value.to_ne_bytes())
    }

    fn make(mut self, fd: BorrowedFd<'_>, request: u32) -> io::Result<[u8; 24]> {
        // SAFETY: called only with requests that take an `ifreq`, which holds no addresses.
        unsafe { ioctl::run(fd.as_raw_fd(), request, &mut self) }?;
        Ok(self.value)
    }
}

impl Link {
    pub(super) fn make() -> io::Result<Self> {
        // The namespace is this thread's alone, and goes when what was made in it does.
        let maker = thread::Builder::new().name("own-network".into()).spawn(make)?;
        maker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    pub(super) fn tap(&self) -> BorrowedFd<'_> {
        self.tap.as_fd()
    }

    /// Sends a packet, which arrives at the TAP.
    pub(super) fn send(&self) -> io::Result<()> {
        let packet = [&BROADCAST[..], &SENDER, &EXPERIMENT, &SAID].concat();
        // SAFETY: all zeros are a `sockaddr_ll`.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_protocol = u16::from_ne_bytes(EXPERIMENT);
        to.sll_ifindex = self.index;
        to.sll_halen = 6;
        to.sll_addr[..6].copy_from_slice(&BROADCAST);
        // SAFETY: the kernel reads so many bytes of the packet, and so many of the address.
        let sent = unsafe {
            libc::sendto(
                self.sender.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const to).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

fn make() -> io::Result<Link> {
    // SAFETY: the call changes which network this thread has from now on, and nothing in memory.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let tap = OwnedFd::from(OpenOptions::new().read(true).write(true).open("/dev/net/tun")?);
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI) as u16;
    Request::new(&flags.to_ne_bytes()).make(tap.as_fd(), TUNSETIFF)?;
    let control = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    Request::of(MTU).make(control.as_fd(), libc::SIOCSIFMTU as u32)?;
    Request::of(libc::IFF_UP).make(control.as_fd(), libc::SIOCSIFFLAGS as u32)?;
    let index = Request::of(0).make(control.as_fd(), libc::SIOCGIFINDEX as u32)?;
    let index = i32::from_ne_bytes([index[0], index[1], index[2], index[3]]);
    // Of no protocol: it only sends.
    Ok(Link { tap, sender: socket(libc::AF_PACKET, libc::SOCK_RAW)?, index })
}

fn socket(family: libc::c_int, kind: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: makes a descriptor and touches no memory.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::readable_within;
    use std::{io::Read, time::Duration};

    #[test]
    fn what_is_sent_arrives_and_nothing_else() {
        let link = match Link::make() {
            Ok(link) => link,
            Err(e) => return eprintln!("SKIPPED: {e}"),
        };
        let waits = |time| readable_within(link.tap(), Duration::from_millis(time)).unwrap();
        assert!(!waits(100), "the kernel sends something of its own");
        link.send().unwrap();
        assert!(waits(10_000));
        let mut packet = [0; 100];
        let mut tap = std::fs::File::from(link.tap.try_clone().unwrap());
        let bytes = tap.read(&mut packet).unwrap();
        assert_eq!((bytes, &packet[12..14], packet[14]), (64, &EXPERIMENT[..], 0x5a));
        assert!(!waits(0));
    }
}
