//! Where a downtime went, for people.

use crate::words::{counted, millis};
use api::{DowntimePart, PausePart, Side};

/// Parts that are named, at most: the longest ones. Programs get all of them.
const NAMED: usize = 6;

/// The longest parts, then what is left; nothing where nothing is known.
pub(crate) fn words(parts: &[DowntimePart]) -> Option<String> {
    let mut parts: Vec<&DowntimePart> = parts.iter().filter(|part| part.ms > 0.0).collect();
    parts.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    let (named, rest) = parts.split_at(parts.len().min(NAMED));
    let mut words: Vec<String> =
        named.iter().map(|part| format!("{} {}", millis(part.ms), name(part.part, part.side))).collect();
    if !rest.is_empty() {
        let left = rest.iter().map(|part| part.ms).sum();
        words.push(format!("{} in {}", millis(left), counted(rest.len() as u64, "more", "more")));
    }
    (!words.is_empty()).then(|| words.join(", "))
}

fn name(part: PausePart, side: Side) -> &'static str {
    match (part, side) {
        (PausePart::Stop, _) => "stop",
        (PausePart::Drain, _) => "draining disks",
        (PausePart::LastScan, _) => "last scan",
        (PausePart::LastPages, _) => "last pages",
        (PausePart::Missing, _) => "announcing missing pages",
        (PausePart::Check, _) => "checking the VM",
        (PausePart::Save, _) => "saving the device state",
        (PausePart::Freeze, _) => "freezing QEMU",
        (PausePart::Flush, _) => "flushing disks",
        (PausePart::ReadState, _) => "reading the device state",
        (PausePart::Secure, _) => "spooling",
        (PausePart::Hash, _) => "hashing memory",
        (PausePart::SendState, _) => "sending the device state",
        (PausePart::Compare, _) => "comparing memory",
        (PausePart::Load, _) => "loading the device state",
        (PausePart::Record, _) => "the target's records",
        (PausePart::Offer, _) => "the offer",
        (PausePart::Hold, _) => "holding QEMU",
        (PausePart::Fence, _) => "the fence",
        (PausePart::Authorize, _) => "the authorization",
        (PausePart::Claim, _) => "the claim",
        (PausePart::Resume, _) => "resume",
        (PausePart::Announce, _) => "announcing",
        (PausePart::Link, _) => "on the link",
        (PausePart::Wait, Side::Source) => "between these on the source",
        (PausePart::Wait, _) => "between these on the target",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_parts_are_named() {
        let part = |part, side, ms| DowntimePart { part, side, at_ms: 0.0, ms, took_ms: ms };
        use PausePart::*;
        let parts = [
            part(Stop, Side::Source, 1.5),
            part(LastScan, Side::Source, 0.0),
            part(Claim, Side::Target, 3.25),
            part(Wait, Side::Target, 0.25),
        ];
        let expected = "3.25 ms the claim, 1.50 ms stop, 250 µs between these on the target";
        assert_eq!(words(&parts).as_deref(), Some(expected));
        assert_eq!(words(&[]), None);
        let many = [Stop, Drain, Check, Save, Load, Claim, Fence, Resume].map(|p| part(p, Side::Source, 1.0));
        assert!(words(&many).unwrap().ends_with(", 2.00 ms in 2 more"), "{:?}", words(&many));
    }
}
