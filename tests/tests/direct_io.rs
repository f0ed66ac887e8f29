//! A direct read that begins before one round of a migration and lands after the next: its data comes through no page
//! table, and no tracker sees it. Either the machine is refused, or the data is caught.

use lab::{Guest, HandStart, SlowDisk, Spec, Stage, ensure, story};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_direct_read_delayed_across_two_rounds_is_refused_or_caught() {
    story("a delayed direct read", &["a", "b"], |lab, tools| {
        // Before any agent: they see only mounts that are older than they.
        let disk = SlowDisk::mount(&lab.dir().join("slow"), vec![0; 32 << 20])?;
        let stage = Stage::new(lab, tools)?;
        let spec = Spec::new(71, "whimbrel.check=32M,rate=8M whimbrel.disk=vda,set=8M,direct=on");
        let start = HandStart::new(spec.clone()).disk(disk.path(), "cache=none,aio=threads");
        let machine = start.start(lab.host("a"), tools)?;
        let guest = Guest::reach(&stage.client, &spec)?;
        ensure!(disk.direct_reads() > 0, "the machine reads its disk directly");

        let socket = machine.qmp_socket();
        let answer =
            stage.agent("a").cli().run(["adopt", "direct", "--qmp", &socket.to_string_lossy(), "--json"])?;
        if answer.status != 0 {
            answer.exited(1)?.says(&["direct"])?;
            guest.runs()?;
            return guest.verify().map(drop);
        }

        // Adopted, so it has to be caught.
        disk.hold();
        let held = disk.wait_held(SOON).is_ok();
        let mut migration = stage.start_migration("direct", "a", "b", &["--mode", "pre-copy", "--verify"])?;
        if held {
            migration.until_round(1)?;
        }
        disk.release();
        let report = migration.completed()?;
        ensure!(report.verified() == Some(true), "memory was compared: {}", report.0);
        stage.check_moved("direct", &guest, "a", "b")
    });
}
