use crate::{
    Files, PkiError,
    clock::Instant,
    files::{make_dir, read, read_key, write_new, wrong},
    show::Card,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::pki_types::ServerName;
use std::path::{Path, PathBuf};

/// How long a CA is valid: replacing it means new certificates for all hosts.
const CA_DAYS: u32 = 3650;

/// Certificates begin to be valid this long before they are made: clocks within an hour of each other do no
/// harm.
const SLACK: i64 = 3600;

/// When a certificate is valid.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Validity {
    /// From this second on.
    pub from: Instant,
    /// Up to this second.
    pub until: Instant,
}

impl Validity {
    /// From now on, for so many days.
    pub fn days(days: u32) -> Self {
        let now = Instant::now();
        Self { from: Instant(now.0 - SLACK), until: now.plus_days(days) }
    }
}

/// A certificate and its key, as PEM.
pub struct Pair {
    /// The certificate.
    pub cert: String,
    /// Its key.
    pub key: String,
}

/// A workgroup's CA.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    cert: String,
    valid: Validity,
}

fn unfit(error: impl std::fmt::Display) -> PkiError {
    PkiError::Unfit(error.to_string())
}

impl Authority {
    /// A new one, for a workgroup of this name.
    pub fn make(workgroup: &str, valid: Validity) -> Result<(Self, Pair), PkiError> {
        let good = |c: char| c.is_ascii_alphanumeric() || "-_. ".contains(c);
        if workgroup.trim() != workgroup
            || !(1..=63).contains(&workgroup.len())
            || !workgroup.chars().all(good)
        {
            let rule = "1 to 63 letters, digits, '-', '_', '.' or blanks";
            return Err(PkiError::Unfit(format!("{workgroup:?} is no name for a workgroup; write {rule}")));
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, workgroup);
        // Two workgroups of one name stay two: whoever checks a certificate looks for its CA by this.
        let mut unique = [0; 8];
        SystemRandom::new().fill(&mut unique).map_err(|_| unfit("no random numbers are to be had"))?;
        let unique: String = unique.iter().map(|byte| format!("{byte:02x}")).collect();
        params
            .distinguished_name
            .push(DnType::OrganizationalUnitName, format!("whimbrel workgroup {unique}"));
        // It issues certificates of hosts, and no further CAs.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = (valid.from.date(), valid.until.date());
        let key = KeyPair::generate().map_err(unfit)?;
        let cert = params.self_signed(&key).map_err(unfit)?.pem();
        let pair = Pair { cert: cert.clone(), key: key.serialize_pem() };
        Ok((Self { issuer: Issuer::new(params, key), cert, valid }, pair))
    }

    /// The one of this directory.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let (cert_path, key_path) = (dir.join("ca.crt"), dir.join("ca.key"));
        let cert = read(&cert_path)?;
        let key = KeyPair::from_pem(&read_key(&key_path)?).map_err(|e| wrong(&key_path, e.to_string()))?;
        let card = Card::of(&cert_path, &cert)?;
        if !card.authority {
            return Err(wrong(&cert_path, "this is a host's certificate, not a CA's"));
        }
        if !card.is_of(&key) {
            return Err(wrong(&key_path, format!("this is not the key of {}", cert_path.display())));
        }
        let issuer = Issuer::from_ca_cert_pem(&cert, key).map_err(|e| wrong(&cert_path, e.to_string()))?;
        Ok(Self { issuer, cert, valid: Validity { from: card.from, until: card.until } })
    }

    /// Its certificate, as PEM: public.
    pub fn cert(&self) -> &str {
        &self.cert
    }

    /// A certificate for a host of this name, which is reached at these addresses (IP addresses or further
    /// names).
    pub fn issue(&self, host: &str, addresses: &[String], valid: Validity) -> Result<Pair, PkiError> {
        if !matches!(ServerName::try_from(host), Ok(ServerName::DnsName(_))) {
            let rule = "letters, digits, '-', '_' and '.', its last part not a number";
            return Err(PkiError::Unfit(format!(
                "{host:?} cannot be a host's name in a certificate; write {rule}"
            )));
        }
        if let Some(bad) = addresses.iter().find(|address| ServerName::try_from(address.as_str()).is_err()) {
            return Err(PkiError::Unfit(format!("{bad:?} is neither an IP address nor a name")));
        }
        let mut names = vec![host.to_owned()];
        names.extend(addresses.iter().filter(|address| *address != host).cloned());
        let mut params = CertificateParams::new(names).map_err(unfit)?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, host);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Each host calls, and is called.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (valid.from.date(), valid.until.date());
        let key = KeyPair::generate().map_err(unfit)?;
        let cert = params.signed_by(&key, &self.issuer).map_err(unfit)?.pem();
        Ok(Pair { cert, key: key.serialize_pem() })
    }
}

/// What was made, and where.
#[derive(Debug)]
pub struct Made {
    /// The certificate, as it was made.
    pub card: Card,
    /// All files, the key last.
    pub files: Vec<PathBuf>,
}

/// Makes a workgroup's CA in a directory.
pub fn init(dir: &Path, workgroup: &str) -> Result<Made, PkiError> {
    let (_, pair) = Authority::make(workgroup, Validity::days(CA_DAYS))?;
    make_dir(dir)?;
    let (cert, key) = (dir.join("ca.crt"), dir.join("ca.key"));
    write_new(&[(&cert, 0o644, &pair.cert), (&key, 0o600, &pair.key)])?;
    Ok(Made { card: Card::of(&cert, &pair.cert)?, files: vec![cert, key] })
}

/// Makes a host's certificate and key, and puts a copy of the CA's certificate beside them.
pub fn issue(dir: &Path, host: &str, addresses: &[String], days: u32, out: &Path) -> Result<Made, PkiError> {
    let ca = Authority::load(dir)?;
    let now = Instant::now();
    if now > ca.valid.until || now < ca.valid.from {
        let Validity { from, until } = ca.valid;
        let why = format!("this CA is valid from {from} until {until}, and this host's clock says {now}");
        return Err(wrong(&dir.join("ca.crt"), why));
    }
    let mut valid = Validity::days(days);
    valid.from = valid.from.max(ca.valid.from);
    // Beyond its CA a certificate is worth nothing.
    valid.until = valid.until.min(ca.valid.until);
    let pair = ca.issue(host, addresses, valid)?;
    make_dir(out)?;
    let files = Files::within(out);
    write_new(&[
        (&files.ca, 0o644, ca.cert()),
        (&files.cert, 0o644, &pair.cert),
        (&files.key, 0o600, &pair.key),
    ])?;
    Ok(Made { card: Card::of(&files.cert, &pair.cert)?, files: vec![files.ca, files.cert, files.key] })
}
