//! What guests do while they are moved, and who is to move them.

use crate::link::Link;
use units::Bytes;

/// A guest's RAM where its workload needs no more.
pub(crate) const MEMORY: Bytes = Bytes(1 << 30);
/// The RAM of a larger guest.
const TWICE: Bytes = Bytes(2 << 30);
/// How much of this machine's own files a guest reads into its page cache.
pub(crate) const FILES: Bytes = Bytes(640 << 20);

/// Something that a guest does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Workload {
    /// Its name in options, tables and files.
    pub(crate) name: &'static str,
    /// What it is, for people.
    pub(crate) what: &'static str,
    /// The words of the guest's kernel command line, where the link is 1 Gbit/s and where it is not shaped.
    words: [&'static str; 2],
    /// The guest's RAM.
    pub(crate) memory: Bytes,
    /// What it has beside that.
    pub(crate) with: With,
    /// Whether it is about a guest that outruns the link, which is then a shaped one.
    pub(crate) outruns: bool,
    /// The longest pause that anybody may plan.
    pub(crate) downtime_ms: u64,
    /// Who moves it.
    usually: &'static [&'static str],
    /// Who does so too, with `--all`.
    also: &'static [&'static str],
}

/// How closely a guest is watched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pulse {
    /// It sends a datagram at every other tick.
    pub(crate) tick_ms: u64,
    /// A client asks it so often; what that sees is no finer.
    pub(crate) client_ms: u64,
}

/// What a guest has beside its RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum With {
    Nothing,
    /// A disk full of files.
    Files,
    /// A Redis server in its initramfs.
    Redis,
}

/// QEMU's limit where nobody says another.
const DOWNTIME_MS: u64 = 300;

const SIMPLE: &[&str] = &["whimbrel-pre-copy", "qemu-pre-copy", "qemu-multifd", "qemu-multifd-zstd"];
const REST: &[&str] = &["whimbrel-hybrid", "whimbrel-post-copy", "qemu-xbzrle", "qemu-post-copy"];

/// What those are moved by whose guest outruns the link.
const OUTRUN: &[&str] = &["whimbrel-pre-copy", "qemu-auto-converge", "qemu-post-copy"];
/// What whimbrel plans where nobody says otherwise.
const SHORT_MS: u64 = 20;

const PLAIN: Workload = Workload {
    name: "",
    what: "",
    words: [""; 2],
    memory: MEMORY,
    with: With::Nothing,
    outruns: false,
    downtime_ms: DOWNTIME_MS,
    usually: SIMPLE,
    also: REST,
};

/// A guest whose first vCPU outruns the link, while its second computes and probes. Most of its memory is
/// random numbers.
const fn outruns(name: &'static str, what: &'static str, words: &'static str, memory: Bytes) -> Workload {
    let words = [words; 2];
    Workload {
        name,
        what,
        words,
        memory,
        outruns: true,
        downtime_ms: SHORT_MS,
        usually: &[],
        also: OUTRUN,
        ..PLAIN
    }
}

/// The words of such a guest: so many MiB filled, so many written, in this pattern, at so many million bytes
/// a second.
macro_rules! outrunning {
    ($fill:literal, $set:literal, $pattern:literal, $rate:literal) => {
        concat!(
            "whimbrel.fill=",
            $fill,
            "M whimbrel.dirty=",
            $set,
            "M,content=random,pattern=",
            $pattern,
            ",rate=",
            $rate,
            "000000,cpu=0 whimbrel.compute=cpu=1 whimbrel.probe=32M,cpu=1"
        )
    };
}

impl Workload {
    /// All, in the order in which they are measured.
    pub(crate) const ALL: [Self; 20] = [
        Self { name: "idle", what: "freshly booted, and nothing else", words: ["whimbrel.idle"; 2], ..PLAIN },
        Self {
            name: "page-cache",
            what: "640 MiB of this machine's /usr in the page cache, 16 MiB/s of them read again",
            words: ["whimbrel.page-cache=vda,set=640M"; 2],
            with: With::Files,
            ..PLAIN
        },
        Self {
            name: "compressible",
            what: "512 MiB like log files",
            words: ["whimbrel.fill=512M,content=text"; 2],
            ..PLAIN
        },
        Self {
            name: "incompressible",
            what: "512 MiB of random numbers",
            words: ["whimbrel.fill=512M,content=random"; 2],
            usually: &[
                "whimbrel-pre-copy",
                "whimbrel-uncompressed",
                "plain-copy",
                "qemu-pre-copy",
                "qemu-multifd",
            ],
            also: &["whimbrel-hybrid", "whimbrel-post-copy", "qemu-multifd-zstd", "qemu-post-copy"],
            ..PLAIN
        },
        Self {
            name: "duplicate",
            what: "512 MiB of 64 different pages of random numbers, over and over",
            words: ["whimbrel.fill=512M,content=repeat"; 2],
            ..PLAIN
        },
        Self {
            name: "rewritten",
            what: "192 MiB, 40 % of it random, written again and again with what is there",
            words: [
                "whimbrel.dirty=192M,content=40%,pattern=sequential,rewrite=same,rate=96M",
                "whimbrel.dirty=192M,content=40%,pattern=sequential,rewrite=same,rate=max",
            ],
            usually: &["whimbrel-pre-copy", "qemu-pre-copy", "qemu-xbzrle", "qemu-multifd-zstd"],
            also: &["whimbrel-hybrid", "qemu-multifd", "qemu-auto-converge", "qemu-post-copy"],
            ..PLAIN
        },
        Self {
            name: "redis",
            what: "Debian's Redis with 128 MiB of session records, a client that reads four and replaces one \
                   of each five",
            words: ["whimbrel.redis=128M"; 2],
            with: With::Redis,
            also: &["whimbrel-hybrid", "qemu-xbzrle", "qemu-auto-converge", "qemu-post-copy"],
            ..PLAIN
        },
        Self {
            name: "compile",
            what: "compilers on both vCPUs: short processes, small objects in large heaps, files written and \
                   thrown away",
            words: ["whimbrel.compile=64M"; 2],
            also: &["whimbrel-hybrid", "qemu-xbzrle", "qemu-auto-converge", "qemu-post-copy"],
            ..PLAIN
        },
        Self {
            name: "hot-under",
            what: "400 MiB, a tenth of them hot, written at a third of the link's rate (unshaped: at 100 \
                   MiB/s)",
            words: [
                "whimbrel.dirty=400M,content=40%,pattern=hot-cold,rate=40M",
                "whimbrel.dirty=400M,content=40%,pattern=hot-cold,rate=100M",
            ],
            usually: &["whimbrel-pre-copy", "qemu-pre-copy", "qemu-multifd-zstd", "qemu-post-copy"],
            also: &[
                "whimbrel-hybrid",
                "whimbrel-post-copy",
                "qemu-multifd",
                "qemu-xbzrle",
                "qemu-auto-converge",
            ],
            ..PLAIN
        },
        Self {
            name: "hot-over",
            what: "600 MiB, a tenth of them hot, written at nearly twice the link's rate (unshaped: as fast \
                   as two vCPUs can)",
            words: [
                "whimbrel.dirty=600M,content=random,pattern=hot-cold,rate=200M,threads=2",
                "whimbrel.dirty=600M,content=random,pattern=hot-cold,rate=max,threads=2",
            ],
            usually: &["whimbrel-pre-copy", "whimbrel-hybrid", "qemu-auto-converge", "qemu-post-copy"],
            also: &["whimbrel-post-copy", "qemu-pre-copy", "qemu-multifd-zstd", "qemu-xbzrle"],
            ..PLAIN
        },
        Self {
            name: "steady",
            what: "memory to carry, self-checking records, 40 MiB/s of writes; nobody may plan a pause above \
                   20 ms",
            words: ["whimbrel.fill=300M,content=40% whimbrel.check=96M,rate=8M whimbrel.dirty=256M,rate=32M";
                2],
            downtime_ms: SHORT_MS,
            usually: &[],
            also: &[
                "whimbrel-pre-copy",
                "whimbrel-post-copy",
                "whimbrel-hybrid",
                "qemu-pre-copy",
                "qemu-multifd",
            ],
            ..PLAIN
        },
        outruns(
            "over-1.2",
            "640 MiB written in random order at 1.2 times the link's rate; another vCPU computes",
            outrunning!(160, 640, "random", 150),
            MEMORY,
        ),
        outruns(
            "over-2",
            "640 MiB written in random order at twice the link's rate; another vCPU computes",
            outrunning!(160, 640, "random", 250),
            MEMORY,
        ),
        outruns(
            "over-5",
            "640 MiB written in random order at five times the link's rate; another vCPU computes",
            outrunning!(160, 640, "random", 625),
            MEMORY,
        ),
        outruns(
            "over-1.2-hot",
            "640 MiB, a tenth of them hot, written at 1.2 times the link's rate; another vCPU computes",
            outrunning!(160, 640, "hot-cold", 150),
            MEMORY,
        ),
        outruns(
            "over-2-hot",
            "640 MiB, a tenth of them hot, written at twice the link's rate; another vCPU computes",
            outrunning!(160, 640, "hot-cold", 250),
            MEMORY,
        ),
        outruns(
            "over-5-hot",
            "640 MiB, a tenth of them hot, written at five times the link's rate; another vCPU computes",
            outrunning!(160, 640, "hot-cold", 625),
            MEMORY,
        ),
        outruns(
            "over-1.2-2g",
            "as over-1.2, with 2 GiB of RAM and 1400 MiB written",
            outrunning!(320, 1400, "random", 150),
            TWICE,
        ),
        outruns(
            "over-2-2g",
            "as over-2, with 2 GiB of RAM and 1400 MiB written",
            outrunning!(320, 1400, "random", 250),
            TWICE,
        ),
        outruns(
            "over-5-2g",
            "as over-5, with 2 GiB of RAM and 1400 MiB written",
            outrunning!(320, 1400, "random", 625),
            TWICE,
        ),
    ];

    /// The words of the guest's kernel command line.
    pub(crate) fn words(&self, link: Link) -> &'static str {
        self.words[usize::from(link == Link::Unshaped)]
    }

    /// How often the guest shows that it is alive, and its client asks, in milliseconds. To be seen so
    /// closely costs an emulated guest a good part of a processor, so it is only where pauses are short.
    pub(crate) fn pulse(&self) -> Pulse {
        if self.outruns {
            // What its second vCPU computes is measured.
            Pulse { tick_ms: 2, client_ms: 20 }
        } else if self.downtime_ms < DOWNTIME_MS {
            Pulse { tick_ms: 1, client_ms: 2 }
        } else {
            Pulse { tick_ms: 4, client_ms: 20 }
        }
    }

    /// The names of those who move it.
    pub(crate) fn movers(&self, all: bool) -> Vec<&'static str> {
        let also = if all { self.also } else { &[] };
        self.usually.iter().chain(also).copied().collect()
    }

    /// Whether it is measured where nothing else is asked for.
    pub(crate) fn is_usual(&self) -> bool {
        !self.usually.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contender::Contender;

    #[test]
    fn every_mover_exists_once() {
        for workload in Workload::ALL {
            let names = workload.movers(true);
            for (i, name) in names.iter().enumerate() {
                assert!(Contender::ALL.iter().any(|c| c.name == *name), "{}: {name}", workload.name);
                assert!(!names[..i].contains(name), "{}: {name} twice", workload.name);
            }
            assert!(!workload.what.is_empty() && !workload.words.contains(&""), "{}", workload.name);
        }
    }
}
