//! Pages written at a given rate, in a given pattern, with given content.

use crate::{
    content::{Page, mix, next},
    job::Job,
    pace::Pace,
    words::{Dirty, Pattern},
    work::spawn,
};
use std::{
    hint::black_box,
    sync::{Arc, atomic::Ordering::Relaxed},
};
use units::PAGE_SIZE;

/// Starts the writers; the pages of each are its own. What is to be the same again, or is not written in
/// order, is written once when this returns: it would take long to become so.
pub(crate) fn start(wish: &Dirty, job: &Arc<Job>) -> Result<(), String> {
    let pages = wish.set.0 / PAGE_SIZE as u64;
    let threads = (wish.threads as u64).min(pages);
    for mine in 0..threads {
        let count = pages / threads + u64::from(mine < pages % threads);
        let mut pages = vec![Page::ZERO; count as usize];
        if wish.same || wish.pattern != Pattern::Sequential {
            pages.iter_mut().zip(0..).for_each(|(page, place)| wish.content.write(own(mine, place), page));
        }
        let (wish, job, pace) = (wish.clone(), job.clone(), Pace::new(wish.rate, threads as usize));
        spawn(wish.cpu, move || write(&wish, &job, pace, mine, pages))?;
    }
    Ok(())
}

/// The content that belongs to a place.
fn own(mine: u64, place: u64) -> u64 {
    mix(mine + 1) ^ place
}

fn write(wish: &Dirty, job: &Job, pace: Pace, mine: u64, mut pages: Vec<Page>) -> ! {
    let count = pages.len() as u64;
    let mut seed = mix(mine + 1) | 1;
    let mut order = Order { pattern: wish.pattern, count, at: 0 };
    let mut done = 0;
    job.run(pace, |batch| {
        for _ in 0..batch {
            let place = order.next(&mut seed);
            let content = if wish.same { own(mine, place) } else { next(&mut seed) };
            wish.content.write(content, &mut pages[place as usize]);
        }
        done += batch;
        if done >= count {
            done -= count;
            // In a random pattern a loop is as many writes as there are pages. The first thread stands for
            // all.
            job.loops.fetch_add(u64::from(mine == 0), Relaxed);
        }
        // Nobody reads these pages; they are to be written nevertheless.
        black_box(&mut pages);
    })
}

/// Which page is next.
struct Order {
    pattern: Pattern,
    count: u64,
    at: u64,
}

impl Order {
    fn next(&mut self, seed: &mut u64) -> u64 {
        let pick = |range: u64, seed: &mut u64| ((u128::from(next(seed)) * u128::from(range)) >> 64) as u64;
        match self.pattern {
            Pattern::Sequential => {
                self.at = (self.at + 1) % self.count;
                self.at
            }
            Pattern::Random => pick(self.count, seed),
            Pattern::HotCold => {
                let hot = self.count.div_ceil(10);
                if pick(10, seed) < 9 || hot == self.count {
                    pick(hot, seed)
                } else {
                    hot + pick(self.count - hot, seed)
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(pattern: Pattern, count: u64) -> Vec<u64> {
        let mut seed = 99;
        let mut order = Order { pattern, count, at: 0 };
        (0..count * 20).map(|_| order.next(&mut seed)).collect()
    }

    #[test]
    fn patterns_reach_every_page_and_none_beyond() {
        for pattern in [Pattern::Sequential, Pattern::Random] {
            let mut seen = places(pattern, 100);
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen, (0..100).collect::<Vec<_>>(), "{pattern:?}");
        }
        for count in 1..12 {
            assert!(places(Pattern::HotCold, count).iter().all(|&p| p < count));
        }
    }

    #[test]
    fn nine_writes_in_ten_go_to_the_hot_tenth() {
        let all = places(Pattern::HotCold, 1000);
        let hot = all.iter().filter(|&&p| p < 100).count() as f64 / all.len() as f64;
        assert!((0.88..0.92).contains(&hot), "{hot}");
    }
}
