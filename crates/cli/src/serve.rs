//! `tercet serve`: a model behind OpenAI's API, and a page to talk on.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use tercet_model::{Adapter, Model, load_config};
use tercet_serve::engine::{Engine, Handle, Limits, Models};
use tercet_serve::http::{Front, Keys, Options, Served, Text};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::device::{Choice, DeviceArg};
use crate::error::user;
use crate::generate::model_folder;
use crate::machine::Machine;
use crate::{human, interrupt};

/// Where keys are read from when no file is named.
const KEYS: &str = "TERCET_API_KEYS";

/// Threads that answer; the engine has its own.
const THREADS: usize = 2;

/// Shares of the free memory that keys and values may take when nothing is said: a GPU is here
/// for this, a computer's main memory is not.
const SHARE_CUDA: f64 = 0.85;

/// Tokens of a prompt that a GPU reads at once, and of all prompts between two steps: below, launches
/// cost more than what they compute; far above, running answers would stutter.
const READS_CUDA: [usize; 2] = [512, 2048];
const SHARE_CPU: f64 = 0.5;

/// How often signals are looked for.
const GLANCE: Duration = Duration::from_millis(100);

/// Serve a model: OpenAI's API over HTTP, and a page to chat on.
///
/// MODEL is a Hugging Face folder or the output folder of a run, whose newest checkpoint is taken.
/// Every OpenAI client works with the address that is printed and /v1; a browser shows the page
/// there. Only this machine is answered to unless --host says otherwise. Ctrl-C or SIGTERM refuses
/// new requests and finishes those that run; a second one ends at once.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    tercet serve quickstart-run/train\n  \
    tercet serve ./my-model --adapter poems=./poems-adapter --port 9000\n  \
    tercet serve ./my-model --host 0.0.0.0 --api-key-file keys.txt\n\
    Keys can also be in TERCET_API_KEYS, one a line.")]
pub struct Args {
    /// Model folder, or the output folder of a run
    model: PathBuf,
    /// Address to listen on
    #[arg(long, env = "TERCET_HOST", default_value = "127.0.0.1", value_name = "ADDRESS")]
    host: Host,
    /// Port to listen on; 0 takes a free one
    #[arg(long, env = "TERCET_PORT", default_value_t = 8000, value_name = "N")]
    port: u16,
    /// A LoRA adapter, served under a name of its own; may be given several times
    #[arg(long, env = "TERCET_ADAPTER", value_name = "NAME=DIR", value_delimiter = ',')]
    adapter: Vec<NamedAdapter>,
    /// The model's name in the API [default: the folder's name]
    #[arg(long, env = "TERCET_NAME", value_name = "NAME", value_parser = name)]
    name: Option<String>,
    /// Sequences computed side by side
    #[arg(long, env = "TERCET_MAX_BATCH", default_value_t = 64, value_name = "N",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    max_batch: u16,
    /// Sequences that may wait for a place; more are answered 429
    #[arg(long, env = "TERCET_MAX_QUEUE", default_value_t = 128, value_name = "N",
          value_parser = clap::value_parser!(u32).range(0..=100_000))]
    max_queue: u32,
    /// Tokens that prompt and answer may have together [default: what the model was made for]
    #[arg(long, env = "TERCET_CONTEXT", value_name = "TOKENS", value_parser = human::parse_length)]
    context: Option<usize>,
    /// GiB for keys and values [default: half of the free memory; 85 % of a GPU's]
    #[arg(long, env = "TERCET_CACHE_GIB", value_name = "GIB", value_parser = gib)]
    cache_gib: Option<u64>,
    /// Do not keep prompts for the next request that begins with them
    #[arg(long, env = "TERCET_NO_PREFIX_CACHE")]
    no_prefix_cache: bool,
    /// Same bits in any company on a GPU, too, at the price of steps that are always full
    ///
    /// Every step then computes --max-batch rows, resting ones among them, so that an answer
    /// depends on its request, the weights and these settings alone; a model with experts
    /// writes one sequence after the other. On a CPU that holds anyway.
    #[arg(long, env = "TERCET_BATCH_INVARIANT")]
    batch_invariant: bool,
    /// Keys that clients must show, one a line
    #[arg(long, env = "TERCET_API_KEY_FILE", value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Answer other machines without asking for a key
    #[arg(long, env = "TERCET_OPEN", conflicts_with = "api_key_file")]
    open: bool,
    #[command(flatten)]
    device: DeviceArg,
}

/// An address to listen on.
#[derive(Clone, Copy, Debug)]
struct Host(IpAddr);

impl FromStr for Host {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.eq_ignore_ascii_case("localhost") {
            return Ok(Self(Ipv4Addr::LOCALHOST.into()));
        }
        let inner = text.trim_start_matches('[').trim_end_matches(']');
        inner.parse().map(Self).map_err(|_| {
            format!("`{text}` is no address; expected one such as 127.0.0.1, 0.0.0.0 or ::1")
        })
    }
}

/// `NAME=DIR`.
#[derive(Clone, Debug)]
struct NamedAdapter {
    name: String,
    dir: PathBuf,
}

impl FromStr for NamedAdapter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (given, dir) =
            text.split_once('=').ok_or_else(|| format!("`{text}` is not NAME=DIR"))?;
        Ok(Self { name: name(given)?, dir: dir.into() })
    }
}

fn name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    if text.is_empty() || text.len() > 64 || !text.chars().all(plain) {
        return Err(format!("`{text}` is no name; use 1 to 64 letters, digits, -, _, . and :"));
    }
    Ok(text.to_owned())
}

fn gib(text: &str) -> Result<u64, String> {
    let number: f64 = text.parse().map_err(|_| format!("`{text}` is not a number of GiB"))?;
    if !(number > 0.0 && number < 1e6) {
        return Err(format!("{text} GiB is outside 0 (excluded) to 1,000,000"));
    }
    Ok((number * (1u64 << 30) as f64) as u64)
}

/// Listens, loads, answers until told to stop.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let folder = model_folder(&args.model)?;
    let keys = keys(args)?;
    let own = match &args.name {
        Some(name) => name.clone(),
        None => folder_name(&args.model),
    };
    check_names(&own, &args.adapter)?;
    let loopback = args.host.0.is_loopback();
    if !loopback && keys.is_empty() && !args.open {
        return Err(user(format!(
            "--host {} lets other machines in: give --api-key-file or {KEYS}, or --open to let \
             anybody in",
            args.host.0
        )));
    }
    let stop = interrupt::stop_flag()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("http")
        .enable_all()
        .build()
        .context("cannot start the threads that answer")?;
    let address = SocketAddr::new(args.host.0, args.port);
    let listener = runtime.block_on(TcpListener::bind(address)).map_err(|e| {
        user(format!("cannot listen on {address}: {e}; name another with --host and --port"))
    })?;
    let address = listener.local_addr().context("cannot tell the address")?;
    let front = Front::new(Options { keys, loopback });
    println!("http://{address}");
    eprintln!("listening on http://{address} (API: /v1); loading {} as {own:?}", folder.display());
    let answering = {
        let (front, stop) = (front.clone(), stop.clone());
        runtime.spawn(async move { front.serve(listener, raised(stop)).await })
    };

    let (loaded, done) = oneshot::channel();
    let (choice, plan) = (args.device.choose()?, Plan::of(args, folder, own));
    let loader = std::thread::Builder::new().name("load".into());
    let thread = loader.spawn(move || loaded.send(plan.load(&choice)).is_ok());
    thread.context("cannot start the thread that loads")?;
    runtime.block_on(async {
        tokio::pin!(answering);
        let (served, engine) = tokio::select! {
            // Told to stop while loading.
            ended = &mut answering => return ended.context("the server failed"),
            loaded = done => loaded.context("loading failed")??,
        };
        front.ready(served);
        let ended = tokio::task::spawn_blocking(move || engine.join());
        tokio::select! {
            ended = &mut answering => ended.context("the server failed"),
            ended = ended => {
                // Drained, unless it was not told to.
                let whole = matches!(ended, Ok(Ok(()))) && stop.load(Ordering::SeqCst);
                anyhow::ensure!(whole, "the engine ended by itself");
                answering.await.context("the server failed")
            }
        }
    })?;
    eprintln!("stopped");
    // An answer that was cut off may still be computed.
    runtime.shutdown_background();
    Ok(())
}

/// Ends when the flag is raised.
async fn raised(stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::SeqCst) {
        tokio::time::sleep(GLANCE).await;
    }
    eprintln!("stopping: new requests are refused, running ones are finished");
}

fn keys(args: &Args) -> anyhow::Result<Keys> {
    if let Some(path) = &args.api_key_file {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        return Keys::parse(&text).map_err(|e| user(format!("{}: {e}", path.display())));
    }
    match std::env::var(KEYS) {
        Ok(text) => Keys::parse(&text).map_err(|e| user(format!("{KEYS}: {e}"))),
        Err(std::env::VarError::NotPresent) => Ok(Keys::default()),
        Err(_) => Err(user(format!("{KEYS} is not UTF-8 text"))),
    }
}

/// The last part of a path that is a name, without what no name has.
fn folder_name(path: &Path) -> String {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let last = whole.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let kept: String = last.chars().filter(|c| name(&c.to_string()).is_ok()).take(64).collect();
    if kept.is_empty() { "model".into() } else { kept }
}

fn check_names(own: &str, adapters: &[NamedAdapter]) -> anyhow::Result<()> {
    let mut names = vec![own];
    for adapter in adapters {
        if names.contains(&adapter.name.as_str()) {
            return Err(user(format!("two models would be called {:?}", adapter.name)));
        }
        names.push(&adapter.name);
    }
    Ok(())
}

/// What is loaded, and how it may run.
struct Plan {
    folder: PathBuf,
    name: String,
    adapters: Vec<NamedAdapter>,
    limits: Limits,
    cache_bytes: Option<u64>,
}

impl Plan {
    fn of(args: &Args, folder: PathBuf, name: String) -> Self {
        let limits = Limits {
            running: args.max_batch.into(),
            waiting: args.max_queue as usize,
            context: args.context,
            prefix_cache: !args.no_prefix_cache,
            batch_invariant: args.batch_invariant,
            ..Limits::default()
        };
        let adapters = args.adapter.clone();
        Self { folder, name, adapters, limits, cache_bytes: args.cache_gib }
    }

    fn load(self, device: &Choice) -> anyhow::Result<(Served, JoinHandle<()>)> {
        let start = Instant::now();
        let (config, _) = load_config(&self.folder)?;
        let most = config.max_position_embeddings;
        if let Some(asked) = self.limits.context.filter(|&asked| asked > most) {
            return Err(user(format!(
                "--context {asked} is more than the {most} tokens that the model was made for"
            )));
        }
        // The small files first: what is wrong with them is said at once.
        let text = Text::load(&self.folder, &config)?;
        let mut model = Model::load(&self.folder)?;
        for NamedAdapter { name, dir } in &self.adapters {
            let adapter = Adapter::load(dir, &model)?;
            model.attach(name, adapter)?;
        }
        model.to_device(&device.tensors())?;
        let bytes = (model.params().elements() * model.params().dtype().bytes()) as u64;
        let parameters = human::count(model.params().elements() as f64);
        eprintln!(
            "loaded in {}: {parameters} parameters, {}, on {device}",
            human::seconds(start.elapsed().as_secs_f64()),
            human::bytes(bytes)
        );
        let cache = match self.cache_bytes {
            Some(bytes) => bytes,
            None => free_bytes(device)?,
        };
        let cache_bytes = usize::try_from(cache).unwrap_or(usize::MAX);
        let waiting = self.limits.waiting;
        let mut limits = Limits { cache_bytes, ..self.limits };
        if let Choice::Cuda(_) = device {
            [limits.chunk, limits.prefill_tokens] = READS_CUDA;
        }
        // What ends a text for the page and for grammars ends it for the engine.
        let models = Models::new(model)?.with_ends(text.ends.clone());
        let (handle, engine) = Engine::start(models, limits)?;
        // Memory may hold fewer places than were asked for.
        say(&handle, cache, handle.places() - waiting);
        let sparse = config.nsa.is_some();
        Ok((Served::new(Arc::new(handle), self.name, text, sparse), engine))
    }
}

fn free_bytes(device: &Choice) -> anyhow::Result<u64> {
    let (free, share) = match device {
        Choice::Cpu => (Machine::detect().memory_available, SHARE_CPU),
        Choice::Cuda(gpu) => (gpu.memory()?.0, SHARE_CUDA),
    };
    Ok((free as f64 * share) as u64)
}

/// The plan of the memory, and that all is ready.
fn say(handle: &Handle, cache: u64, running: usize) {
    let stats = handle.stats();
    let each = stats.bytes_per_token;
    eprintln!(
        "cache: {} in {} pages; {} per token; a context of {} takes {}",
        human::bytes(cache),
        human::grouped(stats.pages_total as u64),
        human::bytes(each.ceil() as u64),
        human::length(handle.context()),
        human::bytes((each * handle.context() as f64) as u64)
    );
    if stats.reserved_bytes > 0 {
        let reserved = human::bytes(stats.reserved_bytes as u64);
        eprintln!("cache: {reserved} of it for what places hold whatever their length");
    }
    eprintln!("ready: up to {running} sequences side by side");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_names_and_sizes_are_read_as_people_write_them() {
        for (text, loopback) in [
            ("localhost", true),
            ("127.0.0.1", true),
            ("::1", true),
            ("[::1]", true),
            ("0.0.0.0", false),
            ("::", false),
        ] {
            let host: Host = text.parse().unwrap();
            assert_eq!(host.0.is_loopback(), loopback, "{text}");
        }
        for bad in ["", "example.com", "1.2.3", "127.0.0.1:80"] {
            assert!(bad.parse::<Host>().is_err(), "{bad}");
        }
        let adapter: NamedAdapter = "poems=./a=b".parse().unwrap();
        assert_eq!((adapter.name.as_str(), adapter.dir), ("poems", PathBuf::from("./a=b")));
        for bad in ["", "poems", "=x", "po ems=x", "a/b=x"] {
            assert!(bad.parse::<NamedAdapter>().is_err(), "{bad}");
        }
        assert_eq!(gib("0.5"), Ok(1 << 29));
        for bad in ["0", "-1", "nan", "inf", "1e7", "x"] {
            assert!(gib(bad).is_err(), "{bad}");
        }
    }
}
