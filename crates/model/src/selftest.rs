//! The decoder's own test on a device: does it compute, decode and repeat what the CPU computes?
//!
//! Small random models of every family. The reference is the CPU in f32; in bf16 a device may be
//! twice as far from it as the CPU's own bf16 is, in f32 both round and the bound counts roundings.

mod slots;

use tercet_attention::selftest::{Check, Fault, Row, Tally, ensure};
use tercet_tensor::{DType, Device, Grads, Tape};

use crate::init::fresh;
use crate::{
    Adapter, Batch, ForwardOptions, Init, LoraConfig, Model, ModelConfig, ParamSpec, Result,
    hf_config,
};

/// Half the distance between 1 and the next f32.
const ROUNDING: f64 = 1.0 / (1u64 << 24) as f64;

/// Roundings in a row on the way of one number through a small model and back, generously: some
/// forty sums of at most a hundred terms.
const CHAIN: f64 = 4000.0;

/// Names and `config.json` of the models; most have heads of 64, so that a device compiles few
/// kernels.
const MODELS: [(&str, &str); 6] = [
    (
        "nsa, mean",
        r#"{"model_type": "tercet", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
            "head_dim": 64, "max_position_embeddings": 512, "nsa": {"compress_block": 16,
            "compress_stride": 8, "select_block": 16, "select_count": 4, "window": 24}}"#,
    ),
    (
        "nsa, linear, dims 32/16",
        r#"{"model_type": "tercet", "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32, "v_head_dim": 16, "max_position_embeddings": 512,
            "nsa": {"compress_block": 8, "compress_stride": 4, "select_block": 16,
            "select_count": 4, "window": 20, "compressor": "linear"}}"#,
    ),
    (
        "nsa, mlp, experts",
        r#"{"model_type": "tercet", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 64, "max_position_embeddings": 512, "nsa": {"compress_block": 8,
            "compress_stride": 4, "select_block": 8, "select_count": 4, "window": 12,
            "compressor": "mlp"}, "moe": {"routed_experts": 4, "shared_experts": 1, "top_k": 2,
            "expert_size": 24, "first_dense_layers": 1}}"#,
    ),
    (
        "llama, tied",
        r#"{"model_type": "llama", "vocab_size": 96, "hidden_size": 128, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 512, "tie_word_embeddings": true}"#,
    ),
    (
        "qwen3, q and k normed",
        r#"{"model_type": "qwen3", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 64, "max_position_embeddings": 512}"#,
    ),
    (
        "gpt2",
        r#"{"model_type": "gpt2", "vocab_size": 96, "n_embd": 128, "n_layer": 2, "n_head": 2,
            "n_positions": 512}"#,
    ),
];

/// Runs all models on `device`; `each` hears of every row.
pub fn selftest(device: &Device, each: &mut dyn FnMut(Row)) {
    for (name, config) in MODELS {
        for dtype in [DType::F32, DType::BF16] {
            let name = |what: &str| format!("{what}, {name} · {device} {dtype}");
            each(Row::of("model", name("loss and gradients"), |tally| {
                train(tally, config, device, dtype, model)
            }));
            each(Row::of("model", name("an adapter's gradients"), |tally| {
                train(tally, config, device, dtype, adapted)
            }));
            each(Row::of("model", name("decode equals prefill"), |tally| {
                decode(tally, config, device, dtype, model)
            }));
            each(Row::of("model", name("decode with an adapter"), |tally| {
                decode(tally, config, device, dtype, adapted)
            }));
            each(Row::of("model", name("decode side by side"), |tally| {
                side_by_side(tally, config, device, dtype)
            }));
            each(Row::of("model", name("pages shared and used again"), |tally| {
                slots::shared(tally, config, device, dtype)
            }));
            each(Row::of("model", name("no page left"), |tally| {
                slots::none_left(tally, config, device, dtype)
            }));
            each(Row::of("model", name("what a token selected"), |_| {
                slots::selected(config, device, dtype)
            }));
            each(Row::of("model", name("same bits in company"), |_| {
                slots::company(config, device, dtype)
            }));
        }
    }
    let (name, config) = slots::MANY_BLOCKS;
    for dtype in [DType::F32, DType::BF16] {
        let name = format!("pages shared and used again, {name} · {device} {dtype}");
        each(Row::of("model", name, |tally| slots::shared(tally, config, device, dtype)));
    }
}

fn fault(error: impl std::fmt::Display) -> Fault {
    Fault(error.to_string())
}

fn model(config: &str, device: &Device, dtype: DType) -> Check<Model> {
    let config: ModelConfig = hf_config::from_json(config).map_err(fault)?;
    // All start from the same stored numbers.
    let mut stored = Model::new(config.clone(), 3, DType::BF16).map_err(fault)?;
    // Under a fresh φ blocks score nearly alike, so that rounding may decide one of the hundreds of
    // choices; wider weights set them apart.
    for slot in 0..stored.params().len() {
        let spec = stored.params().specs()[slot].clone();
        if spec.name.contains("phi_") && matches!(spec.init, Init::Normal(_)) {
            let wide = fresh(&ParamSpec { init: Init::Normal(0.3), ..spec }, 3, DType::BF16);
            stored.params_mut().set(slot, wide.map_err(fault)?).map_err(fault)?;
        }
    }
    let tensors: std::result::Result<Vec<_>, _> =
        stored.params().tensors().iter().map(|t| t.to_dtype(dtype)).collect();
    let mut model = Model::from_tensors(config, tensors.map_err(fault)?).map_err(fault)?;
    model.to_device(device).map_err(fault)?;
    Ok(model)
}

/// The same model with an active adapter of random numbers, which drops some of its inputs.
fn adapted(config: &str, device: &Device, dtype: DType) -> Check<Model> {
    let mut model = model(config, &Device::Cpu, dtype)?;
    let lora = LoraConfig { r: 4, alpha: 6.0, dropout: 0.2, ..LoraConfig::default() };
    let mut adapter = Adapter::new(&model, lora, 5).map_err(fault)?;
    for slot in 0..adapter.params.len() {
        let spec = ParamSpec { init: Init::Normal(0.1), ..adapter.params.specs()[slot].clone() };
        let fresh = fresh(&spec, 5, DType::BF16).map_err(fault)?;
        let fresh = fresh.to_dtype(dtype).map_err(fault)?;
        adapter.params.set(slot, fresh).map_err(fault)?;
    }
    model.attach("a", adapter).map_err(fault)?;
    model.activate(Some("a")).map_err(fault)?;
    model.to_device(device).map_err(fault)?;
    Ok(model)
}

/// Token ids without a pattern.
fn ids(count: usize, vocab: usize) -> Vec<i32> {
    let hash = |i: usize| (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
    (0..count).map(|i| (hash(i) as usize % vocab) as i32).collect()
}

/// Loss and all gradients of a batch of three sequences, in one vector after another.
fn gradients(model: &Model, recompute: bool) -> Result<(f64, Vec<Vec<f32>>)> {
    let ids = ids(300, model.config().vocab_size);
    let batch = Batch::next_token(&[&ids[..170], &ids[170..177], &ids[177..]]);
    let mut tape = Tape::recording();
    let losses =
        model.forward_loss(&mut tape, &batch, &ForwardOptions { recompute, dropout: Some(11) })?;
    let mut grads = Grads::new(model.trained().len());
    tape.backward(&losses.loss, &mut grads)?;
    let loss = f64::from(losses.loss.value().item()?);
    let mut all = Vec::new();
    for (slot, spec) in model.trained().specs().iter().enumerate() {
        all.push(match grads.get(slot) {
            Some(gradient) => gradient.to_vec_f32()?,
            None => vec![0.0; spec.len()],
        });
    }
    Ok((loss, all))
}

/// Makes the model of a test.
type Make = fn(&str, &Device, DType) -> Check<Model>;

/// ‖a − b‖ and ‖b‖ over all numbers.
fn distance(a: &[Vec<f32>], b: &[Vec<f32>]) -> (f64, f64) {
    let pairs = || a.iter().flatten().zip(b.iter().flatten());
    let square = |x: f64| x * x;
    let off: f64 = pairs().map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let size: f64 = pairs().map(|(_, b)| square(f64::from(*b))).sum();
    (off.sqrt(), size.sqrt())
}

fn train(tally: &mut Tally, config: &str, device: &Device, dtype: DType, make: Make) -> Check<()> {
    let run = |device: &Device, dtype, recompute| {
        gradients(&make(config, device, dtype)?, recompute).map_err(fault)
    };
    let (exact_loss, exact) = run(&Device::Cpu, DType::F32, false)?;
    let (loss, grads) = run(device, dtype, false)?;
    let (off, size) = distance(&grads, &exact);
    let mut allowed = [CHAIN * ROUNDING * exact_loss.abs(), CHAIN * ROUNDING * size];
    if dtype == DType::BF16 {
        let (cpu_loss, cpu) = run(&Device::Cpu, dtype, false)?;
        allowed[0] += 2.0 * (cpu_loss - exact_loss).abs() + exact_loss.abs() / 256.0;
        allowed[1] += 2.0 * distance(&cpu, &exact).0;
    }
    tally.hold("loss", (loss - exact_loss).abs(), allowed[0]);
    tally.hold("gradients", off, allowed[1]);
    let same = |a: &[Vec<f32>], b: &[Vec<f32>]| {
        let bits = |x: &[Vec<f32>]| x.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
        bits(a) == bits(b)
    };
    let (again_loss, again) = run(device, dtype, false)?;
    let repeated = again_loss.to_bits() == loss.to_bits() && same(&again, &grads);
    ensure(repeated, || "a repeat gives other bits".into())?;
    let (_, recomputed) = run(device, dtype, true)?;
    ensure(same(&recomputed, &grads), || "recomputation gives other bits".into())
}

/// The logits of a whole sequence, and how far others may be from them.
fn whole_and_allowed(
    config: &str,
    device: &Device,
    dtype: DType,
    make: Make,
    ids: &[i32],
) -> Check<(Model, Vec<f32>, f64)> {
    let (model, reference) =
        (make(config, device, dtype)?, make(config, &Device::Cpu, DType::F32)?);
    let logits = |model: &Model| -> Check<Vec<f32>> {
        let logits = model.logits(ids, &[0, ids.len() as i32]);
        logits.and_then(|t| Ok(t.to_vec_f32()?)).map_err(fault)
    };
    let (whole, exact) = (logits(&model)?, logits(&reference)?);
    let size = exact.iter().fold(0.0, |m: f64, x| m.max(f64::from(x.abs())));
    let mut allowed = CHAIN * ROUNDING * size;
    if dtype == DType::BF16 {
        // Two ways through the same model round independently, each as far off as the other.
        allowed += 4.0 * error(&whole, &exact) + size / 256.0;
    }
    Ok((model, whole, allowed))
}

/// The largest difference; NaN where there is one.
fn error(a: &[f32], b: &[f32]) -> f64 {
    let each = a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs()));
    each.fold(0.0, |m, x| if x > m || x.is_nan() { x } else { m })
}

/// Logits of a whole sequence against those of a prompt in two chunks and then single tokens.
fn decode(tally: &mut Tally, config: &str, device: &Device, dtype: DType, make: Make) -> Check<()> {
    let ids = ids(150, 96);
    let (model, whole, allowed) = whole_and_allowed(config, device, dtype, make, &ids)?;
    let vocab = model.config().vocab_size;
    let mut cache = model.cache().map_err(fault)?;
    let mut at = 0;
    for count in [61, 39].into_iter().chain(std::iter::repeat_n(1, 50)) {
        let got = model.extend(&mut cache, &ids[at..at + count]).map_err(fault)?;
        at += count;
        let want = &whole[(at - 1) * vocab..at * vocab];
        tally.hold(&format!("logits after {at} tokens"), error(&got, want), allowed);
    }
    Ok(())
}

/// The same for sequences in slots: begun at other lengths, one of them a copy, one resting now and
/// then, their order and number changing from step to step.
fn side_by_side(tally: &mut Tally, config: &str, device: &Device, dtype: DType) -> Check<()> {
    let ids = ids(150, 96);
    let (model, whole, allowed) = whole_and_allowed(config, device, dtype, model, &ids)?;
    let vocab = model.config().vocab_size;
    let mut slots = model.slots(5, 150).map_err(fault)?;
    let mut hold = |what: &str, at: usize, got: &[f32]| {
        let want = &whole[(at - 1) * vocab..at * vocab];
        tally.hold(&format!("{what} after {at} tokens"), error(got, want), allowed);
    };
    for (slot, count) in [(0, 70), (1, 1), (3, 32), (4, 99)] {
        let got = slots.read(&model, slot, &ids[..count]).map_err(fault)?;
        hold("a prompt", count, &got);
    }
    let got = slots.read(&model, 0, &ids[70..81]).map_err(fault)?;
    hold("a second chunk", 81, &got);
    for turn in 0..40 {
        if turn == 20 {
            slots.copy(0, 2).map_err(fault)?;
        }
        let mut named: Vec<usize> = (0..5).filter(|&slot| slots.len(slot) > 0).collect();
        named.retain(|slot| (turn + slot) % 3 != 0);
        named.rotate_left(turn % 2);
        let tokens: Vec<(usize, i32)> =
            named.iter().map(|&slot| (slot, ids[slots.len(slot)])).collect();
        let lens: Vec<usize> = named.iter().map(|&slot| slots.len(slot) + 1).collect();
        let got = slots.step(&model, &tokens).map_err(fault)?;
        for (at, got) in lens.into_iter().zip(got.chunks(vocab)) {
            hold("side by side", at, got);
        }
    }
    slots.clear(4).map_err(fault)?;
    let got = slots.read(&model, 4, &ids[..50]).map_err(fault)?;
    hold("after another sequence", 50, &got);
    // On a GPU what has taken a step takes the next chunk by steps.
    let at = slots.len(1);
    let got = slots.read(&model, 1, &ids[at..at + 5]).map_err(fault)?;
    hold("a chunk after steps", at + 5, &got);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_passes_its_own_test() {
        selftest(&Device::Cpu, &mut |row| assert!(row.pass, "{row}"));
    }
}
