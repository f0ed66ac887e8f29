//! Pages that the guest on the target waits for: asked for on a connection of their own, ahead of everything
//! else.

use crate::{conn::Conn, ports::Fault, receive::PageReceiver};
use proto::Frame;
use std::{
    io::Write,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};
use units::Locked;

/// How often the thread looks whether it is over. Faults themselves wake it at once.
const LOOK: Duration = Duration::from_millis(100);

/// Serves the faults of one guest. It waits for nothing but the kernel's and the source's descriptors: QEMU's
/// main loop can itself be blocked on a fault that only this can resolve.
#[derive(Clone)]
pub(crate) struct Faults {
    receiver: Arc<PageReceiver>,
    asking: Arc<Mutex<Option<Conn>>>,
    over: Arc<AtomicBool>,
}

impl Faults {
    pub(crate) fn start(receiver: Arc<PageReceiver>) -> std::io::Result<Self> {
        let faults = Self { receiver, asking: Arc::default(), over: Arc::default() };
        let worker = faults.clone();
        thread::Builder::new().name("faults".into()).spawn(move || worker.work())?;
        Ok(faults)
    }

    /// Asks on this connection from now on, first for everything that somebody waits for already.
    pub(crate) fn ask_on(&self, conn: Conn) {
        *self.asking.locked() = Some(conn);
        self.receiver.wanted().into_iter().for_each(|fault| self.ask(fault));
    }

    /// Ends the thread.
    pub(crate) fn end(&self) {
        self.over.store(true, Relaxed);
    }

    fn work(&self) {
        sys::urgent::become_urgent();
        let Some(missing_mode) = &self.receiver.missing_mode else { return };
        while !self.over.load(Relaxed) {
            match missing_mode.next(LOOK) {
                Ok(None) => {}
                Ok(Some(fault)) => {
                    let missing = self.receiver.missing().block(fault.block).contains(fault.page);
                    if missing {
                        if self.receiver.wants(fault) {
                            self.ask(fault);
                        }
                    } else if let Err(e) = missing_mode.place_zero(fault) {
                        // Never written, or discarded by the guest: zeros. The guest asks again if this
                        // failed.
                        tracing::error!(%e, ?fault, "could not answer a fault");
                    }
                }
                Err(e) => {
                    tracing::error!(%e, "faults can no longer be heard; the guest is gone");
                    return;
                }
            }
        }
    }

    fn ask(&self, fault: Fault) {
        let mut asking = self.asking.locked();
        let Some(conn) = asking.as_mut() else { return };
        if conn.write_all(&Frame::Want { block: fault.block, page: fault.page }.header()).is_err() {
            // The reader of this connection reports it, and what is wanted is asked for on the next one.
            *asking = None;
        }
    }
}
