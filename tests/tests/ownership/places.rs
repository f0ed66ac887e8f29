//! The back ends, each as several hosts see it.

use agent::store::{Origin, Process, Standing, Store, VmRecord};
use lab::{EtcdServer, FaultyDir, Way};
use ownership::{Etcd, Memory, SharedDir};
use ports::shared::SharedRecord;
use ports::{Claim, Claimed, Offer, Ownership, OwnershipRecord};
use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use units::{Epoch, MigrationId};

/// Longer than anything here takes, also on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Where a back end is, in a form that another process can be told.
#[derive(Clone, Debug)]
pub(crate) enum Where {
    /// The store of the target's agent.
    Store(PathBuf),
    Directory(PathBuf),
    Etcd(Vec<SocketAddr>),
}

impl Where {
    /// For a command line.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Store(path) => format!("store {}", path.display()),
            Self::Directory(path) => format!("directory {}", path.display()),
            Self::Etcd(ends) => {
                format!("etcd {}", ends.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(" "))
            }
        }
    }

    pub(crate) fn parse(text: &str) -> Self {
        let (kind, rest) = text.split_once(' ').unwrap();
        match kind {
            "store" => Self::Store(rest.into()),
            "directory" => Self::Directory(rest.into()),
            _ => Self::Etcd(rest.split(' ').map(|end| end.parse().unwrap()).collect()),
        }
    }

    /// The record, with what a host remembers in `memory`.
    pub(crate) fn record(&self, memory: &Path) -> Arc<dyn Ownership> {
        match self {
            Self::Store(path) => Arc::new(Store::open(path, "b").unwrap()),
            _ => self.shared(memory),
        }
    }

    /// The same, where all hosts share it.
    pub(crate) fn shared(&self, memory: &Path) -> Arc<dyn SharedRecord> {
        let memory = Memory::at(memory).unwrap();
        match self {
            Self::Store(_) => panic!("only the target has it"),
            Self::Directory(path) => Arc::new(SharedDir::new(path, memory)),
            Self::Etcd(ends) => {
                let ends: Vec<String> = ends.iter().map(|end| format!("http://{end}")).collect();
                Arc::new(Etcd::new(&ends, None, memory).unwrap())
            }
        }
    }
}

/// A back end under test, with all that it needs.
pub(crate) struct Place {
    pub(crate) at: Where,
    pub(crate) view: Option<FaultyDir>,
    pub(crate) etcd: Option<EtcdServer>,
    pub(crate) way: Option<Way>,
    /// The redb store, which one process has open at a time.
    store: Option<Arc<Store>>,
    /// Directories of its own: of the hosts, and of the back end. Last, so that it goes once nobody uses it
    /// any more.
    pub(crate) dir: TempDir,
}

impl Place {
    fn new(at: Where, dir: TempDir) -> Self {
        Self { at, dir, view: None, etcd: None, way: None, store: None }
    }

    pub(crate) fn store() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let store = Arc::new(Store::open(&path, "b").unwrap());
        Self { store: Some(store), ..Self::new(Where::Store(path), dir) }
    }

    pub(crate) fn directory() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shared");
        std::fs::create_dir(&path).unwrap();
        Self::new(Where::Directory(path), dir)
    }

    /// A directory seen through a file system that can be told to misbehave; `None`, loudly, where there can
    /// be none.
    pub(crate) fn view(story: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("view");
        match FaultyDir::mount(&at, &dir.path().join("shared")) {
            Ok(view) => Some(Self { view: Some(view), ..Self::new(Where::Directory(at), dir) }),
            Err(why) => {
                lab::skip(story, &why);
                None
            }
        }
    }

    /// A real etcd, asked over a way that can be told to lose things; `None`, loudly, where there can be
    /// none.
    pub(crate) fn etcd(story: &str) -> Option<Self> {
        if let Some(missing) = EtcdServer::missing() {
            lab::skip(story, &missing);
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let server = EtcdServer::start(&dir.path().join("etcd")).unwrap();
        let way = Way::to(server.address()).unwrap();
        let at = Where::Etcd(vec![way.address()]);
        Some(Self { etcd: Some(server), way: Some(way), ..Self::new(at, dir) })
    }

    /// What a host remembers.
    pub(crate) fn memory(&self, host: &str) -> PathBuf {
        self.dir.path().join(format!("{host}.json"))
    }

    /// The record as a host sees it.
    pub(crate) fn record(&self, host: &str) -> Arc<dyn Ownership> {
        match &self.store {
            Some(store) => store.clone(),
            None => self.at.record(&self.memory(host)),
        }
    }

    /// The same, where all hosts share it.
    pub(crate) fn shared(&self, host: &str) -> Arc<dyn SharedRecord> {
        self.at.shared(&self.memory(host))
    }

    /// Closes what only one process can have open.
    pub(crate) fn close(&mut self) {
        self.store = None;
    }

    /// Opens it again.
    pub(crate) fn open(&mut self) {
        if let Where::Store(path) = &self.at {
            self.store = Some(Arc::new(Store::open(path, "b").unwrap()));
        }
    }

    /// A VM that belongs to `a`, and that `b` may have by the migration of this number.
    pub(crate) fn offered(&self, vm: &str, number: u128) -> Offer {
        let mut offer = Offer {
            vm: vm.to_owned(),
            migration: MigrationId(number),
            expected: Epoch(4),
            from: "a".to_owned(),
            to: "b".to_owned(),
        };
        match &self.store {
            Some(store) => {
                let of_source = OwnershipRecord { owner: "a".into(), epoch: offer.expected, migration: None };
                drop(store.accept(&arriving(&offer), &of_source).unwrap());
            }
            None => {
                let record = self.shared("a");
                let Claimed::Yours(epoch) = known(|| record.start(vm, "a", None, None)) else {
                    panic!("{vm} belongs to somebody else")
                };
                offer.expected = epoch;
                known(|| record.offer(&offer));
            }
        }
        offer
    }
}

fn arriving(offer: &Offer) -> VmRecord {
    VmRecord {
        name: offer.vm.clone(),
        recipe: serde_json::json!({}),
        process: Some(Process { pid: 1, start_time: 1 }),
        qmp: "/q".into(),
        belongings: serde_json::Value::Null,
        origin: Origin::Migrated,
        standing: Standing::Arriving { migration: offer.migration, from: offer.from.clone() },
    }
}

/// One side's claim to what was offered.
pub(crate) fn claim(offer: &Offer, claimer: &str) -> Claim {
    let Offer { vm, migration, expected, .. } = offer.clone();
    Claim { vm, migration, expected, claimer: claimer.to_owned() }
}

/// Asks again until it is known. That is all that anybody may do about an error.
pub(crate) fn known<T>(mut ask: impl FnMut() -> io::Result<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(error) => assert!(Instant::now() < end, "never known: {error}"),
        }
        thread::sleep(Duration::from_millis(2));
    }
}
