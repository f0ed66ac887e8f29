//! What a guest says on its serial console.

use crate::{Doing, Result, wait_for};
use std::{
    io::{BufRead, BufReader},
    os::unix::net::UnixStream,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

/// The serial console of one machine. QEMU lets one reader in at a time, and what was said before is gone.
#[derive(Debug)]
pub struct Console {
    lines: Arc<Mutex<Vec<String>>>,
    stream: UnixStream,
}

impl Console {
    /// Listens at a console's socket.
    pub fn listen(socket: &Path) -> Result<Self> {
        let open = || Ok(UnixStream::connect(socket).ok());
        let stream = wait_for(&format!("console {}", socket.display()), Duration::from_secs(10), open)?;
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (reader, kept) = (stream.try_clone().doing("share a socket")?, lines.clone());
        // Ends when QEMU does, or when this console is dropped.
        thread::spawn(move || {
            for line in BufReader::new(reader).split(b'\n') {
                let Ok(line) = line else { return };
                locked(&kept).push(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
        });
        Ok(Self { lines, stream })
    }

    /// Everything heard so far.
    pub fn lines(&self) -> Vec<String> {
        locked(&self.lines).clone()
    }

    /// Waits for a line that contains `words` and returns it.
    pub fn wait(&self, words: &str, within: Duration) -> Result<String> {
        wait_for(&format!("\"{words}\" on the console"), within, || {
            Ok(locked(&self.lines).iter().find(|line| line.contains(words)).cloned())
        })
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

fn locked(lines: &Mutex<Vec<String>>) -> MutexGuard<'_, Vec<String>> {
    lines.lock().unwrap_or_else(PoisonError::into_inner)
}
