//! Who is let in, who is not, and what each of the two sides says of it.

use super::*;
use engine::Traffic;
use pki::{Authority, Files, Identity, Instant as Second, Pair, Validity};
use proto::{Purpose, Token};
use std::{
    fs, io,
    net::TcpStream,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    process::Command,
    sync::atomic::AtomicU32,
};

fn authority() -> Authority {
    Authority::make("lab", Validity::days(2)).unwrap().0
}

fn identity_of(ca: &str, pair: &Pair) -> Arc<Identity> {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::within(dir.path());
    fs::write(&files.ca, ca).unwrap();
    fs::write(&files.cert, &pair.cert).unwrap();
    let mut key = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&files.key).unwrap();
    key.write_all(pair.key.as_bytes()).unwrap();
    Arc::new(Identity::load(&files).unwrap())
}

fn member_for(ca: &Authority, host: &str, valid: Validity) -> Security {
    let pair = ca.issue(host, &["127.0.0.1".to_owned()], valid).unwrap();
    Security::Tls(identity_of(ca.cert(), &pair))
}

fn member(ca: &Authority, host: &str) -> Security {
    member_for(ca, host, Validity::days(1))
}

/// One side calls the other, which is supposed to be `host`; what comes of it in either side's words.
fn meet(caller: Security, host: &str, called: Security) -> (Result<(), String>, Result<(), String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = Acceptor::new(Inn::new(&PAGES), called);
    let serving = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        acceptor.serve(stream).map_err(|e| e.to_string())
    });
    let dial = TcpDial::new(vec![address], host, MIGRATION, caller);
    let met = dial.dial(Purpose::Record, None).map(drop).map_err(|e| e.to_string());
    let mut served = serving.join().unwrap();
    // Let in, and then it asked nothing.
    if served.as_ref().is_err_and(|why| why.contains("closed the connection")) {
        served = Ok(());
    }
    (met, served)
}

/// Both fail, and say all of this.
fn neither(met: (Result<(), String>, Result<(), String>), caller: &[&str], called: &[&str]) {
    let (here, there) = (met.0.unwrap_err(), met.1.unwrap_err());
    eprintln!("caller: {here}\ncalled: {there}\n");
    for (said, words) in [(here, caller), (there, called)] {
        words.iter().for_each(|word| assert!(said.contains(word), "{word:?} in {said:?}"));
    }
}

#[test]
fn members_of_a_workgroup_meet_by_name_and_by_address() {
    let ca = authority();
    for host in ["b", "127.0.0.1"] {
        assert_eq!(meet(member(&ca, "a"), host, member(&ca, "b")), (Ok(()), Ok(())));
    }
    assert_eq!(meet(Security::Plaintext, "b", Security::Plaintext), (Ok(()), Ok(())));
}

#[test]
fn an_expired_certificate_is_refused_with_both_times() {
    let ca = authority();
    let now = Second::now();
    let past = Validity { from: Second(now.0 - 7200), until: Second(now.0 - 3600) };
    let at = past.until.to_string();
    let met = meet(member_for(&ca, "a", past), "b", member(&ca, "b"));
    neither(
        met,
        &["this host's certificate expired", &at],
        &["the other side's certificate expired at", &at, "clock"],
    );
    let met = meet(member(&ca, "a"), "b", member_for(&ca, "b", past));
    neither(
        met,
        &["the other side's certificate expired at", &at, "clock"],
        &["this host's certificate expired", &at],
    );
}

#[test]
fn a_certificate_from_the_future_is_a_matter_of_clocks() {
    let ca = authority();
    let now = Second::now();
    let future = Validity { from: Second(now.0 + 3600), until: Second(now.0 + 7200) };
    let at = future.from.to_string();
    let met = meet(member_for(&ca, "a", future), "b", member(&ca, "b"));
    neither(met, &["not yet valid", &at, "clock"], &["valid only from", &at, "clocks is wrong"]);
    let met = meet(member(&ca, "a"), "b", member_for(&ca, "b", future));
    neither(met, &["valid only from", &at, "clocks is wrong"], &["not yet valid", &at, "clock"]);
}

#[test]
fn another_workgroup_is_another_even_if_it_has_the_same_name() {
    let (ca, other) = (authority(), authority());
    // The called side shows its certificate first, so the caller is the one who refuses.
    let met = meet(member(&ca, "a"), "b", member(&other, "b"));
    neither(
        met,
        &["another workgroup than this host's (lab)"],
        &["another workgroup than this host's (lab)"],
    );
    // A caller that believes both is refused by the called.
    let pair = ca.issue("a", &[], Validity::days(1)).unwrap();
    let both = Security::Tls(identity_of(&format!("{}{}", ca.cert(), other.cert()), &pair));
    let met = meet(both, "b", member(&other, "b"));
    neither(met, &["does not know the CA"], &["another workgroup than this host's (lab)"]);
}

#[test]
fn a_certificate_for_another_name_is_refused_with_both_names() {
    let ca = authority();
    for called in ["b", "10.0.0.2"] {
        let met = meet(member(&ca, "a"), called, member(&ca, "c"));
        neither(met, &[&format!("not for {called}"), "but for c, 127.0.0.1"], &["it is for c, 127.0.0.1"]);
    }
}

#[test]
fn plaintext_and_tls_do_not_mix_and_both_sides_say_so() {
    let ca = authority();
    let met = meet(Security::Plaintext, "b", member(&ca, "b"));
    neither(met, &["the other side speaks TLS"], &["the other side speaks plaintext"]);
    let met = meet(member(&ca, "a"), "b", Security::Plaintext);
    neither(met, &["the other side speaks plaintext"], &["the other side speaks TLS"]);
}

#[test]
fn a_peer_without_certificate_or_protocol_is_turned_away() {
    let ca = authority();
    let Security::Tls(identity) = member(&ca, "a") else { unreachable!() };
    let strangers = [(None, "showed no certificate"), (Some("h2"), "no Whimbrel agent")];
    for (protocol, words) in strangers {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = Acceptor::new(Inn::new(&PAGES), member(&ca, "b"));
        let serving = thread::spawn(move || acceptor.serve(listener.accept().unwrap().0));
        let mut roots = rustls::RootCertStore::empty();
        let pem = ca.cert().as_bytes();
        roots.add(rustls::pki_types::pem::PemObject::from_pem_slice(pem).unwrap()).unwrap();
        let mut config =
            rustls::ClientConfig::builder_with_provider(identity.client().crypto_provider().clone())
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth();
        config.alpn_protocols = vec![protocol.unwrap_or("whimbrel").into()];
        let name = pki::server_name("b").unwrap();
        let mut session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        let mut tls = rustls::Stream::new(&mut session, &mut stream);
        let _ = tls.write_all(&proto::Preamble::new(Purpose::Control, MIGRATION).to_bytes());
        assert!(io::Read::read(&mut tls, &mut [0; 1]).is_err(), "it learns nothing");
        let error = serving.join().unwrap().unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_key_that_others_can_read_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, out) = (dir.path().join("ca"), dir.path().join("tls"));
    pki::init(&ca, "lab").unwrap();
    let made = pki::issue(&ca, "a", &[], 1, &out).unwrap();
    let files = Files::within(&out);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!([mode(&files.key), mode(&ca.join("ca.key"))], [0o600, 0o600]);
    assert_eq!(made.files.len(), 3);
    Identity::load(&files).unwrap();
    for loose in [0o640, 0o604, 0o660, 0o620] {
        fs::set_permissions(&files.key, fs::Permissions::from_mode(loose)).unwrap();
        let error = Identity::load(&files).unwrap_err().to_string();
        assert!(error.contains(&format!("chmod 600 {}", files.key.display())), "{error}");
    }
}

/// The path of a program's answer, or why there is none.
fn openssl(dir: &Path, line: &str) {
    let done = Command::new("openssl").args(line.split(' ')).current_dir(dir).output().unwrap();
    assert!(done.status.success(), "openssl {line}: {}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn certificates_from_elsewhere_do_as_well() {
    if Command::new("openssl").arg("version").output().is_err() {
        assert!(std::env::var_os("WHIMBREL_MUST_RUN").is_none(), "openssl is missing");
        return eprintln!("skipped: no openssl");
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    openssl(
        at,
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 2 -subj /O=Example/CN=house",
    );
    let host = |name: &str, usage: &str, key: &str| {
        openssl(
            at,
            &format!("req -new -newkey {key} -nodes -keyout host.key -out {name}.csr -subj /O=Example"),
        );
        let text = format!("subjectAltName=DNS:{name}\nextendedKeyUsage={usage}\n");
        fs::write(at.join("ext"), text).unwrap();
        openssl(
            at,
            &format!(
                "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 1 -extfile ext \
                 -out host.crt"
            ),
        );
        fs::set_permissions(at.join("host.key"), fs::Permissions::from_mode(0o600)).unwrap();
        Identity::load(&Files::within(at))
    };
    let ec = "ec -pkeyopt ec_paramgen_curve:P-384";
    let a = host("a.example.org", "serverAuth,clientAuth", "rsa:2048").unwrap();
    let b = host("b.example.org", "serverAuth,clientAuth", ec).unwrap();
    assert_eq!(a.card.workgroup, "house");
    assert!(a.is("a.example.org") && !a.is("b.example.org"));
    let met = meet(Security::Tls(Arc::new(a)), "b.example.org", Security::Tls(Arc::new(b)));
    assert_eq!(met, (Ok(()), Ok(())));
    let error = host("c.example.org", "serverAuth", ec).unwrap_err().to_string();
    assert!(error.contains("host.crt"), "a certificate that cannot call is found out at once: {error}");
}

/// Calls as the source does, but tries other ways first.
struct Strange {
    right: TcpDial,
    /// A host that is in the workgroup and is not the source.
    other: TcpDial,
    tried: AtomicU32,
}

impl Dial for Strange {
    fn dial(&self, kind: Purpose, token: Option<&Token>) -> io::Result<engine::Conn> {
        if kind.needs_token() {
            let mut near = *token.unwrap();
            near.0[31] ^= 1;
            for (who, token) in
                [(&self.right, near), (&self.right, Token([0; 32])), (&self.other, *token.unwrap())]
            {
                let error = who.dial(kind, Some(&token)).unwrap_err().to_string();
                assert!(
                    error.contains("does not take this connection for one of this migration's"),
                    "{error}"
                );
                self.tried.fetch_add(1, SeqCst);
            }
            // Says nothing where the token is due, and goes away.
            self.right.dial(Purpose::Record, None).map(drop)?;
        }
        self.right.dial(kind, token)
    }

    fn dial_soon(&self, kind: Purpose, token: Option<&Token>, _: Duration) -> io::Result<engine::Conn> {
        self.dial(kind, token)
    }

    fn is_plaintext(&self) -> bool {
        self.right.is_plaintext()
    }

    fn traffic(&self) -> &Arc<Traffic> {
        self.right.traffic()
    }
}

#[test]
fn a_stream_of_a_stranger_is_refused_and_harms_nothing() {
    let ca = authority();
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        let (source, inn) = (Source::new(), Inn::new(&PAGES));
        let address = listen_as(&inn, member(&ca, "target"));
        let dial = |host| TcpDial::new(vec![address], "target", MIGRATION, member(&ca, host));
        let dial =
            Arc::new(Strange { right: dial("source"), other: dial("hostile"), tried: AtomicU32::new(0) });
        let (report, events) = source.migrate_by(dial.clone(), options(mode), |_| {});
        assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.error);
        assert!(report.protected);
        assert_eq!(dial.tried.load(SeqCst), if mode == Mode::PostCopy { 9 } else { 6 });
        assert!(!events.iter().any(|event| matches!(event, Event::Note { .. })), "{events:?}");
        assert_eq!(source.ram.content(), inn.ram.content());
    }
}

#[test]
fn a_host_that_takes_another_hosts_name_is_not_believed() {
    let ca = authority();
    // The source says that it is `source`, its certificate that it is somebody else.
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    let address = listen_as(&inn, member(&ca, "target"));
    let dial = Arc::new(TcpDial::new(vec![address], "target", MIGRATION, member(&ca, "hostile")));
    let (report, _) = source.migrate_by(dial.clone(), options(Mode::PreCopy), |_| {});
    let error = report.error.unwrap();
    assert!(error.why.contains("calls itself source, but its certificate is for hostile"), "{error:?}");
    assert!(inn.ended.lock().unwrap().is_none(), "nothing was even prepared");
    // Nor may it claim in another's name.
    let claim =
        ports::Claim { vm: "vm".into(), migration: MIGRATION, expected: Epoch(3), claimer: "source".into() };
    let refused = ports::Ownership::claim(&RemoteRecord(dial), &claim);
    assert!(refused.is_err(), "{refused:?}");
    // The target says that it is `target`, and is not.
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    let address = listen_as(&inn, member(&ca, "hostile"));
    let dial = TcpDial::new(vec![address], "hostile", MIGRATION, member(&ca, "source"));
    let (report, _) = source.migrate_by(Arc::new(dial), options(Mode::PreCopy), |_| {});
    let error = report.error.unwrap();
    assert!(error.why.contains("calls itself target, but its certificate is for hostile"), "{error:?}");
    assert_eq!(error.vm_runs_on.as_deref(), Some("source"));
}

#[test]
fn migrations_over_tls_are_exact_and_survive_a_cut_link() {
    let ca = authority();
    let tls = |inn: &Arc<Inn>| {
        let cable = Cable::to(listen_as(inn, member(&ca, "target")));
        (TcpDial::new(vec![cable.address], "target", MIGRATION, member(&ca, "source")), cable)
    };
    for mode in [Mode::Auto, Mode::Hybrid, Mode::PostCopy] {
        let (source, inn) = (Source::new(), Inn::new(&PAGES));
        source.guest(1);
        let (report, _) = source.migrate_by(Arc::new(tls(&inn).0), options(mode), |_| {});
        assert_eq!(report.outcome, Outcome::Completed, "{mode:?}: {:?}", report.error);
        assert_eq!(report.verified, Some(true), "{mode:?}");
    }
    // In post-copy it connects again, with a token that it was told anew.
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    let (dial, cable) = tls(&inn);
    cable.cut_after.store(8 << 20, SeqCst);
    let options = MigrateOptions { compress: Compression::None, ..options(Mode::PostCopy) };
    let (report, events) = source.migrate_by(Arc::new(dial), options, |_| {
        wait_until("the cut", || cable.cut.load(SeqCst));
        cable.mend();
    });
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.error);
    let again =
        |event: &Event| matches!(event, Event::Note { text } if text.contains("connected to target again"));
    assert!(events.iter().any(again), "{events:?}");
    assert_eq!(source.ram.content(), inn.ram.content());
}

#[test]
fn a_migration_in_plaintext_says_so_loudly() {
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    let (report, events) = source.migrate(listen(&inn), options(Mode::PreCopy), |_| {});
    assert_eq!(report.outcome, Outcome::Completed);
    assert!(!report.protected);
    assert!(
        events.iter().any(|event| matches!(event, Event::Note { text } if text.contains("NOT PROTECTED")))
    );
}
