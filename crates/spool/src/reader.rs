use crate::{ALIGN, Content, Extent, Header, Index, Key, MOST_PAGES, Secret, SpoolError, header};
use std::path::{Path, PathBuf};
use sys::apart::{File, How};
use units::PAGE_SIZE;

/// Bytes that are looked through for an extent where none is, at most: 1 GiB, a second. What a crash can
/// leave is what was written since the last `fsync`: some 16 MiB. More is somebody's doing.
const MOST_DAMAGE: u64 = 1 << 30;

/// Read at once while looking for extents.
const WINDOW: usize = 64 << 10;

/// An extent with its pages, verified.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Piece {
    /// What it is.
    pub extent: Extent,
    /// What its pages hold.
    pub content: Content,
}

/// Reads one file. Whatever it gives was written by the holder of the secret, to this place of this file.
#[derive(Debug)]
pub struct Reader {
    file: File,
    path: PathBuf,
    header: Header,
    shape: Vec<u64>,
    begin: u64,
    key: Key,
}

impl Reader {
    /// Opens a file, which may be anything.
    pub fn open(path: &Path, secret: &Secret) -> Result<Self, SpoolError> {
        let (file, bytes) = open(path)?;
        let unusable = |why| SpoolError::Unusable { path: path.to_owned(), why };
        let (header, length) = Header::parse(&bytes).map_err(unusable)?;
        let begin = bytes.get(..length).ok_or_else(|| unusable("its header is incomplete".to_owned()))?;
        let key = Header::key(begin, secret);
        let shape = header.blocks.iter().map(|block| block.pages).collect();
        Ok(Self { file, path: path.to_owned(), header, shape, begin: length as u64, key })
    }

    /// What the file says of itself. Believable once an extent of it was verified: its tag covers this.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Where its first extent is.
    pub fn begin(&self) -> u64 {
        self.begin
    }

    /// Opens the file anew: on a network file system, what another host wrote since is seen only then.
    pub fn refresh(&mut self) -> Result<(), SpoolError> {
        self.file = open_file(&self.path)?;
        Ok(())
    }

    /// Looks through the file for extents. Between those that were written before the last `fsync` nothing is
    /// missing, whatever crashed; of those that were not, some may be torn or missing while later ones are
    /// whole.
    pub fn scan(&self) -> Result<Index, SpoolError> {
        let end = self.file.length().map_err(|e| SpoolError::io("look at", &self.path, e))?;
        let mut index = Index::from(self.begin);
        let mut window = Window { reader: self, bytes: Vec::new(), start: 0 };
        let (mut at, mut damaged) = (self.begin, 0);
        while at + ALIGN <= end && index.damaged + damaged <= MOST_DAMAGE {
            match window.header(at)?.and_then(|bytes| Extent::parse(&bytes, at, &self.shape, &self.key)) {
                Some(extent) => {
                    index.insert(extent);
                    index.damaged += std::mem::take(&mut damaged);
                    at = extent.end();
                    index.end = at;
                }
                None => match self.data_after(at) {
                    Some(next) if next > at => at = next,
                    Some(_) => {
                        at += ALIGN;
                        damaged += ALIGN;
                    }
                    None => break,
                },
            }
        }
        Ok(index)
    }

    /// Where, from here on, the file is no hole; none: nowhere. A hole costs nothing, however large.
    fn data_after(&self, at: u64) -> Option<u64> {
        // Where that cannot be told, what is there is looked at.
        let next = self.file.data_after(at).unwrap_or(Some(at))?;
        Some((next / ALIGN * ALIGN).max(at))
    }

    /// The extent at this place, which must be the one after those before it: for whoever follows a file that
    /// is being written.
    pub fn next(&self, at: u64) -> Result<Piece, SpoolError> {
        let damaged = || SpoolError::Damaged { path: self.path.clone(), offset: at };
        let bytes = self.read(ALIGN as usize, at)?;
        let bytes = bytes.first_chunk().ok_or_else(damaged)?;
        let extent = Extent::parse(bytes, at, &self.shape, &self.key).ok_or_else(damaged)?;
        Ok(Piece { extent, content: self.content(&extent)? })
    }

    /// What the pages of an extent hold; an error if it is not what was written.
    pub fn content(&self, extent: &Extent) -> Result<Content, SpoolError> {
        let at = extent.offset + ALIGN;
        let length = (extent.length as usize).min(MOST_PAGES as usize * PAGE_SIZE);
        let stored = if length == 0 { vec![] } else { self.read(length, at)? };
        extent
            .open(&stored, &self.key)
            .ok_or_else(|| SpoolError::Damaged { path: self.path.clone(), offset: extent.offset })
    }

    fn read(&self, length: usize, at: u64) -> Result<Vec<u8>, SpoolError> {
        self.file.read_at(length, at).map_err(|e| SpoolError::io("read", &self.path, e))
    }
}

/// A part of a file, so that headers that lie close to each other are read at once.
struct Window<'a> {
    reader: &'a Reader,
    bytes: Vec<u8>,
    start: u64,
}

impl Window<'_> {
    /// What stands at this place; none at the end of the file.
    fn header(&mut self, at: u64) -> Result<Option<[u8; ALIGN as usize]>, SpoolError> {
        let inside = at >= self.start && at + ALIGN <= self.start + self.bytes.len() as u64;
        if !inside {
            self.bytes = self.reader.read(WINDOW, at)?;
            self.start = at;
        }
        let from = (at - self.start) as usize;
        Ok(self.bytes.get(from..from + ALIGN as usize).and_then(|bytes| bytes.try_into().ok()))
    }
}

/// Opens a regular file and no other: a directory that others may write to can hold anything under any name.
fn open_file(path: &Path) -> Result<File, SpoolError> {
    File::open(path, How::Read).map_err(|e| SpoolError::io("open", path, e))
}

/// A file with as many of its first bytes as a header can have.
pub(crate) fn open(path: &Path) -> Result<(File, Vec<u8>), SpoolError> {
    let file = open_file(path)?;
    let bytes = file.read_at(header::MOST_BYTES, 0).map_err(|e| SpoolError::io("read", path, e))?;
    Ok((file, bytes))
}
