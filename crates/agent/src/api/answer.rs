//! Answers: JSON, and refusals with the HTTP status that fits.

use super::Api;
use crate::refusal::{Refusal, RefusalKind};
use axum::{
    Json,
    body::Bytes,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde::de::DeserializeOwned;

/// A refusal as it goes over the wire: a `Failure` as JSON.
pub(super) struct Refused(pub(super) Refusal);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status = match self.0.kind {
            RefusalKind::Bad => StatusCode::BAD_REQUEST,
            RefusalKind::Unknown => StatusCode::NOT_FOUND,
            RefusalKind::Conflict => StatusCode::CONFLICT,
            RefusalKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(self.0.failure)).into_response()
    }
}

pub(super) fn refuse(
    api: &Api,
    kind: RefusalKind,
    what: impl Into<String>,
    why: impl Into<String>,
) -> Refused {
    Refused(Refusal::new(kind, what, api.registry.host(), why))
}

/// Reads a request's body.
pub(super) fn read<T: DeserializeOwned>(api: &Api, what: &str, body: &Bytes) -> Result<T, Refused> {
    serde_json::from_slice(body).map_err(|error| {
        refuse(api, RefusalKind::Bad, format!("cannot {what}"), format!("the request is wrong: {error}"))
    })
}

/// Does what may block, on a thread where that is harmless.
pub(super) async fn blocking<T: Send + 'static>(
    api: &Api,
    work: impl FnOnce(&Api) -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refused> {
    let for_work = api.clone();
    match tokio::task::spawn_blocking(move || work(&for_work)).await {
        Ok(result) => result.map_err(Refused),
        Err(_) => Err(refuse(
            api,
            RefusalKind::Failed,
            "the request failed",
            "an error of Whimbrel itself; the agent's log has it",
        )),
    }
}
