//! A real etcd for tests, and somebody on the way to it who loses what it says.

use crate::{Doing, Error, Process, Result, wait_for};
use std::{
    env,
    ffi::OsString,
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError, RwLock},
    thread,
    time::Duration,
};

/// How long an etcd may take until it answers: it writes a log with `fsync` first, and the machine may be
/// busy.
const READY: Duration = Duration::from_secs(60);

/// One etcd with a data directory of its own; killed when dropped, or when the thread that started it ends.
pub struct EtcdServer {
    data: PathBuf,
    /// Where it tells how it is, to anybody.
    health: SocketAddr,
    /// It speaks TLS, with `ca.crt`, `host.crt` and `host.key` of this directory, and wants its clients'
    /// certificates.
    tls: Option<PathBuf>,
    client: SocketAddr,
    peer: SocketAddr,
    process: Option<Process>,
}

impl EtcdServer {
    /// Why there can be none here; `None` if there can.
    pub fn missing() -> Option<String> {
        let quiet =
            Command::new(program()).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        let there = quiet.is_ok_and(|status| status.success());
        (!there).then(|| "the program etcd (./dev test unpacks it and sets WHIMBREL_ETCD)".to_owned())
    }

    /// Starts one whose data is in the new directory `data`.
    pub fn start(data: &Path) -> Result<Self> {
        Self::start_with(data, None)
    }

    /// … that speaks TLS only, to whoever has a certificate of the same authority.
    pub fn start_with(data: &Path, tls: Option<&Path>) -> Result<Self> {
        let free = || -> Result<SocketAddr> {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).doing("find a free port")?;
            listener.local_addr().doing("find a free port")
        };
        let [client, peer, health] = [free()?, free()?, free()?];
        let tls = tls.map(Path::to_owned);
        let mut server = Self { data: data.to_owned(), health, tls, client, peer, process: None };
        server.begin()?;
        Ok(server)
    }

    /// Starts it again.
    pub fn begin(&mut self) -> Result<()> {
        let log = self.data.with_extension("log");
        let file = fs::File::create(&log).doing("make etcd's log")?;
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let (client, peer) = (format!("{scheme}://{}", self.client), format!("http://{}", self.peer));
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(program());
        command.args(["--name", "one", "--data-dir"]).arg(&self.data);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("one={peer}")]);
        command.args(["--listen-metrics-urls", &format!("http://{}", self.health)]);
        if let Some(files) = &self.tls {
            command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(files.join("ca.crt"));
            command.arg("--cert-file").arg(files.join("host.crt"));
            command.arg("--key-file").arg(files.join("host.key"));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        let mut process = Process::spawn("etcd", &mut command, log)?;
        wait_for("etcd's first answer", READY, || {
            process.must_live()?;
            Ok(self.healthy().then_some(()))
        })?;
        self.process = Some(process);
        Ok(())
    }

    fn healthy(&self) -> bool {
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect(self.health)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET /health HTTP/1.0\r\nHost: etcd\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        ask().is_ok_and(|answer| answer.contains("\"true\""))
    }

    /// Kills it, as a crash would.
    pub fn crash(&mut self) -> Result<()> {
        self.process.take().doing("crash an etcd that runs")?.kill()
    }

    /// Where it answers.
    pub fn address(&self) -> SocketAddr {
        self.client
    }

    /// Its data; may be copied while it does not run.
    pub fn data(&self) -> &Path {
        &self.data
    }
}

/// What becomes of a request on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnTheWay {
    /// It arrives, and so does the answer.
    Passes,
    /// It arrives, and the answer does not.
    AnswerLost,
    /// It does not arrive.
    Lost,
    /// It arrives late.
    Late(Duration),
}

type Choose = Box<dyn FnMut(u64) -> OnTheWay + Send>;

/// Passes HTTP requests on to an etcd, or not. Ends with the test's process.
pub struct Way {
    address: SocketAddr,
    state: Arc<Mutex<(u64, Choose)>>,
    /// Read as long as a request is on its way.
    on_its_way: Arc<RwLock<()>>,
}

impl Way {
    /// To this server.
    pub fn to(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).doing("listen")?;
        let address = listener.local_addr().doing("listen")?;
        let choose: Choose = Box::new(|_| OnTheWay::Passes);
        let state = Arc::new(Mutex::new((0, choose)));
        let on_its_way = Arc::new(RwLock::new(()));
        let shared = (state.clone(), on_its_way.clone());
        thread::spawn(move || {
            for stream in listener.incoming().map_while(|stream| stream.ok()) {
                let (state, on_its_way) = shared.clone();
                thread::spawn(move || {
                    let _ = pass(&stream, server, &state, &on_its_way);
                    let _ = stream.shutdown(Shutdown::Both);
                });
            }
        });
        Ok(Self { address, state, on_its_way })
    }

    /// Where it is asked.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until no request is on its way: those of whoever was killed arrive all the same.
    pub fn wait_until_empty(&self) {
        drop(self.on_its_way.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// From now on `choose` says what becomes of each request, of which it is told the number, from 0 on.
    pub fn trouble(&self, choose: impl FnMut(u64) -> OnTheWay + Send + 'static) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = (0, Box::new(choose));
    }
}

fn pass(
    mut stream: &TcpStream,
    server: SocketAddr,
    state: &Mutex<(u64, Choose)>,
    on_its_way: &RwLock<()>,
) -> std::io::Result<()> {
    while let Some(request) = message(&mut stream)? {
        let _on_its_way = on_its_way.read().unwrap_or_else(PoisonError::into_inner);
        let what = {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            let number = state.0;
            state.0 += 1;
            (state.1)(number)
        };
        match what {
            OnTheWay::Lost => return Ok(()),
            OnTheWay::Late(time) => thread::sleep(time),
            OnTheWay::Passes | OnTheWay::AnswerLost => {}
        }
        let mut etcd = TcpStream::connect(server)?;
        etcd.write_all(&request)?;
        let answer = message(&mut etcd)?.unwrap_or_default();
        if what == OnTheWay::AnswerLost {
            return Ok(());
        }
        stream.write_all(&answer)?;
    }
    Ok(())
}

/// One HTTP message, head and body; `None` at the end of the stream.
fn message(from: &mut impl Read) -> std::io::Result<Option<Vec<u8>>> {
    let (mut bytes, mut byte) = (Vec::new(), [0]);
    while !bytes.ends_with(b"\r\n\r\n") {
        if from.read(&mut byte)? == 0 {
            return Ok(None);
        }
        bytes.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&bytes).to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    from.read_exact(&mut body)?;
    bytes.extend(body);
    Ok(Some(bytes))
}

/// What `./dev test` found, or whatever is called so.
fn program() -> OsString {
    env::var_os("WHIMBREL_ETCD").unwrap_or_else(|| "etcd".into())
}

/// Copies a directory with all that is in it.
pub fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    let mut command = Command::new("cp");
    let status = command.arg("-a").arg(from).arg(to).status().doing("copy a directory")?;
    if status.success() { Ok(()) } else { Err(Error::new("copy a directory", format!("cp: {status}"))) }
}
