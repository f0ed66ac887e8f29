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
/// Booting an emulated machine and running a command on it.
const PATIENCE: Duration = Duration::from_secs(180);

/// Boots `kernel` and runs `program` under it with these arguments, as root, with `/proc`, `/sys` and `/dev` mounted.
/// Returns its exit status and what it wrote to its standard output. The programs that it calls (`also`; other files by
/// their whole path) go along, and the shared libraries of all of them.
pub fn run_under(
    kernel: &Path,
    program: &Path,
    arguments: &[&str],
    also: &[&str],
    dir: &Path,
) -> Result<(i32, String)> {
    let initrd = dir.join("other-kernel.cpio");
    fs::write(&initrd, archive(program, arguments, also)?).doing(format!("write {}", initrd.display()))?;
    let console = dir.join("other-kernel.log");
    let mut command = Command::new("timeout");
    command.arg(PATIENCE.as_secs().to_string()).arg(QEMU);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-accel", "tcg"]);
    // All that the emulation has: a CPU without XSAVE is no host of this century.
    command.args([
        "-machine",
        "q35",
        "-cpu",
        "max",
        "-m",
        "1536M",
        "-smp",
        "2",
        "-append",
        "console=ttyS0 quiet panic=-1",
    ]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(&initrd);
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

fn archive(program: &Path, arguments: &[&str], also: &[&str]) -> Result<Vec<u8>> {
    let mut archive = Cpio::default();
    for directory in ["proc", "sys", "dev", "tmp", "run"] {
        archive.directory(directory);
    }
    short_paths(&mut archive);
    let called = ["sh", "mount"].iter().chain(also).map(|name| in_path(name)).collect::<Result<Vec<_>>>()?;
    for path in &called {
        archive.copy(&real(path)?)?;
    }
    for program in called.iter().map(PathBuf::as_path).chain([program]) {
        take_libraries(&mut archive, program)?;
    }
    let content = fs::read(program).doing(format!("read {}", program.display()))?;
    archive.file("program", &content);
    let (sh, mount) = (in_path("sh")?, in_path("mount")?);
    let words: Vec<_> = arguments.iter().map(|word| format!("'{}'", word.replace('\'', "'\\''"))).collect();
    // A terminal's last close waits until all is sent: what the kernel says at the end does not get in between.
    let init = format!(
        "#!{sh}\nPATH=/usr/bin:/bin\nexport PATH\n{mount} -t devtmpfs none /dev\n{mount} -t proc none /proc\n\
         {mount} -t sysfs none /sys\n{mount} -t tmpfs none /tmp\nexec >/dev/ttyS0 2>/dev/null </dev/null\n\
         echo {BEGIN}\n/program {words}\nstatus=$?\necho {END} $status\nexec >/dev/null\necho o >/proc/sysrq-trigger\n\
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
