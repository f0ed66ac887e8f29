//! A guest that writes faster than the link carries is slowed just enough for pre-copy to end.

use lab::{Spec, Stage, VmFile, ensure, story};
use units::Rate;

/// Of the link, in bytes a second.
const LINK: f64 = 25e6;

#[test]
fn i2_a_guest_that_writes_twice_as_fast_as_the_link_carries_ends_by_pre_copy() {
    story("governed", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        // Random content in new places all the time: neither compression nor what the target knows helps.
        let work = "whimbrel.dirty=96M,content=random,pattern=sequential,rate=50M whimbrel.check=8M,rate=1M";
        let guest = stage.run("a", &VmFile::new("web", Spec::new(92, work)))?;
        lab.hosts().iter().try_for_each(|host| host.shape(Some(Rate(LINK as u64))))?;
        let options = ["--mode", "pre-copy", "--max-downtime", "60ms"];
        let report = stage.start_migration("web", "a", "b", &options)?.completed()?;
        stage.check_moved("web", &guest, "a", "b")?;
        eprintln!("{}", report.0);

        let rounds = report.0["rounds"].as_array().cloned().unwrap_or_default();
        let first = rounds[0]["pages"].as_f64().unwrap_or_default() * 4096.0 / LINK * 1000.0;
        let moving = report.number("total_ms")? - report.number("preflight_ms")?;
        ensure!(moving < 2.2 * first, "it took {moving:.0} ms where all memory once takes {first:.0}");
        ensure!(report.number("downtime_ms")? < 90.0, "{}", report.0);
        ensure!(report.number("throttle.stalled_ms")? > 0.0, "its writers were slowed: {}", report.0);
        // 5 ms, and what a busy machine adds.
        ensure!(report.number("throttle.longest_ms")? < 50.0, "nobody waited for long: {}", report.0);

        // The same guest over a link that it does not fill is left alone.
        lab.hosts().iter().try_for_each(|host| host.shape(None))?;
        let report = stage.start_migration("web", "b", "a", &options)?.completed()?;
        stage.check_moved("web", &guest, "b", "a")?;
        ensure!(report.number("throttle.stalled_ms")? == 0.0, "nobody waited: {}", report.0);
        Ok(())
    });
}
