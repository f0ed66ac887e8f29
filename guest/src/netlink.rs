//! Addresses and routes, as the kernel wants to hear them: rtnetlink messages, spelled out by hand because
//! the three of them are all that this guest ever says (`rtnetlink(7)`).

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, recv, send, socket};
use std::{io, net::Ipv4Addr, os::fd::OwnedFd};

const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;
const REQUEST: u16 = 0x1;
const ACKNOWLEDGE: u16 = 0x4;
const CREATE: u16 = 0x400;
const EXCLUSIVE: u16 = 0x200;
/// `nlmsghdr`.
const HEADER: usize = 16;
/// The type of an answer that carries an error number, 0 for success.
const ERROR: u16 = 2;
const INET: u8 = 2;
const UP: u32 = 1;

/// Switches interface `index` on.
pub(crate) fn up(index: u32) -> io::Result<()> {
    let mut body = vec![0; 4];
    body.extend(index.to_ne_bytes());
    body.extend(UP.to_ne_bytes());
    body.extend(UP.to_ne_bytes());
    ask(NEW_LINK, 0, body)
}

/// Gives interface `index` an address.
pub(crate) fn address(index: u32, ip: Ipv4Addr, bits: u8) -> io::Result<()> {
    const ADDRESS: u16 = 1;
    const LOCAL: u16 = 2;
    let mut body = vec![INET, bits, 0, 0];
    body.extend(index.to_ne_bytes());
    attribute(&mut body, LOCAL, ip.octets());
    attribute(&mut body, ADDRESS, ip.octets());
    ask(NEW_ADDRESS, CREATE | EXCLUSIVE, body)
}

/// Sends everything else through `gateway`.
pub(crate) fn default_route(gateway: Ipv4Addr) -> io::Result<()> {
    const GATEWAY: u16 = 5;
    const TABLE_MAIN: u8 = 254;
    const PROTOCOL_BOOT: u8 = 3;
    const UNICAST: u8 = 1;
    let mut body = vec![INET, 0, 0, 0, TABLE_MAIN, PROTOCOL_BOOT, 0, UNICAST, 0, 0, 0, 0];
    attribute(&mut body, GATEWAY, gateway.octets());
    ask(NEW_ROUTE, CREATE | EXCLUSIVE, body)
}

fn attribute(body: &mut Vec<u8>, kind: u16, value: [u8; 4]) {
    body.extend(8u16.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
}

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((REQUEST | ACKNOWLEDGE | flags).to_ne_bytes());
    message.extend([0; 8]); // sequence and port: one question, one answer
    message.extend(body);
    message
}

fn ask(kind: u16, flags: u16, body: Vec<u8>) -> io::Result<()> {
    // The protocol of routes is number 0, what "no protocol" says too.
    let kernel: OwnedFd = socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
    send(&kernel, &message(kind, flags, &body), SendFlags::empty())?;
    let mut answer = [0; 512];
    let (n, _) = recv(&kernel, &mut answer[..], RecvFlags::empty())?;
    outcome(&answer[..n])
}

fn outcome(answer: &[u8]) -> io::Result<()> {
    let strange =
        || io::Error::new(io::ErrorKind::InvalidData, "an rtnetlink answer that is no acknowledgement");
    let kind = answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
    let error = answer.get(HEADER..HEADER + 4).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, error) {
        (Some(ERROR), Some(0)) => Ok(()),
        (Some(ERROR), Some(n)) => Err(io::Error::from_raw_os_error(n.saturating_neg())),
        _ => Err(strange()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_says_how_long_it_is() {
        let m = message(NEW_LINK, 0, &[1; 16]);
        assert_eq!(m.len(), 32);
        assert_eq!(m[..4], 32u32.to_ne_bytes());
    }

    #[test]
    fn an_answer_is_an_error_number_or_nothing() {
        let answer = |error: i32| [&message(ERROR, 0, &[])[..], &error.to_ne_bytes()].concat();
        assert!(outcome(&answer(0)).is_ok());
        assert_eq!(outcome(&answer(-17)).unwrap_err().raw_os_error(), Some(17));
        assert!(outcome(&answer(0)[..10]).is_err());
        assert!(outcome(&[]).is_err());
    }
}
