//! `./dev field`: VMs as people start them (`tests/field`), adopted and moved there and back in every mode;
//! or only those whose name has a word in it.

use lab::{Error, Lab, Result, Stage, Tools, field};
use std::{process::ExitCode, time::Instant};

/// How much of each log is shown where something is wrong.
const LINES: usize = 40;

fn live(lab: &Lab, tools: &Tools, only: &str) -> Result<String> {
    let begin = Instant::now();
    let stage = Stage::new(lab, tools)?;
    let cases: Vec<_> = field::cases()?.into_iter().filter(|case| case.name.contains(only)).collect();
    let (mut wrong, mut refused) = (0, 0);
    for (n, case) in cases.iter().enumerate() {
        let what = match field::live(&stage, case, n) {
            Ok(()) if case.refused.is_some() => {
                refused += 1;
                "is refused, as it must be".to_owned()
            }
            Ok(()) => "there and back".to_owned(),
            Err(error) => {
                wrong += 1;
                format!("WRONG: {error}")
            }
        };
        eprintln!("[{} s] {}: {what}", begin.elapsed().as_secs(), case.name);
    }
    let said = format!("{} cases, {refused} of them refused by right, {wrong} wrong", cases.len());
    if wrong == 0 {
        return Ok(said);
    }
    lab.print_logs(LINES);
    Err(Error::new("field", said))
}

fn main() -> ExitCode {
    let tools = match Tools::find() {
        Ok(tools) => tools,
        Err(lacks) => {
            eprintln!("the field cannot be had here: {lacks}");
            return ExitCode::FAILURE;
        }
    };
    let only = std::env::args().nth(1).unwrap_or_default();
    match Lab::new(&["a", "b"]).and_then(|lab| live(&lab, &tools, &only)) {
        Ok(said) => {
            println!("field: {said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("field: {error}");
            ExitCode::FAILURE
        }
    }
}
