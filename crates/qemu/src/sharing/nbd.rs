//! Whether a server has an export, and takes another client: asked by the first words of NBD's own protocol,
//! without opening the disk.
//!
//! <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>

use super::servers::{self, WORD};
use crate::recipe::Export;
use std::io::{self, Read, Write};

/// Replies that are read: QEMU's server sends two.
const MOST_REPLIES: usize = 16;

/// The longest reply. An error has a text of at most 4096 bytes.
const LONGEST: u32 = 16 << 10;

const GREETING: &[u8; 16] = b"NBDMAGICIHAVEOPT";
const OPTION: &[u8; 8] = b"IHAVEOPT";
const REPLY: u64 = 0x0003_e889_0455_65a9;

/// Flags of a client: the fixed newstyle handshake, and no zeros after it, where the server offers that.
const FIXED: u16 = 1;
const NO_ZEROES: u16 = 2;

/// Options (`NBD_OPT_…`).
const ABORT: u32 = 2;
const INFO: u32 = 6;

/// Replies (`NBD_REP_…`): the end, information, and what errors have set.
const ACK: u32 = 1;
const INFORMATION: u32 = 3;
const ERROR: u32 = 1 << 31;

/// Looks; else says what is wrong and what to do about it.
pub(super) fn look(export: &Export) -> Result<(), String> {
    let url = export.url();
    let said = ask(export).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => format!(
            "disk {url}: its server does not take a second client within {WORD:?}; have it take two at once \
             (qemu-nbd --shared=2)"
        ),
        _ => format!("disk {url}: its server cannot be used from this host: {error}"),
    })?;
    match said {
        Some(bytes) if bytes == export.bytes => Ok(()),
        Some(bytes) => Err(servers::differs(export, bytes)),
        None => Err(format!("disk {url}: its server has no such export here")),
    }
}

/// The size of the export; none if there is none of this name.
fn ask(export: &Export) -> io::Result<Option<u64>> {
    let server = servers::call(export)?;
    server.set_read_timeout(Some(WORD)).and_then(|()| server.set_write_timeout(Some(WORD)))?;
    talk(server, &export.name)
}

fn talk(mut server: impl Read + Write, name: &str) -> io::Result<Option<u64>> {
    let strange = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("it says {what}"));
    let mut greeting = [0; 18];
    server.read_exact(&mut greeting)?;
    let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
    if !greeting.starts_with(GREETING) || flags & FIXED == 0 {
        return Err(strange("nothing of NBD's newer handshake"));
    }
    server.write_all(&u32::from(flags & (FIXED | NO_ZEROES)).to_be_bytes())?;
    let mut asked = (name.len() as u32).to_be_bytes().to_vec();
    asked.extend(name.as_bytes());
    asked.extend(0_u16.to_be_bytes());
    say(&mut server, INFO, &asked)?;
    let mut bytes = None;
    for _ in 0..MOST_REPLIES {
        let mut head = [0; 20];
        server.read_exact(&mut head)?;
        let word = |at: usize| u32::from_be_bytes(*head[at..].first_chunk().expect("within the head"));
        let (kind, length) = (word(12), word(16));
        let is_reply = head.starts_with(&REPLY.to_be_bytes()) && word(8) == INFO && length <= LONGEST;
        if !is_reply {
            return Err(strange("what is no reply of NBD's"));
        }
        let mut data = vec![0; length as usize];
        server.read_exact(&mut data)?;
        match kind {
            ACK => {
                // It may be gone by then.
                let _ = say(&mut server, ABORT, &[]);
                return Ok(bytes);
            }
            // Of the export itself: its type, its size, its flags.
            INFORMATION if data.starts_with(&[0, 0]) => {
                bytes =
                    data.get(2..).and_then(|rest| rest.first_chunk()).map(|size| u64::from_be_bytes(*size));
            }
            error if error & ERROR != 0 => return Ok(None),
            _ => {}
        }
    }
    Err(strange("more than anybody asked"))
}

fn say(server: &mut impl Write, option: u32, data: &[u8]) -> io::Result<()> {
    let mut text = OPTION.to_vec();
    text.extend(option.to_be_bytes());
    text.extend((data.len() as u32).to_be_bytes());
    text.extend(data);
    server.write_all(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that says this, whatever it is told.
    struct Says<'a>(&'a [u8]);

    impl Read for Says<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            self.0.read(into)
        }
    }

    impl Write for Says<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn reply(kind: u32, data: &[u8]) -> Vec<u8> {
        let head = [&REPLY.to_be_bytes()[..], &INFO.to_be_bytes(), &kind.to_be_bytes()].concat();
        [&head[..], &(data.len() as u32).to_be_bytes(), data].concat()
    }

    #[test]
    fn a_server_is_heard_and_one_that_talks_nonsense_is_not() {
        let greeting = [&GREETING[..], &[0, 3]].concat();
        let size = [&[0, 0][..], &7_u64.to_be_bytes(), &[0, 1]].concat();
        let heard = |parts: &[&[u8]]| talk(Says(&parts.concat()), "vol").map_err(|error| error.kind());
        let (ack, info) = (reply(ACK, &[]), reply(INFORMATION, &size));
        assert_eq!(heard(&[&greeting, &info, &ack]), Ok(Some(7)));
        assert_eq!(heard(&[&greeting, &reply(INFORMATION, &[0, 3, 0]), &info, &ack]), Ok(Some(7)));
        assert_eq!(heard(&[&greeting, &reply(ERROR | 6, b"no such export")]), Ok(None));
        for nonsense in [
            &b"HTTP/1.1 400 Bad Request\r\n"[..],
            &[&GREETING[..], &[0, 0]].concat(),
            &[&greeting[..], &[7; 20]].concat(),
            &[&greeting[..], &reply(ACK, &[])[..16], &u32::MAX.to_be_bytes()].concat(),
            &[&greeting[..], &reply(INFORMATION, &[0, 3]).repeat(99)].concat(),
        ] {
            assert_eq!(heard(&[nonsense]), Err(io::ErrorKind::InvalidData), "{nonsense:?}");
        }
        for silence in [&greeting[..7], &greeting, &[&greeting[..], &info[..30]].concat()] {
            assert_eq!(heard(&[silence]), Err(io::ErrorKind::UnexpectedEof));
        }
    }
}
