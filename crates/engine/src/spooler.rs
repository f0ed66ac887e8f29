//! Source: from guest memory to the file on the datastore, from the other end than the streams.

use crate::{ports::GuestMemory, queue::RoundQueue};
use page::{Counts, Sent};
use proto::{SpoolMark, SpoolSaid};
use spool::{Content, MOST_PAGES, Mark, Refused, Writer};
use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};
use units::{BlockId, Locked, MemorySet, PAGE_SIZE, PageRange};

/// A store that has not moved for so long is given up: its pages go over the network. A disk that was asleep
/// is back in this time; a guest waits for a longer round at most by it.
pub(crate) const STALL: Duration = Duration::from_secs(2);

/// Of a round, so much of what the datastore does in a second may be under way: what the network waits for
/// when it is done with its part, and a store that takes 10 ms to make something durable is kept busy.
const AHEAD: f64 = 0.15;

/// … within these bounds: before anything is known of the store, and whatever it can do.
const FIRST_AHEAD: u64 = 8 << 20;
const LEAST_AHEAD: u64 = 1 << 20;
const MOST_AHEAD: u64 = 64 << 20;

/// How often it is looked whether the store or the target has moved on, where neither says so by itself.
const LOOK: Duration = Duration::from_millis(1);

/// Why a job was not done of which nobody wants to hear any more.
const LEFT: &str = "nobody waits for it any more";

/// What the thread is told to do.
pub(crate) enum SpoolJob {
    /// Take shares of this round from its end; the target reads them from the file, into its memory.
    Round(Arc<RoundQueue>, Arc<Sent>),
    /// Put these pages into the file, until they are durable there.
    Secure(MemorySet),
}

/// Hears the thread: the turn that the job was given in, what there is to say of it, and what went by way of
/// the file.
type Say = dyn Fn(u32, SpoolSaid<MemorySet>, Counts) + Send;

/// The thread, and what it is told. Dropping it ends the thread as soon as the store lets it.
pub(crate) struct Spooler {
    pub(crate) writer: Arc<Writer>,
    jobs: Sender<(u32, SpoolJob)>,
    shared: Arc<SpoolerState>,
}

#[derive(Default)]
struct SpoolerState {
    /// Extents that the target has read.
    taken: AtomicU64,
    /// The target can read no further, or nobody wants it to.
    over: AtomicBool,
    /// Pages that are to be durable and are not yet.
    trails: AtomicU64,
    /// Jobs of turns before this one are left as they are. Held while an extent is appended: what follows a
    /// change of turn knows where the file's older part ends.
    turn: Mutex<u32>,
}

impl SpoolerState {
    fn turn(&self) -> MutexGuard<'_, u32> {
        self.turn.locked()
    }
}

impl Spooler {
    pub(crate) fn start(
        writer: Writer,
        memory: Arc<dyn GuestMemory>,
        compress: bool,
        say: impl Fn(u32, SpoolSaid<MemorySet>, Counts) + Send + 'static,
    ) -> io::Result<Self> {
        let (jobs, todo) = channel();
        let (writer, shared) = (Arc::new(writer), Arc::<SpoolerState>::default());
        let worker = Worker {
            writer: writer.clone(),
            shared: shared.clone(),
            memory,
            compress,
            say: Box::new(say),
            turn: 0,
            told: Mark::default(),
            moved: (0, Duration::ZERO),
        };
        thread::Builder::new().name("spool".into()).spawn(move || worker.work(&todo))?;
        writer.keep();
        Ok(Self { writer, jobs, shared })
    }

    pub(crate) fn give(&self, job: SpoolJob) {
        if let SpoolJob::Secure(pages) = &job {
            self.shared.trails.fetch_add(pages.len(), SeqCst);
        }
        // A thread that is gone has said why.
        let turn = *self.shared.turn();
        let _ = self.jobs.send((turn, job));
    }

    /// All jobs so far are left as they are: nothing more of them goes into the file. The turn from now on.
    pub(crate) fn leave(&self, turn: u32) {
        *self.shared.turn() = turn;
    }

    /// Extents that were appended so far.
    pub(crate) fn appended(&self) -> u64 {
        let _nobody_appends = self.shared.turn();
        self.writer.progress().accepted
    }

    /// The target has read so many extents.
    pub(crate) fn taken(&self, extents: u64) {
        self.shared.taken.fetch_max(extents, SeqCst);
    }

    /// The target reads no further.
    pub(crate) fn fail(&self) {
        self.shared.over.store(true, SeqCst);
    }

    /// How much of what is missing is not durable yet.
    pub(crate) fn trails(&self) -> u64 {
        self.shared.trails.load(SeqCst) * PAGE_SIZE as u64
    }
}

impl Drop for Spooler {
    fn drop(&mut self) {
        self.fail();
    }
}

struct Worker {
    writer: Arc<Writer>,
    shared: Arc<SpoolerState>,
    memory: Arc<dyn GuestMemory>,
    compress: bool,
    say: Box<Say>,
    /// Of the current job.
    turn: u32,
    told: Mark,
    /// Bytes that reached the target's memory by way of the file, and in which time.
    moved: (u64, Duration),
}

/// A share of a round that is under way.
struct Flight {
    sequence: u64,
    block: BlockId,
    pages: PageRange,
    bytes: u64,
}

impl Worker {
    fn work(mut self, todo: &Receiver<(u32, SpoolJob)>) {
        while let Ok((turn, job)) = todo.recv() {
            self.turn = turn;
            match job {
                SpoolJob::Round(round, sent) => self.round(&round, &sent),
                SpoolJob::Secure(pages) => {
                    let begun = Instant::now();
                    let said = match self.secure(&pages) {
                        Ok(()) => SpoolSaid::Secured(pages.len(), begun.elapsed()),
                        Err(why) => SpoolSaid::Failed(why),
                    };
                    self.shared.trails.fetch_sub(pages.len(), SeqCst);
                    self.say(said, Counts::default());
                }
            }
        }
    }

    fn say(&self, said: SpoolSaid<MemorySet>, counts: Counts) {
        (self.say)(self.turn, said, counts);
    }

    fn is_left(&self) -> bool {
        *self.shared.turn() != self.turn
    }

    /// Why nothing more comes of the file, if nothing does. `since`: when the target had read something last.
    fn trouble(&self, since: Instant) -> Option<String> {
        let now = self.writer.progress();
        if let Some(failed) = now.failed {
            return Some(failed.to_string());
        }
        if let Some(silent) = now.silent.filter(|silent| *silent > STALL) {
            return Some(format!("the datastore has not answered for {} ms", silent.as_millis()));
        }
        if self.is_left() {
            return Some(LEFT.to_owned());
        }
        if self.shared.over.load(SeqCst) {
            return Some("the target does not read the file any more".to_owned());
        }
        let waited = since.elapsed();
        (waited > STALL).then(|| format!("the target has read nothing of it for {} ms", waited.as_millis()))
    }

    /// Says how far the file is durable, if that has changed.
    fn tell(&mut self, receive_from: Option<u64>) {
        let durable = self.writer.progress().durable;
        if durable > self.told {
            self.told = durable;
            let Mark { extents, bytes } = durable;
            let durable = SpoolMark { extents, bytes };
            self.say(SpoolSaid::Durable(durable, receive_from), Counts::default());
        }
    }

    /// Takes shares from the round's end for as long as the file goes on, and until the target has what was
    /// taken.
    fn round(&mut self, round: &RoundQueue, sent: &Sent) {
        let begun = Instant::now();
        // What is in the file already is none of this round's, or of it before the link was lost.
        let from = self.writer.progress().accepted;
        let (mut flights, mut counts) = (VecDeque::<Flight>::new(), Counts::default());
        let mut moved = Instant::now();
        let mut received = 0;
        let failed = loop {
            self.tell(Some(from));
            let taken = self.shared.taken.load(SeqCst);
            while let Some(flight) = flights.front().filter(|flight| flight.sequence < taken) {
                round.came_by_file(flight.block, flight.pages);
                received += flight.bytes;
                moved = Instant::now();
                flights.pop_front();
            }
            // Only what is durable waits for the target.
            if flights.front().is_none_or(|flight| flight.sequence >= self.told.extents) {
                moved = Instant::now();
            }
            if let Some(why) = self.trouble(moved) {
                break Some(why);
            }
            let under_way: u64 = flights.iter().map(|flight| flight.bytes).sum();
            if under_way < self.ahead()
                && let Some((block, share)) = round.take_last(MOST_PAGES)
            {
                let runs: Vec<PageRange> = round.set.block(block).runs_within(share).collect();
                let added = runs
                    .iter()
                    .try_for_each(|run| self.add(round, sent, block, *run, &mut flights, &mut counts));
                match added {
                    Ok(()) => continue,
                    Err(why) => break Some(why),
                }
            }
            if flights.is_empty() && round.all_taken() {
                break None;
            }
            self.writer.wait(LOOK, |_| false);
        };
        self.moved.0 += received;
        self.moved.1 += begun.elapsed();
        let returned = round.unsure();
        for (block, pages) in returned.blocks() {
            pages.runs().flat_map(|run| run.pieces(1)).for_each(|page| sent.forget(block, page.start));
        }
        self.say(SpoolSaid::RoundOver(returned, failed), counts);
    }

    /// How much may be under way.
    fn ahead(&self) -> u64 {
        let (bytes, time) = self.moved;
        if bytes < FIRST_AHEAD {
            return FIRST_AHEAD;
        }
        let per_s = bytes as f64 / time.as_secs_f64().max(1e-3);
        ((per_s * AHEAD) as u64).clamp(LEAST_AHEAD, MOST_AHEAD)
    }

    /// Puts what has changed of a run of pages into the file.
    fn add(
        &self,
        round: &RoundQueue,
        sent: &Sent,
        block: BlockId,
        run: PageRange,
        flights: &mut VecDeque<Flight>,
        counts: &mut Counts,
    ) -> Result<(), String> {
        let mut content = vec![0; run.bytes().0 as usize];
        self.memory.read(block, run, &mut content).map_err(|e| e.to_string())?;
        // What the target has already, zeros, content.
        let sort = |page: PageRange, content: &[u8]| {
            let unchanged = sent.goes_otherwise(block, page.start, content);
            match (unchanged, page::is_zero(content)) {
                (true, true) => Sort::StillZero,
                (true, false) => Sort::Unchanged,
                (false, true) => Sort::Zero,
                (false, false) => Sort::Raw,
            }
        };
        for (sort, pages, content) in pieces(run, &content, sort) {
            match sort {
                Sort::Zero | Sort::StillZero => counts.zero += pages.count,
                Sort::Unchanged => counts.unchanged += pages.count,
                Sort::Raw => counts.raw += pages.count,
            }
            if matches!(sort, Sort::StillZero | Sort::Unchanged) {
                round.came_by_file(block, pages);
                round.had_not_changed(block, &[pages]);
                continue;
            }
            let content = if sort == Sort::Zero { None } else { Some(content) };
            let sequence = self.append(round.number, block, pages, content)?;
            let bytes = spool::ALIGN + content.map_or(0, |content| content.len() as u64);
            flights.push_back(Flight { sequence, block, pages, bytes });
        }
        Ok(())
    }

    /// Appends as soon as there is room.
    fn append(
        &self,
        round: u32,
        block: BlockId,
        pages: PageRange,
        content: Option<&[u8]>,
    ) -> Result<u64, String> {
        let begun = Instant::now();
        loop {
            let content = content.map_or(Content::Nothing, |content| Content::Pages(content.to_vec()));
            let appended = {
                let turn = self.shared.turn();
                if *turn != self.turn {
                    return Err(LEFT.to_owned());
                }
                self.writer.append(round, block, pages, content, self.compress)
            };
            match appended {
                Ok(sequence) => return Ok(sequence),
                Err(Refused::Failed(why)) => return Err(why.to_string()),
                Err(Refused::Busy) => {
                    let waiting = self.writer.progress().waiting;
                    self.writer.wait(STALL, |now| now.waiting < waiting);
                    // Only the store counts here: the target reads what is durable.
                    if let Some(why) = self.trouble(Instant::now()) {
                        return Err(why);
                    }
                    if begun.elapsed() > STALL * 2 {
                        return Err("the datastore hardly moves".to_owned());
                    }
                }
            }
        }
    }

    /// Puts pages into the file, the last ones first, and waits until they are durable.
    fn secure(&mut self, pages: &MemorySet) -> Result<(), String> {
        let mut left = pages.len();
        let blocks: Vec<_> = pages.blocks().collect();
        for (block, set) in blocks.into_iter().rev() {
            let runs: Vec<PageRange> = set.runs().flat_map(|run| run.pieces(MOST_PAGES)).collect();
            for run in runs.into_iter().rev() {
                let mut content = vec![0; run.bytes().0 as usize];
                self.memory.read(block, run, &mut content).map_err(|e| e.to_string())?;
                let sort = |_, content: &[u8]| if page::is_zero(content) { Sort::Zero } else { Sort::Raw };
                for (sort, pages, content) in pieces(run, &content, sort) {
                    let content = (sort == Sort::Raw).then_some(content);
                    self.append(0, block, pages, content)?;
                    self.tell(None);
                }
                left -= run.count;
            }
        }
        debug_assert_eq!(left, 0, "every page was appended");
        let accepted = self.writer.progress().accepted;
        loop {
            let now = self.writer.wait(LOOK * 50, |now| now.durable.extents >= accepted);
            self.tell(None);
            if now.durable.extents >= accepted {
                return Ok(());
            }
            if let Some(why) = self.trouble(Instant::now()) {
                return Err(why);
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Sort {
    StillZero,
    Unchanged,
    Zero,
    Raw,
}

/// Cuts a run of pages into the longest pieces of one sort.
fn pieces(
    run: PageRange,
    content: &[u8],
    sort: impl Fn(PageRange, &[u8]) -> Sort,
) -> Vec<(Sort, PageRange, &[u8])> {
    let mut pieces: Vec<(Sort, PageRange, &[u8])> = Vec::new();
    let mut begin = 0;
    for (i, page) in run.pieces(1).enumerate() {
        let at = i * PAGE_SIZE;
        let this = sort(page, &content[at..at + PAGE_SIZE]);
        match pieces.last_mut().filter(|(sort, ..)| *sort == this) {
            Some((_, pages, piece)) => {
                pages.count += 1;
                *piece = &content[begin..at + PAGE_SIZE];
            }
            None => {
                begin = at;
                pieces.push((this, page, &content[at..at + PAGE_SIZE]));
            }
        }
    }
    pieces
}
