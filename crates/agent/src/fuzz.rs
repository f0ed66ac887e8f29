//! What takes bytes from strangers in here, as functions of bytes: for the crate `fuzz`, and for nothing
//! else.
//!
//! Not behind a feature: cargo builds the workspace with all features that anybody asks for, and what is
//! tested would not be what is shipped.

use crate::config::{Config, ConfigError, Flags};
use std::path::Path;

pub use crate::store::fuzz::{MIGRATION, NAME, TABLES, read_missing, read_row, store, write_missing};

/// Reads a configuration of this text.
pub fn config(text: &str) -> Result<Config, ConfigError> {
    let flags = Flags { name: Some("fuzz".to_owned()), ..Flags::default() };
    Config::parse(text, Path::new("agent.toml"), flags)
}
