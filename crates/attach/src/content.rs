//! What of a RAM block holds something, while its process runs.

use crate::{
    populated::{PART, Populated},
    region::{Ram, Region},
};
use std::{io, ops::Range};
use sys::pagemap::Pagemap;
use units::{PageIndex, PageRange};

/// A block of which nothing is known yet. Huge pages, and files that are on a disk, are followed as a whole:
/// there, content does not show as it does elsewhere.
pub(crate) fn unknown(region: &Region) -> io::Result<Populated> {
    let part = PART.max(region.page_bytes());
    let finds = match (&region.ram, &region.huge) {
        (Ram::Shared(ram), None) => ram.is_shmem()?,
        _ => is_private(region),
    };
    let all = region.watched();
    Ok(if finds || region.is_handed_over() { Populated::none(all, part) } else { Populated::all(all, part) })
}

/// Memory that has no file, of usual pages: what is thrown away of it is zeros, and only the page tables tell
/// of it.
pub(crate) fn is_private(region: &Region) -> bool {
    match (&region.ram, &region.huge) {
        (Ram::Private(ram), None) => !ram.is_of_file(),
        _ => false,
    }
}

/// Adds the parts of `gap` that hold something.
pub(crate) fn find(
    region: &Region,
    pagemap: &mut Pagemap,
    gap: &Range<u64>,
    new: &mut Populated,
) -> io::Result<()> {
    let Ram::Shared(ram) = &region.ram else {
        return pagemap.maybe_mapped(gap.clone(), |run| new.add(&run));
    };
    let mut at = gap.start;
    while at < gap.end {
        let Some(page) = ram.first_present(PageIndex::at_offset(at - region.addresses.start))? else { break };
        let found = region.addresses.start + page.offset();
        if found >= gap.end {
            break;
        }
        let part = new.part_at(found);
        at = part.end;
        new.add(&part);
    }
    Ok(())
}

/// Reports the pages at `run` that hold something. A file is asked page by page: the end of its content may
/// be gigabytes behind the run, and to find it takes as long.
pub(crate) fn pages(
    region: &Region,
    pagemap: &mut Pagemap,
    run: &Range<u64>,
    mut report: impl FnMut(PageRange),
) -> io::Result<()> {
    let Ram::Shared(ram) = &region.ram else {
        return pagemap.present(run.clone(), |run| report(region.pages_at(&run)));
    };
    let pages = region.pages_at(run);
    let mut at = pages.start;
    while at < pages.end() {
        let Some(page) = ram.first_present(at)?.filter(|page| *page < pages.end()) else { break };
        report(PageRange::new(page, 1));
        at = PageIndex(page.0 + 1);
    }
    Ok(())
}
