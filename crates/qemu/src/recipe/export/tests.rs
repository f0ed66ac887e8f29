//! How disks of servers are called.

use super::*;

#[test]
fn a_server_is_known_by_its_address_on_both_hosts() {
    let export = |host: &str, port, name: &str| Export {
        protocol: Protocol::Nbd,
        host: host.into(),
        port,
        name: name.into(),
        bytes: 7,
        told: BTreeMap::new(),
    };
    for (file, read) in [
        ("nbd://10.0.0.1:10809/vol", Ok(export("10.0.0.1", 10809, "vol"))),
        ("nbd://storage-1:7", Ok(export("storage-1", 7, ""))),
        ("nbd://storage/a/b", Ok(export("storage", 10809, "a/b"))),
        ("nbd+unix:///vol?socket=/run/nbd", Err("by a socket of this host")),
        ("json:{\"driver\": \"nbd\", \"tls-creds\": \"t\"}", Err("TLS credentials")),
        ("nbd://[::1]:7/vol", Err("nbd://HOST:PORT/NAME")),
        ("nbd://10.0.0.1:port/vol", Err("nbd://HOST:PORT/NAME")),
        ("nbd://a b:7/vol", Err("no name or IPv4 address")),
        ("nbd://-a:7/vol", Err("no name or IPv4 address")),
        ("nbd://a:7/a?b", Err("the name of the export")),
    ] {
        match (Export::read("nbd", file, 7), read) {
            (Ok(is), Ok(right)) => assert_eq!(is, right, "{file}"),
            (Err(why), Err(part)) => assert!(why.contains(part), "{file}: {why}"),
            (is, right) => panic!("{file}: {is:?}, {right:?}"),
        }
    }
}
#[test]
fn web_servers_and_scsi_are_called_by_what_opens_them() {
    let export = |protocol, host: &str, port, name: &str| Export {
        protocol,
        host: host.into(),
        port,
        name: name.into(),
        bytes: 7,
        told: BTreeMap::new(),
    };
    let iqn = "iqn.2001-04.com.example:storage.disk1";
    let json = |more: &str| {
        format!(
            "json:{{\"driver\": \"iscsi\", \"transport\": \"tcp\", \"portal\": \"10.0.0.1\", \"target\": \
             \"{iqn}\"{more}}}"
        )
    };
    let unit = |port, unit: &str| Ok(export(Protocol::Iscsi, "10.0.0.1", port, &format!("{iqn}/{unit}")));
    for (driver, file, read) in [
        ("http", "http://10.0.0.1/a.iso".to_owned(), Ok(export(Protocol::Http, "10.0.0.1", 80, "a.iso"))),
        (
            "https",
            "https://mirror:8443/a/b.img?x=1&y=%20".to_owned(),
            Ok(export(Protocol::Https, "mirror", 8443, "a/b.img?x=1&y=%20")),
        ),
        ("https", "https://u:p@mirror/a".to_owned(), Err("HOST/PATH")),
        ("https", "http://mirror/a".to_owned(), Err("HOST/PATH")),
        ("http", "http://mirror/a b".to_owned(), Err("the name of the export")),
        ("http", "json:{\"driver\": \"http\", \"url\": \"http://m/a\"}".to_owned(), Err("more than a URL")),
        ("iscsi", json(", \"lun\": \"3\""), unit(3260, "3")),
        ("iscsi", json(", \"lun\": 3"), unit(3260, "3")),
        ("iscsi", json(""), unit(3260, "0")),
        ("iscsi", format!("iscsi://10.0.0.1:7/{iqn}/1"), unit(7, "1")),
        ("iscsi", json(", \"user\": \"u\", \"password-secret\": \"s\""), Err("told more")),
        ("iscsi", json(", \"initiator-name\": \"a b\""), Err("initiator-name=")),
        ("iscsi", json(", \"header-digest\": \"md5\""), Err("header-digest=md5")),
        ("iscsi", json(", \"lun\": 256"), Err("no TARGET/UNIT")),
        ("iscsi", "iscsi://10.0.0.1/1".to_owned(), Err("no TARGET/UNIT")),
        (
            "ssh",
            "ssh://vm@10.0.0.1:22/images/a.img".to_owned(),
            Ok(export(Protocol::Ssh, "10.0.0.1", 22, "vm@images/a.img")),
        ),
        ("ssh", "ssh://vm@storage/a".to_owned(), Ok(export(Protocol::Ssh, "storage", 22, "vm@a"))),
        ("ssh", "ssh://10.0.0.1:22/a".to_owned(), Err("ssh://USER@HOST:PORT/PATH")),
        ("ssh", "ssh://vm@10.0.0.1:22/a?host_key_check=no".to_owned(), Err("known_hosts")),
        ("ssh", "ssh://vm@10.0.0.1:22/a@b".to_owned(), Err("no USER@PATH")),
        ("ssh", "ssh://v/m@10.0.0.1:22/a".to_owned(), Err("no USER@PATH")),
        ("rbd", "rbd:pool/vol".to_owned(), Err("not carried over")),
    ] {
        match (Export::read(driver, &file, 7), read) {
            (Ok(is), Ok(right)) => {
                assert_eq!(is, right, "{file}");
                assert_eq!(Export::read(driver, &is.url(), 7).as_ref(), Ok(&is), "{}", is.url());
                assert!(is.is_opened_by(&is.options("file."), "file.") && is_server(&file));
                let mut more = is.options("");
                more.push(("url".to_owned(), "http://other/".to_owned()));
                assert!(!is.is_opened_by(&more, ""), "{more:?}");
                assert!(!is.is_opened_by(&is.options("")[1..], ""));
            }
            (Err(why), Err(part)) => assert!(why.contains(part), "{file}: {why}"),
            (is, right) => panic!("{file}: {is:?}, {right:?}"),
        }
    }
    // As `-iscsi` has said to it.
    let said = json(", \"initiator-name\": \"iqn.2000-01.a:b\", \"header-digest\": \"crc32c\"");
    let export = Export::read("iscsi", &said, 7).unwrap();
    let options = export.options("file.");
    assert_eq!(get(&options, "file.initiator-name"), Some("iqn.2000-01.a:b"));
    assert_eq!(get(&options, "file.header-digest"), Some("crc32c"));
    assert!(export.is_opened_by(&options, "file.") && !export.is_opened_by(&options[..5], "file."));
    // As earlier versions wrote it down.
    let old = r#"{"host":"a","port":1,"name":"x","bytes":2}"#;
    let read: Export = serde_json::from_str(old).unwrap();
    assert_eq!((read.protocol, serde_json::to_string(&read).unwrap().as_str()), (Protocol::Nbd, old));
}
