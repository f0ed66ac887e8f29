//! What protecting pages costs, by algorithm: on one core, batches of pages into records and back. It chose
//! the order in `pki`.

use divan::{Bencher, counter::BytesCount};
use pki::{Authority, Files, Identity, Validity};
use rustls::{
    ClientConfig, ClientConnection, Connection, ServerConnection, SupportedCipherSuite,
    crypto::ring::{cipher_suite as suites, default_provider},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    version::TLS13,
};
use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    sync::Arc,
};

/// What is protected in one sample.
const TOTAL: usize = 64 << 20;
/// As much as a batch of pages.
const BATCH: usize = 512 << 10;
/// As the engine has it.
const OUTBOX: usize = 256 << 10;

const SUITES: [&str; 3] = ["AES-128-GCM", "AES-256-GCM", "ChaCha20-Poly1305"];

#[divan::bench(args = SUITES, sample_count = 20, sample_size = 1)]
fn encipher(bencher: Bencher, suite: &str) {
    let (mut source, _) = pair(suite);
    let (batch, mut wire) = (vec![0x5a; BATCH], Vec::with_capacity(2 * OUTBOX));
    bencher.counter(BytesCount::new(TOTAL)).bench_local(|| {
        for _ in 0..TOTAL / BATCH {
            write(&mut source, &batch, &mut wire, |wire| wire.clear());
        }
    });
}

#[divan::bench(args = SUITES, sample_count = 20, sample_size = 1)]
fn decipher(bencher: Bencher, suite: &str) {
    let (mut source, mut target) = pair(suite);
    let (batch, mut back) = (vec![0x5a; BATCH], vec![0; BATCH]);
    let sent = || {
        let mut wire = Vec::new();
        for _ in 0..TOTAL / BATCH {
            write(&mut source, &batch, &mut wire, |_| ());
        }
        wire
    };
    bencher.counter(BytesCount::new(TOTAL)).with_inputs(sent).bench_local_values(|wire| {
        let (mut rest, mut read) = (&wire[..], 0);
        while read < TOTAL {
            target.read_tls(&mut rest).expect("room for a record");
            target.process_new_packets().expect("what was sent");
            while let Ok(n @ 1..) = target.reader().read(&mut back) {
                read += n;
            }
        }
    });
}

fn write(source: &mut Connection, mut batch: &[u8], wire: &mut Vec<u8>, mut sent: impl FnMut(&mut Vec<u8>)) {
    while !batch.is_empty() {
        let n = source.writer().write(batch).expect("a connection that is open");
        batch = &batch[n..];
        while source.wants_write() {
            source.write_tls(wire).expect("memory");
        }
        sent(wire);
    }
}

/// Both ends of a connection that uses this algorithm.
fn pair(suite: &str) -> (Connection, Connection) {
    let ca = Authority::make("bench", Validity::days(1)).expect("a CA").0;
    let host = ca.issue("b", &[], Validity::days(1)).expect("a certificate");
    let dir = std::env::temp_dir().join(format!("whimbrel-bench-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("a directory");
    let files = Files::within(&dir);
    for (path, text) in [(&files.ca, ca.cert()), (&files.cert, &host.cert), (&files.key, &host.key)] {
        fs::write(path, text).expect("a file");
    }
    fs::set_permissions(&files.key, fs::Permissions::from_mode(0o600)).expect("a mode");
    let server = Identity::load(&files).expect("an identity").server();
    fs::remove_dir_all(&dir).expect("to clean up");

    let suite: SupportedCipherSuite = match suite {
        "AES-128-GCM" => suites::TLS13_AES_128_GCM_SHA256,
        "AES-256-GCM" => suites::TLS13_AES_256_GCM_SHA384,
        _ => suites::TLS13_CHACHA20_POLY1305_SHA256,
    };
    let mut provider = default_provider();
    provider.cipher_suites = vec![suite];
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.cert().as_bytes()).expect("a certificate")).expect("a CA");
    let chain = vec![CertificateDer::from_pem_slice(host.cert.as_bytes()).expect("a certificate")];
    let key = PrivateKeyDer::from_pem_slice(host.key.as_bytes()).expect("a key");
    let mut client = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .expect("a certificate with its key");
    client.alpn_protocols = server.alpn_protocols.clone();
    let name = pki::server_name("b").expect("a name");
    let mut source: Connection = ClientConnection::new(Arc::new(client), name).expect("a client").into();
    let mut target: Connection = ServerConnection::new(server).expect("a server").into();
    while source.is_handshaking() || target.is_handshaking() {
        pass(&mut source, &mut target);
        pass(&mut target, &mut source);
    }
    source.set_buffer_limit(Some(OUTBOX));
    (source, target)
}

/// Everything that one end has to say to the other.
fn pass(from: &mut Connection, to: &mut Connection) {
    let mut wire = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut wire).expect("memory");
    }
    let mut rest = &wire[..];
    while !rest.is_empty() {
        to.read_tls(&mut rest).expect("room");
        to.process_new_packets().expect("a handshake");
    }
}
