//! From guest memory to the streams: each stream has a thread that takes its share, refines it and writes it.

use crate::{
    compression::{BatchCompressor, LinkSample},
    conn::Conn,
    gate::Gate,
    kept::KeptTable,
    ports::{Fault, GuestMemory},
    queue::{PushQueue, RoundQueue, SHARE, shares},
};
use page::{Batch, Counts, Encoder, Kept, References, Sent};
use policy::{Learnt, Pace};
use proto::{BATCH_PAGES, Frame, HEADER, MAX_PAYLOAD, Shape, write_batch};
use std::{
    collections::HashSet,
    io::{self, IoSlice, Read, Write},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use units::{BlockId, Locked, MemorySet, PageIndex, PageRange, Rate};

/// What a stream's thread is told to do.
#[derive(Clone)]
pub(crate) enum Job {
    /// Ship these pages, which were on a connection that is lost, and a share of this round; then say that
    /// the round is over.
    Round(Arc<RoundQueue>, Arc<MemorySet>),
    /// Send what is missing to a running guest until nothing is left.
    Push(Arc<PushQueue>),
}

/// What a stream's thread has to say.
#[derive(Debug)]
pub(crate) enum Said {
    /// This stream's share of this round is written.
    RoundDone(u32, u32, Counts),
    /// What it took of the missing pages is written, and no more is left to take.
    PushDone(Counts),
    /// The connection of this stream failed.
    StreamLost(u32, io::Error),
    /// The connection on which faults are answered failed.
    Lost(io::Error),
}

/// All connections of a migration together keep to one rate.
#[derive(Debug)]
pub(crate) struct Pacer {
    pace: Option<Mutex<Pace>>,
    start: Instant,
}

impl Pacer {
    pub(crate) fn new(limit: Option<Rate>) -> Self {
        Self { pace: limit.map(|rate| Mutex::new(Pace::new(rate))), start: Instant::now() }
    }

    /// Counts what is sent at once, because a guest waits for it.
    pub(crate) fn charge(&self, bytes: usize) {
        if let Some(pace) = &self.pace {
            pace.locked().take(self.start.elapsed(), bytes as u64);
        }
    }

    /// Writes all parts as fast as the limit allows. Says whether it made them wait.
    fn write(&self, conn: &mut Conn, mut parts: &mut [IoSlice<'_>]) -> io::Result<bool> {
        let Some(pace) = &self.pace else { return conn.write_parts(parts).map(|()| false) };
        let mut waited = false;
        while !parts.is_empty() {
            let (wait, quantum) = {
                let mut pace = pace.locked();
                let rest: usize = parts.iter().map(|part| part.len()).sum();
                let quantum = rest.min(pace.quantum() as usize);
                (pace.take(self.start.elapsed(), quantum as u64), quantum)
            };
            waited |= !wait.is_zero();
            thread::sleep(wait);
            let (mut piece, mut left) = (Vec::new(), quantum);
            for part in parts.iter() {
                if left == 0 {
                    break;
                }
                let some = left.min(part.len());
                piece.push(IoSlice::new(&part[..some]));
                left -= some;
            }
            conn.write_parts(&mut piece)?;
            IoSlice::advance_slices(&mut parts, quantum);
        }
        Ok(waited)
    }
}

/// What the streams of a migration share.
#[derive(Clone)]
pub(crate) struct StreamContext {
    pub(crate) memory: Arc<dyn GuestMemory>,
    pub(crate) pacer: Arc<Pacer>,
    pub(crate) sent: Arc<Sent>,
    pub(crate) compression: Arc<BatchCompressor>,
    pub(crate) gate: Arc<Gate>,
    /// What the target keeps from before.
    pub(crate) kept: Option<Arc<KeptTable>>,
}

/// One connection with its thread.
struct Stream {
    conn: Conn,
    /// How many bytes of it the target had confirmed when that was looked at last.
    confirmed: u64,
    jobs: Sender<Job>,
    /// Nothing of it is wanted any more.
    ended: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// The streams of one migration. Dropping them ends their threads and connections.
pub(crate) struct Streams {
    streams: Vec<Stream>,
    shared: StreamContext,
    say: Arc<dyn Fn(Said) + Send + Sync>,
}

impl Streams {
    /// Starts a thread for each connection; `say` is called from these threads.
    pub(crate) fn start(
        conns: Vec<Conn>,
        shared: StreamContext,
        say: Arc<dyn Fn(Said) + Send + Sync>,
    ) -> io::Result<Self> {
        let mut streams = Self { streams: Vec::new(), shared, say };
        for (i, conn) in (0..).zip(conns) {
            streams.streams.push(streams.begin(i, conn)?);
        }
        Ok(streams)
    }

    /// Starts a stream's thread.
    fn begin(&self, stream: u32, conn: Conn) -> io::Result<Stream> {
        let another = conn.another()?;
        let (jobs, todo) = channel();
        let (shared, say) = (self.shared.clone(), self.say.clone());
        let ended = Arc::<AtomicBool>::default();
        let over = ended.clone();
        let thread = thread::Builder::new().name(format!("send-{stream}")).spawn(move || {
            let (compression, gate) = (shared.compression.clone(), shared.gate.clone());
            let bulk = Some(Bulk { compression, gate, sent: shared.sent.clone() });
            let mut sender = PageSender::new(conn, shared.memory.clone(), shared.pacer.clone(), bulk);
            if let Err(e) = work(stream, &todo, &mut sender, &shared, &over, &*say)
                && !over.load(SeqCst)
            {
                say(Said::StreamLost(stream, e));
            }
        })?;
        // What was said before the first page is none.
        let confirmed = another.confirmed().unwrap_or(0);
        Ok(Stream { conn: another, confirmed, jobs, ended, thread })
    }

    /// The stream is lost: nothing is written to its connection any more.
    pub(crate) fn end(&self, stream: u32) {
        if let Some(stream) = self.streams.get(stream as usize) {
            stream.ended.store(true, SeqCst);
            stream.conn.shut();
            self.shared.gate.all_taken();
        }
    }

    /// The stream goes on over another connection, with those pages that it took of a round and that are not
    /// among these, which have arrived.
    pub(crate) fn go_on(
        &mut self,
        stream: u32,
        conn: Conn,
        job: Option<(Arc<RoundQueue>, &MemorySet)>,
    ) -> io::Result<()> {
        self.end(stream);
        let new = self.begin(stream, conn)?;
        let Stream { jobs, thread, .. } = std::mem::replace(&mut self.streams[stream as usize], new);
        drop(jobs);
        // Whoever still takes shares, or calls pages sent that nobody will get, must have ended before it is
        // looked what that comes to (I2).
        if thread.join().is_err() {
            return Err(io::Error::other("the thread of a stream ended in a panic"));
        }
        if let Some((round, received)) = job {
            let mut again = round.taken_by(stream);
            again.subtract(received);
            let pages = again.blocks().flat_map(|(block, set)| set.runs().map(move |run| (block, run)));
            for (block, run) in pages {
                run.pieces(1).for_each(|page| self.shared.sent.forget(block, page.start));
            }
            let _ = self.streams[stream as usize].jobs.send(Job::Round(round, Arc::new(again)));
        }
        Ok(())
    }

    /// How many more bytes the target has confirmed since this was asked last.
    pub(crate) fn newly_confirmed(&mut self) -> u64 {
        let new = |stream: &mut Stream| {
            let now = stream.conn.confirmed().unwrap_or(stream.confirmed);
            now.saturating_sub(std::mem::replace(&mut stream.confirmed, now))
        };
        self.streams.iter_mut().map(new).sum()
    }

    /// Whether any of them has sent something that is not confirmed: not only what the target does not take
    /// in.
    pub(crate) fn is_on_the_way(&self) -> bool {
        let on_the_way =
            |stream: &Stream| stream.conn.queue().is_ok_and(|queue| queue.unconfirmed > queue.unsent);
        self.streams.iter().any(on_the_way)
    }

    pub(crate) fn count(&self) -> u32 {
        self.streams.len() as u32
    }

    /// What the target has, by what was sent.
    pub(crate) fn sent(&self) -> &Arc<Sent> {
        &self.shared.sent
    }

    /// So many cores may compress from now on.
    pub(crate) fn allow(&self, cores: u32) {
        self.shared.compression.allow(cores);
    }

    /// What compressing taught so far.
    pub(crate) fn learnt(&self) -> Option<Learnt> {
        self.shared.compression.learnt()
    }

    /// The most that were in use at a time.
    pub(crate) fn widest(&self) -> u32 {
        self.shared.gate.widest()
    }

    /// What the target keeps is named in the first job only: it may have given it back since.
    pub(crate) fn forget_kept(&self) {
        self.shared.kept.iter().for_each(|kept| kept.close());
    }

    pub(crate) fn give(&self, job: &Job) {
        if let Job::Round(round, _) = job {
            // No stream sends anything now: the barrier of the round before was acknowledged.
            self.shared.sent.turn(round.number);
            self.shared.compression.turn(round.number);
        }
        self.shared.gate.begin();
        for stream in &self.streams {
            // A stream that is gone has said so.
            let _ = stream.jobs.send(job.clone());
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.shared.gate.close();
        self.streams.iter().for_each(|stream| stream.conn.shut());
    }
}

fn work(
    stream: u32,
    todo: &Receiver<Job>,
    sender: &mut PageSender,
    StreamContext { sent, gate, kept, .. }: &StreamContext,
    ended: &AtomicBool,
    say: &dyn Fn(Said),
) -> io::Result<()> {
    let ended = || ended.load(SeqCst);
    let lost = || io::Error::from(io::ErrorKind::ConnectionAborted);
    let kept_of = |block, page| kept.as_ref().and_then(|kept| kept.of(block, page));
    while let Ok(job) = todo.recv() {
        match job {
            Job::Round(round, again) => {
                let mut mine = Mine::new(&round);
                let mut send =
                    |(block, share): (BlockId, PageRange), pages: &MemorySet, whole, tags: &[u64]| {
                        mine.begin(block, share, whole);
                        let kept = Kept { tagger: sent.tagger(), first: share.start, tags };
                        let mut runs = pages.block(block).runs_within(share);
                        runs.try_for_each(|run| sender.add(block, run, Some((sent, &mut mine)), Some(kept)))
                    };
                // The file may have taken the end of any of these. What is kept is not named again: the
                // stream may have been lost because of that.
                shares(&again).try_for_each(|share| send(share, &again, false, &[]))?;
                let take = || {
                    gate.wait(stream, || round.all_taken() || ended());
                    if ended() { None } else { round.take(stream) }
                };
                while let Some((block, share)) = take() {
                    let tags = kept.as_ref().and_then(|kept| kept.take(block, share.start));
                    let whole = round.is_whole(block, share);
                    send((block, share), &round.set, whole, tags.as_deref().unwrap_or_default())?;
                }
                if ended() {
                    return Err(lost());
                }
                gate.all_taken();
                sender.flush(Some(&round))?;
                sender.conn.write_all(&Frame::RoundEnd(round.number).header())?;
                say(Said::RoundDone(stream, round.number, sender.batch.take_counts()));
            }
            Job::Push(to_push) => {
                let take = || {
                    gate.wait(stream, || to_push.left() == 0 || ended());
                    if ended() { None } else { to_push.take(BATCH_PAGES) }
                };
                while let Some((block, runs)) = take() {
                    for run in runs.into_iter().flat_map(within_shares) {
                        let tags = kept_of(block, run.start);
                        let kept = tags.as_deref().map(|tags| {
                            let first = PageIndex(run.start.0 / SHARE * SHARE);
                            Kept { tagger: sent.tagger(), first, tags }
                        });
                        sender.add(block, run, None, kept)?;
                    }
                    // What waits in a buffer, a guest waits for.
                    sender.flush(None)?;
                }
                if ended() {
                    return Err(lost());
                }
                gate.all_taken();
                say(Said::PushDone(sender.batch.take_counts()));
            }
        }
    }
    Ok(())
}

/// The parts of a run that lie in one share each.
fn within_shares(run: PageRange) -> impl Iterator<Item = PageRange> {
    let mut at = run.start;
    std::iter::from_fn(move || {
        let end = ((at.0 / SHARE + 1) * SHARE).min(run.end().0);
        let part = PageRange::new(at, end - at.0);
        at = part.end();
        (!part.is_empty()).then_some(part)
    })
}

/// Which pages of a round this stream has sent.
///
/// Streams overtake one another, rounds do not: a page may be referred to if its latest version was sent in
/// an earlier round, or earlier by the same stream. What another stream sends in this round may arrive later
/// than the reference.
struct Mine<'a> {
    round: &'a RoundQueue,
    done: HashSet<(BlockId, u64)>,
    current: Option<(BlockId, u64)>,
    /// Whether the current share ends where shares do. If not, its end goes another way, and nothing is known
    /// of when that arrives.
    whole: bool,
    /// Of the current share: everything before this page.
    until: PageIndex,
}

impl<'a> Mine<'a> {
    fn new(round: &'a RoundQueue) -> Self {
        Self { round, done: HashSet::new(), current: None, whole: false, until: PageIndex(0) }
    }

    fn begin(&mut self, block: BlockId, share: PageRange, whole: bool) {
        let before = self.current.replace((block, share.start.0 / SHARE));
        self.done.extend(before.filter(|_| self.whole));
        self.whole = whole;
        self.until = share.start;
    }

    fn may_refer(&self, block: BlockId, page: PageIndex) -> bool {
        let share = (block, page.0 / SHARE);
        !self.round.set.block(block).contains(page)
            || self.done.contains(&share)
            || (self.current == Some(share) && page < self.until)
    }
}

/// Where nobody waits for each page.
struct Bulk {
    compression: Arc<BatchCompressor>,
    gate: Arc<Gate>,
    /// What the target has, and how what it has is tagged.
    sent: Arc<Sent>,
}

/// Fills batches and writes them.
struct PageSender {
    conn: Conn,
    memory: Arc<dyn GuestMemory>,
    pacer: Arc<Pacer>,
    /// None where a guest waits for each page.
    bulk: Option<Bulk>,
    encoder: Encoder,
    block: BlockId,
    batch: Batch,
    head: Vec<u8>,
    /// What reading and refining this batch took so far, and how many bytes of the guest's memory that were.
    refining: Duration,
    read: u64,
    /// What the connection had not carried yet when this batch was begun.
    queued: u64,
}

impl PageSender {
    fn new(conn: Conn, memory: Arc<dyn GuestMemory>, pacer: Arc<Pacer>, bulk: Option<Bulk>) -> Self {
        Self {
            conn,
            memory,
            pacer,
            bulk,
            encoder: Encoder::default(),
            block: BlockId(0),
            batch: Batch::new(MAX_PAYLOAD),
            head: Vec::new(),
            refining: Duration::ZERO,
            read: 0,
            queued: 0,
        }
    }

    /// Adds pages; writes a batch whenever one is full. Refers to what the target has, or keeps, if told what
    /// that is.
    fn add(
        &mut self,
        block: BlockId,
        range: PageRange,
        mut known: Option<(&Sent, &mut Mine<'_>)>,
        kept: Option<Kept<'_>>,
    ) -> io::Result<()> {
        if block != self.block {
            self.flush(known.as_ref().map(|(_, mine)| mine.round))?;
            self.block = block;
        }
        let mut range = range;
        while !range.is_empty() {
            if self.batch.room() == 0 {
                self.flush(known.as_ref().map(|(_, mine)| mine.round))?;
            }
            let piece = PageRange::new(range.start, range.count.min(self.batch.room()));
            range = PageRange::new(piece.end(), range.count - piece.count);
            if self.read == 0 && self.bulk.is_some() {
                self.queued = self.conn.queue()?.unconfirmed;
            }
            let begin = Instant::now();
            let read = |into: &mut [u8]| self.memory.read(block, piece, into);
            match &mut known {
                Some((sent, mine)) => {
                    let round = mine.round.number;
                    let may_refer = |block, page| mine.may_refer(block, page);
                    self.batch.add(block, piece, Some(&References { sent, round, may_refer }), kept, read)?;
                    mine.until = piece.end();
                }
                None => self.batch.add(
                    block,
                    piece,
                    None::<&References<'_, fn(BlockId, PageIndex) -> bool>>,
                    kept,
                    read,
                )?,
            }
            self.refining += begin.elapsed();
            self.read += piece.bytes().0;
        }
        Ok(())
    }

    fn flush(&mut self, round: Option<&RoundQueue>) -> io::Result<()> {
        let begin = Instant::now();
        if let Some(bulk) = &self.bulk {
            self.batch.tag(&bulk.sent);
        }
        if let Some(round) = round {
            round.had_not_changed(self.block, self.batch.unchanged());
        }
        let refining = std::mem::take(&mut self.refining) + begin.elapsed();
        let compressed = self.bulk.as_ref().map(|Bulk { compression, .. }| {
            (compression, compression.pack(self.block, &mut self.batch, &mut self.encoder))
        });
        let (runs, codec, bytes) = self.batch.runs();
        if !runs.is_empty() {
            self.head.clear();
            write_batch(self.block, runs, codec.map(|codec| (codec, bytes)), &mut self.head);
            let mut parts = vec![IoSlice::new(&self.head)];
            parts.extend(self.batch.parts().map(IoSlice::new));
            let wire: usize = parts.iter().map(|p| p.len()).sum();
            match compressed {
                Some((compression, compressed)) => {
                    let before = self.conn.queue()?;
                    let begin = Instant::now();
                    let waited = self.pacer.write(&mut self.conn, &mut parts)?;
                    let write = begin.elapsed();
                    let after = self.conn.queue()?;
                    let link = LinkSample {
                        carried: (self.queued + wire as u64).saturating_sub(after.unconfirmed),
                        waited_before: before.unsent > 0,
                        // A limit that the user set is as good as a slower link.
                        waits_now: after.unsent > 0 || waited,
                    };
                    compression.observe(&compressed.written(refining, write, link));
                }
                None => {
                    self.pacer.charge(wire);
                    self.conn.write_parts(&mut parts)?;
                }
            }
        }
        let read = std::mem::take(&mut self.read);
        if let Some(Bulk { compression, gate, .. }) = &self.bulk
            && let Some(streams) = gate.moved(read)
        {
            compression.spread(streams);
        }
        self.batch.clear();
        Ok(())
    }
}

/// Answers the pages that the target's guest waits for, until the connection ends. They go ahead of
/// everything else because nothing else uses this connection.
pub(crate) fn serve_faults(
    mut conn: Conn,
    memory: Arc<dyn GuestMemory>,
    pacer: Arc<Pacer>,
    shape: &Shape,
    answered: impl Fn(Fault),
) -> io::Result<()> {
    // Neither compressed nor as a reference nor later: the guest waits, and it writes to what could be
    // referred to.
    let mut sender = PageSender::new(conn.another()?, memory, pacer, None);
    loop {
        let mut header = [0; HEADER];
        conn.read_exact(&mut header)?;
        match Frame::parse(&header, shape).map_err(|e| crate::conn::invalid(e.to_string()))? {
            Frame::Want { block, page } => {
                sender.add(block, PageRange::new(page, 1), None, None)?;
                sender.flush(None)?;
                answered(Fault { block, page });
            }
            other => return Err(crate::conn::invalid(format!("{other:?} where only requests are expected"))),
        }
    }
}
