//! What takes bytes from strangers, each as a function of bytes that must neither panic, nor hang, nor take
//! more memory than its share, nor break an invariant, whatever the bytes are.
//!
//! libFuzzer runs these functions (`./dev fuzz`), and so do ordinary tests: with the corpus, and with a short
//! mutation of it.

/// Bytes taken apart.
mod input;
/// How much memory a target may take.
mod memory;
/// Inputs from inputs, for the tests.
pub mod mutate;
/// The targets, in the order in which a stranger meets them.
mod targets;

/// A real QEMU, watched from outside.
pub use targets::opens::{recipe as watched_recipe, seen as seen_of_qemu};

use std::path::{Path, PathBuf};

/// One of them.
pub struct Target {
    /// Its name: that of its file, of its corpus, and for `./dev fuzz`.
    pub name: &'static str,
    body: fn(&[u8]) -> bool,
    seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets. A new one is a file in `targets`, and a line here.
pub const TARGETS: &[Target] = &[
    Target { name: "wire", body: targets::wire::run, seeds: targets::wire::seeds },
    Target { name: "land", body: targets::land::run, seeds: targets::land::seeds },
    Target { name: "control", body: targets::control::run, seeds: targets::control::seeds },
    Target { name: "machines", body: targets::machines::run, seeds: targets::machines::seeds },
    Target { name: "others", body: targets::others::run, seeds: targets::others::seeds },
    Target { name: "recipe", body: targets::recipe::run, seeds: targets::recipe::seeds },
    Target { name: "opens", body: targets::opens::run, seeds: targets::opens::seeds },
    Target { name: "foreign", body: targets::foreign::run, seeds: targets::foreign::seeds },
    Target { name: "history", body: targets::history::run, seeds: targets::history::seeds },
    Target { name: "store", body: targets::store::run, seeds: targets::store::seeds },
    Target { name: "spool", body: targets::spool::run, seeds: targets::spool::seeds },
    Target { name: "qmp", body: targets::qmp::run, seeds: targets::qmp::seeds },
    Target { name: "vmfile", body: targets::vmfile::run, seeds: targets::vmfile::seeds },
    Target { name: "config", body: targets::config::run, seeds: targets::config::seeds },
];

/// The target of this name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

impl Target {
    /// Runs it. Says whether what it was given was taken for good; panics, or ends the process, if it did
    /// harm.
    pub fn run(&self, data: &[u8]) -> bool {
        memory::within(memory::SHARE, || (self.body)(data))
    }

    /// Inputs that are good, made by what makes them in earnest wherever there is such a thing.
    pub fn seeds(&self) -> Vec<Vec<u8>> {
        (self.seeds)()
    }

    /// Where the inputs are that are worth keeping.
    pub fn corpus(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(self.name)
    }
}
