//! What a QEMU of another user sees of the file system.
//!
//! All that this host has, read-only, but: `/home`, `/root`, `/run`, `/tmp` and what is the agent's are
//! empty, and `/dev` has the few devices that a VM needs. In it are the VM's own files, each under its name
//! and by the descriptor that the agent has opened ([`Pin`]): whatever the name leads to later outside.
//! Directories of `[allow]` are there, too, for what a person adds later, with the rights that the user has
//! to them; and one in which QEMU makes sockets.

use super::pin::{Pin, Shifts, is_same};
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};
use sys::mounts::{self, Ids, Tree, with_rights_of};

/// What is nobody's business but its owners'.
const HIDDEN: &[&str] = &["/home", "/root", "/run", "/tmp", "/var/tmp"];

/// Devices that every QEMU sees, with their numbers (`admin-guide/devices.txt`).
const DEVICES: &[(&str, u32, u32)] =
    &[("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// What is put together for one QEMU.
#[derive(Debug)]
pub(crate) struct View<'a> {
    /// Its user.
    pub(crate) user: Ids,
    /// The user's name.
    pub(crate) name: &'a str,
    /// Directories that are the agent's.
    pub(crate) agents: Vec<PathBuf>,
    /// Directories that are shown, and whether they may be written.
    pub(crate) shown: Vec<(PathBuf, bool)>,
    /// Files of the VM.
    pub(crate) pins: Vec<Pin<'a>>,
    /// Devices beyond the usual ones, below `/dev`.
    pub(crate) devices: Vec<&'static str>,
    /// Whether it makes pseudo-terminals, for others to use.
    pub(crate) terminals: bool,
}

/// What is done at one place, in the order of the places.
#[derive(Debug)]
enum Place {
    Hidden,
    /// Whether it may be written.
    Shown(Tree, bool),
}

/// Where pseudo-terminals are, and what makes them.
const TERMINALS: &str = "/dev/pts";
const TERMINAL_MAKER: (&str, u32, u32) = ("/dev/ptmx", 5, 2);

/// Why QEMU's view cannot be made.
type Why = String;

impl View<'_> {
    /// Gives the calling thread, and what it starts, this view. For a thread that ends afterwards.
    pub(crate) fn enter(&self) -> Result<(), Why> {
        let step = |what: &str| {
            let what = what.to_owned();
            move |error: io::Error| super::no_view(&what, &error)
        };
        // Of what is mounted as all others see it.
        let places = self.places();
        let mut shifts = Shifts::new(self.user);
        let trees = self.pins.iter().map(|pin| {
            // One for its place, and once more for another name.
            let named = (pin.path != pin.real).then(|| shifts.tree(pin)).transpose()?;
            Ok((shifts.tree(pin)?, named))
        });
        let trees = trees.collect::<io::Result<Vec<_>>>();
        let trees = trees.map_err(step("take a file"))?;
        let devices = self.device_trees();
        let terminals = self.terminals.then(|| shown(Path::new(TERMINALS), true)).transpose();
        let terminals = terminals.map_err(step("take the pseudo-terminals"))?;
        mounts::leave().map_err(step("unshare"))?;
        mounts::read_only().map_err(step("make it read-only"))?;
        self.make_devices(devices).map_err(step("make /dev"))?;
        if let Some(terminals) = terminals {
            make_terminals(terminals).map_err(step("make pseudo-terminals"))?;
        }
        for (path, place) in places {
            match place {
                Place::Hidden if path.is_dir() => mounts::empty(&path, false),
                Place::Hidden => Ok(()),
                Place::Shown(tree, _) => self.ready(&path, true).and_then(|()| tree.attach(&path)),
            }
            .map_err(step(&path.display().to_string()))?;
        }
        for (pin, (real, named)) in self.pins.iter().zip(trees) {
            self.pin(pin, real, named).map_err(step(&pin.path.display().to_string()))?;
        }
        self.try_out()
    }

    /// Directories that are hidden and those that are shown: the inner ones last, and of two that are one,
    /// what is shown, and may be written.
    fn places(&self) -> Vec<(PathBuf, Place)> {
        let hidden = HIDDEN.iter().map(PathBuf::from).chain(self.agents.iter().cloned());
        let mut places: Vec<_> =
            hidden.filter_map(|path| Some((path.canonicalize().ok()?, Place::Hidden))).collect();
        for (path, write) in &self.shown {
            let Ok(real) = path.canonicalize() else { continue };
            // All of the host is there anyway, as far as it is not hidden.
            if real.parent().is_none() {
                continue;
            }
            match shown(&real, *write) {
                Ok(tree) => places.push((real, Place::Shown(tree, *write))),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "QEMU will not see this directory")
                }
            }
        }
        let depth = |path: &Path| path.components().count();
        let top = |place: &Place| match place {
            Place::Hidden => 0,
            Place::Shown(_, write) => 1 + u8::from(*write),
        };
        places.sort_by_key(|(path, place)| (depth(path), top(place)));
        places
    }

    fn pin(&self, pin: &Pin<'_>, real: Tree, named: Option<Tree>) -> io::Result<()> {
        self.ready(&pin.real, false)?;
        real.attach(&pin.real)?;
        let there = || fs::metadata(&pin.path).is_ok_and(|there| pin.is(&there));
        if let Some(named) = named.filter(|_| !there()) {
            self.ready(&pin.path, false)?;
            named.attach(&pin.path)?;
        }
        Ok(())
    }

    /// Makes sure that there is something at `path` to attach to, and that the user gets to it: directories
    /// that it may not go through are replaced by empty ones.
    fn ready(&self, path: &Path, directory: bool) -> io::Result<()> {
        let above: Vec<&Path> = path.ancestors().skip(1).collect();
        for folder in above.into_iter().rev().filter(|folder| folder.parent().is_some()) {
            match fs::metadata(folder) {
                Ok(_) if self.goes_through(folder)? => {}
                Ok(_) => mounts::empty(folder, false)?,
                Err(error) if error.kind() == ErrorKind::NotFound => make_directory(folder)?,
                Err(error) => return Err(error),
            }
        }
        match fs::symlink_metadata(path) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            Err(_) if directory => make_directory(path),
            Err(_) => File::create(path).map(drop),
        }
    }

    fn goes_through(&self, folder: &Path) -> io::Result<bool> {
        let within = folder.join(".");
        with_rights_of(self.user, || fs::metadata(&within).is_ok())
    }

    /// Where device nodes cannot be made, those of this host are shown.
    fn device_trees(&self) -> Vec<(&'static str, u64, Option<Tree>)> {
        let usual =
            DEVICES.iter().map(|(name, major, minor)| (*name, Some(rustix::fs::makedev(*major, *minor))));
        let others = self.devices.iter().map(|name| (*name, None));
        let tree = |name: &str| {
            let path = Path::new("/dev").join(name);
            let node = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
            let number = fs::metadata(&path).ok()?.rdev();
            Some((number, Tree::of(node).ok()))
        };
        usual
            .chain(others)
            .filter_map(|(name, number)| match (tree(name), number) {
                (Some((_, tree)), Some(number)) => Some((name, number, tree)),
                (Some((number, tree)), None) => Some((name, number, tree)),
                (None, Some(number)) => Some((name, number, None)),
                (None, None) => None,
            })
            .collect()
    }

    fn make_devices(&self, devices: Vec<(&'static str, u64, Option<Tree>)>) -> io::Result<()> {
        let dev = Path::new("/dev");
        mounts::empty(dev, true)?;
        make_directory(&dev.join("shm"))?;
        std::os::unix::fs::symlink("/proc/self/fd", dev.join("fd"))?;
        for (name, number, tree) in devices {
            let path = dev.join(name);
            if let Some(folder) = path.parent().filter(|folder| !folder.exists()) {
                make_directory(folder)?;
            }
            let own = self.devices.contains(&name).then_some(self.user);
            if let Err(error) = mounts::make_device(&path, number, own) {
                let tree = tree.ok_or(error)?;
                File::create(&path)?;
                tree.attach(&path)?;
            }
        }
        Ok(())
    }

    /// Opens each file as QEMU will: what does not go is told before there is a QEMU.
    fn try_out(&self) -> Result<(), Why> {
        for pin in &self.pins {
            let opened = pin.open_at(&pin.path, self.user).map_err(|error| pin.refused(self.name, &error))?;
            if !opened.metadata().is_ok_and(|metadata| pin.is(&metadata)) {
                return Err(format!("{} {} was replaced just now; try again", pin.word, pin.path.display()));
            }
        }
        Ok(())
    }
}

/// Where QEMU's view has another file than the one that was opened for it: somebody has replaced it outside,
/// which takes it away here. `root` is the QEMU's root directory (`/proc/PID/root`).
pub(crate) fn replaced(root: &Path, files: &[(PathBuf, &File)]) -> Vec<PathBuf> {
    let is_there = |path: &Path, file: &File| -> io::Result<bool> {
        let root = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let how = rustix::fs::ResolveFlags::IN_ROOT;
        let found = rustix::fs::openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), how)?;
        let told = rustix::fs::statx(&found, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
        // Still the mount that was made for it: never in between was it another.
        let mounted = told.stx_attributes.contains(rustix::fs::StatxAttributes::MOUNT_ROOT);
        Ok(mounted && is_same(&File::from(found).metadata()?, file))
    };
    let lost = files.iter().filter(|(path, file)| !is_there(path, file).unwrap_or(false));
    lost.map(|(path, _)| path.clone()).collect()
}

/// Those of the host, of which QEMU's user may use its own.
fn make_terminals(of_the_host: Tree) -> io::Result<()> {
    let (maker, major, minor) = TERMINAL_MAKER;
    make_directory(Path::new(TERMINALS))?;
    of_the_host.attach(Path::new(TERMINALS))?;
    let maker = Path::new(maker);
    // Where no node can be made, the one that is beside them does as well.
    mounts::make_device(maker, rustix::fs::makedev(major, minor), None)
        .or_else(|_| std::os::unix::fs::symlink("pts/ptmx", maker))
}

fn shown(path: &Path, write: bool) -> io::Result<Tree> {
    let folder = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let tree = Tree::of(folder)?;
    tree.restrict(!write)?;
    Ok(tree)
}

/// Whatever the agent's umask is: QEMU's user goes through it.
fn make_directory(path: &Path) -> io::Result<()> {
    fs::create_dir(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}
