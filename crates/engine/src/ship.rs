//! From guest memory to the streams: each stream has a thread that takes its share, refines it and writes it.

use crate::{
    conn::Conn,
    ports::{Fault, GuestMemory},
    queue::{Owing, Round},
};
use page::Class;
use proto::{BATCH_PAGES, Frame, HEADER, MAX_PAYLOAD, MAX_RUNS, Run, Shape, write_batch};
use std::{
    io::{self, IoSlice, Read, Write},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Instant,
};
use units::{BlockId, Bytes, PAGE_SIZE, PageRange, Rate};

/// How pages travelled.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Shipped {
    pub(crate) zero: u64,
    pub(crate) plain: u64,
}

/// What a stream's thread is told to do.
#[derive(Clone)]
pub(crate) enum Job {
    /// Ship a share of this round, then say that the round is over.
    Round(Arc<Round>),
    /// Ship what is owed to a running guest until nothing is left.
    Push(Arc<Owing>),
}

/// What a stream's thread has to say.
#[derive(Debug)]
pub(crate) enum Said {
    /// Its share of this round is written.
    RoundDone(u32, Shipped),
    /// What it took of the owed pages is written, and no more is left to take.
    PushDone(Shipped),
    /// A connection failed.
    Lost(io::Error),
}

/// All streams of a migration together keep to one rate.
#[derive(Debug)]
pub(crate) struct Pacer {
    limit: Option<Rate>,
    free_at: Mutex<Instant>,
}

impl Pacer {
    pub(crate) fn new(limit: Option<Rate>) -> Self {
        Self { limit, free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until this much may be sent.
    fn wait(&self, bytes: usize) {
        let Some(cost) = self.limit.and_then(|rate| Bytes(bytes as u64).time_at(rate)) else { return };
        let start = {
            let mut free_at = self.free_at.lock().expect("no one panics here");
            let start = (*free_at).max(Instant::now());
            *free_at = start + cost;
            start
        };
        thread::sleep(start.saturating_duration_since(Instant::now()));
    }
}

/// The streams of one migration. Dropping them ends their threads and connections.
pub(crate) struct Streams {
    jobs: Vec<Sender<Job>>,
    conns: Vec<Conn>,
}

impl Streams {
    /// Starts a thread for each connection; `say` is called from these threads.
    pub(crate) fn start(
        conns: Vec<Conn>,
        memory: &Arc<dyn GuestMemory>,
        pacer: &Arc<Pacer>,
        say: impl Fn(Said) + Clone + Send + 'static,
    ) -> io::Result<Self> {
        let mut streams = Self { jobs: Vec::new(), conns: Vec::new() };
        for (i, conn) in conns.into_iter().enumerate() {
            streams.conns.push(conn.another()?);
            let (jobs, todo) = channel();
            streams.jobs.push(jobs);
            let (memory, pacer, say) = (memory.clone(), pacer.clone(), say.clone());
            thread::Builder::new().name(format!("ship-{i}")).spawn(move || {
                if let Err(e) = work(&todo, &mut Shipper::new(conn, memory, pacer), &say) {
                    say(Said::Lost(e));
                }
            })?;
        }
        Ok(streams)
    }

    pub(crate) fn count(&self) -> u32 {
        self.jobs.len() as u32
    }

    pub(crate) fn give(&self, job: &Job) {
        for stream in &self.jobs {
            // A stream that is gone has said so.
            let _ = stream.send(job.clone());
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.conns.iter().for_each(Conn::shut);
    }
}

fn work(todo: &Receiver<Job>, shipper: &mut Shipper, say: &impl Fn(Said)) -> io::Result<()> {
    while let Ok(job) = todo.recv() {
        match job {
            Job::Round(round) => {
                while let Some((block, share)) = round.take() {
                    for run in round.set.block(block).runs_within(share) {
                        shipper.add(block, run, round.blank)?;
                    }
                }
                shipper.flush()?;
                shipper.conn.write_all(&Frame::RoundEnd(round.number).header())?;
                say(Said::RoundDone(round.number, shipper.take_counts()));
            }
            Job::Push(owing) => {
                while let Some((block, runs)) = owing.take(BATCH_PAGES) {
                    for run in runs {
                        shipper.add(block, run, false)?;
                    }
                    // What waits in a buffer, a guest waits for.
                    shipper.flush()?;
                }
                say(Said::PushDone(shipper.take_counts()));
            }
        }
    }
    Ok(())
}

/// Fills batches and writes them.
struct Shipper {
    conn: Conn,
    memory: Arc<dyn GuestMemory>,
    pacer: Arc<Pacer>,
    block: BlockId,
    runs: Vec<Run>,
    /// The pages as they were read, zero pages included; `content` says which parts of it travel.
    pages: Vec<u8>,
    filled: usize,
    content: Vec<std::ops::Range<usize>>,
    head: Vec<u8>,
    counts: Shipped,
}

impl Shipper {
    fn new(conn: Conn, memory: Arc<dyn GuestMemory>, pacer: Arc<Pacer>) -> Self {
        Self {
            conn,
            memory,
            pacer,
            block: BlockId(0),
            runs: Vec::with_capacity(MAX_RUNS),
            pages: vec![0; MAX_PAYLOAD],
            filled: 0,
            content: Vec::new(),
            head: Vec::new(),
            counts: Shipped::default(),
        }
    }

    /// Adds pages; writes a batch whenever one is full. `blank`: the target has zeros there already.
    fn add(&mut self, block: BlockId, range: PageRange, blank: bool) -> io::Result<()> {
        if block != self.block {
            self.flush()?;
            self.block = block;
        }
        let mut range = range;
        while !range.is_empty() {
            if self.filled == MAX_PAYLOAD {
                self.flush()?;
            }
            let room = ((MAX_PAYLOAD - self.filled) / PAGE_SIZE) as u64;
            let piece = PageRange::new(range.start, range.count.min(room));
            range = PageRange::new(piece.end(), range.count - piece.count);
            self.take(piece, blank)?;
        }
        Ok(())
    }

    /// Reads and refines pages for which there is room.
    fn take(&mut self, piece: PageRange, blank: bool) -> io::Result<()> {
        let start = self.filled;
        self.filled += piece.count as usize * PAGE_SIZE;
        self.memory.read(self.block, piece, &mut self.pages[start..self.filled])?;
        let refined = page::refine(piece.start, &self.pages[start..self.filled]);
        // At most one run a page, so the table has room (`MAX_RUNS`).
        for run in refined {
            let at = start + (run.range.start.0 - piece.start.0) as usize * PAGE_SIZE;
            match run.class {
                Class::Zero => {
                    self.counts.zero += run.range.count;
                    if blank {
                        continue;
                    }
                }
                Class::Plain => {
                    self.counts.plain += run.range.count;
                    self.content.push(at..at + run.range.count as usize * PAGE_SIZE);
                }
            }
            self.runs.push(Run { range: run.range, class: run.class });
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.runs.is_empty() {
            self.head.clear();
            write_batch(self.block, &self.runs, &mut self.head);
            let mut parts = vec![IoSlice::new(&self.head)];
            parts.extend(self.content.iter().map(|part| IoSlice::new(&self.pages[part.clone()])));
            self.pacer.wait(parts.iter().map(|p| p.len()).sum());
            self.conn.write_parts(&mut parts)?;
        }
        self.runs.clear();
        self.content.clear();
        self.filled = 0;
        Ok(())
    }

    fn take_counts(&mut self) -> Shipped {
        std::mem::take(&mut self.counts)
    }
}

/// Answers the pages that the target's guest waits for, until the connection ends. They go ahead of everything else
/// because nothing else uses this connection.
pub(crate) fn serve_faults(
    mut conn: Conn,
    memory: Arc<dyn GuestMemory>,
    shape: &Shape,
    answered: impl Fn(Fault),
) -> io::Result<()> {
    let mut shipper = Shipper::new(conn.another()?, memory, Arc::new(Pacer::new(None)));
    loop {
        let mut header = [0; HEADER];
        conn.read_exact(&mut header)?;
        match Frame::parse(&header, shape).map_err(|e| crate::conn::invalid(e.to_string()))? {
            Frame::Want { block, page } => {
                shipper.add(block, PageRange::new(page, 1), false)?;
                shipper.flush()?;
                answered(Fault { block, page });
            }
            other => return Err(crate::conn::invalid(format!("{other:?} where only requests are expected"))),
        }
    }
}
