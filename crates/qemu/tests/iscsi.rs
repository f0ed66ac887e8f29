//! Disks of an iSCSI server.

mod common;

use common::{
    ends::{Ended, Folder},
    found, hand,
    hand::ByHand,
    moved::there,
};
use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

const TARGET: &str = "iqn.2001-04.com.example:storage.disk1";

/// Whom the server lets in, and nobody else.
const INITIATOR: &str = "iqn.1993-08.org.debian:01:5ba3c1f2e0d7";

/// A server that has a disk.
struct Server {
    port: u16,
    _process: Ended,
}

impl Server {
    /// Its programs are in `tgt`, its files in `folder`.
    fn start(tgt: &Path, folder: &Path) -> Self {
        let image = folder.join("a.img");
        fs::write(&image, vec![0; 1 << 20]).unwrap();
        // Free a moment ago, and no other test's.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let program = |name: &str| {
            let mut command = Command::new(tgt.join(name));
            command.env("TGT_IPC_SOCKET", folder.join("tgt"));
            command
        };
        let mut tgtd = program("tgtd");
        tgtd.args(["-f", "--iscsi", &format!("portal=127.0.0.1:{port}")]);
        let mut process = Ended(tgtd.spawn().unwrap());
        let image = image.display().to_string();
        let orders: [&[&str]; 3] = [
            &["--op", "new", "--mode", "target", "--tid", "1", "-T", TARGET],
            &["--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", &image],
            &["--op", "bind", "--mode", "target", "--tid", "1", "-Q", INITIATOR],
        ];
        let end = Instant::now() + Duration::from_secs(30);
        for order in orders {
            // It may not be ready yet.
            while !program("tgtadm").args(["--lld", "iscsi"]).args(order).output().unwrap().status.success() {
                let runs = process.0.try_wait().unwrap().is_none();
                assert!(runs && Instant::now() < end, "{order:?}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Self { port, _process: process }
    }
}

#[test]
fn i6_a_disk_of_an_iscsi_server_goes_with_a_vm() {
    let Some(tgt) = found("WHIMBREL_TGT", "tgtd (tests/tgt.sh unpacks it)") else { return };
    let tgt: PathBuf = tgt.parent().unwrap().into();
    let folder = Folder::new();
    let server = Server::start(&tgt, folder.path());
    let portal = format!("127.0.0.1:{}", server.port);
    let url = format!("iscsi://{portal}/{TARGET}/1");
    let node = |prefix: &str| {
        let options = ["transport=tcp", &format!("portal={portal}"), &format!("target={TARGET}"), "lun=1"];
        let all = options.iter().map(|option| format!("{prefix}{option}")).collect::<Vec<_>>();
        format!("{prefix}driver=iscsi,{}", all.join(","))
    };
    let words = |text: &str| -> Vec<String> { text.split_whitespace().map(str::to_owned).collect() };
    for text in [
        format!("-iscsi initiator-name={INITIATOR} -drive file={url},format=raw,if=virtio"),
        format!(
            "-iscsi initiator-name={INITIATOR},header-digest=CRC32C \
             -drive file={url},format=raw,if=none,id=d -device virtio-blk-pci,drive=d"
        ),
        format!("-drive {},file.initiator-name={INITIATOR},format=raw,if=virtio", node("file.")),
        format!(
            "-blockdev {},node-name=n0,initiator-name={INITIATOR} -device virtio-blk-pci,drive=n0",
            node("")
        ),
    ] {
        let all = words(&text);
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        there(&all, None).map_err(|why| format!("{text}: {why}")).unwrap();
    }
    // A user and a password would be this host's.
    let told =
        format!("-iscsi initiator-name={INITIATOR},user=u,password=p -drive file={url},format=raw,if=virtio");
    let all = words(&told);
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let started = ByHand::start(&[&["-m", "64M"], &all[..]].concat());
    hand::has(
        &started.refusal(),
        "its iSCSI server is told more than its address, target, unit and initiator",
    );
}
