//! The first bytes of every connection: who speaks, which versions, for which migration.

use std::fmt;
use subtle::ConstantTimeEq;
use units::MigrationId;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian::U16, little_endian::U128,
};

/// The newest version that this side speaks. Version 1 knew neither packed pages nor references, version 2 no
/// tokens.
pub const VERSION: u16 = 4;

/// How every first message begins.
pub const MAGIC: [u8; 8] = *b"WHIMBREL";

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// Opens a migration: control messages.
    Control,
    /// Pages; the number tells the streams apart.
    Data(u16),
    /// Pages that the guest waits for.
    Fault,
    /// Goes on with a post-copy whose connections were lost.
    Resume,
    /// Asks the ownership record.
    Record,
    /// Bytes that mean nothing: how fast is the link?
    Probe,
}

impl Purpose {
    /// Whether a [`Token`] follows the preamble: on all connections that pages travel on.
    pub fn needs_token(self) -> bool {
        matches!(self, Self::Data(_) | Self::Fault)
    }

    fn to_wire(self) -> (u16, u16) {
        match self {
            Purpose::Control => (0, 0),
            Purpose::Data(stream) => (1, stream),
            Purpose::Fault => (2, 0),
            Purpose::Resume => (3, 0),
            Purpose::Record => (4, 0),
            Purpose::Probe => (5, 0),
        }
    }

    fn from_wire(kind: u16, stream: u16) -> Option<Self> {
        Some(match kind {
            0 => Purpose::Control,
            1 => Purpose::Data(stream),
            2 => Purpose::Fault,
            3 => Purpose::Resume,
            4 => Purpose::Record,
            5 => Purpose::Probe,
            _ => return None,
        })
    }
}

/// What makes a connection one of a migration's: random, and told on the migration's control connection only.
#[derive(Clone, Copy)]
pub struct Token(pub [u8; Self::SIZE]);

impl Token {
    /// Its length on the wire: nobody guesses it.
    pub const SIZE: usize = 32;

    /// From a message; `None` where it has another length.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Whether two are the same, in a time that does not tell how much of them is.
    pub fn is(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// What the connecting side says first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Preamble {
    /// The oldest version that it speaks.
    pub oldest: u16,
    /// The newest version that it speaks.
    pub newest: u16,
    /// What the connection is for.
    pub kind: Purpose,
    /// For which migration.
    pub migration: MigrationId,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Wire {
    magic: [u8; 8],
    oldest: U16,
    newest: U16,
    kind: U16,
    stream: U16,
    migration: U128,
}

/// A first message that is not ours, or that this version cannot serve.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PreambleError {
    /// Not our protocol at all.
    #[error("the peer does not speak Whimbrel's protocol")]
    NotWhimbrel,
    /// A kind of connection that is not known.
    #[error("the peer asks for connection kind {0}, which this version does not know")]
    Purpose(u16),
    /// No version in common.
    #[error(
        "the peer speaks protocol versions {oldest} to {newest}, this side only {VERSION}; upgrade the older \
         side"
    )]
    Version {
        /// The oldest that the peer speaks.
        oldest: u16,
        /// The newest that the peer speaks.
        newest: u16,
    },
}

impl Preamble {
    /// Its length on the wire.
    pub const SIZE: usize = size_of::<Wire>();

    /// Of this side's versions.
    pub fn new(kind: Purpose, migration: MigrationId) -> Self {
        Self { oldest: VERSION, newest: VERSION, kind, migration }
    }

    /// As it goes over the wire.
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let (kind, stream) = self.kind.to_wire();
        zerocopy::transmute!(Wire {
            magic: MAGIC,
            oldest: self.oldest.into(),
            newest: self.newest.into(),
            kind: kind.into(),
            stream: stream.into(),
            migration: self.migration.0.into(),
        })
    }

    /// Reads what a peer sent first.
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Result<Self, PreambleError> {
        let wire: Wire = zerocopy::transmute!(*bytes);
        if wire.magic != MAGIC {
            return Err(PreambleError::NotWhimbrel);
        }
        let (oldest, newest) = (wire.oldest.get(), wire.newest.get());
        if !(oldest..=newest).contains(&VERSION) {
            return Err(PreambleError::Version { oldest, newest });
        }
        let kind = Purpose::from_wire(wire.kind.get(), wire.stream.get())
            .ok_or(PreambleError::Purpose(wire.kind.get()))?;
        Ok(Self { oldest, newest, kind, migration: MigrationId(wire.migration.get()) })
    }
}

/// The length of a [`Reply`] on the wire.
pub const REPLY: usize = size_of::<WireReply>();

/// Whether the accepting side takes the connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// Go on.
    Welcome,
    /// No version in common; the reply carries the newest that it speaks.
    Version,
    /// It knows no such migration.
    Unknown,
    /// It takes nothing in just now.
    Busy,
    /// It does not take this connection for one of the migration's: another token, or from another host.
    Stranger,
    /// It speaks TLS only. Said in plaintext.
    Secured,
    /// It speaks plaintext only. Said in plaintext.
    Unsecured,
}

/// What the accepting side answers to a preamble.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reply {
    /// The version that both will speak.
    pub version: u16,
    /// Whether the connection is taken.
    pub status: Status,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireReply {
    magic: [u8; 8],
    version: U16,
    status: U16,
}

impl Reply {
    /// An answer in this side's newest version.
    pub fn new(status: Status) -> Self {
        Self { version: VERSION, status }
    }

    /// As it goes over the wire.
    pub fn to_bytes(self) -> [u8; REPLY] {
        let status: u16 = match self.status {
            Status::Welcome => 0,
            Status::Version => 1,
            Status::Unknown => 2,
            Status::Busy => 3,
            Status::Stranger => 4,
            Status::Secured => 5,
            Status::Unsecured => 6,
        };
        zerocopy::transmute!(WireReply { magic: MAGIC, version: self.version.into(), status: status.into() })
    }

    /// Reads what the accepting side answered.
    pub fn parse(bytes: &[u8; REPLY]) -> Result<Self, PreambleError> {
        let wire: WireReply = zerocopy::transmute!(*bytes);
        if wire.magic != MAGIC {
            return Err(PreambleError::NotWhimbrel);
        }
        let version = wire.version.get();
        let status = match wire.status.get() {
            0 => Status::Welcome,
            1 if version != VERSION => {
                return Err(PreambleError::Version { oldest: version, newest: version });
            }
            // A peer of our version that refuses it is none; an echo looks like that.
            1 => return Err(PreambleError::NotWhimbrel),
            2 => Status::Unknown,
            4 => Status::Stranger,
            5 => Status::Secured,
            6 => Status::Unsecured,
            _ => Status::Busy,
        };
        Ok(Self { version, status })
    }
}
