//! Bodies: how a request's is read within bounds, and the two kinds an answer has.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body as HttpBody, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{self, HeaderValue};
use hyper::{HeaderMap, StatusCode};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::error::{ApiError, ApiResult};
use super::limits;

/// What a client gets.
pub type Response = hyper::Response<Body>;

/// The body of an answer.
pub enum Body {
    /// All at once; empty once it was written.
    Whole(Bytes),
    /// Piece after piece. Dropping it tells the writer that nobody reads any more.
    Pieces(mpsc::Receiver<Bytes>),
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Pieces(pieces) => {
                pieces.poll_recv(context).map(|p| p.map(|p| Ok(Frame::data(p))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(bytes) if bytes.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Pieces(_) => SizeHint::default(),
        }
    }
}

/// A whole answer of a media type.
pub fn whole(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response {
    with_type(status, kind, Body::Whole(body.into()))
}

/// A JSON answer.
pub fn json_response(status: StatusCode, body: &Value) -> Response {
    whole(status, "application/json", body.to_string())
}

/// Server-sent events, as they come.
pub fn events(pieces: mpsc::Receiver<Bytes>) -> Response {
    let mut response = with_type(StatusCode::OK, "text/event-stream", Body::Pieces(pieces));
    // nginx would collect the stream otherwise.
    let off = HeaderValue::from_static("no");
    response.headers_mut().insert("x-accel-buffering", off);
    response
}

fn with_type(status: StatusCode, kind: &'static str, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// Reads a request's body: at most `most` bytes, within [`limits::BODY_TIME`].
pub async fn read(headers: &HeaderMap, body: Incoming, most: usize) -> ApiResult<Bytes> {
    let too_large = || {
        let message = format!("the body has more than {most} bytes, the most that is taken");
        ApiError::client(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    let encoding = headers.get(header::CONTENT_ENCODING);
    if encoding.is_some_and(|encoding| encoding.as_bytes() != b"identity") {
        let message = "the body is compressed; send it as it is";
        return Err(ApiError::client(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    if announced.is_some_and(|bytes: u64| bytes > most as u64) {
        return Err(too_large());
    }
    match timeout(limits::BODY_TIME, Limited::new(body, most).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(e)) => Err(ApiError::invalid(format!("the body could not be read: {e}"))),
        Err(_) => {
            let seconds = limits::BODY_TIME.as_secs();
            let message = format!("the body did not come within {seconds} s");
            Err(ApiError::client(StatusCode::REQUEST_TIMEOUT, message))
        }
    }
}
