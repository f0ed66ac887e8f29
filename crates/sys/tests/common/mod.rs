//! A process to experiment on: the test program itself, started again in the role of a guest.
//!
//! It maps a memfd, takes one order a line, and answers each with a line that begins with `@`.
#![allow(dead_code, unreachable_pub, reason = "each test program uses its own part of this")]

use nix::libc;
use std::{
    env,
    fs::File,
    io::{BufRead, BufReader, Write},
    os::fd::IntoRawFd,
    process::{Child, ChildStdin, Command, Stdio},
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    time::{Duration, Instant},
};
use sys::{maps, process::PidFd, ram::RamFile};
use units::PAGE_SIZE;

/// Longer than any answer takes, unless nothing answers.
pub const SOON: Duration = Duration::from_secs(20);

/// Long enough to tell that somebody waits.
pub const A_WHILE: Duration = Duration::from_millis(200);

pub struct Guest {
    child: Child,
    orders: ChildStdin,
    answers: Receiver<String>,
    pub process: Arc<PidFd>,
    /// The thread that takes the orders.
    pub tid: i32,
    pub base: u64,
    pub pages: u64,
}

impl Guest {
    /// Starts a guest with this much RAM. The calling test program must have a test `role` that calls
    /// [`play`].
    pub fn start(pages: u64) -> Self {
        Self::start_as("role", pages)
    }

    /// The same with another name of the test.
    pub fn start_as(role: &str, pages: u64) -> Self {
        Self::start_with(role, pages, "shared")
    }

    /// One whose RAM only it can reach: of small pages, or of `huge` ones.
    pub fn start_private(pages: u64, huge: bool) -> Self {
        Self::start_with("role", pages, if huge { "huge" } else { "private" })
    }

    /// One in a namespace of its own, where it and its threads have other numbers.
    pub fn start_inside(pages: u64) -> Self {
        let mut unshare = Command::new("unshare");
        unshare.args(["--pid", "--fork", "--kill-child"]).arg(env::current_exe().unwrap());
        let mut guest = Self::start_by(unshare, "role", pages, "shared");
        let children = guest.process.proc_path(format!("task/{}/children", guest.process.pid()));
        let inner = std::fs::read_to_string(children).unwrap();
        guest.process = Arc::new(PidFd::open(inner.trim().parse().unwrap()).unwrap());
        guest
    }

    fn start_with(role: &str, pages: u64, kind: &str) -> Self {
        Self::start_by(Command::new(env::current_exe().unwrap()), role, pages, kind)
    }

    fn start_by(mut command: Command, role: &str, pages: u64, kind: &str) -> Self {
        let mut child = command
            .args(["--exact", role, "--ignored", "--nocapture", "--test-threads=1"])
            .env("ROLE_PAGES", pages.to_string())
            .env("ROLE_RAM", kind)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (send, answers) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                // libtest may have left the cursor in the middle of a line.
                if let Some((_, answer)) = line.split_once('@') {
                    drop(send.send(answer.to_owned()));
                }
            }
        });
        let process = Arc::new(PidFd::open(child.id() as i32).unwrap());
        let mut guest = Self { child, orders, answers, process, tid: 0, base: 0, pages };
        let answer = guest.answer();
        let (tid, base) = answer.split_once(' ').unwrap();
        (guest.tid, guest.base) = (tid.parse().unwrap(), base.parse().unwrap());
        guest
    }

    pub fn order(&mut self, order: &str) {
        writeln!(self.orders, "{order}").unwrap();
    }

    pub fn answer(&self) -> String {
        self.answers.recv_timeout(SOON).expect("the guest answers")
    }

    /// Whether it waits for something.
    pub fn is_silent(&self) -> bool {
        self.answers.recv_timeout(A_WHILE) == Err(RecvTimeoutError::Timeout)
    }

    pub fn ask(&mut self, order: &str) -> String {
        self.order(order);
        self.answer()
    }

    pub fn end(&self) -> u64 {
        self.base + self.pages * PAGE_SIZE as u64
    }

    pub fn at(&self, page: u64) -> u64 {
        self.base + page * PAGE_SIZE as u64
    }

    /// Starts so many threads that count in a page each, from page 0 on. Their numbers.
    pub fn count(&mut self, threads: u64) -> Vec<i32> {
        let answer = self.ask(&format!("count {threads}"));
        answer.split(' ').map(|word| word.parse().unwrap()).collect()
    }

    /// What the thread has counted to that counts in this page.
    pub fn counted(&self, page: u64) -> u64 {
        let mut bytes = [0; 8];
        self.process.read_memory(self.at(page), &mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    }

    /// Whether this thread of it stands still for a tracer.
    pub fn stands_still(&self, tid: i32) -> bool {
        let stat = std::fs::read_to_string(self.process.proc_path(format!("task/{tid}/stat"))).unwrap();
        stat.rsplit_once(") ").unwrap().1.starts_with('t')
    }

    /// Its RAM, opened from outside.
    pub fn ram(&self) -> RamFile {
        let mappings = maps::read(&self.process).unwrap();
        let mapping = mappings.iter().find(|m| m.addresses.start == self.base).unwrap();
        let file = maps::open_file(&self.process, mapping).unwrap();
        RamFile::new(file, mapping.offset, self.pages * PAGE_SIZE as u64).unwrap()
    }

    /// Whether its RAM is registered with any userfaultfd.
    pub fn is_watched(&self) -> bool {
        let flags = maps::flags_at(&self.process, self.base).unwrap();
        flags.iter().any(|flag| flag == "uw" || flag == "um")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

struct Ram {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: only ever accessed with volatile single bytes or by the kernel, and never unmapped.
unsafe impl Send for Ram {}
// SAFETY: the same.
unsafe impl Sync for Ram {}

impl Ram {
    fn of_kind(kind: &str, bytes: usize) -> Self {
        if kind == "shared" {
            return Self::map(bytes);
        }
        const HUGE: usize = 2 << 20;
        let advice = if kind == "huge" { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        let (rights, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, of which a part is kept that begins and ends within it.
        let start = unsafe {
            let start = libc::mmap(std::ptr::null_mut(), bytes + HUGE, rights, flags, -1, 0);
            assert_ne!(start, libc::MAP_FAILED);
            let start = start.cast::<u8>().add(start.cast::<u8>().align_offset(HUGE));
            assert_eq!(libc::madvise(start.cast(), bytes, advice), 0);
            start
        };
        Self { start: NonNull::new(start).unwrap(), bytes }
    }

    /// Gives a page back: it is zeros then.
    fn discard(&self, first: u64, pages: u64) {
        let bytes = pages as usize * PAGE_SIZE;
        assert!(first as usize * PAGE_SIZE + bytes <= self.bytes);
        // SAFETY: within the mapping, of which nobody holds a reference.
        let done = unsafe {
            let at = self.start.as_ptr().add(first as usize * PAGE_SIZE);
            libc::madvise(at.cast(), bytes, libc::MADV_DONTNEED)
        };
        assert_eq!(done, 0);
    }

    fn map(bytes: usize) -> Self {
        // SAFETY: a new mapping of a new file.
        let start = unsafe {
            let fd = libc::memfd_create(c"ram".as_ptr(), 0);
            assert_eq!(libc::ftruncate(fd, bytes as i64), 0);
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        Self { start: NonNull::new(start.cast()).unwrap(), bytes }
    }

    fn byte(&self, page: u64) -> *mut u8 {
        let at = page as usize * PAGE_SIZE + 17;
        assert!(at < self.bytes);
        // SAFETY: within the mapping.
        unsafe { self.start.as_ptr().add(at) }
    }

    fn write(&self, page: u64, value: u8) {
        // SAFETY: `byte` is within the mapping, which is never unmapped.
        unsafe { self.byte(page).write_volatile(value) }
    }

    /// Writes to each line of the processor's cache.
    fn write_all(&self, page: u64, value: u64) {
        let first = page as usize * PAGE_SIZE;
        assert!(first + PAGE_SIZE <= self.bytes);
        for at in (first..first + PAGE_SIZE).step_by(64) {
            // SAFETY: within the mapping, and aligned to 64 bytes.
            unsafe { self.start.as_ptr().add(at).cast::<u64>().write_volatile(value) }
        }
    }

    fn read(&self, page: u64) -> u8 {
        // SAFETY: the same.
        unsafe { self.byte(page).read_volatile() }
    }

    /// Counts there, ten thousand times a second if nobody hinders it.
    fn count(&self, page: u64) -> ! {
        assert!(page as usize * PAGE_SIZE < self.bytes);
        // SAFETY: aligned, within the mapping, which is never unmapped; we touch it as an atomic number only.
        let number = unsafe { &*self.start.as_ptr().add(page as usize * PAGE_SIZE).cast::<AtomicU64>() };
        loop {
            number.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Has the kernel write there.
    fn read_into(&self, page: u64, file: i32) -> isize {
        // SAFETY: one byte within the mapping.
        unsafe { libc::read(file, self.byte(page).cast(), 1) }
    }
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: i32) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// What the guest does. Never returns while its orders last.
pub fn play() {
    let Ok(pages) = env::var("ROLE_PAGES") else { return };
    let pages: usize = pages.parse().unwrap();
    let kind = env::var("ROLE_RAM").unwrap();
    let ram = Arc::new(Ram::of_kind(&kind, pages * PAGE_SIZE));
    let zero = File::open("/dev/zero").unwrap().into_raw_fd();
    let mut storm: Option<Storm> = None;
    // SAFETY: a handler that only adds to an atomic number.
    unsafe { libc::signal(libc::SIGRTMIN(), count as *const () as usize) };
    println!("\n@{} {}", rustix::thread::gettid().as_raw_nonzero(), ram.start.as_ptr() as u64);
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let (verb, rest) = line.split_once(' ').unwrap_or((&line, ""));
        let number = || rest.parse::<u64>().unwrap();
        match verb {
            "write" => ram.write(number(), 7),
            "discard" => {
                let (first, pages) = rest.split_once(' ').unwrap();
                ram.discard(first.parse().unwrap(), pages.parse().unwrap());
            }
            "read" => {
                println!("@{}", ram.read(number()));
                continue;
            }
            "thread" => {
                let (ram, page) = (Arc::clone(&ram), number());
                std::thread::spawn(move || ram.write(page, 8)).join().unwrap();
            }
            "kernel" => assert_eq!(ram.read_into(number(), zero), 1),
            "fill" => (0..pages as u64).for_each(|page| ram.write(page, 1)),
            "storm" => storm = Some(Storm::begin(&ram, pages as u64, number())),
            "calm" => storm = storm.take().and_then(Storm::end),
            "race" => {
                println!("@{}", race(&ram, pages as u64, rest));
                continue;
            }
            "poll" => {
                let began = Instant::now();
                // SAFETY: no descriptors at all.
                let result = unsafe { libc::poll(std::ptr::null_mut(), 0, number() as i32) };
                println!("@{result} {}", began.elapsed().as_millis());
                continue;
            }
            "sleep" => {
                let wanted = libc::timespec { tv_sec: 0, tv_nsec: number() as i64 * 1_000_000 };
                let began = Instant::now();
                // SAFETY: a valid timespec, and no remainder wanted.
                let result = unsafe { libc::nanosleep(&wanted, std::ptr::null_mut()) };
                println!("@{result} {}", began.elapsed().as_millis());
                continue;
            }
            "futex" => {
                let wanted = libc::timespec { tv_sec: 0, tv_nsec: number() as i64 * 1_000_000 };
                let word = 0_u32;
                let began = Instant::now();
                // SAFETY: waits on a word of ours that nobody changes.
                let result = unsafe { libc::syscall(libc::SYS_futex, &word, libc::FUTEX_WAIT, 0, &wanted) };
                let error = std::io::Error::last_os_error().raw_os_error().unwrap();
                println!("@{result} {} {error}", began.elapsed().as_millis());
                continue;
            }
            "compute" => {
                println!("@{}", compute(Duration::from_millis(number())));
                continue;
            }
            "count" => {
                let counter = |page| {
                    let (ram, (tell, told)) = (Arc::clone(&ram), channel());
                    std::thread::spawn(move || {
                        tell.send(rustix::thread::gettid().as_raw_nonzero().to_string()).unwrap();
                        ram.count(page)
                    });
                    told.recv().unwrap()
                };
                println!("@{}", (0..number()).map(counter).collect::<Vec<_>>().join(" "));
                continue;
            }
            // Threads that end as soon as they began.
            "threads" => (0..number()).for_each(|page| {
                let ram = Arc::clone(&ram);
                std::thread::spawn(move || ram.write(page % pages as u64, 8)).join().unwrap();
            }),
            "signals" => {
                println!("@{}", SIGNALS.load(Ordering::Relaxed));
                continue;
            }
            other => panic!("an order {other}"),
        }
        println!("@done");
    }
}

/// Threads that write all the time, each page another value each time.
struct Storm {
    over: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Storm {
    fn begin(ram: &Arc<Ram>, pages: u64, threads: u64) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let write = |thread: u64| {
            let (ram, over) = (Arc::clone(ram), Arc::clone(&over));
            std::thread::spawn(move || {
                let mut at = thread * 7919;
                for n in (1_u64..).take_while(|_| !over.load(Ordering::Relaxed)) {
                    // The first goes upwards, the others here and there.
                    at = if thread == 0 { at + 1 } else { scatter(at) };
                    // No two write to the same page: each knows what it wrote last.
                    let page = at % (pages / threads) * threads + thread;
                    ram.write(page, ram.read(page).wrapping_add(1 + (n % 7) as u8));
                }
            })
        };
        Self { threads: (0..threads).map(write).collect(), over }
    }

    fn end(self) -> Option<Self> {
        self.over.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        None
    }
}

/// Somewhere else (splitmix64).
fn scatter(at: u64) -> u64 {
    let mut mixed = at.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// How long a thread has run or waited for a page: all of the time but what it waited for a processor. What
/// else a machine does is left out of a measurement in this way.
pub struct Ran {
    schedstat: String,
    began: Instant,
    before: Duration,
}

impl Ran {
    pub fn begin(pid: i32, tid: i32) -> Self {
        let mut ran = Self {
            schedstat: format!("/proc/{pid}/task/{tid}/schedstat"),
            began: Instant::now(),
            before: Duration::ZERO,
        };
        ran.before = ran.waited();
        ran
    }

    fn waited(&self) -> Duration {
        let text = std::fs::read_to_string(&self.schedstat).unwrap();
        Duration::from_nanos(text.split(' ').nth(1).unwrap().parse().unwrap())
    }

    pub fn so_far(&self) -> Duration {
        self.began.elapsed().saturating_sub(self.waited() - self.before)
    }

    /// Sleeps until it has run for so long.
    pub fn until(&self, time: Duration) {
        while let Some(left) = time.checked_sub(self.so_far()).filter(|left| !left.is_zero()) {
            std::thread::sleep(left);
        }
    }
}

/// The last pages, which belong to the probe: 64 MiB.
pub const PROBED: u64 = 16_384;

/// `WAY MILLIS`: writes to all pages but the last as fast as it can, in this way (`sequential` or `random`),
/// while somebody else writes to one of the last each millisecond. Answers how many pages were touched in a
/// second, and how long the other's writes took: the median, the 99th percentile, the longest, in µs.
fn race(ram: &Arc<Ram>, pages: u64, order: &str) -> String {
    let (way, millis) = order.split_once(' ').unwrap();
    let (random, time) = (way == "random", Duration::from_millis(millis.parse().unwrap()));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let probe = scope.spawn(|| {
            // What it waits for is the tracker, not a processor. Without the right to it, it may wait for
            // both.
            let _ = rustix::process::setpriority_process(None, -20);
            let began = Instant::now();
            let mut took = Vec::new();
            for n in 1_u64.. {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                std::thread::sleep(
                    (began + Duration::from_millis(n)).saturating_duration_since(Instant::now()),
                );
                let page = pages - 1 - scatter(n) % PROBED;
                let begin = Instant::now();
                ram.write(page, n as u8);
                took.push(begin.elapsed().as_micros());
            }
            took.sort_unstable();
            took
        });
        let (mut touched, mut at, pages) = (0_u64, 0, pages - PROBED);
        let ran = Ran::begin(std::process::id() as i32, rustix::thread::gettid().as_raw_nonzero().get());
        let (mut next, mut took) = (ran.began, Duration::ZERO);
        while took < time {
            if Instant::now() >= next {
                // Looking takes a while itself.
                took = ran.so_far();
                next = Instant::now() + Duration::from_millis(2);
            }
            for _ in 0..128 {
                let page = if random { scatter(touched) % pages } else { at };
                // Another value each time.
                ram.write_all(page, scatter(touched));
                at = if at + 1 == pages { 0 } else { at + 1 };
                touched += 1;
            }
        }
        over.store(true, Ordering::Relaxed);
        let speed = touched as f64 / took.as_secs_f64();
        let took = probe.join().unwrap();
        let at = |percent: usize| took[(took.len() - 1) * percent / 100];
        format!("{speed:.0} {} {} {}", at(50), at(99), at(100))
    })
}

/// Integer and floating-point work whose every step must be right. Says how many were wrong.
fn compute(time: Duration) -> u64 {
    let end = Instant::now() + time;
    let mut wrong = 0;
    while Instant::now() < end {
        let mut sums = [0.0_f64; 8];
        let mut mixed = 1_u64;
        for step in 0..20_000_u64 {
            for (lane, sum) in sums.iter_mut().enumerate() {
                *sum += (lane as f64 + 1.0) * 0.5;
            }
            mixed = mixed.rotate_left(7) ^ step.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        std::hint::black_box(mixed);
        let right = sums.iter().enumerate().all(|(lane, sum)| *sum == (lane as f64 + 1.0) * 10_000.0);
        wrong += u64::from(!right);
        static FIRST: AtomicU64 = AtomicU64::new(0);
        let first =
            FIRST.compare_exchange(0, mixed, Ordering::Relaxed, Ordering::Relaxed).unwrap_or_else(|v| v);
        wrong += u64::from(first != 0 && first != mixed);
    }
    wrong
}
