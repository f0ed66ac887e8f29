//! The target `opens` finds what it looks for.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

/// A QEMU that is told something which no check has seen: as if a property that opens a file were on the
/// allow-list.
fn planted(folder: &Path, hole: &str) -> std::path::PathBuf {
    let program = folder.join("qemu-system-x86_64");
    let text = format!("#!/bin/sh\nexec /usr/bin/qemu-system-x86_64 \"$@\" {hole}\n");
    fs::write(&program, text).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program
}

#[test]
fn a_planted_hole_is_found() {
    if !Path::new("/usr/bin/qemu-system-x86_64").exists() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let canary = folder.path().join("canary");
    let recipe = fuzz::watched_recipe("pc", vec![]);
    let (file, socket) = (canary.display(), folder.path().join("socket"));
    let socket = socket.display();
    let holes = [
        (String::new(), None),
        (format!("-usb -device usb-tablet,pcap={file}"), Some(format!("the file {file}"))),
        (
            format!("-chardev socket,id=h,path={socket},server=on,wait=off"),
            Some(format!("the socket {socket}")),
        ),
        (
            "-chardev socket,id=h,host=127.0.0.1,port=0,server=on,wait=off".to_owned(),
            Some("a socket for other hosts".to_owned()),
        ),
    ];
    for (hole, found) in holes {
        let seen = fuzz::seen_of_qemu(&recipe, &planted(folder.path(), &hole), &canary);
        match found {
            None => assert_eq!(seen, Ok(())),
            Some(found) => assert!(seen.as_ref().is_err_and(|why| why.contains(&found)), "{hole}: {seen:?}"),
        }
    }
}
