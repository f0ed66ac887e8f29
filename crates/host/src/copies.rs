//! The memory of VMs that have left, for when they come back.
//!
//! It is content and nothing else: no VM ever runs in it. Only the host that a VM left for is told of it, and
//! only if it has the VM from that migration. Whoever else wants memory gets it: then what is kept is given
//! back at once, also what a VM that comes back is using.

use agent::config::Keep;
use ports::Block;
use std::{
    sync::{Arc, Mutex, Weak},
    thread,
    time::Duration,
};
use sys::{cgroup::Cgroup, pressure::Pressure, room::Room};
use units::{Bytes, Locked, MigrationId};

/// How often it is looked how much memory is left; programs that wait for memory are heard of at once.
const LOOK: Duration = Duration::from_secs(1);

/// Where less than one part in so many is left, of the host's memory or of what a cgroup may have, nothing is
/// kept.
const LOW: u64 = 16;

/// All that is kept on this host.
#[derive(Clone, Debug)]
pub(crate) struct Copies(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    keep: Keep,
    /// What is left in these cgroups, and on this host.
    look: fn(&[Cgroup]) -> Vec<Room>,
    all: Mutex<All>,
}

#[derive(Debug, Default)]
struct All {
    /// What left first is first.
    copies: Vec<Copy>,
    /// What VMs use that are coming back. What nobody has any more is gone.
    in_use: Vec<Weak<attach::Kept>>,
    /// The cgroups that count any of it.
    groups: Vec<Cgroup>,
    /// Whether somebody looks how much memory is left.
    is_watched: bool,
}

#[derive(Debug)]
struct Copy {
    vm: String,
    /// Where it went, and by which migration.
    to: String,
    left_by: MigrationId,
    memory: Arc<attach::Kept>,
    bytes: u64,
}

/// Memory of a VM that is about to leave.
pub(crate) struct Leaves {
    pub(crate) memory: Arc<attach::Memory>,
    /// The cgroups of its process: they count its memory as long as that is there.
    pub(crate) groups: Vec<Cgroup>,
}

/// What is given back. Gigabytes take a while to be freed: never under a lock for which somebody waits.
#[must_use = "it is given back when this is dropped"]
struct Gone {
    copies: Vec<Copy>,
    in_use: Vec<Arc<attach::Kept>>,
}

impl Drop for Gone {
    fn drop(&mut self) {
        self.in_use.iter().for_each(|memory| memory.abandon());
        self.copies.clear();
    }
}

impl Copies {
    /// Keeps so much.
    pub(crate) fn new(keep: Keep) -> Self {
        Self::within(keep, Room::all)
    }

    fn within(keep: Keep, look: fn(&[Cgroup]) -> Vec<Room>) -> Self {
        Self(Arc::new(Shared { keep, look, all: Mutex::default() }))
    }

    /// A VM has left, and its process has ended: its memory is kept if there is room for it.
    pub(crate) fn keep(&self, vm: &str, to: &str, left_by: MigrationId, leaves: Leaves) {
        if self.0.keep.of(u64::MAX) == 0 {
            return;
        }
        let memory = match attach::Kept::of(&leaves.memory) {
            Ok(Some(memory)) => Arc::new(memory),
            Ok(None) => return tracing::debug!(vm, "its memory is others', too, and not kept"),
            Err(error) => return tracing::warn!(vm, %error, "its memory cannot be kept"),
        };
        let (bytes, (vm, to)) = (memory.allocated(), (vm.to_owned(), to.to_owned()));
        self.add(Copy { vm, to, left_by, memory, bytes }, leaves.groups);
    }

    fn add(&self, copy: Copy, groups: Vec<Cgroup>) {
        let mut all = self.0.all.locked();
        // Whatever came here by a migration was written by the agent.
        let own = sys::cgroup::of("self").unwrap_or_default();
        all.counted_by(own.into_iter().chain(groups));
        let sizes: Vec<u64> = all.copies.iter().map(|copy| copy.bytes).collect();
        let used = all.used();
        let kept = sizes.iter().fold(used, |sum, size| sum.saturating_add(*size));
        let left = (self.0.look)(&all.groups).iter().map(|room| room.left).min().unwrap_or(0);
        let free = left.saturating_add(kept).saturating_add(copy.bytes);
        let most = self.0.keep.of(free).saturating_sub(used);
        let (vm, to, bytes) = (&copy.vm, &copy.to, Bytes(copy.bytes));
        let Some(leave) = make_way(&sizes, copy.bytes, most) else {
            drop(all);
            return tracing::info!(vm, %bytes, "its memory is more than may be kept");
        };
        tracing::info!(vm, to, %bytes, "its memory is kept for when it comes back");
        let mut gone = Gone { copies: all.copies.drain(..leave).collect(), in_use: vec![] };
        all.copies.push(copy);
        if !std::mem::replace(&mut all.is_watched, true) {
            let shared = Arc::downgrade(&self.0);
            let watched = thread::Builder::new().name("kept".into()).spawn(move || watch(&shared));
            if let Err(error) = watched {
                tracing::warn!(%error, "nobody would see that memory gets scarce: nothing is kept");
                gone.copies.append(&mut all.copies);
                all.is_watched = false;
            }
        }
        drop(all);
        drop(gone);
    }

    /// A VM of this name comes: what is kept of the one that left, if it is the same, with the same memory,
    /// and comes from where it went. Whatever else is kept under its name is forgotten.
    pub(crate) fn take(
        &self,
        vm: &str,
        from: &str,
        came_by: Option<MigrationId>,
        blocks: &[Block],
    ) -> Option<Arc<attach::Kept>> {
        let mut all = self.0.all.locked();
        let (mut of_vm, others) = all.copies.drain(..).partition::<Vec<_>, _>(|copy| copy.vm == vm);
        all.copies = others;
        let same =
            |copy: &Copy| Some(copy.left_by) == came_by && copy.to == from && copy.memory.blocks() == blocks;
        let used = of_vm.pop_if(|copy| same(copy)).map(|copy| copy.memory);
        all.in_use.extend(used.as_ref().map(Arc::downgrade));
        drop(all);
        drop(of_vm);
        used
    }

    /// Gives memory back until there is room: what left first before all else, what is of this VM last, and
    /// then what is in use. Nothing if all of it would not do. `has_room`: with so much more memory.
    pub(crate) fn make_room(&self, vm: &str, has_room: impl Fn(u64) -> bool) {
        let all = self.0.all.locked().bytes();
        if has_room(0) || !has_room(all) {
            return;
        }
        while let Some(gone) = self.next_to_go(vm) {
            drop(gone);
            if has_room(0) {
                return;
            }
        }
    }

    fn next_to_go(&self, vm: &str) -> Option<Gone> {
        let mut all = self.0.all.locked();
        if !all.copies.is_empty() {
            let first = all.copies.iter().position(|copy| copy.vm != vm).unwrap_or(0);
            let copy = all.copies.remove(first);
            tracing::info!(vm = copy.vm, bytes = %Bytes(copy.bytes), "what was kept of it makes room");
            return Some(Gone { copies: vec![copy], in_use: vec![] });
        }
        let in_use = all.take_used();
        (!in_use.is_empty()).then(|| {
            tracing::info!("what is kept of VMs that are coming back makes room");
            Gone { copies: vec![], in_use }
        })
    }
}

impl All {
    /// These count some of it, too.
    fn counted_by(&mut self, groups: impl IntoIterator<Item = Cgroup>) {
        if self.copies.is_empty() && self.in_use.is_empty() {
            self.groups.clear();
        }
        for group in groups {
            if !self.groups.contains(&group) {
                self.groups.push(group);
            }
        }
    }

    fn take_used(&mut self) -> Vec<Arc<attach::Kept>> {
        self.in_use.drain(..).filter_map(|memory| memory.upgrade()).collect()
    }

    /// What is in use takes so much. What was used up is forgotten.
    fn used(&mut self) -> u64 {
        self.in_use.retain(|memory| memory.strong_count() > 0);
        let used = self.in_use.iter().filter_map(Weak::upgrade).map(|memory| memory.allocated());
        used.fold(0, u64::saturating_add)
    }

    /// So much memory would be there if all of it were given back.
    fn bytes(&mut self) -> u64 {
        let used = self.used();
        self.copies.iter().map(|copy| copy.memory.allocated()).fold(used, u64::saturating_add)
    }
}

/// How many of the oldest make way for so many bytes more, where there may be `most`; none: all would not do.
fn make_way(sizes: &[u64], bytes: u64, most: u64) -> Option<usize> {
    let room = most.checked_sub(bytes)?;
    let mut kept: u64 = sizes.iter().fold(0, |sum, size| sum.saturating_add(*size));
    let mut leave = 0;
    while kept > room {
        kept -= sizes.get(leave)?;
        leave += 1;
    }
    Some(leave)
}

/// Gives everything back once memory gets scarce. Ends when nothing is kept.
fn watch(shared: &Weak<Shared>) {
    let mut pressure = Pressure::watch().inspect_err(|error| {
        tracing::info!(%error, "the kernel does not say when programs wait for memory; the agent looks");
    });
    loop {
        let waited = pressure.as_mut().ok().and_then(|pressure| pressure.wait(LOOK).ok());
        if waited.is_none() {
            thread::sleep(LOOK);
        }
        let Some(shared) = shared.upgrade() else { return };
        if !shared.look_after(waited == Some(true)) {
            return;
        }
    }
}

impl Shared {
    /// Gives everything back if memory is scarce. Says whether anything is kept still.
    fn look_after(&self, has_waited: bool) -> bool {
        let mut all = self.all.locked();
        let is_scarce = has_waited || (self.look)(&all.groups).iter().any(|room| room.left < room.of / LOW);
        let mut gone = Gone { copies: vec![], in_use: vec![] };
        if is_scarce {
            gone = Gone { copies: std::mem::take(&mut all.copies), in_use: all.take_used() };
        }
        let is_left = !all.copies.is_empty() || all.used() > 0;
        all.is_watched = is_left;
        drop(all);
        if !gone.copies.is_empty() || !gone.in_use.is_empty() {
            let (copies, in_use) = (gone.copies.len(), gone.in_use.len());
            tracing::info!(copies, in_use, "memory is scarce: what was kept of VMs is given back");
        }
        is_left
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ports::KeptCopy;
    use std::{
        fs::File,
        io,
        sync::atomic::{AtomicU64, Ordering::SeqCst},
    };
    use sys::ram::RamFile;
    use units::{BlockId, PAGE_SIZE, PageIndex, PageRange};

    const MIB: u64 = 1 << 20;
    const VM: MigrationId = MigrationId(7);

    #[test]
    fn what_left_first_makes_way_first() {
        let table = [
            (&[][..], 10, 10, Some(0)),
            (&[], 11, 10, None),
            (&[5, 5], 10, 20, Some(0)),
            (&[5, 5], 10, 19, Some(1)),
            (&[5, 5], 10, 14, Some(2)),
            (&[5, 5], 10, 10, Some(2)),
            (&[1, 9, 1], 5, 7, Some(2)),
            (&[u64::MAX, 1], 5, 7, Some(1)),
        ];
        for (sizes, bytes, most, leave) in table {
            assert_eq!(make_way(sizes, bytes, most), leave, "{sizes:?} and {bytes} in {most}");
        }
    }

    /// A megabyte of memory that nobody else has.
    fn memory() -> Arc<attach::Kept> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("kept", flags).unwrap());
        file.set_len(MIB).unwrap();
        let ram = RamFile::new(file, 0, MIB).unwrap();
        ram.write(PageRange::new(PageIndex(0), ram.pages()), &vec![5; MIB as usize]).unwrap();
        let block = Block { name: "ram".to_owned(), pages: ram.pages() };
        Arc::new(attach::Kept::new(vec![block], vec![Some(ram)]).unwrap().unwrap())
    }

    fn copy(vm: &str) -> Copy {
        let memory = memory();
        Copy { vm: vm.to_owned(), to: "b".to_owned(), left_by: VM, bytes: memory.allocated(), memory }
    }

    fn read(memory: &attach::Kept) -> io::Result<()> {
        memory.read(BlockId(0), PageRange::new(PageIndex(3), 1), &mut [0; PAGE_SIZE])
    }

    fn names(copies: &Copies) -> Vec<String> {
        copies.0.all.locked().copies.iter().map(|copy| copy.vm.clone()).collect()
    }

    /// A host on which there is always enough.
    fn enough(_: &[Cgroup]) -> Vec<Room> {
        vec![Room { left: 1 << 40, of: 1 << 40, place: "here".to_owned() }]
    }

    /// What this machine lacks while the test runs changes nothing: nobody looks but the test.
    fn unwatched(keep: Keep, look: fn(&[Cgroup]) -> Vec<Room>) -> Copies {
        let copies = Copies::within(keep, look);
        copies.0.all.locked().is_watched = true;
        copies
    }

    /// Keeps memory of `idle`, and of `used`, which has come back and uses it.
    fn kept(look: fn(&[Cgroup]) -> Vec<Room>) -> (Copies, Arc<attach::Kept>) {
        let copies = unwatched(Keep::Share(100), look);
        for vm in ["used", "idle"] {
            copies.add(copy(vm), vec![]);
        }
        let memory = copies.0.all.locked().copies[0].memory.clone();
        let used = copies.take("used", "b", Some(VM), memory.blocks()).unwrap();
        read(&used).unwrap();
        assert_eq!(names(&copies), ["idle"]);
        (copies, used)
    }

    #[test]
    fn what_is_used_is_given_back_when_memory_is_scarce() {
        let (copies, used) = kept(enough);
        assert!(copies.0.look_after(false), "there is enough");
        read(&used).unwrap();
        // Some program waits for memory.
        assert!(!copies.0.look_after(true), "nothing is left");
        read(&used).unwrap_err();
        assert_eq!((used.allocated(), names(&copies)), (0, vec![]));
    }

    #[test]
    fn i2_what_a_cgroup_lacks_is_given_back_as_what_the_host_lacks() {
        static LEFT: AtomicU64 = AtomicU64::new(1000);
        fn look(_: &[Cgroup]) -> Vec<Room> {
            let group = Room { left: LEFT.load(SeqCst) * MIB, of: 1000 * MIB, place: "a cgroup".to_owned() };
            [enough(&[]), vec![group]].concat()
        }
        let (copies, used) = kept(look);
        LEFT.store(1000 / LOW + 1, SeqCst);
        assert!(copies.0.look_after(false), "there is enough");
        read(&used).unwrap();
        LEFT.store(1000 / LOW - 1, SeqCst);
        assert!(!copies.0.look_after(false), "nothing is left");
        read(&used).unwrap_err();
    }

    #[test]
    fn no_more_is_kept_than_a_cgroup_leaves() {
        fn look(_: &[Cgroup]) -> Vec<Room> {
            [enough(&[]), vec![Room { left: 0, of: 100 * MIB, place: "a cgroup".to_owned() }]].concat()
        }
        let copies = unwatched(Keep::Share(50), look);
        copies.add(copy("web"), vec![]);
        assert_eq!(names(&copies), [""; 0]);
    }

    #[test]
    fn the_first_copy_is_counted_by_the_agents_cgroups_and_qemus() {
        let copies = unwatched(Keep::Share(100), enough);
        let of_qemu = Cgroup { controllers: vec![], mount: "/".into(), path: "/qemu".into() };
        copies.add(copy("web"), vec![of_qemu.clone()]);
        let mut expected = sys::cgroup::of("self").unwrap_or_default();
        expected.push(of_qemu);
        assert_eq!(copies.0.all.locked().groups, expected);
    }

    #[test]
    fn what_is_used_makes_room_last_and_nothing_goes_in_vain() {
        let (copies, used) = kept(enough);
        copies.make_room("new", |_| false);
        assert_eq!(names(&copies), ["idle"], "all of it would not do");
        copies.make_room("new", |_| true);
        assert_eq!(names(&copies), ["idle"], "there is room");
        // As much as all that is kept but for one.
        copies.make_room("new", |more| more > 0 || names(&copies).is_empty());
        assert_eq!(names(&copies), [""; 0]);
        read(&used).unwrap();
        copies.make_room("new", |more| more > 0 || used.allocated() == 0);
        read(&used).unwrap_err();
    }

    #[test]
    fn what_is_used_is_watched_until_it_is_used_up() {
        let (copies, used) = kept(enough);
        copies.make_room("new", |more| more > 0 || names(&copies).is_empty());
        assert!(copies.0.look_after(false), "it is in use");
        drop(used);
        assert!(!copies.0.look_after(false), "nothing is left to be looked after");
    }
}
