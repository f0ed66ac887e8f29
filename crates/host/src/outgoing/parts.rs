//! What a migration consists of at its source: ports, options, and what is known of the way.

use super::{Mover, Within};
use crate::{
    copies::Leaves,
    hypervisor::{kept, open},
    second::Decision,
    watchdog::{Watchdog, Watched, WatchedTracker},
};
use agent::{
    config::{Address, Tracker as Kind},
    migrate::{Events, MigrateRequest},
    store::{SELF, Side},
};
use api::{Event, PastMigration, Phase};
use engine::{Dial, LinkHistory, Offered, Reading, RemoteRecord, SharedPort, SourceParts, TcpDial};
use pki::Security;
use ports::shared::not_behind;
use ports::{Ownership, SourceJournal, Tracker};
use qemu::{Accel, Begun, MemoryError, SpareCores, Vm, sharing::Shown};
use std::{
    io,
    net::{SocketAddr, ToSocketAddrs},
    ops::RangeInclusive,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};
use sys::{cgroup, pulse::Pulse};
use units::{Epoch, Locked, MigrationId, Rate};

/// How many data connections a migration begins with: with one, its two threads are the limit before a fast
/// link is (`./dev bench --streams`). More are used where that moves more.
const STREAMS: u32 = 2;

/// The most unless the user says otherwise; each takes a thread and a few MiB on both sides. Eight fill 100
/// Gbit/s (Cloud Hypervisor, pull request 7669).
const MOST_STREAMS: u32 = 8;

/// What a switchover costs besides moving dirty memory: stop, device state, claim, start. Under emulation
/// `./dev bench --only steady` shows 14 ms; with KVM the guest's stop and QEMU's own threads wait for nobody,
/// which is worth about 6. Too low, and the pause is longer than promised; too high, and rounds go on for
/// nothing. Replaced by what was seen on the way to each host.
const SWITCHOVER: Duration = Duration::from_millis(8);
const EMULATED_SWITCHOVER: Duration = Duration::from_millis(14);

/// What this host's connection to itself carries, about: it is not worth a probe.
const LOOPBACK: Rate = Rate(2 << 30);

/// A reading that took longer than this is not done once more: its QEMU hangs.
const LONG_READING: Duration = Duration::from_secs(2);

/// What is said where an older QEMU is allowed.
const OLDER: &str = "an older QEMU may take it over: QEMU does not promise that it can read what a newer one \
                     saves; if it cannot, the VM stays here";

/// What is said where secrets would be seen on the network.
const SECRETS_IN_PLAINTEXT: &str = "QEMU decrypts a disk of it (LUKS), and the secret for that leaves this \
                                    host over an encrypted connection only: start both agents with \
                                    certificates (whimbrel pki), without --insecure-plaintext";

/// A VM as it was read when its migration began.
struct Read {
    open: Vm,
    notes: Vec<String>,
    took: Duration,
    shown: Option<Shown>,
}

impl Mover {
    /// How many streams a migration may use: what the last one found out need not be found out again.
    fn streams_of(request: &MigrateRequest, history: &[PastMigration]) -> RangeInclusive<u32> {
        if let Some(n) = request.options.streams {
            return n.into()..=n.into();
        }
        let (least, most) = streams().into_inner();
        let before = history.last().map_or(0, |past| past.streams);
        least.max(before.min(most))..=most
    }

    /// What is known of the way to a host, for a VM that is executed like this one.
    pub(super) fn link_history(&self, to: &str, accel: Accel) -> LinkHistory {
        let known = self.store.link_history(to);
        let usual = if accel == Accel::Kvm { SWITCHOVER } else { EMULATED_SWITCHOVER };
        // A quick one may have been luck; one that was disturbed must not lengthen those that follow, nor
        // make them impossible.
        let switchover = known.switchover().map_or(usual, |seen| seen.clamp(usual / 2, usual));
        LinkHistory { link: known.link(), switchover }
    }

    /// The VM as it is now, and its files, which are shown to the target if it is `for_real`; or why it
    /// cannot be moved.
    fn read(&self, request: &MigrateRequest, for_real: bool) -> Result<Read, Vec<String>> {
        let one = |error: &dyn std::fmt::Display| vec![error.to_string()];
        let mut open = open(&request.vm).map_err(|e| one(&e))?;
        if for_real {
            self.buffer(&request.vm, &mut open).map_err(|why| vec![why])?;
        }
        let Begun { reasons, notes, took } = open.begin().map_err(|e| one(&e))?;
        if !reasons.is_empty() {
            return Err(reasons);
        }
        let within = request.options.to == SELF;
        if !within && !open.recipe().secrets.is_empty() && matches!(self.security, Security::Plaintext) {
            return Err(vec![SECRETS_IN_PLAINTEXT.to_owned()]);
        }
        let shown = if for_real && !within {
            Some(open.show_files(self.store.host(), &request.id.to_string())?)
        } else {
            open.check_files()?;
            None
        };
        Ok(Read { open, notes, took, shown })
    }

    /// All that a migration consists of; if it is `for_real`, with its watchdog, and its files shown to the
    /// target for as long as what comes with it lives. With the VM's memory, which may be kept.
    pub(super) fn parts(
        &self,
        request: &MigrateRequest,
        for_real: bool,
        pulse: &Pulse,
        within: Option<&Within>,
    ) -> Result<(SourceParts, Option<Shown>, Leaves), Vec<String>> {
        let one = |error: &dyn std::fmt::Display| vec![error.to_string()];
        let vm = &request.vm;
        // What was read while somebody changed the VM does not fit together.
        let began = Instant::now();
        let Read { mut open, notes, took, shown } = self.read(request, for_real).or_else(|reasons| {
            if began.elapsed() > LONG_READING {
                return Err(reasons);
            }
            tracing::info!(vm = vm.name, ?reasons, "refused; reading it once more");
            self.read(request, for_real)
        })?;
        tracing::debug!(vm = vm.name, ?took, "read again");
        let cores = cores(request.options.cpu, SpareCores::beside(open.process()));
        let mut link_history = self.link_history(&request.options.to, open.recipe().accel);
        if within.is_some() {
            link_history.link = Some(LOOPBACK);
        }
        let recipe = shown.as_ref().map_or(open.recipe(), |shown| &shown.recipe);
        let kvm = if open.recipe().accel == Accel::Kvm { self.qemu.host().kvm } else { None };
        let kvm_speed = kvm.map(|kvm| kvm.speed);
        let recipe = qemu::Recipe {
            nets: open.networks()?,
            kvm_speed,
            allow_older_qemu: request.options.allow_older_qemu,
            ..recipe.clone()
        };
        let virtio = open.accepted_of_virtio().map_err(|e| one(&e))?;
        let recipe = qemu::Recipe { virtio, ..recipe };
        let recipe = serde_json::to_vec(&recipe).map_err(|e| one(&e))?;
        let private = open.copy_ahead().map_err(|e| one(&e))?;
        let mut left_behind = notes;
        left_behind.extend(open.warnings().map_err(|e| one(&e))?);
        if request.options.allow_older_qemu {
            left_behind.push(OLDER.to_owned());
        }
        let reading = Reading { left_behind, took };
        let source = attach::Source::open(open.process().pid(), open.ram_blocks());
        let source = source.map_err(|e| one(&MemoryError(e)))?;
        let source = source.with_pulse(pulse.clone()).with_discards(open.recipe().throws_memory_away());
        let writers = open.recipe().vcpus();
        let how = attach::Tracking {
            writers,
            max_stall: request.options.max_stall,
            synchronous: self.config.tracker == Kind::Synchronous,
            group: self.config.group.0,
        };
        // First of all: from here on the guest may have to wait for us.
        let watchdog =
            Watchdog::start(vm, pulse).map_err(|e| vec![format!("cannot start a watchdog: {e}")])?;
        let watchdog = Arc::new(watchdog);
        let tracker = source.switching(how).map_err(|e| one(&MemoryError(e)))?;
        let tracker: Box<dyn Tracker> = Box::new(WatchedTracker::new(Box::new(tracker), watchdog.clone()));
        let vcpus = open.vcpu_threads().map_err(|e| one(&e))?;
        let stuns = source.stuns(vcpus, request.options.max_stall).map_err(|e| one(&MemoryError(e)))?;
        let address = request.address.to_string();
        let dial = match within {
            Some(Within { door, .. }) => door.dial(self.store.host(), request.id, &self.security),
            None => self.dial(&request.options.to, &address, request.id).map_err(|e| one(&e))?,
        };
        let offered = match within {
            Some(Within { second, .. }) => second.lend(&source, &open),
            // No other host reaches this one's memory yet.
            None => Ok(Offered::default()),
        };
        let offered = offered.map_err(|why| vec![why])?;
        let (epoch, identity) = self.owned(&vm.name).map_err(|e| one(&e))?;
        // A host decides by itself between two QEMUs of its own.
        let identity = if within.is_some() { String::new() } else { identity };
        let record: Arc<dyn Ownership> = match (within, &self.shared) {
            (Some(_), _) => Arc::new(Decision { store: self.store.clone(), side: Side::First }),
            (None, Some(shared)) => shared.clone(),
            (None, None) => Arc::new(RemoteRecord(dial.clone())),
        };
        let journal =
            self.store.departure(&vm.name, request.id, &request.options.to, &address).decided_by(&identity);
        let journal = journal.with_memory(serde_json::to_value(open.ram_blocks()).map_err(|e| one(&e))?);
        let journal: Box<dyn SourceJournal> = Box::new(Watched::new(journal, watchdog));
        let history = self.store.history(&vm.name);
        let memory = source.memory();
        let groups = cgroup::of(&open.process().pid().to_string()).unwrap_or_default();
        let leaves = Leaves { memory: memory.clone(), groups };
        let parts = SourceParts {
            vm: vm.name.clone(),
            from: self.store.host().to_owned(),
            to: request.options.to.clone(),
            migration: request.id,
            epoch,
            came_by: kept(vm).ok().and_then(|kept| kept.came_by?.parse().ok()),
            recipe,
            private,
            reading,
            memory,
            offered,
            tracker: Some(tracker),
            stuns: Some(Box::new(stuns)),
            machine: SharedPort::new(Box::new(open)),
            journal,
            cores,
            streams: Self::streams_of(request, &history),
            history,
            link_history,
            writers,
            record,
            dial,
        };
        Ok((parts, shown, leaves))
    }

    /// The epoch at which this host owns the VM, and which record says so. A shared one is asked now: if it
    /// cannot be, or says otherwise, nothing is begun.
    fn owned(&self, vm: &str) -> io::Result<(Epoch, String)> {
        let Some(shared) = &self.shared else {
            let owner = self.store.owner(vm)?;
            return Ok((owner.map_or(Epoch(0), |owner| owner.epoch), String::new()));
        };
        let identity = shared.identity()?;
        let found = shared.look(vm)?;
        not_behind(&shared.words(), vm, found.as_ref(), self.store.seen_shared(&identity, vm)?)?;
        match found {
            Some(record) if record.owner == self.store.host() => {
                self.store.note_shared(&identity, vm, &record)?;
                Ok((record.epoch, identity))
            }
            Some(record) => {
                let why = format!(
                    "by {}, it belongs to {:?} at epoch {}",
                    shared.words(),
                    record.owner,
                    record.epoch
                );
                Err(io::Error::other(why))
            }
            None => {
                let why = format!(
                    "{} has never heard of it yet; it is told soon after the agent's start",
                    shared.words()
                );
                Err(io::Error::other(why))
            }
        }
    }

    /// How the host that the user called `to` is reached.
    pub(super) fn dial(&self, to: &str, address: &str, migration: MigrationId) -> io::Result<Arc<dyn Dial>> {
        let address: Address = address.parse().map_err(io::Error::other)?;
        let look_up = |one: &str| one.to_socket_addrs().map(Iterator::collect);
        Ok(Arc::new(TcpDial::at(places(to, &address, look_up)?, migration, self.security.clone())))
    }
}

/// Where a host is called, and what its certificate must be for there: what the user called it, or, where
/// that was an address, that address.
fn places(
    to: &str,
    address: &Address,
    look_up: impl Fn(&str) -> io::Result<Vec<SocketAddr>>,
) -> io::Result<Vec<(SocketAddr, String)>> {
    let (mut places, mut unknown) = (Vec::new(), None);
    for (one, host) in address.each() {
        let called = if to == address.as_str() { host } else { to };
        match look_up(one) {
            Ok(found) => places.extend(found.into_iter().map(|found| (found, called.to_owned()))),
            Err(e) => unknown = Some(io::Error::new(e.kind(), format!("cannot look up {one}: {e}"))),
        }
    }
    // One of several that is not known for the moment is no reason not to use the others.
    match unknown.filter(|_| places.is_empty()) {
        Some(error) => Err(error),
        None => Ok(places),
    }
}

/// Shows files until the target has looked: it has when the phase begins in which pages are sent. In the end
/// it is over in any case.
pub(super) fn until_asked(shown: Option<Shown>, events: Events) -> Events {
    let shown = Mutex::new(shown);
    Arc::new(move |event| {
        if matches!(event, Event::Phase { phase, .. } if phase != Phase::Preflight) {
            drop(shown.locked().take());
        }
        events(event);
    })
}

/// As many data connections as it pays to use, but no more than there are cores: further ones move more only
/// by what they take from the guest (`./dev bench --only steady`: with four on two cores the pause was 20 ms
/// instead of 13, and all took a quarter longer).
pub(super) fn streams() -> RangeInclusive<u32> {
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
    STREAMS..=cores.clamp(STREAMS, MOST_STREAMS)
}

/// How many cores may compress: as many as the user said, or those that the guest leaves.
pub(super) fn cores(wanted: Option<u32>, mut spare: SpareCores) -> Box<dyn FnMut() -> u32 + Send> {
    match wanted {
        Some(cores) => Box::new(move || cores),
        None => Box::new(move || spare.now()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_address_is_asked_for_its_own_certificate() {
        let look_up = |one: &str| match one.rsplit_once(':').unwrap() {
            ("b.example", _) => Ok(vec!["10.0.0.9:1".parse().unwrap(), "[fd00::9]:1".parse().unwrap()]),
            ("unknown", _) => Err(io::Error::other("no such name")),
            _ => Ok(vec![one.parse().unwrap()]),
        };
        let table: &[(&str, &str, &[&str])] = &[
            ("hostb", "10.0.0.2:7471,10.1.0.2:7471", &["10.0.0.2:7471 hostb", "10.1.0.2:7471 hostb"]),
            ("", "10.0.0.2:7471,10.1.0.2:7472", &["10.0.0.2:7471 10.0.0.2", "10.1.0.2:7472 10.1.0.2"]),
            ("", "[fd00::2]:7471,10.1.0.2:7471", &["[fd00::2]:7471 fd00::2", "10.1.0.2:7471 10.1.0.2"]),
            (
                "",
                "b.example:1,10.1.0.2:1",
                &["10.0.0.9:1 b.example", "[fd00::9]:1 b.example", "10.1.0.2:1 10.1.0.2"],
            ),
            ("", "unknown:1,10.1.0.2:1", &["10.1.0.2:1 10.1.0.2"]),
        ];
        for (to, address, wanted) in table {
            let to = if to.is_empty() { address } else { to };
            let found = places(to, &address.parse().unwrap(), look_up).unwrap();
            let found: Vec<_> = found.iter().map(|(at, host)| format!("{at} {host}")).collect();
            assert_eq!(found, *wanted);
        }
        let nowhere = places("unknown:1", &"unknown:1".parse().unwrap(), look_up).unwrap_err();
        assert!(nowhere.to_string().starts_with("cannot look up unknown:1"), "{nowhere}");
    }
}
