//! Networks by the command line: `-netdev`, `-nic` and `-net`, each with what is known of its TAP.
//!
//! A card that the machine makes itself (`-nic`, `-net nic`) is written as `-net nic,netdev=…` on the target:
//! the same card, on a network that has a name.

use super::words::Word;
use crate::recipe::{
    Argument, NetOptions, is_nic_model, is_of_user_network,
    options::{self, get, is_on},
};
use std::collections::{BTreeMap, BTreeSet};
use units::Bytes;

/// A TAP as the command line names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Tap {
    pub(super) by: By,
    pub(super) options: NetOptions,
}

/// How it is known which TAP of this host it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum By {
    /// By its name.
    Name(String),
    /// By the descriptors that a launcher has handed to QEMU.
    Descriptors(Vec<i32>),
    /// QEMU or its bridge helper has made one, on this bridge if that was said.
    Chosen(Option<String>),
}

/// What `-netdev tap` may say besides what goes with the VM: it concerns how this host's TAP was made.
const TAP_OPTIONS: &[&str] = &[
    "type",
    "id",
    "ifname",
    "fd",
    "fds",
    "script",
    "downscript",
    "br",
    "helper",
    "vhost",
    "vhostforce",
    "vhostfd",
    "vhostfds",
    "poll-us",
];

/// QEMU's bridge if none is said.
const USUAL_BRIDGE: &str = "br0";

type Pairs = Vec<(String, String)>;

/// All networks of a command line.
#[derive(Debug, Default)]
pub(super) struct Networks {
    /// TAPs by their netdev's id.
    pub(super) taps: BTreeMap<String, Tap>,
    pub(super) arguments: Vec<Argument>,
    pub(super) notes: Vec<String>,
    pub(super) reasons: Vec<String>,
    /// Whether there are some that QEMU has given names of its own.
    pub(super) nameless: bool,
    ids: BTreeSet<String>,
    nics: Vec<Pairs>,
    hub: Vec<Pairs>,
}

/// Only the TAPs.
pub(super) fn of(words: &[Word]) -> Networks {
    let mut networks = Networks::default();
    for word in words {
        networks.take(&word.option, word.value.as_deref().unwrap_or_default());
    }
    networks.finish()
}

impl Networks {
    /// Takes an option if it concerns networks; says whether it did.
    pub(super) fn take(&mut self, option: &str, value: &str) -> bool {
        let parsed = options::parse(value, "type");
        let none = get(&parsed, "type") == Some("none");
        match option {
            "-netdev" => {
                let id = get(&parsed, "id").unwrap_or_default().to_owned();
                self.ids.insert(id.clone());
                self.back_end(&id, parsed, false);
            }
            "-nic" | "-net" if none => self.arguments.push(Argument::new("-nic", "none")),
            "-nic" => self.nics.push(parsed),
            "-net" => self.hub.push(parsed),
            _ => return false,
        }
        true
    }

    /// Cards in QEMU's own order: those of `-nic` come first.
    pub(super) fn finish(mut self) -> Self {
        for parsed in std::mem::take(&mut self.nics) {
            let (mut card, back): (Pairs, Pairs) =
                parsed.into_iter().partition(|(key, _)| matches!(key.as_str(), "model" | "mac"));
            // QEMU gives such a card no interrupts of its own (MSI-X), and one of `-net nic` what is usual.
            card.push(("vectors".to_owned(), "0".to_owned()));
            self.pair(card, back, false);
        }
        let of_a_card = |pairs: &Pairs| get(pairs, "type") == Some("nic");
        let named = |pairs: &Pairs| of_a_card(pairs) && get(pairs, "netdev").is_some();
        let (named, hub): (Vec<_>, Vec<_>) = std::mem::take(&mut self.hub).into_iter().partition(named);
        let (mut cards, mut backs): (Vec<_>, Vec<_>) = hub.into_iter().partition(of_a_card);
        match (cards.pop(), backs.pop()) {
            (Some(card), Some(back)) if cards.is_empty() && backs.is_empty() => self.pair(card, back, true),
            (Some(card), None) if cards.is_empty() => self.card(card, None),
            (None, None) => {}
            _ => self.reasons.push(
                "its network cards are on a hub of QEMU's own (-net), which cannot be carried over; give \
                 each a network of its own (-nic, or -netdev and -device)"
                    .to_owned(),
            ),
        }
        named.into_iter().for_each(|card| self.card(card, None));
        self
    }

    fn pair(&mut self, card: Pairs, back: Pairs, on_hub: bool) {
        let id = match get(&back, "id") {
            Some(id) => id.to_owned(),
            None => {
                self.nameless = true;
                let free = |id: &String| !self.ids.contains(id);
                (0..).map(|n| format!("nic{n}")).find(free).unwrap_or_default()
            }
        };
        self.ids.insert(id.clone());
        self.back_end(&id, back, on_hub);
        self.card(card, Some(&id));
    }

    fn card(&mut self, card: Pairs, netdev: Option<&str>) {
        let mut pairs: Pairs = vec![("type".to_owned(), "nic".to_owned())];
        for (key, value) in card {
            match key.as_str() {
                "type" => {}
                "model" if !is_nic_model(&value) => {
                    self.reasons.push(format!(
                        "a network card of the model {value} is not known to move; use virtio-net-pci or \
                         e1000"
                    ));
                }
                "mac" => pairs.push(("macaddr".to_owned(), value)),
                _ => pairs.push((key, value)),
            }
        }
        pairs.extend(netdev.map(|id| ("netdev".to_owned(), id.to_owned())));
        self.arguments.push(Argument::new("-net", options::join(&pairs, "type")));
    }

    fn back_end(&mut self, id: &str, parsed: Pairs, on_hub: bool) {
        match get(&parsed, "type").unwrap_or_default() {
            "user" => self.user(id, parsed),
            "tap" => self.tap(id, &parsed, on_hub),
            "bridge" => {
                let bridge = get(&parsed, "br").unwrap_or(USUAL_BRIDGE).to_owned();
                let options = NetOptions { vnet_hdr: on_hub.then_some(false), ..NetOptions::default() };
                self.taps.insert(id.to_owned(), Tap { by: By::Chosen(Some(bridge)), options });
            }
            kind => {
                let why = match kind {
                    "vhost-user" | "vhost-vdpa" => "another process writes the guest's memory unseen",
                    "hubport" => "it is on a hub of QEMU's own",
                    "socket" | "stream" | "dgram" | "l2tpv3" | "vde" | "passt" => {
                        "it ends in another process of this host, or at an address of this host's"
                    }
                    _ => "only TAPs on a bridge can follow the VM",
                };
                self.reasons
                    .push(format!("network {id} is of kind {kind}: {why}; use -netdev tap on a bridge"));
            }
        }
    }

    fn tap(&mut self, id: &str, parsed: &Pairs, on_hub: bool) {
        let on = |key: &str| get(parsed, key).is_some_and(is_on);
        let given = ["vhostfd", "vhostfds"].iter().any(|key| get(parsed, key).is_some());
        let vhost = get(parsed, "vhost").map_or(given || on("vhostforce"), is_on);
        // A hub knows no offloads.
        let mut options = NetOptions { vnet_hdr: on_hub.then_some(false), vhost, ..NetOptions::default() };
        for (key, value) in parsed {
            let understood = match key.as_str() {
                "queues" => value.parse().map(|queues| options.queues = Some(queues)).is_ok(),
                "vnet_hdr" => {
                    options.vnet_hdr = Some(is_on(value));
                    true
                }
                "sndbuf" => value.parse::<Bytes>().map(|bytes| options.sndbuf = Some(bytes.0)).is_ok(),
                key => TAP_OPTIONS.contains(&key),
            };
            if !understood {
                self.reasons
                    .push(format!("network {id} has {key}={value}, which is not carried over; leave it out"));
            }
        }
        let given = get(parsed, "fds").or(get(parsed, "fd"));
        let by = match (get(parsed, "ifname"), given) {
            (_, Some(list)) => {
                let fds: Result<Vec<i32>, _> = list.split(':').map(str::parse).collect();
                match fds {
                    Ok(fds) => {
                        if fds.len() > 1 {
                            options.queues = u16::try_from(fds.len()).ok();
                        }
                        By::Descriptors(fds)
                    }
                    // A name that a monitor knew once.
                    Err(_) => By::Chosen(None),
                }
            }
            (Some(name), None) => By::Name(name.to_owned()),
            (None, None) => {
                let helper = get(parsed, "helper").is_some() || get(parsed, "br").is_some();
                By::Chosen(helper.then(|| get(parsed, "br").unwrap_or(USUAL_BRIDGE).to_owned()))
            }
        };
        self.taps.insert(id.to_owned(), Tap { by, options });
    }

    /// QEMU's own network: it moves, what goes through it does not.
    fn user(&mut self, id: &str, parsed: Pairs) {
        self.notes.push(format!("network {id} is QEMU's own (user): its connections end when the VM moves"));
        let (mut kept, left): (Pairs, Pairs) =
            parsed.into_iter().partition(|(key, _)| is_of_user_network(key));
        for (key, value) in left {
            self.notes.push(format!(
                "network {id}: {key}={value} stays behind: it is a port or a file of this host"
            ));
        }
        kept.retain(|(key, _)| key != "id");
        kept.push(("id".to_owned(), id.to_owned()));
        self.arguments.push(Argument::new("-netdev", options::join(&kept, "type")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &[&str]) -> Networks {
        let mut networks = Networks::default();
        words.chunks(2).for_each(|pair| assert!(networks.take(pair[0], pair[1]), "{pair:?}"));
        networks.finish()
    }

    #[test]
    fn every_dialect_of_a_card_is_one_with_a_network() {
        let rows: &[(&[&str], &[&str])] = &[
            (&["-nic", "none"], &["-nic none"]),
            (
                &["-nic", "user,model=virtio-net-pci,mac=52:54:00:00:00:01,hostfwd=tcp::1-:2"],
                &[
                    "-netdev user,id=nic0",
                    "-net nic,model=virtio-net-pci,macaddr=52:54:00:00:00:01,vectors=0,netdev=nic0",
                ],
            ),
            (
                &["-net", "nic,model=e1000", "-net", "user"],
                &["-netdev user,id=nic0", "-net nic,model=e1000,netdev=nic0"],
            ),
            (
                &["-net", "nic,netdev=n", "-netdev", "user,id=n", "-nic", "user,id=m"],
                &[
                    "-netdev user,id=n",
                    "-netdev user,id=m",
                    "-net nic,vectors=0,netdev=m",
                    "-net nic,netdev=n",
                ],
            ),
            (&["-net", "nic"], &["-net nic"]),
        ];
        for (words, said) in rows {
            let found = read(words);
            let text = |argument: &Argument| {
                format!("{} {}", argument.option, argument.value.as_deref().unwrap_or_default())
            };
            assert_eq!(found.arguments.iter().map(text).collect::<Vec<_>>(), *said, "{words:?}");
            assert_eq!(found.reasons, Vec::<String>::new(), "{words:?}");
            for argument in &found.arguments {
                assert_eq!(crate::recipe::check_argument(argument, &[]), Ok(()));
            }
        }
    }

    #[test]
    fn a_tap_is_known_by_its_name_its_descriptors_or_its_bridge() {
        let rows: &[(&[&str], By, Option<u16>)] = &[
            (&["-netdev", "tap,id=n,ifname=t0,script=no"], By::Name("t0".into()), None),
            (&["-netdev", "tap,id=n,fd=27"], By::Descriptors(vec![27]), None),
            (&["-netdev", "tap,id=n,fds=27:28"], By::Descriptors(vec![27, 28]), Some(2)),
            (&["-netdev", "tap,id=n"], By::Chosen(None), None),
            (&["-netdev", "tap,id=n,fd=named"], By::Chosen(None), None),
            (&["-netdev", "tap,id=n,br=br7"], By::Chosen(Some("br7".into())), None),
            (&["-netdev", "bridge,id=n"], By::Chosen(Some("br0".into())), None),
            (&["-nic", "bridge,id=n,br=br1,model=e1000"], By::Chosen(Some("br1".into())), None),
            (&["-nic", "tap,id=n,ifname=t1"], By::Name("t1".into()), None),
        ];
        for (words, by, queues) in rows {
            let found = read(words);
            let tap = &found.taps["n"];
            assert_eq!((&tap.by, tap.options.queues), (by, *queues), "{words:?}");
            assert_eq!(found.reasons, Vec::<String>::new(), "{words:?}");
        }
        // What a card on a hub was shown it is shown on.
        let hub = read(&["-net", "nic", "-net", "tap,ifname=t0"]);
        assert_eq!(hub.taps["nic0"].options.vnet_hdr, Some(false));
    }

    #[test]
    fn a_network_has_vhost_where_qemu_gives_it_one() {
        for (told, vhost) in [
            ("ifname=t0", false),
            ("ifname=t0,vhost=on", true),
            ("ifname=t0,vhost", true),
            ("ifname=t0,vhost=off", false),
            ("ifname=t0,vhostforce=on", true),
            ("ifname=t0,vhost=off,vhostforce=on", false),
            ("fd=7,vhost=on,vhostfd=8", true),
            ("fds=7:8,vhostfds=9:10", true),
            ("fds=7:8,vhost=on,poll-us=50", true),
        ] {
            let found = read(&["-netdev", &format!("tap,id=n,{told}")]);
            assert_eq!((found.taps["n"].options.vhost, found.reasons), (vhost, vec![]), "{told}");
        }
    }

    #[test]
    fn what_cannot_follow_is_refused_once() {
        let rows: &[(&[&str], &str)] = &[
            (&["-netdev", "socket,id=n,listen=:1234"], "it ends in another process"),
            (&["-netdev", "hubport,id=n,hubid=1"], "on a hub of QEMU's own"),
            (&["-net", "nic", "-net", "nic", "-net", "user"], "on a hub of QEMU's own (-net)"),
            (&["-nic", "user,model=vfio-pci"], "of the model vfio-pci"),
        ];
        for (words, why) in rows {
            let found = read(words);
            assert!(found.reasons.len() == 1 && found.reasons[0].contains(why), "{:?}", found.reasons);
        }
    }
}
