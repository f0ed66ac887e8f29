//! etcd's v3 API over HTTP with JSON (its gRPC gateway), as much of it as ownership needs: reads and
//! transactions.

use base64::{Engine, engine::general_purpose::STANDARD};
use pki::ClientFiles;
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    io::{self, ErrorKind},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use ureq::{
    Agent,
    tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem},
};

/// After so long an end point is given up and the next one asked; etcd answers within milliseconds, and
/// elects a new leader within a second or two. It decides nothing: whoever asked asks again.
const PATIENCE: Duration = Duration::from_secs(2);

/// The longest answer: a few records of less than a kilobyte each.
const LONGEST: u64 = 1 << 20;

/// The end points of one cluster.
#[derive(Debug)]
pub(crate) struct Gateway {
    agent: Agent,
    endpoints: Vec<String>,
    /// The one that answered last.
    good: AtomicUsize,
}

/// How a cluster is asked by `https`: the files are read when the agent starts.
fn config(files: &ClientFiles) -> io::Result<TlsConfig> {
    let client = match &files.client {
        None => None,
        Some((cert, key)) => Some(ClientCert::new_with_certs(&certificates(cert)?, private_key(key)?)),
    };
    let ring = Arc::new(rustls::crypto::ring::default_provider());
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&certificates(&files.ca)?))
        .client_cert(client)
        .unversioned_rustls_crypto_provider(ring)
        .build())
}

fn certificates(path: &Path) -> io::Result<Vec<Certificate<'static>>> {
    let pem = pki::read(path).map_err(io::Error::other)?;
    let certificates: Vec<_> = parse_pem(pem.as_bytes())
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(failed(path, ErrorKind::InvalidData, "there is no certificate in it (PEM)"));
    }
    Ok(certificates)
}

fn private_key(path: &Path) -> io::Result<PrivateKey<'static>> {
    let pem = pki::read_key(path).map_err(io::Error::other)?;
    PrivateKey::from_pem(pem.as_bytes())
        .map_err(|error| failed(path, ErrorKind::InvalidData, &error.to_string()))
}

fn failed(path: &Path, kind: ErrorKind, why: &str) -> io::Error {
    io::Error::new(kind, format!("{}: {why}", path.display()))
}

/// What every answer begins with.
#[derive(Deserialize, Debug, Default)]
pub(crate) struct Header {
    #[serde(default)]
    cluster_id: String,
    #[serde(default)]
    revision: String,
}

/// A key with its value.
#[derive(Deserialize, Debug)]
struct Pair {
    #[serde(default)]
    value: String,
}

#[derive(Deserialize, Debug, Default)]
struct Range {
    #[serde(default)]
    kvs: Vec<Pair>,
}

#[derive(Deserialize, Debug)]
struct Response {
    response_range: Option<Range>,
}

#[derive(Deserialize, Debug)]
struct Answer {
    header: Header,
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<Response>,
}

/// What came of a transaction.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The cluster's number, the same on all its members.
    pub(crate) cluster: u64,
    /// How many changes it has seen.
    pub(crate) revision: u64,
    /// Whether the conditions held.
    pub(crate) succeeded: bool,
    /// What its reads found, in their order.
    pub(crate) values: Vec<Option<Vec<u8>>>,
}

/// A condition of a transaction.
pub(crate) fn is(key: &str, value: &[u8]) -> Value {
    json!({ "key": base64(key), "target": "VALUE", "result": "EQUAL", "value": base64(value) })
}

/// That there is such a key, or that there is none.
pub(crate) fn exists(key: &str, yes: bool) -> Value {
    let result = if yes { "GREATER" } else { "EQUAL" };
    json!({ "key": base64(key), "target": "CREATE", "result": result, "create_revision": "0" })
}

/// An act of a transaction.
pub(crate) fn put(key: &str, value: &[u8]) -> Value {
    json!({ "request_put": { "key": base64(key), "value": base64(value) } })
}

/// A read in a transaction.
pub(crate) fn get(key: &str) -> Value {
    json!({ "request_range": { "key": base64(key) } })
}

/// Removes all keys from `first` on that come before `end`.
pub(crate) fn delete(first: &str, end: &str) -> Value {
    json!({ "request_delete_range": { "key": base64(first), "range_end": base64(end) } })
}

fn base64(bytes: impl AsRef<[u8]>) -> String {
    STANDARD.encode(bytes)
}

impl Gateway {
    /// For these, each `https://HOST:PORT` with `tls`, or `http://HOST:PORT` without.
    pub(crate) fn new(endpoints: &[String], tls: Option<&ClientFiles>) -> io::Result<Self> {
        let scheme = if tls.is_some() { "https://" } else { "http://" };
        if let Some(wrong) = endpoints.iter().find(|end| !end.starts_with(scheme)) {
            let why =
                format!("{wrong:?} is no end point of etcd that can be asked so: write {scheme}HOST:PORT");
            return Err(io::Error::new(ErrorKind::InvalidInput, why));
        }
        let config = Agent::config_builder()
            .timeout_global(Some(PATIENCE))
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None);
        let config = match tls {
            Some(tls) => config.tls_config(self::config(tls)?).https_only(true).build(),
            None => config.build(),
        };
        let endpoints = endpoints.iter().map(|e| e.trim_end_matches('/').to_owned()).collect();
        Ok(Self { agent: config.into(), endpoints, good: AtomicUsize::new(0) })
    }

    /// A transaction; linearizable, as all of them are. May be done although an error is returned.
    pub(crate) fn transact(
        &self,
        compare: &[Value],
        success: &[Value],
        failure: &[Value],
    ) -> io::Result<Outcome> {
        let body = json!({ "compare": compare, "success": success, "failure": failure }).to_string();
        let (mut errors, first) = (Vec::new(), self.good.load(Ordering::Relaxed));
        for i in 0..self.endpoints.len() {
            let n = (first + i) % self.endpoints.len();
            match self.ask(&self.endpoints[n], &body) {
                Ok(answer) => {
                    self.good.store(n, Ordering::Relaxed);
                    return outcome(answer)
                        .ok_or_else(|| invalid(&self.endpoints[n], "its answer lacks numbers"));
                }
                Err(error) => errors.push(error.to_string()),
            }
        }
        Err(io::Error::other(format!("etcd does not answer: {}", errors.join("; "))))
    }

    fn ask(&self, endpoint: &str, body: &str) -> io::Result<Answer> {
        let failed = |error: ureq::Error| io::Error::other(format!("{endpoint}: {error}"));
        let request =
            self.agent.post(format!("{endpoint}/v3/kv/txn")).header("content-type", "application/json");
        let mut response = request.send(body).map_err(failed)?;
        let status = response.status();
        let bytes = response.body_mut().with_config().limit(LONGEST).read_to_vec().map_err(failed)?;
        if !status.is_success() {
            let said = String::from_utf8_lossy(&bytes);
            return Err(invalid(
                endpoint,
                &format!("{status}: {}", said.trim().chars().take(200).collect::<String>()),
            ));
        }
        serde_json::from_slice(&bytes)
            .map_err(|e| invalid(endpoint, &format!("it does not speak etcd's v3 API: {e}")))
    }
}

fn invalid(endpoint: &str, why: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("{endpoint}: {why}"))
}

fn outcome(answer: Answer) -> Option<Outcome> {
    let value = |range: Range| match range.kvs.into_iter().next() {
        Some(pair) => STANDARD.decode(pair.value).ok().map(Some),
        None => Some(None),
    };
    let ranges = answer.responses.into_iter().filter_map(|response| response.response_range);
    Some(Outcome {
        cluster: answer.header.cluster_id.parse().ok()?,
        revision: answer.header.revision.parse().ok()?,
        succeeded: answer.succeeded,
        values: ranges.map(value).collect::<Option<_>>()?,
    })
}
