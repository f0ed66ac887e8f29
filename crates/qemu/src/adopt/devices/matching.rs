//! Which `-device` has made which device.

use super::ask::Device;
use crate::recipe::{
    Argument,
    options::{self, get},
};

/// What came of it. All are numbers in the lists that were compared.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Matched {
    /// An argument, and the device that it has made.
    pub(super) told: Vec<(usize, usize)>,
    /// Arguments whose device is no more, or was unplugged and plugged in again.
    pub(super) gone: Vec<usize>,
    /// Devices that nobody has told of, and that were not plugged in.
    pub(super) strange: Vec<usize>,
}

/// An argument that makes a device.
struct Told {
    argument: usize,
    driver: String,
    id: Option<String>,
}

impl Told {
    fn makes(&self, device: &Device) -> bool {
        // The type that QEMU gives a device can be longer than the driver's alias on the command line.
        !device.plugged
            && (device.kind == self.driver || device.kind.starts_with(&format!("{}-", self.driver)))
    }
}

/// Compares. `by_drive`: whether there are drives that make devices of their own (`-drive if=virtio`).
pub(super) fn of(arguments: &[Argument], live: &[Device], by_drive: bool) -> Matched {
    let mut matched = Matched::default();
    let told = arguments.iter().enumerate().filter(|(_, argument)| argument.option == "-device");
    let told = told.map(|(argument, text)| {
        let parsed = options::parse(text.value.as_deref().unwrap_or_default(), "driver");
        let word = |key: &str| get(&parsed, key).map(str::to_owned);
        Told { argument, driver: word("driver").unwrap_or_default(), id: word("id") }
    });
    let (named, nameless): (Vec<_>, Vec<_>) = told.partition(|told| told.id.is_some());
    let mut free: Vec<usize> = (0..live.len()).filter(|at| !live[*at].plugged).collect();
    let mut take = |told: &Told, found: fn(&Told, usize, &Device) -> bool, number: usize| {
        let at = free.iter().position(|at| found(told, number, &live[*at]))?;
        Some((told.argument, free.remove(at)))
    };
    let mut note = |told: &Told, pair: Option<(usize, usize)>| match pair {
        Some(pair) => matched.told.push(pair),
        None => matched.gone.push(told.argument),
    };
    for told in &named {
        note(told, take(told, |told, _, device| device.id() == told.id.as_deref(), 0));
    }
    // If one of those without an id is no more, QEMU's numbers tell which: they are given in the order of the
    // command line.
    let all_there = {
        let mut left: Vec<&Device> = live.iter().filter(|device| !device.has_id && !device.plugged).collect();
        nameless.iter().all(|told| {
            let exactly = left.iter().position(|device| device.kind == told.driver);
            let at = exactly.or_else(|| left.iter().position(|device| told.makes(device)));
            at.map(|at| left.remove(at)).is_some()
        })
    };
    for (number, told) in nameless.iter().enumerate() {
        let numbered = |told: &Told, number: usize, device: &Device| {
            !device.has_id && told.makes(device) && device.number() == Some(number)
        };
        // One may be called as another's name begins: pvpanic and pvpanic-pci.
        let exactly = |told: &Told, _, device: &Device| !device.has_id && device.kind == told.driver;
        let any = |told: &Told, _, device: &Device| !device.has_id && told.makes(device);
        let pair = if all_there {
            take(told, exactly, number).or_else(|| take(told, any, number))
        } else {
            take(told, numbered, number)
        };
        note(told, pair);
    }
    let of_a_drive = |at: &usize| by_drive && live[*at].kind.starts_with("virtio-blk");
    matched.strange = free.into_iter().filter(|at| !of_a_drive(at)).collect();
    matched
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `kind`, `kind=id`; a plus behind it: it was plugged in.
    fn live(words: &str) -> Vec<Device> {
        let mut number = 0;
        let device = |word: &str| {
            let (word, plugged) = word.strip_suffix('+').map_or((word, false), |word| (word, true));
            let (kind, name, has_id) = match (word.split_once('='), word.split_once('#')) {
                (Some((kind, id)), _) => (kind, id.to_owned(), true),
                (None, Some((kind, number))) => (kind, format!("device[{number}]"), false),
                (None, None) => {
                    number += 1;
                    (word, format!("device[{}]", number - 1), false)
                }
            };
            Device { path: String::new(), name, has_id, kind: kind.to_owned(), plugged }
        };
        words.split_whitespace().map(device).collect()
    }

    #[test]
    fn each_device_is_made_by_an_argument_or_was_plugged_in() {
        // Arguments, devices; which argument has made which, which are gone, which devices nobody has told
        // of.
        type Row =
            (&'static str, &'static str, &'static [(usize, usize)], &'static [usize], &'static [usize]);
        let rows: &[Row] = &[
            ("a,id=x b,id=y", "b=y a=x", &[(0, 1), (1, 0)], &[], &[]),
            ("a,id=x b,id=y", "b=y", &[(1, 0)], &[0], &[]),
            ("a,id=x", "a=x+", &[], &[0], &[]),
            ("a,id=x", "a=x c=z+ c+", &[(0, 0)], &[], &[]),
            ("", "c=z", &[], &[], &[0]),
            ("pvpanic pvpanic-pci", "pvpanic-pci pvpanic", &[(0, 1), (1, 0)], &[], &[]),
            ("a a b", "a a b", &[(0, 0), (1, 1), (2, 2)], &[], &[]),
            ("a a b", "a#1 b#2", &[(1, 0), (2, 1)], &[0], &[]),
            ("a a b", "a#1 b#2 a#0+", &[(1, 0), (2, 1)], &[0], &[]),
            ("rng", "rng-pci", &[(0, 0)], &[], &[]),
        ];
        for (told, there, pairs, gone, strange) in rows {
            let arguments: Vec<_> = told.split_whitespace().map(|it| Argument::new("-device", it)).collect();
            let matched = of(&arguments, &live(there), false);
            let wanted = Matched { told: pairs.to_vec(), gone: gone.to_vec(), strange: strange.to_vec() };
            assert_eq!(matched, wanted, "{told} / {there}");
        }
        assert_eq!(of(&[], &live("virtio-blk-pci"), true), Matched::default());
        assert_eq!(of(&[], &live("virtio-blk-pci"), false).strange, [0]);
    }
}
