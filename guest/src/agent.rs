//! What a guest agent is to its host: it answers on a virtio port, here with each line and how many there
//! were before.

use crate::{beat, say};
use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::PathBuf,
    thread,
    time::Duration,
};

/// Where Linux says which port is called how.
const PORTS: &str = "/sys/class/virtio-ports";

/// How often it is looked whether a host has come: reading returns at once as long as nobody is there.
const LOOK: Duration = Duration::from_millis(20);

/// Answers on the port of this name.
pub(crate) fn start(name: &str) -> Result<(), String> {
    let port = find(name).map_err(|e| format!("the virtio port {name}: {e}"))?;
    let opened = File::options().read(true).write(true).open(&port);
    let mut file = opened.map_err(|e| format!("{}: {e}", port.display()))?;
    thread::spawn(move || {
        beat::hurry();
        if let Err(e) = serve(&mut file) {
            say!("WHIMBREL error the virtio port: {e}");
        }
    });
    Ok(())
}

fn find(name: &str) -> io::Result<PathBuf> {
    for entry in fs::read_dir(PORTS)? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|text| text.trim() == name) {
            return Ok(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

fn serve(file: &mut File) -> io::Result<()> {
    let (mut asked, mut count) = (Vec::new(), 0_u64);
    let mut held = [0; 4096];
    loop {
        let n = file.read(&mut held)?;
        if n == 0 {
            thread::sleep(LOOK);
            continue;
        }
        asked.extend_from_slice(&held[..n]);
        while let Some(end) = asked.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = asked.drain(..=end).collect();
            let answer = [format!("{count} ").as_bytes(), &line].concat();
            count += 1;
            file.write_all(&answer)?;
        }
    }
}
