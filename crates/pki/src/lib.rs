//! Who may speak to whom: a workgroup's certificate authority, its hosts' certificates, and the TLS made of
//! them.
//!
//! A workgroup is one certificate authority (CA). A host belongs to it by a certificate that this CA issued,
//! and is who the certificate says. Both sides of every connection show theirs.

/// Instants as certificates and clocks have them.
mod clock;
/// Files: keys are their owner's alone, and nothing is overwritten.
mod files;
/// A host's own certificate and key, made into TLS.
mod identity;
/// Making CAs and certificates.
mod issue;
/// What certificate files say, and whether they fit together.
mod show;
/// Why a handshake failed, in words that say what to do.
mod words;

pub use clock::Instant;
pub use files::{ClientFiles, Files, PkiError, read, read_key};
pub use identity::{Identity, Security, names_of, server_name};
pub use issue::{Authority, Made, Pair, Validity, init, issue};
pub use show::{Card, Shown, show};
pub use words::why;
