//! A migration while it happens: a live line on a terminal, one line for each thing that is over, JSON for
//! programs.

use crate::{
    forecast,
    report::{When, next_step, render},
    words::{count, counted, json, left, millis},
};
use api::{Event, Phase, Report};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    io::{self, IsTerminal, Write},
    time::Duration,
};
use units::{Bytes, PAGE_SIZE, Rate};

/// Steps of the bar: more than any terminal has columns for.
const STEPS: u64 = 1000;

/// Where events are shown.
pub(crate) enum Display {
    /// Each event a line of JSON, the report bare.
    Json,
    /// Each thing that is over a line of words.
    Lines,
    /// The same, with what is going on in the last line of the terminal.
    Live(ProgressBar),
}

impl Display {
    /// For programs, or for people with or without a terminal.
    pub(crate) fn new(as_json: bool) -> Self {
        if as_json {
            return Self::Json;
        }
        if !io::stdout().is_terminal() {
            return Self::Lines;
        }
        let bar = ProgressBar::with_draw_target(Some(STEPS), ProgressDrawTarget::stdout());
        // The template is a constant and is tested; a bar without it still shows its message.
        if let Ok(style) = ProgressStyle::with_template("{prefix:10} {bar:24.cyan/dim} {wide_msg}") {
            bar.set_style(style.progress_chars("━╸ "));
        }
        Self::Live(bar)
    }

    /// Shows what happens.
    pub(crate) fn show(&mut self, event: &Event) -> io::Result<()> {
        match self {
            Self::Json => return out(&json(event)),
            Self::Lines => {}
            Self::Live(bar) => match event {
                Event::Phase { phase, .. } => {
                    bar.set_prefix(word(*phase));
                    bar.set_position(0);
                    bar.set_message("");
                }
                // Before memory moves there is nothing to measure.
                Event::Tick { phase: Phase::Preflight, .. } => {}
                Event::Tick { phase, left_bytes, of_bytes, .. } => {
                    bar.set_prefix(word(*phase));
                    let done = of_bytes.saturating_sub(*left_bytes);
                    bar.set_position((done as f64 / (*of_bytes).max(1) as f64 * STEPS as f64) as u64);
                    bar.set_message(now(event).unwrap_or_default());
                }
                _ => {}
            },
        }
        match line(event) {
            Some(line) => self.say(&line),
            None => Ok(()),
        }
    }

    /// Says something that this command has to say.
    pub(crate) fn note(&mut self, text: &str) -> io::Result<()> {
        match self {
            Self::Json => out(&json(&Event::Note { text: text.to_owned() })),
            _ => self.say(text),
        }
    }

    /// Shows how it ended.
    pub(crate) fn finish(&mut self, report: &Report) -> io::Result<()> {
        match self {
            Self::Json => return out(&json(report)),
            Self::Lines => {}
            Self::Live(bar) => bar.finish_and_clear(),
        }
        out(&format!("\n{}", render(report, When::Now).trim_end()))?;
        match next_step(report) {
            Some(next) => out(&format!("\n  next: {next}")),
            None => Ok(()),
        }
    }

    fn say(&self, text: &str) -> io::Result<()> {
        match self {
            Self::Live(bar) => {
                bar.println(text);
                Ok(())
            }
            _ => out(text),
        }
    }
}

fn out(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

/// The phase's name, the same as in logs and JSON.
fn word(phase: Phase) -> &'static str {
    match phase {
        Phase::Preflight => "preflight",
        Phase::PreCopy => "pre-copy",
        Phase::Switchover => "switchover",
        Phase::PostCopy => "post-copy",
        Phase::Done => "done",
    }
}

/// The line for something that is over, or that has begun.
pub(crate) fn line(event: &Event) -> Option<String> {
    match event {
        // The report has its parts.
        Event::Downtime { .. } => None,
        Event::Phase { phase: Phase::Done, .. } | Event::Tick { .. } | Event::Done(_) => None,
        Event::Phase { phase, at_ms } => Some(format!("{:>9}  {}", millis(*at_ms as f64), begins(*phase))),
        Event::Round(round) => {
            let rate = Bytes(round.wire_bytes).per(Duration::from_secs_f64(round.ms.max(0.0) / 1e3));
            Some(format!(
                "           round {}: {} looked at, {} sent in {} ({rate}), {} written meanwhile",
                round.n,
                counted(round.pages, "page", "pages"),
                Bytes(round.wire_bytes),
                millis(round.ms),
                count(round.dirtied),
            ))
        }
        Event::Forecast(forecast) => Some(forecast::line(forecast)),
        Event::Note { text } => Some(format!("           note: {text}")),
    }
}

fn begins(phase: Phase) -> &'static str {
    match phase {
        Phase::Preflight => "preflight: both hosts look whether it can work",
        Phase::PreCopy => "pre-copy: memory moves while the VM runs here",
        Phase::Switchover => "switchover: the VM is stopped",
        Phase::PostCopy => "post-copy: the VM runs on the target, the rest of its memory follows",
        Phase::Done => "done",
    }
}

/// What is going on just now.
pub(crate) fn now(event: &Event) -> Option<String> {
    let Event::Tick {
        phase,
        round,
        left_bytes,
        rate,
        predicted_downtime_ms,
        left_ms,
        ends_in_ms,
        spool,
        slowed_percent,
        ..
    } = event
    else {
        return None;
    };
    let mut parts = Vec::new();
    if *phase == Phase::PreCopy {
        parts.push(format!("round {round}"));
    }
    let pages = left_bytes.div_ceil(PAGE_SIZE as u64);
    parts.push(format!("{} ({}) left", counted(pages, "page", "pages"), Bytes(*left_bytes)));
    parts.push(Rate(*rate).to_string());
    match spool {
        Some((written, 0)) => parts.push(format!("{} in the spool", Bytes(*written))),
        Some((_, trails)) => parts.push(format!("the spool is {} behind", Bytes(*trails))),
        None => {}
    }
    if let (Phase::PreCopy, Some(pause)) = (phase, predicted_downtime_ms) {
        parts.push(format!("pause if stopped now {}", millis(*pause)));
    }
    if let (Phase::PreCopy, Some(percent)) = (phase, slowed_percent) {
        parts.push(format!("writers wait {percent:.0} %"));
    }
    if let Some(ms) = ends_in_ms.or(*left_ms) {
        parts.push(left(Duration::from_millis(ms)));
    }
    Some(parts.join(" · "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::Round;

    #[test]
    fn what_is_over_is_one_line() {
        let round = Round { n: 1, pages: 262_144, wire_bytes: 1 << 30, ms: 2310.0, dirtied: 12_034 };
        assert_eq!(
            line(&Event::Round(round)).unwrap(),
            "           round 1: 262,144 pages looked at, 1.0 GiB sent in 2.31 s (443.3 MiB/s), 12,034 \
             written meanwhile"
        );
        let phase = Event::Phase { phase: Phase::PreCopy, at_ms: 312 };
        assert_eq!(line(&phase).unwrap(), "   312 ms  pre-copy: memory moves while the VM runs here");
    }

    #[test]
    fn what_is_going_on_is_one_line() {
        let tick = Event::Tick {
            phase: Phase::PreCopy,
            round: 2,
            left_bytes: 412 << 20,
            of_bytes: 1 << 30,
            rate: 118 << 20,
            predicted_downtime_ms: Some(12.3),
            left_ms: Some(3500),
            ends_in_ms: Some(5200),
            spool: None,
            slowed_percent: Some(12.0),
            at_ms: 1,
        };
        assert_eq!(
            now(&tick).unwrap(),
            "round 2 · 105,472 pages (412.0 MiB) left · 118.0 MiB/s · pause if stopped now 12.3 ms · writers \
             wait 12 % · 5 s left"
        );
        assert_eq!(line(&tick), None);
        let Event::Tick { phase, round, .. } = tick else { return };
        let trailing = Event::Tick {
            phase,
            round,
            left_bytes: 0,
            of_bytes: 0,
            rate: 0,
            predicted_downtime_ms: None,
            left_ms: None,
            ends_in_ms: None,
            slowed_percent: None,
            spool: Some((5 << 20, 3 << 20)),
            at_ms: 1,
        };
        assert!(now(&trailing).unwrap().contains("the spool is 3.0 MiB behind"));
    }
}
