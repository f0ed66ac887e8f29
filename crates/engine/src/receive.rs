//! From the streams to guest memory.

use crate::{
    conn::invalid,
    ports::{Fault, GuestMemory, KeptCopy, MissingPages},
    verify::{Announced, hash},
};
use page::{Class, Codec, PageDecoder, Tagger, TargetMemory, Undecodable};
use proto::{Frame, HEADER, MAX_PAYLOAD, RUN, Shape, Table, control, parse_runs};
use spool::Extent;
use std::{
    collections::HashMap,
    io::{self, Read},
    sync::{
        Arc, Mutex, MutexGuard, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use units::{BlockId, Locked, MemorySet, PAGE_SIZE, PageRange};

/// Up to so many missing pages, each run of them is made a hole without looking whether it is one: looking
/// takes up to 20 ms a GiB, making a hole 5 µs. Measured by the figures of `attach/tests/figures.rs`.
const FEW: u64 = 2048;

/// How pages may be put into memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum WritePolicy {
    /// Nothing runs here: whatever comes is newer than what is there.
    Before,
    /// The guest runs or is about to: only missing pages, and only where holes are (I5).
    PostCopy,
    /// The guest has all its memory: nothing is written any more (I5).
    Closed,
}

/// The memory in which a migration's pages arrive.
pub(crate) struct PageReceiver {
    pub(crate) memory: Arc<dyn GuestMemory>,
    pub(crate) missing_mode: Option<Arc<dyn MissingPages>>,
    pub(crate) shape: Shape,
    /// Verifies what refers to this memory (I7).
    tagger: Option<Tagger>,
    stage: RwLock<WritePolicy>,
    /// Pages that the source still has to send to a guest that may run. A page leaves it only once it is in
    /// memory.
    missing: Mutex<MemorySet>,
    /// What has arrived of the current round, while nothing runs here: it need not be sent again if the link
    /// is lost.
    received: Mutex<MemorySet>,
    pub(crate) announced: Mutex<Option<Announced>>,
    /// The VM's memory as it was when it left this host, as long as it may be named.
    kept: RwLock<Option<Arc<dyn KeptCopy>>>,
    differing: AtomicU64,
    /// Since when somebody waits for a page.
    asked: Mutex<HashMap<Fault, Instant>>,
    waits_us: Mutex<Vec<u64>>,
    all_placed: Box<dyn Fn() + Send + Sync>,
}

impl PageReceiver {
    pub(crate) fn new(
        memory: Arc<dyn GuestMemory>,
        missing_mode: Option<Arc<dyn MissingPages>>,
        verify: bool,
        tagger: Option<Tagger>,
        all_placed: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let shape = Shape(memory.blocks().iter().map(|b| b.pages).collect());
        Self {
            stage: RwLock::new(WritePolicy::Before),
            missing: Mutex::new(MemorySet::empty(shape.0.iter().copied())),
            received: Mutex::new(MemorySet::empty(shape.0.iter().copied())),
            announced: Mutex::new(verify.then(|| Announced::new(&*memory))),
            kept: RwLock::new(None),
            differing: AtomicU64::new(0),
            asked: Mutex::default(),
            waits_us: Mutex::default(),
            all_placed: Box::new(all_placed),
            memory,
            missing_mode,
            shape,
            tagger,
        }
    }

    /// This is what is kept of the VM from before.
    pub(crate) fn keeps(self, kept: Option<Arc<dyn KeptCopy>>) -> Self {
        Self { kept: RwLock::new(kept), ..self }
    }

    /// What is kept of the VM from before, and how it is tagged; none where nothing can be named.
    pub(crate) fn kept(&self) -> Option<(Arc<dyn KeptCopy>, Tagger)> {
        let kept = self.kept.read().expect("no one panics with what is kept").clone();
        kept.zip(self.tagger.clone())
    }

    /// Nothing of it is named any more: its memory is given back.
    pub(crate) fn forget_kept(&self) {
        *self.kept.write().expect("no one panics with what is kept") = None;
    }

    /// These pages have come: what was kept of them only takes memory.
    fn release_kept(&self, block: BlockId, range: PageRange) {
        if let Some(kept) = &*self.kept.read().expect("no one panics with what is kept") {
            kept.release(block, range);
        }
    }

    /// Takes effect when every batch that is just arriving has arrived.
    pub(crate) fn enter(&self, stage: WritePolicy) {
        *self.stage.write().expect("no one panics while arriving") = stage;
    }

    pub(crate) fn missing(&self) -> MutexGuard<'_, MemorySet> {
        self.missing.locked()
    }

    /// Whether only missing pages arrive.
    pub(crate) fn post_copy(&self) -> bool {
        *self.stage.read().expect("no one panics while arriving") == WritePolicy::PostCopy
    }

    pub(crate) fn received(&self) -> MutexGuard<'_, MemorySet> {
        self.received.locked()
    }

    fn asked(&self) -> MutexGuard<'_, HashMap<Fault, Instant>> {
        self.asked.locked()
    }

    /// Makes holes of pages that are missing from now on.
    pub(crate) fn owe(&self, pages: &MemorySet) -> io::Result<()> {
        if self.missing_mode.is_none() {
            return Err(invalid("pages are missing, but post-copy was not agreed"));
        }
        self.enter(WritePolicy::PostCopy);
        for (block, set) in pages.blocks() {
            let mut holes = set.clone();
            if holes.len() > FEW {
                holes.intersect(&self.memory.present(block)?);
            }
            for run in holes.runs() {
                self.memory.discard(block, run)?;
            }
        }
        self.missing().union(pages);
        Ok(())
    }

    /// Nothing is missing: the guest runs on at the source, and pages come as they did before. Where holes
    /// were made, pages arrive like anywhere else, or holes stay and are zeros.
    pub(crate) fn disown(&self) {
        self.missing().clear();
        self.enter(WritePolicy::Before);
    }

    /// What was announced of the source's memory is of a pause that came to nothing.
    pub(crate) fn forget_hashes(&self) {
        let mut announced = self.announced.locked();
        if announced.is_some() {
            *announced = Some(Announced::new(&*self.memory));
        }
    }

    /// These pages are missing since before this agent was started.
    pub(crate) fn go_on(&self, missing: MemorySet) {
        self.enter(WritePolicy::PostCopy);
        *self.missing() = missing;
    }

    /// Writes a batch, run after run: a run may refer to what those before it have brought.
    fn write(
        &self,
        block: BlockId,
        table: &Table,
        codec: Option<Codec>,
        payload: &[u8],
        page_decoder: &mut PageDecoder,
    ) -> io::Result<()> {
        let stage = self.stage.read().expect("no one panics while arriving");
        let (mut rest, compressed) = payload.split_at(table.own);
        page_decoder.begin(codec, compressed, table.raw).map_err(wrong)?;
        for run in &table.runs {
            let (own, after) = rest.split_at(run.payload());
            rest = after;
            let refers = matches!(run.class, Class::Duplicate | Class::Delta);
            if refers && *stage != WritePolicy::Before {
                return Err(invalid("a reference to memory of a guest that may run"));
            }
            let content = page_decoder.decode(block, run, own, self).map_err(|e| self.undecoded(&e))?;
            match (*stage, content) {
                (WritePolicy::Before, Some(content)) => self.memory.write(block, run.range, content)?,
                (WritePolicy::Before, None) => self.memory.discard(block, run.range)?,
                (WritePolicy::PostCopy, content) => self.place(block, run.range, content)?,
                (WritePolicy::Closed, _) => return Err(invalid("pages for a guest that has all its memory")),
            }
            // While the guest runs, a page that it waited for comes twice: the run that names it may follow.
            if *stage == WritePolicy::Before || run.class == Class::Kept {
                self.release_kept(block, run.range);
            }
        }
        if *stage == WritePolicy::Before {
            let mut received = self.received();
            table.runs.iter().for_each(|run| received.block_mut(block).insert_range(run.range));
        }
        Ok(())
    }

    /// What is not kept as it was told ends this stream, and no more than that: opened again, it brings these
    /// pages another way.
    fn undecoded(&self, e: &Undecodable<io::Error>) -> io::Error {
        if matches!(e, Undecodable::NotKept(_)) {
            self.forget_kept();
            return io::Error::new(io::ErrorKind::ConnectionReset, e.to_string());
        }
        wrong(e)
    }

    /// Puts what is missing of a run into memory of a guest that may run, then strikes it off: in this order,
    /// because a fault on a page that is not missing is answered with zeros.
    fn place(&self, block: BlockId, range: PageRange, content: Option<&[u8]>) -> io::Result<()> {
        let missing_mode = self.missing_mode.as_ref().ok_or_else(|| invalid("post-copy was not agreed"))?;
        let missing: Vec<PageRange> = self.missing().block(block).runs_within(range).collect();
        for part in missing {
            let at = (part.start.0 - range.start.0) as usize * PAGE_SIZE;
            let length = part.count as usize * PAGE_SIZE;
            match content {
                Some(content) => {
                    let content = &content[at..at + length];
                    self.compare(block, part, content);
                    missing_mode.place(block, part, content)?;
                }
                None => {
                    self.compare(block, part, &[]);
                    for page in part.pieces(1) {
                        missing_mode.place_zero(Fault { block, page: page.start })?;
                    }
                }
            }
            self.arrived(block, part);
            let mut missing = self.missing();
            missing.block_mut(block).remove_range(part);
            let all = missing.is_empty();
            drop(missing);
            if all {
                (self.all_placed)();
            }
        }
        Ok(())
    }

    /// Puts pages of the file into memory of a guest that does not run here yet, as a batch of its round
    /// would be.
    pub(crate) fn receive_spooled(&self, extent: &Extent, content: &spool::Content) -> io::Result<()> {
        let stage = self.stage.read().expect("no one panics while arriving");
        match (*stage, extent.kind, content) {
            (WritePolicy::Before, spool::ExtentKind::Zero, _) => {
                self.memory.discard(extent.block, extent.pages)
            }
            (WritePolicy::Before, _, spool::Content::Pages(content)) => {
                self.memory.write(extent.block, extent.pages, content)
            }
            _ => Err(invalid("pages of a round after the rounds")),
        }
    }

    /// Puts what is missing of these pages of an extent into memory of a guest that may run.
    pub(crate) fn place_spooled(
        &self,
        extent: &Extent,
        content: &spool::Content,
        pages: PageRange,
    ) -> io::Result<()> {
        let stage = self.stage.read().expect("no one panics while arriving");
        if *stage != WritePolicy::PostCopy {
            return Ok(());
        }
        let at = (pages.start.0 - extent.pages.start.0) as usize * PAGE_SIZE;
        let content = match (extent.kind, content) {
            (spool::ExtentKind::Zero, _) => None,
            (_, spool::Content::Pages(content)) => Some(&content[at..at + pages.bytes().0 as usize]),
            _ => return Err(invalid("an extent without content")),
        };
        self.place(extent.block, pages, content)
    }

    /// Pages that somebody has waited for at least so long.
    pub(crate) fn waiting(&self, time: Duration) -> Vec<Fault> {
        self.asked().iter().filter(|(_, since)| since.elapsed() >= time).map(|(fault, _)| *fault).collect()
    }

    /// Counts pages that are not what was announced. No content means zeros.
    fn compare(&self, block: BlockId, range: PageRange, content: &[u8]) {
        let announced = self.announced.locked();
        let Some(announced) = announced.as_ref() else { return };
        for (i, page) in range.pieces(1).enumerate() {
            let here = content.get(i * PAGE_SIZE..(i + 1) * PAGE_SIZE).map_or(0, hash);
            if announced.of(block, page.start) != Some(here) {
                self.differing.fetch_add(1, Relaxed);
            }
        }
    }

    /// Somebody waits for a page that is missing; says whether it must be asked for.
    pub(crate) fn wants(&self, fault: Fault) -> bool {
        self.asked().insert(fault, Instant::now()).is_none()
    }

    /// All pages that somebody waits for: asked for again on a new connection.
    pub(crate) fn wanted(&self) -> Vec<Fault> {
        self.asked().keys().copied().collect()
    }

    fn arrived(&self, block: BlockId, range: PageRange) {
        let mut asked = self.asked();
        if asked.is_empty() {
            return;
        }
        for page in range.pieces(1) {
            if let Some(since) = asked.remove(&Fault { block, page: page.start }) {
                let waited = since.elapsed().as_micros() as u64;
                self.waits_us.locked().push(waited);
            }
        }
    }

    /// What the guest's waiting came to.
    pub(crate) fn summary(&self) -> control::Settled {
        let mut waits = self.waits_us.locked().clone();
        waits.sort_unstable();
        let at = |percent: usize| waits.get((waits.len() * percent / 100).min(waits.len().saturating_sub(1)));
        control::Settled {
            faults: waits.len() as u64,
            p50_us: at(50).copied().unwrap_or(0),
            p99_us: at(99).copied().unwrap_or(0),
            max_us: waits.last().copied().unwrap_or(0),
            differing: self.differing.load(Relaxed),
            qemu_ended: false,
        }
    }
}

/// Reads frames and writes them until the connection ends. Returns why it ended.
pub(crate) fn receive(
    mut conn: impl Read,
    receiver: &PageReceiver,
    mut round_end: impl FnMut(u32),
) -> io::Error {
    let mut table = Vec::new();
    let mut content = vec![0; MAX_PAYLOAD];
    let mut page_decoder = PageDecoder::new(receiver.tagger.clone(), MAX_PAYLOAD);
    loop {
        let received =
            receive_one(&mut conn, receiver, &mut table, &mut content, &mut page_decoder, &mut round_end);
        if let Err(e) = received {
            return e;
        }
    }
}

fn receive_one(
    conn: &mut impl Read,
    receiver: &PageReceiver,
    table: &mut Vec<u8>,
    content: &mut [u8],
    page_decoder: &mut PageDecoder,
    round_end: &mut impl FnMut(u32),
) -> io::Result<()> {
    let mut header = [0; HEADER];
    // A connection that ends between two frames was closed; one that ends within a frame was lost.
    conn.read_exact(&mut header[..1])?;
    conn.read_exact(&mut header[1..]).map_err(in_a_frame)?;
    match Frame::parse(&header, &receiver.shape).map_err(wrong)? {
        Frame::Batch { block, runs, payload, codec } => {
            table.resize(runs * RUN, 0);
            conn.read_exact(table).map_err(in_a_frame)?;
            let runs = parse_runs(table, block, payload, codec, &receiver.shape).map_err(wrong)?;
            let content = &mut content[..payload];
            conn.read_exact(content).map_err(in_a_frame)?;
            receiver.write(block, &runs, codec, content, page_decoder)
        }
        Frame::RoundEnd(round) => {
            round_end(round);
            Ok(())
        }
        Frame::Want { .. } => Err(invalid("the source asks the target for a page")),
    }
}

impl TargetMemory for PageReceiver {
    type Error = io::Error;

    fn pages(&self, block: BlockId) -> Option<u64> {
        self.shape.pages(block)
    }

    fn read(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        self.memory.read(block, range, into)
    }

    fn read_kept(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> bool {
        let kept = self.kept.read().expect("no one panics with what is kept");
        kept.as_ref().is_some_and(|kept| kept.read(block, range, into).is_ok())
    }
}

fn wrong(e: impl std::fmt::Display) -> io::Error {
    invalid(e.to_string())
}

fn in_a_frame(e: io::Error) -> io::Error {
    match e.kind() {
        // Of a link that was lost, or a source that hung up because of that: it may come back.
        io::ErrorKind::UnexpectedEof => io::Error::new(
            io::ErrorKind::ConnectionReset,
            "the source closed a data connection in the middle of a frame",
        ),
        _ => e,
    }
}
