//! What users and other hosts get wrong: each a clear error, and nothing lost.

use lab::{Doing, Oddity, PORT, Result, Spec, Stage, Traces, VmFile, ensure, story, wait_for};
use proto::{Preamble, Purpose, Token};
use std::{
    fs,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};
use units::{BlockId, PageIndex, PageRange};

const SOON: Duration = Duration::from_secs(20);

/// What somebody who is no agent does with a connection.
type Manners = Arc<dyn Fn(TcpStream) + Send + Sync>;

#[test]
fn mistakes_of_users_are_named_and_harm_nothing() {
    story("mistakes of users", &["a"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let cli = stage.agent("a").cli();

        for command in
            [&["show", "ghost"][..], &["stop", "ghost"], &["cancel", "ghost"], &["status", "ghost"]]
        {
            cli.run(command)?.exited(2)?.says(&["ghost"])?;
        }
        cli.run(["migrate", "ghost", "--to", "nowhere"])?.exited(2)?.says(&["ghost"])?;
        cli.run(["migrate", "ghost"])?.exited(2)?;
        cli.run(["frobnicate"])?.exited(2)?;
        lab::Cli::new(&tools.whimbrel, Some(lab.dir().join("no.sock")))
            .run(["list"])?
            .exited(1)?
            .says(&["no.sock"])?;

        // A VM file with mistakes: where they are.
        let good = VmFile::new("web", Spec::new(81, "whimbrel.check=16M,rate=4M"));
        let path = lab.dir().join("bad.toml");
        let file = path.to_string_lossy().into_owned();
        for (from, to, says) in [
            ("vcpus = 1", "vcpus = \"one\"", &["bad.toml:2:9"][..]),
            ("memory = \"256MiB\"", "memory = \"lots\"", &["bad.toml:3:10", "memory"]),
            ("machine = \"q35\"", "machine = \"toaster\"", &["bad.toml:4:11", "microvm"]),
            ("vcpus = 1", "vcpus = 1\nvcpu = 2", &["bad.toml:3:1", "vcpu"]),
            ("name = \"web\"", "name = \"../web\"", &["bad.toml:1:8", "../web"]),
            ("[[net]]", "[[nets]]", &["nets"]),
        ] {
            fs::write(&path, good.text(tools).replace(from, to)).doing("write a VM file")?;
            cli.run(["run", &file])?.exited(2)?.says(says)?;
        }
        cli.run(["run", "/nowhere.toml"])?.exited(2)?.says(&["/nowhere.toml"])?;

        // A socket of something that is no QEMU; of nothing; of something that says nothing.
        let socket = lab.dir().join("other.sock");
        let listener = UnixListener::bind(&socket).doing("bind a socket")?;
        let greeter =
            thread::spawn(move || listener.accept().map(|(mut s, _)| s.write_all(b"220 smtp ready\r\n")));
        let other = socket.to_string_lossy().into_owned();
        cli.run(["adopt", "mail", "--qmp", &other])?.exited(1)?.says(&["other.sock"])?;
        ensure!(greeter.join().is_ok(), "it was asked");
        cli.run(["adopt", "none", "--qmp", "/nowhere.sock"])?.exited(1)?.says(&["/nowhere.sock"])?;
        let silent = UnixListener::bind(lab.dir().join("silent.sock")).doing("bind a socket")?;
        let quiet = lab.dir().join("silent.sock").to_string_lossy().into_owned();
        cli.run(["adopt", "mute", "--qmp", &quiet])?.exited(1)?.says(&["silent.sock"])?;
        drop(silent);

        // No rights: the API's socket is its owner's alone.
        let mode = fs::metadata(stage.agent("a").socket()).doing("look at the socket")?.permissions().mode();
        ensure!(mode & 0o777 == 0o600, "the socket's mode is {mode:o}");

        let list = cli.json(&["list"])?;
        ensure!(list == serde_json::json!([]), "nothing came of any of it: {list}");
        Ok(())
    });
}

#[test]
fn peers_that_are_no_agents_are_found_out_and_harm_nothing() {
    story("peers that are no agents", &["a", "b"], |lab, tools| {
        let mut stage = Stage::new(lab, tools)?;
        let guest = stage.run("a", &VmFile::new("web", Spec::new(82, "whimbrel.check=16M,rate=4M")))?;
        let failed = |stage: &Stage, to: &str, manner: &str| {
            let report = stage.start_migration("web", "a", to, &[])?.ended("failed", 1)?;
            ensure!(report.vm_runs_on() == Some("a"), "{manner}: it says who runs the VM: {}", report.0);
            eprintln!("{manner}: {}", report.error());
            stage.runs_on("web", "a")?;
            guest.runs()
        };
        failed(&stage, "nowhere", "nobody at that address")?;
        let unknown = stage.agent("a").cli().run(["migrate", "web", "--to", "atlantis"])?;
        unknown.exited(2)?.says(&["atlantis"])?;

        // In the place of b's agent: things that are none.
        stage.agent_mut("b").end()?;
        let address = SocketAddr::from((lab.host("b").address, PORT));
        type Manners = fn(TcpStream);
        let manners: [(&str, Manners); 5] = [
            ("hangs up", drop),
            ("says garbage", |mut stream| {
                let _ = stream.write_all(&[0xa5; 4096]);
                read_on(stream);
            }),
            ("speaks another protocol", |mut stream| {
                let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
                read_on(stream);
            }),
            ("says back what it hears", |mut stream| {
                let mut heard = [0; 4096];
                while let Ok(n @ 1..) = stream.read(&mut heard) {
                    if stream.write_all(&heard[..n]).is_err() {
                        return;
                    }
                }
            }),
            ("goes silent", read_on),
        ];
        for (manner, act) in manners {
            let _impostor = Impostor::at(lab.host("b"), address, Arc::new(act))?;
            failed(&stage, "b", manner)?;
        }
        guest.verify()?;

        // The other way round: things that are no agents call a.
        stage.agent_mut("b").begin()?;
        let calls: [&[u8]; 5] = [b"", b"GET / HTTP/1.1\r\n\r\n", &[0; 65536], &[0xff; 65536], b"WHIMBREL"];
        for call in calls {
            let to = SocketAddr::from((lab.host("a").address, PORT));
            let mut stream = lab::connect(&lab.host("b").namespace, to, SOON)?;
            // It may hang up in the middle of it.
            let _ = stream.write_all(call);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            stream.set_read_timeout(Some(SOON)).doing("set a timeout")?;
            let _ = stream.read_to_end(&mut Vec::new());
        }
        stage.agent("a").info()?;
        stage.migrate("web", &guest, "a", "b", &[]).map(drop)
    });
}

#[test]
fn impossible_frames_end_the_migration_and_harm_nothing() {
    story("frames that cannot be right", &["a", "b"], |lab, tools| {
        // In plaintext: nobody can lie in the middle of TLS.
        let plain = |_: &lab::Host| Oddity { plaintext: true, ..Oddity::default() };
        let mut stage = Stage::with(lab, tools, plain)?;
        let guest = stage.run("a", &VmFile::new("web", Spec::new(83, "whimbrel.check=16M,rate=4M")))?;
        let before = Traces::of(lab.host("b"))?;
        let batch = |page, count| {
            let range = PageRange::new(PageIndex(page), count);
            let mut bytes = Vec::new();
            proto::write_batch(BlockId(0), &[proto::Run::new(range, page::Class::Raw)], None, &mut bytes);
            bytes
        };
        let end = proto::Frame::RoundEnd(1).header();
        let lies: [(&str, Purpose, Vec<u8>, &[&str]); 6] = [
            ("a page beyond the block", DATA, batch(1 << 40, 1), &["RAM block 0", "1099511627776"]),
            ("a run beyond the last page", DATA, batch(1, u64::from(u32::MAX)), &["at most"]),
            ("a frame of no kind", DATA, vec![0xff; 64], &["frame kind 255"]),
            // As if the connection had been lost, each time that it is opened again: the source gives up in
            // the end. It says so, or the target sees that it is gone.
            ("a frame that is cut off", DATA, batch(0, 1), &["incoming migration ended"]),
            ("half a header", DATA, end[..7].to_vec(), &["incoming migration ended"]),
            (
                "a control message without end",
                Purpose::Control,
                vec![0xff; 64],
                &["control message of 4294967295"],
            ),
        ];
        for (lie, on, bytes, words) in lies {
            eprintln!("{lie}");
            let said = stage.agent_mut("b").process()?.said().len();
            // Both agents are real; what is between them is not only a wire.
            let address = SocketAddr::from((lab.host("b").address, PORT + 1));
            let agent = SocketAddr::from((lab.host("b").address, PORT));
            let host = lab.host("b").namespace.clone();
            let act = Arc::new(move |source| drop(between(source, &host, agent, on, &bytes)));
            let impostor = Impostor::at(lab.host("b"), address, act)?;
            let report = stage.start_migration("web", "a", &address.to_string(), &[])?.ended("failed", 1)?;
            eprintln!("    {}", report.error());
            drop(impostor);
            ensure!(report.vm_runs_on() == Some("a"), "{lie}: it says who runs the VM: {}", report.0);
            stage.check_untouched("web", &guest, "a", "b", &before)?;
            let warned = |line: &str| line.contains("WARN") && words.iter().all(|word| line.contains(word));
            let agent = stage.agent_mut("b").process()?;
            // The source may be done before the target has said so.
            wait_for(&format!("{words:?} in b's log after {lie}"), SOON, || {
                Ok(agent.said().split_off(said).lines().any(warned).then_some(()))
            })?;
        }
        stage.migrate("web", &guest, "a", "b", &[]).map(drop)
    });
}

/// Any data connection.
const DATA: Purpose = Purpose::Data(0);

/// Passes on what two agents say to each other, but on connections of one kind says `lie` in the source's
/// place, and hangs up.
fn between(
    mut source: TcpStream,
    host: &lab::Namespace,
    agent: SocketAddr,
    on: Purpose,
    lie: &[u8],
) -> io::Result<()> {
    let mut target = lab::connect(host, agent, SOON).map_err(io::Error::other)?;
    let mut first = [0; Preamble::SIZE];
    source.read_exact(&mut first)?;
    target.write_all(&first)?;
    let kind = Preamble::parse(&first).map_err(io::Error::other)?.kind;
    if kind.needs_token() {
        let mut token = [0; Token::SIZE];
        source.read_exact(&mut token)?;
        target.write_all(&token)?;
    }
    if std::mem::discriminant(&kind) == std::mem::discriminant(&on) {
        let mut reply = [0; proto::REPLY];
        target.read_exact(&mut reply)?;
        source.write_all(&reply)?;
        return target.write_all(lie);
    }
    let (mut back, mut from) = (source.try_clone()?, target.try_clone()?);
    let answers = thread::spawn(move || {
        let _ = io::copy(&mut from, &mut back);
        let _ = back.shutdown(Shutdown::Both);
    });
    let _ = io::copy(&mut source, &mut target);
    let _ = target.shutdown(Shutdown::Both);
    let _ = answers.join();
    Ok(())
}

fn read_on(mut stream: TcpStream) {
    let mut heard = [0; 4096];
    while let Ok(1..) = stream.read(&mut heard) {}
}

/// Somebody who is no agent, at an agent's address.
struct Impostor {
    streams: Arc<Mutex<Vec<TcpStream>>>,
    address: SocketAddr,
    host: lab::Host,
    thread: Option<thread::JoinHandle<()>>,
}

impl Impostor {
    fn at(host: &lab::Host, address: SocketAddr, act: Manners) -> Result<Self> {
        // The agent before it has only just ended.
        let listener = wait_for("the agent's port", SOON, || {
            host.namespace.inside(|| Ok(TcpListener::bind(address).ok()))
        })?;
        let streams: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let kept = streams.clone();
        let thread = thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let Ok(mut kept) = kept.lock() else { return };
                // The end is told by a call without a word.
                if stream.peer_addr().is_ok_and(|peer| peer.ip() == address.ip()) {
                    return;
                }
                let Ok(twin) = stream.try_clone() else { continue };
                kept.extend(stream.try_clone());
                let act = act.clone();
                thread::spawn(move || {
                    act(stream);
                    let _ = twin.shutdown(Shutdown::Both);
                });
            }
        });
        Ok(Self { streams, address, host: host.clone(), thread: Some(thread) })
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        let _ = lab::connect(&self.host.namespace, self.address, SOON);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        for stream in self.streams.lock().into_iter().flat_map(|mut all| std::mem::take(&mut *all)) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}
