//! `whimbrel doctor`: can this host do it?

use doctor::{Style, examine, render};
use std::{
    env,
    io::{self, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
};

/// What may be said after `doctor`.
#[derive(clap::Args, Debug)]
pub(crate) struct Doctor {
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
    /// A QEMU binary to look at besides those in PATH; may be given several times.
    #[arg(long, value_name = "PATH")]
    qemu: Vec<PathBuf>,
}

/// Says what works. Ends with 1 when no migration could.
pub(crate) fn doctor(args: &Doctor) -> io::Result<ExitCode> {
    let diagnosis = examine(&args.qemu);
    let mut out = io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &diagnosis)?;
        writeln!(out)?;
    } else {
        let coloured = out.is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        render(&diagnosis, if coloured { Style::Colour } else { Style::Plain }, &mut out)?;
    }
    Ok(ExitCode::from(diagnosis.exit_status()))
}
