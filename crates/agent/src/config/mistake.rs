//! What is wrong with a configuration, and where.

use std::{
    io,
    path::{Path, PathBuf},
};

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {cause}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The file has a mistake.
    #[error("mistake in the configuration {path}, line {line}, column {column}: {why}\n\n{excerpt}")]
    Mistake {
        /// The file.
        path: PathBuf,
        /// From 1 on.
        line: usize,
        /// From 1 on.
        column: usize,
        /// What is wrong.
        why: String,
        /// The line, with a mark below the mistake.
        excerpt: String,
    },
    /// A flag has a mistake, or what is needed is not there.
    #[error("{0}")]
    Flag(String),
}

/// What the TOML reader found, with the line that it is in.
pub(super) fn mistake(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let at = error.span().map_or(0, |span| span.start).min(text.len());
    let before = &text[..(0..=at).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0)];
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    let shown = text.lines().nth(line - 1).unwrap_or_default();
    let excerpt = format!("  {line} | {shown}\n  {:>1$} | {2:>3$}", "", line.to_string().len(), "^", column);
    ConfigError::Mistake { path: path.to_owned(), line, column, why: error.message().to_owned(), excerpt }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, tests::load};

    #[test]
    fn a_mistake_is_shown_with_its_line_and_column() {
        let table = [
            ("name = \"a\"\nlissten = \"x\"\n", 2, 1, "unknown field `lissten`"),
            ("listen = \"nowhere\"\n", 1, 10, "invalid socket address"),
            ("name = \"a\"\n[peers]\nb = \"10.0.0.2\"\n", 3, 5, "is no address"),
            ("name = \"../x\"\n", 1, 8, "is no name"),
            ("name = \n", 1, 8, ""),
            ("[peers]\n\"a b\" = \"x:1\"\n", 2, 1, "is no name"),
        ];
        for (text, at_line, at_column, says) in table {
            match load(text, Flags::default()).unwrap_err() {
                ConfigError::Mistake { line, column, why, .. } => {
                    assert_eq!((line, column), (at_line, at_column), "{text}: {why}");
                    assert!(why.contains(says), "{why}");
                }
                other => panic!("{other}"),
            }
        }
    }
}
