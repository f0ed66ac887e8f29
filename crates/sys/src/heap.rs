//! Memory of this process that it has freed.

use nix::libc;

/// Gives it back to the kernel. glibc keeps what threads free, for each of its arenas, of which a process
/// with many threads has eight a processor: an agent that has nothing to do any more held half a gibibyte.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes no pointers, and glibc locks its arenas itself.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    use super::*;
    use std::{fs, thread};

    /// Bytes that this process has in memory and in no file.
    fn resident() -> u64 {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    #[test]
    fn what_threads_have_freed_goes_back() {
        const BYTES: usize = 64 << 20;
        const BLOCK: usize = 4000;
        let last = thread::spawn(|| {
            let blocks: Vec<_> = (0..BYTES / BLOCK).map(|n| vec![n as u8 | 1; BLOCK]).collect();
            // As long as the last one is there, glibc does not shrink the arena by itself.
            blocks.into_iter().next_back()
        });
        let last = last.join().unwrap();
        let before = resident();
        give_back();
        let after = resident();
        assert!(last.is_some_and(|last| last.len() == BLOCK));
        assert!(after + BYTES as u64 / 2 < before, "{before} bytes, then {after}");
    }
}
