//! Events and acts in a few words, for logs and errors: some of them hold megabytes.

use std::fmt::{self, Debug, Display, Write};

/// As many bytes of a debug text as name it.
const ENOUGH: usize = 48;

/// Shows the beginning of what `Debug` would show, and spends no time on the rest.
pub struct Brief<'a, T>(pub &'a T);

impl<T: Debug> Display for Brief<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut short = Short { left: ENOUGH, to: f };
        // The only error is that it was enough.
        let _ = write!(short, "{:?}", self.0);
        Ok(())
    }
}

struct Short<'a, 'b> {
    left: usize,
    to: &'a mut fmt::Formatter<'b>,
}

impl Write for Short<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = (0..=text.len().min(self.left)).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        self.to.write_str(&text[..end])?;
        self.left -= end;
        if end < text.len() { self.to.write_str("…").and(Err(fmt::Error)) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_long_is_cut() {
        assert_eq!(Brief(&Some(1)).to_string(), "Some(1)");
        let long = Brief(&vec![7u8; 1 << 20]).to_string();
        assert!(long.starts_with("[7, 7") && long.ends_with('…') && long.len() < 60, "{long}");
    }
}
