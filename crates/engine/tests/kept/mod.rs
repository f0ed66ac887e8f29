//! A VM comes back to a host that keeps its memory from before: only what differs travels (I2, I5, I7).

use super::*;
use ports::KeptCopy;
use std::{collections::HashMap, io, sync::atomic::AtomicU64};
use units::{PAGE_SIZE, PageRange};

/// What becomes of the copy once the source was told of it.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Later {
    /// It stays.
    Stays,
    /// Some pages are others.
    Changes,
    /// It cannot be read any more.
    Vanishes,
}

struct Copy {
    content: Vec<HashMap<u64, Vec<u8>>>,
    later: Later,
    /// The pages that were read once: to be told of.
    told: Mutex<MemorySet>,
    released: AtomicU64,
    /// The pages that were given back are zeros.
    gone: Mutex<MemorySet>,
}

impl Copy {
    /// What a guest has, but for each `differs`-th page.
    fn of(ram: &Ram, differs: u64, later: Later) -> Arc<Self> {
        let mut content = ram.content();
        let all = content.iter_mut().flatten().filter(|(page, _)| page.is_multiple_of(differs));
        all.for_each(|(_, content)| content[77] ^= 1);
        let told = Mutex::new(MemorySet::empty(PAGES));
        let gone = Mutex::new(MemorySet::empty(PAGES));
        Arc::new(Self { content, later, told, released: AtomicU64::new(0), gone })
    }
}

impl KeptCopy for Copy {
    fn first_present(&self, block: BlockId, from: PageIndex) -> io::Result<Option<PageIndex>> {
        let pages = self.content[usize::from(block.0)].keys().copied();
        Ok(pages.filter(|page| *page >= from.0).min().map(PageIndex))
    }

    fn read(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        for (page, into) in range.pieces(1).zip(into.chunks_mut(PAGE_SIZE)) {
            let is_gone = self.gone.lock().unwrap().block(block).contains(page.start);
            match self.content[usize::from(block.0)].get(&page.start.0) {
                Some(content) if !is_gone => into.copy_from_slice(content),
                _ => into.fill(0),
            }
            if !self.told.lock().unwrap().block_mut(block).insert(page.start) {
                match self.later {
                    Later::Stays => {}
                    Later::Changes => into[99] ^= u8::from(page.start.0.is_multiple_of(50)),
                    Later::Vanishes => return Err(io::Error::other("it is gone")),
                }
            }
        }
        Ok(())
    }

    fn release(&self, block: BlockId, range: PageRange) {
        self.released.fetch_add(range.count, SeqCst);
        self.gone.lock().unwrap().block_mut(block).insert_range(range);
    }
}

/// Not compressed: what does not travel is seen.
fn wish(mode: Mode) -> MigrateOptions {
    MigrateOptions { compress: Compression::None, ..options(mode) }
}

#[test]
fn i7_a_vm_that_returns_costs_what_changed() {
    for mode in [Mode::PreCopy, Mode::Hybrid, Mode::PostCopy] {
        let (source, inn) = (Source::new(), Inn::new(&PAGES));
        let copy = Copy::of(&source.ram, 40, Later::Stays);
        *inn.kept.lock().unwrap() = Some(copy.clone());
        let (report, events) = source.migrate(listen(&inn), wish(mode), |_| {});
        assert_eq!(report.outcome, Outcome::Completed, "{mode:?} {:?}", report.error);
        assert_eq!((report.verified, inn.ram.overwritten()), (Some(true), 0), "{mode:?}: I5");
        assert_eq!(inn.ram.content(), source.ram.content(), "{mode:?}: I7");
        // Of 4200 pages, one in forty differs; what the guest waits for in post-copy comes as it is.
        assert!(report.pages.kept > 3900, "{mode:?}: {:?}", report.pages);
        assert!(report.wire_bytes < 1 << 20, "{mode:?}: {} bytes", report.wire_bytes);
        assert!(copy.released.load(SeqCst) >= report.pages.kept, "{mode:?}: memory is taken twice");
        assert!(!lost(&events), "{mode:?}: {events:?}");
        // How long the next one takes that finds nothing cannot be learnt from it.
        if mode == Mode::PreCopy {
            assert_eq!(*inn.history.lock().unwrap(), b"[]", "it was learnt from");
        }
        drop(inn);
    }
}

#[test]
fn where_nothing_is_kept_everything_travels() {
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    let (report, _) = source.migrate(listen(&inn), wish(Mode::PreCopy), |_| {});
    assert_eq!((report.outcome, report.pages.kept), (Outcome::Completed, 0), "{:?}", report.error);
    assert!(report.wire_bytes > 16 << 20, "{} bytes", report.wire_bytes);
    assert_ne!(*inn.history.lock().unwrap(), b"[]", "nothing was learnt");
}

fn lost(events: &[Event]) -> bool {
    events.iter().any(|event| matches!(event, Event::Note { text } if text.contains("was lost")))
}

#[test]
fn i2_i7_what_is_not_kept_any_more_travels_otherwise() {
    for mode in [Mode::PreCopy, Mode::Hybrid, Mode::PostCopy] {
        for later in [Later::Changes, Later::Vanishes] {
            let (source, inn) = (Source::new(), Inn::new(&PAGES));
            source.guest(1);
            *inn.kept.lock().unwrap() = Some(Copy::of(&source.ram, 3, later));
            // Nobody waits for a link that is lost as a whole.
            let wish = MigrateOptions { give_up: Duration::ZERO, ..wish(mode) };
            let (report, events) = source.migrate(listen(&inn), wish, |_| {});
            assert_eq!(report.outcome, Outcome::Completed, "{mode:?} {later:?} {:?}", report.error);
            assert_eq!((report.verified, inn.ram.overwritten()), (Some(true), 0), "{mode:?} {later:?}: I5");
            assert_eq!(inn.ram.content(), source.ram.content(), "{mode:?} {later:?}: I2, I7");
            assert!(lost(&events), "{mode:?} {later:?}: nothing was refused");
        }
    }
}

#[test]
fn i2_a_lost_link_ends_what_is_kept_and_loses_no_page() {
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        let (source, inn) = (Source::new(), Inn::new(&PAGES));
        source.guest(1);
        let copy = Copy::of(&source.ram, 2, Later::Stays);
        *inn.kept.lock().unwrap() = Some(copy.clone());
        let cable = Cable::to(listen(&inn));
        cable.cut_after.store(2 << 20, SeqCst);
        mend_after_the_cut(cable.clone());
        let wish = MigrateOptions { bandwidth: Some(Rate(20 << 20)), ..wish(mode) };
        let (report, _) = source.migrate(cable.address, wish, |_| {});
        assert_eq!(report.outcome, Outcome::Completed, "{mode:?} {:?}", report.error);
        assert_eq!((report.verified, inn.ram.overwritten()), (Some(true), 0), "{mode:?}: I5");
        assert_eq!(inn.ram.content(), source.ram.content(), "{mode:?}: I2");
        assert!(copy.released.load(SeqCst) > 0, "{mode:?}: nothing of it was used before");
    }
}
