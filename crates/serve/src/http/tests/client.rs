//! A client that speaks HTTP/1.1 byte by byte, so that it can also speak it wrong.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::http::{Front, Keys, Options, Served};

/// A server of a test; ends with it.
pub struct Server {
    pub address: SocketAddr,
    pub front: Arc<Front>,
    pub stop: Option<oneshot::Sender<()>>,
    pub ended: tokio::task::JoinHandle<()>,
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The `data:` lines of a stream, `[DONE]` checked and left out.
    pub fn events(&self) -> Vec<Value> {
        let lines = self.body.lines().filter_map(|line| line.strip_prefix("data: "));
        let mut all: Vec<&str> = lines.collect();
        assert_eq!(all.pop(), Some("[DONE]"), "{self:?}");
        all.iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Checks that it is an error as OpenAI's clients expect it; returns its text.
    pub fn error(&self) -> String {
        let error = &self.json()["error"];
        assert!(self.status >= 400 && error["type"].is_string(), "{self:?}");
        assert!(error.get("param").is_some() && error.get("code").is_some(), "{self:?}");
        error["message"].as_str().unwrap_or_else(|| panic!("{self:?}")).to_owned()
    }
}

impl Server {
    pub async fn start(served: Option<Served>, keys: Keys) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let front = Front::new(Options { keys, loopback: true });
        if let Some(served) = served {
            front.ready(served);
        }
        let (stop, stopped) = oneshot::channel();
        let running = front.clone();
        let ended = tokio::spawn(async move {
            let stopped = async move {
                if stopped.await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            running.serve(listener, stopped).await;
        });
        Self { address, front, stop: Some(stop), ended }
    }

    /// Sends bytes, reads until the server closes.
    pub async fn raw(&self, bytes: &[u8]) -> Answer {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        // A server that has refused need not read on.
        let _ = stream.write_all(bytes).await;
        let mut all = Vec::new();
        let read = timeout(Duration::from_secs(60), stream.read_to_end(&mut all)).await;
        assert!(read.is_ok(), "no end within a minute: {}", String::from_utf8_lossy(&all));
        parse(&all)
    }

    pub async fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Answer {
        let mut bytes = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}\
             content-length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        bytes.extend_from_slice(body);
        self.raw(&bytes).await
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, "", b"").await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, "", body.to_string().as_bytes()).await
    }
}

fn parse(all: &[u8]) -> Answer {
    let text = String::from_utf8_lossy(all).into_owned();
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return Answer { status: 0, head: text, body: String::new() };
    };
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { unchunked(body) } else { body.to_owned() };
    Answer { status, head: head.to_ascii_lowercase(), body }
}

fn unchunked(mut body: &str) -> String {
    let mut out = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap_or(0);
        if size == 0 || rest.len() < size {
            break;
        }
        out.push_str(&rest[..size]);
        body = &rest[size + 2..];
    }
    out
}
