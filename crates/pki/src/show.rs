use crate::{
    Files, PkiError,
    clock::Instant,
    files::{read, read_key, wrong},
    identity::{certificates, issued_by},
};
use rcgen::{KeyPair, PublicKeyData};
use ring::digest::{SHA256, digest};
use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, x509::X509Name};

/// What a certificate says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Card {
    /// The file.
    pub path: PathBuf,
    /// Whether it is a CA's.
    pub authority: bool,
    /// Whose: the host's names and addresses; none for a CA.
    pub names: Vec<String>,
    /// The workgroup: the CA that issued it, or is it.
    pub workgroup: String,
    /// Valid from then on.
    pub from: Instant,
    /// Valid until then.
    pub until: Instant,
    /// SHA-256 of the certificate, in hexadecimal.
    pub fingerprint: String,
    public_key: Vec<u8>,
}

impl Card {
    /// Reads the first certificate of a PEM text; `path` is where it is from.
    pub(crate) fn of(path: &Path, pem: &str) -> Result<Self, PkiError> {
        let chain = certificates(path, pem)?;
        let der = chain.first().ok_or_else(|| wrong(path, "there is no certificate in it"))?;
        let unreadable =
            |e: &dyn std::fmt::Display| wrong(path, format!("this certificate cannot be read: {e}"));
        let (_, cert) = x509_parser::parse_x509_certificate(der).map_err(|e| unreadable(&e))?;
        let seconds = |time: x509_parser::time::ASN1Time| Instant(time.timestamp());
        let authority = cert.is_ca();
        Ok(Self {
            path: path.to_owned(),
            authority,
            names: if authority { Vec::new() } else { names(&cert).map_err(|e| unreadable(&e))? },
            workgroup: common_name(if authority { cert.subject() } else { cert.issuer() }),
            from: seconds(cert.validity().not_before),
            until: seconds(cert.validity().not_after),
            fingerprint: digest(&SHA256, der).as_ref().iter().map(|byte| format!("{byte:02x}")).collect(),
            public_key: cert.public_key().raw.to_vec(),
        })
    }

    /// Whether this key is the certificate's.
    pub(crate) fn is_of(&self, key: &KeyPair) -> bool {
        key.subject_public_key_info() == self.public_key
    }

    /// What is wrong with it now, by this host's clock.
    pub fn complaint(&self, now: Instant) -> Option<String> {
        let Self { from, until, .. } = self;
        if now < *from {
            Some(format!("it is valid only from {from} on, and this host's clock says {now}"))
        } else if now > *until {
            Some(format!("it expired at {until}, and this host's clock says {now}"))
        } else {
            None
        }
    }
}

fn common_name(name: &X509Name<'_>) -> String {
    let common = name.iter_common_name().next().and_then(|name| name.as_str().ok());
    common.map_or_else(|| name.to_string(), str::to_owned)
}

fn names(cert: &X509Certificate<'_>) -> Result<Vec<String>, x509_parser::error::X509Error> {
    let Some(extension) = cert.subject_alternative_name()? else { return Ok(Vec::new()) };
    let name = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
            _ => <[u8; 16]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
        },
        _ => None,
    };
    Ok(extension.value.general_names.iter().filter_map(name).collect())
}

/// What a file or a directory holds.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Shown {
    /// Its certificates.
    pub cards: Vec<Card>,
    /// What was looked at and found good.
    pub good: Vec<String>,
    /// What does not fit, or is not valid now.
    pub bad: Vec<String>,
}

/// Reads a certificate file, or a directory with the usual names in it.
pub fn show(path: &Path) -> Result<Shown, PkiError> {
    let mut shown = Shown::default();
    if !path.is_dir() {
        shown.cards.push(Card::of(path, &read(path)?)?);
    } else {
        let files = Files::within(path);
        let found: Vec<&PathBuf> =
            [&files.ca, &files.cert].into_iter().filter(|file| file.exists()).collect();
        if found.is_empty() {
            return Err(wrong(path, "there is neither ca.crt nor host.crt in it"));
        }
        for file in found {
            shown.cards.push(Card::of(file, &read(file)?)?);
        }
        if files.ca.exists() && files.cert.exists() {
            let issued = issued_by(&files);
            shown.tell(issued, "host.crt was issued by the CA of ca.crt");
        }
        for (cert, key, says) in [
            (&files.ca, path.join("ca.key"), "ca.key is the key of ca.crt"),
            (&files.cert, files.key.clone(), "host.key is the key of host.crt"),
        ] {
            let card = shown.cards.iter().find(|card| card.path == *cert).cloned();
            if let (Some(card), true) = (card, key.exists()) {
                shown.tell(belongs(&card, &key), says);
            }
        }
    }
    let now = Instant::now();
    for card in &shown.cards {
        shown.bad.extend(card.complaint(now).map(|why| format!("{}: {why}", card.path.display())));
    }
    Ok(shown)
}

fn belongs(card: &Card, key: &Path) -> Result<(), PkiError> {
    let text = read_key(key)?;
    let not = || wrong(key, format!("this is not the key of {}", card.path.display()));
    match KeyPair::from_pem(&text) {
        Ok(pair) if card.is_of(&pair) => Ok(()),
        Ok(_) => Err(not()),
        Err(error) => Err(wrong(key, error.to_string())),
    }
}

impl Shown {
    fn tell(&mut self, found: Result<(), PkiError>, good: &str) {
        match found {
            Ok(()) => self.good.push(good.to_owned()),
            Err(error) => self.bad.push(error.to_string()),
        }
    }
}
