//! The signal frame from which a borrowed thread finds back without us: `struct rt_sigframe` of x86-64.

use nix::libc::user_regs_struct as Registers;

/// What the x86-64 ABI lets a function use below its stack pointer.
const RED_ZONE: u64 = 128;

/// Where the kernel keeps its own words in the legacy part of the extended state.
const SOFTWARE: usize = 464;

const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;
const UC_FP_XSTATE: u64 = 1;
const UC_SIGCONTEXT_SS: u64 = 2;
const UC_STRICT_RESTORE_SS: u64 = 4;

/// Stack flags that no kernel accepts, so that the thread's alternate stack, which we cannot know, stays as
/// it is.
const SS_INVALID: u64 = 0x7fff_ffff;

/// Return address, `ucontext` and `siginfo`.
const FRAME: u64 = 8 + 40 + 256 + 8 + 128;

/// Bytes to be written to a stack.
pub(super) struct Frame {
    /// The lowest address. The stack pointer for the borrowed call: what is there is its return address.
    pub(super) address: u64,
    /// What to write there.
    pub(super) bytes: Vec<u8>,
}

/// A frame below the stack of a thread that had `registers`, `mask` and `state` (`NT_X86_XSTATE`) when it was
/// stopped. It begins with `trampoline` as the return address.
pub(super) fn build(registers: &Registers, mask: u64, state: &[u8], trampoline: u64) -> Frame {
    let floor = registers.rsp - RED_ZONE;
    let state_at = (floor - state.len() as u64 - 4) & !63;
    // After the `ret` the stack pointer is a multiple of 16, as in every signal handler.
    let address = ((state_at - FRAME) & !15) - 8;

    let (rip, rax) = restarted(registers);
    let r = registers;
    let selectors = (r.cs & 0xffff) | (r.ss & 0xffff) << 48;
    let mut words = vec![trampoline];
    words.extend([UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS, 0]);
    words.extend([0, SS_INVALID, 0]);
    words.extend([r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15]);
    words.extend([r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, rax, r.rcx, r.rsp, rip, r.eflags]);
    words.extend([selectors, 0, 0, mask, 0, state_at]);
    words.extend([0; 8]);
    words.push(mask);
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.resize((state_at - address) as usize, 0);
    bytes.extend(marked(state));
    Frame { address, bytes }
}

/// The extended state as the kernel lays it out in a signal frame: its software words say how long it is, and
/// a second magic number follows it.
fn marked(state: &[u8]) -> Vec<u8> {
    let mut bytes = state.to_vec();
    let size = state.len() as u32;
    // ptrace puts the mask of the features where the frame has its first magic number.
    let features: [u8; 8] =
        state.get(SOFTWARE..SOFTWARE + 8).and_then(|b| b.try_into().ok()).unwrap_or_default();
    if let Some(software) = bytes.get_mut(SOFTWARE..SOFTWARE + 48) {
        software.fill(0);
        software[..4].copy_from_slice(&FP_XSTATE_MAGIC1.to_ne_bytes());
        software[4..8].copy_from_slice(&(size + 4).to_ne_bytes());
        software[8..16].copy_from_slice(&features);
        software[16..20].copy_from_slice(&size.to_ne_bytes());
    }
    bytes.extend(FP_XSTATE_MAGIC2.to_ne_bytes());
    bytes
}

/// Where the thread goes on and with what in `rax`. Outside of a frame the kernel restarts an interrupted
/// call by itself; here this is done for it, as `arch_do_signal_or_restart` does it before a handler runs.
fn restarted(registers: &Registers) -> (u64, u64) {
    const ERESTARTSYS: i64 = -512;
    const ERESTARTNOINTR: i64 = -513;
    const ERESTARTNOHAND: i64 = -514;
    const ERESTART_RESTARTBLOCK: i64 = -516;
    let in_call = registers.orig_rax as i64 >= 0;
    match registers.rax as i64 {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND if in_call => (registers.rip - 2, registers.orig_rax),
        // A return from a signal handler forgets how far the call had come, so it must end as interrupted.
        ERESTART_RESTARTBLOCK if in_call => (registers.rip, -i64::from(nix::libc::EINTR) as u64),
        _ => (registers.rip, registers.rax),
    }
}
