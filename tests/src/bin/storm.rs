//! `./dev storm`: every blow of a storm, on real VMs.

use lab::{
    Lab, Result, Tools,
    storm::{Fate, Fault, Storm, rage},
};
use std::process::ExitCode;

fn main() -> ExitCode {
    let tools = match Tools::find() {
        Ok(tools) => tools,
        Err(lacks) => {
            eprintln!("the storm cannot be had here: {lacks}");
            return ExitCode::FAILURE;
        }
    };
    let chosen: Result<Vec<Fault>> =
        std::env::args().skip(1).filter(|word| word != "--only").map(|word| word.parse()).collect();
    let raged = chosen.and_then(|chosen| {
        let faults = if chosen.is_empty() { Fault::all() } else { chosen };
        let lab = Lab::new(&["a", "b"])?;
        let raged = Storm::new(&lab, &tools).and_then(|mut storm| rage(&mut storm, &faults));
        if raged.is_err() {
            lab.print_logs(40);
        }
        raged
    });
    match raged {
        Ok(fates) => {
            let count = |fate| fates.iter().filter(|one| **one == fate).count();
            println!(
                "{} blows: {} VMs stayed, {} moved, {} were killed with their own QEMU, {} blows met \
                 nothing; none was lost, none ran twice",
                fates.len(),
                count(Fate::Stayed),
                count(Fate::Moved),
                count(Fate::Killed),
                count(Fate::Missed)
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("the storm did harm: {error}");
            ExitCode::FAILURE
        }
    }
}
