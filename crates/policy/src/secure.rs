//! Before a post-copy that must survive its source: how what is missing gets into a file while the guest
//! still writes.

use std::time::Duration;

/// The pause may be longer by so much of what is acceptable because the last pages go into the file: half of
/// it, so that what else a switchover costs has room beside it.
const SHARE_OF_PAUSE: f64 = 0.5;

/// Passes beyond this one get nowhere that those before did not.
const MOST_PASSES: u32 = 12;

/// A pass that leaves more than this part of what the one before left does not help; two such in a row are
/// enough to tell.
const SHRINKS: f64 = 0.8;

/// What one pass over what was written showed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Pass {
    /// Pages that it put into the file.
    pub pages: u64,
    /// How long that took until they were durable there.
    pub took: Duration,
    /// Pages that the guest wrote meanwhile.
    pub dirtied: u64,
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Secure {
    /// What is left fits into the pause.
    Stop,
    /// Another pass, over what was written.
    Again,
    /// The guest writes faster than the file takes it.
    Hopeless,
}

/// What to do after these passes, oldest first, for a pause that may be so long.
pub fn secure(passes: &[Pass], downtime: Duration) -> Secure {
    let Some(last) = passes.last() else { return Secure::Again };
    let fits = downtime.mul_f64(SHARE_OF_PAUSE);
    // What becoming durable costs by itself is in every pass, however few its pages: the quickest one bounds
    // it.
    let least = passes.iter().map(|pass| pass.took).min().unwrap_or_default();
    let largest = passes.iter().max_by_key(|pass| pass.pages).unwrap_or(last);
    let each = largest.took.as_secs_f64() / largest.pages.max(1) as f64;
    let needs = Duration::from_secs_f64(last.dirtied as f64 * each);
    if last.dirtied == 0 || needs <= fits {
        return Secure::Stop;
    }
    let stuck = passes
        .windows(2)
        .rev()
        .take(2)
        .filter(|pair| pair[1].dirtied as f64 > SHRINKS * pair[0].dirtied as f64);
    // Passes that cost nothing but their own latency cannot shrink what is written in that time.
    let floor = last.took <= least && passes.len() > 2 && needs <= downtime;
    if floor {
        return Secure::Stop;
    }
    if stuck.count() == 2 || passes.len() as u32 >= MOST_PASSES { Secure::Hopeless } else { Secure::Again }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Passes of a guest that writes `dirty` pages a second within `working` pages, on a store that takes
    /// `store` pages a second.
    fn end(memory: u64, dirty: f64, working: u64, store: f64) -> (usize, Secure) {
        let mut passes: Vec<Pass> = Vec::new();
        let mut pages = memory;
        loop {
            let took = Duration::from_secs_f64(0.002 + pages as f64 / store);
            let dirtied = ((dirty * took.as_secs_f64()) as u64).min(working);
            passes.push(Pass { pages, took, dirtied });
            match secure(&passes, Duration::from_millis(20)) {
                Secure::Again => pages = dirtied,
                end => return (passes.len(), end),
            }
        }
    }

    #[test]
    fn passes_go_on_for_as_long_as_they_help() {
        let table = [
            // An idle guest: one pass.
            (250_000, 0.0, 0, 100_000.0, (1, Secure::Stop)),
            // A tenth of what the store takes: each pass leaves a tenth.
            (250_000, 10_000.0, 250_000, 100_000.0, (3, Secure::Stop)),
            // More than the store takes, all over memory.
            (250_000, 200_000.0, 250_000, 100_000.0, (3, Secure::Hopeless)),
            // The same in a corner that fits into the pause.
            (250_000, 200_000.0, 900, 100_000.0, (1, Secure::Stop)),
        ];
        for (memory, dirty, working, store, expected) in table {
            assert_eq!(end(memory, dirty, working, store), expected, "{dirty} pages/s in {working}");
        }
    }

    #[test]
    fn it_always_ends() {
        for store in [100.0, 1e4, 1e6] {
            for dirty in [0.0, 10.0, 1e3, 1e4, 1e5, 1e7] {
                for working in [1, 1000, 250_000] {
                    assert!(end(250_000, dirty, working, store).0 <= MOST_PASSES as usize);
                }
            }
        }
    }
}
