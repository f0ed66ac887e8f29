//! Memory that is filled once and never touched again: what a migration carries in its first round only, or
//! last.

use crate::{
    content::{Content, Page},
    job::{Job, Jobs},
    words::Fill,
};
use std::sync::atomic::Ordering::Relaxed;
use units::PAGE_SIZE;

/// The pages and what is in them.
pub(crate) struct Filled {
    pages: Vec<Page>,
    content: Content,
}

/// Fills as much memory as `wish` says.
pub(crate) fn fill(wish: &Fill, job: &Job) -> Filled {
    let page = |seed| {
        let mut page = Page::ZERO;
        wish.content.write(seed, &mut page);
        page
    };
    let pages: Vec<Page> = (0..wish.set.0 / PAGE_SIZE as u64).map(page).collect();
    job.pages.store(pages.len() as u64, Relaxed);
    job.loops.store(1, Relaxed);
    Filled { pages, content: wish.content }
}

impl Filled {
    /// Compares every page with what it was filled with.
    pub(crate) fn verify(&self, jobs: &Jobs) -> u64 {
        let mut want = Page::ZERO;
        for (index, page) in self.pages.iter().enumerate() {
            self.content.write(index as u64, &mut want);
            if page.0 != want.0 {
                let at = page.0.iter().zip(&want.0).position(|(a, b)| a != b).unwrap_or(0);
                jobs.corrupt(format_args!("fill page {index}: differs from byte {at} on, at {page:p}"));
            }
        }
        self.pages.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use units::Bytes;

    #[test]
    fn one_changed_byte_is_found() {
        let jobs = Jobs::default();
        let set = Bytes(8 * PAGE_SIZE as u64);
        let mut filled = fill(&Fill { set, content: Content::Text }, &jobs.add("fill"));
        assert_eq!(filled.verify(&jobs), 8);
        assert_eq!(jobs.corrupted(), 0);
        filled.pages[5].0[17] ^= 1;
        filled.verify(&jobs);
        assert!(
            jobs.findings()[0].starts_with("fill page 5: differs from byte 17 on"),
            "{:?}",
            jobs.findings()
        );
    }
}
