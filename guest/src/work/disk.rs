//! Self-checking records on a disk, written one way and read back the other.

use crate::{
    content::Page,
    job::{Job, Jobs},
    pace::Pace,
    record,
    words::{Disk, Through},
};
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    sync::{Arc, atomic::Ordering::Relaxed},
    thread,
};
use units::{Bytes, PAGE_SIZE};

/// Starts the writer, from the disk's beginning on; whatever is on the disk there is lost.
pub(crate) fn start(wish: &Disk, jobs: &Arc<Jobs>) -> Result<(), String> {
    let path = format!("/dev/{}", wish.name);
    let failed = |e: io::Error| format!("{path}: {e}; has the machine such a virtio-blk disk?");
    let open = |flags: i32| OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path);
    let cached = open(0).map_err(failed)?;
    let direct = open(rustix::fs::OFlags::DIRECT.bits() as i32).map_err(failed)?;
    let size = rustix::fs::seek(&cached, rustix::fs::SeekFrom::End(0)).map_err(|e| failed(e.into()))?;
    if size < wish.set.0 {
        return Err(format!("{path}: {} are asked for, but it has only {}", wish.set, Bytes(size)));
    }
    let records = Records {
        cached,
        direct,
        path,
        through: wish.through,
        versions: vec![0; (wish.set.0 / PAGE_SIZE as u64) as usize],
        at: 0,
    };
    let (job, jobs, rate) = (jobs.add("disk"), jobs.clone(), wish.rate);
    thread::spawn(move || records.run(&job, &jobs, Pace::new(rate, 1)));
    Ok(())
}

struct Records {
    cached: File,
    direct: File,
    path: String,
    through: Through,
    /// Zero: never written.
    versions: Vec<u64>,
    at: usize,
}

impl Records {
    fn run(mut self, job: &Job, jobs: &Jobs, pace: Pace) -> ! {
        job.run(pace, |pages| {
            for _ in 0..pages {
                if let Err(e) = self.renew(jobs) {
                    jobs.corrupt(format_args!("disk page {}: {}: {e}", self.at, self.path));
                }
                self.at += 1;
                if self.at == self.versions.len() {
                    self.at = 0;
                    job.loops.fetch_add(1, Relaxed);
                }
            }
        })
    }

    /// Reads the record back as it was left a whole loop ago, then writes the next version. With both ways,
    /// even versions are written directly and read through the cache, odd ones the other way round.
    fn renew(&mut self, jobs: &Jobs) -> io::Result<()> {
        let (index, offset) = (self.at as u64, (self.at * PAGE_SIZE) as u64);
        let version = self.versions[self.at];
        let way = |direct: bool| if direct { &self.direct } else { &self.cached };
        let writes_directly = |version: u64| match self.through {
            Through::Cache => false,
            Through::Direct => true,
            Through::Both => version.is_multiple_of(2),
        };
        let mut page = Page::ZERO;
        if version > 0 {
            let reads_directly = writes_directly(version) != (self.through == Through::Both);
            way(reads_directly).read_exact_at(&mut page.0, offset)?;
            if let Err(corrupt) = record::verify(&page, index, version) {
                jobs.corrupt(format_args!("disk {corrupt} on {}", self.path));
            }
        }
        record::write(&mut page, index, version + 1);
        way(writes_directly(version + 1)).write_all_at(&page.0, offset)?;
        self.versions[self.at] += 1;
        Ok(())
    }
}
