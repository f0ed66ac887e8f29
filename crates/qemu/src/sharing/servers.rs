//! Whether a server on the network has a disk: as far as that can be seen before QEMU opens it, and
//! afterwards.

use super::nbd;
use crate::recipe::{Export, Protocol, is_server_driver};
use serde_json::Value;
use std::{
    io,
    net::{TcpStream, ToSocketAddrs},
    time::Duration,
};

/// How long a server may take for each word. One of NBD that takes no second client lets it wait for ever.
pub(super) const WORD: Duration = Duration::from_secs(3);

/// Looks before QEMU is started; else says what is wrong and what to do about it. Only NBD tells more than
/// that somebody listens.
pub(crate) fn look(export: &Export) -> Result<(), String> {
    match export.protocol {
        Protocol::Nbd => nbd::look(export),
        _ => call(export).map(drop).map_err(|error| {
            format!("disk {}: its server cannot be used from this host: {error}", export.url())
        }),
    }
}

/// Connects.
pub(super) fn call(export: &Export) -> io::Result<TcpStream> {
    let addresses = (export.host.as_str(), export.port).to_socket_addrs()?;
    let mut tried = io::Error::other("its name leads to no address");
    for address in addresses {
        match TcpStream::connect_timeout(&address, WORD) {
            Ok(server) => return Ok(server),
            Err(error) => tried = error,
        }
    }
    Err(tried)
}

/// What is wrong with the disks that a QEMU has opened, by its `query-named-block-nodes`: each must be what
/// it is at the source.
pub(crate) fn opened(exports: &[Export], nodes: &Value) -> Option<String> {
    nodes.as_array().into_iter().flatten().find_map(|node| {
        let driver = node["drv"].as_str().filter(|driver| is_server_driver(driver))?;
        let (file, bytes) =
            (node["file"].as_str().unwrap_or_default(), node["image"]["virtual-size"].as_u64());
        let bytes = bytes.unwrap_or(0);
        let here = match Export::read(driver, file, bytes) {
            Ok(here) => here,
            Err(why) => return Some(format!("disk {file}: {why}")),
        };
        match exports.iter().find(|export| export.url() == here.url()) {
            Some(export) if export.bytes == bytes => None,
            Some(export) => Some(differs(export, bytes)),
            None => Some(format!("disk {} is none of the VM's", here.url())),
        }
    })
}

/// What is said of a server that has another disk.
pub(super) fn differs(export: &Export, bytes: u64) -> String {
    format!(
        "disk {} has {bytes} bytes here, and {} at the source: by this address another server answers here; \
         give it one that is the same on both hosts",
        export.url(),
        export.bytes
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_a_server_has_is_compared_once_it_is_open() {
        let export = Export::read("https", "https://m/a.iso", 7).unwrap();
        let node = |file: &str, bytes: u64| {
            json!([{ "drv": "https", "file": file,
            "image": { "virtual-size": bytes } }])
        };
        let wrong = |nodes: Value| opened(std::slice::from_ref(&export), &nodes).unwrap_or_default();
        assert_eq!(wrong(node("https://m:443/a.iso", 7)), "");
        assert_eq!(wrong(json!([{ "drv": "file", "file": "/a" }])), "");
        assert!(wrong(node("https://m/a.iso", 8)).contains("has 8 bytes here, and 7 at the source"));
        assert!(wrong(node("https://m/b.iso", 7)).contains("none of the VM's"));
        assert!(wrong(node("json:{}", 7)).contains("more than a URL"));
    }
}
