//! Changes of hands that are no migration: a host starts a VM, or has ended it.

use crate::record::check_name;
use ports::{Claimed, shared::NOBODY};
use std::io;
use units::Epoch;

/// A record in which one owner follows the other.
pub(crate) trait Changing {
    /// From now on `owner` owns it, if `may` says that it may be taken from whoever does now. `known`: the
    /// newest epoch that this host has seen of it.
    fn change(
        &self,
        vm: &str,
        owner: &str,
        known: Option<Epoch>,
        may: &dyn Fn(&str) -> bool,
    ) -> io::Result<Claimed>;

    /// `host` takes it from nobody, from itself, or from a host that is `fenced`.
    fn start_here(
        &self,
        vm: &str,
        host: &str,
        fenced: Option<&str>,
        known: Option<Epoch>,
    ) -> io::Result<Claimed> {
        check_name(host)?;
        let may = |owner: &str| owner == NOBODY || owner == host || Some(owner) == fenced;
        self.change(vm, host, known, &may)
    }

    /// `host` gives it to nobody, if it has it.
    fn end_here(&self, vm: &str, host: &str, known: Option<Epoch>) -> io::Result<()> {
        self.change(vm, NOBODY, known, &|owner| owner == host).map(drop)
    }
}
