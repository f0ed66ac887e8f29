//! A second QEMU of one host takes a running guest over: RAM that it reaches is handed over, other RAM
//! travels. By engine, attach and QEMU alone, and by an agent.

use api::{Event, MigrateOptions, Mode, Outcome, Phase, Report};
use attach::{Lent, Source, Target, Tracking};
use engine::{
    Acceptor, Dial, LinkHistory, Offered, RemoteRecord, SharedPort, SourceDriver, SourceParts, TcpDial,
};
use lab::{Doing, Result, Spec, Stage, Tools, VmFile, ensure, skip, story};
use pki::Security;
use ports::{
    Claim, Claimed, Handover, Host, Machine, Nonce, Offer, Ownership, OwnershipRecord, Reach, Request,
    RunState, SourceJournal, SpoolRecord, TargetJournal, Waiting,
};
use qemu::{
    Recipe, Vm,
    recipe::{Argument, Backing, MemoryBlock},
};
use rustix::process::{Signal, pidfd_send_signal};
use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    net::TcpListener,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
    thread,
    time::{Duration, Instant},
};
use sys::process::PidFd;
use units::{BlockId, Epoch, MemorySet, MigrationId, Rate};

const WORK: &str = "whimbrel.beat=100ms whimbrel.check=32M,rate=8M whimbrel.fill=24M,content=random";
const MIB: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(120);

/// Writes nothing down: nobody is killed here who would have to read it.
struct Nothing;

impl SourceJournal for Nothing {
    fn pausing(&mut self, _: RunState) -> io::Result<()> {
        Ok(())
    }
    fn fence(&mut self, _: Epoch) -> io::Result<()> {
        Ok(())
    }
    fn back(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn gone(&mut self, _: Epoch) -> io::Result<()> {
        Ok(())
    }
    fn settled(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl TargetJournal for Nothing {
    fn missing(&mut self, _: &MemorySet) -> io::Result<()> {
        Ok(())
    }
    fn goes_on(&mut self, _: RunState) -> io::Result<()> {
        Ok(())
    }
    fn went_on(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn spool(&mut self, _: &SpoolRecord) -> io::Result<()> {
        Ok(())
    }
    fn settled(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn abandoned(&mut self, _: bool) -> io::Result<()> {
        Ok(())
    }
}

/// Who owns the guest, attempt by attempt.
#[derive(Default)]
struct Record(Mutex<HashMap<u128, String>>);

impl Ownership for Record {
    fn identity(&self) -> io::Result<String> {
        Ok(String::new())
    }

    fn offer(&self, _: &Offer) -> io::Result<()> {
        Ok(())
    }

    fn claim(&self, claim: &Claim) -> io::Result<Claimed> {
        let mut owners = self.0.lock().unwrap();
        let owner = owners.entry(claim.migration.0).or_insert_with(|| claim.claimer.clone()).clone();
        let epoch = claim.expected.next();
        if owner == claim.claimer {
            return Ok(Claimed::Yours(epoch));
        }
        Ok(Claimed::Lost(OwnershipRecord { owner, epoch, migration: Some(claim.migration) }))
    }
}

/// The second QEMU's side.
struct Second {
    host: qemu::Host,
    record: Arc<Record>,
    /// What it may map, by where its source said that it is.
    lent: Mutex<HashMap<Vec<u8>, Lent>>,
    /// The QEMU that was started last, and how much RAM it had of its own then.
    started: Mutex<Option<(qemu::Handle, u64)>>,
    ends: Ends,
}

impl Host for Second {
    fn name(&self) -> String {
        "second".into()
    }

    fn prepare(&self, request: &Request) -> std::result::Result<Waiting, Vec<String>> {
        let one = |error: &dyn std::fmt::Display| vec![error.to_string()];
        let recipe: Recipe = serde_json::from_slice(&request.recipe).map_err(|e| one(&e))?;
        let lent = self.lent.lock().unwrap();
        let (mut host, mut wanted) = (self.host.clone(), BTreeSet::new());
        for Handover { block, place, .. } in &request.handovers {
            if let Some(lent) = lent.get(place) {
                let name = request.blocks[usize::from(block.0)].name.clone();
                let path = format!("/proc/self/fd/{}", lent.file().as_raw_fd());
                host.shared_memory.insert(name, path.into());
                wanted.insert(*block);
            }
        }
        let mut vm = Vm::incoming(&recipe, &host).map_err(|e| one(&e))?;
        self.ends.with(vm.process().pid());
        vm.take_ahead(&request.private).map_err(|e| one(&e))?;
        let opened = Target::open_reaching(vm.process().pid(), vm.ram_blocks(), &wanted);
        let (target, reached) = opened.map_err(|e| one(&e))?;
        *self.started.lock().unwrap() = Some((vm.handle(), target.memory().allocated()));
        Ok(Waiting {
            memory: target.memory(),
            reached,
            kept: None,
            missing: None,
            machine: Box::new(vm),
            journal: Box::new(Nothing),
        })
    }

    fn spool_directory(&self, _: &str) -> std::result::Result<PathBuf, String> {
        Err("nobody spools here".into())
    }

    fn record(&self) -> Arc<dyn Ownership> {
        self.record.clone()
    }

    fn settled(&self, _: MigrationId) -> bool {
        false
    }

    fn ended(&self, _: &Request, _: bool) {}
}

/// A guest, and a second side for it.
struct Bed {
    second: Arc<Second>,
    dial: std::net::SocketAddr,
    attempts: u128,
}

/// What somebody does as soon as a phase begins.
type Meanwhile<'a> = (Phase, &'a dyn Fn(&engine::Handle));

impl Bed {
    fn new(folder: &Path, qemu: Option<PathBuf>, ends: &Ends) -> Self {
        let second = Arc::new(Second {
            host: qemu::Host { qemu, ..qemu::Host::new(folder.join("second")) },
            record: Arc::default(),
            lent: Mutex::default(),
            started: Mutex::default(),
            ends: ends.clone(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let dial = listener.local_addr().unwrap();
        let acceptor = Acceptor::new(second.clone(), Security::Plaintext);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(io::Result::ok) {
                let acceptor = acceptor.clone();
                thread::spawn(move || acceptor.serve(stream));
            }
        });
        Self { second, dial, attempts: 0 }
    }

    /// Lets the second side take a guest over, whose blocks of these numbers it may map.
    fn take_over(
        &mut self,
        guest: &qemu::Handle,
        blocks: &[u16],
        meanwhile: Option<Meanwhile<'_>>,
    ) -> Report {
        self.attempts += 1;
        let migration = MigrationId(self.attempts);
        let mut vm = Vm::reopen(guest).unwrap();
        let begun = vm.begin().unwrap();
        assert_eq!(begun.reasons, Vec::<String>::new());
        let virtio = vm.accepted_of_virtio().unwrap();
        let recipe = Recipe { virtio, ..vm.recipe().clone() };
        let private = vm.copy_ahead().unwrap();
        let source = Source::open(vm.process().pid(), vm.ram_blocks()).unwrap();
        let mut offered = Offered::default();
        for block in blocks.iter().map(|block| BlockId(*block)) {
            let nonce = Nonce::new(self.attempts as u64 * 1000 + u64::from(block.0));
            let place = format!("{} {}", self.attempts, block.0).into_bytes();
            let lent = source.lend(block, nonce).unwrap().expect("a memfd");
            self.second.lent.lock().unwrap().insert(place.clone(), lent);
            offered.blocks.push((Handover { block, reach: Reach::Host, place }, nonce));
        }
        let writers = vm.recipe().vcpus();
        let max_stall = Duration::from_millis(20);
        let tracking = Tracking { writers, max_stall, synchronous: false, group: None };
        let tracker = source.switching(tracking).unwrap();
        let dial: Arc<dyn Dial> =
            Arc::new(TcpDial::new(vec![self.dial], "here", migration, Security::Plaintext));
        let parts = SourceParts {
            vm: "vm".into(),
            from: "first".into(),
            to: "second".into(),
            migration,
            epoch: Epoch(self.attempts as u64),
            came_by: None,
            recipe: serde_json::to_vec(&recipe).unwrap(),
            private,
            reading: Default::default(),
            memory: source.memory(),
            offered,
            tracker: Some(Box::new(tracker)),
            stuns: None,
            machine: SharedPort::new(Box::new(vm)),
            journal: Box::new(Nothing),
            cores: Box::new(|| 1),
            history: vec![],
            link_history: LinkHistory { link: Some(Rate(1 << 30)), switchover: Duration::from_millis(14) },
            streams: 2..=2,
            writers,
            record: Arc::new(RemoteRecord(dial.clone())),
            dial,
        };
        let options = MigrateOptions { mode: Mode::PreCopy, ..MigrateOptions::to("second") };
        thread::scope(|scope| {
            let running = Arc::new(OnceLock::<engine::Handle>::new());
            let (events, happened) = std::sync::mpsc::channel();
            let events = Mutex::new(events);
            // The driver waits until it has happened.
            let heard = Arc::new(move |event: Event| {
                if let Event::Phase { phase, .. } = event {
                    let (done, wait) = std::sync::mpsc::channel::<()>();
                    drop(events.lock().unwrap().send((phase, done)));
                    let _ = wait.recv();
                }
            });
            let (driver, handle) = SourceDriver::new(parts, options, heard);
            let _ = running.set(handle);
            let waits = scope.spawn(move || driver.run());
            for (phase, done) in happened {
                if let Some((when, act)) = meanwhile
                    && when == phase
                {
                    act(running.get().unwrap());
                }
                drop(done);
            }
            let report = waits.join().unwrap();
            self.second.lent.lock().unwrap().clear();
            report
        })
    }

    /// The QEMU that was started last.
    fn last(&self) -> (qemu::Handle, u64) {
        self.second.started.lock().unwrap().clone().unwrap()
    }
}

/// The last heartbeat on a console, by which the guest still finds its memory right.
fn beat(console: &Path) -> u64 {
    let text = fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(!text.contains("CORRUPT") && !text.contains("Kernel panic"), "{text}");
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let number =
        |line: &str| line.split_whitespace().find_map(|word| word.strip_prefix("beat=")?.parse().ok());
    whole.lines().rev().find_map(number).unwrap_or(0)
}

fn beats_beyond(console: &Path, beyond: u64) {
    let end = Instant::now() + LONG;
    while beat(console) <= beyond {
        assert!(Instant::now() < end, "the guest beats no further than {}", beat(console));
        thread::sleep(Duration::from_millis(20));
    }
}

/// What a test needs, or it is skipped.
fn tools(story: &str) -> Option<Tools> {
    Tools::find().map_err(|lacks| skip(story, &lacks)).ok()
}

/// A guest of two NUMA nodes of these sizes, in MiB; or one without nodes.
fn guest(tools: &Tools, host: &qemu::Host, nodes: &[u64], ends: &Ends) -> Vm {
    let text = format!(
        "name = \"vm\"\nvcpus = 2\nmemory = \"{}MiB\"\naccel = \"tcg\"\nkernel = {:?}\ninitrd = {:?}\n\
         cmdline = \"console=ttyS0 quiet panic=-1 {WORK}\"\n",
        nodes.iter().sum::<u64>(),
        tools.kernel,
        tools.initrd,
    );
    let mut recipe = qemu::VmFile::parse(&text, Path::new("vm.toml")).unwrap().recipe(host).unwrap();
    if nodes.len() > 1 {
        recipe.main_memory = None;
        recipe.memory.clear();
        for (node, mib) in nodes.iter().enumerate() {
            let id = format!("ram{node}");
            recipe
                .arguments
                .push(Argument::new("-numa", format!("node,nodeid={node},cpus={node},memdev={id}")));
            recipe.memory.push(MemoryBlock { id, bytes: mib * MIB, backing: Backing::Memfd });
        }
    }
    let vm = Vm::run(&recipe, host).unwrap();
    ends.with(vm.process().pid());
    beats_beyond(vm.console().unwrap(), 10);
    vm
}

/// QEMUs that end with their test, also when that panics.
#[derive(Clone, Default)]
struct Ends(Arc<Mutex<Vec<PidFd>>>);

impl Ends {
    fn with(&self, pid: i32) {
        self.0.lock().unwrap().push(PidFd::open(pid).unwrap());
    }

    /// Kills the one that was started last.
    fn kill_last(&self) {
        let _ = pidfd_send_signal(self.0.lock().unwrap().last().unwrap(), Signal::KILL);
    }
}

/// The test's own: whoever else has them may outlive it.
struct EndsHere(Ends);

impl Drop for EndsHere {
    fn drop(&mut self) {
        if let Ok(processes) = self.0.0.lock() {
            for process in processes.iter() {
                let _ = pidfd_send_signal(process, Signal::KILL);
            }
        }
    }
}

#[test]
fn a_second_qemu_takes_a_guest_over_and_no_memory_moves() {
    let Some(tools) = tools("a second QEMU") else { return };
    let folder = tempfile::tempdir().unwrap();
    let host = qemu::Host::new(folder.path().join("first"));
    let ends = EndsHere(Ends::default());
    let vm = guest(&tools, &host, &[256], &ends.0);
    let (first, console) = (vm.handle(), vm.console().unwrap().to_owned());
    drop(vm);
    let mut bed = Bed::new(folder.path(), tools.qemu_10.clone(), &ends.0);

    // In vain: the waiting QEMU dies when the guest is about to be stopped, and then somebody cancels.
    let dies = |_: &engine::Handle| ends.0.kill_last();
    let cancels = |handle: &engine::Handle| handle.cancel();
    let rows: [(Meanwhile<'_>, Outcome); 3] = [
        ((Phase::Switchover, &dies), Outcome::Failed),
        ((Phase::PreCopy, &cancels), Outcome::Cancelled),
        ((Phase::Switchover, &cancels), Outcome::Cancelled),
    ];
    for (meanwhile, outcome) in rows {
        let seen = beat(&console);
        let report = bed.take_over(&first, &[0], Some(meanwhile));
        assert_eq!(report.outcome, outcome, "{:?}", report.error);
        beats_beyond(&console, seen + 5);
    }

    // For good.
    let seen = beat(&console);
    let report = bed.take_over(&first, &[0], None);
    let (second, own) = bed.last();
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.error);
    assert_eq!((report.handed_over, report.guest_bytes), (256 * MIB, 256 * MIB));
    assert!(report.wire_bytes <= MIB, "{} bytes moved", report.wire_bytes);
    assert_eq!(own, 0, "memory was doubled");
    eprintln!("pause {:?} ms, {} bytes", report.downtime_ms, report.wire_bytes);
    let mut vm = Vm::reopen(&second).unwrap();
    assert_eq!(vm.run_state().unwrap(), RunState::Running);
    // Its counters and its checks go on.
    beats_beyond(vm.console().unwrap(), seen + 20);
    vm.destroy().unwrap();
}

#[test]
fn memory_that_is_not_reached_travels_beside_what_is() {
    let Some(tools) = tools("one block of two") else { return };
    let folder = tempfile::tempdir().unwrap();
    let host = qemu::Host::new(folder.path().join("first"));
    let ends = EndsHere(Ends::default());
    let vm = guest(&tools, &host, &[192, 64], &ends.0);
    let (first, console) = (vm.handle(), vm.console().unwrap().to_owned());
    drop(vm);
    let mut bed = Bed::new(folder.path(), None, &ends.0);
    let seen = beat(&console);
    let report = bed.take_over(&first, &[0], None);
    let (second, _) = bed.last();
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.error);
    assert_eq!((report.handed_over, report.guest_bytes), (192 * MIB, 256 * MIB));
    let pages: u64 = report.rounds.iter().map(|round| round.pages).sum();
    assert!(pages > 0 && report.rounds[0].pages <= 64 * MIB / 4096, "{:?}", report.rounds);
    let mut vm = Vm::reopen(&second).unwrap();
    beats_beyond(vm.console().unwrap(), seen + 20);
    vm.destroy().unwrap();
}

/// By its agent: a client talks to the guest all the while.
#[test]
fn a_vm_moves_to_another_qemu_of_its_host_and_back() {
    story("another QEMU of one host", &["a"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let vm = VmFile { vcpus: 2, ..VmFile::new("web", Spec::new(151, "whimbrel.check=48M,rate=8M")) };
        let guest = stage.run("a", &vm)?;
        let client = guest.echo(Duration::from_millis(5))?;
        let pid = || -> Result<u64> {
            let shown = stage.show("a", "web")?.doing("find the VM")?;
            shown["pid"].as_u64().doing("find its QEMU")
        };
        let lives = |pid: u64| Path::new(&format!("/proc/{pid}/exe")).exists();
        let first = pid()?;

        // In vain.
        stage.start_migration("web", "a", "self", &["--qemu", "/bin/false"])?.ended("failed", 1)?;
        ensure!(pid()? == first, "it stays in its QEMU");
        guest.runs()?;

        // What it would take: nothing travels, and afterwards nothing is lent any more.
        let cli = stage.agent("a").cli();
        let plan = cli.json(&["plan", "web", "--to", "self"])?;
        ensure!(plan["memory_bytes"] == 0 && plan["takes"] == "pre-copy", "{plan}");
        ensure!(plan["handed_over"].as_u64().is_some_and(|bytes| bytes >= 128 * MIB), "{plan}");
        cli.run(["plan", "web", "--to", "self"])?.succeeded()?.says(&["stays where it is"])?;
        ensure!(pid()? == first, "it stays in its QEMU");

        let newer = tools.qemu_10.as_ref().map(|qemu| qemu.to_string_lossy().into_owned());
        let mut rows = vec![vec!["--verify"], vec![]];
        rows.extend(newer.iter().map(|newer| vec!["--qemu", newer.as_str()]));
        for options in rows {
            let before = pid()?;
            let report = stage.start_migration("web", "a", "self", &options)?.completed()?;
            ensure!(report.0["handed_over"] == report.0["guest_bytes"], "{}", report.0);
            ensure!(report.0["handed_over"] == plan["handed_over"], "{}, planned {plan}", report.0);
            ensure!(report.0["forecast"]["handed_over"] == plan["handed_over"], "{}", report.0);
            ensure!(report.number("wire_bytes")? <= MIB as f64, "{}", report.0);
            ensure!(report.0["fate"]["host"] == "a", "{}", report.0);
            eprintln!("{options:?}: pause {} ms", report.number("downtime_ms")?);
            stage.runs_only_on("web", "a")?;
            ensure!(pid()? != before && !lives(before), "one QEMU is left, and it is another");
            guest.runs()?;
            guest.verify()?;
        }
        client.finish(Duration::from_secs(10))?;
        stage.agent("a").cli().json(&["stop", "web"])?;
        Ok(())
    });
}
