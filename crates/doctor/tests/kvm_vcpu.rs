//! The asynchronous tracker against a real KVM vCPU: a tiny guest in a process of its own, tracked from here
//! as QEMU is tracked. Needs `/dev/kvm`, and the rights that a migration needs.

use std::{
    env,
    io::{self, BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    time::Duration,
};
use sys::{
    inject::Borrowed,
    kvm::{FIRST_FREE_PAGE, KvmError, TinyGuest},
    pagemap::Pagemap,
    process::PidFd,
    uffd::{Features, Uffd, Watch},
};
use units::{PAGE_SIZE, PageIndex, PageRange};

const WORD: &str = "tiny-guest:";

#[test]
fn the_tracker_sees_the_writes_of_a_real_kvm_vcpu() {
    match TinyGuest::new() {
        Ok(_) => {}
        Err(e @ (KvmError::Absent | KvmError::Refused(_))) => {
            return eprintln!("\n*** SKIPPED: the tracker was NOT tried against a KVM vCPU: {e} ***\n");
        }
        Err(e) => panic!("{e}"),
    }
    let mut guest = Guest::start();
    let process = Arc::new(PidFd::open(guest.child.id() as i32).unwrap());
    let (start, bytes) = guest.ram;
    let ram = start..start + bytes;
    // Some pages are there before they are protected, others are not: both kinds must be seen.
    guest.touch(FIRST_FREE_PAGE, 8);

    let uffd = {
        let thread = Borrowed::seize(&process).unwrap();
        let n = thread.userfaultfd().unwrap();
        let uffd = Uffd::take(&process, n).unwrap();
        thread.close(n).unwrap();
        uffd
    };
    let tracking = Features::WP | Features::WP_SHMEM | Features::WP_UNPOPULATED | Features::WP_ASYNC;
    if let Err(e) = uffd.enable(tracking) {
        return eprintln!("\n*** SKIPPED: this kernel has no asynchronous tracker: {e} ***\n");
    }
    uffd.register(ram.clone(), Watch::Writes).unwrap();
    uffd.protect(ram.clone()).unwrap();

    let mut pagemap = Pagemap::open(&process).unwrap();
    let mut written = || {
        let mut seen = Vec::new();
        pagemap
            .take_written(ram.clone(), |run| {
                seen.extend(
                    (run.start..run.end).step_by(PAGE_SIZE).map(|at| (at - ram.start) / PAGE_SIZE as u64),
                );
            })
            .unwrap();
        // A processor with nested paging may count its walks through the guest's page tables as writes (AMD's
        // does): true reports, but not of what the guest's code writes.
        seen.retain(|page| *page >= FIRST_FREE_PAGE);
        seen
    };
    assert_eq!(written(), [], "nothing was written yet");
    for (first, count) in [(FIRST_FREE_PAGE + 4, 8), (600, 1), (FIRST_FREE_PAGE, 1000), (601, 2)] {
        guest.touch(first, count);
        assert_eq!(written(), (first..first + count).collect::<Vec<_>>());
        assert_eq!(written(), [], "protected again");
    }
    // Without the tracker it writes on.
    drop(uffd);
    guest.touch(700, 1);
}

/// The guest's process.
struct Guest {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    /// Where its RAM begins there, and how many bytes there are.
    ram: (u64, u64),
}

impl Guest {
    fn start() -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["tiny_guest_process", "--exact", "--ignored", "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut guest = Self { child, stdin, stdout, ram: (0, 0) };
        guest.ram = guest.answer();
        guest
    }

    /// Returns when the vCPU has halted.
    fn touch(&mut self, first: u64, count: u64) {
        writeln!(self.stdin, "{first} {count}").unwrap();
        assert_eq!(self.answer(), (first, count));
    }

    fn answer(&mut self) -> (u64, u64) {
        loop {
            let mut line = String::new();
            assert_ne!(self.stdout.read_line(&mut line).unwrap(), 0, "the guest's process ended");
            // The test harness has its own words.
            if let Some(at) = line.find(WORD) {
                return two(&line[at + WORD.len()..]);
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn two(line: &str) -> (u64, u64) {
    let mut numbers = line.split_whitespace().map(|n| n.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

#[test]
#[ignore = "not a test: the process that the test above starts and tracks"]
fn tiny_guest_process() {
    let Ok(mut guest) = TinyGuest::new() else { return };
    let (start, bytes) = guest.ram();
    println!("{WORD} {start} {}", bytes.0);
    for (turn, line) in io::stdin().lines().enumerate() {
        let (first, count) = two(&line.unwrap());
        let pages = PageRange::new(PageIndex(first), count);
        let ran = guest.touch(pages, turn as u64 + 1, Duration::from_secs(60)).unwrap();
        assert!(ran.finished && ran.turns == count, "{ran:?}");
        println!("{WORD} {first} {count}");
    }
}
