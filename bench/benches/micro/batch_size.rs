//! How much content one batch should carry: from a socket into fresh pages of a memfd, as on the target of a
//! migration. It chose `proto::BATCH_PAGES`. And how they should get from the source's memory into the
//! socket.

use divan::{Bencher, counter::BytesCount};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use std::{
    fs::File,
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::fs::FileExt,
    sync::mpsc,
    thread,
};

/// What is sent in one sample.
const TOTAL: usize = 128 << 20;
const KIB: usize = 1 << 10;

#[divan::bench(args = [64, 128, 256, 512, 1024, 2048], sample_count = 10, sample_size = 1)]
fn batch_size(bencher: Bencher, kib: usize) {
    move_all(bencher, kib * KIB, Way::Buffer);
}

/// Read into a buffer and written from there, as `engine/send.rs` does it, which may look at pages while no
/// guest changes them; and by the kernel alone, which would have to be asked to send pages that change
/// meanwhile.
#[divan::bench(args = [Way::Copied, Way::Sendfile], sample_count = 20, sample_size = 1)]
fn ways(bencher: Bencher, way: Way) {
    move_all(bencher, 512 * KIB, way);
}

fn move_all(bencher: Bencher, size: usize, way: Way) {
    let (target, mut buffer) = (Target::new(), vec![0; size]);
    let sender = Sender::new(size, way, &target.listener);
    let (mut stream, _) = target.listener.accept().expect("the sender connects");
    bencher.counter(BytesCount::new(TOTAL)).with_inputs(|| target.punch()).bench_local_values(|()| {
        sender.go();
        for batch in 0..TOTAL / size {
            stream.read_exact(&mut buffer).expect("the sender sends");
            target.memory.write_all_at(&buffer, (batch * size) as u64).expect("a memfd takes what fits");
        }
    });
}

/// Where a batch comes from.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// A buffer that is filled already.
    Buffer,
    /// The source's memory, by way of a buffer.
    Copied,
    /// The source's memory, without one.
    Sendfile,
}

/// A memfd of holes.
struct Target {
    listener: TcpListener,
    memory: File,
}

impl Target {
    fn new() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        Self { listener, memory: memory() }
    }

    /// All holes again, as the RAM of a QEMU that waits.
    fn punch(&self) {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.memory, how, 0, TOTAL as u64).expect("holes");
    }
}

fn memory() -> File {
    let memory = memfd_create("batch_size", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&memory, TOTAL as u64).expect("memory");
    File::from(memory)
}

/// Sends `TOTAL` bytes in batches whenever told to.
struct Sender(mpsc::Sender<()>);

impl Sender {
    fn new(size: usize, way: Way, to: &TcpListener) -> Self {
        let address = to.local_addr().expect("an address");
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            let mut stream = TcpStream::connect(address).expect("the target listens");
            let (mut batch, memory) = (vec![0x5a; size], memory());
            for at in (0..TOTAL).step_by(size) {
                memory.write_all_at(&batch, at as u64).expect("a memfd takes what fits");
            }
            while told.recv().is_ok() {
                for at in (0..TOTAL as u64).step_by(size) {
                    match way {
                        Way::Buffer => {}
                        Way::Copied => memory.read_exact_at(&mut batch, at).expect("it was written"),
                        Way::Sendfile => {
                            let mut from = at;
                            while from < at + size as u64 {
                                let rest = (at + size as u64 - from) as usize;
                                rustix::fs::sendfile(&stream, &memory, Some(&mut from), rest)
                                    .expect("the target receives");
                            }
                            continue;
                        }
                    }
                    stream.write_all(&batch).expect("the target receives");
                }
            }
        });
        Self(tell)
    }

    fn go(&self) {
        self.0.send(()).expect("the sender lives");
    }
}
