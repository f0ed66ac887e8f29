use super::*;
use std::path::PathBuf;

fn socket(own: Option<&str>, peer: Option<&str>) -> Found {
    let path = |name: Option<&str>| name.map(PathBuf::from);
    Found::Socket(Ends::Unix { listens: peer.is_none(), own: path(own), peer: path(peer) })
}

#[test]
fn what_was_granted_is_told_from_all_else() {
    let ours = Identity { device: 1, inode: 2 };
    let other = Identity { device: 1, inode: 3 };
    let device = |(major, minor)| Found::Device(makedev(major, minor), "/dev/x".to_owned());
    let nameless = |kind: &str| Found::Nameless(kind.to_owned());
    let internet = |peer: &str| Found::Socket(Ends::Internet { peer: peer.parse().ok() });
    let grants = Grants {
        files: BTreeSet::from([ours]),
        sockets: BTreeSet::from(["/run/w/a.qmp".into()]),
        folder: Some("/run/w/a.sockets".into()),
        devices: HARMLESS.map(|(major, minor)| makedev(major, minor)).into(),
        servers: BTreeSet::from(["10.0.0.2:10809".parse().unwrap()]),
        ..Grants::default()
    };
    for (found, granted) in [
        (Found::Memory, true),
        (Found::File(ours, "/a".to_owned()), true),
        (Found::File(other, "/a".to_owned()), false),
        (device((1, 3)), true),
        (device((1, 1)), false),
        (device(KVM), false),
        (device(TUN), false),
        (device((136, 7)), false),
        (nameless("[eventfd]"), true),
        (nameless("kvm-vcpu:0"), true),
        (nameless("[perf_event]"), false),
        (nameless("[pidfd]"), false),
        (socket(None, None), true),
        (socket(Some("/run/w/a.qmp"), None), true),
        (socket(Some("/run/w/a.sockets/0.sock"), None), true),
        (socket(Some("/run/w/a.sockets/../b.qmp"), None), false),
        (socket(Some("/run/w/b.qmp"), None), false),
        (socket(None, Some("/run/w/a.qmp")), false),
        (socket(None, Some("@x")), false),
        (internet("10.0.0.1:10809"), false),
        (internet("10.0.0.2:10809"), true),
        (internet("10.0.0.2:22"), false),
        (internet(""), false),
        (Found::Socket(Ends::Other(16)), false),
        (Found::Other("the directory /".to_owned()), false),
        (Found::Program("7".to_owned()), false),
    ] {
        assert_eq!(grants.has(&found), granted, "{found:?}");
    }
    let terminals = Grants { terminals: true, ..grants };
    assert!(terminals.has(&device((136, 7))) && !terminals.has(&device((4, 64))));
}

#[test]
fn what_this_process_opens_is_seen_from_outside() {
    let me = PidFd::open(std::process::id().cast_signed()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (file, listener) = (folder.path().join("a"), folder.path().join("s"));
    let kept = fs::File::create(&file).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(&listener).unwrap();
    let client = std::os::unix::net::UnixStream::connect(folder.path().join("s")).unwrap();
    let mut child = std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
    // Of all that other tests have open, what is this one's.
    let told = Grants::default().beyond(&me).unwrap().join("\n");
    let (file, socket) = (file.display(), folder.path().join("s"));
    for what in [
        format!("the file {file}"),
        format!("the socket {}", socket.display()),
        format!("a connection to the socket {}", socket.display()),
        format!("a program (process {})", child.id()),
    ] {
        assert!(told.lines().any(|line| line == what), "{what} is not among\n{told}");
    }
    let id = Identity::of(&kept.metadata().unwrap());
    let grants = Grants { files: BTreeSet::from([id]), ..Grants::default() };
    assert!(!grants.beyond(&me).unwrap().contains(&format!("the file {file}")));
    child.kill().and_then(|()| child.wait()).unwrap();
    drop((listener, client));
}
