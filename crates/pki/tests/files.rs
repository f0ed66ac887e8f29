//! What `init`, `issue` and `show` leave behind, and what they refuse.

use pki::{Authority, Card, Files, Identity, Instant, PkiError, Shown, Validity, init, issue, show};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
};

fn content(dir: &Path) -> BTreeMap<String, (u32, Vec<u8>)> {
    let entry = |entry: fs::DirEntry| {
        let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
        (entry.file_name().into_string().unwrap(), (mode, fs::read(entry.path()).unwrap_or_default()))
    };
    fs::read_dir(dir).unwrap().map(|found| entry(found.unwrap())).collect()
}

fn has(text: impl ToString, what: &str) {
    let text = text.to_string();
    assert!(text.contains(what), "no {what:?} in {text}");
}

#[test]
fn keys_are_private_at_once_and_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, out) = (dir.path().join("ca"), dir.path().join("hosts/a"));
    init(&ca, "lab").unwrap();
    issue(&ca, "a", &[], 1, &out).unwrap();
    let modes =
        |dir: &Path| content(dir).into_iter().map(|(name, (mode, _))| (name, mode)).collect::<Vec<_>>();
    let of = |name: &str, mode| (name.to_owned(), mode);
    assert_eq!(modes(&ca), [of("ca.crt", 0o644), of("ca.key", 0o600)]);
    assert_eq!(modes(&out), [of("ca.crt", 0o644), of("host.crt", 0o644), of("host.key", 0o600)]);
    let before = [content(&ca), content(&out)];
    assert!(matches!(init(&ca, "lab"), Err(PkiError::Exists { .. })));
    assert!(matches!(issue(&ca, "a", &[], 1, &out), Err(PkiError::Exists { .. })));
    assert_eq!([content(&ca), content(&out)], before);
    // Where only the key is left, it is not lost, and nothing else is made beside it.
    for name in ["ca.crt", "host.crt"] {
        fs::remove_file(out.join(name)).unwrap();
    }
    let error = issue(&ca, "a", &[], 1, &out).unwrap_err();
    has(error, "host.key exists already");
    assert_eq!(content(&out).into_keys().collect::<Vec<_>>(), ["host.key"]);
    assert_eq!(content(&out)["host.key"], before[1]["host.key"]);
    // Nor through a link that somebody has put there.
    let (trap, prey) = (dir.path().join("trap"), dir.path().join("prey"));
    fs::create_dir(&trap).unwrap();
    std::os::unix::fs::symlink(&prey, trap.join("host.key")).unwrap();
    issue(&ca, "a", &[], 1, &trap).unwrap_err();
    assert!(!prey.exists());
}

#[test]
fn a_cas_key_that_others_can_read_issues_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca");
    init(&ca, "lab").unwrap();
    let key = ca.join("ca.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let error = issue(&ca, "a", &[], 1, &dir.path().join("a")).unwrap_err();
    has(error, &format!("chmod 600 {}", key.display()));
    assert!(!dir.path().join("a").exists());
}

#[test]
fn names_that_no_certificate_can_be_for_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca");
    for bad in ["", " lab", "lab\n", "l\u{e4}b", &"x".repeat(64)] {
        assert!(matches!(init(&ca, bad), Err(PkiError::Unfit(_))), "{bad:?}");
    }
    init(&ca, "lab").unwrap();
    for bad in ["", "../a", "a b", "10.0.0.1", "7", "*.example.org", "a\n"] {
        let made = issue(&ca, bad, &[], 1, &dir.path().join("out"));
        assert!(matches!(made, Err(PkiError::Unfit(_))), "{bad:?}");
    }
    let made = issue(&ca, "a", &["10.0.0.1:7471".to_owned()], 1, &dir.path().join("out"));
    has(made.unwrap_err(), "neither an IP address nor a name");
}

#[test]
fn a_certificate_says_whose_it_is_and_for_how_long() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, out) = (dir.path().join("ca"), dir.path().join("a"));
    init(&ca, "lab").unwrap();
    let addresses = ["10.0.0.1", "fe80::1", "a.example.org"].map(str::to_owned);
    let made = issue(&ca, "a", &addresses, 90, &out).unwrap();
    let shown = show(&out).unwrap();
    assert_eq!(shown.cards[1], made.card);
    let Card { names, workgroup, authority, from, until, .. } = &made.card;
    assert_eq!(
        (names.join(" "), &workgroup[..], *authority),
        ("a 10.0.0.1 fe80::1 a.example.org".to_owned(), "lab", false)
    );
    let now = Instant::now();
    assert!(*from <= now && until.days_since(now) >= 89 && until.days_since(now) <= 90);
    assert_eq!(shown.good, ["host.crt was issued by the CA of ca.crt", "host.key is the key of host.crt"]);
    assert_eq!(shown.bad, Vec::<String>::new());
    let shown = show(&ca).unwrap();
    assert!(shown.cards[0].authority && shown.bad.is_empty() && shown.cards[0].until.days_since(now) > 3600);
    let identity = Identity::load(&Files::within(&out)).unwrap();
    assert!(
        identity.is("a") && identity.is("a.example.org") && !identity.is("10.0.0.1") && !identity.is("b")
    );
    assert_eq!(identity.warning(now), None);
    has(identity.warning(Instant(until.0 - 10 * 86_400)).unwrap(), "expires in 10 days");
    has(identity.warning(now.plus_days(91)).unwrap(), "expired");
    // Never longer than its CA.
    let long = issue(&ca, "b", &[], 36500, &dir.path().join("b")).unwrap();
    assert_eq!(long.card.until, shown.cards[0].until);
}

#[test]
fn files_that_do_not_fit_together_are_told_of_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for (ca, host) in [("ca", "a"), ("other-ca", "b")] {
        init(&at(ca), "lab").unwrap();
        issue(&at(ca), host, &[], 1, &at(host)).unwrap();
    }
    let mixed = |take: &str, from: &str, says: &str| {
        let to = at(&format!("{take}-from-{from}"));
        fs::create_dir(&to).unwrap();
        for name in ["ca.crt", "host.crt", "host.key"] {
            let source = at(if name == take { from } else { "a" }).join(name);
            fs::copy(source, to.join(name)).unwrap();
        }
        let Shown { bad, .. } = show(&to).unwrap();
        has(bad.join("\n"), says);
        has(Identity::load(&Files::within(&to)).unwrap_err(), says);
    };
    mixed("ca.crt", "b", "they are of different workgroups");
    mixed("host.key", "b", "this is not the key of");
    has(show(dir.path()).unwrap_err(), "there is neither ca.crt nor host.crt");
    fs::write(at("rubbish"), "rubbish").unwrap();
    has(show(&at("rubbish")).unwrap_err(), "there is no certificate in it");
    has(show(Path::new("/nowhere.crt")).unwrap_err(), "/nowhere.crt");
}

#[test]
fn what_is_not_valid_now_is_told_with_both_times() {
    let ca = Authority::make("lab", Validity::days(1)).unwrap().0;
    let now = Instant::now();
    let past = Validity { from: Instant(now.0 - 7200), until: Instant(now.0 - 3600) };
    let pair = ca.issue("a", &[], past).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let files = Files::within(dir.path());
    fs::write(&files.ca, ca.cert()).unwrap();
    fs::write(&files.cert, &pair.cert).unwrap();
    fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&files.key).unwrap();
    fs::write(&files.key, &pair.key).unwrap();
    let bad = show(dir.path()).unwrap().bad.join("\n");
    has(&bad, &format!("expired at {}", past.until));
    has(&bad, "this host's clock says");
    // Its VMs must be cared for all the same.
    has(Identity::load(&files).unwrap().warning(now).unwrap(), "expired at");
}

#[test]
fn times_are_written_as_people_read_them() {
    assert_eq!(Instant(0).to_string(), "1970-01-01 00:00 UTC");
    assert_eq!(Instant(1_795_000_000).to_string(), "2026-11-18 11:06 UTC");
    assert_eq!(Instant(0).plus_days(u32::MAX).to_string(), "9999-12-31 23:59 UTC");
}
