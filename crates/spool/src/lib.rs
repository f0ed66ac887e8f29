//! The file on a shared datastore that guest pages also go into: its format, its writer, its reader, its
//! janitor.
//!
//! A file belongs to one side of one migration. It begins with a header that anybody can read; extents of
//! pages follow, in the order in which they were written, each tagged under a key that only the two agents
//! have. Nothing in it is believed before its tag was checked, and nothing is called durable before `fsync`
//! has said so.

/// Why a file is of no use, in words.
mod error;
/// A run of pages in the file.
mod extent;
#[doc(hidden)]
pub mod fuzz;
/// What a file begins with: whose it is.
mod header;
/// Which pages a file has, and their newest versions.
mod index;
/// What crashed migrations left behind.
mod janitor;
/// What a file is called.
mod name;
/// From the file to pages, verified.
mod reader;
/// From pages to the file, durable; on a thread of its own.
mod writer;

pub use error::SpoolError;
pub use extent::{ALIGN, Content, Extent, ExtentKind, MOST_PAGES, MOST_ZEROS};
pub use header::{BlockShape, Header, Key, Secret, Side};
pub use index::Index;
pub use janitor::{Found, Verdict, sweep};
pub use name::FileName;
pub use reader::{Piece, Reader};
pub use writer::{Mark, Progress, Refused, Writer};
