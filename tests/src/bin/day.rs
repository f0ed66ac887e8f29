//! `./dev day`: a day of an ordinary Debian. `WHIMBREL_DEBIAN` names what `tests/debian.sh` has made.

use lab::{Doing, Lab, Result, Tools, day};
use std::{path::PathBuf, process::ExitCode};

fn lived() -> Result<String> {
    let image: PathBuf =
        std::env::var_os("WHIMBREL_DEBIAN").doing("find a Debian (./dev day makes one)")?.into();
    let tools = Tools::find()?;
    let lab = Lab::new(&["a", "b"])?;
    let lived = day::live(&lab, &tools, &image);
    if lived.is_err() {
        lab.print_logs(20);
    }
    lived
}

fn main() -> ExitCode {
    match lived() {
        Ok(said) => {
            println!("day: {said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("day: {error}");
            ExitCode::FAILURE
        }
    }
}
