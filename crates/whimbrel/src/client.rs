//! Talking to the agent: HTTP on its unix socket, one connection for each request.

use crate::trouble::{FAILED, IN_DOUBT, Trouble, WRONG_USE};
use api::Failure;
use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1,
    header::{CONTENT_TYPE, HOST},
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};
use tokio::{net::UnixStream, runtime::Runtime};

/// The agent at one socket.
pub(crate) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// The threads that requests need: none but this one.
    pub(crate) fn runtime() -> Result<Runtime, Trouble> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(|error| Trouble::local(FAILED, "cannot begin", error.to_string()))
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Trouble> {
        self.json(Method::GET, path, None).await
    }

    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Trouble> {
        self.json(Method::POST, path, Some(encode(body)?)).await
    }

    /// A request whose answer says nothing more than that it was done.
    pub(crate) async fn order(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<(), Trouble> {
        self.send(method, path, body).await.map(drop)
    }

    /// The answer line by line, as it comes.
    pub(crate) async fn lines(&self, path: &str) -> Result<Lines, Trouble> {
        let answer = self.send(Method::GET, path, None).await?;
        Ok(Lines { body: answer.into_body(), rest: Vec::new() })
    }

    async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<T, Trouble> {
        let answer = self.send(method.clone(), path, body).await?;
        let bytes = answer.into_body().collect().await.map_err(|e| self.lost(&method, &e))?.to_bytes();
        serde_json::from_slice(&bytes)
            .map_err(|e| self.strange(&format!("its answer is not as expected: {e}")))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Response<Incoming>, Trouble> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|e| no_agent(&self.socket, &e))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|e| self.lost(&method, &e))?;
        // An error of the connection is also told to whoever waits for the answer.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method.clone())
            .uri(path)
            .header(HOST, "agent")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|e| Trouble::local(WRONG_USE, "cannot ask the agent that", e.to_string()))?;
        let answer = sender.send_request(request).await.map_err(|e| self.lost(&method, &e))?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let code = answer.status();
        let bytes = answer.into_body().collect().await.map_err(|e| self.lost(&method, &e))?.to_bytes();
        let failure: Box<Failure> = serde_json::from_slice(&bytes)
            .map_err(|_| self.strange(&format!("it answered {code}: {}", String::from_utf8_lossy(&bytes))))?;
        let wrong_use = matches!(code, StatusCode::BAD_REQUEST | StatusCode::NOT_FOUND);
        Err(Trouble { status: if wrong_use { WRONG_USE } else { FAILED }, failure, next: None })
    }

    fn lost(&self, method: &Method, error: &hyper::Error) -> Trouble {
        let what = format!("the connection to the agent at {} was lost", self.socket.display());
        // What was ordered may have been done.
        let status = if *method == Method::GET { FAILED } else { IN_DOUBT };
        Trouble::local(status, what, error.to_string()).next("see its log, and `whimbrel list`")
    }

    fn strange(&self, why: &str) -> Trouble {
        Trouble::local(FAILED, format!("cannot understand the agent at {}", self.socket.display()), why)
            .next("use the same version of whimbrel for both")
    }
}

/// A path below `/v1/vms`, with the VM's name made harmless.
pub(crate) fn vm_path(name: &str, rest: &str) -> Result<String, Trouble> {
    agent::name::check(name).map_err(|why| Trouble::local(WRONG_USE, "there is no such VM", why))?;
    Ok(format!("/v1/vms/{name}{rest}"))
}

pub(crate) fn encode(body: &impl Serialize) -> Result<Vec<u8>, Trouble> {
    serde_json::to_vec(body).map_err(|e| Trouble::local(FAILED, "cannot write the request", e.to_string()))
}

fn no_agent(socket: &Path, error: &io::Error) -> Trouble {
    let shown = socket.display();
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            let why = format!("nothing answers at {shown}");
            Trouble::local(FAILED, "no agent is running on this host", why).next(
                "start one with `whimbrel agent --config agent.toml`, or say with --socket where its socket \
                 is",
            )
        }
        io::ErrorKind::PermissionDenied => {
            // Its directory is its owner's, too, and may keep others from looking at it.
            let found = fs::metadata(socket).or_else(|e| socket.parent().map_or(Err(e), fs::metadata));
            let owner = found.map(|found| format!(", only user {} may", found.uid()));
            let why = format!("you may not use {shown}{}", owner.unwrap_or_default());
            Trouble::local(FAILED, "the agent does not talk to you", why)
                .next("try again as that user, as with sudo")
        }
        _ => Trouble::local(FAILED, format!("cannot reach the agent at {shown}"), error.to_string()),
    }
}

/// An answer that comes line by line.
pub(crate) struct Lines {
    body: Incoming,
    rest: Vec<u8>,
}

impl Lines {
    /// The next line; `None` at the end. Can be dropped while it waits, nothing is lost.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<u8>>, Trouble> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.rest.drain(..=end).collect();
                line.pop();
                return Ok(Some(line));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => self.rest.extend(frame.into_data().unwrap_or_default()),
                Some(Err(error)) => {
                    return Err(Trouble::local(IN_DOUBT, "the agent was lost", error.to_string()));
                }
            }
        }
    }
}
