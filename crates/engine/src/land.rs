//! From the streams to guest memory.

use crate::{
    conn::invalid,
    ports::{Fault, GuestMemory, MissingPages},
    verify::{Announced, hash},
};
use page::{Class, Codec, Landed, Restorer, Sealer};
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

/// Up to so many owed pages, each run of them is made a hole without looking whether it is one: looking takes
/// up to 20 ms a GiB, making a hole 5 µs. Measured by the figures of `attach/tests/figures.rs`.
const FEW: u64 = 2048;

/// How pages may be put into memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stage {
    /// Nothing runs here: whatever comes is newer than what is there.
    Before,
    /// The guest runs or is about to: only owed pages, and only where holes are (I5).
    Lacking,
    /// The guest has all its memory: nothing is written any more (I5).
    Closed,
}

/// The memory in which a migration's pages land.
pub(crate) struct Landing {
    pub(crate) memory: Arc<dyn GuestMemory>,
    pub(crate) missing: Option<Arc<dyn MissingPages>>,
    pub(crate) shape: Shape,
    /// Verifies what refers to this memory (I7).
    sealer: Option<Sealer>,
    stage: RwLock<Stage>,
    /// Pages that the source still has to send to a guest that may run. A page leaves it only once it is in
    /// memory.
    owed: Mutex<MemorySet>,
    /// What has landed of the current round, while nothing runs here: it need not be sent again if the link
    /// is lost.
    landed: Mutex<MemorySet>,
    pub(crate) announced: Mutex<Option<Announced>>,
    differing: AtomicU64,
    /// Since when somebody waits for a page.
    asked: Mutex<HashMap<Fault, Instant>>,
    waits_us: Mutex<Vec<u64>>,
    all_placed: Box<dyn Fn() + Send + Sync>,
}

impl Landing {
    pub(crate) fn new(
        memory: Arc<dyn GuestMemory>,
        missing: Option<Arc<dyn MissingPages>>,
        verify: bool,
        sealer: Option<Sealer>,
        all_placed: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let shape = Shape(memory.blocks().iter().map(|b| b.pages).collect());
        Self {
            stage: RwLock::new(Stage::Before),
            owed: Mutex::new(MemorySet::empty(shape.0.iter().copied())),
            landed: Mutex::new(MemorySet::empty(shape.0.iter().copied())),
            announced: Mutex::new(verify.then(|| Announced::new(&*memory))),
            differing: AtomicU64::new(0),
            asked: Mutex::default(),
            waits_us: Mutex::default(),
            all_placed: Box::new(all_placed),
            memory,
            missing,
            shape,
            sealer,
        }
    }

    /// Takes effect when every batch that is just landing has landed.
    pub(crate) fn enter(&self, stage: Stage) {
        *self.stage.write().expect("no one panics while landing") = stage;
    }

    pub(crate) fn owed(&self) -> MutexGuard<'_, MemorySet> {
        self.owed.locked()
    }

    /// Whether only owed pages land.
    pub(crate) fn lacking(&self) -> bool {
        *self.stage.read().expect("no one panics while landing") == Stage::Lacking
    }

    pub(crate) fn landed(&self) -> MutexGuard<'_, MemorySet> {
        self.landed.locked()
    }

    fn asked(&self) -> MutexGuard<'_, HashMap<Fault, Instant>> {
        self.asked.locked()
    }

    /// Makes holes of pages that are owed from now on.
    pub(crate) fn owe(&self, pages: &MemorySet) -> io::Result<()> {
        if self.missing.is_none() {
            return Err(invalid("pages are owed, but post-copy was not agreed"));
        }
        self.enter(Stage::Lacking);
        for (block, set) in pages.blocks() {
            let mut holes = set.clone();
            if holes.len() > FEW {
                holes.intersect(&self.memory.present(block)?);
            }
            for run in holes.runs() {
                self.memory.discard(block, run)?;
            }
        }
        self.owed().union(pages);
        Ok(())
    }

    /// Nothing is owed: the guest runs on at the source, and pages come as they did before. Where holes were
    /// made, pages land like anywhere else, or holes stay and are zeros.
    pub(crate) fn disown(&self) {
        self.owed().clear();
        self.enter(Stage::Before);
    }

    /// What was announced of the source's memory is of a pause that came to nothing.
    pub(crate) fn forget_hashes(&self) {
        let mut announced = self.announced.locked();
        if announced.is_some() {
            *announced = Some(Announced::new(&*self.memory));
        }
    }

    /// These pages are owed since before this agent was started.
    pub(crate) fn go_on(&self, owed: MemorySet) {
        self.enter(Stage::Lacking);
        *self.owed() = owed;
    }

    /// Lands a batch, run after run: a run may refer to what those before it have brought.
    fn land(
        &self,
        block: BlockId,
        table: &Table,
        codec: Option<Codec>,
        payload: &[u8],
        restorer: &mut Restorer,
    ) -> io::Result<()> {
        let stage = self.stage.read().expect("no one panics while landing");
        let (mut rest, packed) = payload.split_at(table.own);
        restorer.begin(codec, packed, table.raw).map_err(wrong)?;
        for run in &table.runs {
            let (own, after) = rest.split_at(run.payload());
            rest = after;
            let refers = matches!(run.class, Class::Known | Class::Delta);
            if refers && *stage != Stage::Before {
                return Err(invalid("a reference to memory of a guest that may run"));
            }
            let content = restorer.restore(block, run, own, self).map_err(wrong)?;
            match (*stage, content) {
                (Stage::Before, Some(content)) => self.memory.write(block, run.range, content)?,
                (Stage::Before, None) => self.memory.discard(block, run.range)?,
                (Stage::Lacking, content) => self.place(block, run.range, content)?,
                (Stage::Closed, _) => return Err(invalid("pages for a guest that has all its memory")),
            }
        }
        if *stage == Stage::Before {
            let mut landed = self.landed();
            table.runs.iter().for_each(|run| landed.block_mut(block).insert_range(run.range));
        }
        Ok(())
    }

    /// Puts what is owed of a run into memory of a guest that may run, then strikes it off: in this order,
    /// because a fault on a page that is not owed is answered with zeros.
    fn place(&self, block: BlockId, range: PageRange, content: Option<&[u8]>) -> io::Result<()> {
        let missing = self.missing.as_ref().ok_or_else(|| invalid("post-copy was not agreed"))?;
        let owed: Vec<PageRange> = self.owed().block(block).runs_within(range).collect();
        for part in owed {
            let at = (part.start.0 - range.start.0) as usize * PAGE_SIZE;
            let length = part.count as usize * PAGE_SIZE;
            match content {
                Some(content) => {
                    let content = &content[at..at + length];
                    self.compare(block, part, content);
                    missing.place(block, part, content)?;
                }
                None => {
                    self.compare(block, part, &[]);
                    for page in part.pieces(1) {
                        missing.place_zero(Fault { block, page: page.start })?;
                    }
                }
            }
            self.arrived(block, part);
            let mut owed = self.owed();
            owed.block_mut(block).remove_range(part);
            let all = owed.is_empty();
            drop(owed);
            if all {
                (self.all_placed)();
            }
        }
        Ok(())
    }

    /// Puts pages of the file into memory of a guest that does not run here yet, as a batch of its round
    /// would be.
    pub(crate) fn land_spooled(&self, extent: &Extent, content: &spool::Content) -> io::Result<()> {
        let stage = self.stage.read().expect("no one panics while landing");
        match (*stage, extent.kind, content) {
            (Stage::Before, spool::Kind::Zero, _) => self.memory.discard(extent.block, extent.pages),
            (Stage::Before, _, spool::Content::Pages(content)) => {
                self.memory.write(extent.block, extent.pages, content)
            }
            _ => Err(invalid("pages of a round after the rounds")),
        }
    }

    /// Puts what is owed of these pages of an extent into memory of a guest that may run.
    pub(crate) fn place_spooled(
        &self,
        extent: &Extent,
        content: &spool::Content,
        pages: PageRange,
    ) -> io::Result<()> {
        let stage = self.stage.read().expect("no one panics while landing");
        if *stage != Stage::Lacking {
            return Ok(());
        }
        let at = (pages.start.0 - extent.pages.start.0) as usize * PAGE_SIZE;
        let content = match (extent.kind, content) {
            (spool::Kind::Zero, _) => None,
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

    /// Somebody waits for a page that is owed; says whether it must be asked for.
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

/// Reads frames and lands them until the connection ends. Returns why it ended.
pub(crate) fn receive(mut conn: impl Read, landing: &Landing, mut round_end: impl FnMut(u32)) -> io::Error {
    let mut table = Vec::new();
    let mut content = vec![0; MAX_PAYLOAD];
    let mut restorer = Restorer::new(landing.sealer.clone(), MAX_PAYLOAD);
    loop {
        let received =
            receive_one(&mut conn, landing, &mut table, &mut content, &mut restorer, &mut round_end);
        if let Err(e) = received {
            return e;
        }
    }
}

fn receive_one(
    conn: &mut impl Read,
    landing: &Landing,
    table: &mut Vec<u8>,
    content: &mut [u8],
    restorer: &mut Restorer,
    round_end: &mut impl FnMut(u32),
) -> io::Result<()> {
    let mut header = [0; HEADER];
    // A connection that ends between two frames was closed; one that ends within a frame was lost.
    conn.read_exact(&mut header[..1])?;
    conn.read_exact(&mut header[1..]).map_err(in_a_frame)?;
    match Frame::parse(&header, &landing.shape).map_err(wrong)? {
        Frame::Batch { block, runs, payload, codec } => {
            table.resize(runs * RUN, 0);
            conn.read_exact(table).map_err(in_a_frame)?;
            let runs = parse_runs(table, block, payload, codec, &landing.shape).map_err(wrong)?;
            let content = &mut content[..payload];
            conn.read_exact(content).map_err(in_a_frame)?;
            landing.land(block, &runs, codec, content, restorer)
        }
        Frame::RoundEnd(round) => {
            round_end(round);
            Ok(())
        }
        Frame::Want { .. } => Err(invalid("the source asks the target for a page")),
    }
}

impl Landed for Landing {
    type Error = io::Error;

    fn pages(&self, block: BlockId) -> Option<u64> {
        self.shape.pages(block)
    }

    fn read(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        self.memory.read(block, range, into)
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
