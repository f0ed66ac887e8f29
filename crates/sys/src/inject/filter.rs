//! What a thread's seccomp filters would do about a system call, found out before it is made in the thread's
//! place.
//!
//! A filter may kill the process for a call that it does not expect. The kernel hands out a thread's filters
//! to a tracer with `CAP_SYS_ADMIN` (`PTRACE_SECCOMP_GET_FILTER`); they are programs for a tiny machine
//! (`Documentation/networking/filter.rst`, `Documentation/userspace-api/seccomp_filter.rst`), which is
//! imitated here. Where they cannot be had, only such calls are made as a QEMU makes all the time.

use nix::libc;
use std::io;

/// A `struct sock_filter`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub(super) struct Instruction {
    pub(super) code: u16,
    pub(super) jt: u8,
    pub(super) jf: u8,
    pub(super) k: u32,
}

/// The filters of a thread.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Filters {
    /// Every call is asked of all of these; none: it has no filters.
    Known(Vec<Vec<Instruction>>),
    /// It has some, and the kernel does not tell which.
    Unknown,
}

/// What would come of a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// It would be made.
    Made,
    /// It would fail with this error, and do no harm.
    Fails(i32),
    /// It must not be tried: the process would be killed, or wait for somebody else's word.
    Harmful,
}

/// `AUDIT_ARCH_X86_64`.
const ARCH: u32 = 0xc000_003e;

/// `struct seccomp_data`: number, architecture, instruction pointer, six arguments.
const DATA: usize = 64;

/// More instructions than the kernel lets a filter have.
const LONGEST: usize = 4096;

/// Calls that every QEMU makes while it runs: whoever filters them has no QEMU.
const USUAL: [i64; 6] = [
    libc::SYS_close,
    libc::SYS_ioctl,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_recvmsg,
];

impl Filters {
    /// What would come of this call, made at `ip`.
    pub(super) fn verdict(&self, number: i64, ip: u64, arguments: [u64; 6]) -> Verdict {
        let filters = match self {
            Self::Known(filters) => filters,
            Self::Unknown if USUAL.contains(&number) => return Verdict::Made,
            Self::Unknown => return Verdict::Harmful,
        };
        let mut data = Vec::with_capacity(DATA);
        data.extend((number as u32).to_ne_bytes());
        data.extend(ARCH.to_ne_bytes());
        data.extend(ip.to_ne_bytes());
        data.extend(arguments.iter().flat_map(|argument| argument.to_ne_bytes()));
        // The strictest answer counts: the kernel compares them as signed numbers.
        let strictest = filters.iter().map(|filter| {
            let answer = run(filter, &data).unwrap_or(libc::SECCOMP_RET_KILL_PROCESS);
            ((answer & libc::SECCOMP_RET_ACTION_FULL).cast_signed(), answer)
        });
        let answer =
            strictest.min_by_key(|(action, _)| *action).map_or(libc::SECCOMP_RET_ALLOW, |(_, answer)| answer);
        match answer & libc::SECCOMP_RET_ACTION_FULL {
            libc::SECCOMP_RET_ALLOW | libc::SECCOMP_RET_LOG => Verdict::Made,
            libc::SECCOMP_RET_ERRNO => Verdict::Fails((answer & libc::SECCOMP_RET_DATA).cast_signed()),
            _ => Verdict::Harmful,
        }
    }
}

/// A filter's answer; none if it is not one that the kernel accepts.
fn run(filter: &[Instruction], data: &[u8]) -> Option<u32> {
    let word = |at: u32| {
        let at = at as usize;
        Some(u32::from_ne_bytes(data.get(at..at.checked_add(4)?)?.try_into().ok()?))
    };
    let (mut a, mut x, mut memory) = (0_u32, 0_u32, [0_u32; 16]);
    let mut at = 0_usize;
    // Jumps lead forward only, so this ends.
    loop {
        let Instruction { code, jt, jf, k } = *filter.get(at).filter(|_| at < LONGEST)?;
        at += 1;
        let operand = if code & 0x08 == 0 { k } else { x };
        match code {
            // Loads: a word of the data, its length, a number, a word of memory; the same into x.
            0x20 => a = word(k)?,
            0x80 => a = DATA as u32,
            0x00 => a = k,
            0x60 => a = *memory.get(k as usize)?,
            0x81 => x = DATA as u32,
            0x01 => x = k,
            0x61 => x = *memory.get(k as usize)?,
            // Stores, and moves between the two.
            0x02 => *memory.get_mut(k as usize)? = a,
            0x03 => *memory.get_mut(k as usize)? = x,
            0x07 => x = a,
            0x87 => a = x,
            // Arithmetic.
            0x04 | 0x0c => a = a.wrapping_add(operand),
            0x14 | 0x1c => a = a.wrapping_sub(operand),
            0x24 | 0x2c => a = a.wrapping_mul(operand),
            0x34 | 0x3c => a = a.checked_div(operand)?,
            0x44 | 0x4c => a |= operand,
            0x54 | 0x5c => a &= operand,
            0x64 | 0x6c => a = a.checked_shl(operand).unwrap_or(0),
            0x74 | 0x7c => a = a.checked_shr(operand).unwrap_or(0),
            0x84 => a = a.wrapping_neg(),
            0xa4 | 0xac => a ^= operand,
            // Jumps: always, equal, greater, greater or equal, some bit set.
            0x05 => at = at.checked_add(k as usize)?,
            0x15 | 0x1d => at += usize::from(if a == operand { jt } else { jf }),
            0x25 | 0x2d => at += usize::from(if a > operand { jt } else { jf }),
            0x35 | 0x3d => at += usize::from(if a >= operand { jt } else { jf }),
            0x45 | 0x4d => at += usize::from(if a & operand != 0 { jt } else { jf }),
            // The answer.
            0x06 => return Some(k),
            0x16 => return Some(a),
            _ => return None,
        }
    }
}

/// The error of a call that was not tried.
pub(super) fn not_tried(pid: i32, number: i64, filters: &Filters) -> io::Error {
    let call = match number {
        libc::SYS_userfaultfd => "userfaultfd".to_owned(),
        libc::SYS_socketpair => "socketpair".to_owned(),
        libc::SYS_ioctl => "ioctl".to_owned(),
        other => format!("system call {other}"),
    };
    let why = match filters {
        Filters::Known(_) => format!("its seccomp filter would kill it for {call}"),
        Filters::Unknown => format!(
            "it has a seccomp filter that cannot be read (that takes CAP_SYS_ADMIN, and no filter on the \
             agent itself), which might kill it for {call}"
        ),
    };
    let text = format!(
        "process {pid} was not made to do it: {why}; allow {call} in its filter (systemd: SystemCallFilter=)"
    );
    io::Error::new(io::ErrorKind::PermissionDenied, Forbidden(text))
}

/// A call that was not tried because of a filter.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Forbidden(String);

/// Whether an error is that of a call that was not tried.
pub(super) fn is_forbidden(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Forbidden>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> Instruction {
        Instruction { code, jt, jf, k }
    }

    /// `action` for one call, everything else is allowed.
    fn against(number: i64, action: u32) -> Vec<Instruction> {
        vec![
            instruction(0x20, 0, 0, 0),
            instruction(0x15, 0, 1, number as u32),
            instruction(0x06, 0, 0, action),
            instruction(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
        ]
    }

    #[test]
    fn the_strictest_filter_decides() {
        use Verdict::{Fails, Harmful, Made};
        let (kill, trap) = (libc::SECCOMP_RET_KILL_PROCESS, libc::SECCOMP_RET_TRAP);
        let errno = |error: i32| libc::SECCOMP_RET_ERRNO | error as u32;
        let uffd = libc::SYS_userfaultfd;
        let rows: [(Vec<u32>, Verdict); 11] = [
            (vec![], Made),
            (vec![libc::SECCOMP_RET_ALLOW], Made),
            (vec![libc::SECCOMP_RET_LOG], Made),
            (vec![errno(libc::EPERM)], Fails(libc::EPERM)),
            (vec![errno(libc::ENOSYS), libc::SECCOMP_RET_ALLOW], Fails(libc::ENOSYS)),
            (vec![kill], Harmful),
            (vec![libc::SECCOMP_RET_KILL_THREAD], Harmful),
            (vec![trap], Harmful),
            (vec![libc::SECCOMP_RET_TRACE], Harmful),
            (vec![libc::SECCOMP_RET_USER_NOTIF], Harmful),
            (vec![errno(libc::EPERM), kill, libc::SECCOMP_RET_ALLOW], Harmful),
        ];
        for (actions, verdict) in rows {
            let filters = Filters::Known(actions.iter().map(|action| against(uffd, *action)).collect());
            assert_eq!(filters.verdict(uffd, 0, [0; 6]), verdict, "{actions:x?}");
            assert_eq!(filters.verdict(libc::SYS_ioctl, 0, [0; 6]), Made, "{actions:x?}");
        }
        assert_eq!(Filters::Unknown.verdict(uffd, 0, [0; 6]), Harmful);
        assert_eq!(Filters::Unknown.verdict(libc::SYS_ioctl, 0, [0; 6]), Made);
    }

    #[test]
    fn arguments_are_looked_at_and_arithmetic_is_done() {
        // Denied if the low half of the second argument, masked and shifted, is above 4.
        let filter = vec![
            instruction(0x20, 0, 0, 24),
            instruction(0x54, 0, 0, 0xff0),
            instruction(0x74, 0, 0, 4),
            instruction(0x02, 0, 0, 3),
            instruction(0x61, 0, 0, 3),
            instruction(0x87, 0, 0, 0),
            instruction(0x25, 0, 1, 4),
            instruction(0x06, 0, 0, libc::SECCOMP_RET_ERRNO | 7),
            instruction(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let filters = Filters::Known(vec![filter]);
        assert_eq!(filters.verdict(1, 0, [0, 0x4f, 0, 0, 0, 0]), Verdict::Made);
        assert_eq!(filters.verdict(1, 0, [0, 0x50, 0, 0, 0, 0]), Verdict::Fails(7));
    }

    #[test]
    fn what_is_no_filter_is_harmful() {
        let broken: [Vec<Instruction>; 5] = [
            vec![],
            vec![instruction(0x05, 0, 0, u32::MAX)],
            vec![instruction(0x20, 0, 0, 64)],
            vec![instruction(0x60, 0, 0, 16)],
            vec![instruction(0xff, 0, 0, 0)],
        ];
        for filter in broken {
            assert_eq!(
                Filters::Known(vec![filter.clone()]).verdict(1, 0, [0; 6]),
                Verdict::Harmful,
                "{filter:?}"
            );
        }
    }
}
