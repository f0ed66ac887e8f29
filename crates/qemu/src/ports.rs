//! What the character devices of a VM end in on this host, and its screen: sockets, pseudo-terminals and
//! files in the runtime directory.
//!
//! Each process has sockets of its own, in a directory that nobody else can have. A link by a name that stays
//! the same (`web:charchannel0.sock`) leads to those of the process that was started last. A colon is in no
//! VM's name and in no id, so that two VMs never mean the same file.

use crate::{
    host::{Host, fits_socket},
    qmp::{Qmp, QmpError},
    recipe::{CONSOLE_ID, ChardevKind, Paths, Place, Recipe, Screen},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// What the screen is called among the ports.
pub(crate) const SCREEN: &str = "screen";

/// What the console is called among the ports.
const CONSOLE: &str = "console";

/// One of them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Port {
    /// The id of the character device.
    pub id: String,
    /// What it is.
    pub kind: PortKind,
    /// Where it is; empty as long as QEMU has not said it.
    pub path: PathBuf,
    /// The name that leads there and stays the same.
    #[serde(default)]
    pub link: Option<PathBuf>,
    /// The file for what the guest says.
    #[serde(default)]
    pub log: Option<PathBuf>,
}

/// What a port is on its host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PortKind {
    /// A Unix socket.
    Socket,
    /// A pseudo-terminal.
    Pty,
    /// A file.
    File,
    /// A Unix socket for VNC.
    Vnc,
}

/// By which name it is found in the runtime directory.
pub(crate) fn name(vm: &str, id: &str, ending: &str) -> String {
    match (id, ending) {
        // As long as there was nothing else.
        (CONSOLE_ID, CONSOLE) => format!("{vm}.{CONSOLE}"),
        (CONSOLE_ID, _) => format!("{vm}:{CONSOLE}.{ending}"),
        _ => format!("{vm}:{id}.{ending}"),
    }
}

/// All ports of a VM, with names in this host's runtime directory for the process that is called `tagged`.
pub(crate) fn plan(recipe: &Recipe, host: &Host, tagged: &str) -> Result<Vec<Port>, String> {
    let at = |name: String| host.runtime.join(name);
    let sockets = host.sockets(tagged);
    let mut ports = Vec::new();
    for device in recipe.all_chardevs() {
        let id = device.id.as_str();
        let port = |kind, path, link| Port {
            id: id.to_owned(),
            kind,
            path,
            link,
            log: device.has_log().then(|| at(name(&recipe.name, id, CONSOLE))),
        };
        // Numbers, because an id may be too long.
        let socket = || sockets.join(format!("{}.sock", ports.len()));
        let link = |ending: &str| Some(at(name(&recipe.name, id, ending)));
        ports.push(match device.kind {
            ChardevKind::Socket => port(PortKind::Socket, socket(), link("sock")),
            ChardevKind::Pty => port(PortKind::Pty, PathBuf::new(), link("pty")),
            ChardevKind::Log => port(PortKind::File, at(name(&recipe.name, id, CONSOLE)), None),
            ChardevKind::Null => continue,
        });
    }
    if recipe.screen == Screen::Vnc {
        ports.push(Port {
            id: SCREEN.to_owned(),
            kind: PortKind::Vnc,
            path: sockets.join(format!("{}.vnc", ports.len())),
            link: Some(at(name(&recipe.name, SCREEN, "vnc"))),
            log: None,
        });
    }
    match ports.iter().filter(|port| port.is_socket()).find(|port| !fits_socket(&port.path)) {
        Some(port) => Err(format!("the socket path {} is too long for Linux", port.path.display())),
        None => Ok(ports),
    }
}

/// Where QEMU is told to make them.
pub(crate) fn tell(ports: &[Port], paths: &mut Paths) {
    for port in ports {
        if port.kind == PortKind::Vnc {
            paths.vnc.clone_from(&port.path);
            continue;
        }
        let place = Place { socket: port.path.clone(), log: port.log.clone().unwrap_or_default() };
        paths.chardevs.insert(port.id.clone(), place);
    }
}

/// Makes the files for what guests say: QEMU appends to what is there, and would let everybody read what it
/// makes itself.
pub(crate) fn make_logs(ports: &[Port]) -> Result<Vec<(PathBuf, File)>, (PathBuf, io::Error)> {
    let make = |log: &PathBuf| {
        let made = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(log);
        made.map(|file| (log.clone(), file)).map_err(|error| (log.clone(), error))
    };
    ports.iter().filter_map(|port| port.log.as_ref()).map(make).collect()
}

/// What the new process has made.
pub(crate) fn settle(ports: &mut [Port], qmp: &mut Qmp) -> Result<(), QmpError> {
    if ports.iter().any(|port| port.kind == PortKind::Pty) {
        let answer = qmp.execute("query-chardev", json!({}))?;
        for port in ports.iter_mut().filter(|port| port.kind == PortKind::Pty) {
            // One that is shared has its terminal under another label.
            let labels = [port.id.clone(), format!("{}-base", port.id)];
            let all = answer.as_array().into_iter().flatten();
            let path = all
                .filter(|device| labels.iter().any(|label| device["label"] == *label))
                .find_map(|device| device["filename"].as_str()?.strip_prefix("pty:"));
            port.path = PathBuf::from(path.unwrap_or_default());
        }
    }
    Ok(())
}

/// Has the names that stay the same lead to these.
pub(crate) fn take_names(ports: &[Port]) {
    for port in ports {
        let Some(link) = port.link.as_ref().filter(|_| !port.path.as_os_str().is_empty()) else { continue };
        if let Err(error) = point(link, &port.path) {
            tracing::warn!(link = %link.display(), %error, "a port is found under its own name only");
        }
    }
}

/// At no moment does the name lead nowhere.
fn point(link: &Path, to: &Path) -> io::Result<()> {
    let mut new = link.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let _ = fs::remove_file(&new);
    std::os::unix::fs::symlink(to, &new)?;
    fs::rename(new, link)
}

impl Port {
    /// Whether it is a socket.
    pub(crate) fn is_socket(&self) -> bool {
        matches!(self.kind, PortKind::Socket | PortKind::Vnc)
    }

    /// What goes with the process: all but a file in which something stands, and the name of a later process'
    /// port.
    pub(crate) fn remove(&self) {
        let empty = |path: &&PathBuf| fs::metadata(path).is_ok_and(|metadata| metadata.len() == 0);
        let ours = |link: &&PathBuf| fs::read_link(link).is_ok_and(|to| to == self.path);
        let link = self.link.iter().filter(ours);
        let log = self.log.iter().filter(empty);
        for path in link.chain(log).chain(Some(&self.path).filter(|_| self.is_socket())) {
            if let Err(error) = fs::remove_file(path)
                && error.kind() != ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "could not be removed");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::{Chardev, Console};

    #[test]
    fn each_process_has_sockets_of_its_own_by_a_name_that_stays() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::new(dir.path());
        let file =
            crate::VmFile::parse("name = \"web\"\nmemory = \"64MiB\"\n", Path::new("web.toml")).unwrap();
        let mut recipe = file.recipe(&host).unwrap();
        recipe.console = Console::Socket;
        recipe.screen = Screen::Vnc;
        recipe.chardevs =
            vec![Chardev::new("agent.0", ChardevKind::Socket), Chardev::new("n", ChardevKind::Null)];
        let ports = |tag: &str| plan(&recipe, &host, tag).unwrap();
        let (first, second) = (ports("web-1"), ports("web-2"));
        let names = |ports: &[Port]| -> Vec<String> {
            let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
            ports.iter().flat_map(|port| [&port.path, port.link.as_ref().unwrap()].map(name)).collect()
        };
        assert_eq!(
            names(&first),
            ["0.sock", "web:console.sock", "1.sock", "web:agent.0.sock", "2.vnc", "web:screen.vnc"]
        );
        for (tag, ports) in [("web-1", &first), ("web-2", &second)] {
            fs::create_dir(host.sockets(tag)).unwrap();
            make_logs(ports).unwrap();
            for port in ports {
                fs::write(&port.path, "").unwrap();
                point(port.link.as_ref().unwrap(), &port.path).unwrap();
            }
        }
        let console = first[0].log.clone().unwrap();
        fs::write(&console, "guest").unwrap();
        first.iter().for_each(Port::remove);
        assert!(!first[1].path.exists() && console.exists(), "what a guest said stays");
        let link = second[1].link.as_ref().unwrap();
        assert_eq!(fs::read_link(link).unwrap(), second[1].path, "the name is the later process'");
        second.iter().for_each(Port::remove);
        for tag in ["web-1", "web-2"] {
            fs::remove_dir(host.sockets(tag)).unwrap();
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "all but the console");
        recipe.name = "x".repeat(63);
        let long = Host::new(dir.path().join("y".repeat(90)));
        assert!(plan(&recipe, &long, "web-1").is_err());
    }
}
