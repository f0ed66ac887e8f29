//! QEMUs that cannot be adopted because of what their host does to their process, and such as can.

mod common;

use common::hand::*;
use qemu::Vm;
use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
};

/// Takes numbers of system calls up to `--`, and runs what follows under a filter that kills for these calls
/// (`seccomp(2)`; the layouts are those of `struct sock_filter` and `struct sock_fprog`).
const FILTERED: &str = r#"
    my @denied; while (($_ = shift) ne "--") { push @denied, $_ }
    my $filter = pack "SCCL", 0x20, 0, 0, 0;
    $filter .= pack "SCCL", 0x15, @denied - $_, 0, $denied[$_] for 0 .. $#denied;
    $filter .= pack "SCCL", 0x06, 0, 0, $_ for 0x7fff0000, 0x80000000;
    my $program = pack "Sx6P", 2 + @denied + 1, $filter;
    syscall(157, 38, 1, 0, 0, 0) == 0 && syscall(157, 22, 2, $program) == 0 or die "no filter: $!";
    exec @ARGV or die "$ARGV[0]: $!";
"#;

/// Attaches to each thread of a process, as `strace -f -p` does (`PTRACE_SEIZE`), until its input ends.
const DEBUGGER: &str = r#"
    for (glob "/proc/$ARGV[0]/task/*") {
        m|(\d+)$| && syscall(101, 0x4206, $1 + 0, 0, 0) == 0 or die "cannot attach to $_: $!";
    }
    $| = 1; print "attached\n"; <STDIN>;
"#;

const SOCKETPAIR: &str = "53";
const USERFAULTFD: &str = "323";

/// A QEMU that is killed when it makes one of these calls.
fn filtered(denied: &[&str]) -> ByHand {
    let mut command = Command::new("perl");
    command.args(["-e", FILTERED]).args(denied).args(["--", "qemu-system-x86_64"]);
    ByHand::start_by(command, &with(&["-accel", "tcg"]))
}

fn lives(hand: &mut ByHand) {
    assert!(hand.child.try_wait().unwrap().is_none(), "QEMU lives");
    let vm = qemu::qmp::Qmp::connect(&hand.qmp).unwrap().execute("query-status", serde_json::json!({}));
    assert_eq!(vm.unwrap()["status"], "running");
}

#[test]
fn i3_a_qemu_that_its_filter_would_kill_is_not_adopted() {
    let mut hand = filtered(&[USERFAULTFD, SOCKETPAIR]);
    let reasons = hand.refusal();
    has(&reasons, "its seccomp filter would kill it for socketpair");
    has(&reasons, "allow socketpair in its filter (systemd: SystemCallFilter=)");
    lives(&mut hand);
    // One whose filter leaves a way is adopted.
    let mut hand = filtered(&[USERFAULTFD]);
    drop(Vm::adopt("hand", &hand.qmp).unwrap());
    lives(&mut hand);
}

#[test]
fn a_qemu_with_a_debugger_is_adopted_once_that_is_gone() {
    let mut hand = ByHand::start(SHARED);
    let mut debugger: Child = Command::new("perl")
        .args(["-e", DEBUGGER, &hand.child.id().to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(debugger.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(said.any(|line| line == "attached"), "it attaches");
    let reasons = hand.refusal();
    let named = format!("is traced by process {} (perl): detach that debugger", debugger.id());
    has(&reasons, &named);
    lives(&mut hand);
    // It goes on until its input ends.
    drop(debugger.stdin.take());
    assert!(debugger.wait().unwrap().success());
    drop(Vm::adopt("hand", &hand.qmp).unwrap());
    lives(&mut hand);
}

#[test]
fn a_qemu_in_another_pid_namespace_is_named() {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "qemu-system-x86_64"]);
    let mut hand = ByHand::start_by(command, &with(&["-accel", "tcg"]));
    let refused = Vm::adopt("hand", &hand.qmp).map(drop).unwrap_err().to_string();
    // The process as the agent numbers it: what was started here waits for it.
    let here = hand.child.id();
    let children = std::fs::read_to_string(format!("/proc/{here}/task/{here}/children")).unwrap();
    let pid = children.trim();
    for words in [
        format!("process {pid} is in another PID namespace than the agent (a container?)"),
        format!("run the agent there (nsenter -t {pid} -p -m), or QEMU outside"),
    ] {
        assert!(refused.contains(&words), "{words:?} is not in {refused}");
    }
    lives(&mut hand);
}
