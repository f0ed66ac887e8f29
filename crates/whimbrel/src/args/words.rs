//! What may be chosen by a word: the engine's own choices, with a line of help each.

use clap::ValueEnum;
use engine::report::{Compression, Limit, Mode, Robust};

/// How memory travels.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum ModeArg {
    /// Pre-copy until the pause is short enough; then, if allowed, post-copy.
    Auto,
    /// All memory while the VM runs here.
    PreCopy,
    /// All memory while the VM runs there.
    PostCopy,
    /// One pass while it runs here, the rest while it runs there.
    Hybrid,
}

impl From<ModeArg> for Mode {
    fn from(mode: ModeArg) -> Self {
        match mode {
            ModeArg::Auto => Self::Auto,
            ModeArg::PreCopy => Self::PreCopy,
            ModeArg::PostCopy => Self::PostCopy,
            ModeArg::Hybrid => Self::Hybrid,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum CompressArg {
    /// What moves most guest memory a second, measured on the way.
    Auto,
    /// Nothing.
    None,
    /// LZ4 always.
    Lz4,
    /// Zstandard always, at the level that suits the link.
    Zstd,
}

impl From<CompressArg> for Compression {
    fn from(compress: CompressArg) -> Self {
        match compress {
            CompressArg::Auto => Self::Auto,
            CompressArg::None => Self::None,
            CompressArg::Lz4 => Self::Lz4,
            CompressArg::Zstd => Self::Zstd,
        }
    }
}

/// What must be in the spool when the VM changes hands.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum RobustArg {
    /// All that the target lacks: from then on the source may be lost.
    Strict,
    /// It is written afterwards; how much is missing is shown.
    Relaxed,
}

impl From<RobustArg> for Robust {
    fn from(robust: RobustArg) -> Self {
        match robust {
            RobustArg::Strict => Self::Strict,
            RobustArg::Relaxed => Self::Relaxed,
        }
    }
}

/// What the user is promised.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum LimitArg {
    /// The pause.
    Downtime,
    /// The end.
    Time,
    /// The wait of a writer.
    Stall,
}

impl From<LimitArg> for Limit {
    fn from(promise: LimitArg) -> Self {
        match promise {
            LimitArg::Downtime => Self::Downtime,
            LimitArg::Time => Self::Time,
            LimitArg::Stall => Self::Stall,
        }
    }
}
