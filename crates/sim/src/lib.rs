//! Whole migrations in virtual time, in every storm that can be thought of: both sides' real state machines,
//! and models of all that they rely on. Nothing here waits, forks or opens a file; a run is a function of its
//! [`Schedule`].
//!
//! The state machines are proto's own: both ends, the link, and what comes after a round. What drives them in
//! the product has threads and sockets, so it is modelled here step by step; each file says what it mirrors.

mod check; // what must always be true, and in the end
mod driver; // what both sides' drivers do alike
mod durable; // what is on a disk, and what is on its way there
mod enumerate; // every storm of one or two faults
mod fault; // what the storm does
mod guest; // the model guest, and what it wrote
mod hunt; // all storms: what is run for tests, and what for `./dev storm`
mod link; // connections
mod moves; // who can move, and one move at a time
mod outside; // what others do to the VM meanwhile
mod pages; // sets of pages, and what they hold
mod planted; // errors that are planted, to see that they are found
mod printed; // hashes for values of the protocol
mod qemu; // QEMU, and the kernel's watch over it
mod random; // larger VMs, and chance
mod record; // who owns the VM
mod schedule; // a run that can be had again
mod setup; // what is simulated
mod source; // the source's agent and driver
mod spool; // the spool
mod target; // the target's agent and driver
mod watchdog; // the process that watches over the source's pause
mod world; // all of it together

pub use check::End;
pub use enumerate::{Counts, Enumeration};
pub use fault::Fault;
pub use hunt::{Finding, Report, Size, hunt, storm};
pub use link::Side;
pub use outside::{Meddle, Outside};
pub use planted::PlantedBug;
pub use random::run as run_at_random;
pub use schedule::{Course, Schedule, Turn};
pub use setup::{Keeper, Setup, Spooling, Way};
pub use world::World;
