//! Finds code that any process with a C library has.

use crate::{maps, process::PidFd};
use std::io;

/// `syscall; ret`.
const SYSCALL_RET: &[u8] = &[0x0f, 0x05, 0xc3];

/// `mov $15, %rax; syscall`: the trampoline to which every signal handler returns (`__restore_rt`).
const SIGRETURN: &[u8] = &[0x48, 0xc7, 0xc0, 0x0f, 0x00, 0x00, 0x00, 0x0f, 0x05];

/// How much of a mapping is searched at once. Both gadgets lie near the beginning of a C library: larger
/// pieces copy what is never looked at, smaller ones make more calls.
const PIECE: usize = 1 << 16;

/// Addresses of code in another process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gadgets {
    /// A `syscall` that is followed by a `ret`.
    pub(super) syscall: u64,
    /// Returns from a signal handler.
    pub(super) sigreturn: u64,
}

/// Searches the C library, or the whole program where there is none to be seen.
pub(super) fn find(process: &PidFd) -> io::Result<Gadgets> {
    let mut code: Vec<_> =
        maps::read(process)?.into_iter().filter(|m| m.execute && m.read && m.inode != 0).collect();
    code.sort_by_key(|m| {
        !(m.path.contains("/libc.") || m.path.contains("/libc-") || m.path.contains("/ld-musl"))
    });
    let (mut syscall, mut sigreturn) = (None, None);
    let mut piece = Vec::new();
    for mapping in code {
        let mut at = mapping.addresses.start;
        while at < mapping.addresses.end {
            piece.resize(PIECE.min((mapping.addresses.end - at) as usize), 0);
            if process.read_memory(at, &mut piece).is_err() {
                break;
            }
            let place = |needle: &[u8]| search(&piece, needle).map(|offset| at + offset as u64);
            syscall = syscall.or_else(|| place(SYSCALL_RET));
            sigreturn = sigreturn.or_else(|| place(SIGRETURN));
            if let (Some(syscall), Some(sigreturn)) = (syscall, sigreturn) {
                return Ok(Gadgets { syscall, sigreturn });
            }
            // Pieces overlap so that nothing is missed between them.
            let step = if piece.len() == PIECE { PIECE - SIGRETURN.len() } else { PIECE };
            at += step as u64;
        }
    }
    let text = format!(
        "process {} has no code to make a system call with: not a C program of x86-64?",
        process.pid()
    );
    Err(io::Error::new(io::ErrorKind::Unsupported, text))
}

fn search(piece: &[u8], needle: &[u8]) -> Option<usize> {
    // Comparing the first byte by itself is several times faster than comparing windows.
    (0..piece.len()).find(|at| piece[*at] == needle[0] && piece[*at..].starts_with(needle))
}
