//! The echo and the control port.
//!
//! Control takes one command a line and answers each with one line:
//!
//! ```text
//! status          {"beat":12,"check_pages":…,"corrupt":0,…}
//! verify          ok pages=N | corrupt N: the first of them     everything that can be checked, now
//! pause [NAME]    ok    once the workload (all of them) stands still
//! go [NAME]       ok
//! findings        {"corrupt":["page 7 version 3: all zeros", …]}
//! ticks IP:PORT   ok    a datagram at every other tick, for somebody whose clock does not stop; its 8 bytes
//!                       count the pages that all workloads have done
//! probe           {"count":…,"missed":…,"write_us":{"p50":…,"p90":…,"p99":…,"max":…},"late_us":{…}}
//! hardware        {"cpus":2,"memory_mib":240,"pci":["0000:00:03.0"],"disks":["vda"],"cards":["eth0"],
//!                 "ports":["org.x"]}
//! online          ok    vCPUs and memory that were plugged in are used
//! claim MIB       ok    so much more memory is filled, and verified with all other
//! pcrs            A… B… …    what the platform has told its TPM, 24 of them
//! disc            ok BYTES SUM | empty    all that is on the CD, read anew, and its FNV-1a
//! draw N          ok text | ok pixels     the picture with this number is on the screen
//! keep NAME VALUE ok    a new variable of the firmware, which outlives a reboot
//! kept NAME       ok VALUE
//! forget          ok    the longest gap ever is counted anew, and the probe's times
//! off             ok    and the machine is switched off
//! ```

use crate::{
    beat, disc, draw, hardware,
    job::{Job, Jobs},
    setup, variables,
    words::Wish,
    work::Work,
};
use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::Arc,
    thread,
};

/// Longer lines are no command.
const LINE: u64 = 256;
/// What one echo holds: a few times what a client sends at once.
const ECHO: usize = 16 << 10;

/// Opens the ports that were asked for.
pub(crate) fn listen(wish: &Wish, jobs: &Arc<Jobs>, work: &Arc<Work>) -> Result<(), String> {
    if let Some(port) = wish.echo {
        let job = jobs.add("echo");
        serve(port, move |stream| echo(stream, &job))?;
    }
    if let Some(port) = wish.control {
        let (jobs, work) = (jobs.clone(), work.clone());
        serve(port, move |stream| control(stream, &jobs, &work))?;
    }
    Ok(())
}

/// A thread per connection: a handful of clients, and each may be slow without the others noticing.
fn serve(
    port: u16,
    talk: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
) -> Result<(), String> {
    let listener =
        TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).map_err(|e| format!("TCP port {port}: {e}"))?;
    let talk = Arc::new(talk);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let talk = talk.clone();
            thread::spawn(move || {
                beat::hurry();
                // A connection that breaks is the client's affair.
                let _ = talk(stream);
            });
        }
    });
    Ok(())
}

fn echo(mut stream: TcpStream, job: &Job) -> io::Result<()> {
    use std::sync::atomic::Ordering::Relaxed;
    stream.set_nodelay(true)?;
    let mut held = vec![0; ECHO];
    loop {
        let n = stream.read(&mut held)?;
        if n == 0 {
            return Ok(());
        }
        stream.write_all(&held[..n])?;
        job.loops.fetch_add(1, Relaxed);
    }
}

fn control(stream: TcpStream, jobs: &Jobs, work: &Work) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut answers = stream.try_clone()?;
    let mut questions = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if questions.by_ref().take(LINE).read_line(&mut line)? == 0 {
            return Ok(());
        }
        if !line.ends_with('\n') && line.len() as u64 == LINE {
            return answers.write_all(b"error the line is too long\n");
        }
        let answer = answer(line.trim(), jobs, work);
        answers.write_all(format!("{answer}\n").as_bytes())?;
        if line.trim() == "off" {
            // Whoever has heard the answer says something more. What a machine sends last may never leave it.
            questions.by_ref().take(LINE).read_line(&mut line)?;
            setup::power_off();
        }
    }
}

fn answer(line: &str, jobs: &Jobs, work: &Work) -> String {
    let mut words = line.split_whitespace();
    let (command, name) = (words.next().unwrap_or(""), words.next());
    let chosen = || -> Result<Vec<Arc<Job>>, String> {
        let all = jobs.list();
        let Some(name) = name else { return Ok(all) };
        let one: Vec<_> = all.into_iter().filter(|job| job.name == name).collect();
        if one.is_empty() { Err(format!("error no workload \"{name}\" runs here")) } else { Ok(one) }
    };
    let each = |act: fn(&Job)| match chosen() {
        Ok(jobs) => {
            jobs.iter().for_each(|job| act(job));
            "ok".to_owned()
        }
        Err(why) => why,
    };
    match command {
        "status" => beat::json(jobs),
        "verify" => {
            let before = jobs.corrupted();
            let pages = work.verify(jobs);
            match jobs.corrupted() {
                0 => format!("ok pages={pages}"),
                n => {
                    let first = jobs.findings().into_iter().next().unwrap_or_default();
                    format!("corrupt {n} ({} found now of {pages} pages): {first}", n - before)
                }
            }
        }
        "findings" => {
            let quoted: Vec<String> = jobs.findings().iter().map(|f| format!("\"{f}\"")).collect();
            format!("{{\"corrupt\":[{}]}}", quoted.join(","))
        }
        "pause" => each(Job::pause),
        "go" => each(Job::go),
        "forget" => {
            beat::forget_gaps();
            if let Some(probe) = work.probe() {
                probe.forget();
            }
            "ok".to_owned()
        }
        "probe" => work.probe().map_or_else(|| "error no probe runs here".to_owned(), |probe| probe.json()),
        "ticks" => match beat::tell(name) {
            Ok(()) => "ok".to_owned(),
            Err(why) => format!("error {why}"),
        },
        "hardware" => hardware::json(),
        "online" => hardware::online(),
        "claim" => match name.and_then(|mib| mib.parse().ok()) {
            Some(mib) => {
                work.claim(mib, jobs);
                "ok".to_owned()
            }
            None => "error claim MIB".to_owned(),
        },
        "pcrs" => pcrs(),
        "disc" => disc::read().unwrap_or_else(|why| format!("error {why}")),
        "draw" => match name.and_then(|number| number.parse().ok()).map(draw::picture) {
            Some(Ok(what)) => format!("ok {what}"),
            Some(Err(why)) => format!("error {why}"),
            None => "error draw N".to_owned(),
        },
        "keep" => match variables::keep(name.unwrap_or_default(), words.next().unwrap_or_default()) {
            Ok(()) => "ok".to_owned(),
            Err(why) => format!("error {why}"),
        },
        "kept" => match variables::kept(name.unwrap_or_default()) {
            Ok(value) => format!("ok {value}"),
            Err(why) => format!("error {why}"),
        },
        "off" => "ok".to_owned(),
        _ => "error there are status, verify, findings, pause [NAME], go [NAME], ticks [IP:PORT], probe, \
              forget, hardware, online, claim MIB, pcrs, disc, draw N, keep NAME VALUE, kept NAME, off"
            .to_owned(),
    }
}

/// What the platform has told its TPM since it was switched on.
fn pcrs() -> String {
    let bank = std::path::Path::new("/sys/class/tpm/tpm0/pcr-sha256");
    let one = |n: u32| std::fs::read_to_string(bank.join(n.to_string())).map(|text| text.trim().to_owned());
    match (0..24).map(one).collect::<Result<Vec<_>, _>>() {
        Ok(all) => all.join(" "),
        Err(error) => format!("error {}: {error}", bank.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_question_has_an_answer() {
        let (jobs, work) = (Jobs::default(), Work::default());
        jobs.add("dirty");
        assert!(answer("status", &jobs, &work).contains("\"dirty_pages\":0"));
        assert_eq!(answer("verify", &jobs, &work), "ok pages=0");
        assert_eq!(answer("pause dirty", &jobs, &work), "ok");
        assert_eq!(answer("go", &jobs, &work), "ok");
        assert_eq!(answer("pause check", &jobs, &work), "error no workload \"check\" runs here");
        assert_eq!(answer("forget", &jobs, &work), "ok");
        assert_eq!(answer("probe", &jobs, &work), "error no probe runs here");
        assert!(answer("hardware", &jobs, &work).starts_with("{\"cpus\":"));
        assert_eq!(answer("claim", &jobs, &work), "error claim MIB");
        assert_eq!(answer("draw", &jobs, &work), "error draw N");
        assert_eq!(answer("kept", &jobs, &work), "error a variable has a name of letters");
        assert_eq!(answer("claim 1", &jobs, &work), "ok");
        assert_eq!(answer("verify", &jobs, &work), "ok pages=256");
        assert!(answer("hello", &jobs, &work).starts_with("error there are"));
        assert!(answer("", &jobs, &work).starts_with("error"));
        jobs.corrupt("check page 7 version 3: all zeros");
        assert!(
            answer("verify", &jobs, &work).starts_with("corrupt 1 (0 found now of 256 pages): check page 7")
        );
    }
}
