//! What a migration is expected to take, for people.

use crate::words::{count, millis, table};
use api::{Estimate, Forecast, Mode, Plan, Span, Way};
use units::{Bytes, PAGE_SIZE, Rate};

/// Disks that are waited for no longer than the rest of a stop takes are not worth a word.
const TELLING_MS: f64 = 1.0;

fn name(way: Way) -> &'static str {
    Mode::from(way).name()
}

/// All ways, and the one that is taken.
pub(crate) fn render(vm: &str, to: &str, forecast: &Forecast) -> String {
    let mut rows = vec![
        ["  mode", "time", "pause", "traffic", "writers wait", "lacks memory"].map(str::to_owned).to_vec(),
    ];
    rows.extend(forecast.plan.estimates.iter().map(|estimate| row(estimate, forecast.preflight_ms)));
    let mut words = format!("Moving {vm} to {to} would take:\n\n{}\n", table(&rows));
    words += &format!(
        "  {} of memory, {} written a second; it travels as {:.0} % of its size over {}.\n",
        Bytes(forecast.memory_bytes),
        Bytes(forecast.written_per_s),
        forecast.shrinks_to * 100.0,
        Rate(forecast.link),
    );
    if forecast.handed_over > 0 {
        let stays = Bytes(forecast.handed_over);
        words += &format!("  {stays} of its RAM stays where it is: the target reaches it by itself.\n");
    }
    words += &format!("  It would go by {}: {}.\n", name(forecast.plan.takes), forecast.plan.because);
    if forecast.remembered {
        words += "  When it was moved last it wrote much more than in the second before: that is expected \
                  again.\n";
    }
    words += &disks(&forecast.plan);
    for promise in &forecast.plan.violated {
        words += &format!("  Cannot be kept: {promise}.\n");
    }
    words
}

/// What a stop waits for the disks; nothing where that is next to nothing.
fn disks(plan: &Plan) -> String {
    if plan.drain_ms < TELLING_MS {
        return String::new();
    }
    format!(
        "  A stop waits about {} for its disks, which have something to do {:.0} % of the time.\n",
        millis(plan.drain_ms),
        plan.disks_busy_percent
    )
}

/// In one line, when a migration begins.
pub(crate) fn line(forecast: &Forecast) -> String {
    let plan = &forecast.plan;
    let Some((estimate, total)) = plan.expected().zip(forecast.total_ms()) else {
        return format!(
            "           forecast: no end in sight; the guest writes {} a second over {}",
            Bytes(forecast.written_per_s),
            Rate(forecast.link)
        );
    };
    let slowed = if estimate.throttled { ", with its writers slowed" } else { "" };
    format!(
        "           forecast: {} in {}, pause {}, {} on the wire{slowed}; {} of memory, {} written a second, \
         {}",
        name(estimate.way),
        span(&total, millis),
        millis(estimate.downtime_ms.likely),
        Bytes(estimate.wire_bytes.likely as u64),
        Bytes(forecast.memory_bytes),
        Bytes(forecast.written_per_s),
        Rate(forecast.link),
    )
}

fn row(estimate: &Estimate, preflight_ms: f64) -> Vec<String> {
    let total = estimate.total_ms + preflight_ms;
    let nothing = |span: &Span| if span.likely < 0.5 { "-".to_owned() } else { millis(span.likely) };
    let pages = |bytes: f64| Bytes((bytes as u64).next_multiple_of(PAGE_SIZE as u64)).to_string();
    vec![
        format!("  {}", name(estimate.way)),
        if estimate.ends { span(&total, millis) } else { "no end in sight".to_owned() },
        if estimate.ends { millis(estimate.downtime_ms.likely) } else { "-".to_owned() },
        span(&estimate.wire_bytes, pages),
        nothing(&estimate.stalled_ms),
        nothing(&estimate.missing_ms),
    ]
}

/// What is likely, and between what it may be.
fn span(span: &Span, words: impl Fn(f64) -> String) -> String {
    format!("{} ({} to {})", words(span.likely), words(span.low), words(span.high))
}

/// How far the outcome was from what had been expected.
pub(crate) fn off(forecast: &Forecast, percent: f64) -> Option<String> {
    let likely = forecast.total_ms()?.likely;
    let words = match percent {
        off if off.abs() < 0.5 => "that".to_owned(),
        off if off > 0.0 => format!("{} % longer", count(off.round() as u64)),
        off => format!("{} % sooner", count(-off.round() as u64)),
    };
    Some(format!("{} were expected; it took {words}", millis(likely)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forecast(ends: bool) -> Forecast {
        let one = |likely: f64| Span { low: likely * 0.9, likely, high: likely * 1.2 };
        let estimate = |way| Estimate {
            way,
            total_ms: one(2000.0),
            downtime_ms: one(12.0),
            wire_bytes: one(300e6),
            stalled_ms: Span::default(),
            missing_ms: if way == Way::PreCopy { Span::default() } else { one(800.0) },
            throttled: false,
            ends: ends || way != Way::PreCopy,
        };
        Forecast {
            memory_bytes: 512 << 20,
            handed_over: 0,
            written_per_s: 40 << 20,
            watched_ms: 1000.0,
            remembered: false,
            shrinks_to: 0.5,
            link: 118 << 20,
            preflight_ms: 150.0,
            plan: Plan {
                estimates: [Way::PreCopy, Way::Hybrid, Way::PostCopy].map(estimate).to_vec(),
                takes: Way::PreCopy,
                because: "the guest writes less than the link carries".into(),
                share: 0.45,
                stall_ms: 5.0,
                downtime_ms: 20.0,
                stop_after_ms: None,
                drain_ms: 480.0,
                disks_busy_percent: 30.0,
                violated: vec!["--max-time 1 s: it will take about 2 s".into()],
            },
        }
    }

    #[test]
    fn a_plan_is_a_table_and_a_choice() {
        let words = render("web1", "hostb", &forecast(true));
        let lines: Vec<&str> = words.lines().collect();
        assert_eq!(
            lines[3],
            "  pre-copy   2.15 s (1.95 s to 2.55 s)  12.0 ms  286.1 MiB (257.5 MiB to 343.3 MiB)  \
             -             -"
        );
        assert!(lines[4].starts_with("  hybrid") && lines[4].ends_with("800 ms"), "{}", lines[4]);
        assert!(words.contains("go by pre-copy: the guest writes less"), "{words}");
        assert!(words.contains("Cannot be kept: --max-time 1 s: it will take about 2 s."), "{words}");
        assert!(!words.contains("stays where it is"), "{words}");
        assert!(
            words.contains("waits about 480 ms for its disks, which have something to do 30 %"),
            "{words}"
        );
        assert!(render("web1", "hostb", &forecast(false)).contains("  pre-copy   no end in sight"));
        let words = render("web1", "self", &Forecast { handed_over: 1 << 30, ..forecast(true) });
        assert!(words.contains("  1.0 GiB of its RAM stays where it is"), "{words}");
    }

    #[test]
    fn it_is_said_how_far_off_it_was() {
        let said = |percent| off(&forecast(true), percent).unwrap();
        assert_eq!(said(12.3), "2.15 s were expected; it took 12 % longer");
        assert_eq!(said(-20.0), "2.15 s were expected; it took 20 % sooner");
        assert_eq!(said(0.2), "2.15 s were expected; it took that");
        assert_eq!(off(&forecast(false), 3.0), None);
    }
}
