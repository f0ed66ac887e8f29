//! A limit on bandwidth, as the interface sees it.

use lab::{Doing, Result, Spec, Stage, VmFile, ensure, story};
use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

const LIMIT: f64 = 10e6;
const SECOND: Duration = Duration::from_secs(1);

/// What the host's management interface had sent by when, looked at until `over`.
fn watch(host: &lab::Host, over: &AtomicBool) -> Result<Vec<(Instant, u64)>> {
    host.namespace.inside(|| {
        let mut seen = Vec::new();
        while !over.load(Relaxed) {
            let at = Instant::now();
            let table =
                fs::read_to_string("/proc/thread-self/net/dev").doing("read the interface's counters")?;
            let line = table.lines().find_map(|line| line.trim().strip_prefix("mgmt:"));
            let sent = line.and_then(|line| line.split_whitespace().nth(8)?.parse().ok());
            // Another thread may have had the processor for a while: between which instants it was read is
            // not known then.
            if at.elapsed() < Duration::from_millis(1) {
                seen.push((at, sent.doing("find what mgmt has sent")?));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(seen)
    })
}

/// What was sent in each second from each look on.
fn seconds(seen: &[(Instant, u64)]) -> Vec<f64> {
    let rate = |(i, (begin, before)): (usize, &(Instant, u64))| {
        let (end, after) = seen[i..].iter().find(|(at, _)| *at >= *begin + SECOND)?;
        Some((after - before) as f64 / (*end - *begin).as_secs_f64())
    };
    seen.iter().enumerate().filter_map(rate).collect()
}

#[test]
fn all_streams_keep_to_the_limit_and_faults_do_not_wait() {
    story("bandwidth", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let work = "whimbrel.fill=64M whimbrel.check=16M,rate=1M";
        let guest = stage.run("a", &VmFile::new("web", Spec::new(91, work)))?;
        let over = AtomicBool::new(false);
        for (mode, from, to, streams) in [("pre-copy", "a", "b", "3"), ("post-copy", "b", "a", "2")] {
            over.store(false, Relaxed);
            let (report, seen) = thread::scope(|scope| {
                let (host, over) = (lab.host(from), &over);
                let watcher = scope.spawn(move || watch(host, over));
                let options = ["--mode", mode, "--bandwidth", "80Mbit", "--streams", streams];
                let report = stage.start_migration("web", from, to, &options).and_then(|m| m.completed());
                over.store(true, Relaxed);
                (report, watcher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            });
            let report = report?;
            stage.check_moved("web", &guest, from, to)?;
            let mut seconds = seconds(&seen?);
            seconds.sort_by(f64::total_cmp);
            ensure!(seconds.len() > 100, "it took a while: {} looks", seconds.len());
            let (median, most) = (seconds[seconds.len() / 2], seconds[seconds.len() - 1]);
            eprintln!("{mode}: median second {median:.0}, fullest {most:.0} bytes/s");
            ensure!(median > 0.95 * LIMIT, "{mode}: the limit is used: {median} bytes/s");
            ensure!(most < 1.05 * LIMIT, "{mode}: no second holds more than the limit: {most} bytes/s");
            if mode == "post-copy" {
                ensure!(report.number("faults.count")? > 20.0, "the guest waited for pages: {}", report.0);
                let waited = report.number("faults.p50_us")?;
                eprintln!("faults: {}", report.0["faults"]);
                // Behind what the streams had reserved of the limit they would wait 10 ms and more.
                ensure!(waited < 5_000.0, "faults do not wait for the limit: {}", report.0);
            }
        }
        Ok(())
    });
}
