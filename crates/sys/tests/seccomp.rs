//! A QEMU under seccomp filters: no call is made in its place that it would be killed for.

use nix::libc;
use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::{net::UnixStream, process::CommandExt},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use sys::{inject::Borrowed, process::PidFd};

/// A QEMU without a guest that ends with this.
struct Qemu {
    child: Child,
    socket: PathBuf,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Lets `denied` calls come to `action`, and all others be made.
fn program(denied: &[i64], action: u32) -> Vec<libc::sock_filter> {
    let instruction = |code: u32, jt: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf: 0, k };
    let load = [instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)];
    let jumps = denied.iter().enumerate().map(|(n, call)| {
        let jt = (denied.len() - n) as u8;
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, jt, *call as u32)
    });
    let answers = [libc::SECCOMP_RET_ALLOW, action].map(|k| instruction(libc::BPF_RET | libc::BPF_K, 0, k));
    load.into_iter().chain(jumps).chain(answers).collect()
}

fn qemu(name: &str, denied: &[i64], action: u32) -> Qemu {
    let socket = std::env::temp_dir().join(format!("whimbrel-seccomp-{}-{name}", std::process::id()));
    let filter = program(denied, action);
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-machine", "none", "-nodefaults", "-display", "none", "-accel", "tcg", "-qmp"]);
    command.arg(format!("unix:{},server=on,wait=off", socket.display())).stdin(Stdio::null());
    let confine = move || {
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
        // SAFETY: plain numbers, and a program that lives across the call and is only read.
        let result = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
                + libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: between fork and exec it makes system calls only.
    unsafe { command.pre_exec(confine) };
    let mut qemu = Qemu { child: command.spawn().unwrap(), socket };
    let end = Instant::now() + Duration::from_secs(60);
    while UnixStream::connect(&qemu.socket).is_err() {
        assert!(
            qemu.child.try_wait().unwrap().is_none() && Instant::now() < end,
            "{name}: QEMU does not start"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    qemu
}

#[test]
fn i3_no_call_is_made_that_a_filter_kills_for() {
    let (uffd, pair) = (libc::SYS_userfaultfd, libc::SYS_socketpair);
    let (kill, errno) = (libc::SECCOMP_RET_KILL_PROCESS, |error: i32| libc::SECCOMP_RET_ERRNO | error as u32);
    // Where userfaultfd is not to be had, /dev/userfaultfd is passed in.
    let rows: [(&str, &[i64], u32, Option<&str>); 6] = [
        ("eperm", &[uffd], errno(libc::EPERM), None),
        ("enosys", &[uffd], errno(libc::ENOSYS), None),
        ("kill", &[uffd], kill, None),
        ("trap", &[uffd], libc::SECCOMP_RET_TRAP, None),
        ("both", &[uffd, pair], kill, Some("its seccomp filter would kill it for socketpair")),
        ("ioctl", &[uffd, libc::SYS_recvmsg], errno(libc::EACCES), Some("Permission denied")),
    ];
    for (name, denied, action, refused) in rows {
        let mut qemu = qemu(name, denied, action);
        let process = Arc::new(PidFd::open(qemu.child.id() as i32).unwrap());
        let thread = Borrowed::seize(&process).unwrap();
        let direct = thread.syscall(uffd, [(libc::O_CLOEXEC | libc::O_NONBLOCK) as u64, 0, 0, 0, 0, 0]);
        assert!(direct.is_err(), "{name}");
        match (thread.userfaultfd(), refused) {
            (Ok(made), None) => thread.close(made).unwrap(),
            (Err(error), Some(why)) => assert!(error.to_string().contains(why), "{name}: {error}"),
            (made, _) => panic!("{name}: {made:?}"),
        }
        drop(thread);
        assert!(qemu.child.try_wait().unwrap().is_none(), "{name}: QEMU lives");
    }
}

/// Whom the debugger of the test below debugs.
const DEBUGGED: &str = "WHIMBREL_DEBUGGED";

#[test]
#[ignore = "not a test: the debugger of the test below"]
fn debugger() {
    let pid = std::env::var(DEBUGGED).unwrap().parse().unwrap();
    let process = Arc::new(PidFd::open(pid).unwrap());
    let end = Instant::now() + Duration::from_secs(20);
    let held = loop {
        // A thread of a busy machine may not stop in time.
        match Borrowed::seize_thread(&process, pid) {
            Err(_) if Instant::now() < end => {}
            held => break held.unwrap(),
        }
    };
    println!("attached");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    drop(held);
}

#[test]
fn a_debugger_that_is_attached_is_named() {
    let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // Its C library is loaded once it answers.
    child.stdin.as_mut().unwrap().write_all(b"!").unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let process = Arc::new(PidFd::open(child.id() as i32).unwrap());
    // Another process: what we hold ourselves is no debugger's.
    let mut debugger = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "debugger", "--ignored", "--nocapture"])
        .env(DEBUGGED, child.id().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(debugger.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(said.any(|line| line.contains("attached")), "it attaches");
    let refused = Borrowed::seize(&process).map(drop).unwrap_err().to_string();
    // It goes on until its input ends.
    drop(debugger.stdin.take());
    debugger.wait().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    // By the kernel's word, which names the thread that traces.
    assert!(
        refused.contains("is traced by process ") && refused.contains("detach that debugger"),
        "{refused}"
    );
}
