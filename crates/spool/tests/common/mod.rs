//! A file with pages in it, and what it should hold.

use spool::{BlockShape, Content, Header, Secret, Side, Writer};
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::Duration,
};
use units::{BlockId, MigrationId, PAGE_SIZE, PageIndex, PageRange};

pub(crate) const SECRET: Secret = Secret([42; 32]);

/// Nothing here takes as long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn header() -> Header {
    Header {
        migration: MigrationId(1),
        side: Side::Source,
        host: "hosta".into(),
        vm: "web1".into(),
        created: 1,
        blocks: [("pc.ram", 4096), ("vga", 64)]
            .map(|(name, pages)| BlockShape { name: name.into(), pages })
            .into(),
    }
}

pub(crate) fn create(directory: &Path) -> Writer {
    let writer = Writer::create(directory, &header(), &SECRET, PATIENCE).unwrap();
    writer.keep();
    writer
}

/// A run of pages, whose content follows from a seed; zeros where that is 0.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) block: u16,
    pub(crate) start: u64,
    pub(crate) count: u64,
    pub(crate) seed: u8,
    pub(crate) compress: bool,
}

impl Run {
    pub(crate) fn range(&self) -> PageRange {
        PageRange::new(PageIndex(self.start), self.count)
    }

    pub(crate) fn page(&self, page: u64) -> Vec<u8> {
        let byte = |i: usize| match self.seed {
            0 => 0,
            seed if i.is_multiple_of(64) => (page as u8).wrapping_mul(seed) | 1,
            seed => seed,
        };
        (0..PAGE_SIZE).map(byte).collect()
    }

    pub(crate) fn append(&self, writer: &Writer) {
        let content = match self.seed {
            0 => Content::Nothing,
            _ => Content::Pages((self.start..self.start + self.count).flat_map(|p| self.page(p)).collect()),
        };
        writer.append(1, BlockId(self.block), self.range(), content, self.compress).unwrap();
    }
}

/// All versions of each page that were ever written, by sequence number.
pub(crate) type Versions = HashMap<(u16, u64), Vec<(u64, Vec<u8>)>>;

pub(crate) fn versions(runs: &[Run]) -> Versions {
    let mut all = Versions::new();
    for (run, sequence) in runs.iter().zip(0..) {
        for page in run.start..run.start + run.count {
            all.entry((run.block, page)).or_default().push((sequence, run.page(page)));
        }
    }
    all
}

/// A file with these runs, all durable.
pub(crate) fn written(directory: &Path, runs: &[Run]) -> PathBuf {
    let writer = create(directory);
    runs.iter().for_each(|run| run.append(&writer));
    assert_eq!(writer.sync(PATIENCE).unwrap().extents, runs.len() as u64);
    writer.path().to_owned()
}
