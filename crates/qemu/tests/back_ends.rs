//! What disks and boot files of VMs that others have started lie on: limits that they share, firmware,
//! servers.

mod common;

use common::{
    ends::{Ended, Folder},
    hand::ByHand,
    moved::there,
    qemu_10,
};
use ports::Machine;
use qemu::{Vm, qmp::Qmp, recipe::Argument};
use serde_json::json;
use std::{fs, path::PathBuf};

fn all() -> Vec<Option<PathBuf>> {
    [None].into_iter().chain(qemu_10().map(Some)).collect()
}

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

#[test]
fn i9_limits_that_nodes_share_go_with_a_vm() {
    let folder = Folder::new();
    let disk = folder.path().join("a.img");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let disk = disk.display();
    let text = format!(
        "-object throttle-group,id=g0,x-iops-total=500 \
         -object {{\"qom-type\":\"throttle-group\",\"id\":\"g1\",\
         \"limits\":{{\"bps-read\":1048576,\"bps-read-max\":2097152}}}} \
         -blockdev driver=file,node-name=f0,filename={disk} -blockdev driver=raw,node-name=r0,file=f0 \
         -blockdev driver=throttle,node-name=t0,throttle-group=g0,file=r0 \
         -blockdev driver=throttle,node-name=t1,throttle-group=g1,file.driver=null-co,\
         file.size=1048576,file.read-zeroes=on \
         -device virtio-blk-pci,drive=t0,id=b0 -device virtio-blk-pci,drive=t1,id=b1"
    );
    for qemu in all() {
        there(&words(&text), qemu.clone()).unwrap();
        let hand = ByHand::start_with(
            qemu.unwrap_or("qemu-system-x86_64".into()),
            &[&["-m", "64M"], &words(&text)[..]].concat(),
        );
        let mut qmp = Qmp::connect(&hand.qmp).unwrap();
        let limits = json!({ "iops-total": 700, "iops-total-max": 900, "iops-total-max-length": 5 });
        let set = json!({ "path": "/objects/g0", "property": "limits", "value": limits });
        qmp.execute("qom-set", set).unwrap();
        let late = json!({ "qom-type": "throttle-group", "id": "late", "limits": { "bps-total": 5 } });
        qmp.execute("object-add", late).unwrap();
        drop(qmp);
        let recipe = Vm::adopt("hand", &hand.qmp).unwrap().vm.recipe().clone();
        for group in [
            "throttle-group,id=late,x-bps-total=5",
            "throttle-group,id=g0,x-iops-total=700,x-iops-total-max=900,x-iops-total-max-length=5",
            "throttle-group,id=g1,x-bps-read=1048576,x-bps-read-max=2097152",
        ] {
            assert!(recipe.arguments.contains(&Argument::new("-object", group)), "{:#?}", recipe.arguments);
        }
    }
}

#[test]
fn i9_firmware_by_its_file_goes_with_a_vm() {
    let folder = Folder::new();
    let own = folder.path().join("own.bin");
    fs::copy("/usr/share/seabios/bios-256k.bin", &own).unwrap();
    let own = own.to_str().unwrap();
    for qemu in all() {
        // The other one where the QEMU at hand has its own.
        for (bios, end) in [(own, own), ("bios-256k.bin", "/seabios/bios-256k.bin")] {
            there(&["-bios", bios], qemu.clone()).unwrap();
            let hand = ByHand::start_with(
                qemu.clone().unwrap_or("qemu-system-x86_64".into()),
                &["-m", "64M", "-bios", bios],
            );
            let recipe = Vm::adopt("hand", &hand.qmp).unwrap().vm.recipe().clone();
            let told = recipe.arguments.iter().find(|argument| argument.option == "-bios").unwrap();
            let is = told.value.as_deref().unwrap();
            assert!(is.starts_with('/') && is.ends_with(end), "{is}");
            assert!(recipe.files.iter().any(|file| file.path.to_str() == Some(is) && file.digest.is_some()));
        }
    }
}

/// An NBD server of one raw image, for so many clients, at a port of its own choice.
struct Server {
    _child: Ended,
    port: u16,
}

impl Server {
    fn start(image: &std::path::Path, clients: u32) -> Self {
        // The kernel gives a free port, which nobody else is given at once.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = std::process::Command::new("qemu-nbd");
        command.args(["-f", "raw", "-x", "vol", "-b", "127.0.0.1", "-t", "-p", &port.to_string()]);
        let mut child = Ended(command.args(["-e", &clients.to_string()]).arg(image).spawn().unwrap());
        // A connection would take up a client's place: the kernel is asked whether anybody listens.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        let listening = format!("0100007F:{port:04X} 00000000:0000 0A");
        while !fs::read_to_string("/proc/net/tcp").unwrap().contains(&listening) {
            assert!(
                child.0.try_wait().unwrap().is_none() && std::time::Instant::now() < end,
                "qemu-nbd does not start"
            );
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Self { _child: child, port }
    }
}

#[test]
fn i6_a_disk_of_an_nbd_server_goes_with_a_vm_where_granted() {
    let folder = Folder::new();
    let image = folder.path().join("a.img");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let server = Server::start(&image, 3);
    let port = server.port;
    let dialects = [
        format!("-drive file=nbd://127.0.0.1:{port}/vol,format=raw,if=virtio"),
        format!(
            "-drive file=nbd:127.0.0.1:{port}:exportname=vol,format=raw,if=none,id=d \
             -device virtio-blk-pci,drive=d"
        ),
        format!(
            "-blockdev {{\"driver\":\"nbd\",\"server\":{{\"type\":\"inet\",\"host\":\"127.0.0.1\",\
             \"port\":\"{port}\"}},\"export\":\"vol\",\"node-name\":\"n0\"}} \
             -blockdev driver=raw,node-name=f0,file=n0 -device virtio-blk-pci,drive=f0"
        ),
        format!(
            "-blockdev driver=raw,node-name=f0,file.driver=nbd,file.server.type=inet,\
             file.server.host=127.0.0.1,file.server.port={port},file.export=vol,file.reconnect-delay=5 \
             -device virtio-blk-pci,drive=f0,id=b"
        ),
    ];
    for (n, text) in dialects.iter().enumerate() {
        // Each in one of them.
        let qemu = all().into_iter().cycle().nth(n).flatten();
        there(&words(text), qemu).map_err(|why| format!("{text}: {why}")).unwrap();
    }
    let hand = ByHand::start(&[&["-m", "64M"], &words(&dialects[3])[..]].concat());
    let adopted = Vm::adopt("hand", &hand.qmp).unwrap();
    assert!(
        adopted.notes.iter().any(|note| note.contains("not shown to be the same")),
        "{:?}",
        adopted.notes
    );
    let recipe = adopted.vm.recipe().clone();
    assert_eq!((recipe.exports.len(), recipe.exports[0].bytes), (1, 1 << 20));

    let mut target = common::host(folder.path(), "run", None);
    let refused = |recipe: &qemu::Recipe, target: &qemu::Host| common::preflight(recipe, target).join("\n");
    let told = refused(&recipe, &target);
    let not = format!(
        "the server 127.0.0.1:{port} is not among what this host grants to VMs of other hosts (servers in \
         its [allow])"
    );
    assert_eq!(told, not);
    target.limits.servers = vec![format!("127.0.0.0/8:{port}")];
    assert_eq!(refused(&recipe, &target), "");
    // What can be compared is.
    let mut other = recipe.clone();
    other.exports[0].bytes += 1;
    let told = refused(&other, &target);
    assert!(told.contains("has 1048576 bytes here, and 1048577 at the source"), "{told}");
    // A peer that has its arguments name another server than it asks for.
    let mut lies = recipe.clone();
    lies.exports[0].port = 22;
    let told = refused(&lies, &target);
    assert!(told.contains("it is not among the recipe's exports"), "{told}");
    drop(hand);

    let one = Server::start(&image, 1);
    let text = format!("-drive file=nbd://127.0.0.1:{}/vol,format=raw,if=virtio", one.port);
    let hand = ByHand::start(&[&["-m", "64M"], &words(&text)[..]].concat());
    let recipe = Vm::adopt("hand", &hand.qmp).unwrap().vm.recipe().clone();
    target.limits.servers = vec!["127.0.0.1".into()];
    let told = refused(&recipe, &target);
    assert!(told.contains("does not take a second client within 3s; have it take two at once"), "{told}");
}

/// Serves so many bytes by HTTP/1.1 until it is dropped, with ranges, as QEMU wants them.
fn serve(bytes: usize) -> u16 {
    use std::{
        io::{BufRead, BufReader, Write},
        net::TcpListener,
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let talk = move |mut client: std::net::TcpStream| -> Option<()> {
        let mut lines = BufReader::new(client.try_clone().ok()?).lines();
        loop {
            let first = lines.next()?.ok()?;
            let mut range = None;
            for line in lines.by_ref().map_while(Result::ok).take_while(|line| !line.is_empty()) {
                if let Some(rest) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
                    let (from, to) = rest.split_once('-')?;
                    range =
                        Some((from.parse::<usize>().ok()?, to.parse().unwrap_or(bytes - 1).min(bytes - 1)));
                }
            }
            let (status, more, length) = match range {
                Some((from, to)) => (
                    "206 Partial Content",
                    format!("Content-Range: bytes {from}-{to}/{bytes}\r\n"),
                    to + 1 - from,
                ),
                None => ("200 OK", String::new(), bytes),
            };
            write!(
                client,
                "HTTP/1.1 {status}\r\nAccept-Ranges: bytes\r\n{more}Content-Length: {length}\r\n\r\n"
            )
            .ok()?;
            if !first.starts_with("HEAD") {
                client.write_all(&vec![7; length]).ok()?;
            }
        }
    };
    // It ends with the test program.
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            std::thread::spawn(move || talk(client));
        }
    });
    port
}

#[test]
fn i6_a_disk_of_a_web_server_goes_with_a_vm_where_granted() {
    let folder = Folder::new();
    let port = serve(1 << 20);
    let url = format!("http://127.0.0.1:{port}/a/cd.iso?x=1");
    let dialects = [
        format!("-machine q35 -drive file={url},format=raw,media=cdrom,id=c"),
        format!("-drive file.driver=http,file.url={url},file.readahead=64k,format=raw,if=virtio,readonly=on"),
        format!(
            "-blockdev driver=http,url={url},node-name=n0,read-only=on,timeout=9 \
             -blockdev driver=raw,node-name=f0,file=n0,read-only=on -device virtio-blk-pci,drive=f0"
        ),
        format!(
            "-blockdev driver=raw,node-name=f0,read-only=on,file.driver=http,file.url={url} \
             -device virtio-blk-pci,drive=f0,id=b"
        ),
    ];
    for text in &dialects {
        there(&words(text), None).map_err(|why| format!("{text}: {why}")).unwrap();
    }
    let hand = ByHand::start(&[&["-m", "64M"], &words(&dialects[2])[..]].concat());
    let recipe = Vm::adopt("hand", &hand.qmp).unwrap().vm.recipe().clone();
    let mut target = common::host(folder.path(), "run", None);
    let refused = |recipe: &qemu::Recipe, target: &qemu::Host| common::preflight(recipe, target).join("\n");
    let told = refused(&recipe, &target);
    assert!(
        told.contains(&format!("the server 127.0.0.1:{port} is not among what this host grants")),
        "{told}"
    );
    target.limits.servers = vec!["127.0.0.1".into()];
    assert_eq!(refused(&recipe, &target), "");
    Vm::incoming(&recipe, &target).unwrap().destroy().unwrap();
    // Only QEMU finds out how large it is.
    let mut other = recipe.clone();
    other.exports[0].bytes += 1;
    let error = Vm::incoming(&other, &target).unwrap_err().to_string();
    assert!(error.contains("has 1048576 bytes here, and 1048577 at the source"), "{error}");
    let mut lies = recipe;
    lies.exports[0].name = "other".to_owned();
    let told = refused(&lies, &target);
    assert!(told.contains("it is not among the recipe's exports"), "{told}");
    drop(hand);
    // A user and a password would be this host's.
    let told =
        format!("-drive file.driver=http,file.url={url},file.username=u,format=raw,if=virtio,readonly=on");
    let hand = ByHand::start(&[&["-m", "64M"], &words(&told)[..]].concat());
    common::hand::has(&hand.refusal(), "its server is told more than a URL");
}

#[test]
fn a_server_that_another_host_cannot_reach_is_refused() {
    let folder = Folder::new();
    let (image, socket) = (folder.path().join("a.img"), folder.path().join("nbd"));
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let mut command = std::process::Command::new("qemu-nbd");
    command.args(["-f", "raw", "-t", "-e", "2", "-k"]).arg(&socket).arg(&image);
    let mut server = Ended(command.spawn().unwrap());
    while !socket.exists() {
        assert!(server.0.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let text = format!("-drive file=nbd+unix:///?socket={},format=raw,if=virtio", socket.display());
    let hand = ByHand::start(&[&["-m", "64M"], &words(&text)[..]].concat());
    common::hand::has(
        &hand.refusal(),
        "its NBD server is reached by a socket of this host; have it listen on the network",
    );
}
