//! The laboratory in which whole migrations of real VMs are tested.
//!
//! Hosts are network namespaces, machines are real QEMU processes, and everything is gone when the story
//! ends.

mod agent; // an agent on a host
/// A guest without an operating system, which runs under any KVM.
pub mod bare;
mod channel; // to an agent in a guest
mod cli; // the command line of the program under test
mod client; // a TCP client whose connection must survive
mod console; // what a guest says on its serial line
mod cpio; // archives that a kernel unpacks
mod datastore; // a shared directory that is as fast as a story wants
/// A day of an ordinary Debian.
pub mod day;
mod error; // what was being done, and why it did not work
mod etcd; // a real etcd, and who loses what it says
mod faulty_dir; // a shared directory in which everything goes wrong
/// VMs as people start them.
pub mod field;
mod guest; // who a guest is, and how it is talked to wherever it runs
mod hand; // machines that a story starts by hand
mod huge_pages; // explicit huge pages of this machine
mod lab; // hosts and clients around one switch
mod late_disk; // a disk whose storage takes its time
mod migration; // a migration under way, and its report
mod namespace; // what makes a host
/// Programs run under another kernel than this machine's.
pub mod other_kernel;
mod process; // children that do not outlive their owner
mod qmp; // QEMU's monitor, for machines started by hand
mod reaper; // takes a laboratory down, whatever became of its owner
mod slow_disk; // a disk whose direct reads land when the story says so
mod stage; // hosts with agents, ready for stories about VMs
/// Real VMs, and everything that can be killed.
pub mod storm;
mod story; // the frame around every story
mod ticks; // a guest's ticks, heard outside
mod tools; // what is needed of the machine and the build
/// Two VMs, of which one is moved.
pub mod twin;
mod vcpu; // how long a vCPU was not held up
mod vm_file; // the file that describes a VM to `whimbrel run`

pub use agent::{Agent, Oddity, PORT, ask};
pub use channel::Channel;
pub use cli::{Answer, Cli};
pub use client::{ClientCounts, TcpClient, connect};
pub use console::Console;
pub use datastore::{Datastore, view::Call};
pub use error::{Doing, Error, Result};
pub use etcd::{EtcdServer, OnTheWay, Way, copy_dir};
pub use faulty_dir::{FaultyDir, Trouble};
pub use guest::{Guest, Probed, Progress, Spec, Times};
pub use hand::{HandStart, HandStarted, Ram};
pub use huge_pages::HugePages;
pub use lab::{Host, Lab, Traffic};
pub use late_disk::LateDisk;
pub use migration::{Migration, Report};
pub use namespace::{Namespace, run};
pub use process::{Process, wait_for};
pub use qmp::Qmp;
pub use slow_disk::SlowDisk;
pub use stage::{Stage, Traces};
pub use story::story;
pub use ticks::{Heard, Ticks};
pub use tools::{QEMU, Tools, machine_lacks, skip};
pub use vcpu::Vcpu;
pub use vm_file::VmFile;
