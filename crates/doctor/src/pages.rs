//! The guest's memory: whether its writes are seen, and whether its missing pages can be served.

use crate::{
    Check, Feature, Status,
    diagnosis::{BOTH, POST_COPY, PRE_COPY, not_tried},
};
use std::{fs, io, ops::Range, thread, time::Duration};
use sys::{
    pagemap::Pagemap,
    patient::{PAGES, Patient, page},
    uffd::{self, Copied, Features, Watch},
};
use units::PAGE_SIZE;

const USERFAULTFD: (&str, &[Feature]) = ("userfaultfd", BOTH);
const FEATURES: (&str, &[Feature]) = ("write-protection", PRE_COPY);
const TRACKING: (&str, &[Feature]) = ("dirty-tracking", PRE_COPY);
const MISSING: (&str, &[Feature]) = ("missing-pages", POST_COPY);
const HUGE: (&str, &[Feature]) = ("shmem-huge-pages", POST_COPY);

/// What tracking asks of the kernel, with the first Linux that has it.
const NEEDED: [Asked; 2] =
    [("write protection", Features::WP, "5.7"), ("of shared memory", Features::WP_SHMEM, "5.19")];
/// Without these only the synchronous tracker is there.
const FOR_ASYNCHRONOUS: [Asked; 2] =
    [("of unpopulated pages", Features::WP_UNPOPULATED, "6.4"), ("asynchronous", Features::WP_ASYNC, "6.7")];
type Asked = (&'static str, Features, &'static str);
const NEWER: &str = "boot a newer kernel, built with CONFIG_USERFAULTFD";
/// How long a fault may take to reach us: it takes 20 µs.
const PATIENCE: Duration = Duration::from_secs(10);
/// What mends a machine on which nobody can be waited for any longer.
const BUSY: &str = "try again when the machine is less busy";

/// `userfaultfd`, the features of both ways, `dirty-tracking`, `missing-pages`, `shmem-huge-pages`.
pub(crate) fn checks(patient: &io::Result<Patient>) -> Vec<Check> {
    let patient = match patient {
        Ok(patient) => patient,
        Err(e) => return not_tried(&e.to_string(), &[USERFAULTFD, FEATURES, TRACKING, MISSING, HUGE]),
    };
    let mut checks = vec![right(patient)];
    if checks[0].status == Status::Fail {
        checks.extend(not_tried("no userfaultfd", &[FEATURES, TRACKING, MISSING]));
    } else {
        checks.push(tracking_features(patient));
        checks.extend(match checks[1].status {
            Status::Fail => not_tried("write protection lacks what it needs", &[TRACKING]),
            Status::Warn => vec![hearing(patient)],
            Status::Ok => vec![dirty_tracking(patient)],
        });
        checks.push(missing_pages(patient));
    }
    checks.push(huge_pages(patient));
    checks
}

/// What mends a failure: nothing of the kernel's where it was only late.
fn remedy<'a>(error: &io::Error, usual: &'a str) -> &'a str {
    if error.kind() == io::ErrorKind::TimedOut { BUSY } else { usual }
}

fn late(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, text)
}

/// The right to a userfaultfd, also for faults in the kernel, as vCPUs have them.
fn right(patient: &Patient) -> Check {
    match patient.uffd(Features::NONE) {
        // Only to say which way it was: asking for one for ourselves is refused where the device is the way.
        Ok(_) if uffd::supported().is_ok() => Check::ok(USERFAULTFD.0, BOTH, "made in another process"),
        Ok(_) => Check::ok(USERFAULTFD.0, BOTH, "made in another process through /dev/userfaultfd"),
        Err(e) => Check::fail(
            USERFAULTFD.0,
            BOTH,
            format!("cannot be made in another process: {e}"),
            remedy(
                &e,
                "run as root, or give the agent the device: chmod 0660 /dev/userfaultfd and its group, or \
             sysctl vm.unprivileged_userfaultfd=1; a kernel without CONFIG_USERFAULTFD cannot",
            ),
        ),
    }
}

/// Asks for each feature with `UFFDIO_API`.
fn tracking_features(patient: &Patient) -> Check {
    let name = FEATURES.0;
    let busy = std::cell::Cell::new(false);
    let missing = |asked: &[Asked]| {
        let lacks = |(what, feature, since): &Asked| {
            let error = patient.uffd(*feature).err()?;
            busy.set(busy.get() || error.kind() == io::ErrorKind::TimedOut);
            Some(format!("{what} (Linux {since}): {error}"))
        };
        asked.iter().filter_map(lacks).collect::<Vec<_>>().join(", ")
    };
    let (needed, wanted) = (missing(&NEEDED), missing(&FOR_ASYNCHRONOUS));
    if busy.get() {
        return Check::fail(name, PRE_COPY, format!("not tried: {needed} {wanted}"), BUSY);
    }
    if !needed.is_empty() {
        return Check::fail(name, PRE_COPY, format!("missing: {needed}"), NEWER);
    }
    if !wanted.is_empty() {
        let found = format!("missing: {wanted}; only the synchronous tracker works");
        let remedy = "boot Linux 6.7 or newer: until then each first write to a group of pages costs a guest \
                      that is being migrated 17 to 42 µs more";
        return Check::warn(name, PRE_COPY, found, remedy);
    }
    let all: Vec<_> = NEEDED.iter().chain(&FOR_ASYNCHRONOUS).map(|(what, ..)| *what).collect();
    Check::ok(name, PRE_COPY, all.join(", "))
}

fn dirty_tracking(patient: &Patient) -> Check {
    match track(patient) {
        Ok(()) => Check::ok(TRACKING.0, PRE_COPY, "PAGEMAP_SCAN reports what was written, and nothing else"),
        Err(e) => Check::fail(
            TRACKING.0,
            PRE_COPY,
            e.to_string(),
            remedy(&e, "boot Linux 6.7 or newer (PAGEMAP_SCAN)"),
        ),
    }
}

/// Writes to two pages of another process under the tracker, one populated and one never touched.
fn track(patient: &Patient) -> io::Result<()> {
    let process = patient.process();
    let ram = patient.map_ram()?;
    let (populated, hole) = (3, PAGES / 2 + 1);
    process.write_memory(address(&ram, populated), b"before")?;

    let uffd =
        patient.uffd(Features::WP | Features::WP_SHMEM | Features::WP_UNPOPULATED | Features::WP_ASYNC)?;
    uffd.register(ram.clone(), Watch::Writes)?;
    uffd.protect(ram.clone())?;
    let mut pagemap = Pagemap::open(process)?;
    let mut expect = |wanted: &[u64], when: &str| {
        let mut seen = Vec::new();
        pagemap.take_written(ram.clone(), |run| {
            seen.extend(
                (run.start..run.end).step_by(PAGE_SIZE).map(|at| (at - ram.start) / PAGE_SIZE as u64),
            );
        })?;
        if seen == wanted {
            return Ok(());
        }
        Err(io::Error::other(format!("{when}, the scan reported pages {seen:?} instead of {wanted:?}")))
    };
    expect(&[], "with nothing written")?;
    for n in [populated, hole] {
        process.write_memory(address(&ram, n), b"after")?;
    }
    expect(&[populated, hole], "with two pages written")?;
    expect(&[], "after they were protected again")?;
    process.write_memory(address(&ram, hole), b"again")?;
    expect(&[hole], "with one page written again")
}

fn hearing(patient: &Patient) -> Check {
    match hear(patient) {
        Ok(()) => Check::ok(TRACKING.0, PRE_COPY, "writes to protected pages are heard of, and let through"),
        Err(e) => Check::fail(TRACKING.0, PRE_COPY, e.to_string(), remedy(&e, NEWER)),
    }
}

/// Writes to two pages of another process, one populated and one never touched, and lets the writer go on
/// each time.
fn hear(patient: &Patient) -> io::Result<()> {
    let ram = patient.map_ram()?;
    let pages = [3, PAGES / 2 + 1];
    patient.process().write_memory(address(&ram, pages[0]), b"before")?;
    let uffd = patient.uffd(Features::WP | Features::WP_SHMEM)?;
    uffd.register(ram.clone(), Watch::Writes)?;
    uffd.protect(ram.clone())?;
    thread::scope(|scope| {
        let writer = thread::Builder::new().name("protected-page".into()).spawn_scoped(scope, || {
            pages.iter().try_for_each(|n| patient.process().write_memory(address(&ram, *n), b"after"))
        })?;
        let heard = pages.iter().try_for_each(|n| {
            let wanted = address(&ram, *n);
            match uffd.next(PATIENCE)? {
                Some(fault) if fault.address == wanted && fault.protected => {
                    uffd.unprotect(wanted..wanted + PAGE_SIZE as u64)
                }
                Some(fault) => Err(io::Error::other(format!("{fault:?} where {wanted:#x} was written"))),
                None => Err(late(format!("a write was not heard of within {PATIENCE:?}"))),
            }
        });
        // Whatever happened: the writer waits no more once the descriptor, which is ours alone, is closed.
        drop(uffd);
        let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        heard.and(written)
    })
}

fn missing_pages(patient: &Patient) -> Check {
    match serve(patient) {
        Ok(()) => {
            Check::ok(MISSING.0, POST_COPY, "a missing page of another process' shared memory was served")
        }
        Err(e) => Check::fail(MISSING.0, POST_COPY, e.to_string(), remedy(&e, NEWER)),
    }
}

/// Lets the kernel touch a missing page of another process, as a vCPU does, and serves it.
fn serve(patient: &Patient) -> io::Result<()> {
    let ram = patient.map_ram()?;
    let n = PAGES / 2 + 5;
    patient.ram().punch(page(n))?;
    let uffd = patient.uffd(Features::MISSING_SHMEM)?;
    uffd.register(ram.clone(), Watch::Missing)?;
    let wanted = vec![0xa5; PAGE_SIZE];
    thread::scope(|scope| {
        let reader = thread::Builder::new().name("missing-page".into()).spawn_scoped(scope, || {
            let mut got = vec![0; PAGE_SIZE];
            patient.process().read_memory(address(&ram, n), &mut got).map(|()| got)
        })?;
        let served = (|| match uffd.next(PATIENCE)? {
            Some(fault) if fault.address == address(&ram, n) => match uffd.copy(fault.address, &wanted)? {
                Copied::All => Ok(()),
                Copied::UpTo(_) => Err(io::Error::other("a missing page was there already")),
            },
            Some(fault) => {
                Err(io::Error::other(format!("a fault at {:#x}, where nobody touched", fault.address)))
            }
            None => Err(late(format!("no fault was reported within {PATIENCE:?}"))),
        })();
        // Whatever happened: the reader waits no more once the descriptor, which is ours alone, is closed.
        drop(uffd);
        let got = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        served?;
        if got? == wanted { Ok(()) } else { Err(io::Error::other("a missing page came with other content")) }
    })
}

/// Whether a page that is written brings its neighbours along: then a page cannot be due from itself.
fn huge_pages(patient: &Patient) -> Check {
    let setting = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    judge_huge_pages(pages_brought_by_one(patient), chosen(&setting))
}

fn pages_brought_by_one(patient: &Patient) -> io::Result<u64> {
    let all = units::PageRange::new(units::PageIndex(0), PAGES);
    patient.ram().punch(all)?;
    patient.ram().write(page(PAGES / 2 + 9), &vec![1; PAGE_SIZE])?;
    Ok(patient.ram().present()?.len())
}

/// The word in brackets: `always [never]`.
fn chosen(setting: &str) -> Option<&str> {
    setting.split_once('[')?.1.split_once(']').map(|(word, _)| word)
}

fn judge_huge_pages(brought: io::Result<u64>, setting: Option<&str>) -> Check {
    let name = HUGE.0;
    let never = "echo never > /sys/kernel/mm/transparent_hugepage/shmem_enabled (a target then keeps what it \
                 still misses apart from what it has), and hugepages-*kB/shmem_enabled beside it likewise";
    let said = setting.unwrap_or("not supported by this kernel");
    match (brought, setting) {
        (Ok(1), Some("always" | "force" | "within_size")) => Check::fail(
            name,
            POST_COPY,
            format!("\"{said}\": guest RAM in a memfd may become huge pages"),
            never,
        ),
        (Ok(1), _) => Check::ok(name, POST_COPY, format!("\"{said}\": one page written is one page present")),
        (Ok(n), _) => Check::fail(
            name,
            POST_COPY,
            format!("\"{said}\": one page written made {n} pages present"),
            never,
        ),
        (Err(e), _) => Check::fail(name, POST_COPY, format!("\"{said}\"; not tried: {e}"), never),
    }
}

fn address(ram: &Range<u64>, n: u64) -> u64 {
    ram.start + units::PageIndex(n).offset()
}

#[cfg(test)]
mod tests {
    use super::*;
    use Status::{Fail, Ok as Good};

    #[test]
    fn a_machine_that_is_too_busy_needs_no_newer_kernel() {
        assert_eq!(remedy(&late("no fault".to_owned()), NEWER), BUSY);
        assert_eq!(remedy(&io::Error::other("pages [1] instead of [2]"), NEWER), NEWER);
    }

    #[test]
    fn huge_pages_are_judged_by_what_they_do_and_may_do() {
        let table = [
            (Ok(1), Some("never"), Good),
            (Ok(1), Some("advise"), Good),
            (Ok(1), None, Good),
            (Ok(1), Some("always"), Fail),
            (Ok(512), Some("never"), Fail),
            (Ok(16), Some("inherit"), Fail),
            (Err(io::ErrorKind::Other.into()), Some("never"), Fail),
        ];
        for (brought, setting, status) in table {
            let check = judge_huge_pages(brought, setting);
            assert_eq!(check.status, status, "{check:?}");
        }
        assert_eq!(chosen("always within_size advise [never] deny force\n"), Some("never"));
        assert_eq!(chosen(""), None);
    }
}
