//! Secrets by which QEMU has opened its disks. Which there are is asked when a VM is read; what they are,
//! when it leaves, and then of QEMU: by its own word, or where it has read them.

use super::{cmdline::Read, live::children};
use crate::{
    qmp::{Qmp, QmpError},
    recipe::{Argument, DiskSecret, Hidden, LONGEST_SECRET, options},
};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use serde_json::json;
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::Path,
};
use sys::{
    mounts::{Ids, with_rights_of},
    proc,
    process::PidFd,
};

/// Their kind of object.
const KIND: &str = "secret";

/// A secret may be encrypted with another one, and that with a third: QEMU's managers use two.
const DEEPEST: usize = 8;

/// Those that the disks of these arguments name become a part of the recipe; the others stay behind.
pub(super) fn follow(qmp: &mut Qmp, read: &mut Read, reasons: &mut Vec<String>) -> Result<(), QmpError> {
    let named = named(&read.recipe.arguments);
    let live: Vec<_> =
        children(qmp, "/objects")?.into_iter().filter(|(_, kind)| kind.starts_with(KIND)).collect();
    let mut found = Vec::new();
    for id in named {
        if let Err(why) = add(qmp, &live, &id, &mut found, 0)? {
            reasons.push(why);
        }
    }
    let unused = live.iter().filter(|(id, _)| !found.iter().any(|secret: &DiskSecret| secret.id == *id));
    read.notes.extend(unused.map(|(id, kind)| format!("object {id} ({kind}) stays behind: no disk uses it")));
    read.recipe.secrets = found;
    Ok(())
}

/// The secrets that disks name.
fn named(arguments: &[Argument]) -> BTreeSet<String> {
    let disks = arguments.iter().filter(|one| matches!(&*one.option, "-drive" | "-blockdev"));
    let parsed = disks.filter_map(|one| Some(options::parse(one.value.as_deref()?, "")));
    let is_secret = |key: &str| key == "key-secret" || key.ends_with(".key-secret");
    parsed.flatten().filter(|(key, _)| is_secret(key)).map(|(_, id)| id).collect()
}

/// Adds one, after that with which it is encrypted; or says why it cannot follow the VM.
fn add(
    qmp: &mut Qmp,
    live: &[(String, String)],
    id: &str,
    found: &mut Vec<DiskSecret>,
    depth: usize,
) -> Result<Result<(), String>, QmpError> {
    if found.iter().any(|secret| secret.id == id) {
        return Ok(Ok(()));
    }
    match live.iter().find(|(name, _)| name == id).map(|(_, kind)| kind.as_str()) {
        Some(KIND) if depth < DEEPEST => {}
        Some(kind) => {
            return Ok(Err(format!(
                "secret {id} ({kind}) of a disk is in this host's keyring, or encrypted too often; \
                 use -object secret"
            )));
        }
        None => {
            return Ok(Err(format!(
                "secret {id} of a disk is no object of QEMU's any more, so the target could not open the \
                 disk; add it again (object-add)"
            )));
        }
    }
    let mut word = |property: &str| get(qmp, id, property);
    let (format, key, vector) = (word("format")?, word("keyid")?, word("iv")?);
    let key = (!key.is_empty()).then_some((key, vector));
    if let Some((key, _)) = &key
        && let Err(why) = add(qmp, live, key, found, depth + 1)?
    {
        return Ok(Err(why));
    }
    found.push(DiskSecret { id: id.to_owned(), base64: format == "base64", key, content: None });
    Ok(Ok(()))
}

fn get(qmp: &mut Qmp, id: &str, property: &str) -> Result<String, QmpError> {
    let answer = qmp.execute("qom-get", json!({ "path": format!("/objects/{id}"), "property": property }))?;
    Ok(answer.as_str().unwrap_or_default().to_owned())
}

/// Reads what they are, for the target only.
pub(crate) fn read(qmp: &mut Qmp, process: &PidFd, secrets: &mut [DiskSecret]) -> Result<(), Vec<String>> {
    let mut reasons = Vec::new();
    for secret in secrets {
        match content(qmp, process, &secret.id) {
            Ok(content) => secret.content = Some(Hidden::new(&content)),
            Err(why) => reasons.push(format!("secret {} of a disk: {why}", secret.id)),
        }
    }
    if reasons.is_empty() { Ok(()) } else { Err(reasons) }
}

fn content(qmp: &mut Qmp, process: &PidFd, id: &str) -> Result<Vec<u8>, String> {
    let mut asked = |property| get(qmp, id, property).map_err(|error| error.to_string());
    let data = asked("data")?;
    if data.len() > LONGEST_SECRET {
        return Err(too_long());
    }
    if !data.is_empty() {
        return Ok(data.into_bytes());
    }
    let name = asked("file")?;
    let failed = |error: io::Error| format!("its file {name} cannot be read: {error}");
    let file = match descriptor(&name) {
        // As QEMU has it open: what that cannot read, nobody reads for it.
        Some(number) => File::from(process.take_fd(number).map_err(failed)?),
        None => open(process, Path::new(&name)).map_err(failed)?,
    };
    whole(&file).map_err(failed)?.ok_or_else(too_long)
}

fn too_long() -> String {
    format!("it is longer than the {LONGEST_SECRET} bytes that are carried over")
}

/// The number of a descriptor of the process itself.
fn descriptor(name: &str) -> Option<i32> {
    ["/proc/self/fd/", "/dev/fd/"].iter().find_map(|folder| name.strip_prefix(folder))?.parse().ok()
}

/// Opens a file by the name that it has for this process, with the rights that the process has: an agent may
/// read more than QEMU, and reads nothing for it that QEMU could not.
fn open(process: &PidFd, name: &Path) -> io::Result<File> {
    let path = match name.is_absolute() {
        true => name.to_owned(),
        false => fs::read_link(process.proc_path("cwd"))?.join(name),
    };
    let root = File::open(process.proc_path("root"))?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let open = || -> io::Result<File> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(File::from(openat2(&root, &path, flags, Mode::empty(), resolve)?))
    };
    let own = Ids { user: rustix::process::geteuid().as_raw(), group: rustix::process::getegid().as_raw() };
    match ids(&fs::read_to_string(process.proc_path("status"))?) {
        Some(ids) if ids == own => open(),
        Some(ids) => with_rights_of(ids, open)?,
        None => Err(io::Error::other("it is not known whose process QEMU is")),
    }
}

/// Whose rights to files a process has, by its `status`.
fn ids(status: &str) -> Option<Ids> {
    let last = |field: &str| proc::value(status, field)?.split_whitespace().nth(3)?.parse().ok();
    Some(Ids { user: last("Uid")?, group: last("Gid")? })
}

/// All of a plain file; `None`: it is too long.
fn whole(file: &File) -> io::Result<Option<Vec<u8>>> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no plain file, so it is not there any more"));
    }
    let mut bytes = vec![0; LONGEST_SECRET + 1];
    let mut filled = 0;
    // By its place: the process shares its own with us.
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    bytes.truncate(filled);
    Ok((filled <= LONGEST_SECRET).then_some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_of_disks_are_found_by_their_names() {
        let arguments = [
            Argument::new("-drive", "file=/a,format=luks,key-secret=one,if=none"),
            Argument::new(
                "-blockdev",
                "driver=qcow2,node-name=n,file=f,encrypt.format=luks,encrypt.key-secret=two",
            ),
            Argument::new("-device", "virtio-blk-pci,drive=n,key-secret=three"),
        ];
        assert_eq!(named(&arguments).into_iter().collect::<Vec<_>>(), ["one", "two"]);
    }

    #[test]
    fn descriptors_and_rights_are_understood() {
        for (name, number) in
            [("/dev/fd/7", Some(7)), ("/proc/self/fd/12", Some(12)), ("/dev/fd/x", None), ("/etc/key", None)]
        {
            assert_eq!(descriptor(name), number, "{name}");
        }
        let status = "Name:\tqemu\nUid:\t0\t7\t8\t9\nGid:\t1\t2\t3\t4\n";
        assert_eq!(ids(status), Some(Ids { user: 9, group: 4 }));
        assert_eq!(ids("Name:\tx\n"), None);
    }

    #[test]
    fn a_file_is_read_up_to_its_bound_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        for (bytes, fits) in [(0, true), (6, true), (LONGEST_SECRET, true), (LONGEST_SECRET + 1, false)] {
            fs::write(&path, vec![b'x'; bytes]).unwrap();
            let read = whole(&File::open(&path).unwrap()).unwrap();
            assert_eq!(read.map(|read| read.len()), fits.then_some(bytes));
        }
        assert!(whole(&File::open("/dev/zero").unwrap()).is_err());
        let here = PidFd::open(i32::try_from(std::process::id()).unwrap()).unwrap();
        fs::write(&path, "geheim").unwrap();
        std::os::unix::fs::symlink("key", folder.path().join("link")).unwrap();
        let read = whole(&open(&here, &folder.path().join("link")).unwrap()).unwrap().unwrap();
        assert_eq!(read, b"geheim");
        // A way out of what the process sees.
        assert!(open(&here, Path::new("/proc/self/root/etc/hostname")).is_err());
    }
}
