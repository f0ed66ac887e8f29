//! The kernel's structs and ioctl numbers, as in `linux/kvm.h` and `asm/kvm.h` of x86-64.

use nix::libc;
use std::{
    io,
    mem::size_of,
    os::fd::{AsRawFd, BorrowedFd},
};

/// The only version of the interface that ever was.
pub(super) const API_VERSION: i32 = 12;

/// An ioctl without an argument, or with a plain number.
#[derive(Clone, Copy)]
pub(super) struct Plain(u64);

/// An ioctl that reads a `T` of ours.
pub(super) struct Set<T>(u64, std::marker::PhantomData<T>);

/// An ioctl that fills a `T` of ours.
pub(super) struct Get<T>(u64, std::marker::PhantomData<T>);

const KVMIO: u64 = 0xae << 8;

const fn io(nr: u64) -> Plain {
    Plain(KVMIO | nr)
}

const fn iow<T>(nr: u64) -> Set<T> {
    Set(1 << 30 | (size_of::<T>() as u64) << 16 | KVMIO | nr, std::marker::PhantomData)
}

const fn ior<T>(nr: u64) -> Get<T> {
    Get(2 << 30 | (size_of::<T>() as u64) << 16 | KVMIO | nr, std::marker::PhantomData)
}

pub(super) const GET_API_VERSION: Plain = io(0x00);
pub(super) const CREATE_VM: Plain = io(0x01);
pub(super) const GET_VCPU_MMAP_SIZE: Plain = io(0x04);
pub(super) const CREATE_VCPU: Plain = io(0x41);
pub(super) const SET_TSS_ADDR: Plain = io(0x47);
pub(super) const RUN: Plain = io(0x80);
pub(super) const SET_USER_MEMORY_REGION: Set<UserMemoryRegion> = iow(0x46);
pub(super) const GET_REGS: Get<Regs> = ior(0x81);
pub(super) const SET_REGS: Set<Regs> = iow(0x82);
pub(super) const GET_SREGS: Get<Sregs> = ior(0x83);
pub(super) const SET_SREGS: Set<Sregs> = iow(0x84);
// The kernel's struct ends in an array without a length, which does not count in the ioctl's number.
pub(super) const SET_SIGNAL_MASK: Set<SignalMask> =
    Set(1 << 30 | 4 << 16 | KVMIO | 0x8b, std::marker::PhantomData);

const _: () = {
    assert!(SET_USER_MEMORY_REGION.0 == 0x4020_ae46);
    assert!(GET_REGS.0 == 0x8090_ae81 && SET_REGS.0 == 0x4090_ae82);
    assert!(GET_SREGS.0 == 0x8138_ae83 && SET_SREGS.0 == 0x4138_ae84);
    assert!(SET_SIGNAL_MASK.0 == 0x4004_ae8b);
    assert!(CREATE_VM.0 == 0xae01 && CREATE_VCPU.0 == 0xae41 && RUN.0 == 0xae80);
    // The mask must follow the length without a gap.
    assert!(size_of::<SignalMask>() == 12);
};

/// Where `exit_reason` is in `struct kvm_run`.
pub(super) const RUN_EXIT_REASON: usize = 8;
/// The vCPU executed `hlt`.
pub(super) const EXIT_HLT: u32 = 5;

/// The one bit of RFLAGS that is always set.
pub(super) const RFLAGS_RESERVED: u64 = 1 << 1;
pub(super) const CR0_PE: u64 = 1 << 0;
pub(super) const CR0_ET: u64 = 1 << 4;
pub(super) const CR0_NE: u64 = 1 << 5;
pub(super) const CR0_PG: u64 = 1 << 31;
pub(super) const CR4_PAE: u64 = 1 << 5;
pub(super) const EFER_LME: u64 = 1 << 8;
pub(super) const EFER_LMA: u64 = 1 << 10;
pub(super) const PTE_PRESENT: u64 = 1 << 0;
pub(super) const PTE_WRITE: u64 = 1 << 1;
pub(super) const PTE_ACCESSED: u64 = 1 << 5;
pub(super) const PTE_DIRTY: u64 = 1 << 6;
pub(super) const PTE_LARGE: u64 = 1 << 7;

/// `struct kvm_userspace_memory_region`
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct UserMemoryRegion {
    pub(super) slot: u32,
    pub(super) flags: u32,
    pub(super) guest_phys_addr: u64,
    pub(super) memory_size: u64,
    pub(super) userspace_addr: u64,
}

/// `struct kvm_regs`
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Regs {
    pub(super) rax: u64,
    pub(super) rbx: u64,
    pub(super) rcx: u64,
    pub(super) rdx: u64,
    pub(super) rsi: u64,
    pub(super) rdi: u64,
    pub(super) rsp: u64,
    pub(super) rbp: u64,
    pub(super) r8_to_r15: [u64; 8],
    pub(super) rip: u64,
    pub(super) rflags: u64,
}

/// `struct kvm_segment`
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Segment {
    pub(super) base: u64,
    pub(super) limit: u32,
    pub(super) selector: u16,
    pub(super) kind: u8,
    pub(super) present: u8,
    pub(super) dpl: u8,
    pub(super) db: u8,
    pub(super) s: u8,
    pub(super) l: u8,
    pub(super) g: u8,
    pub(super) avl: u8,
    pub(super) unusable: u8,
    pub(super) padding: u8,
}

/// `struct kvm_sregs`
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Sregs {
    pub(super) cs: Segment,
    pub(super) ds: Segment,
    pub(super) es: Segment,
    pub(super) fs: Segment,
    pub(super) gs: Segment,
    pub(super) ss: Segment,
    pub(super) tr: Segment,
    pub(super) ldt: Segment,
    /// The two descriptor tables: base, limit and padding each.
    pub(super) gdt_idt: [u64; 4],
    pub(super) cr0: u64,
    pub(super) cr2: u64,
    pub(super) cr3: u64,
    pub(super) cr4: u64,
    pub(super) cr8: u64,
    pub(super) efer: u64,
    pub(super) apic_base: u64,
    pub(super) interrupt_bitmap: [u64; 4],
}

/// `struct kvm_signal_mask` with the kernel's 64 signals.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub(super) struct SignalMask {
    pub(super) len: u32,
    pub(super) blocked: u64,
}

pub(super) fn plain(fd: BorrowedFd<'_>, call: Plain, arg: u64) -> io::Result<i32> {
    // SAFETY: the `Plain` calls take a number, not an address (`KVM_RUN` writes only to the vCPU's own shared
    // page and to guest RAM, which `TinyGuest` owns).
    check(unsafe { libc::ioctl(fd.as_raw_fd(), call.0 as _, arg) })
}

pub(super) fn set<T>(fd: BorrowedFd<'_>, call: Set<T>, value: &T) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as the call's number says, which is the size of `T` (asserted
    // above).
    check(unsafe { libc::ioctl(fd.as_raw_fd(), call.0 as _, std::ptr::from_ref(value)) }).map(drop)
}

pub(super) fn get<T>(fd: BorrowedFd<'_>, call: Get<T>, value: &mut T) -> io::Result<()> {
    // SAFETY: the kernel writes as many bytes as the call's number says, which is the size of `T` (asserted
    // above), and every bit pattern is a valid `T`: they are all integers.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), call.0 as _, std::ptr::from_mut(value)) }).map(drop)
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
