//! Who is compared.

use serde_json::{Value, json};

/// One way of moving a guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Contender {
    /// Its name in options, tables and files.
    pub(crate) name: &'static str,
    pub(crate) way: Way,
}

/// By whom, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    /// Whimbrel, in this mode, with this `--compress`.
    Whimbrel { mode: &'static str, compress: &'static str },
    /// QEMU's own migration.
    Qemu(Qemu),
    /// Nobody: as many bytes go from a memory file through the link into another.
    Copy,
}

/// QEMU's own migration, with the best settings that it has here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Qemu {
    pub(crate) capability: Option<&'static str>,
    /// Connections of multifd: one a processor pays here, more do not.
    pub(crate) channels: u32,
    pub(crate) zstd: bool,
    /// The guest moves after the first round.
    pub(crate) post_copy: bool,
}

/// xbzrle keeps older versions of this many bytes of pages: all that a guest of the bench writes again.
const XBZRLE_CACHE: u64 = 512 << 20;

/// The name of the one who moves bytes and no guest.
pub(crate) const COPY: &str = "plain-copy";

const fn qemu(name: &'static str, capability: Option<&'static str>) -> Contender {
    let qemu = Qemu { capability, channels: 0, zstd: false, post_copy: false };
    Contender { name, way: Way::Qemu(qemu) }
}

const fn multifd(name: &'static str, zstd: bool) -> Contender {
    let qemu = Qemu { capability: Some("multifd"), channels: 2, zstd, post_copy: false };
    Contender { name, way: Way::Qemu(qemu) }
}

const fn whimbrel(name: &'static str, mode: &'static str, compress: &'static str) -> Contender {
    Contender { name, way: Way::Whimbrel { mode, compress } }
}

impl Contender {
    /// All, in the order in which they take turns.
    pub(crate) const ALL: [Self; 11] = [
        whimbrel("whimbrel-pre-copy", "pre-copy", "auto"),
        qemu("qemu-pre-copy", None),
        whimbrel("whimbrel-uncompressed", "pre-copy", "none"),
        multifd("qemu-multifd", false),
        Self { name: COPY, way: Way::Copy },
        multifd("qemu-multifd-zstd", true),
        whimbrel("whimbrel-hybrid", "hybrid", "auto"),
        qemu("qemu-xbzrle", Some("xbzrle")),
        whimbrel("whimbrel-post-copy", "post-copy", "auto"),
        qemu("qemu-auto-converge", Some("auto-converge")),
        Self {
            name: "qemu-post-copy",
            way: Way::Qemu(Qemu {
                capability: Some("postcopy-ram"),
                channels: 0,
                zstd: false,
                post_copy: true,
            }),
        },
    ];

    pub(crate) fn is_qemu(self) -> bool {
        matches!(self.way, Way::Qemu(_))
    }

    /// Multifd with zstd.
    pub(crate) fn is_zstd_qemu(self) -> bool {
        matches!(self.way, Way::Qemu(qemu) if qemu.zstd)
    }

    /// One of QEMU's that sends pages as they are: neither compressed nor as what differs.
    pub(crate) fn is_plain_qemu(self) -> bool {
        matches!(self.way, Way::Qemu(qemu) if !qemu.zstd && qemu.capability != Some("xbzrle"))
    }
}

impl Qemu {
    /// What of QEMU's capabilities is on and off: all that any contender changes.
    pub(crate) fn capabilities(self) -> Value {
        let of = |name: &str| json!({"capability": name, "state": self.capability == Some(name)});
        let mut all = vec![json!({"capability": "events", "state": true})];
        all.extend(["multifd", "xbzrle", "auto-converge", "postcopy-ram"].map(of));
        Value::Array(all)
    }

    /// Its parameters: no cap on the bandwidth, the same limit for the downtime as everybody's.
    pub(crate) fn parameters(self, downtime_ms: u64) -> Value {
        let mut all =
            json!({"max-bandwidth": 1_u64 << 40, "max-postcopy-bandwidth": 0, "downtime-limit": downtime_ms});
        if self.channels > 0 {
            all["multifd-channels"] = self.channels.into();
            all["multifd-compression"] = if self.zstd { "zstd" } else { "none" }.into();
        }
        if self.capability == Some("xbzrle") {
            all["xbzrle-cache-size"] = XBZRLE_CACHE.into();
        }
        all
    }
}
