//! What cannot be taken away at once is tried again: without a descriptor left, for example. That passes.

use std::{fmt, fs, io, path::Path, thread, time::Duration};

/// How often, and how long after the last time.
const ATTEMPTS: u32 = 20;
const AGAIN: Duration = Duration::from_millis(500);

/// Takes away what is called so, now or later.
pub(crate) fn sooner_or_later(
    what: impl fmt::Display + Send + 'static,
    remove: impl Fn() -> io::Result<()> + Send + 'static,
) {
    let Err(error) = remove() else { return };
    tracing::debug!(%what, %error, "cannot be removed yet");
    thread::spawn(move || {
        for _ in 0..ATTEMPTS {
            thread::sleep(AGAIN);
            if remove().is_ok() {
                return;
            }
        }
        tracing::warn!(%what, %error, "could not be removed");
    });
}

/// A directory with all that is in it. One that is gone already is no error. No other may get its name.
pub(crate) fn folder(path: &Path) {
    let path = path.to_owned();
    sooner_or_later(path.display().to_string(), move || gone(fs::remove_dir_all(&path)));
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    removed.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        sync::{
            Arc,
            atomic::{AtomicU32, Ordering::SeqCst},
            mpsc::channel,
        },
        time::Instant,
    };

    #[test]
    fn what_cannot_be_removed_is_tried_again() {
        let (times, (tell, told)) = (Arc::new(AtomicU32::new(0)), channel());
        let begin = Instant::now();
        sooner_or_later("it", move || match times.fetch_add(1, SeqCst) {
            0 => Err(io::ErrorKind::Other.into()),
            _ => {
                let _ = tell.send(());
                Ok(())
            }
        });
        told.recv().unwrap();
        assert!(begin.elapsed() >= AGAIN);
        assert!(told.recv().is_err(), "once is enough");
    }

    #[test]
    fn what_is_gone_is_no_error() {
        let outer = tempfile::tempdir().unwrap();
        let inner = outer.path().join("d");
        fs::create_dir_all(inner.join("deep")).unwrap();
        folder(&inner);
        assert!(!inner.exists());
        assert!(gone(fs::remove_dir_all(&inner)).is_ok());
    }
}
