//! The laboratory itself: links carry, vanish, come back and count; nothing is left behind.

use lab::{Doing, Host, Lab, Result, SlowDisk, TcpClient, ensure, machine_lacks, skip};
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use units::Rate;

const SOON: Duration = Duration::from_secs(5);

fn laboratory(story: &str, hosts: &[&str], tell: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    let lacks = machine_lacks();
    if !lacks.is_empty() {
        skip(story, &lacks.join("; "));
        return Ok(());
    }
    tell(&Lab::new(hosts)?)
}

/// Echoes the first connection to the host's address.
fn echo(host: &Host) -> Result<SocketAddr> {
    // Any port: the one of the echo before it may still be in use.
    let any = SocketAddr::from((host.address, 0));
    let listener = host.namespace.inside(|| TcpListener::bind(any).doing("listen"))?;
    let address = listener.local_addr().doing("see which port it is")?;
    thread::spawn(move || {
        let Ok((mut stream, _)) = listener.accept() else { return };
        let mut buffer = [0; 65536];
        while let Ok(n @ 1..) = stream.read(&mut buffer) {
            if stream.write_all(&buffer[..n]).is_err() {
                return;
            }
        }
    });
    Ok(address)
}

#[test]
fn a_cut_link_is_silent_and_a_mended_one_loses_nothing() -> Result<()> {
    laboratory("cut links", &["a", "b"], |lab| {
        let (a, b) = (lab.host("a"), lab.host("b"));
        type Act = fn(&Host, &Host) -> Result<()>;
        let alone: (Act, Act) = (|a, _| a.cut(), |a, _| a.mend());
        for (way, (cut, mend)) in [alone, (Host::cut_from, Host::mend_to)].into_iter().enumerate() {
            let client = TcpClient::connect(&a.namespace, echo(b)?, Duration::from_millis(2), SOON)?;
            lab::wait_for("an echo", SOON, || Ok((client.seen().echoed > 10).then_some(())))?;
            cut(a, b)?;
            thread::sleep(Duration::from_millis(50)); // what was on its way has arrived
            let before = client.seen();
            thread::sleep(Duration::from_millis(300));
            let during = client.seen();
            ensure!(during.echoed == before.echoed, "way {way}: {before:?}, {during:?}");
            ensure!(during.broken.is_none(), "the cut was silent");
            mend(a, b)?;
            let seen = client.finish(SOON)?;
            ensure!(seen.longest_gap > Duration::from_millis(300), "the gap was seen: {seen:?}");
        }
        Ok(())
    })
}

#[test]
fn a_shaped_link_carries_its_rate_and_its_bytes_are_counted() -> Result<()> {
    laboratory("shaped links", &["a", "b"], |lab| {
        let (a, b) = (lab.host("a"), lab.host("b"));
        const BYTES: usize = 4 << 20;
        a.shape(Some(Rate(10_000_000)))?;
        let before = a.traffic()?;
        let mut stream = lab::connect(&a.namespace, echo(b)?, SOON)?;
        let mut reader = stream.try_clone().doing("share a socket")?;
        let started = Instant::now();
        let writer = thread::spawn(move || stream.write_all(&vec![7; BYTES]));
        reader.read_exact(&mut vec![0; BYTES]).doing("read the echo")?;
        let took = started.elapsed();
        ensure!(writer.join().is_ok_and(|wrote| wrote.is_ok()), "everything was written");
        let sent = a.traffic()?.sent - before.sent;
        ensure!(sent as usize > BYTES && (sent as usize) < BYTES * 11 / 10, "counted {sent}");
        ensure!(took > Duration::from_millis(380) && took < Duration::from_millis(800), "took {took:?}");
        a.shape(None)
    })
}

#[test]
fn nothing_is_left_of_a_laboratory_not_even_its_processes() -> Result<()> {
    laboratory("teardown", &["a"], |lab| {
        let inner = Lab::new(&["x"])?;
        let (dir, namespace) = (inner.dir().to_owned(), inner.host("x").namespace.clone());
        let orphan = inner.host("x").spawn("orphan", namespace.command("sleep").arg("1000"))?;
        let pid = orphan.pid();
        std::mem::forget(orphan); // as if its owner had been killed
        drop(inner);
        ensure!(!dir.exists(), "the directory is gone");
        ensure!(!lab::run(std::process::Command::new("ip").arg("netns"))?.contains(namespace.name()), "gone");
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        ensure!(state.is_empty() || state.contains(" Z "), "the orphan is dead: {state}");
        ensure!(lab.dir().exists(), "the other laboratory is untouched");
        Ok(())
    })
}

#[test]
fn a_direct_read_lands_when_the_story_says_so() -> Result<()> {
    laboratory("a slow disk", &[], |lab| {
        let disk = SlowDisk::mount(&lab.dir().join("slow"), &vec![5; 1 << 20])?;
        let read = |flag: &str| {
            let mut command = Command::new("dd");
            command.arg(format!("if={}", disk.path().display())).args(["of=/dev/null", "bs=64k", "count=1"]);
            command.arg(format!("iflag={flag}")).stderr(Stdio::null()).spawn().doing("start dd")
        };
        disk.hold();
        ensure!(read("fullblock")?.wait().doing("wait")?.success(), "reads through the cache do not wait");
        let mut held = read("direct")?;
        disk.wait_held(SOON)?;
        ensure!(held.try_wait().doing("look")?.is_none(), "a direct read waits");
        disk.release();
        ensure!(held.wait().doing("wait")?.success(), "and ends");
        ensure!(disk.direct_reads() > 0, "it was counted");
        Ok(())
    })
}
