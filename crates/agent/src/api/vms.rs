//! VMs: start, adopt, list, show, stop.

use super::{
    AdoptRequest, Api, RunRequest, VmInfo, VmState,
    answer::{Refused, blocking, read},
};
use crate::hypervisor::Examined;
use axum::{
    Json,
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
};

pub(super) async fn list(State(api): State<Api>) -> Result<Json<Vec<VmInfo>>, Refused> {
    let vms = blocking(&api, |api| api.registry.list()).await?;
    Ok(Json(vms.into_iter().map(|vm| with_migration(&api, vm)).collect()))
}

pub(super) async fn show(State(api): State<Api>, Path(name): Path<String>) -> Result<Json<VmInfo>, Refused> {
    let vm = blocking(&api, move |api| api.registry.show(&name)).await?;
    Ok(Json(with_migration(&api, vm)))
}

pub(super) async fn run(State(api): State<Api>, body: Bytes) -> Result<(StatusCode, Json<VmInfo>), Refused> {
    let request: RunRequest = read(&api, "start the VM", &body)?;
    let vm =
        blocking(&api, move |api| api.registry.run(&request.text, &request.path, request.fenced.as_deref()))
            .await?;
    Ok((StatusCode::CREATED, Json(vm)))
}

pub(super) async fn adopt(
    State(api): State<Api>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<(StatusCode, Json<VmInfo>), Refused> {
    let request: AdoptRequest = read(&api, &format!("adopt {name}"), &body)?;
    let vm = blocking(&api, move |api| api.registry.adopt(&name, &request.qmp)).await?;
    Ok((StatusCode::CREATED, Json(vm)))
}

pub(super) async fn examine(State(api): State<Api>, body: Bytes) -> Result<Json<Examined>, Refused> {
    let request: AdoptRequest = read(&api, "look at the VM", &body)?;
    Ok(Json(blocking(&api, move |api| api.registry.examine(&request.qmp)).await?))
}

pub(super) async fn stop(State(api): State<Api>, Path(name): Path<String>) -> Result<StatusCode, Refused> {
    blocking(&api, move |api| api.registry.stop(&name)).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn with_migration(api: &Api, mut vm: VmInfo) -> VmInfo {
    vm.migration = api.migrations.brief(&vm.name);
    if vm.state == VmState::Busy && vm.migration.is_some() {
        vm.state = VmState::Migrating;
    }
    vm
}
