//! Who may wait at the agent's port until it is known what they want. Connections cost nothing to whoever
//! makes them, and say whose they are only when their handshake is over: until then they get little room, and
//! the peers that are known keep theirs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr, Shutdown, TcpStream},
    sync::{Arc, Mutex, MutexGuard},
};
use units::Locked;

/// Connections that may wait at a time: each takes a thread and two descriptors, for as long as a handshake
/// may last.
const MOST_WAITING: usize = 128;

/// Of these, as many as a stranger may have: a migration opens a dozen, one after the other.
const MOST_OF_A_STRANGER: usize = 32;

/// Hosts that are remembered because they have had a certificate of the workgroup.
const MOST_LEARNT: usize = 1024;

/// The door.
#[derive(Clone, Default)]
pub(super) struct Door(Arc<Mutex<Inside>>);

#[derive(Default)]
struct Inside {
    waiting: BTreeMap<u64, Waiting>,
    known: BTreeSet<IpAddr>,
    /// The next connection's number.
    next: u64,
}

struct Waiting {
    from: IpAddr,
    connection: TcpStream,
}

/// What becomes of somebody who comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answer {
    /// There is room.
    Enter,
    /// There is, once this one is gone.
    Instead(u64),
    /// There is none.
    Leave,
}

/// One connection's place at the door. Dropping it makes room.
pub struct Pass {
    door: Door,
    number: u64,
    from: IpAddr,
}

impl Door {
    /// These hosts are known.
    pub(super) fn know(&self, hosts: impl IntoIterator<Item = IpAddr>) {
        self.inside().known.extend(hosts.into_iter().map(network));
    }

    /// Somebody has come; none: there is no room.
    pub(super) fn arrive(&self, connection: &TcpStream, from: IpAddr) -> std::io::Result<Option<Pass>> {
        let from = network(from);
        let connection = connection.try_clone()?;
        let mut inside = self.inside();
        let answer = {
            let waiting = inside.waiting.iter().map(|(number, waiting)| (*number, waiting.from));
            answer(from, waiting, &inside.known)
        };
        match answer {
            Answer::Leave => return Ok(None),
            Answer::Enter => {}
            Answer::Instead(number) => {
                if let Some(waiting) = inside.waiting.remove(&number) {
                    // Whoever serves it comes back at once.
                    let _ = waiting.connection.shutdown(Shutdown::Both);
                }
            }
        }
        let number = inside.next;
        inside.next += 1;
        inside.waiting.insert(number, Waiting { from, connection });
        Ok(Some(Pass { door: self.clone(), number, from }))
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.0.locked()
    }
}

impl Pass {
    /// Its handshake is over. `member`: with a certificate of the workgroup, by which its host is known from
    /// now on.
    pub fn greeted(self, member: bool) {
        let mut inside = self.door.inside();
        if member && inside.known.len() < MOST_LEARNT {
            inside.known.insert(self.from);
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.door.inside().waiting.remove(&self.number);
    }
}

/// What becomes of somebody from there, beside those who wait, the longest first.
fn answer(from: IpAddr, waiting: impl Iterator<Item = (u64, IpAddr)>, known: &BTreeSet<IpAddr>) -> Answer {
    let (mut all, mut of_each) = (0, BTreeMap::<IpAddr, (usize, u64)>::new());
    for (number, from) in waiting {
        all += 1;
        of_each.entry(from).or_insert((0, number)).0 += 1;
    }
    let here = of_each.get(&from).map_or(0, |(count, _)| *count);
    if !known.contains(&from) && here >= MOST_OF_A_STRANGER {
        return Answer::Leave;
    }
    if all < MOST_WAITING {
        return Answer::Enter;
    }
    // Whoever has most gives way, and strangers before all others.
    let most = of_each.iter().max_by_key(|(from, (count, _))| (!known.contains(from), *count));
    most.map_or(Answer::Enter, |(_, (_, oldest))| Answer::Instead(*oldest))
}

/// By what a host is counted: its address, or, where everybody has very many, their network.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            // The last hop's addresses say nothing of whose network it is.
            if v6.is_unicast_link_local() { v6.into() } else { Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into() }
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    /// So many of each host, one after the other.
    fn waiting(of: &[(u8, usize)]) -> Vec<(u64, IpAddr)> {
        let hosts = of.iter().flat_map(|(n, count)| std::iter::repeat_n(host(*n), *count));
        (0..).zip(hosts).collect()
    }

    #[test]
    fn strangers_have_bounds_and_known_hosts_always_room() {
        let known: BTreeSet<_> = [host(1), host(2)].into();
        type Row = (u8, &'static [(u8, usize)], Answer);
        let table: &[Row] = &[
            (9, &[], Answer::Enter),
            (9, &[(9, 31)], Answer::Enter),
            (9, &[(9, 32)], Answer::Leave),
            (8, &[(9, 32)], Answer::Enter),
            (1, &[(9, 32)], Answer::Enter),
            (1, &[(1, 100)], Answer::Enter),
            // Full of strangers: the one that has most gives way, its oldest first.
            (1, &[(5, 30), (6, 32), (7, 32), (8, 31), (9, 3)], Answer::Instead(62)),
            (9, &[(5, 30), (6, 32), (7, 32), (8, 31), (9, 3)], Answer::Instead(62)),
            // Among known hosts, too; but a stranger gives way before them.
            (1, &[(1, 128)], Answer::Instead(0)),
            (2, &[(1, 128)], Answer::Instead(0)),
            (2, &[(1, 127), (9, 1)], Answer::Instead(127)),
        ];
        for (from, others, wanted) in table {
            assert_eq!(
                answer(host(*from), waiting(others).into_iter(), &known),
                *wanted,
                "{from} {others:?}"
            );
        }
    }

    #[test]
    fn hosts_are_counted_by_what_costs_them_something() {
        let same = |a: &str, b: &str| network(a.parse().unwrap()) == network(b.parse().unwrap());
        assert!(same("::ffff:10.0.0.1", "10.0.0.1"));
        assert!(same("2001:db8::1", "2001:db8::ffff:1"));
        assert!(!same("2001:db8::1", "2001:db8:0:1::1"));
        assert!(!same("fe80::1", "fe80::2"));
        assert!(!same("10.0.0.1", "10.0.0.2"));
    }
}
