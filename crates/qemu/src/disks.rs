//! How quick the guest's disks are, and what they have to do just now.
//!
//! QEMU counts requests and adds up their times (`query-blockstats`). What is under way it tells of virtio
//! queues only. Its latency histograms and interval statistics are left alone: to set them is to reset what
//! somebody else may have set.

use crate::{
    qmp::{Qmp, QmpError},
    virtio,
};
use serde_json::{Value, json};
use std::time::Duration;
use units::{Disk, Queued, Requests};

/// How long QEMU may take to answer. One that takes longer has other troubles: nobody waits for its disks.
const SOON: Duration = Duration::from_millis(500);

/// Queues that are asked about, at most: each takes QEMU a tenth of a millisecond. A guest with more is not
/// watched.
const MOST_QUEUES: u64 = 64;

/// The first queues of a SCSI controller, which carry no requests to disks.
const NO_REQUESTS: u64 = 2;

const CONTROLLER: &str = "virtio-scsi";

/// The queues that the guest uses for its disks.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Queues(Vec<Queue>);

#[derive(Clone, PartialEq, Eq, Debug)]
struct Queue {
    device: String,
    index: u64,
    /// Of a controller with several disks.
    shared: bool,
}

impl Queues {
    /// Those that the guest's driver has set up by now; none where QEMU does not tell, or where they are too
    /// many.
    pub(crate) fn find(qmp: &mut Qmp) -> Result<Self, QmpError> {
        let devices = match qmp.execute("x-query-virtio", json!({})) {
            Err(error) if error.is_unknown_command() => return Ok(Self::default()),
            devices => devices?,
        };
        let mut asked = Vec::new();
        for device in devices.as_array().into_iter().flatten().take(virtio::MOST) {
            let (Some(path), Some(name)) = (device["path"].as_str(), device["name"].as_str()) else {
                continue;
            };
            if !matches!(name, "virtio-blk" | CONTROLLER) {
                continue;
            }
            let status = qmp.execute("x-query-virtio-status", json!({ "path": path }))?;
            let shared = name == CONTROLLER;
            let first = if shared { NO_REQUESTS } else { 0 };
            let all = status["num-vqs"].as_u64().unwrap_or_default().min(first + MOST_QUEUES + 1);
            asked.extend((first..all).map(|index| Queue { device: path.to_owned(), index, shared }));
        }
        let mut used = Vec::new();
        for queue in asked.into_iter().take(virtio::MOST) {
            let status = qmp.execute("x-query-virtio-queue-status", queue.argument())?;
            if status["vring-desc"].as_u64().is_some_and(|at| at != 0) {
                used.push(queue);
            }
        }
        let few = used.len() as u64 <= MOST_QUEUES;
        Ok(Self(if few { used } else { vec![] }))
    }

    /// The guest's disks, each with its queues.
    pub(crate) fn look(&self, qmp: &mut Qmp) -> Result<Vec<Disk>, QmpError> {
        let of = |queue: &Queue| ("x-query-virtio-queue-status", queue.argument());
        let lines: Vec<_> =
            [("query-blockstats", json!({}))].into_iter().chain(self.0.iter().map(of)).collect();
        let mut answers = qmp.execute_all(&lines, SOON)?.into_iter();
        let stats = answers.next().unwrap_or(Ok(Value::Null))?;
        let queued: Vec<_> = self.0.iter().zip(answers.map(|answer| answer.ok())).collect();
        let own = |disk: &str| sum(queued.iter().filter(|(queue, _)| !queue.shared && queue.device == disk));
        let shared = sum(queued.iter().filter(|(queue, _)| queue.shared));
        let mut disks = read(&stats);
        for disk in &mut disks {
            disk.queued = own(&disk.name).or(shared);
        }
        Ok(disks)
    }
}

impl Queue {
    fn argument(&self) -> Value {
        json!({ "path": self.device, "queue": self.index })
    }
}

/// Several queues as one; none if one of them cannot be told of.
fn sum<'a>(mut queues: impl Iterator<Item = &'a (&'a Queue, Option<Value>)>) -> Option<Queued> {
    let first = queues.next()?;
    let mut all = Queued::default();
    for (_, status) in std::iter::once(first).chain(queues) {
        let number = |name: &str| status.as_ref().and_then(|status| status[name].as_u64());
        all.begun = all.begun.wrapping_add(number("last-avail-idx")?);
        all.in_flight = all.in_flight.saturating_add(number("inuse")?);
    }
    Some(all)
}

/// What the disks have done.
fn read(stats: &Value) -> Vec<Disk> {
    let list = stats.as_array().into_iter().flatten().take(virtio::MOST);
    list.map(|one| {
        let requests = |kind: &str| {
            let number = |what: &str| one["stats"][format!("{kind}_{what}")].as_u64().unwrap_or_default();
            (number("operations"), Duration::from_nanos(number("total_time_ns")))
        };
        let of = |kinds: &[&str]| {
            kinds.iter().map(|kind| requests(kind)).fold(Requests::default(), |sum, (done, took)| Requests {
                done: sum.done.saturating_add(done),
                took: sum.took + took,
            })
        };
        let names = ["qdev", "device", "node-name"].map(|name| one[name].as_str().unwrap_or_default());
        let name = names.into_iter().find(|name| !name.is_empty()).unwrap_or_default().to_owned();
        Disk { name, reads: of(&["rd"]), writes: of(&["wr", "unmap"]), flushes: of(&["flush"]), queued: None }
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_told_by_their_counts_and_their_queues() {
        let stats = json!([
            { "device": "", "qdev": "/machine/peripheral/b/virtio-backend", "node-name": "n",
                "stats": { "rd_operations": 3, "rd_total_time_ns": 1500, "wr_operations": 1,
                    "wr_total_time_ns": 7, "unmap_operations": 1, "unmap_total_time_ns": 3,
                    "flush_operations": 2, "flush_total_time_ns": 900 } },
            { "device": "cd0", "stats": { "rd_operations": -1, "rd_total_time_ns": "x" } }, 7
        ]);
        let disks = read(&stats);
        let requests = |done, ns| Requests { done, took: Duration::from_nanos(ns) };
        assert_eq!(disks[0].name, "/machine/peripheral/b/virtio-backend");
        assert_eq!(
            (disks[0].reads, disks[0].writes, disks[0].flushes),
            (requests(3, 1500), requests(2, 10), requests(2, 900))
        );
        assert_eq!((disks.len(), &*disks[1].name, disks[1].reads), (3, "cd0", Requests::default()));
        assert_eq!(read(&json!({ "stats": 1 })), []);
    }

    #[test]
    fn queues_of_a_disk_count_together_or_not_at_all() {
        let queue = |index| Queue { device: "b".into(), index, shared: false };
        let status = |begun: u64, now: u64| Some(json!({ "last-avail-idx": begun, "inuse": now }));
        let queues = [queue(0), queue(1)];
        let told = |all: [Option<Value>; 2]| {
            let all: Vec<_> = queues.iter().zip(all).collect();
            sum(all.iter())
        };
        assert_eq!(told([status(65_535, 1), status(2, 3)]), Some(Queued { begun: 65_537, in_flight: 4 }));
        assert_eq!(told([status(1, 1), None]), None);
        assert_eq!(told([status(1, 1), Some(json!({ "inuse": -1 }))]), None);
        assert_eq!(told([status(u64::MAX, u64::MAX), status(1, 1)]).unwrap().in_flight, u64::MAX);
        assert_eq!(sum([].iter()), None);
    }
}
