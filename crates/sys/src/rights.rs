//! What a program is started without: another user's rights instead of ours, no capabilities, and system
//! calls that fail.
//!
//! All of it is done between `fork` and `exec`, where nothing but system calls may be made.

use crate::mounts::{Ids, owned};
use nix::libc;
use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    os::unix::process::CommandExt,
    process::Command,
};

/// What is taken from a program, and what it is given.
#[derive(Debug, Default)]
pub struct Rights {
    /// As whom it runs, without any capability; none: as we do.
    pub user: Option<Ids>,
    /// Capabilities that it cannot have, by the bits of their numbers.
    pub without: u64,
    /// Whether the calls of `DENIED` fail, and it is kept from other programs of its user (Landlock, where
    /// there is that).
    pub apart: bool,
    /// Whether who is kept apart may use io_uring all the same. What it is asked by that no filter sees: it
    /// cannot do what `DENIED` is about, but as attributes of files it may set who may open them.
    pub io_uring: bool,
    /// Whether it may set who opens the files that it has open: all of them are its own, and none shows as
    /// such that is root's.
    pub modes: bool,
    /// Descriptors that it inherits, under the numbers that they have here. No others, whoever has left them
    /// to us.
    pub inherits: Vec<OwnedFd>,
}

/// System calls that fail with EPERM in a program that is kept apart. Its user may own a file that shows as
/// its own (see [`crate::mounts::Tree::show_as`]) and is root's: it must not be made a program that runs as
/// root. The others act on other processes, or on what a process sees.
const DENIED: &[i64] = &[
    libc::SYS_chmod,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    452, // fchmodat2
    libc::SYS_chown,
    libc::SYS_fchown,
    libc::SYS_lchown,
    libc::SYS_fchownat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    463, // setxattrat
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_process_madvise,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
];

/// Its requests are read from memory, past every filter.
const IO_URING: &[i64] = &[libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];

/// The highest number of a capability that any kernel may have.
const CAPABILITIES: u64 = 64;

/// Has `command` start its program like that, in a session of its own: what ends us, or our terminal, does
/// not end it.
pub fn give(command: &mut Command, rights: Rights) {
    let filter = if rights.apart { filter(rights.io_uring, rights.modes) } else { Vec::new() };
    let domain = if rights.apart { domain() } else { None };
    let work = move || begin(&rights, &filter, domain.as_ref());
    // SAFETY: the child makes system calls only, with memory that was there before.
    unsafe { command.pre_exec(work) };
}

fn begin(rights: &Rights, filter: &[libc::sock_filter], domain: Option<&OwnedFd>) -> io::Result<()> {
    let done = |result: libc::c_long| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: each call gets numbers, or memory that lives until it returns.
    unsafe {
        done(libc::setsid().into())?;
        // All but standard input and output.
        done(libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC))?;
        for fd in &rights.inherits {
            done(libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0).into())?;
        }
        for number in (0..CAPABILITIES).filter(|number| rights.without & (1 << number) != 0) {
            // One that this kernel does not know nobody has.
            let _ = libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0);
        }
        let _ = libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
        if let Some(Ids { user, group }) = rights.user {
            done(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()))?;
            done(libc::syscall(libc::SYS_setresgid, group, group, group))?;
            done(libc::syscall(libc::SYS_setresuid, user, user, user))?;
            let header = CapHeader { version: CAP_VERSION, pid: 0 };
            let none = [0_u32; 6];
            done(libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()))?;
        }
        done(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
        if let Some(domain) = domain {
            done(libc::syscall(RESTRICT_SELF, domain.as_raw_fd(), 0))?;
        }
        if !filter.is_empty() {
            let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
            done(
                libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program, 0, 0).into(),
            )?;
        }
    }
    Ok(())
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

/// `_LINUX_CAPABILITY_VERSION_3` (`capget(2)`).
const CAP_VERSION: u32 = 0x2008_0522;

/// `AUDIT_ARCH_X86_64`: the only system calls that are known here.
const ARCHITECTURE: u32 = 0xc000_003e;

/// The bit of the numbers of x32.
const X32: u32 = 0x4000_0000;

/// As a filter of the kernel's (`seccomp(2)`).
fn filter(io_uring: bool, modes: bool) -> Vec<libc::sock_filter> {
    let fails = libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned();
    let step = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter { code: code as u16, jt, jf, k };
    let jump = |code: u32, k: u32, jt: u8| step(libc::BPF_JMP | code | libc::BPF_K, k, jt, 0);
    let load = |at: u32| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at, 0, 0);
    let answer = |k: u32| step(libc::BPF_RET | libc::BPF_K, k, 0, 0);
    // `struct seccomp_data`: the number, the architecture.
    let mut steps = vec![load(4), step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, ARCHITECTURE, 1, 0)];
    steps.push(answer(fails));
    steps.push(load(0));
    let calls = DENIED.iter().filter(|call| !modes || **call != libc::SYS_fchmod);
    let denied: Vec<i64> = calls.chain(IO_URING.iter().filter(|_| !io_uring)).copied().collect();
    let count = denied.len() as u8;
    // From the first step, so many to the failure at the end.
    steps.push(jump(libc::BPF_JGE, X32, count + 1));
    for (n, number) in denied.iter().enumerate() {
        steps.push(jump(libc::BPF_JEQ, *number as u32, count - n as u8));
    }
    steps.extend([answer(libc::SECCOMP_RET_ALLOW), answer(fails)]);
    steps
}

const CREATE_RULESET: libc::c_long = 444;
const RESTRICT_SELF: libc::c_long = 446;
/// Asks for the version of the interface.
const VERSION: u32 = 1;
/// `LANDLOCK_ACCESS_FS_MAKE_CHAR` and `_MAKE_BLOCK`.
const MAKE_DEVICES: u64 = 1 << 6 | 1 << 11;
/// `LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET` and `_SIGNAL`, from version 6 on.
const SCOPES: u64 = 1 << 0 | 1 << 1;

/// A Landlock domain: who is in it can trace, and from version 6 (Linux 6.12) on signal, only who is in it,
/// too. None where the kernel has no Landlock.
fn domain() -> Option<OwnedFd> {
    // `struct landlock_ruleset_attr`: files, network, scopes.
    let rules = [MAKE_DEVICES, 0, SCOPES];
    // SAFETY: the first call takes no memory, the second so much of ours.
    unsafe {
        let version = libc::syscall(CREATE_RULESET, std::ptr::null::<u64>(), 0_usize, VERSION);
        let bytes: usize = match version {
            ..=0 => return None,
            1..=5 => 8,
            _ => 24,
        };
        owned(libc::syscall(CREATE_RULESET, rules.as_ptr(), bytes, 0)).ok()
    }
}
