//! What the command line asks: HTTP and JSON on a unix socket that only its owner may use.

mod answer;
mod migrations;
mod socket;
mod types;
mod vms;

pub use socket::{SocketError, bind};
pub use types::{
    AdoptRequest, HostInfo, MigrationBrief, PeerInfo, ResolveRequest, RunRequest, Started, VmInfo, VmState,
};

use crate::{config::Config, migrate::Migrations, recovery::Recovery, registry::Registry};
use axum::{
    Json, Router,
    extract::State,
    http::{Method, Uri},
    routing::{get, post},
};
use std::sync::Arc;

/// What the API acts upon.
#[derive(Clone)]
pub struct Api {
    /// How the agent was started.
    pub config: Arc<Config>,
    /// The host's VMs.
    pub registry: Arc<Registry>,
    /// Their migrations.
    pub migrations: Arc<Migrations>,
    /// What is not settled yet.
    pub recovery: Arc<Recovery>,
}

/// All paths.
pub fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/host", get(host))
        .route("/v1/vms", get(vms::list).post(vms::run))
        .route("/v1/vms/{name}", get(vms::show).delete(vms::stop))
        .route("/v1/vms/{name}/adopt", post(vms::adopt))
        .route("/v1/check", post(vms::examine))
        .route("/v1/vms/{name}/migrate", post(migrations::start))
        .route("/v1/vms/{name}/plan", post(migrations::plan))
        .route("/v1/vms/{name}/migration", get(migrations::watch))
        .route("/v1/vms/{name}/cancel", post(migrations::cancel))
        .route("/v1/vms/{name}/resolve", post(migrations::resolve))
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .with_state(api)
}

async fn host(State(api): State<Api>) -> Json<HostInfo> {
    let config = &api.config;
    Json(HostInfo {
        name: config.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        listen: config.listen.to_string(),
        state_dir: config.state_dir.clone(),
        runtime_dir: config.runtime_dir.clone(),
        qemu: config.qemu.clone(),
        peers: config
            .peers
            .iter()
            .map(|(name, address)| PeerInfo { name: name.clone(), address: address.to_string() })
            .collect(),
    })
}

async fn unknown(State(api): State<Api>, method: Method, uri: Uri) -> answer::Refused {
    answer::refuse(
        &api,
        crate::refusal::RefusalKind::Unknown,
        format!("this agent has no {method} {}", uri.path()),
        "the command line and the agent may be of different versions",
    )
}
