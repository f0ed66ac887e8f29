//! A guest's ports: each ends on the host where the guest is, under a name that can be told, and nowhere
//! else.

use lab::{Channel, Doing, HandStart, Spec, Stage, ensure, story, wait_for};
use std::{io::Read, os::unix::net::UnixStream, time::Duration};

#[test]
fn i9_a_guest_agent_is_found_again_after_each_move() {
    story("a guest agent's channel", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let at = |name: &str| lab.dir().join(name).display().to_string();
        let words = [
            "-chardev",
            &format!("socket,id=qga,path={},server=on,wait=off", at("qga")),
            "-device",
            "virtio-serial-pci",
            "-device",
            "virtserialport,chardev=qga,name=org.qemu.guest_agent.0",
            "-serial",
            "pty",
            "-vnc",
            &format!("unix:{}", at("vnc")),
        ]
        .map(str::to_owned);
        let work = "whimbrel.check=32M,rate=4M whimbrel.agent=org.qemu.guest_agent.0";
        let start = HandStart { extra: words.into(), ..HandStart::new(Spec::new(61, work)) };
        let (guest, _machine) = stage.adopt("a", "ported", start)?;
        ensure!(Channel::connect(&lab.dir().join("qga"))?.ask("hello")? == 0, "it is the first question");

        // Nobody is there, somebody is there and silent, somebody talks without end.
        let in_run = |host: &str, name: &str| lab.host(host).dir.join("run").join(name);
        // The console's file and its socket are of the first serial port.
        let console = in_run("b", "ported.console");
        let mut asked = 0;
        let mut socket = lab.dir().join("qga");
        for (n, (from, to, mode)) in
            [("a", "b", "pre-copy"), ("b", "a", "post-copy"), ("a", "b", "auto"), ("b", "a", "pre-copy")]
                .into_iter()
                .enumerate()
        {
            let silent = if n == 1 { Some(Channel::connect(&socket)?) } else { None };
            let chat = if n >= 2 { Some(Channel::connect(&socket)?.chat()) } else { None };
            stage.migrate("ported", &guest, from, to, &["--mode", mode])?;
            drop(silent);
            if let Some(chat) = chat {
                chat.join().ok().doing("end a conversation")?;
            }
            if from == "b" {
                ensure!(!socket.exists(), "{} has gone with its QEMU", socket.display());
            }
            socket = in_run(to, "ported:qga.sock");
            let count = Channel::connect(&socket)?.ask("hello again")?;
            ensure!(count > asked, "the same agent: {count} after {asked}");
            asked = count;

            // And the others: what is shown of them is where they are.
            let shown = stage.show(to, "ported")?.doing("find the VM")?;
            let ports = shown["ports"].as_array().doing(format!("find the ports in {shown}"))?.clone();
            let link =
                |id: &str| ports.iter().find(|port| port["id"] == id).and_then(|port| port["link"].as_str());
            ensure!(link("qga") == socket.to_str(), "the agent's socket is shown: {shown}");
            let mut greeting = [0; 4];
            let vnc = link("screen").doing(format!("find the screen in {shown}"))?;
            let mut vnc = UnixStream::connect(vnc).doing("connect to the screen")?;
            vnc.read_exact(&mut greeting).doing("hear VNC")?;
            ensure!(&greeting == b"RFB ", "VNC greets: {greeting:?}");
            let pty = std::fs::canonicalize(in_run(to, "ported:serial1.pty")).doing("find the terminal")?;
            ensure!(pty.starts_with("/dev/pts"), "{} is a terminal", pty.display());
            if to == "b" {
                let says = || Ok(console.metadata().is_ok_and(|file| file.len() > 0).then_some(()));
                wait_for("the guest's word on its console", Duration::from_secs(20), says)?;
            }
        }
        ensure!(console.exists(), "what the guest said there stays");
        let live = lab::Console::listen(&in_run("a", "ported:console.sock"))?;
        live.wait("WHIMBREL beat", Duration::from_secs(20))?;
        wait_for("the console's file", Duration::from_secs(20), || {
            let text = std::fs::read_to_string(in_run("a", "ported.console")).unwrap_or_default();
            Ok(text.contains("WHIMBREL").then_some(()))
        })?;
        stage.agent("a").cli().json(&["stop", "ported"]).map(drop)
    });
}
