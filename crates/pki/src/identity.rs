use crate::{
    Files, PkiError,
    clock::Instant,
    files::{read, read_key, wrong},
    show::Card,
};
use rustls::{
    CertificateError, ClientConfig, InconsistentKeys, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    version::TLS13,
};
use std::{fmt, path::Path, sync::Arc};

/// What both sides must name, so that no other service of the same workgroup is mistaken for an agent.
const PROTOCOL: &[u8] = b"whimbrel";

/// From so many days before its end on, an agent says that its certificate should be renewed.
const SOON: i64 = 30;

/// How connections are protected.
#[derive(Clone, Debug)]
pub enum Security {
    /// TLS 1.3; both sides show certificates.
    Tls(Arc<Identity>),
    /// Not at all: whoever can reach the network can read, change and impersonate.
    Plaintext,
}

/// This host as others see it, and whom it trusts.
pub struct Identity {
    /// Its certificate.
    pub card: Card,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("names", &self.card.names).finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads a host's files and checks that they fit together. A certificate that has expired is no error
    /// here: its VMs must be cared for all the same; see [`Identity::warning`].
    pub fn load(files: &Files) -> Result<Self, PkiError> {
        let (ca, cert) = (read(&files.ca)?, read(&files.cert)?);
        // The usual mistake first, because it has a remedy of its own.
        let key = read_key(&files.key)?;
        let card = Card::of(&files.cert, &cert)?;
        if card.authority {
            return Err(wrong(
                &files.cert,
                "this is a CA's certificate, not a host's; make one: whimbrel pki issue",
            ));
        }
        if dns_names(&card).next().is_none() {
            return Err(wrong(
                &files.cert,
                "it names no host (no DNS name among its subject alternative names)",
            ));
        }
        let chain = certificates(&files.cert, &cert)?;
        let roots = roots(&files.ca, &ca)?;
        check_issued(files, &chain, &roots)?;
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
            .map_err(|e| wrong(&files.key, format!("there is no key in it: {e}")))?;
        let refused = |error: rustls::Error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                wrong(&files.key, format!("this is not the key of {}", files.cert.display()))
            }
            error => wrong(&files.key, format!("this key cannot be used: {error}")),
        };
        let provider = provider();
        let client = ClientConfig::builder_with_provider(provider.clone());
        let mut client = client
            .with_protocol_versions(&[&TLS13])
            .map_err(refused)?
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(refused)?;
        client.resumption = Resumption::disabled();
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        let server = ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13]);
        let mut server = server
            .map_err(refused)?
            .with_client_cert_verifier(verifier(files, roots)?)
            .with_single_cert(chain, key)
            .map_err(refused)?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Self { card, client: Arc::new(client), server: Arc::new(server) })
    }

    /// For connections that this host makes.
    pub fn client(&self) -> Arc<ClientConfig> {
        self.client.clone()
    }

    /// For connections that this host accepts.
    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// Whether a host of this name may show this certificate.
    pub fn is(&self, host: &str) -> bool {
        dns_names(&self.card).any(|name| name == host)
    }

    /// What should be done about the certificate, if anything.
    pub fn warning(&self, now: Instant) -> Option<String> {
        let left = self.card.until.days_since(now);
        let soon = || format!("it expires in {left} days, at {}", self.card.until);
        let why = self.card.complaint(now).or_else(|| (left < SOON).then(soon))?;
        Some(format!(
            "the certificate {}: {why}; issue a new one with whimbrel pki issue",
            self.card.path.display()
        ))
    }
}

fn dns_names(card: &Card) -> impl Iterator<Item = &String> {
    card.names.iter().filter(|name| matches!(ServerName::try_from(name.as_str()), Ok(ServerName::DnsName(_))))
}

/// The hosts' names of a peer's certificate, which was verified already. Addresses are no names: a host says
/// who it is by its name.
pub fn names_of(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok(parsed) = webpki::EndEntityCert::try_from(certificate) else { return Vec::new() };
    parsed.valid_dns_names().map(str::to_owned).collect()
}

/// What the certificate of a host must name when it is called so: `hostb`, `10.0.0.2`, `[fe80::1]`.
pub fn server_name(host: &str) -> Result<ServerName<'static>, String> {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    ServerName::try_from(bare.to_owned())
        .map_err(|_| format!("no certificate can be for {host:?}; call it by a name"))
}

/// Which algorithms are offered, the fastest first (`cargo bench -p bench --bench micro tls`: the first is up
/// to 8 % ahead of the second and 1.6 to 2.3 times as fast as the third, which is for processors without
/// AES).
fn provider() -> Arc<CryptoProvider> {
    use ring::cipher_suite::{
        TLS13_AES_128_GCM_SHA256 as AES_128, TLS13_AES_256_GCM_SHA384 as AES_256,
        TLS13_CHACHA20_POLY1305_SHA256 as CHACHA20,
    };
    let mut provider = ring::default_provider();
    provider.cipher_suites = vec![AES_128, AES_256, CHACHA20];
    Arc::new(provider)
}

pub(crate) fn certificates(path: &Path, pem: &str) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match all {
        Ok(all) if all.is_empty() => Err(wrong(path, "there is no certificate in it")),
        Ok(all) => Ok(all),
        Err(error) => Err(wrong(path, format!("this certificate cannot be read: {error}"))),
    }
}

fn roots(path: &Path, pem: &str) -> Result<Arc<RootCertStore>, PkiError> {
    let mut roots = RootCertStore::empty();
    for root in certificates(path, pem)? {
        roots.add(root).map_err(|e| wrong(path, format!("this CA's certificate cannot be used: {e}")))?;
    }
    Ok(Arc::new(roots))
}

fn verifier(files: &Files, roots: Arc<RootCertStore>) -> Result<Arc<dyn ClientCertVerifier>, PkiError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build();
    verifier.map_err(|e| wrong(&files.ca, format!("this CA's certificate cannot be used: {e}")))
}

/// Whether the files' certificate is of the files' CA, whatever the time is.
pub(crate) fn issued_by(files: &Files) -> Result<(), PkiError> {
    let (ca, cert) = (read(&files.ca)?, read(&files.cert)?);
    check_issued(files, &certificates(&files.cert, &cert)?, &roots(&files.ca, &ca)?)
}

fn check_issued(
    files: &Files,
    chain: &[CertificateDer<'static>],
    roots: &Arc<RootCertStore>,
) -> Result<(), PkiError> {
    use CertificateError as E;
    let Some((host, between)) = chain.split_first() else {
        return Err(wrong(&files.cert, "there is no certificate in it"));
    };
    match verifier(files, roots.clone())?.verify_client_cert(host, between, UnixTime::now()) {
        Ok(_) => Ok(()),
        Err(rustls::Error::InvalidCertificate(
            E::Expired | E::ExpiredContext { .. } | E::NotValidYet | E::NotValidYetContext { .. },
        )) => Ok(()),
        Err(rustls::Error::InvalidCertificate(E::UnknownIssuer | E::BadSignature)) => {
            let ca = files.ca.display();
            Err(wrong(
                &files.cert,
                format!("it was not issued by the CA of {ca}: they are of different workgroups"),
            ))
        }
        Err(error) => Err(wrong(&files.cert, format!("it is not fit for a host of the workgroup: {error}"))),
    }
}
