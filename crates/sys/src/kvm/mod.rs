//! A tiny KVM guest: whether KVM really runs code here, how fast, and whether a tracker sees what a vCPU
//! writes.
//!
//! `/dev/kvm` can exist and be useless: a nested KVM without hardware help was seen to interpret 1.4 million
//! instructions a second. So nothing is concluded from the file; a guest in long mode counts, and is timed.
//!
//! The interface is the kernel's `Documentation/virt/kvm/api.rst`.

mod deadline;
mod mapping;
mod native;

use kvm_bindings::{
    KVM_API_VERSION, KVM_EXIT_HLT, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use mapping::Mapping;
use std::{io, os::fd::AsFd, time::Duration};
use units::{Bytes, PAGE_SIZE, PageRange};

/// From this share of the processor's own speed on KVM is worth using: a two-instruction loop in a guest
/// against the same loop outside, both by processor time, so that whatever else runs on the machine does not
/// matter.
///
/// With the hardware's help the two are alike, since the loop never leaves the guest; also inside a machine
/// that is emulated itself (40 to 150 million turns a second there, in either). Software emulation is 10 to
/// 50 times slower than the processor, an interpreting KVM 1,000 times.
pub const USABLE_SHARE: f64 = 0.1;

/// Turns by which the processor itself is measured: a millisecond's.
const NATIVE_TURNS: u64 = 2_000_000;

/// Processor time after which a run says enough, and how often a machine is asked that is too busy to give it
/// that.
const ENOUGH: Duration = Duration::from_millis(5);
const ATTEMPTS: usize = 5;

/// How much RAM the tiny guest has. One page directory covers up to 1 GiB; this is plenty for the tracker's
/// test.
const RAM: Bytes = Bytes(8 << 20);
/// Guest-physical pages of the three page tables and of the code.
const PML4: u64 = 1;
const PDPT: u64 = 2;
const PD: u64 = 3;
const CODE: u64 = 4;
/// The one bit of RFLAGS that is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const PTE_PRESENT: u64 = 1 << 0;
const PTE_WRITE: u64 = 1 << 1;
const PTE_ACCESSED: u64 = 1 << 5;
const PTE_DIRTY: u64 = 1 << 6;
const PTE_LARGE: u64 = 1 << 7;
/// The first page that [`TinyGuest::touch`] may write: those before it hold tables and code.
pub const FIRST_FREE_PAGE: u64 = 16;

/// `1: dec rcx; jnz 1b; hlt`
const COUNT: [u8; 6] = [0x48, 0xff, 0xc9, 0x75, 0xfb, 0xf4];
/// `1: mov [rdi], rax; add rdi, rsi; dec rcx; jnz 1b; hlt`
const TOUCH: [u8; 12] = [0x48, 0x89, 0x07, 0x48, 0x01, 0xf7, 0x48, 0xff, 0xc9, 0x75, 0xf5, 0xf4];
/// Where `TOUCH` begins within the code page.
const TOUCH_AT: u64 = 64;

/// Why no guest ran.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The kernel offers no KVM.
    #[error("there is no /dev/kvm")]
    Absent,
    /// It is there, but not for us.
    #[error("/dev/kvm cannot be opened: {0}")]
    Refused(#[source] io::Error),
    /// A step of making the guest or running it failed.
    #[error("KVM cannot {what}: {why}")]
    Broken {
        /// The step, such as `create a vCPU`.
        what: &'static str,
        /// The kernel's answer.
        why: io::Error,
    },
    /// The vCPU left for a reason other than the halt at the end.
    #[error("the vCPU of a tiny guest left with exit reason {0} instead of halting")]
    Exit(u32),
}

/// How far a run came.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Ran {
    /// Turns of the loop that were made.
    pub turns: u64,
    /// How much processor time it took.
    pub time: Duration,
    /// Turns a second that the processor makes without KVM; 0 if that was not looked at.
    pub native: f64,
    /// Whether the guest came to its end; otherwise the time was up.
    pub finished: bool,
}

impl Ran {
    /// Turns a second.
    pub fn speed(&self) -> f64 {
        self.turns as f64 / self.time.as_secs_f64().max(1e-9)
    }

    /// Whether KVM is worth using at this speed.
    pub fn usable(&self) -> bool {
        self.speed() >= self.native * USABLE_SHARE
    }
}

/// Runs a tiny guest for about half a second at most and says how far it came.
pub fn measure() -> Result<Ran, KvmError> {
    let mut guest = TinyGuest::new()?;
    let mut attempts = 0;
    loop {
        attempts += 1;
        let native = step("be timed", native::speed(NATIVE_TURNS))?;
        // On a good host this takes a hundredth of a second; an interpreter is interrupted.
        let ran = guest.count(20_000_000, Duration::from_millis(500))?;
        if ran.finished || ran.time >= ENOUGH || attempts == ATTEMPTS {
            return Ok(Ran { native, ..ran });
        }
    }
}

/// One vCPU in long mode, with identity-mapped RAM in a memfd of its own. It runs only code of ours.
#[derive(Debug)]
pub struct TinyGuest {
    // In the order in which they must go: KVM forgets the RAM's address before the RAM is unmapped.
    vcpu: VcpuFd,
    _vm: VmFd,
    ram: Mapping,
}

impl TinyGuest {
    /// Makes the guest.
    pub fn new() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|e| match io::Error::from(e) {
            e if e.kind() == io::ErrorKind::NotFound => KvmError::Absent,
            e => KvmError::Refused(e),
        })?;
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            let why = io::Error::other(format!("its interface is version {version}, not {KVM_API_VERSION}"));
            return Err(KvmError::Broken { what: "be spoken to", why });
        }
        let vm = step("create a VM", kvm.create_vm())?;
        // Old Intel processors need three pages for themselves to enter real mode; elsewhere it is not known,
        // and this guest never enters real mode: a refusal does not matter.
        let _ = vm.set_tss_address(0xfffb_d000);

        let file = step("have RAM", mapping::memfd("whimbrel-tiny-guest", RAM))?;
        let mut ram = step("have RAM", Mapping::shared(file.as_fd(), RAM.0 as usize))?;
        lay_out(&mut ram);
        let slot = kvm_userspace_memory_region {
            userspace_addr: ram.address() as u64,
            memory_size: RAM.0,
            ..Default::default()
        };
        // SAFETY: `ram` is mapped there, and stays so for longer than the VM is there.
        step("take guest RAM", unsafe { vm.set_user_memory_region(slot) })?;

        let vcpu = step("create a vCPU", vm.create_vcpu(0))?;
        let mut sregs = step("read segments", vcpu.get_sregs())?;
        enter_long_mode(&mut sregs);
        step("set segments", vcpu.set_sregs(&sregs))?;
        Ok(Self { vcpu, _vm: vm, ram })
    }

    /// Makes `turns` turns of an empty loop, for at most `limit`.
    pub fn count(&mut self, turns: u64, limit: Duration) -> Result<Ran, KvmError> {
        self.go(0, kvm_regs { rcx: turns, ..Default::default() }, limit)
    }

    /// Writes `value` at the beginning of each page of `pages`, for at most `limit`. Panics for pages that
    /// the guest does not have or that hold its code.
    pub fn touch(&mut self, pages: PageRange, value: u64, limit: Duration) -> Result<Ran, KvmError> {
        let all = RAM.0 / PAGE_SIZE as u64;
        assert!(pages.fits(all) && pages.start.0 >= FIRST_FREE_PAGE, "{pages} of {FIRST_FREE_PAGE}..{all}");
        let regs = kvm_regs {
            rax: value,
            rcx: pages.count,
            rdi: pages.start.offset(),
            rsi: PAGE_SIZE as u64,
            ..Default::default()
        };
        self.go(TOUCH_AT, regs, limit)
    }

    /// Where its RAM is mapped in this process, and how much there is: what KVM writes through.
    pub fn ram(&self) -> (usize, Bytes) {
        (self.ram.address(), RAM)
    }

    fn go(&mut self, entry: u64, regs: kvm_regs, limit: Duration) -> Result<Ran, KvmError> {
        let turns = regs.rcx;
        if turns == 0 {
            // The loop would wrap round.
            return Ok(Ran { turns, time: Duration::ZERO, native: 0.0, finished: true });
        }
        let regs = kvm_regs { rip: CODE * PAGE_SIZE as u64 + entry, rflags: RFLAGS_RESERVED, ..regs };
        step("set registers", self.vcpu.set_regs(&regs))?;
        let (left_on_its_own, time) = step("run", deadline::run(&mut self.vcpu, limit))?;
        if left_on_its_own {
            let reason = self.vcpu.get_kvm_run().exit_reason;
            if reason != KVM_EXIT_HLT {
                return Err(KvmError::Exit(reason));
            }
        }
        let after = step("read registers", self.vcpu.get_regs())?;
        Ok(Ran { turns: turns.saturating_sub(after.rcx), time, native: 0.0, finished: left_on_its_own })
    }
}

/// Page tables that map the first GiB onto itself in 2 MiB pages, and the code.
fn lay_out(ram: &mut Mapping) {
    let at = |page: u64| page as usize * PAGE_SIZE;
    // Accessed and dirty already: the processor has nothing to write into the tables.
    let flags = PTE_PRESENT | PTE_WRITE | PTE_ACCESSED | PTE_DIRTY;
    ram.write(at(PML4), &((PDPT * PAGE_SIZE as u64) | flags).to_le_bytes());
    ram.write(at(PDPT), &((PD * PAGE_SIZE as u64) | flags).to_le_bytes());
    for i in 0..512u64 {
        let entry = (i << 21) | flags | PTE_LARGE;
        ram.write(at(PD) + i as usize * 8, &entry.to_le_bytes());
    }
    ram.write(at(CODE), &COUNT);
    ram.write(at(CODE) + TOUCH_AT as usize, &TOUCH);
}

/// Flat segments, paging on, 64-bit code. What KVM gave for the task register and the tables is right as it
/// is.
fn enter_long_mode(sregs: &mut kvm_sregs) {
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: 0x08, type_: 11, db: 0, l: 1, ..data };
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data;
    }
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
    sregs.cr3 = PML4 * PAGE_SIZE as u64;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

fn step<T, E: Into<io::Error>>(what: &'static str, result: Result<T, E>) -> Result<T, KvmError> {
    result.map_err(|why| KvmError::Broken { what, why: why.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speed_is_turns_by_time_and_never_divides_by_nothing() {
        let ran = |turns, ms, native| Ran { turns, time: Duration::from_millis(ms), native, finished: true };
        assert!(ran(20_000_000, 10, 3e9).usable());
        assert!(!ran(350_000, 500, 3e9).usable(), "an interpreting KVM");
        for turns in [62, 105, 150] {
            assert!(
                ran(turns * 100_000, 100, 110e6).usable(),
                "as fast as the emulated machine that it is in"
            );
        }
        assert!(!ran(0, 0, 3e9).usable() && ran(1, 0, 3e9).speed().is_finite());
    }

    #[test]
    fn both_loops_jump_back_to_their_own_beginning() {
        for (code, from) in [(&COUNT[..], 5), (&TOUCH[..], 11)] {
            assert_eq!(code[from - 2], 0x75);
            assert_eq!(from as i64 + i64::from(code[from - 1] as i8), 0);
            assert_eq!(code[from], 0xf4, "then it halts");
        }
    }

    #[test]
    fn the_tables_map_every_byte_of_ram_onto_itself() {
        let file = mapping::memfd("tables", RAM).unwrap();
        let mut ram = Mapping::shared(file.as_fd(), RAM.0 as usize).unwrap();
        lay_out(&mut ram);
        let entry = |table: u64, index: u64| {
            let bytes = ram.read::<8>((table + index * 8) as usize);
            u64::from_le_bytes(bytes)
        };
        for address in [0, PAGE_SIZE as u64 * CODE, (2 << 20) + 5, RAM.0 - 1] {
            let flags = PAGE_SIZE as u64 - 1;
            let pdpt = entry(PML4 * PAGE_SIZE as u64, address >> 39) & !flags;
            let pd = entry(pdpt, address >> 30 & 511) & !flags;
            let large = entry(pd, address >> 21 & 511);
            assert_eq!(large & PTE_LARGE, PTE_LARGE);
            assert_eq!((large & !0x1f_ffff) + (address & 0x1f_ffff), address);
        }
    }

    #[test]
    fn a_kvm_guest_counts_halts_and_is_interrupted() {
        let mut guest = match TinyGuest::new() {
            Ok(guest) => guest,
            Err(e) => return eprintln!("SKIPPED: {e}"),
        };
        let ran = guest.count(1000, Duration::from_secs(10)).unwrap();
        assert!(ran.finished && ran.turns == 1000, "{ran:?}");
        let ran = guest.count(u64::MAX, Duration::from_millis(50)).unwrap();
        assert!(!ran.finished && ran.turns > 0 && ran.time < Duration::from_secs(5), "{ran:?}");
    }
}
