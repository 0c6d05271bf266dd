//! `tercet generate`: text from a model folder.

use std::hash::{BuildHasher, Hasher};
use std::io::{IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::Context;
use tercet_model::{
    Adapter, ChatTemplate, Finish, Generation, GenerationConfig, Generator, Message, Model,
    Sampling, Tokenizer,
};

use crate::device::DeviceArg;
use crate::error::user;
use crate::human;

/// Continue a prompt, or talk, with a model folder.
///
/// MODEL is a Hugging Face folder (gpt2, llama, mistral, qwen2, qwen3 or tercet) or the output
/// folder of a run, whose newest checkpoint is taken. The text goes to standard output, figures to
/// standard error.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    tercet generate quickstart-run/train -p \"pub fn new(\"\n  \
    tercet generate ./SmolLM2-135M-Instruct --interactive\n  \
    tercet generate ./SmolLM2-135M-Instruct --adapter ./my-adapter -p \"Once upon a time\"")]
pub struct Args {
    /// Model folder, or the output folder of a run
    model: PathBuf,
    /// A LoRA adapter to use: a folder as PEFT writes it
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Text to continue; `-` reads standard input
    #[arg(short, long, required_unless_present = "interactive", value_name = "TEXT")]
    prompt: Option<String>,
    /// Talk: each line is your turn (or a prompt, where the model has no chat template)
    #[arg(short, long)]
    interactive: bool,
    /// Treat the prompt as one user message of a chat
    #[arg(long, conflicts_with = "interactive")]
    chat: bool,
    /// First message of a chat, from the system
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens to write at most
    #[arg(short = 'n', long, default_value_t = 256, value_name = "N")]
    max_tokens: usize,
    /// 0 always takes the most probable token [default: the model's own, or 0.8]
    #[arg(short, long, value_name = "X")]
    temperature: Option<f32>,
    /// Keep the K most probable tokens; 0 for all [default: the model's own, or 0]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Keep the most probable tokens that reach this probability [default: the model's own, or 0.95]
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Keep tokens at least this times as probable as the best [default: the model's own, or 0]
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Above 1 makes tokens that were seen less likely [default: the model's own, or 1]
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f32>,
    /// Same seed, same text [default: a new one each time, printed]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Text that ends the answer; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    #[command(flatten)]
    device: DeviceArg,
}

/// Loads the model and writes.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let folder = model_folder(&args.model)?;
    let settings = GenerationConfig::load(&folder)?;
    let sampling = sampling(args, &settings);
    sampling.validate()?;
    let tokenizer = Tokenizer::load(&folder)?;
    let device = args.device.choose()?;
    let mut model = Model::load(&folder)?;
    if let Some(dir) = &args.adapter {
        let adapter = Adapter::load(dir, &model)?;
        model.attach("adapter", adapter)?;
        model.activate(Some("adapter"))?;
    }
    model.to_device(&device.tensors())?;
    let mut generator = Generator::new(&model, &tokenizer, settings.eos_token_ids)?;
    let adapter = args.adapter.as_ref().map(|dir| format!(" with {}", dir.display()));
    eprintln!(
        "{}{} · {} parameters · {device} · seed {}",
        folder.display(),
        adapter.unwrap_or_default(),
        human::count(model.params().elements() as f64),
        sampling.seed
    );
    if args.interactive {
        return interactive(args, &mut generator, &tokenizer, &sampling);
    }
    let prompt = match args.prompt.as_deref() {
        Some("-") => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map_err(|e| {
                user(format!("standard input could not be read as UTF-8 text: {e}"))
            })?;
            text
        }
        Some(text) => text.to_owned(),
        None => return Err(user("give a prompt: -p TEXT")),
    };
    let ids = if args.chat {
        let template = template(&tokenizer)?;
        let mut messages = opening(args);
        messages.push(Message::new("user", &prompt));
        tokenizer.encode(&template.render(&messages, true)?, false)?
    } else {
        write_now(&prompt)?;
        tokenizer.encode(&prompt, true)?
    };
    let written = generator.generate(&ids, &sampling, &mut show)?;
    write_now("\n")?;
    eprintln!("{}", figures(&written, &generator));
    Ok(())
}

/// The folder of a model: itself, or the newest checkpoint of a run.
pub fn model_folder(path: &Path) -> anyhow::Result<PathBuf> {
    if path.join("config.json").is_file() {
        return Ok(path.to_owned());
    }
    if !path.is_dir() {
        return Err(user(format!("{} is not a folder; expected a model folder", path.display())));
    }
    let newest = tercet_train::newest_checkpoint(path)?.ok_or_else(|| {
        user(format!(
            "{} is neither a model folder (it has no config.json) nor a run with a complete \
             checkpoint",
            path.display()
        ))
    })?;
    if newest.join("adapter_config.json").is_file() {
        return Err(user(format!(
            "{} trained an adapter, {}, which is no model by itself; name the folder of the model \
             it belongs to, and the adapter beside it",
            path.display(),
            newest.display()
        )));
    }
    Ok(newest)
}

/// Command line over the model's own settings over the defaults.
fn sampling(args: &Args, settings: &GenerationConfig) -> Sampling {
    let base = settings.apply(Sampling::default());
    Sampling {
        temperature: args.temperature.unwrap_or(base.temperature),
        top_k: args.top_k.unwrap_or(base.top_k),
        top_p: args.top_p.unwrap_or(base.top_p),
        min_p: args.min_p.unwrap_or(base.min_p),
        repetition_penalty: args.repetition_penalty.unwrap_or(base.repetition_penalty),
        seed: args.seed.unwrap_or_else(fresh_seed),
        max_tokens: args.max_tokens,
        stop: args.stop.clone(),
        ..base
    }
}

/// A seed nobody chose; short enough to type again.
fn fresh_seed() -> u64 {
    std::hash::RandomState::new().build_hasher().finish() % 1_000_000
}

fn template(tokenizer: &Tokenizer) -> anyhow::Result<&ChatTemplate> {
    tokenizer
        .chat()
        .ok_or_else(|| user("this model has no chat template: it continues text; leave out --chat"))
}

fn opening(args: &Args) -> Vec<Message> {
    args.system.iter().map(|text| Message::new("system", text)).collect()
}

/// Reads turns until the input ends or says /bye.
fn interactive(
    args: &Args,
    generator: &mut Generator,
    tokenizer: &Tokenizer,
    sampling: &Sampling,
) -> anyhow::Result<()> {
    let template = tokenizer.chat();
    eprintln!(
        "{}; /clear forgets, /bye or the end of input leaves",
        if template.is_some() { "a chat" } else { "no chat template: each line is continued" }
    );
    let mut messages = opening(args);
    while let Some(line) = read_line()? {
        match line.trim() {
            "" => continue,
            "/bye" => break,
            "/clear" => {
                messages = opening(args);
                continue;
            }
            _ => {}
        }
        let ids = match template {
            Some(template) => {
                messages.push(Message::new("user", line.trim()));
                tokenizer.encode(&template.render(&messages, true)?, false)?
            }
            None => tokenizer.encode(&line, true)?,
        };
        let written = generator.generate(&ids, sampling, &mut show)?;
        write_now("\n")?;
        eprintln!("{}", figures(&written, generator));
        messages.push(Message::new("assistant", &written.text));
    }
    Ok(())
}

/// The next line without its end; none when the input has ended.
fn read_line() -> anyhow::Result<Option<String>> {
    if std::io::stdin().is_terminal() {
        eprint!("> ");
    }
    let mut line = String::new();
    let read = std::io::stdin()
        .read_line(&mut line)
        .map_err(|e| user(format!("standard input could not be read as UTF-8 text: {e}")))?;
    let text = line.trim_end_matches(['\n', '\r']).to_owned();
    Ok((read > 0).then_some(text))
}

fn write_now(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("cannot write the text")
}

/// Shows a piece as soon as it comes; stops when nobody reads any more.
fn show(piece: &str) -> ControlFlow<()> {
    match write_now(piece) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    }
}

fn figures(written: &Generation, generator: &Generator) -> String {
    let why = match &written.finish {
        Finish::EndOfText => "end of text".into(),
        Finish::Stop(text) => format!("stop text {text:?}"),
        Finish::MaxTokens => "--max-tokens reached".into(),
        Finish::ContextFull => "the context is full".into(),
        Finish::Cancelled => "output closed".into(),
    };
    format!(
        "read {} tokens at {:.0} tok/s · wrote {} at {:.1} tok/s · cache {} · {why}",
        written.read_tokens,
        written.prefill_rate(),
        written.tokens.len(),
        written.decode_rate(),
        human::bytes(generator.cache_bytes() as u64),
    )
}
