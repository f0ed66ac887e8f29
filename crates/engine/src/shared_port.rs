//! Ports that are used beside the driver: while a thread asks one of them, the driver goes on with something
//! else.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard},
    thread,
};
use units::Locked;

/// A port that the driver and its threads use in turns.
pub struct SharedPort<T: ?Sized>(Arc<Mutex<Box<T>>>);

impl<T: ?Sized + Send + 'static> SharedPort<T> {
    /// Nobody uses it yet.
    pub fn new(port: Box<T>) -> Self {
        Self(Arc::new(Mutex::new(port)))
    }

    /// Waits until no thread uses it.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Box<T>> {
        // A port whose user panicked is still the only way to the guest.
        self.0.locked()
    }

    /// Uses it on a thread of its own as soon as nobody else does. Does not wait for that: whoever locks it
    /// next may come before.
    pub(crate) fn later(&self, name: &str, work: impl FnOnce(&mut T) + Send + 'static) -> io::Result<()> {
        let port = self.0.clone();
        let work = move || work(&mut port.locked());
        thread::Builder::new().name(name.into()).spawn(work).map(drop)
    }

    /// Uses it on a thread of its own, which has it when this returns: whoever locks it from now on comes
    /// after.
    pub(crate) fn spawn(&self, name: &str, work: impl FnOnce(&mut T) + Send + 'static) -> io::Result<()> {
        let port = self.0.clone();
        let (has_it, had) = std::sync::mpsc::sync_channel(0);
        thread::Builder::new().name(name.into()).spawn(move || {
            let mut port = port.locked();
            let _ = has_it.send(());
            work(&mut port);
        })?;
        // Only a thread that ended without a word leaves us without an answer, and then nobody has the port.
        let _ = had.recv();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn whoever_locks_after_a_spawn_comes_after_it() {
        let list: SharedPort<Vec<u8>> = SharedPort::new(Box::default());
        let (go, wait) = channel::<()>();
        list.spawn("first", move |list| {
            let _ = wait.recv();
            list.push(1);
        })
        .unwrap();
        go.send(()).unwrap();
        list.lock().push(2);
        assert_eq!(**list.lock(), [1, 2]);
    }
}
