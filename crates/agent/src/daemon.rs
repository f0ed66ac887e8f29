//! The agent from its start to its end.

use crate::{
    api::{self, Api, SocketError},
    config::{Address, Config},
    consoles,
    hypervisor::Hypervisor,
    migrate::{Migrations, Migrator},
    peers::Peers,
    private, publish,
    recovery::Recovery,
    registry::Registry,
    store::{Store, StoreError},
};
use ports::shared::SharedRecord;
use std::{fs, future::IntoFuture, io, net::SocketAddr, sync::Arc, thread, time::Duration};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
};
use tracing::{info, warn};

/// How long those who watch migrations have, at the end, to read the last lines.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Why an agent did not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Its state.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its API.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Its TCP port.
    #[error("cannot listen for other agents at {address}: {cause}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// Something of the system.
    #[error("cannot {what}: {cause}")]
    System {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        cause: io::Error,
    },
}

/// What a migrator is made from.
pub struct Context {
    /// How the agent was started.
    pub config: Arc<Config>,
    /// The host's VMs; their store is `registry.store()`.
    pub registry: Arc<Registry>,
}

/// Runs an agent until SIGTERM or SIGINT. Ending it harms no VM: migrations before their switchover are
/// cancelled and rolled back first, and QEMU processes are left alone. A second signal ends it without
/// waiting for that. `record`: who owns which VM, where all hosts can ask; without one, the target of each
/// migration keeps it.
pub fn run(
    config: Config,
    hypervisor: Arc<dyn Hypervisor>,
    record: Option<Arc<dyn SharedRecord>>,
    migrator: impl FnOnce(&Context) -> Arc<dyn Migrator>,
) -> Result<(), AgentError> {
    run_until(config, hypervisor, record, migrator, || {
        let (tell, told) = mpsc::unbounded_channel();
        for (kind, name) in [(SignalKind::terminate(), "SIGTERM"), (SignalKind::interrupt(), "SIGINT")] {
            let mut signals = signal(kind).map_err(system("watch for signals"))?;
            let tell = tell.clone();
            tokio::spawn(async move { while signals.recv().await.is_some() && tell.send(name).is_ok() {} });
        }
        Ok(told)
    })
}

/// Runs an agent until the channel that `end` gives says why it should end; once more: at once.
pub fn run_until(
    config: Config,
    hypervisor: Arc<dyn Hypervisor>,
    record: Option<Arc<dyn SharedRecord>>,
    migrator: impl FnOnce(&Context) -> Arc<dyn Migrator>,
    end: impl FnOnce() -> Result<mpsc::UnboundedReceiver<&'static str>, AgentError>,
) -> Result<(), AgentError> {
    let config = Arc::new(config);
    // First of all: whoever has the store is the agent.
    let store = Store::open(&config.state_dir, &config.name)?;
    private::directory(&config.runtime_dir).map_err(|cause| AgentError::System {
        what: format!("make the runtime directory {}", config.runtime_dir.display()),
        cause,
    })?;
    consoles::look_after(config.runtime_dir.clone()).map_err(system("start a thread"))?;
    let registry = Arc::new(Registry::new(store, hypervisor, record));
    let context = Context { config: config.clone(), registry: registry.clone() };
    let migrator = migrator(&context);
    let recovery = Arc::new(Recovery::new(registry.clone(), migrator.clone()));
    let listener = api::bind(&config.socket)?;
    let socket = config.socket.clone();
    registry.forget_interrupted()?;
    registry.hypervisor().sweep_others(&registry.store().vms()?);
    recovery.begin()?;
    publish::begin(registry.clone()).map_err(system("start a thread"))?;
    let migrations =
        Arc::new(Migrations::new(config.clone(), registry.clone(), migrator.clone(), recovery.clone()));
    let serve = migrator.clone();
    let known: Vec<Address> = config.peers.values().cloned().collect();
    let peers = Peers::listen(config.listen, known, move |connection, from, pass| {
        serve.serve(connection, from, pass)
    })
    .map_err(|cause| AgentError::Listen { address: config.listen, cause })?;
    // Guests that wait for pages are served from here on: nothing that can be found out later comes before.
    let curious = registry.clone();
    thread::Builder::new()
        .name("learn".into())
        .spawn(move || curious.hypervisor().learn())
        .map_err(system("start a thread"))?;
    registry.look_again()?;
    info!(host = config.name, socket = %config.socket.display(), listen = %peers.address(), "ready");

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("api")
        .enable_all()
        .build()
        .map_err(system("start the API's threads"))?;
    runtime.block_on(async {
        let listener = tokio::net::UnixListener::from_std(listener).map_err(system("serve the API"))?;
        let mut reasons = end()?;
        let router =
            api::router(Api { config, registry, migrations: migrations.clone(), recovery: recovery.clone() });
        let (close, closed) = oneshot::channel::<()>();
        let serving = tokio::spawn(
            axum::serve(listener, router)
                .with_graceful_shutdown(async {
                    let _ = closed.await;
                })
                .into_future(),
        );
        let why = reasons.recv().await;
        info!(why, "ending");
        recovery.stop();
        let rolled_back = async {
            for migration in migrations.close() {
                migration.past_cancelling().await;
            }
        };
        tokio::select! {
            () = rolled_back => {}
            Some(why) = reasons.recv() => warn!(why, "ending without waiting for rollbacks; the journal has \
                                                      them"),
        }
        let _ = close.send(());
        let _ = tokio::time::timeout(LAST_LINES, serving).await;
        Ok::<(), AgentError>(())
    })?;
    drop(peers);
    migrator.shut_down();
    let _ = fs::remove_file(&socket);
    // Threads that still serve a post-copy end with the process: it is taken up again after the next start.
    runtime.shutdown_background();
    info!("ended");
    Ok(())
}

fn system(what: &str) -> impl FnOnce(io::Error) -> AgentError {
    let what = what.to_owned();
    move |cause| AgentError::System { what, cause }
}
