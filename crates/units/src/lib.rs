//! What the numbers of a migration mean.
//!
//! Everything else in the workspace counts in these types, so that a page is never mistaken for a byte, nor
//! an epoch for a round.

mod disk;
mod id;
mod lock;
mod page;
mod page_set;
mod quantity;

pub use disk::{Disk, Queued, Requests};
pub use id::{BadId, Epoch, MigrationId};
pub use lock::Locked;
pub use page::{BlockId, PAGE_SIZE, PageIndex, PageRange};
pub use page_set::{MemorySet, PageSet, Runs};
pub use quantity::{BadQuantity, Bytes, Rate};
