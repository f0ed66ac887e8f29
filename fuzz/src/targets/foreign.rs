use crate::input::Input;
use units::PAGE_SIZE;

/// A byte says whether an image follows, or private memory; then one for its size.
pub(crate) fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    if input.u8().is_multiple_of(2) {
        return qemu::fuzz::image(input.rest()).is_ok();
    }
    let size = usize::from(input.u16());
    let compressed = input.rest();
    let Ok(carried) = qemu::fuzz::private(compressed, size) else { return false };
    assert_eq!(carried.len(), size.div_ceil(PAGE_SIZE));
    true
}

/// The head of a qcow2 image (docs/interop/qcow2.txt), with the name of its backing file behind it.
fn qcow2(version: u32, features: u64, backing: &str) -> Vec<u8> {
    let offset: u64 = if backing.is_empty() { 0 } else { 120 };
    let mut head = b"QFI\xfb".to_vec();
    head.extend(version.to_be_bytes());
    head.extend(offset.to_be_bytes());
    head.extend((backing.len() as u32).to_be_bytes());
    // Clusters of 64 KiB, a disk of 1 MiB.
    head.extend(16u32.to_be_bytes());
    head.extend((1u64 << 20).to_be_bytes());
    head.resize(72, 0);
    head.extend(features.to_be_bytes());
    head.resize(100, 0);
    // Its own length, and an extension that says what the backing file is.
    head.extend(104_u32.to_be_bytes());
    head.extend(0xe279_2aca_u32.to_be_bytes());
    head.extend(3_u32.to_be_bytes());
    head.extend(b"raw");
    head.resize(120, 0);
    head.extend(backing.as_bytes());
    head
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let image = |image: Vec<u8>| [&[0], &*image].concat();
    let private = |bytes: Vec<u8>| {
        let size = (bytes.len() as u16).to_le_bytes();
        [&[1], &size[..], &qemu::fuzz::pack_private(&bytes)].concat()
    };
    let mut some = vec![0; 3 * PAGE_SIZE + 7];
    some[PAGE_SIZE] = 1;
    some[3 * PAGE_SIZE] = 2;
    vec![
        image(qcow2(3, 0, "")),
        image(qcow2(2, 0, "")),
        // A file that there is everywhere, and that is no image itself.
        image(qcow2(3, 0, "/proc/self/exe")),
        image(vec![7; 100]),
        private(vec![0; PAGE_SIZE]),
        private(some),
        private(vec![]),
    ]
}
