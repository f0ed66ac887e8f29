use crate::input::Input;
use api::{Mode, Outcome, PastMigration, Report, Round};
use std::time::Duration;
use units::Rate;

/// Three bytes for the guest and the link now, then how the VM's migrations went, as JSON.
pub(crate) fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let (link, present, written) = (input.u8(), input.u8(), input.u8());
    let Ok(mut history) = serde_json::from_slice::<Vec<PastMigration>>(input.rest()) else { return false };
    // As a store keeps what comes along with a VM.
    history.retain(PastMigration::is_sound);
    // From 100 kB/s, below which a link was not seen, to 3 TB/s; from a page to 16 TiB.
    let link = Rate(100_000 << (link % 25));
    let present = 1u64 << (present % 33);
    let written = present * u64::from(written) / 255;
    let limit = Duration::from_secs(history.len() as u64 * 10);
    let forecast = engine::fuzz::foresee(&history, link, present, written, limit);
    let plan = &forecast.plan;
    assert!(plan.expected().is_some() && plan.share.is_finite() && plan.stall_ms.is_finite(), "{plan:?}");
    for estimate in &plan.estimates {
        for span in [
            estimate.total_ms,
            estimate.downtime_ms,
            estimate.wire_bytes,
            estimate.stalled_ms,
            estimate.missing_ms,
        ] {
            let ordered = 0.0 <= span.low && span.low <= span.likely && span.likely <= span.high;
            assert!(ordered && span.high.is_finite(), "{estimate:?}");
        }
    }
    serde_json::to_vec(&forecast).expect("a forecast can be written");
    !history.is_empty()
}

fn past(outcome: Outcome, mode: Mode, ms: f64) -> PastMigration {
    let mut report = Report::blank("web1", "hosta", "hostb", mode, outcome);
    let round = |n, pages, ms| Round { n, pages, wire_bytes: pages * 3000, ms, dirtied: pages / 3 };
    report.rounds = vec![round(1, 100_000, ms), round(2, 30_000, ms / 3.0), round(3, 100, 1.5)];
    report.streams = 2;
    report.throttle.throttled = true;
    report.throttle.stalled_ms = 40.0;
    PastMigration::of(&report).expect("it moved something")
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let all = [
        past(Outcome::Completed, Mode::PreCopy, 3000.0),
        past(Outcome::Cancelled, Mode::PostCopy, 12.5),
        past(Outcome::Completed, Mode::PreCopy, 0.001),
    ];
    let json = |history: &[PastMigration]| serde_json::to_vec(history).expect("it can be written");
    [&all[..1], &all[1..], &all]
        .iter()
        .zip([[10, 18, 20], [0, 30, 255], [24, 0, 0]])
        .map(|(history, now)| [&now[..], &json(history)].concat())
        .collect()
}
