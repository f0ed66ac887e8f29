//! The report on a migration, for people.

use crate::{
    downtime, forecast,
    words::{count, counted, micros, millis, table},
};
use agent::store::SELF;
use api::{Fate, Outcome, Report, Spooled};
use ports::RunState;
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
    let from = &report.from;
    let fate = report.fate();
    let mut words = head(report, &fate, when);
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
        rows.push(row("VM", whereabouts(&fate, from)));
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

fn head(report: &Report, fate: &Fate, when: When) -> String {
    let Report { vm, from, to, .. } = report;
    match (report.outcome, fate) {
        (Outcome::Completed, Fate::On { state: RunState::Running, .. })
            if when == When::Now && to == SELF =>
        {
            format!("{vm} runs in another QEMU of {from} now")
        }
        (Outcome::Completed, Fate::On { state: RunState::Running, .. }) if when == When::Now => {
            format!("{vm} runs on {to} now")
        }
        (Outcome::Completed, Fate::On { state, .. }) if when == When::Now => {
            format!("{vm} is on {to} now, {state}, as it was")
        }
        (Outcome::Completed, _) => format!("The last migration of {vm} from {from} took it to {to}"),
        (Outcome::Cancelled, Fate::On { state: RunState::Running, .. }) => {
            format!("The migration of {vm} to {to} was cancelled; {vm} runs on {from} as before.")
        }
        (Outcome::Cancelled, Fate::On { state, .. }) => {
            format!("The migration of {vm} to {to} was cancelled; {vm} is on {from}, {state}, as it was.")
        }
        (Outcome::Cancelled, _) => {
            format!("The migration of {vm} to {to} was cancelled, and {vm} does not run.")
        }
        (Outcome::Failed, Fate::Stuck { host }) if host == to => {
            format!("{vm} was moved to {to}, and does not run there.")
        }
        (Outcome::Failed, Fate::Stuck { .. } | Fate::Ended { .. }) => {
            format!("The migration of {vm} to {to} failed, and {vm} does not run.")
        }
        (Outcome::Failed, _) => format!("The migration of {vm} to {to} failed."),
        (Outcome::InDoubt, _) => {
            format!("The migration of {vm} to {to} ended in doubt: {vm} is stopped until it is settled.")
        }
    }
}

/// Where the VM is now, and what it does.
fn whereabouts(fate: &Fate, from: &str) -> String {
    match fate {
        Fate::On { host, state: RunState::Running } if host == from => {
            format!("the VM runs on {host}, as if nothing had happened")
        }
        Fate::On { host, state: RunState::Running } => format!("the VM runs on {host}"),
        Fate::On { host, state } => format!("the VM is on {host}, {state}, as it was"),
        Fate::Stuck { host } => {
            format!("the VM belongs to {host} and stands still there; nobody else runs it")
        }
        Fate::Ended { host } => format!("its QEMU on {host} has ended; nobody runs the VM"),
        Fate::Unknown => "nobody can say where the VM runs".to_owned(),
    }
}

/// What to do next; `None` if there is nothing to do.
pub(crate) fn next_step(report: &Report) -> Option<String> {
    let Report { vm, from, to, .. } = report;
    match report.outcome {
        Outcome::Completed | Outcome::Cancelled => None,
        Outcome::Failed => match report.fate() {
            Fate::On { host, .. } if host == *from => {
                Some(format!("mend what the reason says and migrate again; nothing of {vm} was left on {to}"))
            }
            Fate::Stuck { host } => Some(format!(
                "mend what the reason says, and then have it go on through QEMU's monitor on {host} (cont)"
            )),
            _ => None,
        },
        Outcome::InDoubt => Some(format!(
            "bring {to} back: {from} goes on asking it and settles this by itself. Only if {to} is lost for \
             good, cut its power, then on {from}: whimbrel resolve {vm} --here --i-have-fenced {to}"
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
        rows.extend(downtime::words(&report.downtime).map(|words| row("", words)));
        if report.waited_for_disks_ms > 0.0 {
            let (before, drain) =
                (millis(report.waited_for_disks_ms), millis(report.drain_ms.unwrap_or_default()));
            let words =
                format!("{drain} of the downtime; before, it ran on for {before} until they were quieter");
            rows.push(row("disks", words));
        }
        if report.check_ms > 0.0 {
            let (pause, before) = (millis(report.check_ms), millis(report.reading_ms));
            rows.push(row(
                "looked",
                format!("{pause} of the downtime, {before} before, whether the VM is what it was"),
            ));
        }
    }
    if report.aborted_pauses_ms > 0.0 {
        let words = format!("{} in pauses that came to nothing", millis(report.aborted_pauses_ms));
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
    if report.handed_over > 0 {
        let words = format!("{} of it, which is the same memory on both sides", Bytes(report.handed_over));
        rows.push(row("handed over", words));
    }
    rows.push(row("rounds", report.rounds.len().to_string()));
    let pages = &report.pages;
    let kinds = [
        (pages.hole, "never written"),
        (pages.zero, "zero"),
        (pages.unchanged, "unchanged"),
        (pages.kept, "kept there"),
        (pages.duplicate, "duplicate"),
        (pages.delta, "as differences"),
        (pages.compressed, "compressed"),
        (pages.raw, "raw"),
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
        parts.push(format!("all that was missing was safe after {}", millis(ms)));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trouble::{CANCELLED, DONE, FAILED, IN_DOUBT, status_of};
    use api::{Failure, Mode};

    /// Every outcome: the headline, what is said of the VM, the exit status and the JSON all come from one
    /// value.
    #[test]
    fn headline_and_exit_status_say_what_became_of_the_vm() {
        let on = |host: &str, state| Fate::On { host: host.to_owned(), state };
        let (stuck, ended) =
            (|host: &str| Fate::Stuck { host: host.into() }, |host: &str| Fate::Ended { host: host.into() });
        use RunState::{GuestPanicked, Paused, Running, Shutdown};
        let table = [
            (Outcome::Completed, on("b", Running), DONE, "web1 runs on b now.", ""),
            (Outcome::Completed, on("b", Paused), DONE, "web1 is on b now, paused, as it was.", ""),
            (
                Outcome::Failed,
                stuck("b"),
                FAILED,
                "web1 was moved to b, and does not run there.",
                "belongs to b and stands still there",
            ),
            (
                Outcome::Failed,
                ended("b"),
                FAILED,
                "failed, and web1 does not run.",
                "its QEMU on b has ended",
            ),
            (
                Outcome::Failed,
                on("a", Running),
                FAILED,
                "The migration of web1 to b failed.",
                "runs on a, as if nothing had happened",
            ),
            (
                Outcome::Failed,
                on("a", Paused),
                FAILED,
                "The migration of web1 to b failed.",
                "the VM is on a, paused, as it was",
            ),
            (Outcome::Failed, on("a", Shutdown), FAILED, "failed.", "the VM is on a, shutdown, as it was"),
            (
                Outcome::Failed,
                on("a", GuestPanicked),
                FAILED,
                "failed.",
                "the VM is on a, guest-panicked, as it was",
            ),
            (
                Outcome::Failed,
                stuck("a"),
                FAILED,
                "failed, and web1 does not run.",
                "belongs to a and stands still there",
            ),
            (
                Outcome::Failed,
                ended("a"),
                FAILED,
                "failed, and web1 does not run.",
                "its QEMU on a has ended",
            ),
            (Outcome::Failed, Fate::Unknown, IN_DOUBT, "failed.", "nobody can say where the VM runs"),
            (Outcome::Cancelled, on("a", Running), CANCELLED, "cancelled; web1 runs on a as before.", ""),
            (
                Outcome::Cancelled,
                on("a", Paused),
                CANCELLED,
                "cancelled; web1 is on a, paused, as it was.",
                "",
            ),
            (Outcome::Cancelled, stuck("a"), FAILED, "was cancelled, and web1 does not run.", "belongs to a"),
            (Outcome::InDoubt, Fate::Unknown, IN_DOUBT, "ended in doubt", "nobody can say where the VM runs"),
        ];
        for (outcome, fate, status, headline, vm) in table {
            let mut report = Report::blank("web1", "a", "b", Mode::Auto, outcome);
            report.fate = Some(fate.clone());
            if !vm.is_empty() {
                let text = |text: &str| text.to_owned();
                let failure = Failure { what: text("w"), place: text("p"), why: text("y"), vm_runs_on: None };
                report.error = Some(failure);
            }
            let words = render(&report, When::Now);
            let first = words.lines().next().unwrap();
            assert!(first.contains(headline), "{outcome:?} {fate:?}: {first}");
            assert!(words.contains(vm), "{outcome:?} {fate:?}: {words}");
            assert_eq!(words.contains("nobody can say"), fate == Fate::Unknown, "{words}");
            assert_eq!(status_of(&report), status, "{outcome:?} {fate:?}");
            let json = serde_json::to_value(&report).unwrap();
            assert_eq!(serde_json::from_value::<Fate>(json["fate"].clone()).unwrap(), fate);
        }
        let mut differs = Report::blank("web1", "a", "b", Mode::Auto, Outcome::Completed);
        differs.verified = Some(false);
        assert_eq!(status_of(&differs), FAILED, "its memory differs");
    }

    #[test]
    fn a_report_of_yesterday_says_what_became_of_the_vm() {
        let failure = |runs: Option<&str>| {
            let text = String::new;
            Some(Failure { what: text(), place: text(), why: text(), vm_runs_on: runs.map(str::to_owned) })
        };
        let on = |host: &str| Fate::On { host: host.to_owned(), state: RunState::Running };
        for (outcome, error, fate) in [
            (Outcome::Completed, None, on("b")),
            (Outcome::Completed, failure(None), Fate::Stuck { host: "b".into() }),
            (Outcome::Failed, failure(Some("a")), on("a")),
            (Outcome::Failed, failure(None), Fate::Unknown),
            (Outcome::Cancelled, None, on("a")),
            (Outcome::InDoubt, failure(None), Fate::Unknown),
        ] {
            let mut report = Report::blank("web1", "a", "b", Mode::Auto, outcome);
            report.error = error;
            assert_eq!(report.fate(), fate, "{outcome:?}");
        }
    }
}
