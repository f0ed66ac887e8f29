//! What a disk's options may say.

use super::{
    forms::Form::{self, *},
    options::fit,
    properties::Property,
};
use crate::recipe::{Export, LIMITS, Role, check::shown, export, is_server_driver, options};

/// Whether a path is among the recipe's files of this role.
pub(super) type FileOf<'a> = &'a dyn Fn(Role, &str) -> bool;

const FORMATS: Form = Word(&["raw", "qcow2", "luks"]);
const ZEROES: Form = Word(&["off", "on", "unmap"]);
const DISCARD: Form = Word(&["ignore", "off", "unmap", "on"]);
const LOCKED: Form = Word(&["on", "auto"]);
const ENGINES: Form = Word(&["threads", "native", "io_uring"]);

/// Properties of a block node that open nothing.
const NODE: &[Property] = &[
    ("aio", ENGINES),
    ("auto-read-only", Switch),
    ("cache-clean-interval", Number),
    ("cache-size", Size),
    ("cache.direct", Switch),
    ("cache.no-flush", Switch),
    ("detect-zeroes", ZEROES),
    ("discard", DISCARD),
    ("discard-no-unref", Switch),
    (
        "driver",
        Word(&[
            "file", "raw", "qcow2", "null-co", "throttle", "nbd", "luks", "http", "https", "iscsi", "ssh",
        ]),
    ),
    ("encrypt.format", Word(&["luks"])),
    ("encrypt.key-secret", Id),
    ("file", Id),
    ("key-secret", Id),
    ("l2-cache-entry-size", Size),
    ("l2-cache-size", Size),
    ("latency-ns", Number),
    ("lazy-refcounts", Switch),
    ("locking", LOCKED),
    ("node-name", Id),
    ("offset", Size),
    ("open-timeout", Number),
    ("overlap-check", Word(&["none", "constant", "cached", "all"])),
    ("pass-discard-other", Switch),
    ("pass-discard-request", Switch),
    ("pass-discard-snapshot", Switch),
    ("readahead", Size),
    ("read-only", Switch),
    ("read-zeroes", Switch),
    ("reconnect-delay", Number),
    ("refcount-cache-size", Size),
    ("size", Size),
    ("throttle-group", Id),
    ("timeout", Number),
];

pub(super) fn blockdev(value: &str, file_of: FileOf, exports: &[Export]) -> Result<(), String> {
    let mut parsed = options::parse(value, "driver");
    for prefix in ["", "file."] {
        server(&mut parsed, prefix, exports)?;
    }
    let driver = options::get(&parsed, "driver").unwrap_or_default();
    let is_known = matches!(driver, "file" | "raw" | "qcow2" | "null-co" | "throttle" | "luks");
    if !is_known && !is_server_driver(driver) {
        return Err(format!("block driver {} is not allowed", shown(driver)));
    }
    check(&parsed, file_of, &["filename", "file.filename"], |key| {
        find(NODE, key.strip_prefix("file.").unwrap_or(key))
    })
}

/// Takes away what a node is told of its server, which must be one of the recipe's exports; a node that has
/// none must not be told any.
fn server(parsed: &mut Vec<(String, String)>, prefix: &str, exports: &[Export]) -> Result<(), String> {
    let keys = export::keys_of(options::get(parsed, &format!("{prefix}driver")).unwrap_or_default());
    if keys.is_empty() {
        return Ok(());
    }
    let is_key = |key: &str| key.strip_prefix(prefix).is_some_and(|key| keys.contains(&key));
    let (told, rest): (Vec<_>, Vec<_>) = parsed.drain(..).partition(|(key, _)| is_key(key));
    *parsed = rest;
    // Which of two would count is not looked at.
    let twice = told.iter().enumerate().any(|(n, (key, _))| told[..n].iter().any(|(other, _)| other == key));
    let driver = options::get(parsed, &format!("{prefix}driver")).unwrap_or_default();
    let is_it = |export: &&Export| export.protocol.word() == driver && export.is_opened_by(&told, prefix);
    if twice || !exports.iter().any(|export| is_it(&export)) {
        let told = options::join(&told, "");
        return Err(format!("{} is not allowed: it is not among the recipe's exports", shown(&told)));
    }
    Ok(())
}

const DRIVE: &[Property] = &[
    ("aio", ENGINES),
    ("bus", Number),
    ("cache", Word(&["writeback", "writethrough", "unsafe", "none", "directsync"])),
    ("cache.direct", Switch),
    ("cache.no-flush", Switch),
    ("cache.writeback", Switch),
    ("copy-on-read", Switch),
    ("detect-zeroes", ZEROES),
    ("discard", DISCARD),
    ("encrypt.format", Word(&["luks"])),
    ("encrypt.key-secret", Id),
    ("file.locking", LOCKED),
    ("file.readahead", Size),
    ("file.timeout", Number),
    ("format", FORMATS),
    ("id", Id),
    ("if", Word(&["none", "virtio", "ide", "scsi", "pflash", "floppy"])),
    ("index", Number),
    ("key-secret", Id),
    ("media", Word(&["disk", "cdrom"])),
    ("node-name", Id),
    ("offset", Size),
    ("readonly", Switch),
    ("rerror", Word(&["report", "ignore", "enospc", "stop"])),
    ("size", Size),
    // A snapshot's own writes would stay behind in a temporary file.
    ("snapshot", Off),
    ("unit", Number),
    ("werror", Word(&["report", "ignore", "enospc", "stop"])),
];

/// `throttling.iops-total-max` and its like, also by the names that they had before (`iops_max`).
fn throttles(key: &str) -> Option<Form> {
    if LIMITS.contains(&key) {
        return Some(Number);
    }
    if key == "group" {
        return Some(Id);
    }
    let rest = key.strip_prefix("throttling.")?;
    if rest == "group" {
        return Some(Id);
    }
    limit(rest)
}

/// `iops-total-max-length` and its like.
fn limit(name: &str) -> Option<Form> {
    let rest = name.strip_prefix("iops-").or(name.strip_prefix("bps-"))?;
    let rest = rest.strip_suffix("-length").map_or(rest, |rest| rest);
    let rest = rest.strip_suffix("-max").unwrap_or(rest);
    ["total", "read", "write", "size"].contains(&rest).then_some(Number)
}

/// The limits of `-object throttle-group`.
pub(super) fn group_limit(key: &str) -> Option<Form> {
    limit(key.strip_prefix("x-")?)
}

pub(super) fn drive(value: &str, file_of: FileOf, exports: &[Export]) -> Result<(), String> {
    // What an export's node is told besides.
    let is_told = |(key, _): &(String, String)| key.strip_prefix("file.").is_some_and(export::is_told);
    let (told, parsed): (Vec<_>, Vec<_>) = options::parse(value, "").into_iter().partition(is_told);
    let file = options::get(&parsed, "file").unwrap_or_default();
    let of_it = exports.iter().find(|export| export.url() == file);
    let says = |key: &str| of_it.and_then(|export| export.told.get(key.strip_prefix("file.")?));
    if let Some((key, value)) = told.iter().find(|(key, value)| says(key) != Some(value)) {
        let what = format!("{key}={value}");
        return Err(format!("{} is not allowed: no export of the recipe says so", shown(&what)));
    }
    let file_of: FileOf =
        &|role, path| file_of(role, path) || exports.iter().any(|export| export.url() == path);
    check(&parsed, file_of, &["file"], |key| find(DRIVE, key).or_else(|| throttles(key)))?;
    let named = |key: &str| options::get(&parsed, key).is_some();
    // Without a format QEMU guesses it from what the guest wrote there.
    if named("file") && !named("format") {
        return Err("it names no format (format=raw or format=qcow2)".to_owned());
    }
    Ok(())
}

fn check(
    parsed: &[(String, String)],
    file_of: FileOf,
    names: &[&str],
    form: impl Fn(&str) -> Option<Form>,
) -> Result<(), String> {
    // Twice the same file is twice the same key, too.
    let (files, rest): (Vec<_>, Vec<_>) =
        parsed.iter().cloned().partition(|(key, _)| names.contains(&key.as_str()));
    for (key, path) in &files {
        if files.len() > 1 || !file_of(Role::Disk, path) {
            let why =
                if files.len() > 1 { "it names two files" } else { "it is not among the recipe's disks" };
            return Err(format!("{}={} is not allowed: {why}", shown(key), shown(path)));
        }
    }
    fit("", &rest, form)
}

fn find(table: &[Property], name: &str) -> Option<Form> {
    table.iter().find(|(property, _)| *property == name).map(|(_, form)| *form)
}
