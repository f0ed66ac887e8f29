//! Target: from the file on the datastore to guest memory.
//!
//! One thread follows the file as far as the source says that it is durable. Before the commit it receives
//! what is to be received, and remembers where the rest is. Once the guest may run it puts what is missing
//! into its memory: what somebody waits for first, then from the end downwards, while the network brings the
//! rest from the other end.

use crate::{ports::SpoolRecord, receive::PageReceiver};
use proto::{Follow, Put, TargetSpool};
use spool::{Extent, FileName, Index, Reader, Secret, Side, SpoolError, Writer};
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};
use units::{BlockId, Locked, MemorySet, MigrationId, PageIndex, PageRange};

/// A guest that has waited for a page for so long gets it from the file, if that is quicker than the network:
/// on a network that works an answer takes less.
const WAITED: Duration = Duration::from_millis(5);

/// How often the source is told what need not be sent any more.
const TELL: Duration = Duration::from_millis(100);

/// How often it is looked for somebody who waits, while there is nothing else to do.
const LOOK: Duration = Duration::from_millis(5);

/// How often a target that lacks pages looks for more in the file than the source has told of: it may have
/// been lost before it could.
const EXPLORE: Duration = Duration::from_millis(500);

/// How often this side records what it has: each time is an `fsync` on the datastore.
const RECORD: Duration = Duration::from_secs(1);

/// Pages of which the file's share is looked up at once.
const PIECE: u64 = 128;

/// What the thread is told.
enum Word {
    /// The source has written so far.
    Durable(Follow),
    /// It has said what the file is good for: of these pages, only later versions.
    Manifest(MemorySet),
    /// The guest runs: what it lacks is put into its memory.
    Place,
}

/// What it has to say.
#[derive(Debug)]
pub(crate) enum Unspooled {
    /// So many extents are read.
    Taken(u64),
    /// No more can be.
    Failed(String),
    /// Pages were placed: the source need not send them any more.
    Placed,
}

/// The thread, as the driver sees it. Dropping it ends the thread.
pub(crate) struct Unspool {
    words: Sender<Word>,
    core: Arc<Mutex<TargetSpool>>,
    over: Arc<AtomicBool>,
    own: Option<Arc<Writer>>,
    files: Files,
}

/// Where the two sides' files are.
#[derive(Clone)]
pub(crate) struct Files {
    pub(crate) source: PathBuf,
    pub(crate) target: PathBuf,
}

impl Files {
    pub(crate) fn of(directory: &Path, migration: MigrationId) -> Self {
        let at = |side| directory.join(FileName { migration, side }.to_string());
        Self { source: at(Side::Source), target: at(Side::Target) }
    }
}

impl Unspool {
    /// Follows a file from its beginning. `own`: where this side records what it has.
    pub(crate) fn start(
        reader: Reader,
        files: Files,
        own: Option<Writer>,
        receiver: Arc<PageReceiver>,
        say: impl Fn(Unspooled) + Send + 'static,
    ) -> std::io::Result<Self> {
        Self::spawn(TargetSpool::default(), files, own, receiver, say, move |worker, todo| {
            worker.at = reader.begin();
            worker.reader = Some(reader);
            worker.work(todo);
        })
    }

    /// Takes a file up again after a restart.
    pub(crate) fn resume(
        files: Files,
        record: SpoolRecord,
        receiver: Arc<PageReceiver>,
        say: impl Fn(Unspooled) + Send + 'static,
    ) -> std::io::Result<Self> {
        let at = files.source.clone();
        let core = TargetSpool::resumed(record.floor, record.end);
        Self::spawn(core, files, None, receiver, say, move |worker, todo| {
            let mut told = false;
            while let Err(e) = worker.reopen(&at, &record) {
                if !std::mem::replace(&mut told, true) {
                    (worker.say)(Unspooled::Failed(e.to_string()));
                }
                // A datastore that is back later may have what nobody else has any more.
                thread::sleep(EXPLORE);
                if worker.over.load(SeqCst) {
                    return;
                }
            }
            worker.work(todo);
        })
    }

    fn spawn(
        core: TargetSpool,
        files: Files,
        own: Option<Writer>,
        receiver: Arc<PageReceiver>,
        say: impl Fn(Unspooled) + Send + 'static,
        run: impl FnOnce(&mut Worker, &Receiver<Word>) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (words, todo) = channel();
        let own = own.map(Arc::new);
        let (core, over) = (Arc::new(Mutex::new(core)), Arc::<AtomicBool>::default());
        let shape: Vec<u64> = receiver.shape.0.clone();
        let mut worker = Worker {
            receiver,
            reader: None,
            at: 0,
            durable: 0,
            index: Index::default(),
            outdated: MemorySet::empty(shape.iter().copied()),
            core: core.clone(),
            over: over.clone(),
            own: own.clone(),
            say: Box::new(say),
            pending: vec![],
            grown: true,
            unrecorded: MemorySet::empty(shape),
            recorded: Instant::now(),
            explored: Instant::now(),
            told: None,
        };
        thread::Builder::new().name("unspool".into()).spawn(move || run(&mut worker, &todo))?;
        own.iter().for_each(|own| own.keep());
        Ok(Self { words, core, over, own, files })
    }

    /// What decides. Nothing of the file arrives in memory while it is locked; that does not wait for the
    /// datastore.
    pub(crate) fn core(&self) -> MutexGuard<'_, TargetSpool> {
        self.core.locked()
    }

    /// The source has written so far; and has said what the file is good for.
    pub(crate) fn follow(&self, to: Follow, outdated: Option<MemorySet>) {
        let _ = self.words.send(Word::Durable(to));
        if let Some(outdated) = outdated {
            let _ = self.words.send(Word::Manifest(outdated));
        }
    }

    /// The guest runs.
    pub(crate) fn place(&self) {
        self.core().place();
        let _ = self.words.send(Word::Place);
    }

    /// The guest has everything and that is recorded: nobody needs the files any more.
    pub(crate) fn settled(&self) {
        self.over.store(true, SeqCst);
        if let Some(own) = &self.own {
            // A source that cannot hear us finds it there, for as long as it stays.
            let _ = own.complete();
        }
    }

    /// Removes these files, on a thread that may have to wait for the datastore.
    pub(crate) fn remove(&self, ours: bool, theirs: bool) {
        let (own, files) = (self.own.clone(), self.files.clone());
        let _ = thread::Builder::new().name("spool-end".into()).spawn(move || {
            match own {
                Some(own) if ours => {
                    own.remove(Duration::ZERO);
                }
                // Of an agent before this one.
                None if ours => drop(std::fs::remove_file(files.target)),
                _ => {}
            }
            if theirs {
                // Whoever made it removes it too, if it is still there.
                let _ = std::fs::remove_file(files.source);
            }
        });
    }
}

impl Drop for Unspool {
    fn drop(&mut self) {
        self.over.store(true, SeqCst);
    }
}

struct Worker {
    receiver: Arc<PageReceiver>,
    reader: Option<Reader>,
    /// Up to where the file was read.
    at: u64,
    /// Up to where it is durable, by the source's word.
    durable: u64,
    index: Index,
    /// Missing pages of which only later versions count.
    outdated: MemorySet,
    core: Arc<Mutex<TargetSpool>>,
    over: Arc<AtomicBool>,
    own: Option<Arc<Writer>>,
    say: Box<dyn Fn(Unspooled) + Send>,
    /// Missing pages that the file may have, in ascending order.
    pending: Vec<(BlockId, PageRange)>,
    /// Whether the file has more than when these were looked up.
    grown: bool,
    /// What is in memory and not yet recorded in this side's file, and when that was done last.
    unrecorded: MemorySet,
    recorded: Instant,
    explored: Instant,
    /// When the source was told what is placed; none: nothing was placed since.
    told: Option<Instant>,
}

impl Worker {
    fn work(&mut self, todo: &Receiver<Word>) {
        let mut idle = false;
        while !self.over.load(SeqCst) {
            let places = self.core.locked().places();
            let word = match (places && !idle, places) {
                (true, _) => todo.try_recv().ok(),
                (false, true) => match todo.recv_timeout(LOOK) {
                    Ok(word) => Some(word),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => return,
                },
                (false, false) => match todo.recv() {
                    Ok(word) => Some(word),
                    Err(_) => return,
                },
            };
            if let Some(word) = word {
                self.hear(word);
                idle = false;
            }
            if self.core.locked().places() {
                idle = !self.place_some();
            }
            if self.told.is_some_and(|at| idle || at.elapsed() >= TELL) {
                self.told = None;
                (self.say)(Unspooled::Placed);
            }
            if self.recorded.elapsed() >= RECORD {
                self.record();
            }
            if idle && self.explored.elapsed() >= EXPLORE {
                self.explore();
            }
        }
    }

    /// Looks through the file as it was left.
    fn reopen(&mut self, at: &Path, record: &SpoolRecord) -> Result<(), SpoolError> {
        let reader = Reader::open(at, &Secret(record.secret))?;
        self.index = reader.scan()?;
        self.at = self.index.end();
        self.reader = Some(reader);
        self.outdated = record.outdated.clone();
        self.look_again(self.index.extents().last().map_or(0, |last| last.sequence + 1));
        Ok(())
    }

    /// So many extents are read, and the index has more now.
    fn look_again(&self, read: u64) {
        let mut core = self.core.locked();
        core.has_read(read);
        if let Some((floor, end)) = core.manifest() {
            core.trust(self.index.whole_from(floor, end));
        }
    }

    /// Takes in what is in the file beyond what was read: what the source did not come to tell of, and what
    /// could not be read before. It is as good: sealed, and written after the guest was stopped, or before it
    /// with a place among the others.
    fn explore(&mut self) {
        self.explored = Instant::now();
        self.grown |= self.core.locked().try_again();
        let Some(reader) = &mut self.reader else { return };
        if reader.refresh().is_err() {
            return;
        }
        let (before, mut read) = (self.at, self.core.locked().next());
        while let Ok(piece) = reader.next(self.at)
            && piece.extent.sequence == read
        {
            self.index.insert(piece.extent);
            (self.at, read) = (piece.extent.end(), read + 1);
        }
        // What is damaged must not hide what is behind it: all of the file is looked through, as after a
        // restart.
        if self.at < self.durable
            && let Ok(index) = reader.scan()
            && index.end() > self.at
        {
            self.at = index.end();
            read = index.extents().last().map_or(0, |last| last.sequence + 1);
            self.index = index;
        }
        if self.at > before {
            self.grown = true;
            self.look_again(read);
        }
    }

    /// Records what this side has. A store that is busy records less: what is in memory is known without it.
    fn record(&mut self) {
        self.recorded = Instant::now();
        let Some(own) = &self.own else { return };
        for (block, pages) in self.unrecorded.blocks() {
            let _ = pages.runs().try_for_each(|run| own.here(block, run));
        }
        self.unrecorded.clear();
    }

    fn hear(&mut self, word: Word) {
        self.grown = true;
        match word {
            Word::Durable(to) => {
                let followed = self.follow(&to);
                (self.say)(match followed {
                    Ok(()) => Unspooled::Taken(self.core.locked().next()),
                    // The source, if it can, does without from here on; if it is too late for that, the rest
                    // is looked for again.
                    Err(e) => Unspooled::Failed(e),
                });
            }
            Word::Manifest(outdated) => {
                self.outdated = outdated;
                let read = self.core.locked().next();
                self.look_again(read);
            }
            Word::Place => {}
        }
    }

    /// Reads what the source has written since.
    fn follow(&mut self, to: &Follow) -> Result<(), String> {
        let text = |e: SpoolError| e.to_string();
        self.durable = self.durable.max(to.bytes);
        if to.bytes <= self.at {
            return Ok(());
        }
        let reader = self.reader.as_mut().ok_or("nothing is read of it any more")?;
        reader.refresh().map_err(text)?;
        while self.at < to.bytes && !self.over.load(SeqCst) {
            let piece = reader.next(self.at).map_err(text)?;
            let mut core = self.core.locked();
            match core.put(piece.extent.sequence, to)? {
                Put::Receive => {
                    self.receiver.receive_spooled(&piece.extent, &piece.content).map_err(|e| e.to_string())?
                }
                Put::Keep => self.index.insert(piece.extent),
                Put::Pass => {}
            }
            core.has_read(piece.extent.sequence + 1);
            self.at = piece.extent.end();
        }
        let (read, extents) = (self.core.locked().next(), to.extents);
        if read != extents && !self.over.load(SeqCst) {
            return Err(format!("it has {read} extents where the source wrote {extents}"));
        }
        Ok(())
    }

    /// Places what somebody waits for, and one piece of the rest. Says whether there was anything to place.
    fn place_some(&mut self) -> bool {
        for fault in self.receiver.waiting(WAITED) {
            let page = PageRange::new(fault.page, 1);
            self.place(fault.block, page);
        }
        if self.pending.is_empty() && std::mem::take(&mut self.grown) {
            let found = {
                let missing = self.receiver.missing();
                let runs = missing.blocks().flat_map(|(block, pages)| {
                    pages.runs().flat_map(|run| run.pieces(PIECE)).map(move |run| (block, run))
                });
                runs.collect::<Vec<_>>()
            };
            self.pending = found.into_iter().filter(|(block, run)| self.has_any(*block, *run)).collect();
        }
        let Some((block, run)) = self.pending.pop() else { return false };
        let missing: Vec<PageRange> = self.receiver.missing().block(block).runs_within(run).collect();
        missing.into_iter().for_each(|run| self.place(block, run));
        true
    }

    /// Where the version of a page is that the guest had when it was stopped; none if the file does not have
    /// it for certain.
    fn current(&self, block: BlockId, page: PageRange) -> Option<Extent> {
        let newest = self.index.newest(block, page.start)?;
        let outdated = self.outdated.block(block).contains(page.start);
        self.core.locked().is_current(newest.sequence, outdated).then_some(*newest)
    }

    fn has_any(&self, block: BlockId, run: PageRange) -> bool {
        run.pieces(1).any(|page| self.current(block, page).is_some())
    }

    /// Places what the file has of a run.
    fn place(&mut self, block: BlockId, run: PageRange) {
        let mut at = run.start.0;
        while at < run.end().0 {
            let page = |at| PageRange::new(PageIndex(at), 1);
            let Some(extent) = self.current(block, page(at)) else {
                at += 1;
                continue;
            };
            // As many as the same extent has.
            let same =
                |next: &u64| self.current(block, page(*next)).is_some_and(|e| e.sequence == extent.sequence);
            let count = 1 + (at + 1..run.end().0).take_while(same).count() as u64;
            self.place_extent(&extent, PageRange::new(PageIndex(at), count));
            at += count;
        }
    }

    /// Places these pages of an extent.
    fn place_extent(&mut self, extent: &Extent, pages: PageRange) {
        let Some(reader) = &self.reader else { return };
        let content = match reader.content(extent) {
            Ok(content) => content,
            Err(e) => {
                tracing::warn!(%e, "a part of the spool cannot be read");
                self.core.locked().unread(extent.sequence);
                return;
            }
        };
        match self.receiver.place_spooled(extent, &content, pages) {
            Ok(()) => {
                self.told.get_or_insert_with(Instant::now);
                self.unrecorded.block_mut(extent.block).insert_range(pages);
            }
            Err(e) => tracing::error!(%e, "pages of the spool could not be placed"),
        }
    }
}
