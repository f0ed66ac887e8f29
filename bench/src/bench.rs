//! Who runs when, and for how long.

use crate::{
    commons,
    contender::{Contender, Way},
    files,
    footprint::{self, Footprint},
    guest, limit,
    link::{Link, patience},
    options::Options,
    pauses, qemu,
    results::Results,
    run::{Run, Terms},
    tables, whimbrel,
    workload::{FILES, With, Workload},
};
use lab::{Doing, Error, HandStart, Lab, Result, Tools, other_kernel::with_program};
use std::{fs, io::Write, os::unix::fs::FileExt, path::Path, time::Instant};
use units::{Bytes, Rate};

/// How long each logs' end is that a failure shows.
const LINES: usize = 15;
/// What a plain copy moves: about what the incompressible guest has in use.
const COPIED: Bytes = Bytes(640 << 20);
/// Over so many connections, as long as nobody knows how many whimbrel takes.
const STREAMS: u64 = 2;
/// How often both guests and the copies that move hold a guest's memory at the same time.
const TOUCHED: u64 = 4;
/// The files that a page cache is filled with.
const USR: &str = "/usr";
/// Debian's package redis-tools has the server under the name of a program that checks its files; it is
/// whatever it is called.
const REDIS: [&str; 2] = ["/usr/bin/redis-check-rdb", "/usr/bin/redis-server"];

/// What a bench knows besides its results.
struct Bench<'a> {
    options: &'a Options,
    tools: Tools,
    clock: Instant,
    /// What the unshaped link carries, once that was measured.
    unshaped: Option<Rate>,
}

/// Measures what `options` wants and prints it. Whether everything worked.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or_default();
    let mut bench = Bench { options, tools: Tools::find()?, clock: Instant::now(), unshaped: None };
    let mut results = Results::open(options.out.as_deref(), options.tls)?;
    let mut well = true;
    let wanted: Vec<_> = Workload::ALL.iter().filter(|workload| options.wants(workload)).collect();
    warm_up(wanted.iter().map(|workload| TOUCHED * workload.memory.0).max().unwrap_or_default())?;
    for workload in wanted {
        // One boot serves both links where the guest does the same on both.
        let mut links = options.links();
        links.retain(|link| !workload.outruns || link.rate().is_some());
        while let Some(first) = links.first().copied() {
            let words = options.words(workload, first);
            let (same, others) = links.into_iter().partition(|link| options.words(workload, *link) == words);
            links = others;
            if let Err(why) = bench.measure(workload, &same, &mut results) {
                well = false;
                eprintln!("FAILED {}: {why}", workload.name);
            }
        }
    }
    let mut footprints: Vec<Footprint> = Vec::new();
    if options.wants_memory() && !bench.is_over() {
        eprintln!("agents' memory with a guest of 5 GiB …");
        match footprint::measure(&bench.tools, options.tls) {
            Ok(found) => footprints = found,
            Err(why) => {
                well = false;
                eprintln!("FAILED memory: {why}");
            }
        }
    }
    let print = |text: &str| std::io::stdout().write_all(text.as_bytes()).doing("print");
    if options.wants_commons() && !bench.is_over() {
        commons::measure(&bench.tools, options, print)?;
    }
    if options.wants_pauses() && !bench.is_over() {
        pauses::measure(&bench.tools, options, print)?;
    }
    let text = tables::all(&results, &footprints, load, options.tls);
    std::io::stdout().write_all(text.as_bytes()).doing("print")?;
    Ok(well)
}

/// Touches as much memory as will be used. Where the machine is itself a guest, its host backs memory when it
/// is first touched, which takes ten times as long as touching it; whoever ran first would pay for all.
fn warm_up(bytes: u64) -> Result<()> {
    let memory =
        rustix::fs::memfd_create("bench", rustix::fs::MemfdFlags::CLOEXEC).doing("make a memory file")?;
    let (memory, piece) = (fs::File::from(memory), vec![1; 1 << 20]);
    (0..bytes >> 20).try_for_each(|n| memory.write_all_at(&piece, n << 20)).doing("touch memory")
}

impl Bench<'_> {
    fn is_over(&self) -> bool {
        self.clock.elapsed() > self.options.limit()
    }

    /// All runs of a workload on links for which it is the same.
    fn measure(&mut self, workload: &Workload, links: &[Link], results: &mut Results) -> Result<()> {
        let movers = self.options.movers(workload);
        let missing = |link: &Link, results: &Results| -> Vec<(u32, Contender)> {
            let turns =
                (1..=self.options.runs).flat_map(|n| turns(&movers, n).into_iter().map(move |c| (n, c)));
            turns.filter(|(n, c)| !results.has(workload.name, link.name(), c.name, *n)).collect()
        };
        let all: Vec<_> = links.iter().map(|link| (*link, missing(link, results))).collect();
        let needed: Vec<Contender> =
            all.iter().flat_map(|(_, turns)| turns.iter().map(|(_, c)| *c)).collect();
        if needed.is_empty() || self.is_over() {
            return Ok(());
        }
        let (here, there) = (Lab::new(&["a", "b"])?, Lab::new(&["a", "b"])?);
        let (start, tools) = self.prepare(workload, self.options.words(workload, links[0]), here.dir())?;
        let mut pair = Pair { here: &here, there: &there, ours: None, theirs: None };
        pair.boot(&start, &tools, self.options, &needed)?;
        for (link, turns) in all {
            link.shape(&here)?;
            link.shape(&there)?;
            let patience = patience(workload.memory, self.rate(link, &pair)?);
            for (n, contender) in turns {
                if self.is_over() {
                    eprintln!("{} minutes are over: no further runs", self.options.minutes);
                    return Ok(());
                }
                if pair.lacks(contender) {
                    continue;
                }
                let verify = n == self.options.runs || workload.downtime_ms < 100;
                let (downtime_ms, pulse) = (workload.downtime_ms, workload.pulse());
                let outruns = link.rate().filter(|_| workload.outruns);
                let terms = Terms { downtime_ms, patience, outruns, pulse, verify };
                let streams = results.runs.iter().rev().find(|run| run.contender == "whimbrel-uncompressed");
                let streams = streams.and_then(|run| run.streams).unwrap_or(STREAMS);
                let run = match pair.turn(contender, n, &terms, streams) {
                    Ok(run) => run,
                    Err(why) => {
                        pair.lab(contender).print_logs(LINES);
                        Run {
                            trouble: Some(why.to_string()),
                            contender: contender.name.to_owned(),
                            ..Run::default()
                        }
                    }
                };
                let mut run =
                    Run { workload: workload.name.to_owned(), link: link.name().to_owned(), run: n, ..run };
                if let (Some(outran), Some(rate)) = (&mut run.outran, outruns) {
                    outran.copies = run.total_ms / 1000.0 * rate.0 as f64 / workload.memory.0 as f64;
                }
                let at = self.clock.elapsed().as_secs();
                eprintln!("[{}:{:02}] {}", at / 60, at % 60, tables::line(&run));
                let gone = run.harmed || !run.finished && run.total_ms == 0.0;
                results.add(run)?;
                if gone {
                    pair.mend(contender);
                }
            }
        }
        Ok(())
    }

    /// What a link carries: as it is shaped, or as one copy shows.
    fn rate(&mut self, link: Link, pair: &Pair<'_>) -> Result<Rate> {
        if let Some(rate) = link.rate().or(self.unshaped) {
            return Ok(rate);
        }
        let copy = pair.turn_of_nobody(1, STREAMS)?;
        Ok(*self.unshaped.insert(limit::rate(&copy)))
    }

    /// How a workload's guest is started, and with what.
    fn prepare(&self, workload: &Workload, words: &str, dir: &Path) -> Result<(HandStart, Tools)> {
        eprintln!("{}: {} …", workload.name, workload.what);
        let words = format!("{words} whimbrel.tick={}ms", workload.pulse().tick_ms);
        let (mut start, mut tools) = (guest::start(&words, workload.memory), self.tools.clone());
        match workload.with {
            With::Nothing => {}
            With::Files => {
                let disk = dir.join("files.img");
                files::write(Path::new(USR), FILES, &disk)?;
                start = start.disk(&disk, "readonly=on");
            }
            With::Redis => {
                let initrd = dir.join("redis.cpio");
                with_program(&tools.initrd, Path::new(REDIS[0]), REDIS[1], &initrd)?;
                tools.initrd = initrd;
            }
        }
        Ok((start, tools))
    }
}

/// In the order of their turns: the other way round every other time, so that nobody always goes the same
/// way.
fn turns(movers: &[Contender], n: u32) -> Vec<Contender> {
    let mut turns = movers.to_vec();
    if n.is_multiple_of(2) {
        turns.reverse();
    }
    turns
}

/// Both guests, and only one of them running at a time.
struct Pair<'a> {
    here: &'a Lab,
    there: &'a Lab,
    ours: Option<whimbrel::Moved<'a>>,
    theirs: Option<qemu::Moved<'a>>,
}

impl<'a> Pair<'a> {
    fn boot(
        &mut self,
        start: &HandStart,
        tools: &'a Tools,
        options: &Options,
        needed: &[Contender],
    ) -> Result<()> {
        if needed.iter().any(|c| !c.is_qemu()) {
            let booted = whimbrel::stage(self.here, tools, options.tls)
                .and_then(|stage| whimbrel::Moved::boot(stage, start.clone(), options.streams));
            self.ours = Some(booted.inspect_err(|_| self.here.print_logs(LINES))?);
        }
        if needed.iter().any(|c| c.is_qemu()) {
            let ours = self.ours.as_ref().map(whimbrel::Moved::pid).transpose()?;
            ours.map(guest::freeze).transpose()?;
            self.theirs = Some(qemu::Moved::boot(self.there, tools, start.clone(), options.tls)?);
            ours.map(guest::thaw).transpose()?;
        }
        Ok(())
    }

    fn lacks(&self, contender: Contender) -> bool {
        if contender.is_qemu() { self.theirs.is_none() } else { self.ours.is_none() }
    }

    fn lab(&self, contender: Contender) -> &'a Lab {
        if contender.is_qemu() { self.there } else { self.here }
    }

    /// One run, while the other's guest is frozen.
    fn turn(&mut self, contender: Contender, n: u32, terms: &Terms, streams: u64) -> Result<Run> {
        let other = match contender.is_qemu() {
            // A VM that is nowhere needs no freezing.
            true => self.ours.as_ref().and_then(|moved| moved.pid().ok()),
            false => self.theirs.as_ref().map(qemu::Moved::pid),
        };
        other.map(guest::freeze).transpose()?;
        let nobody = || Error::new(contender.name, "has no guest any more");
        let done = match contender.way {
            Way::Whimbrel { .. } => {
                self.ours.as_ref().ok_or_else(nobody).and_then(|moved| moved.hop(contender, terms))
            }
            Way::Qemu(_) => {
                self.theirs.as_mut().ok_or_else(nobody).and_then(|moved| moved.hop(contender, terms))
            }
            Way::Copy => self.turn_of_nobody(n, streams),
        };
        other.map(guest::thaw).transpose()?;
        done
    }

    /// A plain copy, there or back.
    fn turn_of_nobody(&self, n: u32, streams: u64) -> Result<Run> {
        let hosts = self.here.hosts();
        let (from, to) = if n.is_multiple_of(2) { (&hosts[1], &hosts[0]) } else { (&hosts[0], &hosts[1]) };
        limit::copy(from, to, COPIED, streams)
    }

    /// After a run that the guest did not survive, or of which nobody knows how it went.
    fn mend(&mut self, contender: Contender) {
        if !contender.is_qemu() {
            // Its agents and journals know more than a fresh boot would: what follows shows whether it can
            // still be moved.
            return;
        }
        if let Some(theirs) = &mut self.theirs {
            eprintln!("{}", theirs.last_words());
            if let Err(why) = theirs.reboot() {
                eprintln!("the guest that QEMU moves is gone: {why}");
                self.theirs = None;
            }
        }
    }
}
