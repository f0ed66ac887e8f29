//! The cgroups of a process, in whichever hierarchies are mounted (`cgroups(7)`).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// A cgroup in one hierarchy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cgroup {
    /// The controllers of a hierarchy of version 1, such as `freezer` or `name=systemd`; none: the unified
    /// one, version 2.
    pub controllers: Vec<String>,
    /// Where the hierarchy is mounted.
    pub mount: PathBuf,
    /// From there on.
    pub path: PathBuf,
}

/// The cgroups of a process: its number, or `self`. What is not mounted, or cannot be seen from here, is left
/// out.
pub fn of(process: &str) -> io::Result<Vec<Cgroup>> {
    let cgroups = fs::read_to_string(format!("/proc/{process}/cgroup"))?;
    Ok(parse(&cgroups, &fs::read_to_string("/proc/self/mountinfo")?))
}

fn parse(cgroups: &str, mounts: &str) -> Vec<Cgroup> {
    let parse = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let controllers: Vec<_> =
            controllers.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
        let (root, mount) = mounts.lines().find_map(|line| mounted(line, controllers.first()))?;
        // A container sees a part of the tree: what is above that cannot be looked at.
        let path = Path::new(path).strip_prefix(&root).or_else(|_| Path::new(path).strip_prefix("/")).ok()?;
        Some(Cgroup { controllers, mount, path: path.to_owned() })
    };
    cgroups.lines().filter_map(parse).collect()
}

/// Which part of the hierarchy is mounted where, if this line of `mountinfo` is about it.
fn mounted(line: &str, controller: Option<&String>) -> Option<(PathBuf, PathBuf)> {
    let (before, after) = line.split_once(" - ")?;
    let mut fields = before.split(' ').skip(3);
    let (root, mount) = (fields.next()?, fields.next()?);
    let mut kind = after.split(' ');
    let (kind, options) = (kind.next()?, kind.nth(1)?);
    let right = match controller {
        None => kind == "cgroup2",
        Some(name) => kind == "cgroup" && options.split(',').any(|option| option == name),
    };
    right.then(|| (root.into(), mount.into()))
}

impl Cgroup {
    /// Whether it is the one of the unified hierarchy, version 2.
    pub fn is_unified(&self) -> bool {
        self.controllers.is_empty()
    }

    /// Whether it is one of a hierarchy of version 1 with this controller.
    pub fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|name| name == controller)
    }

    /// Whether its processes are ended or frozen as a whole by it.
    fn is_fateful(&self) -> bool {
        self.is_unified() || self.has("freezer") || self.has("name=systemd")
    }

    /// Where processes are put that must not share its fate; nowhere if it is the root.
    fn beside(&self) -> Option<PathBuf> {
        let parent = self.path.parent().filter(|_| self.is_fateful())?;
        Some(self.mount.join(parent).join(APART))
    }

    /// Where its files are.
    pub fn directory(&self) -> PathBuf {
        self.mount.join(&self.path)
    }

    /// It, and those above it, upwards.
    pub fn and_above(&self) -> impl Iterator<Item = Self> {
        self.path.ancestors().map(|path| Self { path: path.to_owned(), ..self.clone() })
    }
}

/// Why the process stands still, if one of its cgroups is frozen.
pub fn frozen(process: &str) -> io::Result<Option<String>> {
    for group in of(process)? {
        let says = |file: &str, wanted: &str| {
            let text = fs::read_to_string(group.directory().join(file)).unwrap_or_default();
            text.lines().any(|line| line == wanted)
        };
        let frozen = match group.is_unified() {
            true => says("cgroup.events", "frozen 1"),
            false => {
                group.has("freezer") && (says("freezer.state", "FROZEN") || says("freezer.state", "FREEZING"))
            }
        };
        if frozen {
            return Ok(Some(format!("its cgroup {} is frozen", group.directory().display())));
        }
    }
    Ok(None)
}

/// Lets a process go on that a freezer of version 1 holds: there, unlike in version 2, not even `SIGKILL` is
/// heard before. Everybody else in the cgroup goes on, too.
pub fn thaw(process: &str) -> io::Result<()> {
    for group in of(process)?.iter().filter(|group| group.has("freezer")).flat_map(Cgroup::and_above) {
        let itself = fs::read_to_string(group.directory().join("freezer.self_freezing")).unwrap_or_default();
        if itself.trim() == "1" {
            fs::write(group.directory().join("freezer.state"), "THAWED")?;
        }
    }
    Ok(())
}

/// Where processes are put that are set apart, beside the cgroup that they are taken from.
const APART: &str = "whimbrel-guests";

/// Gives a process a cgroup of its own beside the one of the caller, wherever whatever ends or freezes that
/// one as a whole would reach it (`cgroup.kill`, a service manager that ends all processes of a service).
/// Says whether anything had to be done: nobody ends the root as a whole. Cgroups of processes that have
/// ended are taken away.
pub fn set_apart(process: &str, name: &str) -> io::Result<bool> {
    let mut moved = false;
    for folder in of("self")?.iter().filter_map(Cgroup::beside) {
        let own = folder.join(name);
        // Another thread of ours may take it away again before it is used.
        let mut attempts = 0..3;
        loop {
            sweep(&folder);
            let entered =
                fs::create_dir_all(&own).and_then(|()| fs::write(own.join("cgroup.procs"), process));
            match entered {
                Ok(()) => break,
                Err(error) if attempts.next().is_none() => return Err(error),
                Err(_) => {}
            }
        }
        moved = true;
    }
    Ok(moved)
}

/// Whether [`set_apart`] could do so for this process, if its own cgroup has to be left for that.
pub fn can_set_apart(process: &str) -> io::Result<bool> {
    let writable = |folder: PathBuf| {
        let parent = folder.parent().map(Path::to_owned).unwrap_or_default();
        rustix::fs::access(&parent, rustix::fs::Access::WRITE_OK).is_ok()
    };
    Ok(of(process)?.iter().filter_map(Cgroup::beside).all(writable))
}

/// The kernel removes none that is used.
fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let _ = fs::remove_dir(entry.path());
    }
}

/// Has the calling process share the fate of another one: what freezes or ends the cgroup that it was in does
/// not reach it any more.
pub fn join(process: &str) -> io::Result<()> {
    let mine = of("self")?;
    for group in of(process)? {
        if group.is_fateful() && !mine.contains(&group) {
            fs::write(group.directory().join("cgroup.procs"), "0")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_where_they_are_mounted() {
        let mounts = "30 20 0:1 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      31 20 0:2 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n\
                      32 20 0:3 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      33 20 0:4 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n";
        let found = parse("4:memory:/a/b\n9:name=systemd:/s\n7:pids:/p\n2:cpu,cpuacct:/x\n0::/c\n", mounts);
        let expected = [
            (&["memory"][..], "memory", "a/b"),
            (&["name=systemd"], "systemd", "s"),
            (&["cpu", "cpuacct"], "cpu,cpuacct", "x"),
            (&[], "unified", "c"),
        ];
        let expected = expected.map(|(controllers, mount, path)| Cgroup {
            controllers: controllers.iter().copied().map(str::to_owned).collect(),
            mount: Path::new("/sys/fs/cgroup").join(mount),
            path: path.into(),
        });
        assert_eq!(found, expected);
        assert!(found[3].is_unified() && found[0].has("memory") && !found[0].has("cpu"));
        let beside: Vec<_> = found.iter().map(Cgroup::beside).collect();
        let apart = |path: &str| Some(Path::new("/sys/fs/cgroup").join(path).join(APART));
        assert_eq!(beside, [None, apart("systemd"), None, apart("unified")]);
        let above: Vec<_> = found[0].and_above().map(|group| group.directory()).collect();
        let paths = ["/sys/fs/cgroup/memory/a/b", "/sys/fs/cgroup/memory/a", "/sys/fs/cgroup/memory/"];
        assert_eq!(above, paths.map(PathBuf::from));
    }

    #[test]
    fn a_container_sees_its_part_of_the_tree() {
        let mounts = "30 20 0:1 /docker/7 /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        assert_eq!(parse("0::/docker/7/x\n", mounts)[0].path, Path::new("x"));
        assert_eq!(parse("0::/\n", mounts)[0].path, Path::new(""));
        assert_eq!(parse("0::/\n", mounts)[0].beside(), None);
        assert_eq!(parse("0::/\n", ""), []);
    }

    #[test]
    fn a_process_that_nobody_froze_is_not_frozen() {
        assert_eq!(frozen("self").unwrap(), None);
        join("self").unwrap();
    }
}
