//! One task at a time for each VM.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

/// Who is busy with what.
#[derive(Default)]
pub(super) struct Leases(Mutex<HashSet<String>>);

/// The right to do something with a VM; ends when dropped.
pub struct Lease {
    leases: Arc<Leases>,
    name: String,
}

impl Leases {
    pub(super) fn take(self: &Arc<Self>, name: &str) -> Option<Lease> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.insert(name.to_owned()).then(|| Lease { leases: self.clone(), name: name.to_owned() })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.leases.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}
