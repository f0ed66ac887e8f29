//! Programs run under another kernel than this machine's: booted in a QEMU, with nothing else around them.

use crate::{Doing, Error, QEMU, Result, cpio::Cpio, namespace::run};
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

const BEGIN: &str = "-----BEGIN-----";
const END: &str = "-----END-----";
/// Booting an emulated machine and running a command on it, usually.
const PATIENCE: Duration = Duration::from_secs(180);

/// A kernel, and the modules of it that are loaded, in this order.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its image.
    pub image: PathBuf,
    /// Their files.
    pub modules: Vec<PathBuf>,
    /// How long booting it and running a program under it may take.
    pub patience: Duration,
}

/// By which packets are carried for guests, each after what it needs.
const VHOST: [&str; 5] = ["vhost/vhost_iotlb", "vhost/vhost", "net/tun", "net/tap", "vhost/vhost_net"];

impl Kernel {
    /// One without modules.
    pub fn plain(image: &Path) -> Self {
        Self { image: image.to_owned(), modules: vec![], patience: PATIENCE }
    }

    /// A distribution's, whose modules lie where those of `boot/vmlinuz-VERSION` do, with those of vhost.
    pub fn with_vhost(image: &Path) -> Result<Self> {
        let name = image.file_name().unwrap_or_default().to_string_lossy();
        let version = name.strip_prefix("vmlinuz-").doing(format!("tell the version of {name}"))?;
        let root = image.parent().and_then(Path::parent).doing("leave /boot")?;
        let drivers = root.join("lib/modules").join(version).join("kernel/drivers");
        let file = |name: &str| {
            let endings = [".ko", ".ko.xz", ".ko.zst"].map(|ending| drivers.join(format!("{name}{ending}")));
            endings.into_iter().find(|path| path.is_file())
        };
        // What is built in needs no module.
        Ok(Self { modules: VHOST.into_iter().filter_map(file).collect(), ..Self::plain(image) })
    }

    /// What `tests/linux-6.12.sh` has put into a directory.
    pub fn unpacked(directory: &Path) -> Result<Self> {
        let modules = directory.join("modules");
        let order = fs::read_to_string(modules.join("order"));
        let order = order.doing(format!("read {}", modules.display()))?;
        let modules = order.lines().map(|name| modules.join(name)).collect();
        Ok(Self { modules, ..Self::plain(&directory.join("vmlinuz")) })
    }
}

/// Boots `kernel` and runs `program` under it with these arguments, as root, with `/proc`, `/sys` and `/dev`
/// mounted. Returns its exit status and what it wrote to its standard output. The programs that it calls
/// (`also`; other files by their whole path) go along, and the shared libraries of all of them.
pub fn run_under(
    kernel: &Kernel,
    program: &Path,
    arguments: &[&str],
    also: &[&str],
    dir: &Path,
) -> Result<(i32, String)> {
    let initrd = dir.join("other-kernel.cpio");
    fs::write(&initrd, archive(kernel, program, arguments, also)?)
        .doing(format!("write {}", initrd.display()))?;
    let console = dir.join("other-kernel.log");
    let mut command = Command::new("timeout");
    command.arg(kernel.patience.as_secs().to_string()).arg(QEMU);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-accel", "tcg"]);
    // All that the emulation has: a CPU without XSAVE is no host of this century. But QEMU 7.2 emulates
    // cmpxchg16b wrongly, which kernels use where they have it: they crash now and then.
    command.args([
        "-machine",
        "q35",
        "-cpu",
        "max,cx16=off",
        "-m",
        "1536M",
        "-smp",
        "2",
        "-append",
        "console=ttyS0 quiet panic=-1",
    ]);
    command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(&initrd);
    command.args(["-serial", &format!("file:{}", console.display())]);
    let ended = run(&mut command);
    let said = String::from_utf8_lossy(&fs::read(&console).unwrap_or_default()).replace('\r', "");
    ended.map_err(|error| Error::new(error.what, format!("{}; the console: {said}", error.why)))?;
    let output = said.split_once(BEGIN).and_then(|(_, rest)| rest.split_once(END));
    let (output, status) = output.doing(format!("find the program's output on the console: {said}"))?;
    let status = status.split_whitespace().next().and_then(|word| word.parse().ok());
    Ok((
        status.doing(format!("find the program's exit status on the console: {said}"))?,
        output.trim().to_owned(),
    ))
}

fn archive(kernel: &Kernel, program: &Path, arguments: &[&str], also: &[&str]) -> Result<Vec<u8>> {
    let mut archive = Cpio::default();
    for directory in ["proc", "sys", "dev", "tmp", "run", "modules"] {
        archive.directory(directory);
    }
    short_paths(&mut archive);
    let insmod: &[&str] = if kernel.modules.is_empty() { &[] } else { &["insmod"] };
    let called = ["sh", "mount"]
        .iter()
        .chain(insmod)
        .chain(also)
        .map(|name| in_path(name))
        .collect::<Result<Vec<_>>>()?;
    for path in &called {
        archive.copy(&real(path)?)?;
    }
    for program in called.iter().map(PathBuf::as_path).chain([program]) {
        take_libraries(&mut archive, program)?;
    }
    let content = fs::read(program).doing(format!("read {}", program.display()))?;
    archive.file("program", &content);
    let mut load = String::new();
    for module in &kernel.modules {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        let content = fs::read(module).doing(format!("read {}", module.display()))?;
        archive.file(&format!("modules/{name}"), &content);
        load.push_str(&format!("{} /modules/{name}\n", real(&in_path("insmod")?)?.display()));
    }
    let (sh, mount) = (in_path("sh")?, in_path("mount")?);
    let words: Vec<_> = arguments.iter().map(|word| format!("'{}'", word.replace('\'', "'\\''"))).collect();
    // A terminal's last close waits until all is sent: what the kernel says at the end does not get in
    // between.
    let init = format!(
        "#!{sh}\nPATH=/usr/bin:/bin\nexport PATH\n{mount} -t devtmpfs none /dev\n{mount} -t proc none /proc\n\
         {mount} -t sysfs none /sys\n{mount} -t tmpfs none /tmp\n{load}exec >/dev/ttyS0 2>/dev/null \
         </dev/null\n\
         echo {BEGIN}\n/program {words}\nstatus=$?\necho {END} $status\nexec >/dev/null\necho o \
         >/proc/sysrq-trigger\n\
         while :; do read -r _ </dev/zero; done\n",
        sh = real(&sh)?.display(),
        mount = real(&mount)?.display(),
        words = words.join(" "),
    );
    archive.file("init", init.as_bytes());
    Ok(archive.finish())
}

/// Writes an initramfs that has all of another one, and a program with its shared libraries at this path.
pub fn with_program(initrd: &Path, program: &Path, at: &str, out: &Path) -> Result<()> {
    let mut archive = Cpio::default();
    short_paths(&mut archive);
    archive.file(at, &fs::read(program).doing(format!("read {}", program.display()))?);
    take_libraries(&mut archive, program)?;
    // The kernel unpacks one archive after the other.
    let mut both = fs::read(initrd).doing(format!("read {}", initrd.display()))?;
    both.resize(both.len().next_multiple_of(4), 0);
    both.extend(archive.finish());
    fs::write(out, both).doing(format!("write {}", out.display()))
}

/// Where /lib is a link to /usr/lib, interpreters are named by the short path.
fn short_paths(archive: &mut Cpio) {
    for link in ["lib", "lib64", "bin", "sbin"] {
        if let Ok(to) = fs::read_link(Path::new("/").join(link)) {
            archive.link(link, &to.to_string_lossy());
        }
    }
}

fn take_libraries(archive: &mut Cpio, program: &Path) -> Result<()> {
    libraries(program).iter().try_for_each(|library| archive.copy(&real(library)?))
}

/// A path without links: a link in an archive of few files leads nowhere.
fn real(path: &Path) -> Result<PathBuf> {
    let parent = path.parent().doing("name a directory")?;
    let parent = fs::canonicalize(parent).doing(format!("resolve {}", parent.display()))?;
    Ok(parent.join(path.file_name().doing("name a file")?))
}

fn in_path(program: &str) -> Result<PathBuf> {
    if program.starts_with('/') {
        return Ok(program.into());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
        .doing(format!("find {program}"))
}

/// The shared libraries of a program, its interpreter among them; none for a static one.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let said = run(Command::new("ldd").arg(program)).unwrap_or_default();
    said.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}
