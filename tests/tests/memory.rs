//! How a VM's memory is held by its host: huge pages, locked, and what becomes of that on another host.

use lab::{Doing, HandStart, HugePages, Qmp, Ram, Result, Spec, Stage, ensure, story, wait_for};
use serde_json::json;
use std::{path::Path, time::Duration};

const WORK: &str = "whimbrel.check=48M,rate=8M whimbrel.dirty=16M,rate=4M";
const SOON: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

/// Huge pages that are shared and private, here and, once they have moved, plain ones; a balloon takes some
/// away meanwhile, and all is locked. Those that a guest has need be there once only: it has left its first
/// host before the next one comes.
#[test]
fn i2_a_vm_of_huge_pages_moves_in_every_mode() {
    story("huge pages", &["a", "b"], |lab, tools| {
        let Some(mut pages) = HugePages::reserve(256 * MIB)? else { return Ok(()) };
        let mount = lab.dir().join("huge");
        pages.mount(&mount)?;
        let stage = Stage::new(lab, tools)?;
        let extra = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let balloon = extra(&["-device", "virtio-balloon-pci,id=balloon0,free-page-reporting=on"]);
        let rows = [
            (Ram::HugePages, balloon, "pre-copy"),
            (Ram::HugePath(mount), extra(&["-overcommit", "mem-lock=on"]), "hybrid"),
            (Ram::HugePages, extra(&[]), "post-copy"),
        ];
        for (number, (ram, extra, mode)) in (101..).zip(rows) {
            let start = HandStart { ram, extra, ..HandStart::new(Spec::new(number, WORK)) };
            let (guest, machine) = stage.adopt("a", mode, start)?;
            if mode == "pre-copy" {
                // It goes on, with the huge pages that it had, and its balloon grows.
                let slow = ["--mode", "pre-copy", "--bandwidth", "80Mbit"];
                let mut cancelled = stage.start_migration(mode, "a", "b", &slow)?;
                cancelled.until_round(1)?;
                cancelled.interrupt()?;
                cancelled.ended("cancelled", 130)?;
                guest.verify()?;
                let socket = machine.qmp_socket();
                grow(&socket, 192 * MIB)?;
            }
            let client = guest.echo(Duration::from_millis(5))?;
            let report = stage.migrate(mode, &guest, "a", "b", &["--mode", mode])?;
            ensure!(report.mode() == mode, "{}", report.0);
            client.finish(Duration::from_secs(10))?;
            if mode == "pre-copy" {
                let shown = stage.show("b", mode)?.unwrap_or_default();
                let socket = shown["qmp"].as_str().doing("learn where its monitor is")?.to_owned();
                grow(Path::new(&socket), 256 * MIB)?;
                guest.verify()?;
            }
            // All that it has there is plain: it goes back like any other.
            if mode == "post-copy" {
                stage.migrate(mode, &guest, "b", "a", &["--mode", "pre-copy"])?;
                stage.agent("a").cli().json(&["stop", mode])?;
            } else {
                stage.agent("b").cli().json(&["stop", mode])?;
            }
            drop(machine);
        }
        Ok(())
    });
}

/// Has the balloon leave the guest so much.
fn grow(socket: &Path, bytes: u64) -> Result<()> {
    let mut qmp = Qmp::connect(socket)?;
    qmp.execute("balloon", json!({ "value": bytes }))?;
    wait_for("the balloon at the size that was asked for", SOON, || {
        let said = qmp.execute("query-balloon", json!({}))?;
        Ok((said["actual"].as_u64() == Some(bytes)).then_some(()))
    })
}
