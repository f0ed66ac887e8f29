//! A VM without a kernel of its own: its firmware boots from the first disk, and what it boots moves like any
//! other.

use lab::{Doing, Error, Host, Result, Stage, ensure, story, wait_for};
use std::{fs, path::Path, time::Duration};

/// How long an emulated guest may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A whole operating system of 226 bytes. For ever: counts; writes its count to the disk's second sector
/// through the firmware, reads it back and compares it; checks that 64 KiB of memory hold the count before,
/// and writes this one there; says `tick` and the count on the serial port. What is not as it should be ends
/// it with `CORRUPT`.
#[rustfmt::skip]
const BOOT: &[u8] = &[
    // cli; ds = es = ss = 0; sp = 0x7c00; sti; [0x7fff] = dl, the drive; [0x8000] = 0, the count
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xfb, 0x88, 0x16, 0xff, 0x7f,
    0x66, 0xc7, 0x06, 0x00, 0x80, 0x00, 0x00, 0x00, 0x00,
    // next: inc dword [0x8000]
    0x66, 0xff, 0x06, 0x00, 0x80,
    // int 0x13: write one sector, head 0, track 0, sector 2, from 0x8000; jc bad
    0xb8, 0x01, 0x03, 0xb9, 0x02, 0x00, 0xb6, 0x00, 0x8a, 0x16, 0xff, 0x7f, 0xbb, 0x00, 0x80, 0xcd, 0x13,
    0x72, 0x7b,
    // int 0x13: read it to 0x8400; jc bad
    0xb8, 0x01, 0x02, 0xb9, 0x02, 0x00, 0xb6, 0x00, 0x8a, 0x16, 0xff, 0x7f, 0xbb, 0x00, 0x84, 0xcd, 0x13,
    0x72, 0x68,
    // eax = [0x8400]; jne [0x8000], bad
    0x66, 0xa1, 0x00, 0x84, 0x66, 0x3b, 0x06, 0x00, 0x80, 0x75, 0x5d,
    // es = 0x2000; di = 0; cx = 0x4000; fill: unless eax is 1: jne es:[di] + 1, eax, bad
    0xbb, 0x00, 0x20, 0x8e, 0xc3, 0x31, 0xff, 0xb9, 0x00, 0x40,
    0x26, 0x66, 0x8b, 0x1d, 0x66, 0x43, 0x66, 0x83, 0xf8, 0x01, 0x74, 0x05, 0x66, 0x39, 0xc3, 0x75, 0x42,
    // es:[di] = eax; di += 4; loop fill; es = 0
    0x26, 0x66, 0x89, 0x05, 0x83, 0xc7, 0x04, 0xe2, 0xe6, 0x31, 0xdb, 0x8e, 0xc3,
    // say "tick "; ebx = the count; eight times: rol ebx, 4; put its lowest digit
    0xbe, 0xd4, 0x7c, 0xe8, 0x3c, 0x00, 0x66, 0x8b, 0x1e, 0x00, 0x80, 0xb9, 0x08, 0x00, 0x66, 0xc1, 0xc3,
    0x04,
    0x88, 0xd8, 0x24, 0x0f, 0x3c, 0x0a, 0x72, 0x02, 0x04, 0x27, 0x04, 0x30, 0xe8, 0x2c, 0x00, 0xe2, 0xeb,
    // put '\n'; two million times nothing; jmp next
    0xb0, 0x0a, 0xe8, 0x25, 0x00, 0x66, 0xb9, 0x80, 0x84, 0x1e, 0x00, 0x66, 0x49, 0x75, 0xfc, 0xe9, 0x6d,
    0xff,
    // bad: ds = 0; say "CORRUPT\n"; hlt for ever
    0x31, 0xdb, 0x8e, 0xdb, 0xbe, 0xda, 0x7c, 0xe8, 0x03, 0x00, 0xf4, 0xeb, 0xfd,
    // say: put what ds:si points to, up to a zero
    0xac, 0x84, 0xc0, 0x74, 0x05, 0xe8, 0x03, 0x00, 0xeb, 0xf6, 0xc3,
    // put: al to the serial port, once it takes it
    0x50, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x20, 0x74, 0xfb, 0x58, 0xba, 0xf8, 0x03, 0xee, 0xc3,
    b't', b'i', b'c', b'k', b' ', 0, b'C', b'O', b'R', b'R', b'U', b'P', b'T', b'\n', 0,
];

/// A disk of 1 MiB that boots.
fn image() -> Vec<u8> {
    let mut image = vec![0; 1 << 20];
    image[..BOOT.len()].copy_from_slice(BOOT);
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    image
}

/// How far the guest has counted by its console on this host.
fn count(host: &Host) -> Result<u64> {
    let said = fs::read(host.dir.join("run/boots.console")).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    if said.contains("CORRUPT") {
        return Err(Error::new(
            "the guest checks its memory and its disk",
            "they are not what it left there",
        ));
    }
    let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let tick = |line: &str| u64::from_str_radix(line.trim().strip_prefix("tick ")?, 16).ok();
    Ok(whole.lines().rev().find_map(tick).unwrap_or(0))
}

fn counts_beyond(host: &Host, beyond: u64) -> Result<u64> {
    let what = format!("a count beyond {beyond} on {}", host.name);
    wait_for(&what, PATIENCE, || count(host).map(|now| Some(now).filter(|now| *now > beyond)))
}

/// What the guest has written to its disk.
fn on_disk(disk: &Path) -> Result<u64> {
    let image = fs::read(disk).doing("read the disk")?;
    Ok(u64::from(u32::from_le_bytes(*image[512..].first_chunk().doing("find the second sector")?)))
}

#[test]
fn a_vm_that_booted_from_its_disk_goes_there_and_back() {
    story("boot from disk", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let disk = lab.dir().join("boots.img");
        fs::write(&disk, image()).doing("make a disk")?;
        let file = lab.dir().join("boots.toml");
        let text = format!(
            "name = \"boots\"\nmemory = \"64MiB\"\nmachine = \"q35\"\naccel = \"tcg\"\n[[disk]]\npath = \
             {disk:?}\n\
             format = \"raw\"\n"
        );
        fs::write(&file, text).doing("write a VM file")?;
        stage.agent("a").cli().json(&["run", &file.to_string_lossy()])?;
        let mut counted = counts_beyond(lab.host("a"), 10)?;
        for (from, to, mode) in [("a", "b", "pre-copy"), ("b", "a", "post-copy")] {
            // A console that was there before is written on.
            let report =
                stage.start_migration("boots", from, to, &["--mode", mode, "--verify"])?.completed()?;
            ensure!(report.verified() == Some(true), "memory was compared: {}", report.0);
            stage.runs_only_on("boots", to)?;
            counted = counts_beyond(lab.host(to), counted.max(count(lab.host(from))?) + 10)?;
            ensure!(on_disk(&disk)? >= counted, "it writes its disk from {to}");
        }
        Ok(())
    });
}
