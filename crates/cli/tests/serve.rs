//! `tercet serve` from outside: what it says, what it answers, how it ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tercet_model::{Adapter, LoraConfig, Model, ModelConfig};
use tercet_tensor::DType;

fn tercet(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tercet"));
    command.current_dir(folder).args(args).stdin(Stdio::null()).output().unwrap()
}

/// `model` with a tokenizer, an adapter `one`, and a file of keys.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("text.txt"), "to be or not to be, that is the question\n".repeat(40))
        .unwrap();
    std::fs::write(at("keys.txt"), "# one\nthe-first-key\n").unwrap();
    std::fs::create_dir(at("model")).unwrap();
    std::fs::create_dir(at("one")).unwrap();
    let args = ["tokenizer", "train", "text.txt", "-v", "270", "-o", "model/tokenizer.json"];
    assert!(tercet(folder.path(), &args).status.success());
    let config: ModelConfig = serde_json::from_value(serde_json::json!({
        "model_type": "llama", "vocab_size": 270, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "max_position_embeddings": 128, "initializer_range": 0.25,
    }))
    .unwrap();
    let model = Model::new(config, 1, DType::F32).unwrap();
    model.save(&at("model")).unwrap();
    let lora = LoraConfig { r: 2, ..LoraConfig::default() };
    let adapter = Adapter::new(&model, lora, 1).unwrap();
    adapter.save(&at("one"), "model").unwrap();
    folder
}

/// A server; killed with the test.
struct Server {
    child: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(folder: &Path, more: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tercet"));
        command.current_dir(folder).args(["serve", "model", "--port", "0", "--device", "cpu"]);
        command.args(["--cache-gib", "0.1"]).args(more).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("http://").unwrap_or_default().to_owned();
        let server = Self { child, address };
        let start = Instant::now();
        while !server.ask("GET", "/readyz", "", "").starts_with("HTTP/1.1 200") {
            assert!(start.elapsed() < Duration::from_secs(60), "not ready within a minute");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn ask(&self, method: &str, path: &str, headers: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let text = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n{headers}\
             content-length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        );
        stream.write_all(text.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Ends it as an orchestrator does; what it said, and whether it was fine.
    #[cfg(unix)]
    fn end(mut self) -> (String, Option<i32>) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let mut said = String::new();
        self.child.stderr.as_mut().unwrap().read_to_string(&mut said).unwrap();
        let code = self.child.wait().unwrap().code();
        (said, code)
    }
}

#[cfg(unix)]
#[test]
fn a_server_says_where_it_is_answers_for_model_and_adapter_and_drains() {
    let folder = folder();
    let server = Server::start(folder.path(), &["--adapter", "poems=one", "--name", "bard"]);
    let names = server.ask("GET", "/v1/models", "", "");
    assert!(names.contains("\"bard\"") && names.contains("\"poems\""), "{names}");
    for model in ["bard", "poems"] {
        let body = format!(
            "{{\"model\":\"{model}\",\"prompt\":\"to be\",\"max_tokens\":5,\"ignore_eos\":true}}"
        );
        let answer = server.ask("POST", "/v1/completions", "", &body);
        assert!(answer.contains("\"completion_tokens\":5"), "{answer}");
    }
    assert!(server.ask("GET", "/", "", "").contains("<!doctype html>"));
    let (said, code) = server.end();
    assert_eq!(code, Some(0), "{said}");
    for word in ["listening on http://127.0.0.1:", "per token", "ready", "stopping", "stopped"] {
        assert!(said.contains(word), "{word}: {said}");
    }
}

/// A chat model whose `config.json` names no end: `generation_config.json` does.
#[test]
fn an_answer_ends_where_the_generation_config_says() {
    let folder = folder();
    let at = |name: &str| folder.path().join("model").join(name);
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    std::fs::write(at("chat_template.jinja"), template).unwrap();
    let body = "{\"messages\":[{\"role\":\"user\",\"content\":\"to be\"}],\"max_tokens\":40,\
                \"temperature\":0,\"return_token_ids\":true}";
    let answer = || {
        let server = Server::start(folder.path(), &[]);
        let answer = server.ask("POST", "/v1/chat/completions", "", body);
        let (_, json) = answer.split_once("\r\n\r\n").unwrap();
        let json: serde_json::Value = serde_json::from_str(json).unwrap();
        json["choices"][0].clone()
    };
    let whole = answer();
    assert_eq!(whole["finish_reason"], "length", "no end is known: {whole}");
    let ids = whole["token_ids"].as_array().unwrap();
    assert_eq!(ids.len(), 40);
    // A token in the middle becomes the end; the answer stops where it comes first.
    let end = &ids[20];
    let first = ids.iter().position(|id| id == end).unwrap();
    let generation = serde_json::json!({ "eos_token_id": [end] }).to_string();
    std::fs::write(at("generation_config.json"), generation).unwrap();
    let ended = answer();
    assert_eq!(ended["finish_reason"], "stop", "{ended}");
    assert_eq!(ended["token_ids"].as_array().unwrap(), &ids[..first]);
}

#[test]
fn keys_come_from_a_file_and_are_asked_for() {
    let folder = folder();
    let server = Server::start(folder.path(), &["--api-key-file", "keys.txt"]);
    assert!(server.ask("GET", "/v1/models", "", "").starts_with("HTTP/1.1 401"));
    let key = "authorization: Bearer the-first-key\r\n";
    assert!(server.ask("GET", "/v1/models", key, "").starts_with("HTTP/1.1 200"));
}

#[test]
fn what_cannot_be_served_is_refused_before_it_is_loaded() {
    let folder = folder();
    std::fs::write(folder.path().join("none.txt"), "# no key\n").unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for (args, word) in [
        (&["serve", "nowhere"][..], "nowhere"),
        (&["serve", "model", "--host", "0.0.0.0"], "--api-key-file"),
        (&["serve", "model", "--host", "example.com"], "example.com"),
        (&["serve", "model", "--api-key-file", "none.txt"], "no key"),
        (&["serve", "model", "--api-key-file", "absent.txt"], "absent.txt"),
        (&["serve", "model", "--adapter", "model=one"], "two models"),
        (&["serve", "model", "--adapter", "one"], "NAME=DIR"),
        (&["serve", "model", "--port", "0", "--adapter", "x=nowhere"], "nowhere"),
        (&["serve", "model", "--port", "0", "--cache-gib", "0.000001"], "pages"),
        (&["serve", "model", "--port", &port], "cannot listen"),
        (&["serve", "model", "--max-batch", "0"], "1..=1024"),
    ] {
        let output = tercet(folder.path(), args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.contains(word), "{args:?}: {said}");
    }
}
