//! A Redis server full of session records, and clients that read and replace them.

use crate::{
    content::{Content, Page, mix, next},
    job::{Job, Jobs},
    pace::Pace,
    words::Redis,
};
use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, TcpStream},
    process::{Command, Stdio},
    sync::{Arc, atomic::Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};
use units::PAGE_SIZE;

const SERVER: &str = "/usr/bin/redis-server";
const PORT: u16 = 6379;
/// How long it may take to start on an emulated CPU.
const START: Duration = Duration::from_secs(30);
/// A record: as long as a page, an eighth of it a token that does not compress, the rest like log files.
const RECORD: usize = PAGE_SIZE;
const TOKEN: usize = RECORD / 8;
/// Commands that a client sends at once.
const PIPELINE: u64 = 16;
/// One command in so many replaces a record; the others read one.
const WRITES: u64 = 5;

/// Starts the server, fills it, and starts a client.
pub(crate) fn start(wish: &Redis, jobs: &Arc<Jobs>) -> Result<(), String> {
    let failed = |e: io::Error| format!("{SERVER}: {e}; did the initramfs bring it?");
    fs::create_dir_all("/tmp").map_err(failed)?;
    let mut server = Command::new(SERVER);
    server.args(["--bind", "127.0.0.1", "--port", &PORT.to_string(), "--dir", "/tmp"]);
    server.args(["--save", "", "--appendonly", "no"]).stdin(Stdio::null()).stdout(Stdio::null());
    // It ends with the machine.
    let _ = server.spawn().map_err(failed)?;
    let mut client = Client::connect().map_err(failed)?;
    let records = wish.set.0 / RECORD as u64;
    for first in (0..records).step_by(PIPELINE as usize) {
        let commands = (first..records.min(first + PIPELINE)).map(|key| (key, Some(0)));
        client.talk(commands, jobs).map_err(failed)?;
    }
    let (job, jobs) = (jobs.add("redis"), jobs.clone());
    thread::spawn(move || load(client, records, &job, &jobs));
    Ok(())
}

fn load(mut client: Client, records: u64, job: &Job, jobs: &Jobs) -> ! {
    let mut seed = mix(3);
    job.run(Pace::new(None, 1), |batch| {
        for _ in 0..batch / PIPELINE {
            let commands = (0..PIPELINE).map(|_| {
                let (key, version) = (next(&mut seed) % records, next(&mut seed));
                (key, version.is_multiple_of(WRITES).then_some(version))
            });
            if let Err(e) = client.talk(commands, jobs) {
                jobs.corrupt(format_args!("redis: {e}"));
                thread::sleep(Duration::from_secs(1));
            }
            job.loops.fetch_add(1, Relaxed);
        }
    })
}

struct Client {
    stream: BufReader<TcpStream>,
    page: Page,
    commands: Vec<u8>,
}

impl Client {
    fn connect() -> io::Result<Self> {
        let end = Instant::now() + START;
        loop {
            match TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    let stream = BufReader::new(stream);
                    return Ok(Self { stream, page: Page::ZERO, commands: Vec::new() });
                }
                Err(e) if Instant::now() > end => return Err(e),
                Err(_) => thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Sends these commands at once: a record to be read, or its new version. A record that is read must be
    /// its own.
    fn talk(&mut self, commands: impl Iterator<Item = (u64, Option<u64>)>, jobs: &Jobs) -> io::Result<()> {
        let mut asked = Vec::new();
        self.commands.clear();
        for (key, version) in commands {
            asked.push((key, version));
            match version {
                None => write!(self.commands, "*2\r\n$3\r\nGET\r\n$14\r\nkey:{key:010}\r\n")?,
                Some(version) => {
                    write!(self.commands, "*3\r\n$3\r\nSET\r\n$14\r\nkey:{key:010}\r\n${RECORD}\r\n")?;
                    Content::Text.write(mix(key ^ version), &mut self.page);
                    let record = &mut self.page.0[..RECORD];
                    let mut noise = mix(key + version) | 1;
                    for word in record[..TOKEN].chunks_exact_mut(8) {
                        word.copy_from_slice(&next(&mut noise).to_le_bytes());
                    }
                    record[..8].copy_from_slice(&key.to_le_bytes());
                    self.commands.extend_from_slice(record);
                    self.commands.extend_from_slice(b"\r\n");
                }
            }
        }
        self.stream.get_mut().write_all(&self.commands)?;
        let mut line = Vec::new();
        for (key, version) in asked {
            line.clear();
            self.stream.read_until(b'\n', &mut line)?;
            let said = String::from_utf8_lossy(&line).trim_end().to_owned();
            match version {
                Some(_) if said == "+OK" => {}
                None if said == format!("${RECORD}") => {
                    let mut record = [0; RECORD + 2];
                    self.stream.read_exact(&mut record)?;
                    if record[..8] != key.to_le_bytes() {
                        jobs.corrupt(format_args!("redis record {key} is another"));
                    }
                }
                _ => return Err(io::Error::other(format!("the server says \"{said}\""))),
            }
        }
        Ok(())
    }
}
