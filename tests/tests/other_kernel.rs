//! Debian's 6.1 kernel has no asynchronous tracker: the doctor says what works there, and what that costs.

use lab::{
    Doing, QEMU, ensure,
    other_kernel::{Kernel, run_under},
    story,
};
use serde_json::{Value, json};
use std::path::Path;

#[test]
fn the_doctor_says_what_works_under_linux_6_1() {
    story("the doctor under 6.1", &[], |lab, tools| {
        // Debian's QEMU has its translator in a module.
        let module = "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so";
        let also: Vec<_> =
            ["cat", QEMU].into_iter().chain(Path::new(module).exists().then_some(module)).collect();
        let kernel = Kernel::with_vhost(&tools.kernel)?;
        let (status, said) = run_under(&kernel, &tools.whimbrel, &["doctor", "--json"], &also, lab.dir())?;
        let diagnosis: Value =
            serde_json::from_str(&said).doing(format!("understand the doctor's {said}"))?;
        let check = |name: &str| {
            let mut checks = diagnosis["checks"].as_array().into_iter().flatten();
            checks.find(|check| check["name"] == name).doing(format!("find the check {name} in {said}"))
        };
        let tracker = check("write-protection")?;
        ensure!(tracker["status"] == "warn", "there is only the synchronous tracker: {tracker}");
        ensure!(tracker["found"].to_string().contains("6.7"), "it says which kernel has more: {tracker}");
        ensure!(tracker["remedy"].to_string().contains("42 µs"), "it says what that costs: {tracker}");
        for works in
            ["ptrace", "map-files", "userfaultfd", "dirty-tracking", "missing-pages", "qemu", "vhost-net"]
        {
            ensure!(check(works)?["status"] == "ok", "{works} works: {said}");
        }
        let vhost = check("vhost-net")?;
        ensure!(vhost["found"].to_string().contains("the tracker sees"), "a worker was tried: {vhost}");
        ensure!(
            diagnosis["works"] == json!(["pre-copy", "post-copy"]),
            "both ways work: {}",
            diagnosis["works"]
        );
        ensure!(status == 0, "so this host is of use: exit status {status}");
        Ok(())
    });
}
