//! The report on a migration, for people.

use crate::{
    forecast,
    words::{count, counted, micros, millis, table},
};
use engine::report::{Outcome, Report, Spooled};
use units::Bytes;

/// How long ago it was.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// It has just ended.
    Now,
    /// Before: the VM may have moved on since.
    Before,
}

/// All of it: what became of the VM, then figures or reasons.
pub(crate) fn render(report: &Report, when: When) -> String {
    let Report { vm, from, to, .. } = report;
    let head = match report.outcome {
        Outcome::Completed if when == When::Before => {
            format!("The last migration of {vm} from {from} took it to {to}")
        }
        Outcome::Completed => format!("{vm} runs on {to} now"),
        Outcome::Cancelled => {
            format!("The migration of {vm} to {to} was cancelled; {vm} runs on {from} as before.")
        }
        Outcome::Failed => format!("The migration of {vm} to {to} failed."),
        Outcome::InDoubt => {
            format!("The migration of {vm} to {to} ended in doubt: {vm} is stopped until it is settled.")
        }
    };
    let mut words = head;
    if report.outcome == Outcome::Completed {
        words += match report.verified {
            Some(true) => ": all its memory was compared and is the same.",
            Some(false) => ", BUT ITS MEMORY DIFFERS from what it was; do not trust it.",
            None => ".",
        };
    }
    words += "\n\n";
    if !report.protected && !report.rounds.is_empty() {
        words += "  NOT PROTECTED: its memory went over the network in plaintext (--insecure-plaintext).\n\n";
    }
    if let Some(error) = &report.error {
        let mut rows = vec![row("what", error.what.clone())];
        rows.extend(
            error.why.lines().enumerate().map(|(i, line)| row(if i == 0 { "why" } else { "" }, line)),
        );
        rows.push(row("where", &error.place));
        let runs = match &error.vm_runs_on {
            Some(host) if *host == report.from => {
                format!("the VM runs on {host}, as if nothing had happened")
            }
            Some(host) => format!("the VM runs on {host}"),
            None => "nobody can say where the VM runs".to_owned(),
        };
        rows.push(row("VM", runs));
        words += &indented(&rows);
    }
    // Nothing was measured when it ended before memory moved, or when the agent lost count.
    if !report.rounds.is_empty() || report.downtime_ms.is_some() {
        if report.error.is_some() {
            words.push('\n');
        }
        words += &indented(&figures(report));
    }
    words.truncate(words.trim_end().len());
    words.push('\n');
    words
}

/// What to do next; `None` if there is nothing to do.
pub(crate) fn next_step(report: &Report) -> Option<String> {
    let Report { vm, from, to, .. } = report;
    match report.outcome {
        Outcome::Completed | Outcome::Cancelled => None,
        Outcome::Failed => {
            Some(format!("mend what the reason says and migrate again; nothing of {vm} was left on {to}"))
                .filter(|_| report.error.as_ref().is_none_or(|error| error.vm_runs_on.as_ref() == Some(from)))
        }
        Outcome::InDoubt => Some(format!(
            "bring {to} back: {from} goes on asking it and settles this by itself. Only if {to} is lost for good, cut its \
             power, then on {from}: whimbrel resolve {vm} --here --i-have-fenced {to}"
        )),
    }
}

fn figures(report: &Report) -> Vec<Vec<String>> {
    let mut rows = vec![
        row("mode", report.mode.name()),
        row("total", format!("{} (preflight {})", millis(report.total_ms), millis(report.preflight_ms))),
    ];
    let expected = report.forecast.as_deref().zip(report.forecast_off_percent);
    if let Some(words) = expected.and_then(|(forecast, percent)| forecast::off(forecast, percent)) {
        rows.push(row("forecast", words));
    }
    if let Some(ms) = report.downtime_ms {
        rows.push(row("downtime", millis(ms)));
        if report.look_ms > 0.0 {
            let (pause, before) = (millis(report.look_ms), millis(report.reading_ms));
            rows.push(row(
                "looked",
                format!("{pause} of the downtime, {before} before, whether the VM is what it was"),
            ));
        }
    }
    if report.paused_in_vain_ms > 0.0 {
        let words = format!("{} in pauses that came to nothing", millis(report.paused_in_vain_ms));
        rows.push(row("stood", words));
    }
    let sent = report.wire_bytes as f64 / report.guest_bytes.max(1) as f64 * 100.0;
    rows.push(row(
        "traffic",
        format!(
            "{} over {} for {} of guest memory ({sent:.0} %)",
            Bytes(report.wire_bytes),
            counted(report.streams.into(), "stream", "streams"),
            Bytes(report.guest_bytes),
        ),
    ));
    rows.push(row("rounds", report.rounds.len().to_string()));
    let pages = &report.pages;
    let kinds = [
        (pages.hole, "never written"),
        (pages.zero, "zero"),
        (pages.unchanged, "unchanged"),
        (pages.known, "known there"),
        (pages.delta, "as differences"),
        (pages.packed, "compressed"),
        (pages.plain, "as they are"),
    ];
    let kinds: Vec<String> =
        kinds.iter().filter(|(n, _)| *n > 0).map(|(n, word)| format!("{} {word}", count(*n))).collect();
    rows.push(row("pages", format!("{}: {}", count(pages.total), kinds.join(", "))));
    let faults = &report.faults;
    if faults.count > 0 {
        rows.push(row(
            "faults",
            format!(
                "{} waited for their page: half at most {}, 99 % at most {}, the longest {}",
                count(faults.count),
                micros(faults.p50_us),
                micros(faults.p99_us),
                micros(faults.max_us)
            ),
        ));
    }
    if let Some(spool) = report.spool.as_deref() {
        rows.push(row("spool", spooled(spool)));
        if let Some(trouble) = &spool.trouble {
            rows.push(row("", format!("given up: {trouble}")));
        }
    }
    let throttle = &report.throttle;
    if throttle.stalled_ms > 0.0 {
        let (stalled, longest) = (millis(throttle.stalled_ms), millis(throttle.longest_ms));
        rows.push(row(
            "slowed",
            format!("the guest's writers waited {stalled} altogether, at most {longest} at a time"),
        ));
    }
    rows
}

/// What went by way of the datastore.
fn spooled(spool: &Spooled) -> String {
    let mut parts = vec![format!("{} in {} ({})", Bytes(spool.bytes), spool.directory, spool.robust.name())];
    if spool.pages > 0 {
        parts.push(format!("{} came that way", counted(spool.pages, "page", "pages")));
    }
    if let Some(ms) = spool.safe_ms {
        parts.push(format!("all that was owed was safe after {}", millis(ms)));
    }
    if spool.trailed_bytes > 0 {
        parts.push(format!("{} were not when the VM changed hands", Bytes(spool.trailed_bytes)));
    }
    parts.join("; ")
}

fn row(name: &str, value: impl Into<String>) -> Vec<String> {
    vec![format!("  {name}"), value.into()]
}

fn indented(rows: &[Vec<String>]) -> String {
    table(rows)
}
