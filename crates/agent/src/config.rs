//! What an agent is told when it starts: a file, and flags that win over the file.

mod address; // where another agent listens
mod allow; // [allow]: what the VMs of other hosts may use here
mod commons; // [commons]: what is kept of VMs that have left
mod memory; // [memory]: how much of it the VMs of other hosts may need
mod mistake; // what is wrong with it, and where
mod ownership; // [ownership]: where hosts ask who owns a VM
mod qemu; // [qemu]: the program, and as whom it runs
mod spool; // [spool]: the file on a datastore that memory goes by, too
mod tls; // [tls]: this host's certificate and key
mod tracking; // how the writes of guests are seen

pub use address::Address;
pub use allow::Allow;
pub use commons::Keep;
pub use memory::Overcommit;
pub use mistake::ConfigError;
pub use ownership::{EtcdPlace, OwnershipPlace};
pub use tracking::{Group, Tracker};

use crate::name;
use api::Robust;
use mistake::mistake;
use pki::Files;
use serde::{Deserialize, Deserializer, de::Error as _};
use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

/// Where agents listen for each other unless told otherwise.
pub const PORT: u16 = 7471;
/// Where the command line looks for the agent unless told otherwise.
pub const SOCKET: &str = "/run/whimbrel/agent.sock";
/// Where this host's certificate and key are unless told otherwise.
pub const TLS: &str = "/etc/whimbrel/tls";

/// A host's name as the file gives it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Name(String);

impl<'d> Deserialize<'d> for Name {
    fn deserialize<D: Deserializer<'d>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        name::check_host(&text).map_err(D::Error::custom)?;
        Ok(Self(text))
    }
}

/// What may be set, in the file or by flags.
#[derive(Clone, Default, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct File {
    name: Option<Name>,
    state_dir: Option<PathBuf>,
    runtime_dir: Option<PathBuf>,
    socket: Option<PathBuf>,
    listen: Option<SocketAddr>,
    qemu: qemu::Written,
    tracker: Option<Tracker>,
    group: Option<Group>,
    insecure_plaintext: bool,
    tls: tls::Table,
    ownership: ownership::Table,
    allow: Allow,
    memory: memory::Table,
    commons: commons::Table,
    spool: spool::Table,
    peers: BTreeMap<Name, Address>,
}

/// What the command line says; all of it wins over the file.
#[derive(Clone, Default, Debug)]
pub struct Flags {
    /// This host's name.
    pub name: Option<String>,
    /// Where the store is.
    pub state_dir: Option<PathBuf>,
    /// Where the sockets are.
    pub runtime_dir: Option<PathBuf>,
    /// The API's socket.
    pub socket: Option<PathBuf>,
    /// Where other agents find this one.
    pub listen: Option<SocketAddr>,
    /// The QEMU binary.
    pub qemu: Option<PathBuf>,
    /// How writes are seen.
    pub tracker: Option<Tracker>,
    /// How many pages one write opens.
    pub group: Option<Group>,
    /// Where this host's certificate and key are: a directory.
    pub tls: Option<PathBuf>,
    /// Without any protection.
    pub insecure_plaintext: bool,
    /// Other hosts, in addition to those of the file.
    pub peers: Vec<(String, Address)>,
}

/// Everything that an agent needs to know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// This host's name: what other hosts call it, and what ownership records say.
    pub name: String,
    /// Where the store is.
    pub state_dir: PathBuf,
    /// Where QMP sockets and the API's socket are.
    pub runtime_dir: PathBuf,
    /// The API's socket.
    pub socket: PathBuf,
    /// Where other agents find this one.
    pub listen: SocketAddr,
    /// The QEMU binary, a path or a name to be found in `PATH`.
    pub qemu: PathBuf,
    /// As whom it runs; `None`: the usual user.
    pub qemu_user: Option<String>,
    /// How the writes of guests are seen that leave this host.
    pub tracker: Tracker,
    /// How many pages one write opens, where the agent hears of it.
    pub group: Group,
    /// This host's certificate and key; `None`: its connections are not protected, and anybody is believed.
    pub tls: Option<Files>,
    /// Where the record is that says who owns a VM.
    pub ownership: OwnershipPlace,
    /// What the VMs of other hosts may use here.
    pub allow: Allow,
    /// How many times the memory that is free they may need.
    pub overcommit: Overcommit,
    /// How much memory of VMs that have left may be kept. Nothing where connections are not protected:
    /// anybody could ask for it.
    pub keep: Keep,
    /// A directory on a datastore that both hosts reach, for migrations that name none; `None`: they go over
    /// the network alone.
    pub spool: Option<PathBuf>,
    /// What must be in the file there when a VM changes hands.
    pub robust: Robust,
    /// Other hosts by name.
    pub peers: BTreeMap<String, Address>,
}

impl Config {
    /// The file, if one is given, with the flags over it and the defaults below it.
    pub fn load(file: Option<&Path>, flags: Flags) -> Result<Self, ConfigError> {
        let Some(path) = file else { return Self::with(File::default(), flags) };
        let text =
            fs::read_to_string(path).map_err(|cause| ConfigError::Read { path: path.to_owned(), cause })?;
        Self::parse(&text, path, flags)
    }

    /// The same, of a file with this text.
    pub(crate) fn parse(text: &str, path: &Path, flags: Flags) -> Result<Self, ConfigError> {
        Self::with(toml::from_str(text).map_err(|error| mistake(path, text, &error))?, flags)
    }

    fn with(file: File, flags: Flags) -> Result<Self, ConfigError> {
        let name = match flags.name.or(file.name.map(|name| name.0)) {
            Some(name) => name,
            None => host_name()?,
        };
        name::check_host(&name).map_err(|why| ConfigError::Flag(format!("the host's name: {why}")))?;
        let mut peers: BTreeMap<String, Address> =
            file.peers.into_iter().map(|(name, address)| (name.0, address)).collect();
        peers.extend(flags.peers);
        let plaintext = flags.insecure_plaintext || file.insecure_plaintext;
        let tls = (!plaintext).then(|| file.tls.files(flags.tls.as_deref()));
        let Allow { disks, boot, spool, .. } = &file.allow;
        absolute("allow", disks.iter().chain(boot).chain(spool))?;
        absolute("spool", &file.spool.directory)?;
        let runtime_dir =
            flags.runtime_dir.or(file.runtime_dir).unwrap_or_else(|| PathBuf::from("/run/whimbrel"));
        Ok(Self {
            name,
            state_dir: flags.state_dir.or(file.state_dir).unwrap_or_else(|| "/var/lib/whimbrel".into()),
            socket: flags.socket.or(file.socket).unwrap_or_else(|| runtime_dir.join("agent.sock")),
            runtime_dir,
            listen: flags.listen.or(file.listen).unwrap_or_else(|| ([0, 0, 0, 0], PORT).into()),
            qemu: flags.qemu.or(file.qemu.0.program).unwrap_or_else(|| "qemu-system-x86_64".into()),
            qemu_user: file.qemu.0.user,
            tracker: flags.tracker.or(file.tracker).unwrap_or_default(),
            group: flags.group.or(file.group).unwrap_or_default(),
            tls,
            ownership: file.ownership.place(plaintext)?,
            allow: file.allow,
            overcommit: file.memory.overcommit.unwrap_or_default(),
            keep: if plaintext { Keep::NOTHING } else { file.commons.keep.unwrap_or_default() },
            spool: file.spool.directory,
            robust: file.spool.robust.unwrap_or_default(),
            peers,
        })
    }
}

/// Directories of a section are absolute: an agent has no place of its own that a path could be relative to.
fn absolute<'a>(section: &str, dirs: impl IntoIterator<Item = &'a PathBuf>) -> Result<(), ConfigError> {
    match dirs.into_iter().find(|dir| !dir.is_absolute()) {
        None => Ok(()),
        Some(dir) => {
            let why = format!("[{section}] directory {} must be an absolute path", dir.display());
            Err(ConfigError::Flag(why))
        }
    }
}

fn host_name() -> Result<String, ConfigError> {
    let said = fs::read_to_string("/proc/sys/kernel/hostname").map_err(|error| {
        ConfigError::Flag(format!("this host's name cannot be read ({error}); give it one with --name"))
    })?;
    let short = said.trim().split('.').next().unwrap_or_default();
    match name::check_host(short) {
        Ok(()) => Ok(short.to_owned()),
        Err(_) => Err(ConfigError::Flag("this host has no usable name; give it one with --name".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn load(text: &str, flags: Flags) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        fs::write(&path, text).unwrap();
        Config::load(Some(&path), flags)
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_the_defaults() {
        let text =
            "name = \"a\"\nruntime-dir = \"/r\"\nlisten = \"[::1]:99\"\n[peers]\nb = \"10.0.0.2:7471\"\n";
        let flags = Flags { listen: Some(([127, 0, 0, 1], 7).into()), ..Flags::default() };
        let config = load(text, flags).unwrap();
        assert_eq!(config.name, "a");
        assert_eq!(config.socket, Path::new("/r/agent.sock"));
        assert_eq!(config.listen, ([127, 0, 0, 1], 7).into());
        assert_eq!(config.state_dir, Path::new("/var/lib/whimbrel"));
        assert_eq!(config.peers["b"].as_str(), "10.0.0.2:7471");
        assert_eq!(config.tls, Some(Files::within(Path::new("/etc/whimbrel/tls"))));
    }

    #[test]
    fn certificates_are_where_file_or_flag_says() {
        let text = "[tls]\nkey = \"/k\"\n";
        let files = Files { key: "/k".into(), ..Files::within(Path::new(TLS)) };
        assert_eq!(load(text, Flags::default()).unwrap().tls, Some(files));
        let flags = Flags { tls: Some("/t".into()), ..Flags::default() };
        assert_eq!(load(text, flags).unwrap().tls, Some(Files::within(Path::new("/t"))));
        assert_eq!(load("insecure-plaintext = true", Flags::default()).unwrap().tls, None);
        let flags = Flags { insecure_plaintext: true, ..Flags::default() };
        assert_eq!(load(text, flags).unwrap().tls, None);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Config::load(Some(Path::new("/nowhere.toml")), Flags::default()).unwrap_err().to_string();
        assert!(error.contains("/nowhere.toml"), "{error}");
    }
}
