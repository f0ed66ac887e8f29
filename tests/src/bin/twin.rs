//! `./dev twin`: random sequences of actions on two VMs, of which one is moved (`--sequences N`, `--actions
//! N`, `--seed S`); or only these, in words (`--only 'write, move hybrid, reboot; pause, move pre-copy'`). `./dev storm
//! --meddle` is `--meddle all`: what others do, at each moment of a migration in each mode; `--meddle DEED`
//! only one of them.

use lab::{
    Doing, Error, Lab, Result, Tools,
    twin::{Action, Twins, from_words, in_words, interventions, search},
};
use std::{process::ExitCode, time::Instant};

/// What is asked for.
struct Wish {
    sequences: u32,
    actions: usize,
    seed: u64,
    only: Option<String>,
    meddle: Option<String>,
}

fn wish() -> Result<Wish> {
    let mut wish = Wish { sequences: 1000, actions: 20, seed: 1, only: None, meddle: None };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().doing(format!("find the value of {word}"))?;
        match word.as_str() {
            "--sequences" => wish.sequences = value.parse().doing(format!("read {word} {value}"))?,
            "--actions" => wish.actions = value.parse().doing(format!("read {word} {value}"))?,
            "--seed" => wish.seed = value.parse().doing(format!("read {word} {value}"))?,
            "--only" => wish.only = Some(value),
            "--meddle" => wish.meddle = Some(value),
            _ => return Err(Error::new("./dev twin", format!("there is no option {word}"))),
        }
    }
    Ok(wish)
}

fn live(lab: &Lab, tools: &Tools, wish: &Wish) -> Result<String> {
    let begin = Instant::now();
    let mut twins = Twins::new(lab, tools)?;
    if let Some(only) = &wish.only {
        let all: Result<Vec<_>> = only.split(';').map(from_words).collect();
        return each(&mut twins, &all?, true);
    }
    if let Some(deed) = &wish.meddle {
        let wanted = |action: &Action| {
            deed == "all" || matches!(action, Action::MoveWhile(.., what) if what.word() == deed)
        };
        let all: Vec<_> = interventions().into_iter().filter(|all| all.iter().any(wanted)).collect();
        return each(&mut twins, &all, false);
    }
    let found = search(&mut twins, wish.sequences, wish.actions, wish.seed)?;
    Ok(format!(
        "{} sequences of {} actions, seed {}: moved {} times, refused {} times, \
         no difference that is not listed; {} s",
        found.sequences,
        wish.actions,
        wish.seed,
        found.went.moved,
        found.went.refused,
        begin.elapsed().as_secs()
    ))
}

/// Each sequence in a life of its own; all that go wrong are told. `told`: so is what QEMU refuses.
fn each(twins: &mut Twins<'_>, all: &[Vec<Action>], told: bool) -> Result<String> {
    let (begin, mut wrong, mut moved, mut refused) = (Instant::now(), 0, 0, 0);
    for (n, sequence) in all.iter().enumerate() {
        match twins.tell(sequence, told) {
            Ok(went) => (moved, refused) = (moved + went.moved, refused + went.refused),
            Err(error) => {
                wrong += 1;
                eprintln!("BROKEN: {error}\n  ./dev twin --only '{}'", in_words(sequence));
            }
        }
        if n % 24 == 23 {
            eprintln!("[{} s] {}/{}", begin.elapsed().as_secs(), n + 1, all.len());
        }
    }
    let said = format!(
        "{} sequences: moved {moved} times, refused {refused} times, {wrong} broke a promise",
        all.len()
    );
    if wrong == 0 { Ok(said) } else { Err(Error::new("twins", said)) }
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
        Ok(said) => {
            println!("twin: {said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("twin: {error}");
            ExitCode::FAILURE
        }
    }
}
