//! Compression of pages: several codecs, one way to bound what comes out.

use units::PAGE_SIZE;
use zstd_safe::{CCtx, CParameter, DCtx};

/// How pages are compressed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Codec {
    /// LZ4: the cheapest.
    Lz4,
    /// Zstandard at this level. The level is the sender's business and does not travel.
    Zstd(i8),
}

/// Compresses. Keeps its tables from one batch to the next; one for each thread.
pub struct Encoder {
    zstd: CCtx<'static>,
    level: Option<i8>,
    /// What is not contiguous is gathered here.
    gathered: Vec<u8>,
}

impl Default for Encoder {
    fn default() -> Self {
        Self { zstd: CCtx::create(), level: None, gathered: Vec::new() }
    }
}

impl Encoder {
    /// Compresses the parts as one, into `out`. Whatever goes wrong comes out as something that is not
    /// smaller.
    pub fn encode(&mut self, codec: Codec, parts: &[&[u8]], out: &mut Vec<u8>) {
        let raw = match parts {
            [one] => one,
            many => {
                self.gathered.clear();
                many.iter().for_each(|part| self.gathered.extend_from_slice(part));
                &*self.gathered
            }
        };
        out.clear();
        let written = match codec {
            Codec::Lz4 => {
                out.resize(lz4_flex::block::get_maximum_output_size(raw.len()), 0);
                lz4_flex::block::compress_into(raw, out).ok()
            }
            Codec::Zstd(level) => {
                if self.level != Some(level) {
                    self.level = Some(level);
                    // A level beyond zstd's own bounds is clamped by it; a checksum would guard against
                    // nothing that the connection does not.
                    let _ = self.zstd.set_parameter(CParameter::CompressionLevel(i32::from(level)));
                    let _ = self.zstd.set_parameter(CParameter::ChecksumFlag(false));
                }
                // No larger than what came in: more is of no use, and zstd then stops early.
                out.resize(raw.len(), 0);
                self.zstd.compress2(&mut out[..], raw).ok()
            }
        };
        out.resize(written.unwrap_or(raw.len()), 0);
    }
}

/// Compressed pages that cannot be right.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("compressed pages do not unpack to the {pages} pages that are announced")]
pub struct NotPages {
    /// How many there should be.
    pub pages: usize,
}

/// Undoes what an `Encoder` does; one for each thread.
pub struct Decoder(DCtx<'static>);

impl Default for Decoder {
    fn default() -> Self {
        Self(DCtx::create())
    }
}

impl Decoder {
    /// Fills `into`, exactly. Hostile content costs no more than that.
    pub fn decode(&mut self, codec: Codec, compressed: &[u8], into: &mut [u8]) -> Result<(), NotPages> {
        let written = match codec {
            Codec::Lz4 => lz4_flex::block::decompress_into(compressed, into).ok(),
            Codec::Zstd(_) => self.0.decompress(into, compressed).ok(),
        };
        if written == Some(into.len()) { Ok(()) } else { Err(NotPages { pages: into.len() / PAGE_SIZE }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CODECS: [Codec; 5] = [Codec::Lz4, Codec::Zstd(-5), Codec::Zstd(1), Codec::Zstd(3), Codec::Zstd(9)];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(50))]

        #[test]
        fn decode_undoes_encode(bytes in prop::collection::vec(0u8..5, 1..9000), cut in 0usize..9000) {
            let (mut encoder, mut decoder, mut compressed) = (Encoder::default(), Decoder::default(), vec![]);
            let (a, b) = bytes.split_at(cut.min(bytes.len()));
            for codec in CODECS {
                encoder.encode(codec, &[a, b], &mut compressed);
                if compressed.len() >= bytes.len() {
                    continue;
                }
                let mut back = vec![0; bytes.len()];
                prop_assert_eq!(decoder.decode(codec, &compressed, &mut back), Ok(()));
                prop_assert!(back == bytes);
                let mut long = vec![0; bytes.len() + 1];
                prop_assert!(decoder.decode(codec, &compressed, &mut long).is_err());
                prop_assert!(decoder.decode(codec, &compressed, &mut back[1..]).is_err());
                let truncated = decoder.decode(codec, &compressed[..compressed.len() - 1], &mut back);
                prop_assert!(truncated.is_err());
            }
        }

        #[test]
        fn hostile_bytes_are_refused_without_harm(bytes: Vec<u8>, length in 0usize..9000) {
            for codec in CODECS {
                let mut into = vec![0; length];
                let _ = Decoder::default().decode(codec, &bytes, &mut into);
            }
        }
    }

    #[test]
    fn noise_comes_out_as_something_that_is_not_smaller() {
        let noise: Vec<u8> = blake3::Hasher::new().finalize_xof().take_vec(8192);
        for codec in CODECS {
            let mut compressed = vec![];
            Encoder::default().encode(codec, &[&noise], &mut compressed);
            assert!(compressed.len() >= noise.len(), "{codec:?}");
        }
    }

    trait TakeVec {
        fn take_vec(&mut self, n: usize) -> Vec<u8>;
    }

    impl TakeVec for blake3::OutputReader {
        fn take_vec(&mut self, n: usize) -> Vec<u8> {
            let mut bytes = vec![0; n];
            self.fill(&mut bytes);
            bytes
        }
    }
}
