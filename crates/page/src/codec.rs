//! Compression of what crosses the wire beside pages: device state and page sets.

/// LZ4: quick enough to pay inside the downtime even on a fast link.
pub fn compress(raw: &[u8]) -> Vec<u8> {
    lz4_flex::block::compress(raw)
}

/// Compressed bytes that cannot be what they claim to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecompressError {
    /// The claimed length is beyond what is acceptable here.
    #[error("{claimed} bytes are claimed where at most {limit} are acceptable")]
    TooLong {
        /// What the peer claims.
        claimed: u64,
        /// What is acceptable.
        limit: u64,
    },
    /// The content does not unpack to the claimed length.
    #[error("the content does not unpack to the {claimed} bytes that it claims")]
    Broken {
        /// What the peer claims.
        claimed: u64,
    },
}

/// Undoes `compress`. `claimed` is the peer's word for the raw length; memory is spent only up to `limit`.
pub fn decompress(compressed: &[u8], claimed: u64, limit: u64) -> Result<Vec<u8>, DecompressError> {
    if claimed > limit {
        return Err(DecompressError::TooLong { claimed, limit });
    }
    // LZ4 cannot shrink by more than 255: a tiny message must not make us reserve a large buffer.
    if claimed > (compressed.len() as u64 + 1) * 255 {
        return Err(DecompressError::Broken { claimed });
    }
    let raw = lz4_flex::block::decompress(compressed, claimed as usize)
        .map_err(|_| DecompressError::Broken { claimed })?;
    if raw.len() as u64 == claimed { Ok(raw) } else { Err(DecompressError::Broken { claimed }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn unpack_undoes_pack(raw in prop::collection::vec(0u8..4, 0..5000)) {
            prop_assert_eq!(decompress(&compress(&raw), raw.len() as u64, 5000), Ok(raw));
        }

        #[test]
        fn hostile_bytes_are_refused_without_harm(bytes: Vec<u8>, claimed in 0u64..10_000) {
            if let Ok(raw) = decompress(&bytes, claimed, 4096) {
                prop_assert!(raw.len() as u64 == claimed && claimed <= 4096);
            }
        }
    }

    #[test]
    fn a_claim_beyond_the_limit_costs_nothing() {
        assert_eq!(
            decompress(&[0; 8], 1 << 40, 4096),
            Err(DecompressError::TooLong { claimed: 1 << 40, limit: 4096 })
        );
    }
}
