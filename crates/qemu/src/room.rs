//! Whether a VM's memory fits here: into what the host has left, and what the cgroups and limits leave in
//! which its QEMU will run.

use rustix::process::{Resource, getrlimit};
use units::Bytes;

pub use sys::room::Room;

/// Address space that QEMU takes besides the guest's memory: its code, its threads' stacks and heaps. 1.5 GiB
/// were seen with 8 vCPUs.
const QEMU_ADDRESSES: u64 = 4 << 30;

/// Where there is least for a process that this one starts.
pub fn least() -> Room {
    let all = Room::here().into_iter().chain(addresses());
    let endless = || Room { left: u64::MAX, of: u64::MAX, place: String::new() };
    all.min_by_key(|room| room.left).unwrap_or_else(endless)
}

/// Why a VM that needs so much does not fit, if it does not. `reserved`: what others will still take that are
/// arriving. `overcommit`: how many hundredths of what is left may be needed.
pub fn refuses(room: &Room, needed: u64, reserved: u64, overcommit: u32) -> Option<String> {
    let allowed = u128::from(room.left.saturating_sub(reserved)) * u128::from(overcommit) / 100;
    if u128::from(needed) <= allowed {
        return None;
    }
    let Room { left, place, .. } = room;
    let (needed, left) = (Bytes(needed), Bytes(*left));
    let mut why =
        format!("the VM needs {needed} of memory, QEMU's own included, but only {left} are free {place}");
    if reserved > 0 {
        let reserved = Bytes(reserved);
        why.push_str(&format!(", and VMs that are arriving will take {reserved} of that"));
    }
    if overcommit > 100 {
        why.push_str(&format!(" (overcommit = {})", f64::from(overcommit) / 100.0));
    }
    Some(why + "; end or move others, or choose another host")
}

/// What `RLIMIT_AS` leaves for guest memory, if there is one: QEMU inherits it.
fn addresses() -> Option<Room> {
    let of = getrlimit(Resource::As).current?;
    Some(Room {
        left: of.saturating_sub(QEMU_ADDRESSES),
        of,
        place: "within the limit of address space (ulimit -v) under which the agent runs".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_fits_into_what_is_left_and_not_reserved() {
        let room = Room { left: 1000, of: 2000, place: "here".to_owned() };
        let table = [
            (1000, 0, 100, true),
            (1001, 0, 100, false),
            (600, 400, 100, true),
            (601, 400, 100, false),
            (1500, 0, 150, true),
            (901, 400, 150, false),
            (1, 2000, 400, false),
            (u64::MAX, 0, u32::MAX, false),
        ];
        for (needed, reserved, overcommit, fits) in table {
            let why = refuses(&room, needed, reserved, overcommit);
            assert_eq!(why.is_none(), fits, "{needed} {reserved} {overcommit}: {why:?}");
        }
    }
}
