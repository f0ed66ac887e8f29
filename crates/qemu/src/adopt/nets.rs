//! The host's side of a running VM's network cards: which TAPs its QEMU really has, and how they are plugged in now.

use super::{
    cmdline::Read,
    netdevs::{By, Tap},
};
use crate::{
    qmp::{Qmp, QmpError},
    recipe::{Net, Recipe, options},
    tap,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
};
use sys::process::PidFd;

/// The device whose descriptors are TAPs.
const TUN: &str = "/dev/net/tun";

/// Learns how each TAP is plugged in; `info network` tells of what was added later.
pub(super) fn networks(
    qmp: &mut Qmp,
    process: &PidFd,
    read: &mut Read,
    reasons: &mut Vec<String>,
) -> Result<(), QmpError> {
    let taps = std::mem::take(&mut read.taps);
    let told = read.recipe.nets.iter().map(|net| &net.id);
    let mut named: BTreeSet<String> = taps.keys().chain(told).cloned().collect();
    named.extend(user_networks(&read.recipe));
    // A machine that is told of no network has one of QEMU's own, on a hub.
    let said =
        read.recipe.arguments.iter().any(|argument| matches!(argument.option.as_str(), "-net" | "-nic"));
    let usual = read.recipe.defaults && named.is_empty() && !said;
    if usual {
        read.notes.push("its network is QEMU's own (user): its connections end when the VM moves".to_owned());
    }
    match plugged(process, taps) {
        Ok(nets) => read.recipe.nets.extend(nets),
        Err(why) => reasons.extend(why),
    }
    let text = qmp.human("info network")?;
    for line in text.lines() {
        let bare = line.trim_start_matches([' ', '\\']);
        let Some((id, kind)) = bare.split_once(": index=0,type=") else { continue };
        let card = kind.split(',').next() == Some("nic");
        // On the command line, such networks have no name by which they could be told.
        let nameless = read.nameless
            && (id.starts_with("hub0port") || id.starts_with('#') || id.contains("org.qemu.nic"));
        let known = card || named.contains(id) || nameless || usual && id.starts_with("hub0port");
        if !known && !reasons.iter().any(|reason| reason.starts_with(&format!("network {id}"))) {
            reasons.push(format!("network {id} was added after the start; start the VM with it"));
        }
    }
    Ok(())
}

/// The networks of QEMU's own that a recipe names.
fn user_networks(recipe: &Recipe) -> impl Iterator<Item = String> {
    let values = recipe.arguments.iter().filter(|argument| argument.option == "-netdev");
    values.filter_map(|argument| {
        let parsed = options::parse(argument.value.as_deref().unwrap_or_default(), "type");
        options::get(&parsed, "id").map(str::to_owned)
    })
}

/// The network cards on these TAPs of this process, each as it is plugged in now; else every reason why they cannot go with the VM.
pub(crate) fn plugged(
    process: &PidFd,
    taps: impl IntoIterator<Item = (String, Tap)>,
) -> Result<Vec<Net>, Vec<String>> {
    let taps: Vec<_> = taps.into_iter().collect();
    let (mut nets, mut reasons) = (Vec::new(), Vec::new());
    if taps.is_empty() {
        return Ok(nets);
    }
    if let Err(why) = same_namespace(process) {
        return Err(vec![why]);
    }
    let open = match open_taps(process) {
        Ok(open) => open,
        Err(error) => {
            let lost = |(id, _)| format!("network {id}: cannot look which TAP QEMU has open: {error}");
            return Err(taps.into_iter().map(lost).collect());
        }
    };
    for (id, ifname) in assign(&taps, &open, |id, name| tap::read(id, name).ok()) {
        let ifname = match ifname {
            Ok(ifname) => ifname,
            Err(why) => {
                reasons.push(why);
                continue;
            }
        };
        let options = taps.iter().find(|(other, _)| *other == id).map(|(_, tap)| tap.options.clone());
        match tap::read(&id, &ifname) {
            Ok((bridge, port)) => nets.push(Net { id, bridge, options: options.unwrap_or_default(), port }),
            Err(why) => reasons.extend(why),
        }
    }
    if reasons.is_empty() { Ok(nets) } else { Err(reasons) }
}

/// Which TAP each network has, by its name of today. `read` says how a TAP is plugged in.
fn assign<P: PartialEq>(
    taps: &[(String, Tap)],
    open: &BTreeMap<i32, String>,
    read: impl Fn(&str, &str) -> Option<(String, P)>,
) -> Vec<(String, Result<String, String>)> {
    let all: BTreeSet<&String> = open.values().collect();
    let list = || all.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
    let named = |id: &str, by: &By| match by {
        By::Name(name) if all.contains(name) => Some(Ok(name.clone())),
        By::Name(name) => Some(Err(format!(
            "network {id}: its TAP {name} was renamed or replaced; QEMU has {:?} open; give it its name back",
            list()
        ))),
        By::Descriptors(fds) => {
            let names: BTreeSet<_> = fds.iter().filter_map(|fd| open.get(fd)).collect();
            // A descriptor that QEMU has closed was another's, or was duplicated.
            (names.len() == 1).then(|| Ok(names.into_iter().next().cloned().unwrap_or_default()))
        }
        By::Chosen(_) => None,
    };
    let mut found: Vec<_> = taps.iter().map(|(id, tap)| (id.clone(), named(id, &tap.by))).collect();
    let mut taken: BTreeSet<String> =
        found.iter().filter_map(|(_, name)| name.as_ref()?.as_ref().ok().cloned()).collect();
    for ((id, name), (_, tap)) in found.iter_mut().zip(taps) {
        if name.is_some() {
            continue;
        }
        let bridge = match &tap.by {
            By::Chosen(Some(bridge)) => Some(bridge),
            _ => None,
        };
        let free = all.iter().filter(|name| !taken.contains(**name));
        let free: Vec<_> = free.map(|name| ((*name).clone(), read(id, name))).collect();
        let fits = |at: &&(String, Option<(String, P)>)| {
            bridge.is_none() || at.1.as_ref().is_none_or(|(on, _)| Some(on) == bridge)
        };
        let fit: Vec<_> = free.iter().filter(fits).collect();
        let alike = fit.windows(2).all(|pair| pair[0].1.is_some() && pair[0].1 == pair[1].1);
        *name = Some(match fit.first() {
            // Of several that are plugged in alike, each will do.
            Some((name, _)) if alike => {
                taken.insert(name.clone());
                Ok(name.clone())
            }
            Some(_) => Err(format!(
                "network {id}: QEMU has {:?} open, and nobody can tell which of them is its TAP; name it with ifname=",
                list()
            )),
            None => Err(format!("network {id}: QEMU has no TAP open that could be its; use ifname=")),
        });
    }
    found.into_iter().filter_map(|(id, name)| Some((id, name?))).collect()
}

/// The TAP that was made for a network card.
pub(crate) fn tap_of(net: &Net, tap: &str) -> (String, Tap) {
    (net.id.clone(), Tap { by: By::Name(tap.to_owned()), options: net.options.clone() })
}

/// Names of interfaces mean the same to this process and to us.
fn same_namespace(process: &PidFd) -> Result<(), String> {
    let ours = fs::read_link("/proc/thread-self/ns/net");
    match (ours, fs::read_link(process.proc_path("ns/net"))) {
        (Ok(ours), Ok(theirs)) if ours != theirs => Err(format!(
            "its QEMU (process {pid}) is in another network namespace than the agent; start the agent there (nsenter -t \
             {pid} -n)",
            pid = process.pid()
        )),
        (Err(error), _) | (_, Err(error)) => {
            Err(format!("cannot look into which network namespace its TAPs are: {error}"))
        }
        _ => Ok(()),
    }
}

/// The names of today of the TAPs that a process has open, by its descriptors.
fn open_taps(process: &PidFd) -> io::Result<BTreeMap<i32, String>> {
    let mut taps = BTreeMap::new();
    for entry in fs::read_dir(process.proc_path("fd"))? {
        let entry = entry?;
        // A descriptor may be closed between two looks.
        let Ok(leads) = fs::read_link(entry.path()) else { continue };
        if !leads.ends_with("net/tun") && leads.as_os_str() != TUN {
            continue;
        }
        let number = entry.file_name().to_string_lossy().into_owned();
        let info = fs::read_to_string(process.proc_path(format!("fdinfo/{number}"))).unwrap_or_default();
        taps.extend(number.parse().ok().zip(tap_open(&info)));
    }
    Ok(taps)
}

/// What the kernel says of a descriptor of [`TUN`].
fn tap_open(info: &str) -> Option<String> {
    info.lines().find_map(|line| line.strip_prefix("iff:")).map(|name| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_without_a_name_is_the_one_that_is_left() {
        let tap = |id: &str, by: By| (id.to_owned(), Tap { by, options: Default::default() });
        let open: BTreeMap<i32, String> =
            [(5, "t0"), (6, "t0"), (7, "t1"), (8, "t2")].map(|(fd, name)| (fd, name.to_owned())).into();
        // By name, the bridge that each is on.
        let plugged = |_: &str, name: &str| Some((if name == "t1" { "br1" } else { "br0" }.to_owned(), ()));
        let found = |taps: &[(String, Tap)]| -> Vec<Option<String>> {
            assign(taps, &open, plugged).into_iter().map(|(_, name)| name.ok()).collect()
        };
        let some = |name: &str| Some(name.to_owned());
        let by_fd = tap("a", By::Descriptors(vec![5, 6]));
        let named = tap("b", By::Name("t1".into()));
        let rest = tap("c", By::Chosen(None));
        assert_eq!(
            found(&[by_fd.clone(), named.clone(), rest.clone()]),
            [some("t0"), some("t1"), some("t2")]
        );
        assert_eq!(found(&[tap("a", By::Chosen(Some("br1".into())))]), [some("t1")]);
        // Both are plugged in alike, so that it does not matter.
        assert_eq!(found(&[tap("a", By::Chosen(Some("br0".into())))]), [some("t0")]);
        assert_eq!(found(&[rest]), [None], "which of three on two bridges?");
        assert_eq!(
            found(&[tap("a", By::Name("gone".into())), tap("b", By::Chosen(Some("br9".into())))]),
            [None, None]
        );
    }

    #[test]
    fn the_kernel_says_which_tap_a_descriptor_is() {
        assert_eq!(
            tap_open("pos:\t0\nflags:\t0104002\nmnt_id:\t9\nino:\t5\niff:\ttap0\n").as_deref(),
            Some("tap0")
        );
        assert_eq!(tap_open("pos:\t0\n"), None);
    }
}
