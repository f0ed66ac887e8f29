//! What can go wrong between us and a QMP socket.

use std::{io, path::PathBuf, time::Duration};

/// Why QEMU gave no answer, or a bad one.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody listens there, or we may not connect.
    #[error("cannot connect to the QMP socket {path}: {cause}", path = path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's word.
        #[source]
        cause: io::Error,
    },
    /// Something answered, but not with QMP's greeting.
    #[error("{path} is not a QMP socket of QEMU: instead of a greeting it sent \
             {got:?}", path = path.display())]
    NotQemu {
        /// The socket.
        path: PathBuf,
        /// The beginning of what it sent.
        got: String,
    },
    /// Connected, but no greeting came.
    #[error(
        "{path} sent no greeting within {waited:?}: a QMP socket serves one client at a time, so another one \
         probably holds it (or it is not QEMU's); disconnect that client, or give QEMU a second -qmp socket",
        path = path.display()
    )]
    Busy {
        /// The socket.
        path: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
    /// QEMU understood and said no.
    #[error("{command}: {why}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of the error, such as `CommandNotFound`.
        class: String,
        /// QEMU's own words.
        why: String,
    },
    /// No answer in time.
    #[error("{command}: QEMU gave no answer within {waited:?}")]
    Timeout {
        /// The command.
        command: String,
        /// How long we waited.
        waited: Duration,
    },
    /// QEMU closed the connection: it has most likely ended.
    #[error("{command}: QEMU closed its QMP socket")]
    Closed {
        /// The command that was under way.
        command: String,
    },
    /// The connection broke.
    #[error("{command}: the QMP socket broke: {cause}")]
    Broken {
        /// The command that was under way.
        command: String,
        /// The system's word.
        #[source]
        cause: io::Error,
    },
    /// A line longer than any that QEMU sends.
    #[error("{command}: a line of more than {limit} bytes came from the QMP socket")]
    TooLong {
        /// The command that was under way.
        command: String,
        /// The bound.
        limit: usize,
    },
    /// An answer without what it must have.
    #[error("{command}: QEMU's answer is not understood: {got}")]
    Strange {
        /// The command.
        command: String,
        /// The beginning of the answer.
        got: String,
    },
}

impl QmpError {
    /// Whether QEMU does not know the command.
    pub fn is_unknown_command(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "CommandNotFound")
    }

    /// Whether QEMU has understood, and said no.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Whether nobody is left at the other end.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::Broken { .. } | Self::Connect { .. })
    }

    /// Names the command that was under way when reading failed.
    pub(super) fn during(self, name: &str, patience: Duration) -> Self {
        let command = name.to_owned();
        match self {
            Self::Timeout { .. } => Self::Timeout { command, waited: patience },
            Self::Closed { .. } => Self::Closed { command },
            Self::Broken { cause, .. } => Self::Broken { command, cause },
            Self::TooLong { limit, .. } => Self::TooLong { command, limit },
            other => other,
        }
    }
}
