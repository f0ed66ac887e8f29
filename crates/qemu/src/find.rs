//! Which process a QMP socket leads to.
//!
//! `SO_PEERCRED` names who called `listen`: usually QEMU, but a launcher may have made the socket and handed
//! it over. So QEMU's own word decides: its vCPU threads, which belong to exactly one process.

use crate::qmp::{Qmp, QmpError};
use serde_json::json;
use std::{fs, io};
use sys::{
    proc,
    process::{PidFd, peer_pid},
};

/// Why no process could be named.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// QEMU did not say.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The kernel did not say.
    #[error("cannot find the QEMU process behind {socket}: {what}: {cause}")]
    System {
        /// The QMP socket.
        socket: String,
        /// What was asked.
        what: String,
        /// The system's word.
        #[source]
        cause: io::Error,
    },
    /// There is a process, but it is not the QEMU that answers on the socket.
    #[error("cannot find the QEMU process behind {socket}: {why}")]
    NotFound {
        /// The QMP socket.
        socket: String,
        /// What was found instead.
        why: String,
    },
}

/// The QEMU process that answers on `qmp`, held.
pub fn process_of(qmp: &mut Qmp) -> Result<PidFd, FindError> {
    let socket = qmp.path().display().to_string();
    let not_found = |why: String| FindError::NotFound { socket: socket.clone(), why };
    let system =
        |what: &str, cause| FindError::System { socket: socket.clone(), what: what.to_owned(), cause };

    let threads = vcpu_threads(qmp)?;
    let peer = peer_pid(qmp.socket()).map_err(|cause| system("SO_PEERCRED", cause))?;
    let first = *threads.first().ok_or_else(|| not_found("it has no vCPU threads".to_owned()))?;
    let owner = if has_thread(peer, first) { peer } else { thread_group(first).unwrap_or(peer) };

    // The numbers by which QEMU calls its threads are those of its own PID namespace.
    if let (Ok(ours), Ok(theirs)) =
        (fs::read_link("/proc/self/ns/pid"), fs::read_link(format!("/proc/{peer}/ns/pid")))
        && ours != theirs
    {
        return Err(not_found(format!(
            "process {peer} is in another PID namespace than the agent (a container?): run the agent there \
             (nsenter -t {peer} -p -m), or QEMU outside"
        )));
    }

    // Held first, looked at afterwards: whatever is true of the held process stays true of it.
    let process = PidFd::open(owner).map_err(|cause| system(&format!("pidfd_open({owner})"), cause))?;
    if let Some(stranger) = threads.iter().find(|thread| !has_thread(owner, **thread)) {
        return Err(not_found(format!(
            "process {owner} has no thread {stranger}, which QEMU says is a vCPU (is QEMU in another PID \
             namespace?)"
        )));
    }
    if !process.is_alive().map_err(|cause| system("poll(pidfd)", cause))? {
        return Err(not_found(format!("process {owner} has just ended")));
    }
    let name = program(&process).map_err(|cause| system(&format!("read /proc/{owner}/exe"), cause))?;
    if !name.contains("qemu") && name != "kvm" {
        return Err(not_found(format!("process {owner} runs {name}, which is not called QEMU")));
    }
    Ok(process)
}

/// The command line of a process, its program first.
pub fn command_line(process: &PidFd) -> io::Result<Vec<String>> {
    let raw = fs::read(process.proc_path("cmdline"))?;
    let text = String::from_utf8(raw)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "its command line is not UTF-8"))?;
    Ok(text.strip_suffix('\0').unwrap_or(&text).split('\0').map(str::to_owned).collect())
}

/// The threads that run vCPUs; with some accelerators one runs them all.
pub(crate) fn vcpu_threads(qmp: &mut Qmp) -> Result<Vec<i32>, QmpError> {
    let answer = qmp.execute("query-cpus-fast", json!({}))?;
    let cpus = answer.as_array().ok_or_else(|| qmp.strange("query-cpus-fast", &answer))?;
    let thread = |cpu: &serde_json::Value| cpu["thread-id"].as_i64().and_then(|id| i32::try_from(id).ok());
    Ok(cpus.iter().filter_map(thread).collect())
}

fn has_thread(pid: i32, thread: i32) -> bool {
    fs::metadata(format!("/proc/{pid}/task/{thread}")).is_ok()
}

fn thread_group(thread: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    proc::value(&status, "Tgid")?.parse().ok()
}

fn program(process: &PidFd) -> io::Result<String> {
    let path = fs::read_link(process.proc_path("exe"))?;
    Ok(path.file_name().unwrap_or_default().to_string_lossy().into_owned())
}
