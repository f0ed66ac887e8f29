//! The same bytes with nothing else around them: `pread` from one memory file, a socket, `pwrite` into
//! another.

use crate::{contender::COPY, cpu, run::Run};
use lab::{Doing, Host, Result};
use rustix::fs::MemfdFlags;
use std::{
    fs::File,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::FileExt,
    thread,
    time::{Duration, Instant, SystemTime},
};
use units::{Bytes, Rate};

/// What is read and written at once: whimbrel's batch.
const PIECE: usize = 512 << 10;
/// A link over which nothing comes for so long is broken.
const SILENCE: Duration = Duration::from_secs(20);

/// Copies `bytes` from one host to another over so many connections, each with a thread at either end.
pub(crate) fn copy(from: &Host, to: &Host, bytes: Bytes, streams: u64) -> Result<Run> {
    let pieces = bytes.0 / PIECE as u64;
    let source = memory("bench-source")?;
    let mut state = 1_u64;
    let mut piece = vec![0; PIECE];
    for n in 0..pieces {
        for word in piece.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(n | 1);
            word.copy_from_slice(&(state ^ (state >> 29)).to_le_bytes());
        }
        source.write_all_at(&piece, n * PIECE as u64).doing("fill a memory file")?;
    }
    let target = memory("bench-target")?;
    let listener = to.namespace.inside(|| TcpListener::bind((to.address, 0)).doing("listen"))?;
    let address = listener.local_addr().doing("name a port")?;
    let mut pairs = Vec::new();
    for _ in 0..streams {
        let there =
            from.namespace.inside(|| TcpStream::connect_timeout(&address, SILENCE).doing("connect"))?;
        let (here, _) = listener.accept().doing("accept")?;
        for stream in [&there, &here] {
            stream.set_read_timeout(Some(SILENCE)).doing("set a timeout")?;
            stream.set_write_timeout(Some(SILENCE)).doing("set a timeout")?;
        }
        pairs.push((there, here));
    }
    let (sent, used, stamp) = (from.traffic()?.sent, cpu::process(std::process::id())?, SystemTime::now());
    let began = Instant::now();
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (mine, (mut there, mut here)) in (0..).zip(pairs) {
            let mine = (mine..pieces).step_by(streams as usize);
            let (source, target, places) = (&source, &target, mine.clone());
            threads.push(scope.spawn(move || {
                let mut piece = vec![0; PIECE];
                for n in mine {
                    source
                        .read_exact_at(&mut piece, n * PIECE as u64)
                        .and_then(|()| there.write_all(&piece))
                        .doing("send")?;
                }
                Ok(())
            }));
            threads.push(scope.spawn(move || {
                let mut piece = vec![0; PIECE];
                for n in places {
                    here.read_exact(&mut piece)
                        .and_then(|()| target.write_all_at(&piece, n * PIECE as u64))
                        .doing("receive")?;
                }
                Ok(())
            }));
        }
        let ended = |thread: thread::ScopedJoinHandle<'_, Result<()>>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().try_for_each(ended)
    })?;
    let took = began.elapsed();
    Ok(Run {
        contender: COPY.to_owned(),
        began: stamp.duration_since(SystemTime::UNIX_EPOCH).doing("read the clock")?.as_secs(),
        from: from.name.clone(),
        total_ms: took.as_secs_f64() * 1000.0,
        wire_bytes: from.traffic()?.sent - sent,
        cpu_s: (cpu::process(std::process::id())? - used).as_secs_f64(),
        finished: true,
        streams: Some(streams),
        bytes_per_s: Some((pieces * PIECE as u64) as f64 / took.as_secs_f64()),
        ..Run::default()
    })
}

/// The rate of a copy.
pub(crate) fn rate(copy: &Run) -> Rate {
    Rate(copy.bytes_per_s.unwrap_or_default() as u64)
}

fn memory(name: &str) -> Result<File> {
    rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).doing("make a memory file").map(File::from)
}
