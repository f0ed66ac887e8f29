//! One thread of another process, stopped with ptrace. All of it runs on the one thread of ours that stopped
//! it.

use super::{
    filter::{self, Filters, Instruction, Verdict},
    frame,
    gadget::Gadgets,
};
use crate::{proc, process::PidFd};
use nix::libc::{self, user_regs_struct as Registers};
use std::{fs, io, mem::MaybeUninit, ptr, sync::Arc};

/// The kernel's code segment for 64-bit programs.
const USER_CS: u64 = 0x33;

/// Room for the extended state: AMX, the largest so far, makes it 11 KiB.
const STATE: usize = 1 << 16;

/// The extended state, among the register sets (`elf.h`).
const NT_X86_XSTATE: usize = 0x202;

/// Copies one of a thread's seccomp filters out, or says how many instructions it has (`ptrace(2)`).
const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;

/// How many bytes the instruction `syscall` has: filters see the address after it.
const SYSCALL_BYTES: u64 = 2;

/// Signals that the thread raises by itself are never blocked: the kernel would reset their handlers.
const SYNCHRONOUS: [i32; 6] =
    [libc::SIGTRAP, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGSYS];

/// A stopped thread. Dropped, it goes on as if nothing had been.
pub(super) struct Traced {
    process: Arc<PidFd>,
    tid: i32,
    gadgets: Gadgets,
    filters: Filters,
    own: Registers,
    mask: u64,
    /// Where the frame is that leads back, once a call has been made.
    frame: Option<u64>,
    /// A stop that somebody else asked for and that we swallowed.
    stop_asked: bool,
}

/// How a thread stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stop {
    /// We asked for it, or the whole process was stopped.
    Asked,
    /// At the entry or the exit of a system call.
    Call,
    /// A signal is about to be delivered.
    Signal(i32),
}

impl Traced {
    /// Seizes the thread and stops it, however long that takes.
    pub(super) fn stop(process: Arc<PidFd>, tid: i32, gadgets: Gadgets) -> io::Result<Self> {
        request(libc::PTRACE_SEIZE, tid, 0, libc::PTRACE_O_TRACESYSGOOD as usize)?;
        request(libc::PTRACE_INTERRUPT, tid, 0, 0)?;
        loop {
            match wait(tid)? {
                Stop::Asked => break,
                Stop::Call => request(libc::PTRACE_CONT, tid, 0, 0)?,
                Stop::Signal(signal) => request(libc::PTRACE_CONT, tid, 0, signal as usize)?,
            };
        }
        let own = registers(tid)?;
        if own.cs != USER_CS {
            let text = format!("thread {tid} does not run 64-bit code");
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        let mask = signal_mask(tid)?;
        let filters = filters(&process, tid)?;
        Ok(Self { process, tid, gadgets, filters, own, mask, frame: None, stop_asked: false })
    }

    /// Makes a system call, unless a seccomp filter of the thread has something against it: it might kill the
    /// process for it.
    pub(super) fn syscall(&mut self, number: i64, arguments: [u64; 6]) -> io::Result<u64> {
        match self.filters.verdict(number, self.gadgets.syscall + SYSCALL_BYTES, arguments) {
            Verdict::Made => {}
            Verdict::Fails(errno) => return Err(io::Error::from_raw_os_error(errno)),
            Verdict::Harmful => return Err(filter::not_tried(self.process.pid(), number, &self.filters)),
        }
        self.prepare(number, arguments)?;
        self.finish()
    }

    /// Points the registers at the call. From here on the thread needs us no more: left alone it makes the
    /// call and goes on where it was found.
    fn prepare(&mut self, number: i64, arguments: [u64; 6]) -> io::Result<()> {
        let stack = match self.frame {
            Some(address) => address,
            None => {
                let state = extended_state(self.tid)?;
                let frame = frame::build(&self.own, self.mask, &state, self.gadgets.sigreturn);
                self.process.write_memory(frame.address, &frame.bytes)?;
                frame.address
            }
        };
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let rax = number as u64;
        let rip = self.gadgets.syscall;
        // No call is being interrupted any more: nothing to restart.
        let orig_rax = u64::MAX;
        let call = Registers { rax, orig_rax, rip, rsp: stack, rdi, rsi, rdx, r10, r8, r9, ..self.own };
        set_registers(self.tid, &call)?;
        self.frame = Some(stack);
        let synchronous = SYNCHRONOUS.iter().fold(0_u64, |mask, signal| mask | 1 << (signal - 1));
        set_signal_mask(self.tid, self.mask | !synchronous)
    }

    fn finish(&mut self) -> io::Result<u64> {
        self.run_to_call_stop()?;
        self.run_to_call_stop()?;
        match registers(self.tid)?.rax as i64 {
            error @ -4095..=-1 => Err(io::Error::from_raw_os_error(-error as i32)),
            result => Ok(result as u64),
        }
    }

    /// Runs to the next entry or exit of a system call. Signals other than those of a stop are blocked
    /// meanwhile.
    fn run_to_call_stop(&mut self) -> io::Result<()> {
        loop {
            request(libc::PTRACE_SYSCALL, self.tid, 0, 0)?;
            match wait(self.tid)? {
                Stop::Call => return Ok(()),
                Stop::Asked => {}
                Stop::Signal(signal) => self.postpone(signal),
            }
        }
    }

    fn postpone(&mut self, signal: i32) {
        self.stop_asked |= signal == libc::SIGSTOP;
        if signal != libc::SIGSTOP {
            // Raised by the thread itself or sent before the mask was set: sent again when all is over, it
            // stays pending until the mask is back.
            send(self.process.pid(), self.tid, signal);
        }
    }

    /// Puts everything back and lets the thread go.
    fn release(&mut self) -> io::Result<()> {
        if self.frame.is_some() {
            // Only in a stop of this kind does the kernel look, on the way out, whether a call is to be
            // restarted.
            request(libc::PTRACE_INTERRUPT, self.tid, 0, 0)?;
            loop {
                request(libc::PTRACE_CONT, self.tid, 0, 0)?;
                match wait(self.tid)? {
                    Stop::Asked => break,
                    Stop::Call => {}
                    Stop::Signal(signal) => self.postpone(signal),
                }
            }
            set_signal_mask(self.tid, self.mask)?;
            set_registers(self.tid, &self.own)?;
        }
        request(libc::PTRACE_DETACH, self.tid, 0, 0)?;
        if self.stop_asked {
            send(self.process.pid(), self.tid, libc::SIGSTOP);
        }
        Ok(())
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        // Where this fails the thread is gone, or finds back through its frame when our thread ends.
        drop(self.release());
    }
}

fn request(request: libc::c_uint, tid: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: the requests made through here (SEIZE, INTERRUPT, SYSCALL, CONT, DETACH) take plain numbers.
    unsafe { ptrace(request, tid, address, data) }
}

/// The seccomp filters of a stopped thread. It cannot get more while it is stopped, except by a call of
/// another thread (`SECCOMP_FILTER_FLAG_TSYNC`), which QEMU makes before it runs a guest.
fn filters(process: &PidFd, tid: i32) -> io::Result<Filters> {
    let status = fs::read_to_string(process.proc_path(format!("task/{tid}/status")))?;
    // A kernel without seccomp says nothing.
    if matches!(proc::value(&status, "Seccomp"), None | Some("0")) {
        return Ok(Filters::Known(Vec::new()));
    }
    let mut known = Vec::new();
    loop {
        match filter_at(tid, known.len()) {
            Ok(filter) => known.push(filter),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && !known.is_empty() => {
                return Ok(Filters::Known(known));
            }
            Err(_) => return Ok(Filters::Unknown),
        }
    }
}

/// One of them, the newest first.
fn filter_at(tid: i32, index: usize) -> io::Result<Vec<Instruction>> {
    let length = |into: *mut Instruction| {
        // SAFETY: the request fills nothing where it is given no address, else as many instructions as it
        // said before: the thread is stopped, and so its filters stay as they are.
        let said = unsafe { libc::ptrace(PTRACE_SECCOMP_GET_FILTER, tid, index, into) };
        usize::try_from(said).map_err(|_| io::Error::last_os_error())
    };
    let mut filter = vec![Instruction::default(); length(ptr::null_mut())?];
    let filled = length(filter.as_mut_ptr())?;
    if filled == filter.len() { Ok(filter) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// # Safety
/// `address` and `data` must be what the request wants.
unsafe fn ptrace(request: libc::c_uint, tid: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: as promised by the caller.
    let result = unsafe { libc::ptrace(request, tid, address, data) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn wait(tid: i32) -> io::Result<Stop> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is ours.
        let waited = unsafe { libc::waitpid(tid, &mut status, libc::__WALL) };
        if waited == tid {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    if !libc::WIFSTOPPED(status) {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(match (libc::WSTOPSIG(status), status >> 16) {
        (_, libc::PTRACE_EVENT_STOP) => Stop::Asked,
        (signal, _) if signal == libc::SIGTRAP | 0x80 => Stop::Call,
        (signal, _) => Stop::Signal(signal),
    })
}

fn registers(tid: i32) -> io::Result<Registers> {
    let mut registers = MaybeUninit::<Registers>::zeroed();
    // SAFETY: the request fills a `user_regs_struct`, for which any bits, zeros included, are valid.
    unsafe {
        ptrace(libc::PTRACE_GETREGS, tid, 0, registers.as_mut_ptr() as usize)?;
        Ok(registers.assume_init())
    }
}

fn set_registers(tid: i32, registers: &Registers) -> io::Result<()> {
    // SAFETY: the request reads a `user_regs_struct`.
    unsafe { ptrace(libc::PTRACE_SETREGS, tid, 0, ptr::from_ref(registers) as usize) }
}

fn extended_state(tid: i32) -> io::Result<Vec<u8>> {
    let mut state = vec![0_u8; STATE];
    let mut buffer = libc::iovec { iov_base: state.as_mut_ptr().cast(), iov_len: state.len() };
    // SAFETY: the request fills at most `iov_len` bytes of a buffer that is ours, and says in `iov_len` how
    // many.
    unsafe {
        let kind = NT_X86_XSTATE;
        ptrace(libc::PTRACE_GETREGSET, tid, kind, ptr::from_mut(&mut buffer) as usize)?;
    }
    state.truncate(buffer.iov_len);
    Ok(state)
}

fn signal_mask(tid: i32) -> io::Result<u64> {
    let mut mask = 0_u64;
    // SAFETY: the request fills a signal set of the 8 bytes that are announced.
    unsafe { ptrace(libc::PTRACE_GETSIGMASK, tid, size_of::<u64>(), ptr::from_mut(&mut mask) as usize) }?;
    Ok(mask)
}

fn set_signal_mask(tid: i32, mask: u64) -> io::Result<()> {
    // SAFETY: the request reads a signal set of the 8 bytes that are announced.
    unsafe { ptrace(libc::PTRACE_SETSIGMASK, tid, size_of::<u64>(), ptr::from_ref(&mask) as usize) }
}

fn send(pid: i32, tid: i32, signal: i32) {
    // SAFETY: takes plain numbers. It fails only if the thread is gone.
    unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        common::{self, Guest},
        inject::gadget,
    };

    #[test]
    #[ignore = "not a test: the process that the tests experiment on"]
    fn role() {
        common::play();
    }

    /// Where we die.
    #[derive(Clone, Copy, Debug)]
    enum Dies {
        Prepared,
        Entered,
        Returned,
    }

    /// Borrows the guest's thread and dies in the middle: a tracer is a thread, so its end is a tracer's end.
    fn borrow_and_die(guest: &Guest, at: Dies) {
        let (process, tid) = (Arc::clone(&guest.process), guest.tid);
        let tracer = move || {
            let gadgets = gadget::find(&process).unwrap();
            let mut traced = Traced::stop(process, tid, gadgets).unwrap();
            traced.prepare(libc::SYS_getpid, [1, 2, 3, 4, 5, 6]).unwrap();
            if !matches!(at, Dies::Prepared) {
                traced.run_to_call_stop().unwrap();
            }
            if matches!(at, Dies::Returned) {
                traced.run_to_call_stop().unwrap();
            }
            std::mem::forget(traced);
        };
        std::thread::spawn(tracer).join().unwrap();
        // A thread can be joined a little before the kernel lets go of those that it traced.
        while status(guest, "TracerPid:") != "TracerPid:\t0" {
            std::thread::yield_now();
        }
    }

    /// A line of what the kernel says of the guest's thread.
    fn status(guest: &Guest, line: &str) -> String {
        let path = guest.process.proc_path(format!("task/{}/status", guest.tid));
        let status = std::fs::read_to_string(path).unwrap();
        status.lines().find(|told| told.starts_with(line)).unwrap().to_owned()
    }

    #[test]
    fn a_thread_whose_borrower_dies_finds_back_by_itself() {
        let mut guest = Guest::start_as("inject::thread::tests::role", 1);
        let blocked = status(&guest, "SigBlk:");
        for at in [Dies::Prepared, Dies::Entered, Dies::Returned] {
            // It waits for an order in read(2), which goes on waiting.
            borrow_and_die(&guest, at);
            assert_eq!(guest.ask("write 0"), "done", "{at:?}");
            // It computes, and keeps every register.
            guest.order("compute 500");
            (0..50).for_each(|_| borrow_and_die(&guest, at));
            assert_eq!(guest.answer(), "0", "{at:?}");
            // A wait with a timeout ends early, as by any signal.
            guest.order("poll 300");
            std::thread::sleep(std::time::Duration::from_millis(100));
            borrow_and_die(&guest, at);
            let answer = guest.answer();
            assert!(answer.starts_with("-1 ") || answer.starts_with("0 "), "{at:?}: {answer}");
            assert_eq!(status(&guest, "SigBlk:"), blocked, "{at:?}");
        }
    }
}
