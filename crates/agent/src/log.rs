//! Logs: on standard error, for people or for programs.

use std::{env, io::IsTerminal, str::FromStr};
use tracing_subscriber::{EnvFilter, fmt};

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("a log is text or json".to_owned()),
        }
    }
}

/// Logs from now on, everything from `info` up unless `WHIMBREL_LOG` says otherwise (`debug`, `agent=trace`,
/// …).
pub fn begin(format: Format) {
    let filter = EnvFilter::try_from_env("WHIMBREL_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let plain = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let coloured = std::io::stderr().is_terminal() && !plain;
    let lines = fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(coloured);
    // It fails only if somebody logs already, as in a test.
    let _ = match format {
        Format::Text => lines.with_target(false).try_init(),
        Format::Json => lines.json().flatten_event(true).try_init(),
    };
}
