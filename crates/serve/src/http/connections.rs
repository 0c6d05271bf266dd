//! Connections: how many, how long they may idle, and how long an answer may lie unread.

use std::future::{Future, poll_fn};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, server::conn::http1};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};

use super::body::Response;
use super::error::ApiError;
use super::{Front, limits, router};

/// Pause after the system refused a connection, most often for want of file descriptors.
const BREATH: Duration = Duration::from_millis(50);

/// Time for connections to end by themselves once all answers are given.
const GOODBYE: Duration = Duration::from_secs(2);

/// Answers connections until `stop`; then refuses new requests, waits for those that run, at most
/// [`limits::DRAIN_TIME`], and returns.
pub async fn serve(front: Arc<Front>, listener: TcpListener, stop: impl Future<Output = ()>) {
    let places = Arc::new(Semaphore::new(limits::CONNECTIONS));
    let (close, closed) = watch::channel(false);
    let mut stop = pin!(stop);
    let mut deadline = None;
    loop {
        // While draining, connections are still answered, with 503.
        let quiet = async {
            match deadline {
                None => stop.as_mut().await,
                Some(deadline) => tokio::select! {
                    () = sleep_until(deadline) => {}
                    () = front.idle() => {}
                },
            }
        };
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => accept(&front, stream, &places, &closed),
                Err(_) => sleep(BREATH).await,
            },
            () = quiet => match deadline {
                None => {
                    front.drain();
                    deadline = Some(Instant::now() + limits::DRAIN_TIME);
                }
                Some(_) => break,
            },
        }
    }
    let _ = close.send(true);
    let _ = timeout(GOODBYE, places.acquire_many(limits::CONNECTIONS as u32)).await;
}

fn accept(
    front: &Arc<Front>,
    stream: TcpStream,
    places: &Arc<Semaphore>,
    closed: &watch::Receiver<bool>,
) {
    // Tokens are small and each is awaited.
    let _ = stream.set_nodelay(true);
    match places.clone().try_acquire_owned() {
        Ok(place) => {
            tokio::spawn(converse(front.clone(), stream, place, closed.clone()));
        }
        Err(_) => {
            tokio::spawn(turn_away(stream));
        }
    }
}

/// One connection, request after request.
async fn converse(
    front: Arc<Front>,
    stream: TcpStream,
    place: OwnedSemaphorePermit,
    mut closed: watch::Receiver<bool>,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let front = front.clone();
        async move { Ok::<Response, std::convert::Infallible>(guarded(&front, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits::HEADER_TIME)
        .max_buf_size(limits::HEADER_BYTES)
        .max_headers(limits::HEADERS)
        .serve_connection(TokioIo::new(Impatient::new(stream)), service);
    let mut connection = pin!(connection);
    // Errors here are clients that went away or spoke no HTTP; hyper has answered what it could.
    tokio::select! {
        _ = connection.as_mut() => {}
        _ = closed.changed() => {
            connection.as_mut().graceful_shutdown();
            let _ = timeout(GOODBYE, connection).await;
        }
    }
    drop(place);
}

/// The answer to a request, a panic included: that one is ours and ends nothing but itself.
async fn guarded(front: &Arc<Front>, request: Request<Incoming>) -> Response {
    let mut answer = pin!(router::answer(front, request));
    let caught =
        poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| answer.as_mut().poll(context))) {
            Ok(poll) => poll.map(Some),
            Err(_) => Poll::Ready(None),
        });
    let lost = || ApiError::ours("a fault of this server; please report it").into();
    caught.await.unwrap_or_else(lost)
}

/// One connection too many.
async fn turn_away(mut stream: TcpStream) {
    let body = ApiError::unavailable("too many connections are open", 1).json().to_string();
    let text = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let _ = timeout(Duration::from_secs(1), stream.write_all(text.as_bytes())).await;
}

/// A connection that fails when a written byte is not taken within [`limits::SLOW_READER`].
struct Impatient {
    stream: TcpStream,
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Impatient {
    fn new(stream: TcpStream) -> Self {
        Self { stream, waiting: None }
    }

    fn watch<T>(
        &mut self,
        context: &mut Context<'_>,
        poll: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.waiting = None;
            return poll;
        }
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(limits::SLOW_READER)));
        waiting.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Impatient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(context, poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.watch(context, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
