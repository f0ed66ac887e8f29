use crate::{Identity, clock::Instant};
use rustls::{AlertDescription as Alert, CertificateError as Certificate, Error};

/// Why a handshake with a peer failed, as this side knows it, and what would mend it.
pub fn why(error: &Error, here: &Identity) -> String {
    match error {
        Error::InvalidCertificate(error) => of_peers_certificate(error, here),
        Error::NoCertificatesPresented => {
            "the other side showed no certificate; only hosts of the workgroup are \
             let in: issue it one with whimbrel pki issue"
                .to_owned()
        }
        Error::AlertReceived(alert) => of_ours(*alert, here),
        Error::PeerIncompatible(why) => {
            format!("the other side cannot do TLS 1.3 as it is needed here: {why:?}")
        }
        Error::NoApplicationProtocol => "the other side speaks TLS, but is no Whimbrel agent".to_owned(),
        Error::InvalidMessage(_) => "the other side speaks no TLS; is a Whimbrel agent there?".to_owned(),
        error => format!("TLS failed: {error}"),
    }
}

/// This side does not accept the peer's certificate.
fn of_peers_certificate(error: &Certificate, here: &Identity) -> String {
    let workgroup = &here.card.workgroup;
    match error {
        Certificate::ExpiredContext { time, not_after } => format!(
            "the other side's certificate expired at {}, and this host's clock says {}: issue it a new one \
             (whimbrel pki issue), or set this clock right",
            Instant::from(*not_after),
            Instant::from(*time)
        ),
        Certificate::NotValidYetContext { time, not_before } => format!(
            "the other side's certificate is valid only from {} on, and this host's clock says {}: one of \
             the two hosts' clocks is wrong",
            Instant::from(*not_before),
            Instant::from(*time)
        ),
        Certificate::UnknownIssuer | Certificate::BadSignature => format!(
            "the other side's certificate is of another workgroup than this host's ({workgroup}): its CA is \
             not the one of this host"
        ),
        Certificate::NotValidForNameContext { expected, presented } => format!(
            "the other side's certificate is not for {}, by which it was called, but for {}: call it by \
             that, or issue it a certificate with --address",
            expected.to_str(),
            presented.iter().map(|name| inner(name)).collect::<Vec<_>>().join(", ")
        ),
        Certificate::InvalidPurpose | Certificate::InvalidPurposeContext { .. } => {
            "the other side's certificate is not meant for this: it needs the extended key usages serverAuth \
             and clientAuth"
                .to_owned()
        }
        error => format!("the other side's certificate cannot be accepted: {error}"),
    }
}

/// The peer does not accept ours.
fn of_ours(alert: Alert, here: &Identity) -> String {
    let card = &here.card;
    match alert {
        Alert::CertificateExpired => format!(
            "the other side finds this host's certificate expired or not yet valid: it is valid from {} \
             until {}, and this host's clock says {}; issue a new one (whimbrel pki issue), or set the wrong \
             clock right",
            card.from,
            card.until,
            Instant::now()
        ),
        Alert::UnknownCA | Alert::DecryptError => format!(
            "the other side does not know the CA of this host's certificate: it is of another workgroup than \
             this host's ({})",
            card.workgroup
        ),
        Alert::BadCertificate => format!(
            "the other side called this host by a name that its certificate is not for; it is for {}",
            card.names.join(", ")
        ),
        Alert::CertificateRequired => "the other side wants a certificate and got none".to_owned(),
        Alert::UnsupportedCertificate => {
            "the other side finds this host's certificate not meant for this: it needs the \
             extended key usages serverAuth and clientAuth"
                .to_owned()
        }
        Alert::NoApplicationProtocol => "the other side speaks TLS, but is no Whimbrel agent".to_owned(),
        Alert::ProtocolVersion | Alert::HandshakeFailure => {
            "the other side cannot do TLS 1.3 as it is needed here".to_owned()
        }
        alert => format!("the other side broke TLS off: {alert:?}"),
    }
}

/// `DnsName("hostb")` as rustls shows names, without what is around.
fn inner(shown: &str) -> &str {
    let inside = shown.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')')).unwrap_or(shown);
    inside.trim_matches('"')
}
