//! The host's side of a running VM's network cards: which TAPs its QEMU really has, and how they are plugged
//! in now.

use super::{
    cmdline::Read,
    netdevs::{By, Tap},
};
use crate::{
    qmp::{Qmp, QmpError},
    recipe::{Net, NetOptions, Recipe, options},
    tap, vhost,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::fd::AsFd,
};
use sys::process::PidFd;

/// The device whose descriptors are TAPs.
const TUN: &str = "/dev/net/tun";

/// A network's back end, as QEMU tells of it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Live {
    kind: String,
    by: By,
    queues: u16,
}

/// Learns how each TAP is plugged in. `info network` tells of what was added later, and what is no more.
pub(super) fn networks(
    qmp: &mut Qmp,
    process: &PidFd,
    read: &mut Read,
    reasons: &mut Vec<String>,
) -> Result<(), QmpError> {
    let mut taps = std::mem::take(&mut read.taps);
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
    let live = back_ends(&qmp.human("info network")?);
    let nameless = read.nameless;
    let is_nameless = |id: &str| {
        let by_qemu = id.starts_with("hub0port") || id.starts_with('#') || id.contains("org.qemu.nic");
        by_qemu && nameless || usual && id.starts_with("hub0port")
    };
    if !nameless {
        forget_removed(read, &mut taps, &live);
    }
    let known: BTreeMap<String, u16> =
        read.recipe.nets.iter().map(|net| (net.id.clone(), net.queues())).collect();
    let mut fresh = BTreeMap::new();
    for (id, live) in live.iter().filter(|(id, _)| !is_nameless(id)) {
        let is_tap = live.kind == "tap";
        if is_tap && taps.get(id).is_some_and(|told| is_it(told, live)) {
            continue;
        }
        if is_tap && known.get(id) == Some(&live.queues) {
            let net = read.recipe.nets.iter().find(|net| net.id == *id);
            let options = net.map(|net| net.options.clone()).unwrap_or_default();
            read.all_taps.insert(id.clone(), Tap { by: live.by.clone(), options });
            continue;
        }
        if !is_tap && named.contains(id) && !taps.contains_key(id) && !known.contains_key(id) {
            continue;
        }
        taps.remove(id);
        match added(id, live) {
            Ok(tap) => drop(fresh.insert(id.clone(), tap)),
            Err(why) => reasons.push(why),
        }
    }
    if !fresh.is_empty() {
        let told = taps.values().map(|tap| &tap.options);
        let told = told.chain(
            read.recipe.nets.iter().filter(|net| !fresh.contains_key(&net.id)).map(|net| &net.options),
        );
        let taken = told
            .filter(|options| options.vhost)
            .map(|options| usize::from(options.queues.unwrap_or(1)))
            .sum();
        learn(process, taken, &mut fresh, &mut read.notes, reasons);
        read.recipe.nets.retain(|net| !fresh.contains_key(&net.id));
        taps.extend(fresh);
    }
    read.all_taps.extend(taps.clone());
    match plugged(process, taps) {
        Ok(nets) => read.recipe.nets.extend(nets),
        Err(why) => reasons.extend(why),
    }
    Ok(())
}

/// All back ends of networks in QEMU's list, with their ids.
fn back_ends(text: &str) -> BTreeMap<String, Live> {
    let mut found: BTreeMap<String, Live> = BTreeMap::new();
    for line in text.lines() {
        if let Some(port) = hub_port(line) {
            let port_of_hub = Live { kind: "hubport".to_owned(), by: By::Chosen(None), queues: 1 };
            found.insert(port.to_owned(), port_of_hub);
        }
        let bare = line.trim_start_matches([' ', '\\']).trim_end();
        let Some((id, rest)) = bare.split_once(": index=") else { continue };
        let fields: Vec<_> = rest.split(',').collect();
        let field = |key: &str| fields.iter().find_map(|field| field.strip_prefix(key)?.strip_prefix('='));
        let kind = field("type").unwrap_or_default().to_owned();
        if kind == "nic" {
            continue;
        }
        let fd = field("fd").and_then(|fd| fd.parse().ok());
        let by = match (field("ifname"), fd) {
            (Some(name), _) => By::Name(name.to_owned()),
            (None, Some(fd)) => By::Descriptors(vec![fd]),
            (None, None) => By::Chosen(field("br").map(str::to_owned)),
        };
        match found.get_mut(id) {
            Some(Live { by: all, queues, .. }) => {
                *queues = queues.saturating_add(1);
                if let (By::Descriptors(all), By::Descriptors(more)) = (all, by) {
                    all.extend(more);
                }
            }
            None => drop(found.insert(id.to_owned(), Live { kind, by, queues: 1 })),
        }
    }
    found
}

/// The port of a hub: all that QEMU says of it is its name, and who is at its other end, if somebody is.
pub(crate) fn hub_port(line: &str) -> Option<&str> {
    let port = line.trim().strip_prefix('\\')?.trim_start();
    match port.split_once(": index=") {
        None => Some(port),
        Some((ends, _)) => ends.split_once(": ").map(|(port, _)| port),
    }
}

/// Whether a TAP is the one that the command line names, as far as QEMU tells: others can remove it and add
/// one by the same id.
fn is_it(told: &Tap, live: &Live) -> bool {
    let same = match (&told.by, &live.by) {
        (By::Name(told), By::Name(live)) => told == live,
        (By::Descriptors(told), By::Descriptors(live)) => told == live,
        (By::Name(_), _) | (By::Descriptors(_), _) => false,
        (By::Chosen(_), _) => true,
    };
    same && told.options.queues.unwrap_or(1) == live.queues
}

/// Networks that were removed leave the recipe; their cards, too, or that is refused elsewhere.
fn forget_removed(read: &mut Read, taps: &mut BTreeMap<String, Tap>, live: &BTreeMap<String, Live>) {
    // A QEMU that tells of none at all is not understood.
    if live.is_empty() {
        return;
    }
    taps.retain(|id, _| live.contains_key(id));
    read.recipe.nets.retain(|net| live.contains_key(&net.id));
    read.recipe.arguments.retain(|argument| {
        let parsed = options::parse(argument.value.as_deref().unwrap_or_default(), "type");
        argument.option != "-netdev" || options::get(&parsed, "id").is_none_or(|id| live.contains_key(id))
    });
}

/// The TAP of a network that was added; else why it cannot follow.
fn added(id: &str, live: &Live) -> Result<Tap, String> {
    if live.kind != "tap" {
        return Err(format!(
            "network {id} ({}) was added after the start, and QEMU cannot be asked for its options; remove \
             it (netdev_del) or start the VM with it",
            live.kind
        ));
    }
    let queues = Some(live.queues).filter(|queues| *queues > 1);
    Ok(Tap { by: live.by.clone(), options: NetOptions { queues, ..NetOptions::default() } })
}

/// What QEMU does not say of TAPs that were added, by what it has open. Networks of its command line have
/// `taken` workers.
fn learn(
    process: &PidFd,
    taken: usize,
    taps: &mut BTreeMap<String, Tap>,
    notes: &mut Vec<String>,
    reasons: &mut Vec<String>,
) {
    let names: Vec<_> = taps.iter().map(|(id, tap)| (id.clone(), tap.options.queues.unwrap_or(1))).collect();
    // Where they cannot be counted, it is refused ([`plugged`]).
    let left = vhost::workers(process).unwrap_or(0).saturating_sub(taken);
    match vhost::shared_out(left, &names) {
        Ok(have) => taps.iter_mut().for_each(|(id, tap)| tap.options.vhost |= have.contains(id)),
        Err(()) => notes.push(format!(
            "networks {}: nobody can tell which of them has vhost=on; on the target none of them has",
            names.into_iter().map(|(id, _)| id).collect::<Vec<_>>().join(", ")
        )),
    }
    let Ok(open) = open_taps(process) else { return };
    let all: Vec<_> = taps.iter().map(|(id, tap)| (id.clone(), tap.clone())).collect();
    let assigned = assign(&all, &open, |id, name| tap::read(id, name).ok());
    for (id, name) in assigned {
        let (Some(tap), Ok(name)) = (taps.get_mut(&id), name) else { continue };
        let fd = open.iter().find(|(_, open)| **open == name).map(|(fd, _)| *fd);
        let sndbuf = fd.map(|fd| process.take_fd(fd).and_then(|fd| sys::tap::send_buffer(fd.as_fd())));
        match (tap::has_header(&name), sndbuf) {
            (Ok(header), Some(Ok(bytes))) => {
                tap.options.vnet_hdr = Some(header);
                // Without a bound, which QEMU sets by itself.
                tap.options.sndbuf = u64::try_from(bytes).ok().filter(|_| bytes != i32::MAX);
            }
            (Err(why), _) => reasons.push(format!("network {id}: cannot look at its TAP {name}: {why}")),
            (_, Some(Err(error))) => {
                reasons.push(format!("network {id}: cannot look at its TAP {name}: {error}"));
            }
            (_, None) => {}
        }
    }
}

/// The networks of QEMU's own that a recipe names.
fn user_networks(recipe: &Recipe) -> impl Iterator<Item = String> {
    let values = recipe.arguments.iter().filter(|argument| argument.option == "-netdev");
    values.filter_map(|argument| {
        let parsed = options::parse(argument.value.as_deref().unwrap_or_default(), "type");
        options::get(&parsed, "id").map(str::to_owned)
    })
}

/// The network cards on these TAPs of this process, each as it is plugged in now; else every reason why they
/// cannot go with the VM.
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
    reasons.extend(vhost::hindrance(process));
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
                "network {id}: QEMU has {:?} open, and nobody can tell which of them is its TAP; name it \
                 with ifname=",
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
            "its QEMU (process {pid}) is in another network namespace than the agent; start the agent there \
             (nsenter -t {pid} -n)",
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
    fn what_qemu_tells_of_networks_is_read() {
        let text = "vn: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:00:00:09\r\n \\ net0: \
                    index=0,type=tap,ifname=t0,\
                    script=no,downscript=no\r\nn1: index=0,type=tap,fd=27\r\nn1: index=1,type=tap,fd=28\r\n\
                    br: index=0,type=tap,helper=/usr/lib/qemu-bridge-helper,br=br7\r\nu: \
                    index=0,type=user,net=10.0.2.0,restrict=off\r\n\
                    hub 1\r\n \\ p0\r\n \\ p1: vn2: index=0,type=nic,model=e1000\r\n";
        let live = |kind: &str, by: By, queues: u16| Live { kind: kind.to_owned(), by, queues };
        let found = back_ends(text);
        let wanted = [
            ("br", live("tap", By::Chosen(Some("br7".into())), 1)),
            ("n1", live("tap", By::Descriptors(vec![27, 28]), 2)),
            ("net0", live("tap", By::Name("t0".into()), 1)),
            ("p0", live("hubport", By::Chosen(None), 1)),
            ("p1", live("hubport", By::Chosen(None), 1)),
            ("u", live("user", By::Chosen(None), 1)),
        ];
        assert_eq!(found, wanted.map(|(id, live)| (id.to_owned(), live)).into());
        let tap = |by: By, queues| Tap { by, options: NetOptions { queues, ..NetOptions::default() } };
        for (told, id, same) in [
            (tap(By::Name("t0".into()), None), "net0", true),
            (tap(By::Name("t1".into()), None), "net0", false),
            (tap(By::Name("t0".into()), Some(2)), "net0", false),
            (tap(By::Descriptors(vec![27, 28]), Some(2)), "n1", true),
            (tap(By::Descriptors(vec![27]), None), "n1", false),
            (tap(By::Chosen(None), None), "br", true),
        ] {
            assert_eq!(is_it(&told, &found[id]), same, "{told:?}");
        }
        assert!(added("u", &found["u"]).unwrap_err().contains("network u (user) was added after the start"));
        assert_eq!(added("n1", &found["n1"]), Ok(tap(By::Descriptors(vec![27, 28]), Some(2))));
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
