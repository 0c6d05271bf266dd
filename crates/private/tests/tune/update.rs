//! The weights after one step are those of a script in float64.

use tercet_model::{Adapter, Batch, ForwardOptions, Model};
use tercet_private::mechanism::clip::{Blocks, ClippedSum, Grid, Rule};
use tercet_private::mechanism::key::Key;
use tercet_private::mechanism::ledger::{Identity, Ledger};
use tercet_private::mechanism::noise::{Noise, Split};
use tercet_private::mechanism::sampling::Sampler;
use tercet_private::tune::Budget;
use tercet_tensor::{Grads, Tape, Tensor};
use tercet_train::tune::{Example, pack};

use crate::common::{Room, rows, run};
use crate::tiny_chat::{EOS, ids};

/// A person's gradient alone, plainly: mean loss of the tokens that count, nothing else beside it.
fn alone(model: &Model, examples: &[Example]) -> Vec<Vec<f64>> {
    let batch: Batch = pack(examples);
    let n = batch.targets.iter().filter(|&&target| target >= 0).count() as f32;
    let slopes: Vec<f32> =
        batch.targets.iter().map(|&t| if t >= 0 { -1.0 / n } else { 0.0 }).collect();
    let mut tape = Tape::recording();
    let found = model.token_log_probs(&mut tape, &batch, &ForwardOptions::default()).unwrap();
    let mut grads = Grads::new(model.trained().len());
    let seed = Tensor::from_f32(slopes, found.log_probs.shape()).unwrap();
    tape.backward_from(&[(&found.log_probs, seed)], &mut grads).unwrap();
    let slot = |slot: usize| match grads.get(slot) {
        Some(grad) => grad.as_f32().unwrap().iter().map(|&x| f64::from(x)).collect(),
        None => vec![0.0; model.trained().tensor(slot).len()],
    };
    (0..model.trained().len()).map(slot).collect()
}

#[test]
fn one_step_is_the_script_in_float64() {
    let room = Room::new();
    let config = room.config(
        "run",
        &[
            "train.steps=1",
            "train.warmup=0",
            "train.final_lr=1.0",
            "private.cap=2",
            "private.method=\"per-layer\"",
            "private.threshold=0.5",
            "private.division=\"equal\"",
            "train.lr=0.01",
        ],
    );
    let report = run(&config, false).unwrap();
    let mut model = Model::load(&room.at("model")).unwrap();
    let checkpoint = report.checkpoint.unwrap();
    let got = Adapter::load(&checkpoint, &model).unwrap();
    let start = Adapter::new(&model, config.lora.clone().unwrap(), config.train.seed).unwrap();
    model.attach("a", start).unwrap();
    model.activate(Some("a")).unwrap();

    // Persons in the order in which they come up, with their first two rows.
    let mut people: Vec<(String, Vec<Example>)> = Vec::new();
    for row in rows() {
        let (who, text) = (row["who"].as_str().unwrap(), row["text"].as_str().unwrap());
        let ids = [ids(text), vec![EOS]].concat();
        let mut example = Example { learnt: vec![true; ids.len()], ids };
        example.truncate(64);
        match people.iter_mut().find(|(name, _)| name == who) {
            Some((_, own)) if own.len() == 2 => {}
            Some((_, own)) => own.push(example),
            None => people.push((who.to_owned(), vec![example])),
        }
    }
    let budget = Budget::plan(&config).unwrap();
    let key = Key::insecure(5);
    let drawn = Sampler::new(&key, 0.3).unwrap().draw(0, people.len());
    assert!((1..12).contains(&drawn.len()), "{drawn:?}");

    let pairs: Vec<Vec<usize>> =
        model.adapter("a").unwrap().pairs().map(|(_, slots)| slots).collect();
    let sizes: Vec<usize> = model.trained().tensors().iter().map(Tensor::len).collect();
    let bound = 0.5 / (pairs.len() as f64).sqrt();
    let mut sum: Vec<Vec<f64>> = sizes.iter().map(|&size| vec![0.0; size]).collect();
    let mut clipped = 0;
    for &person in &drawn {
        let own = alone(&model, &people[person].1);
        for pair in &pairs {
            let squares = pair.iter().flat_map(|&slot| &own[slot]).map(|x| x * x);
            let factor = (bound * (1.0 - 1.0 / 1024.0) / squares.sum::<f64>().sqrt()).min(1.0);
            clipped += usize::from(factor < 1.0);
            for &slot in pair {
                sum[slot].iter_mut().zip(&own[slot]).for_each(|(s, x)| *s += factor * x);
            }
        }
    }
    let all = drawn.len() * pairs.len();
    assert!(clipped > 0 && clipped < all, "{clipped} of {all} are clipped: C tests one side only");

    // The same noise: a sum of nobody, with the run's key and the first line's stream.
    let blocks = Blocks::by_pair(sizes, &pairs).unwrap();
    let bounds = vec![bound; pairs.len()];
    let scales = Split::Equal.scales(budget.sigma, &bounds, &blocks.dims()).unwrap();
    let mut nobody = ClippedSum::new(blocks, bounds, Rule::Clip, Grid::Fine).unwrap();
    let identity = Identity { run: "r".into(), data: "d".into(), config: "c".into() };
    let mut ledger = Ledger::create(&room.at("ledger"), &identity).unwrap();
    let spent = ledger.spend(0, 0.3, budget.sigma, &key).unwrap();
    let noise = nobody.release(spent, &Noise::new(&key), &scales, 6.0).unwrap();

    let mut furthest = 0f64;
    for (slot, (sum, noise)) in sum.iter().zip(&noise).enumerate() {
        let before = model.trained().tensor(slot).to_vec_f32().unwrap();
        let after = got.params().tensor(slot).to_vec_f32().unwrap();
        for (i, (sum, noise)) in sum.iter().zip(noise).enumerate() {
            let gradient = sum / 6.0 + f64::from(*noise);
            // AdamW's first step: m̂ = g, v̂ = g².
            let want = f64::from(before[i]) - 0.01 * gradient / (gradient.abs() + 1e-8);
            // Where g is near 0 the quotient turns with g's own rounding: 1e-5 of a gradient.
            let slack = 0.01 * (1e-5 * bound / (gradient.abs() + 1e-8)).min(2.0);
            let off = (f64::from(after[i]) - want).abs();
            furthest = furthest.max(off - slack);
            assert!(off <= slack + 1e-6, "slot {slot}, {i}: {} for {want}", after[i]);
        }
    }
    assert!(furthest < 1e-6);
}
