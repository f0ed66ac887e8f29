//! A balloon that takes memory from its guest, and gives it back, while the VM is moved.

use lab::{Doing, HandStart, Qmp, Ram, Result, Spec, Stage, ensure, story, wait_for};
use serde_json::json;
use std::{path::Path, time::Duration};

const SOON: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

/// Asks the VM's QEMU on this host, which nobody else asks just then.
fn ask<T>(stage: &Stage, host: &str, what: impl FnOnce(&mut Qmp) -> Result<T>) -> Result<T> {
    let shown = stage.show(host, "light")?.unwrap_or_default();
    let socket = shown["qmp"].as_str().doing("learn where its monitor is")?.to_owned();
    what(&mut Qmp::connect(Path::new(&socket))?)
}

/// What the guest has left, as its balloon says.
fn actual(stage: &Stage, host: &str) -> Result<u64> {
    let said = ask(stage, host, |qmp| qmp.execute("query-balloon", json!({})))?;
    said["actual"].as_u64().doing("read the size of the balloon")
}

#[test]
fn i2_a_balloon_that_moves_while_its_vm_does_loses_nothing() {
    story("a balloon in every mode", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let spec = Spec::new(61, "whimbrel.check=48M,rate=8M whimbrel.dirty=16M,rate=4M,pattern=hot-cold");
        let balloon = "virtio-balloon-pci,id=balloon0,free-page-reporting=on,deflate-on-oom=on";
        let extra = ["-device", balloon].map(str::to_owned).to_vec();
        let start = HandStart { extra, ram: Ram::Private, ..HandStart::new(spec) };
        let (guest, _machine) = stage.adopt("a", "light", start)?;
        let whole = actual(&stage, "a")?;
        // The memory is private in the first move, and shared from then on.
        let moves: [(&str, &str, u64, &[&str]); 4] = [
            ("a", "b", 64, &["--mode", "pre-copy", "--bandwidth", "800Mbit"]),
            ("b", "a", 16, &["--mode", "hybrid"]),
            ("a", "b", 96, &["--mode", "pre-copy", "--bandwidth", "400Mbit"]),
            ("b", "a", 32, &["--mode", "post-copy"]),
        ];
        for (from, to, taken, options) in moves {
            let before = actual(&stage, from)?;
            let wanted = whole - taken * MIB;
            ask(&stage, from, |qmp| qmp.execute("balloon", json!({ "value": wanted })))?;
            let report = stage.migrate("light", &guest, from, to, options)?;
            ensure!(report.verified() == Some(true), "memory was compared: {}", report.0);
            eprintln!(
                "{from} → {to}: {} MiB when it began, {} after",
                before / MIB,
                actual(&stage, to)? / MIB
            );
            wait_for("the balloon at the size that was asked for", SOON, || {
                Ok((actual(&stage, to)? == wanted).then_some(()))
            })?;
            guest.verify()?;
        }
        Ok(())
    });
}
