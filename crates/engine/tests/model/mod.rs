//! A VM made of plain memory, with a guest that writes: all ports of a migration, without a QEMU.

pub(crate) mod cable;

use policy::{Throttle, Writer};
use ports::*;
use std::{
    collections::{HashMap, VecDeque},
    io,
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};
use units::*;

/// How long loading a device state may wait for a page.
const LOAD: Duration = Duration::from_secs(5);

/// RAM, with what a tracker and a watch for missing pages need to know of it.
pub(crate) struct Ram {
    blocks: Vec<Block>,
    inner: Mutex<Inner>,
    changed: Condvar,
    /// What happens just before the guest, which runs already, has this many pages.
    pub(crate) on_the_way: Mutex<Option<(usize, OnTheWay)>>,
    /// Who decides when a page that was collected may be written again, where somebody does.
    pub(crate) throttle: Mutex<Option<Throttle>>,
    /// What the tracker was told of each round: what need not have been in it.
    pub(crate) learnt: Mutex<Vec<MemorySet>>,
    /// Cannot be read any more once the device state is saved, if the first is set; the second says that it
    /// is.
    pub(crate) lost_by_saving: AtomicBool,
    lost: AtomicBool,
    /// What happens when a page is to become a hole that was none, or it is looked which pages are there: so
    /// a target begins to take what it will miss.
    pub(crate) on_hole: Mutex<Option<OnTheWay>>,
    /// The tracker was told that the guest is about to be stopped, and not that it runs on.
    pub(crate) hurried: AtomicBool,
    /// The blocks that its tracker was told to leave out.
    pub(crate) left_out: Mutex<Vec<BlockId>>,
    start: Instant,
}

pub(crate) type OnTheWay = Box<dyn FnOnce() + Send>;

struct Inner {
    content: Vec<HashMap<u64, Vec<u8>>>,
    dirty: MemorySet,
    faults: Vec<Fault>,
    watched: bool,
    /// Bytes that `write` was given after the guest ran: must stay 0 (I5).
    overwritten: u64,
    runs: bool,
}

impl Ram {
    pub(crate) fn new(pages: &[u64]) -> Arc<Self> {
        let blocks =
            pages.iter().zip(0..).map(|(p, i)| Block { name: format!("ram{i}"), pages: *p }).collect();
        let inner = Inner {
            content: pages.iter().map(|_| HashMap::new()).collect(),
            dirty: MemorySet::empty(pages.iter().copied()),
            faults: vec![],
            watched: false,
            overwritten: 0,
            runs: false,
        };
        Arc::new(Self {
            blocks,
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            on_the_way: Mutex::default(),
            throttle: Mutex::default(),
            learnt: Mutex::default(),
            lost_by_saving: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            on_hole: Mutex::default(),
            hurried: AtomicBool::new(false),
            left_out: Mutex::default(),
            start: Instant::now(),
        })
    }

    /// The guest writes a page.
    pub(crate) fn guest_writes(&self, block: u16, page: u64, seed: u64) {
        self.guest_reads(block, page);
        if !self.inner.lock().unwrap().dirty.block(BlockId(block)).contains(PageIndex(page)) {
            let mut throttle = self.throttle.lock().unwrap();
            let grant = throttle.as_mut().map(|throttle| throttle.ask(self.start.elapsed(), Writer(1), 1));
            drop(throttle);
            thread::sleep(grant.map_or(Duration::ZERO, |grant| grant.wait));
        }
        let mut content = vec![0; PAGE_SIZE];
        if seed != 0 {
            content.chunks_exact_mut(8).zip(seed..).for_each(|(c, v)| c.copy_from_slice(&v.to_le_bytes()));
        }
        let mut inner = self.inner.lock().unwrap();
        inner.content[usize::from(block)].insert(page, content);
        inner.dirty.block_mut(BlockId(block)).insert(PageIndex(page));
    }

    /// The guest reads a page; waits for it when it is missing. The first eight bytes tell what was written.
    pub(crate) fn guest_reads(&self, block: u16, page: u64) -> u64 {
        self.reads_within(block, page, Duration::MAX).unwrap()
    }

    /// The same; none if it has waited for so long.
    fn reads_within(&self, block: u16, page: u64, patience: Duration) -> Option<u64> {
        let since = Instant::now();
        let mut inner = self.inner.lock().unwrap();
        while since.elapsed() < patience {
            if let Some(content) = inner.content[usize::from(block)].get(&page) {
                return Some(u64::from_le_bytes(*content.first_chunk().unwrap()));
            }
            if !inner.watched {
                return Some(0);
            }
            inner.faults.push(Fault { block: BlockId(block), page: PageIndex(page) });
            self.changed.notify_all();
            inner = self.changed.wait_timeout(inner, patience.min(Duration::from_secs(1))).unwrap().0;
        }
        None
    }

    /// The guest changes one word of a page.
    pub(crate) fn guest_counts(&self, block: u16, page: u64, n: u64) {
        self.guest_reads(block, page);
        let mut inner = self.inner.lock().unwrap();
        if let Some(content) = inner.content[usize::from(block)].get_mut(&page) {
            content[1000..1008].copy_from_slice(&n.to_le_bytes());
        }
        inner.dirty.block_mut(BlockId(block)).insert(PageIndex(page));
    }

    /// Something that is none of our business writes to those of these pages that are there.
    pub(crate) fn is_overwritten_with_rubbish(&self, pages: std::ops::Range<u64>) -> bool {
        let mut inner = self.inner.lock().unwrap();
        for page in pages {
            if let Some(content) = inner.content[0].get_mut(&page) {
                content[2000] = content[2000].wrapping_add(0x55);
            }
        }
        true
    }

    pub(crate) fn runs(&self, runs: bool) {
        self.inner.lock().unwrap().runs = runs;
    }

    fn takes_what_it_misses(&self) {
        let happens = self.on_hole.lock().unwrap().take();
        happens.into_iter().for_each(|happens| happens());
    }

    /// Missing pages are waited for.
    pub(crate) fn watch(&self) {
        self.inner.lock().unwrap().watched = true;
    }

    pub(crate) fn overwritten(&self) -> u64 {
        self.inner.lock().unwrap().overwritten
    }

    /// All that is not zero.
    pub(crate) fn content(&self) -> Vec<HashMap<u64, Vec<u8>>> {
        let mut content = self.inner.lock().unwrap().content.clone();
        content.iter_mut().for_each(|b| b.retain(|_, page| page.iter().any(|x| *x != 0)));
        content
    }
}

impl GuestMemory for Ram {
    fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    fn present(&self, block: BlockId) -> io::Result<PageSet> {
        self.takes_what_it_misses();
        let mut set = PageSet::empty(self.blocks[usize::from(block.0)].pages);
        for page in self.inner.lock().unwrap().content[usize::from(block.0)].keys() {
            set.insert(PageIndex(*page));
        }
        Ok(set)
    }

    fn read(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        assert!(range.fits(self.blocks[usize::from(block.0)].pages));
        if self.lost.load(SeqCst) {
            return Err(io::Error::other("memory cannot be read"));
        }
        let inner = self.inner.lock().unwrap();
        for (page, into) in (range.start.0..range.end().0).zip(into.chunks_exact_mut(PAGE_SIZE)) {
            match inner.content[usize::from(block.0)].get(&page) {
                Some(content) => into.copy_from_slice(content),
                None => into.fill(0),
            }
        }
        Ok(())
    }

    fn write(&self, block: BlockId, range: PageRange, from: &[u8]) -> io::Result<()> {
        let mut inner = self.inner.lock().unwrap();
        if inner.runs {
            inner.overwritten += from.len() as u64;
        }
        for (page, from) in (range.start.0..range.end().0).zip(from.chunks_exact(PAGE_SIZE)) {
            inner.content[usize::from(block.0)].insert(page, from.to_vec());
        }
        Ok(())
    }

    fn discard(&self, block: BlockId, range: PageRange) -> io::Result<()> {
        let mut inner = self.inner.lock().unwrap();
        let mut new = false;
        for page in range.start.0..range.end().0 {
            new |= inner.content[usize::from(block.0)].remove(&page).is_some();
        }
        drop(inner);
        if new {
            self.takes_what_it_misses();
        }
        Ok(())
    }
}

impl MissingPages for Ram {
    fn next(&self, wait: Duration) -> io::Result<Option<Fault>> {
        let mut inner = self.inner.lock().unwrap();
        if inner.faults.is_empty() {
            inner = self.changed.wait_timeout(inner, wait).unwrap().0;
        }
        Ok(inner.faults.pop())
    }

    fn place(&self, block: BlockId, range: PageRange, from: &[u8]) -> io::Result<u64> {
        let there: usize = self.inner.lock().unwrap().content.iter().map(HashMap::len).sum();
        let now = self.on_the_way.lock().unwrap().take_if(|(n, _)| there + range.count as usize >= *n);
        if let Some((_, happens)) = now {
            happens();
        }
        let mut inner = self.inner.lock().unwrap();
        let mut new = 0;
        for (page, from) in (range.start.0..range.end().0).zip(from.chunks_exact(PAGE_SIZE)) {
            inner.content[usize::from(block.0)].entry(page).or_insert_with(|| {
                new += 1;
                from.to_vec()
            });
        }
        self.changed.notify_all();
        Ok(new)
    }

    fn place_zero(&self, fault: Fault) -> io::Result<Placed> {
        let range = PageRange::new(fault.page, 1);
        let new = self.place(fault.block, range, &[0; PAGE_SIZE])?;
        Ok(if new == 1 { Placed::Now } else { Placed::Already })
    }

    fn finish(&self) -> io::Result<()> {
        self.inner.lock().unwrap().watched = false;
        self.changed.notify_all();
        Ok(())
    }
}

/// Sees every write.
pub(crate) struct ModelTracker(pub(crate) Arc<Ram>);

impl Tracker for ModelTracker {
    fn begin(&mut self) -> io::Result<()> {
        self.0.inner.lock().unwrap().dirty.clear();
        Ok(())
    }

    fn collect(&mut self, dirty: &mut MemorySet) -> io::Result<()> {
        let mut inner = self.0.inner.lock().unwrap();
        for block in self.0.left_out.lock().unwrap().iter() {
            inner.dirty.block_mut(*block).clear();
        }
        dirty.union(&inner.dirty);
        inner.dirty.clear();
        Ok(())
    }

    fn leave_out(&mut self, blocks: &[BlockId]) -> io::Result<()> {
        self.0.left_out.lock().unwrap().extend(blocks);
        Ok(())
    }

    fn can_throttle(&self) -> bool {
        true
    }

    fn agree(&mut self, _: f64, _: Duration) {}

    fn throttle(&mut self, sent_per_s: f64) -> io::Result<()> {
        let mut throttle = self.0.throttle.lock().unwrap();
        throttle
            .as_mut()
            .map(|throttle| {
                throttle.follow(sent_per_s);
            })
            .ok_or(io::ErrorKind::Unsupported.into())
    }

    fn suspend_throttling(&mut self) -> io::Result<()> {
        self.0.hurried.store(true, SeqCst);
        Ok(())
    }

    fn resume_throttling(&mut self) {
        self.0.hurried.store(false, SeqCst);
    }

    fn learn(&mut self, unchanged: &MemorySet) {
        self.0.learnt.lock().unwrap().push(unchanged.clone());
    }

    fn stalls(&self) -> Stalls {
        Stalls { count: 1, total: Duration::from_millis(30), longest: Duration::from_millis(5) }
    }

    fn may_make_wait(&self) -> bool {
        false
    }

    fn writers(&mut self) -> Option<Vec<i32>> {
        Some(vec![7])
    }
}

/// Stuns that have a guest stand still altogether, unless they have no effect on it.
#[derive(Clone, Default)]
pub(crate) struct Stunned {
    pub(crate) duty: Arc<Mutex<f64>>,
    pub(crate) in_vain: Arc<AtomicBool>,
}

impl Stunned {
    pub(crate) fn is_stunned(&self) -> bool {
        *self.duty.lock().unwrap() > 0.0
    }

    pub(crate) fn stands_still(&self) -> bool {
        self.is_stunned() && !self.in_vain.load(SeqCst)
    }
}

impl Stuns for Stunned {
    fn vcpus(&self) -> u32 {
        1
    }

    fn stun(&mut self, duty: f64, writers: Option<&[i32]>) -> io::Result<()> {
        assert!(duty > 0.0 && duty <= 0.5, "{duty}");
        assert_eq!(writers, Some([7].as_slice()), "the tracker's word is passed on");
        *self.duty.lock().unwrap() = duty;
        Ok(())
    }

    fn calm(&mut self) {
        *self.duty.lock().unwrap() = 0.0;
    }

    fn stalls(&self) -> Stalls {
        Stalls { count: 2, total: Duration::from_millis(12), longest: Duration::from_millis(6) }
    }
}

/// vCPUs that can be stopped. The guest's own code runs while `running` is set.
#[derive(Clone)]
pub(crate) struct Cpu {
    pub(crate) running: Arc<AtomicBool>,
    pub(crate) ram: Arc<Ram>,
    pub(crate) destroyed: Arc<AtomicBool>,
    /// Its process has ended by itself.
    dead: Arc<AtomicBool>,
    /// It neither takes a device state nor lets its guest run.
    pub(crate) refuses: Arc<AtomicBool>,
    /// Held while the guest does one step, so that `stop` returns between steps.
    pub(crate) step: Arc<Mutex<()>>,
    /// Page that loading the device state reads.
    pub(crate) load_reads: Option<u64>,
    /// Loading a device state waits for a page that nobody sends, until the process is ended.
    pub(crate) load_waits: bool,
    /// It was ended from outside, while something was asked of it.
    pub(crate) ended: Arc<AtomicBool>,
    /// Ends as soon as the device state is loaded, and so many looks miss that.
    pub(crate) dies_loaded: Option<u32>,
    unseen: Arc<AtomicU32>,
    /// What happens when the guest has just been stopped, and when its device state has just been saved: the
    /// first time, the second …
    pub(crate) on_stop: Arc<Mutex<VecDeque<OnTheWay>>>,
    pub(crate) on_save: Arc<Mutex<VecDeque<OnTheWay>>>,
    /// And before a device state is loaded.
    pub(crate) on_load: Arc<Mutex<VecDeque<OnTheWay>>>,
    /// What it does if it does not run, and that is not that somebody has paused it.
    pub(crate) other_state: Arc<Mutex<Option<RunState>>>,
    /// What happens just before the promise.
    pub(crate) on_hold: Arc<Mutex<Option<OnTheWay>>>,
    /// What its disks do, and how often that was looked at.
    pub(crate) disks: Arc<Mutex<Vec<units::Disk>>>,
    pub(crate) looks: Arc<AtomicU32>,
    /// How it differs from what it was when its migration began.
    pub(crate) differs: Arc<Mutex<Vec<String>>>,
    /// How often its device state was saved; and which of these states was loaded.
    pub(crate) saves: Arc<AtomicU8>,
    pub(crate) loaded: Arc<AtomicU8>,
}

impl Cpu {
    pub(crate) fn new(ram: &Arc<Ram>, running: bool) -> Self {
        ram.runs(running);
        Self {
            running: Arc::new(AtomicBool::new(running)),
            ram: ram.clone(),
            destroyed: Arc::default(),
            dead: Arc::default(),
            refuses: Arc::default(),
            step: Arc::default(),
            load_reads: None,
            load_waits: false,
            ended: Arc::default(),
            dies_loaded: None,
            unseen: Arc::default(),
            on_stop: Arc::default(),
            on_save: Arc::default(),
            on_load: Arc::default(),
            other_state: Arc::default(),
            on_hold: Arc::default(),
            disks: Arc::default(),
            looks: Arc::default(),
            differs: Arc::default(),
            saves: Arc::default(),
            loaded: Arc::default(),
        }
    }

    /// It ends, of whatever.
    pub(crate) fn dies(&self) {
        self.running.store(false, SeqCst);
        self.dead.store(true, SeqCst);
    }

    fn answers(&self) -> Result<(), MachineError> {
        let gone = || MachineError { what: "ask QEMU".into(), why: "nobody is there".into() };
        if self.dead.load(SeqCst) { Err(gone()) } else { Ok(()) }
    }
}

impl Machine for Cpu {
    fn has_ended(&self) -> HasEnded {
        let (dead, unseen) = (self.dead.clone(), self.unseen.clone());
        let misses = move || unseen.fetch_update(SeqCst, SeqCst, |looks| looks.checked_sub(1)).is_ok();
        Box::new(move || dead.load(SeqCst) && !misses())
    }

    fn ender(&self) -> Ender {
        let (ended, dead) = (self.ended.clone(), self.dead.clone());
        Box::new(move || {
            ended.store(true, SeqCst);
            dead.store(true, SeqCst);
        })
    }

    fn unheard(&self) -> Unheard {
        Box::new(|| None)
    }

    fn prepare_stop(&mut self) -> Result<RunState, MachineError> {
        self.run_state()
    }

    fn prepare_load(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn watch(&mut self) -> Result<ports::VmCheck, MachineError> {
        let changes = self.differs.lock().unwrap().clone();
        Ok(ports::VmCheck { changes, state: self.run_state().ok() })
    }

    fn run_state(&mut self) -> Result<RunState, MachineError> {
        self.answers()?;
        let other = *self.other_state.lock().unwrap();
        Ok(if self.running.load(SeqCst) { RunState::Running } else { other.unwrap_or(RunState::Paused) })
    }

    fn disks(&mut self) -> Result<Vec<units::Disk>, MachineError> {
        self.answers()?;
        self.looks.fetch_add(1, SeqCst);
        Ok(self.disks.lock().unwrap().clone())
    }

    fn stop(&mut self) -> Result<Stopped, MachineError> {
        let before = self.run_state()?;
        // It may have switched itself off since it was asked.
        let before = self.other_state.lock().unwrap().unwrap_or(before);
        self.running.store(false, SeqCst);
        drop(self.step.lock().unwrap());
        let happens = self.on_stop.lock().unwrap().pop_front();
        happens.into_iter().for_each(|happens| happens());
        Ok(Stopped { before, drained: Duration::ZERO })
    }

    fn restore(&mut self, before: RunState) -> Result<Duration, MachineError> {
        self.answers()?;
        if before != RunState::Running {
            return Ok(Duration::ZERO);
        }
        assert!(!self.destroyed.load(SeqCst), "a destroyed VM runs");
        if self.refuses.load(SeqCst) {
            return Err(MachineError { what: "let it run".into(), why: "its storage is gone".into() });
        }
        self.ram.runs(true);
        self.running.store(true, SeqCst);
        Ok(Duration::ZERO)
    }

    fn hold(&mut self) -> Result<(), MachineError> {
        self.answers()?;
        let happens = self.on_hold.lock().unwrap().take();
        happens.into_iter().for_each(|happens| happens());
        match self.running.load(SeqCst) {
            true => Err(MachineError { what: "hold".into(), why: "somebody let the guest run on".into() }),
            false => Ok(()),
        }
    }

    fn save(&mut self) -> Result<Saved, MachineError> {
        let unchanged = || match &self.differs.lock().unwrap()[..] {
            [] => Ok(()),
            differences => Err(MachineError::changed(differences)),
        };
        unchanged()?;
        let began = Instant::now();
        // Devices write guest memory while they are saved.
        self.ram.guest_writes(0, 0, 99);
        self.ram.lost.store(self.ram.lost_by_saving.load(SeqCst), SeqCst);
        let this = self.saves.fetch_add(1, SeqCst) + 1;
        let happens = self.on_save.lock().unwrap().pop_front();
        happens.into_iter().for_each(|happens| happens());
        let state = DeviceState { stream: vec![this; 1000], private: vec![("vga".into(), vec![1; 5000])] };
        unchanged()?;
        let step = SaveStep { kind: SaveStepKind::Save, began, took: began.elapsed() };
        Ok(Saved { state, steps: vec![step] })
    }

    fn load(&mut self, state: &DeviceState) -> Result<(), MachineError> {
        self.answers()?;
        let happens = self.on_load.lock().unwrap().pop_front();
        happens.into_iter().for_each(|happens| happens());
        if self.refuses.load(SeqCst) {
            return Err(MachineError { what: "load the device state".into(), why: "no such device".into() });
        }
        assert_eq!((state.stream.len(), state.private.len()), (1000, 1));
        self.loaded.store(state.stream[0], SeqCst);
        // QEMU is not waited for for ever either, when the page that it wants cannot come any more.
        let waited = || MachineError { what: "load the device state".into(), why: "it took too long".into() };
        assert_eq!(self.ram.reads_within(0, 0, LOAD).ok_or_else(waited)?, 99);
        if self.load_waits {
            let begin = Instant::now();
            while begin.elapsed() < LOAD && !self.dead.load(SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
            return Err(waited());
        }
        if let Some(page) = self.load_reads {
            self.ram.reads_within(0, page, LOAD).ok_or_else(waited)?;
        }
        if let Some(looks) = self.dies_loaded {
            self.unseen.store(looks, SeqCst);
            self.dies();
        }
        Ok(())
    }

    fn announce(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn destroy(&mut self) -> Result<(), MachineError> {
        assert!(!self.running.load(SeqCst), "a running VM is destroyed");
        self.destroyed.store(true, SeqCst);
        Ok(())
    }
}

/// Journals that count.
#[derive(Clone, Default)]
pub(crate) struct Journal {
    pub(crate) events: Arc<Mutex<Vec<String>>>,
    /// What was recorded last.
    pub(crate) missing: Arc<Mutex<Option<MemorySet>>>,
    pub(crate) spool: Arc<Mutex<Option<SpoolRecord>>>,
    /// From now on nothing can be written.
    pub(crate) is_full: Arc<AtomicBool>,
    /// Is cut as soon as the source has promised: the authorization never arrives.
    pub(crate) cut_at_fence: Option<cable::Cable>,
}

impl Journal {
    fn note(&self, text: impl Into<String>) -> io::Result<()> {
        self.events.lock().unwrap().push(text.into());
        Ok(())
    }
}

impl SourceJournal for Journal {
    fn pausing(&mut self, before: RunState) -> io::Result<()> {
        self.note(if before == RunState::Running { "pausing" } else { "pausing a paused one" })
    }
    fn fence(&mut self, _: Epoch) -> io::Result<()> {
        self.note("promise")?;
        self.cut_at_fence.iter().for_each(cable::Cable::cut);
        Ok(())
    }
    fn back(&mut self) -> io::Result<()> {
        self.note("back")
    }
    fn gone(&mut self, epoch: Epoch) -> io::Result<()> {
        self.note(format!("gone {epoch}"))
    }
    fn settled(&mut self) -> io::Result<()> {
        self.note("settled")
    }
}

impl TargetJournal for Journal {
    fn missing(&mut self, pages: &MemorySet) -> io::Result<()> {
        *self.missing.lock().unwrap() = Some(pages.clone());
        self.note(format!("missing {}", pages.len()))
    }
    fn settled(&mut self) -> io::Result<()> {
        self.note("settled")
    }
    fn goes_on(&mut self, state: RunState) -> io::Result<()> {
        match (self.is_full.load(SeqCst), state) {
            (true, _) => Err(io::ErrorKind::StorageFull.into()),
            (_, RunState::Running) => Ok(()),
            _ => self.note(format!("goes on {state}")),
        }
    }
    fn went_on(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn spool(&mut self, record: &SpoolRecord) -> io::Result<()> {
        *self.spool.lock().unwrap() = Some(record.clone());
        self.note("spool")
    }
    fn abandoned(&mut self, source_may_ask: bool) -> io::Result<()> {
        if self.is_full.load(SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.note(format!("abandoned {source_may_ask}"))
    }
}

/// A record in memory.
#[derive(Default)]
pub(crate) struct Record {
    owner: Mutex<Option<(String, MigrationId)>>,
    /// What happens as soon as somebody owns the VM, before they know it.
    pub(crate) on_claim: Mutex<Option<OnTheWay>>,
}

impl Ownership for Record {
    fn identity(&self) -> io::Result<String> {
        Ok(String::new())
    }

    fn offer(&self, _: &Offer) -> io::Result<()> {
        Ok(())
    }

    fn claim(&self, claim: &Claim) -> io::Result<Claimed> {
        let mut record = self.owner.lock().unwrap();
        let (owner, migration) =
            record.get_or_insert_with(|| (claim.claimer.clone(), claim.migration)).clone();
        drop(record);
        if let Some(happens) = self.on_claim.lock().unwrap().take() {
            happens();
        }
        let epoch = claim.expected.next();
        Ok(if owner == claim.claimer {
            Claimed::Yours(epoch)
        } else {
            Claimed::Lost(OwnershipRecord { owner, epoch, migration: Some(migration) })
        })
    }
}

/// A host that takes one VM in.
pub(crate) struct Inn {
    pub(crate) ram: Arc<Ram>,
    pub(crate) cpu: Cpu,
    pub(crate) journal: Journal,
    pub(crate) record: Arc<Record>,
    pub(crate) refuse: Vec<String>,
    /// It is asked to prepare, and does not answer as long as this is so.
    pub(crate) held: AtomicBool,
    pub(crate) asked: AtomicBool,
    pub(crate) ended: Mutex<Option<bool>>,
    /// How the VM's migrations went, as it was told.
    pub(crate) history: Mutex<Vec<u8>>,
    /// Whether it sees the directories that a source shares pages by.
    pub(crate) spools: bool,
    /// What of a source's memory it reaches.
    pub(crate) reaches: Option<Reaches>,
    /// What it keeps of the VM from before.
    pub(crate) kept: Mutex<Option<Arc<dyn KeptCopy>>>,
    /// What it was offered.
    pub(crate) offered: Mutex<Vec<Handover>>,
}

/// Memory that is the source's own, but for what is not reached of it.
#[derive(Clone)]
pub(crate) struct Reaches {
    pub(crate) of_source: Arc<Ram>,
    pub(crate) own: Arc<Ram>,
    /// Its answer.
    pub(crate) reached: Vec<Reached>,
}

impl Reaches {
    fn is_reached(&self, block: BlockId) -> bool {
        self.reached.iter().any(|reached| reached.block == block)
    }

    fn of(&self, block: BlockId) -> &Arc<Ram> {
        if self.is_reached(block) { &self.of_source } else { &self.own }
    }

    fn own(&self, block: BlockId) -> &Arc<Ram> {
        assert!(!self.is_reached(block), "I3: the memory of a running guest is overwritten");
        &self.own
    }
}

impl GuestMemory for Reaches {
    fn blocks(&self) -> &[Block] {
        self.own.blocks()
    }

    fn present(&self, block: BlockId) -> io::Result<PageSet> {
        self.of(block).present(block)
    }

    fn read(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        self.of(block).read(block, range, into)
    }

    fn write(&self, block: BlockId, range: PageRange, from: &[u8]) -> io::Result<()> {
        self.own(block).write(block, range, from)
    }

    fn discard(&self, block: BlockId, range: PageRange) -> io::Result<()> {
        self.own(block).discard(block, range)
    }
}

impl MissingPages for Reaches {
    fn next(&self, wait: Duration) -> io::Result<Option<Fault>> {
        self.own.next(wait)
    }

    fn place(&self, block: BlockId, range: PageRange, from: &[u8]) -> io::Result<u64> {
        self.own(block).place(block, range, from)
    }

    fn place_zero(&self, fault: Fault) -> io::Result<Placed> {
        self.own(fault.block).place_zero(fault)
    }

    fn finish(&self) -> io::Result<()> {
        self.own.finish()
    }
}

impl Inn {
    pub(crate) fn new(pages: &[u64]) -> Arc<Self> {
        Arc::new(Self::usual(pages))
    }

    /// To be made another one.
    pub(crate) fn usual(pages: &[u64]) -> Self {
        let ram = Ram::new(pages);
        Self {
            cpu: Cpu::new(&ram, false),
            ram,
            journal: Journal::default(),
            record: Arc::default(),
            refuse: vec![],
            held: AtomicBool::default(),
            asked: AtomicBool::default(),
            ended: Mutex::default(),
            history: Mutex::default(),
            spools: true,
            reaches: None,
            offered: Mutex::default(),
            kept: Mutex::default(),
        }
    }
}

impl Host for Inn {
    fn name(&self) -> String {
        "target".into()
    }

    fn prepare(&self, request: &Request) -> Result<Waiting, Vec<String>> {
        if !self.refuse.is_empty() {
            return Err(self.refuse.clone());
        }
        self.asked.store(true, SeqCst);
        while self.held.load(SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
        *self.offered.lock().unwrap() = request.handovers.clone();
        if let Some(reaches) = &self.reaches {
            reaches.own.inner.lock().unwrap().watched = request.post_copy;
            let memory = Arc::new(reaches.clone());
            return Ok(Waiting {
                memory: memory.clone(),
                reached: reaches.reached.clone(),
                kept: None,
                missing: request.post_copy.then_some(memory as Arc<dyn MissingPages>),
                machine: Box::new(self.cpu.clone()),
                journal: Box::new(self.journal.clone()),
            });
        }
        self.ram.inner.lock().unwrap().watched = request.post_copy;
        let missing = request.post_copy.then(|| self.ram.clone() as Arc<dyn MissingPages>);
        Ok(Waiting {
            memory: self.ram.clone(),
            reached: vec![],
            kept: self.kept.lock().unwrap().take().filter(|_| request.came_by == Some(MigrationId(7))),
            missing,
            machine: Box::new(self.cpu.clone()),
            journal: Box::new(self.journal.clone()),
        })
    }

    fn spool_directory(&self, asked: &str) -> Result<PathBuf, String> {
        if self.spools { Ok(PathBuf::from(asked)) } else { Err(format!("{asked} is not allowed here")) }
    }

    fn record(&self) -> Arc<dyn Ownership> {
        self.record.clone()
    }

    fn settled(&self, _: MigrationId) -> bool {
        self.journal.events.lock().unwrap().contains(&"settled".to_owned())
    }

    fn ended(&self, request: &Request, arrived: bool) {
        self.history.lock().unwrap().clone_from(&request.history);
        *self.ended.lock().unwrap() = Some(arrived);
    }
}
