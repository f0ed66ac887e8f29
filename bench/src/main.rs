//! Whimbrel side by side with QEMU's own migration: the same guest, the same link, the same minutes.
//!
//! For each workload two guests are booted from one command line, each in a laboratory of its own. One is
//! moved by whimbrel, the other by QEMU; runs of all contenders alternate, there and back, and whoever is not
//! being measured is frozen. Markdown goes to standard output, all runs go to a file, and progress goes to
//! standard error.

mod bench; // who runs when, and for how long
mod commons; // a VM that comes back to a host that keeps its memory
mod contender; // who is compared
mod cpu; // processor time of processes and threads
mod figures; // what whimbrel is to reach
mod files; // a disk full of this machine's own files
mod footprint; // an agent's memory while it moves a large guest
mod guest; // what is moved, and what it feels
mod limit; // the same bytes with nothing else around them
mod link; // what the bytes travel over
mod options; // the command line
mod pauses; // where a pause spends its time
mod qemu; // a guest that QEMU moves
mod results; // all runs, on disk too
mod run; // what one run came to
mod stats; // medians and ratios
mod tables; // what people read
mod whimbrel; // a guest that whimbrel moves
mod workload; // what guests do

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let options = options::Options::parse();
    match bench::run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}
