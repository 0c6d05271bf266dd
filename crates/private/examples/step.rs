//! What a private step costs beside a plain LoRA step of the same persons, at equal micro-batch:
//! forward, backward, and all that privacy adds (clipping, noise, the ledger's line on disk). Neither
//! has the optimizer, which is the same. Times are compared within one run, round by round; the
//! peak of memory is that of the ways of one run:
//!
//! `cargo run --release -p tercet-private --example step -- plain,private [TOKENS[xPERSONS]] [cuda] [KEY=VALUE…]`
//!
//! On `cuda` it is all of SmolLM2-135M and 32 persons unless said, and bf16 with
//! `train.dtype="bf16"`.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use serde_json::json;
use tercet_model::{Adapter, ForwardOptions, Model};
use tercet_private::mechanism::key::Key;
use tercet_private::mechanism::ledger::{Identity, Ledger};
use tercet_private::method::Steering;
use tercet_private::tune::account::Account;
use tercet_private::tune::rows::Person;
use tercet_private::tune::run::recipe;
use tercet_private::tune::task::{Private, Secrets, layout};
use tercet_private::tune::{Budget, PrivateConfig};
use tercet_tensor::{Device, Gpu, Grads, Tape};
use tercet_train::run::Task;
use tercet_train::tune::{Example, pack};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

const ROUNDS: usize = 9;

/// Everybody is drawn with a probability of 0.999 each.
const TEXT: &str = "output = \"none\"\n[model]\npath = \"none\"\n[lora]\nr = 8\n\
    targets = [\"q_proj\", \"v_proj\"]\n[data]\npaths = [\"none\"]\n[private]\nunit = \"row\"\n\
    cap = 1\npeople = 100000\nsigma = 1.0\n[train]\nsteps = 100000\nbatch = 99900\n";

fn main() -> Fallible<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let ways: Vec<&str> = args.first().map_or("plain,private", String::as_str).split(',').collect();
    let size = args.get(1).map_or("128", String::as_str);
    let (tokens, persons) = size.split_once('x').map_or((size, None), |(t, p)| (t, Some(p)));
    let tokens: usize = tokens.parse()?;
    let gpu = match args.get(2).is_some_and(|arg| arg == "cuda") {
        true => Some(Gpu::open(0)?),
        false => None,
    };
    // The shape of SmolLM2-135M; on a CPU with fewer layers and a smaller vocabulary.
    let (usual, layers, vocab) = if gpu.is_some() { (32, 30, 49152) } else { (8, 8, 16384) };
    let persons: usize = persons.map_or(Ok(usual), str::parse)?;
    let mut keys =
        vec![format!("data.context={tokens}"), format!("train.micro_tokens={}", tokens * persons)];
    keys.extend(args.iter().skip(if gpu.is_some() { 3 } else { 2 }).cloned());
    let config = PrivateConfig::parse(TEXT, &keys)?;
    let shape = serde_json::from_value(json!({
        "model_type": "tercet", "vocab_size": vocab, "hidden_size": 576,
        "intermediate_size": 1536, "num_hidden_layers": layers, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 2048,
        "tie_word_embeddings": true,
    }))?;
    let mut model = Model::new(shape, 1, config.train.dtype.dtype())?;
    let adapter = Adapter::new(&model, config.lora.clone().unwrap_or_default(), 2)?;
    model.attach("a", adapter)?;
    model.activate(Some("a"))?;
    if let Some(gpu) = &gpu {
        model.to_device(&Device::Cuda(gpu.clone()))?;
    }
    let person = |p: usize| {
        let ids = (0..tokens).map(|t| ((t * 31 + p * 977 + t * t * 7) % vocab) as i32).collect();
        Person { examples: vec![Example { ids, learnt: vec![true; tokens] }] }
    };
    let people: Vec<Person> = (0..persons).map(person).collect();

    let folder = tempfile::tempdir()?;
    let identity = Identity { run: "r".into(), data: "d".into(), config: "c".into() };
    let ledger = Ledger::create(&folder.path().join("ledger"), &identity)?;
    let budget = Budget::plan(&config)?;
    let (slots, layout) = layout(&model, config.private.freeze_a)?;
    let steering = Steering::new(recipe(&config, &budget, &layout)?, layout)?;
    let account = Account::new(budget, ledger.entries())?;
    let secrets = Secrets { key: Key::insecure(1), ledger };
    let mut task =
        Private::new(&config, (&people, &[]), None, slots, (steering, account), secrets, 0)?;

    let stop = AtomicBool::new(false);
    let mut times = vec![Vec::new(); ways.len()];
    let mut peaks = vec![0; ways.len()];
    let mut step = 0;
    for round in 0..ROUNDS * ways.len() {
        let mut grads = Grads::new(model.trained().len());
        if let Some(gpu) = &gpu {
            gpu.reset_peak();
        }
        let start = Instant::now();
        match ways[round % ways.len()] {
            "plain" => {
                let batch = pack(people.iter().flat_map(|person| &person.examples));
                let mut tape = Tape::recording();
                let parts = model.forward_loss(&mut tape, &batch, &ForwardOptions::default())?;
                tape.backward(&parts.loss, &mut grads)?;
            }
            "private" => {
                task.step(&model, step, &mut grads, &stop)?;
                step += 1;
            }
            other => return Err(format!("{other:?} is neither plain nor private").into()),
        }
        if let Some(gpu) = &gpu {
            gpu.synchronize()?;
            peaks[round % ways.len()] = gpu.memory_use()?.peak;
        }
        times[round % ways.len()].push(1e3 * start.elapsed().as_secs_f64());
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("VmHWM: unknown");
    let (trained, all) = (model.trained().elements(), model.params().elements());
    println!("{persons} persons of {tokens} tokens; {trained} of {all} parameters train; {peak}");
    for ((way, mut times), peak) in ways.iter().zip(times).zip(peaks) {
        times.sort_by(f64::total_cmp);
        let (middle, best) = (times[ROUNDS / 2], times[0]);
        let memory = match peak {
            0 => String::new(),
            peak => format!(", {} MB on the device", peak >> 20),
        };
        println!("{way}: {middle:.1} ms a step ({best:.1} at best){memory}");
    }
    Ok(())
}
