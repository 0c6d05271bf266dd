//! Which path leads where, and what each asks of who comes: a key, a method, a loaded model.

use std::sync::Arc;

use hyper::body::Incoming;
use hyper::http::request::Parts;
use hyper::{Method, Request, StatusCode, header};
use serde_json::json;

use super::body::{self, Response, json_response, whole};
use super::error::{ApiError, ApiResult};
use super::{Front, chat, completions, guard, limits, metrics, models, openapi, tokenize};

const PAGE: &str = include_str!("page/index.html");
const SCRIPT: &str = include_str!("page/page.js");
const READS: &str = include_str!("page/reads.js");
const STYLE: &str = include_str!("page/page.css");

/// A path that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route<'p> {
    File(&'static str, &'static str),
    Live,
    Ready,
    Health,
    Metrics,
    OpenApi,
    Models,
    Model(&'p str),
    TokenizerInfo,
    Tokenize,
    Detokenize,
    Completions,
    Chat,
}

impl<'p> Route<'p> {
    /// The route of a path, and the path as it is counted.
    fn find(path: &'p str) -> Option<(Self, &'static str)> {
        Some(match path {
            "/" => (Self::File("text/html; charset=utf-8", PAGE), "/"),
            "/page.js" => (Self::File("text/javascript; charset=utf-8", SCRIPT), "/page.js"),
            "/reads.js" => (Self::File("text/javascript; charset=utf-8", READS), "/reads.js"),
            "/page.css" => (Self::File("text/css; charset=utf-8", STYLE), "/page.css"),
            "/livez" => (Self::Live, "/livez"),
            "/readyz" => (Self::Ready, "/readyz"),
            "/health" => (Self::Health, "/health"),
            "/metrics" => (Self::Metrics, "/metrics"),
            "/openapi.json" => (Self::OpenApi, "/openapi.json"),
            "/v1/models" => (Self::Models, "/v1/models"),
            "/tokenizer_info" => (Self::TokenizerInfo, "/tokenizer_info"),
            "/tokenize" => (Self::Tokenize, "/tokenize"),
            "/detokenize" => (Self::Detokenize, "/detokenize"),
            "/v1/completions" => (Self::Completions, "/v1/completions"),
            "/v1/chat/completions" => (Self::Chat, "/v1/chat/completions"),
            _ => (Self::Model(path.strip_prefix("/v1/models/")?), "/v1/models/{model}"),
        })
    }

    /// What holds nothing of the model or of anybody's words: whether the process lives and
    /// serves, and the page, which asks for a key itself. All else is closed.
    fn is_public(self) -> bool {
        matches!(self, Self::File(..) | Self::Live | Self::Ready)
    }

    fn takes_body(self) -> bool {
        matches!(self, Self::Tokenize | Self::Detokenize | Self::Completions | Self::Chat)
    }
}

/// The answer to a request.
pub async fn answer(front: &Arc<Front>, request: Request<Incoming>) -> Response {
    let (head, body) = request.into_parts();
    let route = Route::find(head.uri.path());
    let answer = match route {
        Some((route, _)) => dispatch(front, route, &head, body).await,
        None => {
            let path: String = head.uri.path().chars().take(100).collect();
            let message = format!("there is nothing at {path}; /openapi.json says what there is");
            Err(ApiError::client(StatusCode::NOT_FOUND, message))
        }
    };
    let mut response = answer.unwrap_or_else(Response::from);
    front.counts.count(route.map_or("other", |(_, name)| name), response.status());
    guard::harden(&mut response);
    response
}

async fn dispatch(
    front: &Arc<Front>,
    route: Route<'_>,
    head: &Parts,
    body: Incoming,
) -> ApiResult<Response> {
    guard::check(&head.headers, front.options.loopback)?;
    let key = if route.is_public() {
        0
    } else {
        let given = head.headers.get(header::AUTHORIZATION);
        let key = front.options.keys.check(given.map(|v| v.as_bytes()));
        key.ok_or_else(ApiError::unauthorized)?
    };
    if route.takes_body() {
        if head.method != Method::POST {
            return Err(ApiError::method(&head.method, "POST"));
        }
        let served = front.served()?;
        let place = front.place()?;
        let body = body::read(&head.headers, body, front.body_bytes()).await?;
        return match route {
            Route::Completions => completions::answer(front, served, key, &body, place).await,
            Route::Chat => chat::answer(front, served, key, &body, place).await,
            Route::Tokenize => tokenize::tokenize(front, served, &body).await,
            _ => tokenize::detokenize(front, served, &body).await,
        };
    }
    if !matches!(head.method, Method::GET | Method::HEAD) {
        return Err(ApiError::method(&head.method, "GET, HEAD"));
    }
    match route {
        Route::File(kind, text) => Ok(whole(StatusCode::OK, kind, text)),
        Route::Live => Ok(json_response(StatusCode::OK, &json!({ "status": "live" }))),
        Route::Ready | Route::Health => {
            if front.served()?.engine.stats().is_failing() {
                let message = "the engine failed at every step it took lately and cannot answer; \
                               if that lasts, restart the server";
                return Err(ApiError::unavailable(message, limits::FAILING_RETRY_S));
            }
            Ok(json_response(StatusCode::OK, &json!({ "status": "ready" })))
        }
        Route::OpenApi => {
            let document = openapi::document(!front.options.keys.is_empty());
            Ok(json_response(StatusCode::OK, &document))
        }
        Route::Metrics => Ok(metrics::page(&*front.loaded()?, &front.counts)),
        Route::Models => Ok(models::all(&*front.served()?)),
        Route::Model(name) => models::one(&*front.served()?, name),
        _ => Ok(tokenize::info(&*front.served()?)),
    }
}
