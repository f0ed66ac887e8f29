//! How much content one batch should carry: from a socket into fresh pages of a memfd, as on the target of a migration.
//! It chose `proto::BATCH_PAGES`.

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
    let size = kib * KIB;
    let (target, mut buffer) = (Target::new(), vec![0; size]);
    let sender = Sender::new(size, &target.listener);
    let (mut stream, _) = target.listener.accept().expect("the sender connects");
    bencher.counter(BytesCount::new(TOTAL)).with_inputs(|| target.punch()).bench_local_values(|()| {
        sender.go();
        for batch in 0..TOTAL / size {
            stream.read_exact(&mut buffer).expect("the sender sends");
            target.memory.write_all_at(&buffer, (batch * size) as u64).expect("a memfd takes what fits");
        }
    });
}

/// A memfd of holes.
struct Target {
    listener: TcpListener,
    memory: File,
}

impl Target {
    fn new() -> Self {
        let memory = memfd_create("batch_size", MemfdFlags::CLOEXEC).expect("a memfd");
        ftruncate(&memory, TOTAL as u64).expect("memory");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        Self { listener, memory: File::from(memory) }
    }

    /// All holes again, as the RAM of a QEMU that waits.
    fn punch(&self) {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.memory, how, 0, TOTAL as u64).expect("holes");
    }
}

/// Sends `TOTAL` bytes in batches whenever told to.
struct Sender(mpsc::Sender<()>);

impl Sender {
    fn new(size: usize, to: &TcpListener) -> Self {
        let address = to.local_addr().expect("an address");
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            let mut stream = TcpStream::connect(address).expect("the target listens");
            let batch = vec![0x5a; size];
            while told.recv().is_ok() {
                for _ in 0..TOTAL / size {
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
