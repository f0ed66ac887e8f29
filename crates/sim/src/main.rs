//! `sim storm`: every storm. `sim replay SCHEDULE`: one of them, with all that happens in it.

use sim::{PlantedBug, Report, Schedule, Size, hunt, storm};
use std::process::ExitCode;

const HELP: &str = "\
sim storm [--seeds N] [--threads N] [--no-pairs] [--quiet]   every storm of one fault, every one of two, and \
N at random
sim replay SCHEDULE                                          one of them again, step by step
sim bite [FAULT ...]                                         how planted bugs are found
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = match args.split_first() {
        Some((command, rest)) if command == "storm" => storms(rest),
        Some((command, rest)) if command == "replay" => replay(rest),
        Some((command, rest)) if command == "bite" => bite(rest),
        _ => Err(HELP.into()),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprint!("{why}{}", if why.ends_with('\n') { "" } else { "\n" });
            ExitCode::from(2)
        }
    }
}

/// The value behind an option.
fn number(args: &mut std::slice::Iter<'_, String>, of: &str) -> Result<u64, String> {
    let value = args.next().ok_or_else(|| format!("{of} needs a number"))?;
    value.parse().map_err(|e| format!("{of} {value}: {e}"))
}

fn storms(args: &[String]) -> Result<bool, String> {
    let (mut size, mut quiet) = (Size::STORM, false);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--seeds" => size.seeds = number(&mut args, arg)?,
            "--threads" => size.threads = number(&mut args, arg)?.clamp(1, 64) as usize,
            "--no-pairs" => size.pairs = false,
            "--quiet" => quiet = true,
            _ => return Err(format!("there is no option {arg}\n{HELP}")),
        }
    }
    let report = storm(size, |line| {
        if !quiet {
            println!("  {line}");
        }
    });
    show(&report);
    Ok(report.findings.is_empty())
}

fn show(report: &Report) {
    let Report { enumerated, random, findings, took } = report;
    println!(
        "simulation: enumerated {} schedules ({} of them joined another's state), {} states, {} faults, {} \
         moves, {:.1} s",
        enumerated.schedules,
        enumerated.joined,
        enumerated.states,
        enumerated.faults,
        enumerated.moves,
        took[0].as_secs_f64()
    );
    println!(
        "simulation: at random {} schedules, {} faults, {} moves, {:.1} s",
        random.schedules,
        random.faults,
        random.moves,
        took[1].as_secs_f64()
    );
    for finding in findings.iter().take(20) {
        println!("BROKEN: {}\n  cargo run --release -p sim -- replay '{}'", finding.what, finding.schedule);
    }
    match findings.len() {
        0 => println!("simulation: no promise was broken"),
        n => println!("simulation: {n} schedules broke a promise"),
    }
}

fn replay(args: &[String]) -> Result<bool, String> {
    let [schedule] = args else { return Err(HELP.into()) };
    let schedule: Schedule = schedule.parse()?;
    let world = schedule.replay();
    for line in world.trace.0.iter().flatten() {
        println!("{line}");
    }
    match &world.breach.0 {
        Some(what) => println!("BROKEN: {what}"),
        None => println!("no promise was broken"),
    }
    Ok(world.breach.0.is_none())
}

fn bite(args: &[String]) -> Result<bool, String> {
    let bugs = args.iter().map(|word| word.parse()).collect::<Result<Vec<PlantedBug>, String>>()?;
    let bugs = if bugs.is_empty() { PlantedBug::ALL.to_vec() } else { bugs };
    let mut all = true;
    for bug in bugs {
        let (found, runs) = hunt(bug);
        match found {
            Some(finding) => {
                println!("{}: after {runs} runs: {}\n  {}", bug.word(), finding.what, finding.schedule)
            }
            None => {
                all = false;
                println!("{}: NOT FOUND in {runs} runs", bug.word());
            }
        }
    }
    Ok(all)
}
