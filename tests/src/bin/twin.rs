//! `./dev twin`: random sequences of actions on two VMs, of which one is moved (`--sequences N`, `--actions
//! N`, `--seed S`); or only these, in words (`--only 'write, move hybrid, reboot; pause, move pre-copy'`).
//! `./dev storm --meddle` is `--meddle all`: what others do, at each moment of a migration in each mode;
//! `--meddle DEED` only one of them. `--sample N`: so many of them, all over. `--jobs N`: so many pairs live
//! at a time.

use lab::{
    Doing, Error, Lab, Result, Tools,
    twin::{Action, How, Twins, all, draw, from_words, interventions},
};
use std::{process::ExitCode, time::Instant};

/// What is asked for.
struct Wish {
    sequences: u32,
    actions: usize,
    seed: u64,
    jobs: usize,
    sample: Option<usize>,
    only: Option<String>,
    meddle: Option<String>,
}

fn wish() -> Result<Wish> {
    let mut wish =
        Wish { sequences: 1000, actions: 20, seed: 1, jobs: 2, sample: None, only: None, meddle: None };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().doing(format!("find the value of {word}"))?;
        match word.as_str() {
            "--sequences" => wish.sequences = value.parse().doing(format!("read {word} {value}"))?,
            "--actions" => wish.actions = value.parse().doing(format!("read {word} {value}"))?,
            "--seed" => wish.seed = value.parse().doing(format!("read {word} {value}"))?,
            "--jobs" => wish.jobs = value.parse().doing(format!("read {word} {value}"))?,
            "--sample" => wish.sample = Some(value.parse().doing(format!("read {word} {value}"))?),
            "--only" => wish.only = Some(value),
            "--meddle" => wish.meddle = Some(value),
            _ => return Err(Error::new("./dev twin", format!("there is no option {word}"))),
        }
    }
    Ok(wish)
}

/// What is to be lived through, and whether the smallest of what fails is looked for.
fn sequences(wish: &Wish) -> Result<(Vec<Vec<Action>>, bool)> {
    if let Some(only) = &wish.only {
        return only.split(';').map(from_words).collect::<Result<_>>().map(|all| (all, false));
    }
    let Some(deed) = &wish.meddle else {
        return draw(wish.sequences, wish.actions, wish.seed).map(|all| (all, true));
    };
    let wanted = |action: &Action| {
        deed == "all" || matches!(action, Action::MoveWhile(.., what) if what.word() == deed)
    };
    let mut all = interventions();
    all.retain(|sequence| sequence.iter().any(wanted));
    if let Some(sample) = wish.sample.filter(|sample| *sample > 0 && *sample < all.len()) {
        let of = all.len();
        all = (0..sample).filter_map(|n| all.get(n * of / sample).cloned()).collect();
    }
    Ok((all, false))
}

fn live(lab: &Lab, tools: &Tools, wish: &Wish) -> Result<()> {
    let begin = Instant::now();
    let (sequences, smallest) = sequences(wish)?;
    let told = wish.only.is_some();
    let twins = Twins::new(lab, tools)?;
    let found = all(&twins, &sequences, How { jobs: wish.jobs, told, smallest });
    let said = format!(
        "{} of {} sequences made no difference that is not listed, {} did in the pause where that is known; \
         moved {} times, refused {} times; {} s",
        found.sequences,
        sequences.len(),
        found.open,
        found.went.moved,
        found.went.refused,
        begin.elapsed().as_secs()
    );
    println!("twin: {said}");
    found.held().map(drop)
}

fn main() -> ExitCode {
    let tools = match Tools::find() {
        Ok(tools) => tools,
        Err(lacks) => {
            eprintln!("twins cannot be had here: {lacks}");
            return ExitCode::FAILURE;
        }
    };
    let lived = wish().and_then(|wish| {
        let lab = Lab::new(&["a", "b"])?;
        let lived = live(&lab, &tools, &wish);
        if lived.is_err() {
            lab.print_logs(20);
        }
        lived
    });
    match lived {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("twin: {error}");
            ExitCode::FAILURE
        }
    }
}
