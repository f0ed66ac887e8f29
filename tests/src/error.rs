//! What goes wrong in the laboratory: what was being done, and why it did not work.

use std::fmt;

/// An error of the laboratory or a promise that was not kept. `Debug` reads as `Display`, because that is
/// what a failing test prints.
#[derive(Clone, PartialEq, Eq)]
pub struct Error {
    /// What was being done.
    pub what: String,
    /// Why it did not work.
    pub why: String,
}

/// What most of the laboratory returns.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// `what` did not work because of `why`.
    pub fn new(what: impl Into<String>, why: impl fmt::Display) -> Self {
        Self { what: what.into(), why: why.to_string() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Error {}

/// Says what was being done when something else's error came up.
pub trait Doing<T> {
    /// Turns the error into one that says what was being done.
    fn doing(self, what: impl Into<String>) -> Result<T>;
}

impl<T, E: fmt::Display> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|why| Error::new(what, why))
    }
}

impl<T> Doing<T> for Option<T> {
    fn doing(self, what: impl Into<String>) -> Result<T> {
        self.ok_or_else(|| Error::new(what, "there is none"))
    }
}

/// Like `assert!`, as an error: the laboratory then still prints its logs.
#[macro_export]
macro_rules! ensure {
    ($holds:expr, $($words:tt)+) => {
        if !$holds {
            return Err($crate::Error::new(format!($($words)+), concat!("not true: ", stringify!($holds))));
        }
    };
}
