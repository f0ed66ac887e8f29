use crate::{
    ALIGN, Content, Extent, ExtentKind, FileName, Header, Key, MOST_PAGES, MOST_ZEROS, Secret, SpoolError,
};
use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};
use sys::apart::{File, How};
use units::{BlockId, Locked, PageRange};

/// Content that waits to be written, at most: 8 MiB. What of it is lost with a store that stalls goes over
/// the network again; less, and a store that takes 10 ms for each `fsync` is not kept busy.
const ROOM: u64 = 8 << 20;

/// Written at once, at most, and what becomes durable at once, at most: how soon the other side may read what
/// was written. With 2 and 16 MiB both sides are busy on a store of 100 MB/s as on one of 2 GB/s.
const WRITE: usize = 2 << 20;
const SYNC: u64 = 16 << 20;

/// … and how soon, for the sake of whoever waits at the other end: an `fsync` takes up to 10 ms on most
/// stores.
const TURN: Duration = Duration::from_millis(50);

/// A position in a file: everything that was appended before it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub struct Mark {
    /// Extents before it.
    pub extents: u64,
    /// Bytes of the file before it.
    pub bytes: u64,
}

/// How far a writer is.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Extents that were accepted.
    pub accepted: u64,
    /// Up to here, everything is on the store whatever crashes now.
    pub durable: Mark,
    /// Bytes of content that wait or are being written.
    pub waiting: u64,
    /// How long the store has not answered; none when nothing is asked of it.
    pub silent: Option<Duration>,
    /// Nothing more will become durable, for this reason.
    pub failed: Option<SpoolError>,
}

/// Why an extent was not accepted.
#[derive(Clone, Debug)]
pub enum Refused {
    /// Too much waits already: try again when the store has moved on.
    Busy,
    /// The file has failed for good.
    Failed(SpoolError),
}

/// Writes one file, on a thread of its own: whoever has a writer never waits for the store longer than
/// wanted. A thread that hangs in the kernel is left behind when the writer is dropped; it ends when the
/// kernel lets it. A file that nobody has kept ([`Writer::keep`]) goes with its writer.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<WriterState>,
    path: PathBuf,
}

#[derive(Debug, Default)]
struct WriterState {
    state: Mutex<State>,
    /// For the thread: something to do.
    work: Condvar,
    /// For the others: it went on.
    moved: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Item>,
    next: u64,
    waiting: u64,
    made: bool,
    durable: Mark,
    /// Since when the store is asked for something that it has not answered.
    asked: Option<Instant>,
    failed: Option<SpoolError>,
    /// What was durable when this was wished may be given back to the store.
    release: bool,
    kept: bool,
    remove: bool,
    over: bool,
    ended: bool,
}

#[derive(Debug)]
struct Item {
    sequence: u64,
    round: u32,
    kind: ExtentKind,
    block: BlockId,
    pages: PageRange,
    content: Vec<u8>,
    compress: bool,
}

impl WriterState {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.locked()
    }
}

impl Writer {
    /// Makes the file of this header in `directory`; fails when that takes longer than `patience`.
    pub fn create(
        directory: &Path,
        header: &Header,
        secret: &Secret,
        patience: Duration,
    ) -> Result<Self, SpoolError> {
        let name = FileName { migration: header.migration, side: header.side };
        let path = directory.join(name.to_string());
        let unusable = |why: &str| SpoolError::Unusable { path: path.clone(), why: why.to_owned() };
        let begin = header.to_bytes().ok_or_else(|| unusable("its header would be beyond all bounds"))?;
        let key = Header::key(&begin, secret);
        let shared = Arc::new(WriterState::default());
        shared.lock().asked = Some(Instant::now());
        let writer = Self { shared: shared.clone(), path: path.clone() };
        let directory = directory.to_owned();
        let thread = thread::Builder::new().name("spool-write".into());
        let at = path.clone();
        thread
            .spawn(move || work(&shared, &directory, &at, &begin, &key))
            .map_err(|e| SpoolError::io("start a thread for", &path, e))?;
        let end = Instant::now() + patience;
        let mut state = writer.shared.lock();
        loop {
            if let Some(failed) = &state.failed {
                return Err(failed.clone());
            }
            if state.made {
                drop(state);
                return Ok(writer);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // Should the store make it after all, it goes with the writer.
                let waited_ms = patience.as_millis() as u64;
                return Err(SpoolError::Stalled { what: "make", path, waited_ms });
            }
            state = writer.shared.moved.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// From now on somebody answers for the file: it stays until it is removed, whatever becomes of the
    /// writer.
    pub fn keep(&self) {
        self.shared.lock().kept = true;
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes pages; returns their sequence number without waiting for the store. `compress`: compress them,
    /// where that makes them less.
    pub fn append(
        &self,
        round: u32,
        block: BlockId,
        pages: PageRange,
        content: Content,
        compress: bool,
    ) -> Result<u64, Refused> {
        let (kind, content) = match content {
            Content::Nothing => (ExtentKind::Zero, vec![]),
            Content::Pages(content) => (ExtentKind::Raw, content),
        };
        let most = if kind == ExtentKind::Zero { MOST_ZEROS } else { MOST_PAGES };
        assert!((1..=most).contains(&pages.count), "{pages} in one extent");
        assert!(kind == ExtentKind::Zero || content.len() as u64 == pages.bytes().0, "content of {pages}");
        self.put(round, kind, block, pages, content, compress)
    }

    /// Takes the word that these pages are in the target's memory.
    pub fn here(&self, block: BlockId, pages: PageRange) -> Result<(), Refused> {
        pages
            .pieces(MOST_ZEROS)
            .try_for_each(|piece| self.put(0, ExtentKind::Here, block, piece, vec![], false).map(drop))
    }

    /// Takes the word that the target has everything.
    pub fn complete(&self) -> Result<(), Refused> {
        let none = PageRange::new(units::PageIndex(0), 0);
        self.put(0, ExtentKind::Complete, BlockId(0), none, vec![], false).map(drop)
    }

    fn put(
        &self,
        round: u32,
        kind: ExtentKind,
        block: BlockId,
        pages: PageRange,
        content: Vec<u8>,
        compress: bool,
    ) -> Result<u64, Refused> {
        let mut state = self.shared.lock();
        if let Some(failed) = &state.failed {
            return Err(Refused::Failed(failed.clone()));
        }
        let cost = content.len() as u64 + ALIGN;
        if state.waiting + cost > ROOM {
            return Err(Refused::Busy);
        }
        let sequence = state.next;
        state.next += 1;
        state.waiting += cost;
        state.asked.get_or_insert_with(Instant::now);
        state.queue.push_back(Item { sequence, round, kind, block, pages, content, compress });
        drop(state);
        self.shared.work.notify_one();
        Ok(sequence)
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        progress(&self.shared.lock())
    }

    /// Waits until `enough` says so, it has failed, or this much time has passed; says how far it is then.
    pub fn wait(&self, time: Duration, enough: impl Fn(&Progress) -> bool) -> Progress {
        let end = Instant::now() + time;
        let mut state = self.shared.lock();
        loop {
            let now = progress(&state);
            let left = end.saturating_duration_since(Instant::now());
            if now.failed.is_some() || left.is_zero() || enough(&now) {
                return now;
            }
            state = self.shared.moved.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until all that was accepted is durable: it returns `Ok` only then. After it has failed once, for
    /// ever.
    pub fn sync(&self, patience: Duration) -> Result<Mark, SpoolError> {
        let accepted = self.progress().accepted;
        let now = self.wait(patience, |now| now.durable.extents >= accepted);
        match now.failed {
            Some(failed) => Err(failed),
            None if now.durable.extents >= accepted => Ok(now.durable),
            None => {
                let waited_ms = patience.as_millis() as u64;
                Err(SpoolError::Stalled { what: "secure", path: self.path.clone(), waited_ms })
            }
        }
    }

    /// Nobody needs what is durable now any more: its room is given back, where the store can do that. What
    /// is written later stays.
    pub fn release(&self) {
        self.shared.lock().release = true;
        self.shared.work.notify_one();
    }

    /// The file has failed for whoever writes it: what still waits is not written.
    pub fn give_up(&self, why: SpoolError) {
        let mut state = self.shared.lock();
        fail(&mut state, why);
        drop(state);
        self.shared.moved.notify_all();
    }

    /// Removes the file. Says whether that was done within this time; if not, it happens when the store
    /// answers.
    pub fn remove(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let mut state = self.shared.lock();
        (state.remove, state.over) = (true, true);
        self.shared.work.notify_one();
        while !state.ended {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.shared.moved.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.over = true;
        state.remove |= !state.kept;
        drop(state);
        self.shared.work.notify_one();
    }
}

fn progress(state: &State) -> Progress {
    Progress {
        accepted: state.next,
        durable: state.durable,
        waiting: state.waiting,
        silent: state.asked.map(|since| since.elapsed()),
        failed: state.failed.clone(),
    }
}

fn fail(state: &mut State, why: SpoolError) {
    // The first reason is the one that tells what happened.
    state.failed.get_or_insert(why);
    state.queue.clear();
    state.waiting = 0;
    state.asked = None;
}

fn work(shared: &WriterState, directory: &Path, path: &Path, begin: &[u8], key: &Key) {
    let mut made = false;
    let written = make(path, begin).and_then(|file| {
        made = true;
        {
            let mut state = shared.lock();
            state.made = true;
            state.durable.bytes = begin.len() as u64;
            state.asked = None;
            shared.moved.notify_all();
        }
        write_all(shared, directory, path, &file, begin.len() as u64, key)
    });
    let mut state = shared.lock();
    if let Err(why) = written {
        fail(&mut state, why);
        shared.moved.notify_all();
        // Whoever wants it removed says so when it is dropped.
        while !state.over && !state.remove {
            state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
    let remove = made && state.remove;
    drop(state);
    if remove
        && let Err(e) = std::fs::remove_file(path)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %e, "a spool file could not be removed");
    }
    shared.lock().ended = true;
    shared.moved.notify_all();
}

/// Makes the file, which nobody else may have made: its name is the migration's.
fn make(path: &Path, begin: &[u8]) -> Result<File, SpoolError> {
    let file = File::open(path, How::New).map_err(|e| SpoolError::io("make", path, e))?;
    // The other host may look at it as soon as it is made.
    if let Err(e) = file.write_all_at(begin.to_vec(), 0).and_then(|_| file.sync_data()) {
        // Without its header nobody could tell later whose it is.
        let _ = std::fs::remove_file(path);
        return Err(SpoolError::io("write to", path, e));
    }
    Ok(file)
}

fn write_all(
    shared: &WriterState,
    directory: &Path,
    path: &Path,
    file: &File,
    begin: u64,
    key: &Key,
) -> Result<(), SpoolError> {
    let mut written = Mark { extents: 0, bytes: begin };
    let (mut released, mut found_by_name, mut secured) = (begin, false, Instant::now());
    let mut buffer = Vec::with_capacity(WRITE);
    loop {
        let (items, release) = {
            let mut state = shared.lock();
            loop {
                if state.remove
                    || (state.over && state.queue.is_empty() && state.durable.extents == state.next)
                {
                    return Ok(());
                }
                // Given up from outside: what is on its way is of no use to anybody.
                if let Some(failed) = &state.failed {
                    return Err(failed.clone());
                }
                if !state.queue.is_empty() || state.durable.extents < written.extents || state.release {
                    break;
                }
                state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let mut bytes = 0;
            let mut items = Vec::new();
            while bytes < WRITE
                && let Some(item) = state.queue.pop_front()
            {
                bytes += item.content.len() + ALIGN as usize;
                items.push(item);
            }
            (items, std::mem::take(&mut state.release))
        };
        let durable = shared.lock().durable;
        if release && durable.bytes > released {
            // A store that cannot do that keeps the room until the file goes.
            if file.punch(released, durable.bytes - released).is_ok() {
                released = durable.bytes;
            }
        }
        let idle = items.is_empty();
        if !idle {
            buffer.clear();
            let at = written.bytes;
            for item in &items {
                encode(item, at, &mut buffer, key);
            }
            written.extents += items.len() as u64;
            written.bytes += buffer.len() as u64;
            let full = std::mem::take(&mut buffer);
            buffer = file.write_all_at(full, at).map_err(|e| SpoolError::io("write to", path, e))?;
        }
        // While one is on its way to the store, others gather: whoever waits for one waits for all.
        let more = !shared.lock().queue.is_empty();
        let due = written.bytes - durable.bytes >= SYNC || secured.elapsed() >= TURN;
        if written.extents > durable.extents && (!more || due) {
            secure(file, directory, path, &mut found_by_name)?;
            secured = Instant::now();
            let mut state = shared.lock();
            // Given up meanwhile: then it is not called durable.
            if state.failed.is_none() {
                state.durable = written;
            }
            went_on(&mut state, items.iter());
        } else if !idle {
            went_on(&mut shared.lock(), items.iter());
        }
        shared.moved.notify_all();
    }
}

/// The store has taken these.
fn went_on<'a>(state: &mut State, items: impl Iterator<Item = &'a Item>) {
    let cost: u64 = items.map(|item| item.content.len() as u64 + ALIGN).sum();
    state.waiting = state.waiting.saturating_sub(cost);
    state.asked = (state.durable.extents < state.next).then(Instant::now);
}

/// Puts one extent behind the others in the buffer, which begins at byte `at` of the file.
fn encode(item: &Item, at: u64, buffer: &mut Vec<u8>, key: &Key) {
    let compressed = (item.compress && item.kind == ExtentKind::Raw).then(|| page::compress(&item.content));
    let (kind, stored) = match &compressed {
        Some(compressed) if compressed.len() < item.content.len() => (ExtentKind::Lz4, compressed),
        _ => (item.kind, &item.content),
    };
    let extent = Extent {
        sequence: item.sequence,
        round: item.round,
        kind,
        block: item.block,
        pages: item.pages,
        offset: at + buffer.len() as u64,
        length: stored.len() as u32,
        tag: Extent::tag(stored, key),
    };
    buffer.extend_from_slice(&extent.to_bytes(key));
    buffer.extend_from_slice(stored);
    buffer.resize(buffer.len().next_multiple_of(ALIGN as usize), 0);
}

/// Everything written so far survives a crash when this returns, and is found under the file's name.
fn secure(file: &File, directory: &Path, path: &Path, found_by_name: &mut bool) -> Result<(), SpoolError> {
    file.sync_data().map_err(|e| SpoolError::io("secure", path, e))?;
    if !*found_by_name {
        file.sync_directory(directory).map_err(|e| SpoolError::io("secure", directory, e))?;
        *found_by_name = true;
    }
    // A file without its name is durable and lost all the same.
    match file.is_at(path) {
        Ok(true) => Ok(()),
        Ok(false) => Err(SpoolError::Vanished { path: path.to_owned() }),
        Err(e) => Err(SpoolError::io("look at", path, e)),
    }
}
