//! The kernel command line: which of its words are ours and what they ask for.
//!
//! ```text
//! whimbrel.idle                             nothing but the heartbeat (the default)
//! whimbrel.check=SIZE[,rate=R][,threads=N]  self-checking records, rewritten (at 32 MiB/s) and verified
//! whimbrel.dirty=SIZE[,rate=R][,pattern=sequential|random|hot-cold][,content=C][,rewrite=new|same]
//!                    [,threads=N][,cpu=N]
//! whimbrel.fill=SIZE[,content=C]            filled once, and verified when asked
//! whimbrel.disk=NAME[,set=SIZE][,rate=R][,direct=on|off|both]
//! whimbrel.page-cache=NAME,set=SIZE         a disk read through the page cache, and verified when asked
//! whimbrel.redis=SIZE                       a Redis server with so many bytes of records, and a client
//! whimbrel.compile=SIZE                     processes and files as of a compiler, with so large sources
//! whimbrel.compute[=THREADS][,cpu=N]        numbers and nothing else: no memory is written
//! whimbrel.probe[=SIZE][,cpu=N]             a page not written lately each millisecond, and its time
//! whimbrel.echo=PORT  whimbrel.control=PORT
//! whimbrel.agent=NAME                       answers on the virtio port of this name, a line for a line
//! whimbrel.ip=A.B.C.D/LEN  whimbrel.gw=A.B.C.D
//! whimbrel.beat=1000ms  whimbrel.tick=1ms
//!
//! SIZE  64M, 1GiB …   (set=SIZE says the same)
//! cpu=N on this vCPU alone, from 0 on
//! R     20M (bytes/s), 5000p (pages/s) or max
//! C     random, text, zero, word (one changed word a page), repeat (one of 64 pages of random numbers)
//!       or 40% (so much of each page random, the rest text)
//! ```

use crate::content::Content;
use std::{collections::BTreeSet, net::Ipv4Addr, time::Duration};
use units::{Bytes, PAGE_SIZE};

/// What `check` rewrites when nothing is said: enough to catch a lost write soon, little enough that a
/// migration of an emulated guest converges on two cores. Chosen by hand in the demo.
const CHECK_RATE: u64 = 32 << 20;

/// What `probe` goes round when nothing is said: at a page a millisecond it comes back after eight seconds,
/// when a migration has sent the page and watches it again.
const PROBE_SET: Bytes = Bytes(32 << 20);

/// All that a guest was asked to do.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Wish {
    pub(crate) check: Option<Check>,
    pub(crate) dirty: Option<Dirty>,
    pub(crate) fill: Option<Fill>,
    pub(crate) disk: Option<Disk>,
    pub(crate) page_cache: Option<PageCache>,
    pub(crate) redis: Option<Redis>,
    pub(crate) compile: Option<Compile>,
    pub(crate) compute: Option<Compute>,
    pub(crate) probe: Option<Probe>,
    pub(crate) echo: Option<u16>,
    pub(crate) control: Option<u16>,
    /// The name of a virtio port.
    pub(crate) agent: Option<String>,
    pub(crate) ip: Option<(Ipv4Addr, u8)>,
    pub(crate) gateway: Option<Ipv4Addr>,
    pub(crate) beat: Duration,
    pub(crate) tick: Duration,
}

impl Default for Wish {
    fn default() -> Self {
        Self {
            check: None,
            dirty: None,
            fill: None,
            disk: None,
            page_cache: None,
            redis: None,
            compile: None,
            compute: None,
            probe: None,
            echo: None,
            control: None,
            agent: None,
            ip: None,
            gateway: None,
            beat: Duration::from_secs(1),
            // Fine enough to see pauses that a person or a TCP connection would.
            tick: Duration::from_millis(1),
        }
    }
}

/// Pages a second; `None` is as fast as it goes.
pub(crate) type PageRate = Option<u64>;

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Check {
    pub(crate) set: Bytes,
    pub(crate) rate: PageRate,
    /// `None`: as many as there are vCPUs.
    pub(crate) threads: Option<usize>,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Dirty {
    pub(crate) set: Bytes,
    pub(crate) rate: PageRate,
    pub(crate) pattern: Pattern,
    pub(crate) content: Content,
    /// Whether a page is written with what is in it already.
    pub(crate) same: bool,
    pub(crate) threads: usize,
    pub(crate) cpu: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Pattern {
    Sequential,
    Random,
    /// Nine writes in ten go to the first tenth of the pages.
    HotCold,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Fill {
    pub(crate) set: Bytes,
    pub(crate) content: Content,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct PageCache {
    /// The block device's name under `/dev`.
    pub(crate) name: String,
    pub(crate) set: Bytes,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Redis {
    pub(crate) set: Bytes,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Compile {
    pub(crate) set: Bytes,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Compute {
    pub(crate) threads: usize,
    pub(crate) cpu: Option<usize>,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Probe {
    pub(crate) set: Bytes,
    pub(crate) cpu: Option<usize>,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Disk {
    /// The block device's name under `/dev`.
    pub(crate) name: String,
    pub(crate) set: Bytes,
    pub(crate) rate: PageRate,
    pub(crate) through: Through,
}

/// Which way a disk is read and written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Through {
    /// The guest's page cache.
    Cache,
    /// `O_DIRECT`.
    Direct,
    /// Written through one, read through the other, in turns.
    Both,
}

impl Wish {
    /// Reads `/proc/cmdline`; a failure lists every bad word.
    pub(crate) fn from_command_line(line: &str) -> Result<Self, Vec<String>> {
        let mut wish = Self::default();
        let mut wrong = Vec::new();
        let mut seen = BTreeSet::new();
        for word in line.split_whitespace() {
            let Some(ours) = word.strip_prefix("whimbrel.") else { continue };
            let (name, value) = ours.split_once('=').unwrap_or((ours, ""));
            let understood = if seen.insert(name) {
                wish.understand(name, value)
            } else {
                Err("is there twice".to_owned())
            };
            if let Err(why) = understood {
                wrong.push(format!("bad word \"{word}\": {why}"));
            }
        }
        if wish.gateway.is_some() && wish.ip.is_none() {
            wrong.push("whimbrel.gw without whimbrel.ip".to_owned());
        }
        if wrong.is_empty() { Ok(wish) } else { Err(wrong) }
    }

    fn understand(&mut self, name: &str, value: &str) -> Result<(), String> {
        match name {
            "idle" if value.is_empty() => {}
            "idle" => return Err("idle takes no value".to_owned()),
            "check" => {
                let mut o = Options::of(value, "set", &["rate", "threads"])?;
                self.check = Some(Check {
                    set: o.need("set", size)?,
                    rate: o.take("rate", rate)?.unwrap_or(Some(CHECK_RATE / PAGE_SIZE as u64)),
                    threads: o.take("threads", threads)?,
                });
            }
            "dirty" => {
                let others = ["rate", "pattern", "content", "rewrite", "threads", "cpu"];
                let mut o = Options::of(value, "set", &others)?;
                self.dirty = Some(Dirty {
                    set: o.need("set", size)?,
                    rate: o.take("rate", rate)?.unwrap_or(None),
                    pattern: o.take("pattern", pattern)?.unwrap_or(Pattern::Random),
                    content: o.take("content", Content::parse)?.unwrap_or(Content::Random),
                    same: o.take("rewrite", same)?.unwrap_or(false),
                    threads: o.take("threads", threads)?.unwrap_or(1),
                    cpu: o.take("cpu", cpu)?,
                });
            }
            "fill" => {
                let mut o = Options::of(value, "set", &["content"])?;
                let content = o.take("content", Content::parse)?.unwrap_or(Content::Random);
                if content == Content::Word {
                    return Err(
                        "content=word changes what is there; fill needs content of its own".to_owned()
                    );
                }
                self.fill = Some(Fill { set: o.need("set", size)?, content });
            }
            "disk" => {
                let mut o = Options::of(value, "name", &["set", "rate", "direct"])?;
                self.disk = Some(Disk {
                    name: o.need("name", device)?,
                    set: o.take("set", size)?.unwrap_or(Bytes(4 << 20)),
                    rate: o.take("rate", rate)?.unwrap_or(Some(256)),
                    through: o.take("direct", through)?.unwrap_or(Through::Both),
                });
            }
            "page-cache" => {
                let mut o = Options::of(value, "name", &["set"])?;
                self.page_cache =
                    Some(PageCache { name: o.need("name", device)?, set: o.need("set", size)? });
            }
            "redis" => self.redis = Some(Redis { set: Options::of(value, "set", &[])?.need("set", size)? }),
            "compile" => {
                self.compile = Some(Compile { set: Options::of(value, "set", &[])?.need("set", size)? });
            }
            "compute" => {
                let mut o = Options::of(value, "threads", &["cpu"])?;
                let threads = o.take("threads", threads)?.unwrap_or(1);
                self.compute = Some(Compute { threads, cpu: o.take("cpu", cpu)? });
            }
            "probe" => {
                let mut o = Options::of(value, "set", &["cpu"])?;
                let set = o.take("set", size)?.unwrap_or(PROBE_SET);
                self.probe = Some(Probe { set, cpu: o.take("cpu", cpu)? });
            }
            "echo" => self.echo = Some(port(value)?),
            "control" => self.control = Some(port(value)?),
            "agent" if value.is_empty() => return Err("a virtio port's name".to_owned()),
            "agent" => self.agent = Some(value.to_owned()),
            "ip" => {
                let (ip, bits) = value.split_once('/').ok_or("an address looks like 10.0.0.5/24")?;
                let bits = bits.parse().ok().filter(|&n| n <= 32).ok_or("its prefix is 0 to 32 bits long")?;
                self.ip = Some((address(ip)?, bits));
            }
            "gw" => self.gateway = Some(address(value)?),
            "beat" => self.beat = milliseconds(value, 10)?,
            "tick" => self.tick = milliseconds(value, 1)?,
            _ => {
                return Err(
                    "unknown; there are idle, check, dirty, fill, disk, page-cache, redis, compile, compute, \
                     probe, echo, control, agent, ip, gw, beat, tick"
                        .to_owned(),
                );
            }
        }
        Ok(())
    }
}

/// `64M,rate=20M,threads=2`: what has no name is the `first`. Nothing at all is no options.
struct Options<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Options<'a> {
    fn of(value: &'a str, first: &'a str, others: &[&str]) -> Result<Self, String> {
        let mut found: Vec<(&str, &str)> = Vec::new();
        for (place, part) in value.split(',').filter(|_| !value.is_empty()).enumerate() {
            let (key, value) = match part.split_once('=') {
                Some(pair) => pair,
                None if place == 0 => (first, part),
                None => return Err(format!("\"{part}\" is not option=value")),
            };
            if key != first && !others.contains(&key) {
                return Err(format!("no option \"{key}\"; there are {first}, {}", others.join(", ")));
            }
            if found.iter().any(|(k, _)| *k == key) {
                return Err(format!("{key} is there twice"));
            }
            found.push((key, value));
        }
        Ok(Self(found))
    }

    fn take<T>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Option<T>, String> {
        let value = self.0.iter().find(|(k, _)| *k == key).map(|(_, v)| *v);
        value.map(|v| parse(v).map_err(|why| format!("{key}={v}: {why}"))).transpose()
    }

    fn need<T>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<T, String> {
        self.take(key, parse)?.ok_or_else(|| format!("{key} is missing"))
    }
}

fn size(text: &str) -> Result<Bytes, String> {
    let bytes: Bytes = text.parse().map_err(|e| format!("{e}"))?;
    if bytes.0 < PAGE_SIZE as u64 { Err("less than a page".to_owned()) } else { Ok(bytes) }
}

fn rate(text: &str) -> Result<PageRate, String> {
    if text == "max" {
        return Ok(None);
    }
    let pages = match text.strip_suffix('p') {
        Some(pages) => pages.parse().map_err(|_| "not a number of pages".to_owned())?,
        None => text.parse::<Bytes>().map_err(|e| format!("{e}"))?.0.div_ceil(PAGE_SIZE as u64),
    };
    if pages == 0 {
        Err("nothing at all; leave the workload out instead".to_owned())
    } else {
        Ok(Some(pages))
    }
}

fn pattern(text: &str) -> Result<Pattern, String> {
    match text {
        "sequential" => Ok(Pattern::Sequential),
        "random" => Ok(Pattern::Random),
        "hot-cold" => Ok(Pattern::HotCold),
        _ => Err("there are sequential, random, hot-cold".to_owned()),
    }
}

fn same(text: &str) -> Result<bool, String> {
    match text {
        "new" => Ok(false),
        "same" => Ok(true),
        _ => Err("there are new, same".to_owned()),
    }
}

fn through(text: &str) -> Result<Through, String> {
    match text {
        "off" => Ok(Through::Cache),
        "on" => Ok(Through::Direct),
        "both" => Ok(Through::Both),
        _ => Err("there are on, off, both".to_owned()),
    }
}

fn threads(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| (1..=64).contains(n)).ok_or_else(|| "1 to 64 threads".to_owned())
}

fn cpu(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n < 64).ok_or_else(|| "a vCPU is 0 to 63".to_owned())
}

fn device(text: &str) -> Result<String, String> {
    let plain = !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric());
    if plain { Ok(text.to_owned()) } else { Err("a block device's name, like vda".to_owned()) }
}

fn port(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|&p| p > 0).ok_or_else(|| "a TCP port is 1 to 65535".to_owned())
}

fn address(text: &str) -> Result<Ipv4Addr, String> {
    text.parse().map_err(|_| format!("\"{text}\" is not an IPv4 address"))
}

fn milliseconds(text: &str, least: u64) -> Result<Duration, String> {
    let number = text.strip_suffix("ms").unwrap_or(text);
    let ms = number.parse().ok().filter(|ms| (least..=3_600_000).contains(ms));
    ms.map(Duration::from_millis).ok_or_else(|| format!("{least}ms to an hour, in milliseconds"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_others_are_not_ours() {
        let wish = Wish::from_command_line("console=ttyS0 quiet panic=-1 whimbrel.idle\n").unwrap();
        assert_eq!(wish, Wish::default());
    }

    #[test]
    fn workloads_combine() {
        let wish = Wish::from_command_line(
            "whimbrel.check=64M \
             whimbrel.dirty=set=32M,rate=20M,pattern=hot-cold,content=text,rewrite=same,threads=2,cpu=0 \
             whimbrel.fill=8MiB,content=40% whimbrel.disk=vda,direct=on whimbrel.compute=2,cpu=1 \
             whimbrel.probe whimbrel.echo=7 whimbrel.control=8 whimbrel.ip=10.0.0.5/24 whimbrel.gw=10.0.0.1 \
             whimbrel.beat=200ms whimbrel.tick=4ms",
        )
        .unwrap();
        let check = wish.check.unwrap();
        assert_eq!((check.set, check.rate, check.threads), (Bytes(64 << 20), Some(8192), None));
        let dirty = wish.dirty.unwrap();
        assert_eq!((dirty.set, dirty.rate), (Bytes(32 << 20), Some(5120)));
        assert_eq!((dirty.threads, dirty.cpu), (2, Some(0)));
        assert_eq!((dirty.pattern, dirty.content, dirty.same), (Pattern::HotCold, Content::Text, true));
        assert_eq!(wish.fill.unwrap().content, Content::Mixed { random_percent: 40 });
        assert_eq!(wish.disk.unwrap().through, Through::Direct);
        assert_eq!(wish.compute, Some(Compute { threads: 2, cpu: Some(1) }));
        assert_eq!(wish.probe, Some(Probe { set: PROBE_SET, cpu: None }));
        assert_eq!((wish.echo, wish.control), (Some(7), Some(8)));
        assert_eq!(wish.ip, Some((Ipv4Addr::new(10, 0, 0, 5), 24)));
        assert_eq!((wish.beat, wish.tick), (Duration::from_millis(200), Duration::from_millis(4)));
    }

    #[test]
    fn a_rate_is_bytes_pages_or_no_limit() {
        for (text, pages) in [("4K", Some(1)), ("5000p", Some(5000)), ("20M", Some(5120)), ("max", None)] {
            assert_eq!(rate(text), Ok(pages), "{text}");
        }
    }

    #[test]
    fn every_bad_word_is_named() {
        let bad = [
            "whimbrel.chekc=64M",
            "whimbrel.check",
            "whimbrel.dirty=64M,speed=3",
            "whimbrel.page-cache=vda",
            "whimbrel.redis=64M,rate=3",
            "whimbrel.fill=64M,content=word",
            "whimbrel.disk=../etc",
            "whimbrel.compute=0",
            "whimbrel.probe=32M,cpu=64",
            "whimbrel.ip=10.0.0.5",
            "whimbrel.echo=0",
            "whimbrel.agent=",
            "whimbrel.beat=5ms",
            "whimbrel.tick=0ms",
            "whimbrel.idle=1",
        ];
        let wrong = Wish::from_command_line(&bad.join(" ")).unwrap_err();
        assert_eq!(wrong.len(), bad.len(), "{wrong:#?}");
        for (word, complaint) in bad.iter().zip(&wrong) {
            assert!(complaint.contains(word), "{complaint} names {word}");
        }
        let twice = Wish::from_command_line("whimbrel.echo=7 whimbrel.echo=8").unwrap_err();
        assert!(twice[0].contains("twice"), "{twice:?}");
    }
}
