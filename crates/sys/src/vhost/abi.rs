//! What a vhost worker is told (`<linux/vhost.h>`), and its ring (virtio 1.1, split virtqueues).

use crate::ioctl::{NONE, WRITE, number};

/// `VHOST_VIRTIO`.
const KIND: u32 = 0xaf;

const fn takes(nr: u32, bytes: usize) -> u32 {
    number(WRITE, KIND, nr, bytes)
}

pub(super) const SET_OWNER: u32 = number(NONE, KIND, 0x01, 0);
pub(super) const SET_FEATURES: u32 = takes(0x00, 8);
pub(super) const SET_MEM_TABLE: u32 = takes(0x03, 8);
pub(super) const SET_VRING_NUM: u32 = takes(0x10, 8);
pub(super) const SET_VRING_ADDR: u32 = takes(0x11, 40);
pub(super) const SET_VRING_BASE: u32 = takes(0x12, 8);
pub(super) const SET_VRING_KICK: u32 = takes(0x20, 8);
pub(super) const NET_SET_BACKEND: u32 = takes(0x30, 8);

/// `VIRTIO_F_VERSION_1`: the ring is little-endian.
const VERSION_1: u64 = 1 << 32;
/// `VHOST_NET_F_VIRTIO_NET_HDR`: the worker writes the header before each packet, because the TAP has none.
const HEADER: u64 = 1 << 27;
pub(super) const FEATURES: u64 = VERSION_1 | HEADER;

/// Bytes of that header (`struct virtio_net_hdr_mrg_rxbuf`).
pub(super) const HEADER_BYTES: usize = 12;

/// The ring that packets arrive at.
pub(super) const RECEIVES: u32 = 0;

/// How many descriptors the ring has.
pub(super) const RING: u16 = 8;

/// `VIRTQ_DESC_F_WRITE`: the buffer is for the worker to write.
const IS_WRITTEN: u16 = 2;

/// Where the number of descriptors stands that each of its two sides is done with.
pub(super) const INDEX: u64 = 2;

/// `struct vhost_memory` with one region, whose guest's addresses are its owner's.
pub(super) fn memory(start: u64, bytes: u64) -> Vec<u8> {
    let mut table = [1_u32, 0].map(u32::to_ne_bytes).concat();
    table.extend([start, bytes, start, 0].map(u64::to_ne_bytes).concat());
    table
}

/// `struct vhost_vring_state` and `struct vhost_vring_file`: a number or a descriptor for the ring.
pub(super) fn of_ring(value: i32) -> Vec<u8> {
    [RECEIVES.to_ne_bytes(), value.to_ne_bytes()].concat()
}

/// `struct vhost_vring_addr`, without a log.
pub(super) fn addresses(descriptors: u64, used: u64, available: u64) -> Vec<u8> {
    let mut all = [RECEIVES, 0].map(u32::to_ne_bytes).concat();
    all.extend([descriptors, used, available, 0].map(u64::to_ne_bytes).concat());
    all
}

/// `struct virtq_desc`: a buffer at this address.
pub(super) fn descriptor(address: u64, bytes: u32) -> Vec<u8> {
    let mut all = address.to_le_bytes().to_vec();
    all.extend(bytes.to_le_bytes());
    all.extend([IS_WRITTEN, 0].map(u16::to_le_bytes).concat());
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_as_long_as_their_requests_say() {
        let length = |request: u32| (request >> 16 & 0x3fff) as usize;
        assert_eq!(addresses(1, 2, 3).len(), length(SET_VRING_ADDR));
        assert_eq!(of_ring(-1).len(), length(SET_VRING_KICK));
        assert_eq!(memory(1, 2).len(), length(SET_MEM_TABLE) + 32);
        assert_eq!(descriptor(1, 2).len(), 16);
        // As `<linux/vhost.h>` has them.
        assert_eq!((SET_OWNER, SET_FEATURES, SET_MEM_TABLE), (0xaf01, 0x4008_af00, 0x4008_af03));
        assert_eq!((SET_VRING_ADDR, NET_SET_BACKEND), (0x4028_af11, 0x4008_af30));
    }
}
