//! A private block on its way: its size, then pages with their numbers.

use units::PAGE_SIZE;

/// Before the pages: the block's size.
const HEADER: usize = 8;

/// Before each page: its number.
const NUMBER: usize = 8;

/// The size, then each page that is `wanted`, with its number before it.
pub(crate) fn pack(bytes: &[u8], wanted: impl Fn(usize) -> bool) -> Vec<u8> {
    let mut packed = (bytes.len() as u64).to_le_bytes().to_vec();
    for (number, page) in bytes.chunks(PAGE_SIZE).enumerate().filter(|(number, _)| wanted(*number)) {
        packed.extend((number as u64).to_le_bytes());
        packed.extend(page);
    }
    packed
}

/// Whether a page is all zeros.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    // In pieces that are looked at as a whole.
    page.chunks(64).all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}

/// The size of a packed block.
pub(crate) fn packed_size(packed: &[u8]) -> Option<u64> {
    packed.get(..HEADER)?.try_into().map(u64::from_le_bytes).ok()
}

/// Undoes [`pack`] into zeros and says which pages there were. Foreign input: every number is checked.
pub(crate) fn unpack(packed: &[u8], into: &mut [u8]) -> Result<Vec<bool>, String> {
    let number = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).ok();
    let size = packed_size(packed).ok_or("it has no size")?;
    if size != into.len() as u64 {
        return Err(format!("it has {size} bytes there and {} here", into.len()));
    }
    let mut carried = vec![false; into.len().div_ceil(PAGE_SIZE)];
    let mut rest = &packed[HEADER..];
    while !rest.is_empty() {
        let page = rest.get(..NUMBER).and_then(number).ok_or("it is cut off")?;
        rest = &rest[NUMBER..];
        let start = usize::try_from(page).ok().and_then(|page| page.checked_mul(PAGE_SIZE));
        let start = start.filter(|start| *start < into.len()).ok_or("a page lies beyond its end")?;
        let length = PAGE_SIZE.min(into.len() - start);
        into[start..start + length].copy_from_slice(rest.get(..length).ok_or("it is cut off")?);
        carried[start / PAGE_SIZE] = true;
        rest = &rest[length..];
    }
    Ok(carried)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_survives_being_packed_without_its_zeros() {
        let mut bytes = vec![0; 5 * PAGE_SIZE + 7];
        bytes[PAGE_SIZE] = 1;
        *bytes.last_mut().unwrap() = 2;
        let packed = pack(&bytes, |page| page == 1 || page == 5);
        assert_eq!(packed.len(), HEADER + NUMBER + PAGE_SIZE + NUMBER + 7);
        let mut again = vec![0; bytes.len()];
        let carried = unpack(&packed, &mut again).unwrap();
        assert_eq!((bytes, carried), (again.clone(), vec![false, true, false, false, false, true]));
        for cut in 0..packed.len() {
            // Only a cut between two pages leaves something whole.
            let whole = cut == HEADER || cut == HEADER + NUMBER + PAGE_SIZE;
            assert_eq!(unpack(&packed[..cut], &mut again).is_ok(), whole, "cut at {cut}");
        }
        assert!(unpack(&packed, &mut vec![0; PAGE_SIZE]).is_err());
        let mut beyond = packed.clone();
        beyond[HEADER] = 200;
        assert!(unpack(&beyond, &mut again).is_err());
    }
}
