//! The host's side of a running VM's network cards: which TAPs its QEMU really has, and how they are plugged in now.

use super::cmdline::{Read, Tap};
use crate::{
    qmp::{Qmp, QmpError},
    recipe::{Net, Recipe, options},
    tap,
};
use std::{collections::BTreeSet, fs, io};
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
    let usual = read.recipe.defaults && named.is_empty();
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
        let known = card || named.contains(id) || usual && id.starts_with("hub0port");
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
    let mut taps = taps.into_iter().peekable();
    let (mut nets, mut reasons) = (Vec::new(), Vec::new());
    if taps.peek().is_none() {
        return Ok(nets);
    }
    if let Err(why) = same_namespace(process) {
        return Err(vec![why]);
    }
    let open = open_taps(process);
    for (id, Tap { ifname, options }) in taps {
        match &open {
            Ok(open) if !open.contains(&ifname) => {
                let open = open.iter().cloned().collect::<Vec<_>>().join(", ");
                reasons.push(format!(
                    "network {id}: its TAP {ifname} was renamed or replaced; QEMU has {open:?} open; give it its name back"
                ));
                continue;
            }
            Ok(_) => {}
            Err(error) => {
                reasons.push(format!("network {id}: cannot look which TAP QEMU has open: {error}"));
                continue;
            }
        }
        match tap::read(&id, &ifname) {
            Ok((bridge, port)) => nets.push(Net { id, bridge, options, port }),
            Err(why) => reasons.extend(why),
        }
    }
    if reasons.is_empty() { Ok(nets) } else { Err(reasons) }
}

/// The TAP that was made for a network card.
pub(crate) fn tap_of(net: &Net, tap: &str) -> (String, Tap) {
    (net.id.clone(), Tap { ifname: tap.to_owned(), options: net.options.clone() })
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

/// The TAPs that a process has open, by their names of today.
fn open_taps(process: &PidFd) -> io::Result<BTreeSet<String>> {
    let mut taps = BTreeSet::new();
    for entry in fs::read_dir(process.proc_path("fd"))? {
        let entry = entry?;
        // A descriptor may be closed between two looks.
        let Ok(leads) = fs::read_link(entry.path()) else { continue };
        if !leads.ends_with("net/tun") && leads.as_os_str() != TUN {
            continue;
        }
        let number = entry.file_name().to_string_lossy().into_owned();
        let info = fs::read_to_string(process.proc_path(format!("fdinfo/{number}"))).unwrap_or_default();
        taps.extend(tap_open(&info));
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
    fn the_kernel_says_which_tap_a_descriptor_is() {
        assert_eq!(
            tap_open("pos:\t0\nflags:\t0104002\nmnt_id:\t9\nino:\t5\niff:\ttap0\n").as_deref(),
            Some("tap0")
        );
        assert_eq!(tap_open("pos:\t0\n"), None);
    }
}
