//! Migrations: start, watch, cancel, resolve.

use super::{
    Api, ResolveRequest, Started,
    answer::{Refused, blocking, read, refuse},
};
use crate::{migrate::Follower, refusal::RefusalKind};
use api::{Event, Forecast, MigrateOptions, Phase};
use axum::{
    Json,
    body::{Body, Bytes},
    extract::{Path, RawQuery, State},
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use futures_core::Stream;
use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::sync::mpsc;

/// Batches of events that wait for a slow reader before its follower waits too.
const WAITING: usize = 16;

pub(super) async fn start(
    State(api): State<Api>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<(StatusCode, Json<Started>), Refused> {
    let options: MigrateOptions = read(&api, &format!("migrate {name}"), &body)?;
    let migration = blocking(&api, move |api| api.migrations.start(&name, &options)).await?;
    Ok((StatusCode::ACCEPTED, Json(Started { migration: migration.request.id.to_string() })))
}

/// What a migration would take; takes a second, and moves nothing.
pub(super) async fn plan(
    State(api): State<Api>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<Json<Forecast>, Refused> {
    let options: MigrateOptions = read(&api, &format!("plan the migration of {name}"), &body)?;
    blocking(&api, move |api| api.migrations.plan(&name, &options)).await.map(Json)
}

/// Events as lines of JSON, from the beginning of the VM's latest migration; with `?follow=true` until its
/// end.
pub(super) async fn watch(
    State(api): State<Api>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Response, Refused> {
    let follow = match query.as_deref() {
        None | Some("" | "follow=false") => false,
        Some("follow=true") => true,
        Some(other) => {
            return Err(refuse(
                &api,
                RefusalKind::Bad,
                "cannot tell of the migration",
                format!("what is ?{other}"),
            ));
        }
    };
    let body = match api.migrations.of(&name) {
        Some(migration) if follow => Body::from_stream(stream(migration.follow())),
        Some(migration) => Body::from(lines(&migration.follow().so_far())),
        None => {
            // Not since the agent was started: all that was kept is the report.
            let vm = name.clone();
            let kept = move |api: &Api| {
                let store = api.registry.store();
                store.last_report(&vm).map_err(|e| crate::refusal::Refusal::store(e, api.registry.host()))
            };
            match blocking(&api, kept).await? {
                Some(report) => Body::from(lines(&[Event::Done(Box::new(report))])),
                None => {
                    let vm = name.clone();
                    blocking(&api, move |api| api.registry.find(&vm)).await?;
                    let why = "none was started since this agent knows it";
                    return Err(refuse(&api, RefusalKind::Unknown, format!("{name} has no migration"), why));
                }
            }
        }
    };
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

pub(super) async fn cancel(State(api): State<Api>, Path(name): Path<String>) -> Result<Response, Refused> {
    let Some(migration) = api.migrations.of(&name).filter(|migration| migration.report().is_none()) else {
        let vm = name.clone();
        blocking(&api, move |api| api.registry.find(&vm)).await?;
        let what = format!("{name} is not being migrated");
        return Err(refuse(&api, RefusalKind::Conflict, what, "there is nothing to cancel"));
    };
    if migration.phase() == Some(Phase::PostCopy) {
        let what = format!("the migration of {name} cannot be cancelled any more");
        let why =
            "it is in post-copy: the guest runs on the target already, and the rest of its memory follows";
        let mut refused = refuse(&api, RefusalKind::Conflict, what, why);
        refused.0.failure.vm_runs_on = Some(migration.request.options.to.clone());
        return Err(refused);
    }
    migration.wishes.cancel.express();
    Ok(StatusCode::ACCEPTED.into_response())
}

pub(super) async fn resolve(
    State(api): State<Api>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<StatusCode, Refused> {
    let request: ResolveRequest = read(&api, &format!("resolve {name}"), &body)?;
    // While it runs, the migration itself settles it; afterwards the journal does.
    if !api.migrations.resolve_here(&name, &request.here_fenced) {
        let (name, fenced) = (name.clone(), request.here_fenced.clone());
        blocking(&api, move |api| api.recovery.resolve_here(&name, &fenced)).await?;
    }
    api.recovery.tell_of_fencing(&name, &request.here_fenced);
    Ok(StatusCode::NO_CONTENT)
}

/// One JSON object a line.
fn lines(events: &[Event]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for event in events {
        // An event is plain data with string keys: writing it to memory cannot fail.
        if serde_json::to_writer(&mut bytes, event).is_ok() {
            bytes.push(b'\n');
        }
    }
    bytes
}

fn stream(mut follower: Follower) -> Lines {
    let (tell, told) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        while let Some(events) = follower.next().await {
            let over = events.iter().any(|event| matches!(event, Event::Done(_)));
            if tell.send(lines(&events)).await.is_err() || over {
                return;
            }
        }
    });
    Lines(told)
}

/// The lines of a running migration, as an HTTP body.
struct Lines(mpsc::Receiver<Vec<u8>>);

impl Stream for Lines {
    type Item = Result<Vec<u8>, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|batch| batch.map(Ok))
    }
}
