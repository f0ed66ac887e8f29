//! What an agent is told when it starts: a file, and flags that win over the file.

use crate::name;
use pki::Files;
use serde::{Deserialize, Deserializer, de::Error as _};
use std::{
    collections::BTreeMap,
    fmt, fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
};

/// Where agents listen for each other unless told otherwise.
pub const PORT: u16 = 7471;
/// Where the command line looks for the agent unless told otherwise.
pub const SOCKET: &str = "/run/whimbrel/agent.sock";
/// Where this host's certificate and key are unless told otherwise.
pub const TLS: &str = "/etc/whimbrel/tls";

/// Where another agent listens: `host:port`, `[v6]:port`. Names are looked up when it is called.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Address(String);

impl Address {
    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let good = |one: &str| {
            one.rsplit_once(':').is_some_and(|(host, port)| {
                let bracketed = host.starts_with('[') && host.ends_with(']');
                let host_good = !host.is_empty() && (bracketed || !host.contains(':'));
                let port_good = port.parse::<u16>().is_ok_and(|port| port > 0);
                host_good && !host.contains(char::is_whitespace) && port_good
            })
        };
        if text.split(',').all(good) {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!("{text:?} is no address; write host:port, like 10.0.0.2:{PORT}"))
        }
    }
}

impl<'d> Deserialize<'d> for Address {
    fn deserialize<D: Deserializer<'d>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

/// A host's name as the file gives it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Name(String);

impl<'d> Deserialize<'d> for Name {
    fn deserialize<D: Deserializer<'d>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        name::check(&text).map_err(D::Error::custom)?;
        Ok(Self(text))
    }
}

/// How the writes of guests are seen that leave this host.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Tracker {
    /// By the kernel alone, until a guest must be slowed; where the kernel cannot, as below.
    #[default]
    Auto,
    /// By a thread of the agent that hears of them, from the start.
    Synchronous,
}

impl FromStr for Tracker {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "synchronous" => Ok(Self::Synchronous),
            _ => Err("a tracker is auto or synchronous".to_owned()),
        }
    }
}

impl<'d> Deserialize<'d> for Tracker {
    fn deserialize<D: Deserializer<'d>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

/// How many pages one write opens that the agent hears of. `None`: what pays, region by region.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Group(pub Option<u64>);

impl FromStr for Group {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(pages) if (1..=512_u64).contains(&pages) && pages.is_power_of_two() => Ok(Self(Some(pages))),
            _ if text == "auto" => Ok(Self(None)),
            _ => Err("a group is auto, or a power of two from 1 to 512".to_owned()),
        }
    }
}

impl<'d> Deserialize<'d> for Group {
    fn deserialize<D: Deserializer<'d>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u64),
            Word(String),
        }
        let text = match Written::deserialize(from)? {
            Written::Number(pages) => pages.to_string(),
            Written::Word(word) => word,
        };
        text.parse().map_err(D::Error::custom)
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
    qemu: Option<PathBuf>,
    tracker: Option<Tracker>,
    group: Option<Group>,
    insecure_plaintext: bool,
    tls: Tls,
    allow: Allow,
    peers: BTreeMap<Name, Address>,
}

/// Where this host's certificate and key are.
#[derive(Clone, Default, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Tls {
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

/// What the VMs of other hosts may use here. Another host of the workgroup says what a VM that it sends needs; whether it
/// gets that is decided here.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Allow {
    /// Directories with disks, at whatever depth.
    pub disks: Vec<PathBuf>,
    /// Directories with kernels and initial RAM disks.
    pub boot: Vec<PathBuf>,
    /// Bridges; `None`: whichever there are.
    pub bridges: Option<Vec<String>>,
    /// Options of QEMU, such as `-device`; `None`: all that are known to be harmless. No others can be allowed.
    pub options: Option<Vec<String>>,
    /// Devices, such as `virtio-*`; `None`: all that are known to be harmless. No others can be allowed.
    pub devices: Option<Vec<String>>,
}

impl Default for Allow {
    fn default() -> Self {
        let all = |dirs: &[&str]| dirs.iter().map(PathBuf::from).collect();
        Self {
            disks: all(&["/shared", "/var/lib/whimbrel/disks", "/var/lib/libvirt/images"]),
            boot: all(&["/boot", "/shared", "/var/lib/whimbrel/boot"]),
            bridges: None,
            options: None,
            devices: None,
        }
    }
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
    /// How the writes of guests are seen that leave this host.
    pub tracker: Tracker,
    /// How many pages one write opens, where the agent hears of it.
    pub group: Group,
    /// This host's certificate and key; `None`: its connections are not protected, and anybody is believed.
    pub tls: Option<Files>,
    /// What the VMs of other hosts may use here.
    pub allow: Allow,
    /// Other hosts by name.
    pub peers: BTreeMap<String, Address>,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {cause}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The file has a mistake.
    #[error("mistake in the configuration {path}, line {line}, column {column}: {why}\n\n{excerpt}")]
    Mistake {
        /// The file.
        path: PathBuf,
        /// From 1 on.
        line: usize,
        /// From 1 on.
        column: usize,
        /// What is wrong.
        why: String,
        /// The line, with a mark below the mistake.
        excerpt: String,
    },
    /// A flag has a mistake, or what is needed is not there.
    #[error("{0}")]
    Flag(String),
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
        name::check(&name).map_err(|why| ConfigError::Flag(format!("the host's name: {why}")))?;
        let mut peers: BTreeMap<String, Address> =
            file.peers.into_iter().map(|(name, address)| (name.0, address)).collect();
        peers.extend(flags.peers);
        // A flag that names a directory wins over all three of the file.
        let named = if flags.tls.is_some() { Tls::default() } else { file.tls };
        let usual = Files::within(flags.tls.as_deref().unwrap_or(Path::new(TLS)));
        let tls = Files {
            ca: named.ca.unwrap_or(usual.ca),
            cert: named.cert.unwrap_or(usual.cert),
            key: named.key.unwrap_or(usual.key),
        };
        let plaintext = flags.insecure_plaintext || file.insecure_plaintext;
        if let Some(dir) = file.allow.disks.iter().chain(&file.allow.boot).find(|dir| !dir.is_absolute()) {
            let why = format!("[allow] directory {} must be an absolute path", dir.display());
            return Err(ConfigError::Flag(why));
        }
        let runtime_dir =
            flags.runtime_dir.or(file.runtime_dir).unwrap_or_else(|| PathBuf::from("/run/whimbrel"));
        Ok(Self {
            name,
            state_dir: flags.state_dir.or(file.state_dir).unwrap_or_else(|| "/var/lib/whimbrel".into()),
            socket: flags.socket.or(file.socket).unwrap_or_else(|| runtime_dir.join("agent.sock")),
            runtime_dir,
            listen: flags.listen.or(file.listen).unwrap_or_else(|| ([0, 0, 0, 0], PORT).into()),
            qemu: flags.qemu.or(file.qemu).unwrap_or_else(|| "qemu-system-x86_64".into()),
            tracker: flags.tracker.or(file.tracker).unwrap_or_default(),
            group: flags.group.or(file.group).unwrap_or_default(),
            tls: (!plaintext).then_some(tls),
            allow: file.allow,
            peers,
        })
    }
}

fn mistake(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let at = error.span().map_or(0, |span| span.start).min(text.len());
    let before = &text[..(0..=at).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0)];
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    let shown = text.lines().nth(line - 1).unwrap_or_default();
    let excerpt = format!("  {line} | {shown}\n  {:>1$} | {2:>3$}", "", line.to_string().len(), "^", column);
    ConfigError::Mistake { path: path.to_owned(), line, column, why: error.message().to_owned(), excerpt }
}

fn host_name() -> Result<String, ConfigError> {
    let said = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let short = said.trim().split('.').next().unwrap_or_default();
    match name::check(short) {
        Ok(()) => Ok(short.to_owned()),
        Err(_) => Err(ConfigError::Flag("this host has no usable name; give it one with --name".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, flags: Flags) -> Result<Config, ConfigError> {
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
    fn certificates_are_where_the_file_or_the_flag_says_and_only_an_explicit_word_does_without() {
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
    fn the_tracker_and_its_groups_are_chosen_in_the_file_or_by_flags() {
        let config = load("", Flags::default()).unwrap();
        assert_eq!((config.tracker, config.group), (Tracker::Auto, Group(None)));
        let config = load("tracker = \"synchronous\"\ngroup = 64\n", Flags::default()).unwrap();
        assert_eq!((config.tracker, config.group), (Tracker::Synchronous, Group(Some(64))));
        let flags = Flags { tracker: Some(Tracker::Auto), group: Some(Group(Some(8))), ..Flags::default() };
        let config = load("tracker = \"synchronous\"\ngroup = \"auto\"\n", flags).unwrap();
        assert_eq!((config.tracker, config.group), (Tracker::Auto, Group(Some(8))));
        for bad in ["group = 0", "group = 100", "group = 1024", "group = \"many\"", "tracker = \"fast\""] {
            assert!(matches!(load(bad, Flags::default()), Err(ConfigError::Mistake { .. })), "{bad}");
        }
    }

    #[test]
    fn directories_for_foreign_vms_are_absolute() {
        let allow = load("[allow]\ndisks = [\"/srv\"]\n", Flags::default()).unwrap().allow;
        assert_eq!(allow, Allow { disks: vec!["/srv".into()], ..Allow::default() });
        let error = load("[allow]\nboot = [\"images\"]\n", Flags::default()).unwrap_err().to_string();
        assert!(error.contains("images") && error.contains("absolute"), "{error}");
    }

    #[test]
    fn a_mistake_is_shown_with_its_line_and_column() {
        let table = [
            ("name = \"a\"\nlissten = \"x\"\n", 2, 1, "unknown field `lissten`"),
            ("listen = \"nowhere\"\n", 1, 10, "invalid socket address"),
            ("name = \"a\"\n[peers]\nb = \"10.0.0.2\"\n", 3, 5, "is no address"),
            ("name = \"../x\"\n", 1, 8, "is no name"),
            ("name = \n", 1, 8, ""),
            ("[peers]\n\"a b\" = \"x:1\"\n", 2, 1, "is no name"),
        ];
        for (text, at_line, at_column, says) in table {
            match load(text, Flags::default()).unwrap_err() {
                ConfigError::Mistake { line, column, why, .. } => {
                    assert_eq!((line, column), (at_line, at_column), "{text}: {why}");
                    assert!(why.contains(says), "{why}");
                }
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Config::load(Some(Path::new("/nowhere.toml")), Flags::default()).unwrap_err().to_string();
        assert!(error.contains("/nowhere.toml"), "{error}");
    }

    #[test]
    fn addresses_have_a_host_and_a_port() {
        for good in ["10.0.0.2:7471", "host:1", "[fe80::1]:7471"] {
            assert!(good.parse::<Address>().is_ok(), "{good}");
        }
        for bad in ["", "host", ":1", "host:0", "host:99999", "fe80::1:7471", "a b:1"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}
