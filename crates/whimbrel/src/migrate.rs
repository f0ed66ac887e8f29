//! Migrations: start and watch, come back to, cancel.

use crate::{
    args::{Cancel, Migrate, PlanArgs, Status},
    client::{Client, Lines, vm_path},
    forecast,
    progress::Display,
    report::{When, next_step, render},
    trouble::{CANCELLED, DONE, FAILED, IN_DOUBT, Trouble, status_of},
    words,
};
use agent::api::Started;
use api::{Event, Fate, Forecast, MigrateOptions, Outcome, Report};
use hyper::Method;
use ports::RunState;
use serde_json::json;
use std::{
    io::{self, Write},
    process::ExitCode,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Where all that happens in a migration is told, from its beginning to its end.
const FOLLOW: &str = "/migration?follow=true";

pub(crate) fn plan(client: &Client, args: &PlanArgs) -> Result<ExitCode, Trouble> {
    let path = vm_path(&args.how.vm, "/plan")?;
    let forecast: Forecast = Client::runtime()?.block_on(client.post(&path, &args.how.options))?;
    let words = if args.json {
        words::json(&forecast)
    } else {
        forecast::render(&args.how.vm, &args.how.options.to, &forecast)
    };
    writeln!(io::stdout(), "{}", words.trim_end())?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn migrate(client: &Client, args: &Migrate) -> Result<ExitCode, Trouble> {
    let options = MigrateOptions { verify: args.verify, ..args.how.options.clone() };
    let vm = &args.how.vm;
    Client::runtime()?.block_on(async {
        // Before anything begins: an interrupt from here on is a cancel.
        let interrupt = signal(SignalKind::interrupt())?;
        let started: Started = client.post(&vm_path(vm, "/migrate")?, &options).await?;
        if args.detach {
            let mut out = io::stdout().lock();
            if args.json {
                writeln!(out, "{}", json!({ "vm": vm, "migration": started.migration }))?;
            } else {
                writeln!(out, "the migration of {vm} has begun; `whimbrel status {vm} --follow` watches it")?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        let lines = client.lines(&vm_path(vm, FOLLOW)?).await;
        // An agent that ends before it can be watched has ended during the migration all the same.
        let lines = lines.map_err(|trouble| if trouble.is_ours() { agent_ended(vm) } else { trouble })?;
        watch(client, vm, lines, args.json, interrupt, OnInterrupt::Cancel).await.map(|report| end(&report))
    })
}

pub(crate) fn status(client: &Client, args: &Status) -> Result<ExitCode, Trouble> {
    Client::runtime()?.block_on(async {
        if args.follow {
            let interrupt = signal(SignalKind::interrupt())?;
            let lines = client.lines(&vm_path(&args.vm, FOLLOW)?).await?;
            return watch(client, &args.vm, lines, args.json, interrupt, OnInterrupt::Leave)
                .await
                .map(|report| end(&report));
        }
        let mut lines = client.lines(&vm_path(&args.vm, "/migration")?).await?;
        let mut events = Vec::new();
        while let Some(line) = lines.next().await? {
            events.push(parse(&line)?);
        }
        if args.json {
            let line = match events.last() {
                Some(Event::Done(report)) => words::json(report),
                last => words::json(&last),
            };
            writeln!(io::stdout(), "{line}")?;
        } else {
            print_status(&args.vm, &events)?;
        }
        let code = match events.last() {
            Some(Event::Done(report)) if status_of(report) == IN_DOUBT => IN_DOUBT,
            _ => DONE,
        };
        Ok(ExitCode::from(code))
    })
}

pub(crate) fn cancel(client: &Client, args: &Cancel) -> Result<ExitCode, Trouble> {
    Client::runtime()?.block_on(async {
        client.order(Method::POST, &vm_path(&args.vm, "/cancel")?, None).await?;
        let mut lines = client.lines(&vm_path(&args.vm, FOLLOW)?).await?;
        let report = loop {
            match lines.next().await?.as_deref().map(parse).transpose()? {
                Some(Event::Done(report)) => break report,
                Some(_) => {}
                None => return Err(agent_ended(&args.vm)),
            }
        };
        let mut out = io::stdout().lock();
        if args.json {
            writeln!(out, "{}", words::json(&report))?;
        } else if matches!(report.fate(), Fate::On { state: RunState::Running, .. })
            && report.outcome == Outcome::Cancelled
        {
            writeln!(out, "cancelled; {} runs on {} as before", report.vm, report.from)?;
        } else if report.outcome == Outcome::Cancelled {
            write!(out, "{}", render(&report, When::Now))?;
        } else {
            writeln!(out, "too late to cancel:\n{}", render(&report, When::Now))?;
        }
        let code = if status_of(&report) == CANCELLED { DONE } else { status_of(&report).max(FAILED) };
        Ok(ExitCode::from(code))
    })
}

/// What Ctrl-C means.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OnInterrupt {
    /// End the migration, and wait for that.
    Cancel,
    /// Only stop watching.
    Leave,
}

/// Shows a migration to its end.
async fn watch(
    client: &Client,
    vm: &str,
    mut lines: Lines,
    as_json: bool,
    mut interrupt: Signal,
    on_interrupt: OnInterrupt,
) -> Result<Report, Trouble> {
    let mut display = Display::new(as_json);
    let mut cancelling = false;
    loop {
        tokio::select! {
            event = next_event(&mut lines, vm) => match event? {
                Event::Done(report) => {
                    display.finish(&report)?;
                    return Ok(*report);
                }
                event => display.show(&event)?,
            },
            Some(()) = interrupt.recv() => {
                if cancelling || on_interrupt == OnInterrupt::Leave {
                    return Err(left_alone(vm, cancelling));
                }
                cancelling = true;
                let asked = client.order(Method::POST, &vm_path(vm, "/cancel")?, None).await;
                display.note(&match asked {
                    Ok(()) => "cancelling: the VM stays where it is".to_owned(),
                    Err(refused) => {
                        let why = refused.failure.why;
                        format!("{}: {why}; Ctrl-C again ends the watching only", refused.failure.what)
                    }
                })?;
            }
        }
    }
}

async fn next_event(lines: &mut Lines, vm: &str) -> Result<Event, Trouble> {
    match lines.next().await {
        Ok(Some(line)) => parse(&line),
        Ok(None) | Err(Trouble { status: IN_DOUBT, .. }) => Err(agent_ended(vm)),
        Err(trouble) => Err(trouble),
    }
}

fn parse(line: &[u8]) -> Result<Event, Trouble> {
    serde_json::from_slice(line).map_err(|error| {
        Trouble::local(FAILED, "cannot understand the agent", error.to_string())
            .next("use the same version of whimbrel for both")
    })
}

fn end(report: &Report) -> ExitCode {
    ExitCode::from(status_of(report))
}

fn agent_ended(vm: &str) -> Trouble {
    Trouble::local(
        IN_DOUBT,
        format!("the agent ended during the migration of {vm}"),
        "its connection was closed",
    )
    .next(format!("start the agent again: it settles who runs {vm}, and `whimbrel status {vm}` says it"))
}

fn left_alone(vm: &str, cancelling: bool) -> Trouble {
    let what = if cancelling { "is being ended" } else { "goes on" };
    Trouble::local(CANCELLED, format!("the migration of {vm} {what} without being watched"), "interrupted")
        .next(format!("`whimbrel status {vm} --follow` watches it again"))
}

fn print_status(vm: &str, events: &[Event]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if let Some(Event::Done(report)) = events.last() {
        write!(out, "{}", render(report, When::Before))?;
        if let Some(next) = next_step(report) {
            writeln!(out, "\n  next: {next}")?;
        }
        return Ok(());
    }
    writeln!(out, "{vm} is being migrated")?;
    for event in events {
        if let Some(line) = crate::progress::line(event) {
            writeln!(out, "{line}")?;
        }
    }
    if let Some(tick @ Event::Tick { .. }) = events.last() {
        writeln!(out, "{}", crate::progress::now(tick).unwrap_or_default())?;
    }
    Ok(())
}
