//! Ownership in a directory on a shared datastore.
//!
//! ```text
//! DIR/identity                            a random number: who reads the same uses the same directory
//! DIR/vms/web1/epoch-…7                   who owns web1 from epoch 7 on; written once, never changed
//! DIR/vms/web1/offer-…7-MIGRATION-a, …-b  by the owner at epoch 7: b may have it, a may have it back
//! ```
//!
//! **A claim is one hard link**: from the claimer's offer to the name of the next epoch. The server does it
//! in one step, and refuses it if the name is taken or the offer is gone. Nothing is asked of locks, of
//! rename, or of time.
//!
//! *At most one wins each epoch.* A name can be given once while it is there, and the server alone decides
//! whether it is: a stale look-up of ours, positive or negative, changes nothing about that. The file of an
//! epoch is removed only once later epochs exist *and* all offers by which its name could be taken again are
//! gone, seen in one look ([`crate::prune`]); offers from an epoch are made by its owner alone, while it is
//! current.
//!
//! *The answer stays.* Files are never written to once they have their name: an offer is complete and durable
//! (file and directory) under a draft's name before it is linked to its own. So the file of an epoch says for
//! ever who won it. A claimer first looks there, and if its link is refused (`EEXIST`), it looks there again:
//! the content tells whether that was its own link, whose reply was lost. "Not there" alone is never an
//! answer: it is an error, as is anything torn, empty or foreign. The directory is synced before any answer
//! is given.
//!
//! *Whoever dies in between* leaves either no link or the link; anybody can read which. Drafts that stay are
//! swept later.
//!
//! *From an old backup.* A claim needs the offer of this very migration and the epoch that it starts from;
//! hosts remember the directory's identity and the newest epoch that they saw of their VMs. What cannot be
//! noticed is a datastore that is set back between a claim and the next moment at which somebody who knows of
//! it asks.
//!
//! Needs hard links within a directory: NFS, CephFS, GlusterFS, GFS2, OCFS2 and local file systems have them,
//! FAT and some SMB servers do not. An NFS server must not be exported `async`: it would forget claims when
//! it crashes.

use crate::{
    changing::Changing,
    draw,
    memory::Memory,
    prune::disposable,
    record::{Entry, LONGEST, check_name},
    steps::{Claiming, Got, Looking, Offering, Op, Step, Steps},
};
use ports::{
    Claim, Claimed, Offer, Ownership, OwnershipRecord,
    shared::{NOBODY, SharedRecord, not_behind},
};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read, Write},
    path::{Path, PathBuf},
};
use units::{Epoch, MigrationId};

/// How many files one look removes at most: whoever waits for an offer waits for that too.
const SWEEP: usize = 16;

/// How often a change that is no migration begins again because somebody else was faster, or because a
/// listing is old.
const TRIES: u32 = 16;

/// A directory that several hosts share.
#[derive(Debug)]
pub struct SharedDir {
    root: PathBuf,
    memory: Memory,
}

impl SharedDir {
    /// The record in `root`, a directory that exists. Nothing is touched before it is asked for.
    pub fn new(root: &Path, memory: Memory) -> Self {
        Self { root: root.to_owned(), memory }
    }

    fn vm_dir(&self, vm: &str) -> io::Result<PathBuf> {
        check_name(vm)?;
        Ok(self.root.join("vms").join(vm))
    }

    /// Runs a machine over the VM's directory.
    fn run<M: Steps>(&self, vm: &str, mut machine: M) -> io::Result<M::Outcome> {
        let dir = self.vm_dir(vm)?;
        let mut step = machine.begin();
        loop {
            step = match step {
                Step::Do(op) => machine.next(act(&dir, &op)),
                Step::End(end) => {
                    return end.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", self.words())));
                }
            };
        }
    }

    fn entry(&self, vm: &str) -> io::Result<Option<Entry>> {
        self.run(vm, Looking::new(vm))
    }

    /// Removes what nobody needs, as far as that goes; there is a next time.
    fn sweep(&self, vm: &str, offering: Option<(u64, MigrationId)>) {
        let Ok(dir) = self.vm_dir(vm) else { return };
        let Got::Names(names) = act(&dir, &Op::List) else { return };
        for name in disposable(&names, offering).into_iter().take(SWEEP) {
            // In their order, and each only once the one before it is gone for certain.
            if act(&dir, &Op::Remove { name }) != Got::Done {
                return;
            }
        }
    }
}

impl Changing for SharedDir {
    fn change(
        &self,
        vm: &str,
        owner: &str,
        known: Option<Epoch>,
        may: &dyn Fn(&str) -> bool,
    ) -> io::Result<Claimed> {
        self.identity()?;
        let mut now = self.entry(vm)?;
        for _ in 0..TRIES {
            let record = now.map(OwnershipRecord::from);
            not_behind(&self.words(), vm, record.as_ref(), known)?;
            let (base, from) = match &record {
                Some(record) => (record.epoch, record.owner.as_str()),
                None => (Epoch(0), NOBODY),
            };
            if let Some(record) = record.clone().filter(|record| !may(&record.owner)) {
                return Ok(Claimed::Lost(record));
            }
            let id = MigrationId(draw()?);
            self.run(vm, Offering::change("it", vm, base, id, from, owner, draw()?))?;
            let claim = Claim { vm: vm.to_owned(), migration: id, expected: base, claimer: owner.to_owned() };
            match self.run(vm, Claiming::new("it", &claim))? {
                Claimed::Yours(epoch) => {
                    self.sweep(vm, None);
                    return Ok(Claimed::Yours(epoch));
                }
                // Somebody was faster; a listing that is old does not show it yet.
                Claimed::Lost(record) => {
                    let faster = Entry {
                        vm: vm.to_owned(),
                        epoch: record.epoch.0,
                        owner: record.owner,
                        from: String::new(),
                        change: record.migration.unwrap_or(MigrationId(0)).to_string(),
                        migration: record.migration.is_some(),
                    };
                    now = self.entry(vm)?.filter(|seen| seen.epoch > faster.epoch).or(Some(faster));
                }
            }
        }
        let why = format!("{}: others were always faster to change who owns {vm}; try again", self.words());
        Err(io::Error::new(ErrorKind::ResourceBusy, why))
    }
}

impl Ownership for SharedDir {
    fn identity(&self) -> io::Result<String> {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", self.words()));
        let number = identity(&self.root, self.memory.has_met(&self.words())).map_err(named)?;
        let identity = format!("directory {number}");
        self.memory.meet(&self.words(), &identity, None)?;
        Ok(identity)
    }

    fn offer(&self, offer: &Offer) -> io::Result<()> {
        check_name(&offer.from)?;
        check_name(&offer.to)?;
        self.identity()?;
        let offered = self.run(&offer.vm, Offering::migration("it", offer, draw()?));
        // Also if it failed: a source that makes one offer has settled all others that it made.
        self.sweep(&offer.vm, Some((offer.expected.0, offer.migration)));
        offered
    }

    fn claim(&self, claim: &Claim) -> io::Result<Claimed> {
        check_name(&claim.claimer)?;
        self.run(&claim.vm, Claiming::new("it", claim))
    }
}

impl SharedRecord for SharedDir {
    fn words(&self) -> String {
        format!("the directory {}", self.root.display())
    }

    fn look(&self, vm: &str) -> io::Result<Option<OwnershipRecord>> {
        self.identity()?;
        Ok(self.entry(vm)?.map(OwnershipRecord::from))
    }

    fn start(&self, vm: &str, host: &str, fenced: Option<&str>, known: Option<Epoch>) -> io::Result<Claimed> {
        self.start_here(vm, host, fenced, known)
    }

    fn end(&self, vm: &str, host: &str, known: Option<Epoch>) -> io::Result<()> {
        self.end_here(vm, host, known)
    }
}

/// The directory's number; it is given one if nobody has and nobody remembers one.
fn identity(root: &Path, known: bool) -> io::Result<String> {
    let path = root.join("identity");
    let read = |path: &Path| -> io::Result<Option<String>> {
        let Some(content) = content(path)? else { return Ok(None) };
        let text = String::from_utf8_lossy(&content).into_owned();
        match text.strip_suffix('\n').map(str::parse::<MigrationId>) {
            Some(Ok(number)) => Ok(Some(number.to_string())),
            _ => Err(invalid(format!(
                "{} holds no number: it was damaged, or not written by Whimbrel",
                path.display()
            ))),
        }
    };
    if let Some(number) = read(&path)? {
        return Ok(number);
    }
    if known {
        return Err(invalid(
            "it has no identity any more. Is the datastore mounted? If it was emptied on purpose, remove \
             what this host remembers of it (`ownership.json` in the agent's state directory)"
                .to_owned(),
        ));
    }
    let draft = root.join(format!("identity-{:032x}", draw()?));
    make(&draft, format!("{}\n", MigrationId(draw()?)).as_bytes())?;
    let linked = fs::hard_link(&draft, &path);
    let _ = fs::remove_file(&draft);
    // What is there now decides, also where it is not known whether that was us.
    sync(root)?;
    match (read(&path)?, linked) {
        (Some(number), _) => Ok(number),
        (None, Err(error)) => {
            Err(io::Error::new(error.kind(), format!("it cannot be given an identity: {error}")))
        }
        (None, Ok(())) => Err(io::Error::other("its identity cannot be read yet")),
    }
}

fn invalid(why: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}

/// Does one thing in a VM's directory.
fn act(dir: &Path, op: &Op) -> Got {
    let done = match op {
        Op::Make { name, content } => match make(&dir.join(name), content) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                make_dir(dir).and_then(|()| make(&dir.join(name), content)).map(|()| Got::Done)
            }
            made => made.map(|()| Got::Done),
        },
        Op::Link { from, to } => fs::hard_link(dir.join(from), dir.join(to)).map(|()| Got::Done),
        Op::Read { name } => {
            content(&dir.join(name)).map(|content| content.map_or(Got::Missing, Got::Content))
        }
        Op::List => list(dir).map(Got::Names),
        Op::Sync => sync(dir).map(|()| Got::Done),
        Op::Remove { name } => fs::remove_file(dir.join(name)).map(|()| Got::Done),
    };
    done.unwrap_or_else(|error| match error.kind() {
        ErrorKind::NotFound => Got::Missing,
        ErrorKind::AlreadyExists => Got::Exists,
        _ => Got::Failed(error.to_string()),
    })
}

/// A new file, durable with its content and its name.
fn make(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(content)?;
    file.sync_all()?;
    drop(file);
    sync(path.parent().unwrap_or(path))
}

/// The VM's directory and the one above it, which somebody else may be making, too.
fn make_dir(dir: &Path) -> io::Result<()> {
    let above = dir.parent().unwrap_or(dir);
    for dir in [above, dir] {
        match fs::create_dir(dir) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => sync(dir.parent().unwrap_or(dir))?,
        }
    }
    Ok(())
}

/// A file's content, of which no more is read than a file of ours holds.
fn content(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut content = Vec::new();
    file.take(LONGEST as u64 + 1).read_to_end(&mut content)?;
    Ok(Some(content))
}

fn list(dir: &Path) -> io::Result<Vec<String>> {
    // What is no text is not ours.
    fs::read_dir(dir)?
        .filter_map(|entry| entry.map(|e| e.file_name().into_string().ok()).transpose())
        .collect()
}

fn sync(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
