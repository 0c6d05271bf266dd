//! Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`.

use hyper::header::{self, HeaderValue};
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use super::body::{Response, json_response};
use super::limits;
use crate::engine::{EngineError, Refused};

/// What a request is answered with when it cannot be met.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// The class that clients map to an exception.
    pub kind: &'static str,
    /// What was wrong, what was expected, what to do.
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// A short name for programs.
    pub code: Option<&'static str>,
    /// Seconds to wait before trying again.
    pub retry_after: Option<u64>,
    /// The methods that the path knows, of a 405.
    pub allow: Option<&'static str>,
}

/// Result of everything that answers a request.
pub type ApiResult<T> = Result<T, ApiError>;

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, kind, message, param: None, code: None, retry_after: None, allow: None }
    }

    /// 400: the request itself is wrong.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400 that names the field at fault.
    pub fn field(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), ..Self::invalid(message) }
    }

    /// Another status of the client's own making.
    pub fn client(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", message)
    }

    /// 405: the path is there, not for this method.
    pub fn method(given: &Method, allow: &'static str) -> Self {
        let message = format!("this path does not take {given}; it takes {allow}");
        let error = Self::client(StatusCode::METHOD_NOT_ALLOWED, message);
        Self { allow: Some(allow), ..error }
    }

    /// 401: no key, or none that is known.
    pub fn unauthorized() -> Self {
        let message = "this server wants a key: send `Authorization: Bearer KEY` with one of the \
                       keys it was started with";
        let error = Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message);
        error.code("invalid_api_key")
    }

    /// 403: a page of another origin, or a name that is not ours.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    /// 404 for a model's name.
    pub fn no_model(name: &str, known: &[String]) -> Self {
        let shown: String = name.chars().take(100).collect();
        let message = format!("there is no model {shown:?}; there is {}", known.join(", "));
        let error = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
        Self { param: Some("model".into()), ..error }.code("model_not_found")
    }

    /// 429: more is going on than may.
    pub fn busy(retry_after: u64) -> Self {
        let message = format!("the server is full; try again in {retry_after} s");
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        Self { retry_after: Some(retry_after), ..error }.code("server_full")
    }

    /// 503 while the model loads: llama.cpp's body, which clients already know.
    pub fn loading() -> Self {
        Self::unavailable("Loading model", limits::LOADING_RETRY_S)
    }

    /// 503: not now.
    pub fn unavailable(message: &str, retry_after: u64) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", message);
        Self { retry_after: Some(retry_after), ..error }
    }

    /// 500: ours to explain.
    pub fn ours(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// With a name for programs.
    pub fn code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// The body.
    pub fn json(&self) -> Value {
        // A number here: llama.cpp's clients look for it.
        let unavailable = self.status == StatusCode::SERVICE_UNAVAILABLE;
        let code = if unavailable { json!(503) } else { json!(self.code) };
        json!({ "error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": code,
        } })
    }
}

impl From<ApiError> for Response {
    fn from(error: ApiError) -> Self {
        let mut response = json_response(error.status, &error.json());
        let headers = response.headers_mut();
        if let Some(seconds) = error.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(methods) = error.allow {
            headers.insert(header::ALLOW, HeaderValue::from_static(methods));
        }
        if error.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        let text = refused.to_string();
        match refused {
            Refused::Full { retry_after_s } => Self::busy(retry_after_s),
            Refused::Draining => Self::unavailable(&text, limits::LOADING_RETRY_S),
            Refused::TooLong { .. } => Self::invalid(text).code("context_length_exceeded"),
            Refused::Adapter(name) => Self::no_model(&name, &[]),
            Refused::Token { .. } | Refused::Invalid(_) => Self::invalid(text),
        }
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Model(_) => Self::ours(error.to_string()),
            EngineError::Constraint(_) => Self::invalid(error.to_string()),
        }
    }
}

impl From<tercet_model::Error> for ApiError {
    /// What the tokenizer or a chat template says of a client's text.
    fn from(error: tercet_model::Error) -> Self {
        if error.is_users() {
            Self::invalid(error.to_string())
        } else {
            Self::ours(error.to_string())
        }
    }
}
