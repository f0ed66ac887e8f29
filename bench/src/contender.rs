//! Who is compared.

/// One way of moving a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Contender {
    /// Whimbrel, in the mode of this name.
    Whimbrel(&'static str),
    /// QEMU's own pre-copy, with so many multifd channels; 0 is its default, one connection.
    Qemu {
        /// multifd channels.
        channels: u32,
    },
}

impl Contender {
    /// In the order in which they take turns.
    pub(crate) const ALL: [Self; 5] = [
        Self::Whimbrel("pre-copy"),
        Self::Qemu { channels: 0 },
        Self::Whimbrel("post-copy"),
        Self::Qemu { channels: 2 },
        Self::Whimbrel("hybrid"),
    ];

    /// Its name in options, tables and files.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Whimbrel("pre-copy") => "whimbrel-pre-copy",
            Self::Whimbrel("post-copy") => "whimbrel-post-copy",
            Self::Whimbrel(_) => "whimbrel-hybrid",
            Self::Qemu { channels: 0 } => "qemu-default",
            Self::Qemu { .. } => "qemu-multifd",
        }
    }

    /// Whether whimbrel does it.
    pub(crate) fn is_whimbrel(self) -> bool {
        matches!(self, Self::Whimbrel(_))
    }
}
