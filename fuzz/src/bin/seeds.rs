//! Writes the seeds of all targets into a directory, each target's into one of its own; says the targets'
//! names.

use std::{fs, path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    let Some(into) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: seeds DIRECTORY");
        return ExitCode::from(2);
    };
    for target in fuzz::TARGETS {
        let dir = into.join(target.name);
        let written = fs::create_dir_all(&dir).and_then(|()| {
            target
                .seeds()
                .iter()
                .enumerate()
                .try_for_each(|(n, seed)| fs::write(dir.join(format!("seed-{n:02}")), seed))
        });
        if let Err(error) = written {
            eprintln!("{}: {error}", dir.display());
            return ExitCode::FAILURE;
        }
        println!("{}", target.name);
    }
    ExitCode::SUCCESS
}
