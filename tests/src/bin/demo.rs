//! `./dev demo`: a busy VM moves between two hosts and back, while a client outside talks to it.

use lab::{Doing, Guest, Lab, Report, Result, Spec, Stage, TcpClient, Tools, VmFile, wait_for};
use std::{
    process::ExitCode,
    time::{Duration, Instant},
};
use units::Bytes;

/// One journey of the demo.
struct Hop {
    title: &'static str,
    from: &'static str,
    to: &'static str,
    options: &'static [&'static str],
}

const HOPS: [Hop; 3] = [
    Hop { title: "pre-copy", from: "left", to: "right", options: &["--mode", "pre-copy"] },
    Hop { title: "post-copy", from: "right", to: "left", options: &["--mode", "post-copy"] },
    Hop { title: "verified", from: "left", to: "right", options: &["--mode", "pre-copy", "--verify"] },
];

/// What there is to see: `check` rewrites and verifies records all the time, `dirty` writes in a hot and a
/// cold part.
const WORK: &str = "whimbrel.check=128M,rate=16M whimbrel.dirty=64M,rate=8M,pattern=hot-cold,content=text";

/// A column of the table.
struct Column {
    title: String,
    cells: Vec<String>,
}

const ROWS: [&str; 10] = [
    "total time",
    "the guest stood still for",
    "rounds",
    "sent over the wire",
    "pages: holes, zeros, sent",
    "faults (p50, p99)",
    "longest gap the guest felt",
    "longest silence the client heard",
    "messages lost by the client",
    "memory",
];

fn main() -> ExitCode {
    let started = Instant::now();
    let tools = match Tools::find() {
        Ok(tools) => tools,
        Err(lacks) => {
            eprintln!("the demo cannot run here: {lacks}");
            return ExitCode::FAILURE;
        }
    };
    let shown = Lab::new(&["left", "right"]).and_then(|lab| {
        let shown = show(&lab, &tools);
        if shown.is_err() {
            lab.print_logs(20);
        }
        shown
    });
    match shown {
        Ok(columns) => {
            println!("\n{}", table(&columns));
            println!("{:.0} s altogether. Everything is taken down again.", started.elapsed().as_secs_f64());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("\nthe demo failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn show(lab: &Lab, tools: &Tools) -> Result<Vec<Column>> {
    println!("Two hosts, `left` and `right` (network namespaces), an agent on each, a client on a third.");
    let stage = Stage::new(lab, tools)?;
    println!("Booting a VM on `left`: 1 GiB, 2 vCPUs, rewriting and checking its memory all the time …");
    let vm = VmFile { memory: "1GiB".to_owned(), vcpus: 2, ..VmFile::new("traveller", Spec::new(10, WORK)) };
    let guest = stage.run("left", &vm)?;
    let client = guest.echo(Duration::from_millis(2))?;
    let columns = HOPS.iter().map(|hop| travel(&stage, &guest, &client, hop)).collect::<Result<Vec<_>>>()?;
    let seen = client.finish(Duration::from_secs(10))?;
    println!(
        "\nThe client's one TCP connection lived through it all: {} messages, all answered.",
        seen.echoed
    );
    Ok(columns)
}

/// Moves the VM as a user would, with the display that a user sees, and asks everybody what they noticed.
fn travel(stage: &Stage, guest: &Guest, client: &TcpClient, hop: &Hop) -> Result<Column> {
    let Hop { title, from, to, options } = hop;
    println!("\n$ whimbrel migrate traveller --to {to} {}", options.join(" "));
    guest.order("forget")?;
    client.forget_gap();
    let cli = stage.agent(from).cli();
    let mut command = cli.command(["migrate", "traveller", "--to", to].iter().chain(*options));
    let status = command.status().doing("run whimbrel migrate")?;
    lab::ensure!(status.success(), "whimbrel migrate: {status}");
    let report = Report(cli.json(&["status", "traveller"])?);
    // What was sent before the pause has been answered by now, or the client is still waiting.
    let settled =
        || Ok(Some(client.seen()).filter(|seen| seen.broken.is_some() || seen.echoed + 2 >= seen.sent));
    let seen = wait_for("the client's echo", Duration::from_secs(10), settled)?;
    let gap = guest.count("gap_ms_ever")?;
    let checked = guest.verify()?;
    let lost = if seen.broken.is_some() { "connection lost".to_owned() } else { "none".to_owned() };
    let cells = vec![
        format!("{:.2} s", report.number("total_ms")? / 1e3),
        format!("{:.1} ms", report.number("downtime_ms")?),
        report.0["rounds"].as_array().map_or(0, Vec::len).to_string(),
        format!("{} of {}", bytes(&report, "wire_bytes")?, bytes(&report, "guest_bytes")?),
        ["pages.hole", "pages.zero", "pages.raw"]
            .iter()
            .map(|path| report.number(path).map(|n| n.to_string()))
            .collect::<Result<Vec<_>>>()?
            .join(", "),
        match report.number("faults.count")? {
            0.0 => "none".to_owned(),
            n => format!("{n} ({}, {} µs)", report.number("faults.p50_us")?, report.number("faults.p99_us")?),
        },
        format!("{gap:.0} ms"),
        format!("{:.0} ms", seen.longest_gap.as_secs_f64() * 1e3),
        lost,
        match report.verified() {
            Some(true) => "same on both hosts".to_owned(),
            _ => format!("{checked} pages right in the guest"),
        },
    ];
    Ok(Column { title: format!("{title} {from} → {to}"), cells })
}

fn bytes(report: &Report, path: &str) -> Result<Bytes> {
    Ok(Bytes(report.number(path)? as u64))
}

fn table(columns: &[Column]) -> String {
    let first = ROWS.iter().map(|row| row.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = columns
        .iter()
        .map(|column| {
            column.cells.iter().chain([&column.title]).map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let line = |name: &str, cells: Vec<&str>| {
        let cells: Vec<_> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:>width$}")).collect();
        format!("{name:first$}   {}\n", cells.join("   "))
    };
    let mut text = line("", columns.iter().map(|column| column.title.as_str()).collect());
    for (i, row) in ROWS.iter().enumerate() {
        text += &line(row, columns.iter().map(|column| column.cells[i].as_str()).collect());
    }
    text
}
