//! Disks that QEMU decrypts: their secrets go with the VM, and nobody else sees them.

use lab::{Doing, HandStart, Lab, Oddity, Result, Spec, Stage, ensure, run, story};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const WORK: &str = "whimbrel.check=16M,rate=4M whimbrel.disk=vda,set=4M";

/// What opens the disks. The second one's is encrypted with a key, as libvirt does it: AES-256-CBC, in
/// base64.
const FIRST: &str = "whimbrel-geheim-1";
const SECOND: &str = "whimbrel-geheim-2";
const KEY: &str = "0123456789abcdef0123456789abcdef";
const ENCRYPTED: &str = "CprJ5on2sogCNsYgi3wZr2af3o8prPgCWS9z2wcLzeE=";
const VECTOR: &str = "AAECAwQFBgcICQoLDA0ODw==";

/// How often an image is tried to be made.
const TRIES: u32 = 20;

/// An image that QEMU decrypts with this.
fn image(path: &Path, format: &str, prefix: &str, secret: &str) -> Result<String> {
    let word = path.with_extension("word");
    fs::write(&word, secret).doing("write a secret")?;
    let options = match prefix {
        "" => "key-secret=s,iter-time=10".to_owned(),
        prefix => format!("{prefix}format=luks,{prefix}key-secret=s,{prefix}iter-time=10"),
    };
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", format, "-o", &options, "--object"]);
    command.arg(format!("secret,id=s,file={}", word.display())).arg(path).arg("16M");
    // QEMU measures how often it has to hash a secret, and gives up where the first look at its processor
    // time shows none: one try in eight, on some machines.
    let in_vain = |made: &Result<String>| made.as_ref().is_err_and(|error| error.why.contains("CPU usage"));
    (0..TRIES).map(|_| run(&mut command)).find(|made| !in_vain(made)).doing("make an encrypted image")??;
    fs::remove_file(word).doing("remove a secret")?;
    Ok(path.display().to_string())
}

/// A VM with two such disks: the one's secret is in a file, the other's on its command line.
fn start(lab: &Lab, number: u8) -> Result<HandStart> {
    let (one, two) = (lab.dir().join("one.luks"), lab.dir().join("two.qcow2"));
    let (one, two) = (image(&one, "luks", "", FIRST)?, image(&two, "qcow2", "encrypt.", SECOND)?);
    let at = |name: &str| lab.dir().join(name).display().to_string();
    fs::write(at("first"), FIRST).and_then(|()| fs::write(at("key"), KEY)).doing("write secrets")?;
    let extra = format!(
        "-object secret,id=first,file={} -object secret,id=master,format=raw,file={} \
         -object secret,id=second,data={ENCRYPTED},keyid=master,iv={VECTOR},format=base64 \
         -object secret,id=spare,data=x -drive file={one},format=luks,key-secret=first,if=none,id=d0 \
         -device virtio-blk-pci,drive=d0 -blockdev driver=file,filename={two},node-name=f1 \
         -blockdev driver=qcow2,file=f1,node-name=d1,encrypt.format=luks,encrypt.key-secret=second \
         -device virtio-blk-pci,drive=d1",
        at("first"),
        at("key")
    );
    let extra = extra.split_whitespace().map(str::to_owned).collect();
    Ok(HandStart { extra, ..HandStart::new(Spec::new(number, WORK)) })
}

/// The files below a directory that hold any of this.
fn holding(folder: &Path, words: &[String]) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).doing("read a directory")?.flatten() {
        let path = entry.path();
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        if metadata.is_dir() {
            found.extend(holding(&path, words)?);
        } else if metadata.is_file() && metadata.len() < 16 << 20 {
            let bytes = fs::read(&path).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes);
            if words.iter().any(|word| text.contains(word.as_str())) {
                found.push(path);
            }
        }
    }
    Ok(found)
}

#[test]
fn i9_secrets_of_disks_go_with_their_vm_and_stay_secret() {
    story("disks that QEMU decrypts", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let (guest, machine) = stage.adopt("a", "vm", start(lab, 113)?)?;
        // QEMU has read it when it started; the command line of the first one is its launcher's.
        let hex = |text: &str| text.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
        let words = [FIRST, SECOND, KEY, ENCRYPTED];
        let words: Vec<String> = words.iter().flat_map(|word| [(*word).to_owned(), hex(word)]).collect();
        for (from, to, mode) in [("a", "b", "pre-copy"), ("b", "a", "post-copy")] {
            let report = stage.migrate("vm", &guest, from, to, &["--mode", mode])?;
            ensure!(
                !report.0.to_string().contains("first (secret)"),
                "only others stay behind: {}",
                report.0
            );
            for process in processes(&lab.dir().join("two.qcow2"))? {
                let line = fs::read(process.join("cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&line);
                ensure!(!words.iter().any(|word| line.contains(word.as_str())), "it shows a secret: {line}");
            }
            for host in ["a", "b"] {
                let found = holding(&lab.host(host).dir, &words)?;
                ensure!(found.is_empty(), "{found:?} of {host} holds a secret");
            }
        }
        drop(machine);
        Ok(())
    });
}

/// The processes that have this file open.
fn processes(file: &Path) -> Result<Vec<PathBuf>> {
    let has_it = |process: &PathBuf| {
        let open = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        open.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|name| name == file)
    };
    let all = fs::read_dir("/proc").doing("read /proc")?.flatten().map(|entry| entry.path());
    Ok(all.filter(|path| path.join("cmdline").exists()).filter(has_it).collect())
}

#[test]
fn secrets_do_not_leave_over_a_connection_in_plaintext() {
    story("secrets in plaintext", &["a", "b"], |lab, tools| {
        let plain = |_: &lab::Host| Oddity { plaintext: true, ..Oddity::default() };
        let stage = Stage::with(lab, tools, plain)?;
        let machine = start(lab, 114)?.start(lab.host("a"), tools)?;
        stage.agent("a").cli().json(&["adopt", "vm", "--qmp", &machine.qmp_socket().to_string_lossy()])?;
        let error = stage.start_migration("vm", "a", "b", &[])?.ended("failed", 1)?.error();
        ensure!(error.contains("leaves this host over an encrypted connection only"), "{error}");
        stage.runs_only_on("vm", "a")
    });
}
