//! A private step of a tiny model, end to end: with neither noise nor clipping it is the plain one;
//! how the work is cut changes no bit; an empty draw releases noise and costs a line.

use std::path::Path;

use serde_json::json;
use tercet_model::{Adapter, Batch, ForwardOptions, LoraConfig, Model};
use tercet_private::mechanism::clip::{Blocks, ClippedSum, Grid, Rule};
use tercet_private::mechanism::key::Key;
use tercet_private::mechanism::ledger::{Identity, Ledger, Mark};
use tercet_private::mechanism::noise::{Noise, Split};
use tercet_private::mechanism::sampling::Sampler;
use tercet_tensor::{DType, Grads, Tape, Tensor};

/// A person's sequences.
type Person = Vec<Vec<i32>>;

fn model() -> Model {
    let config = json!({
        "model_type": "tercet", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 512, "initializer_range": 0.25,
    });
    let mut model = Model::new(serde_json::from_value(config).unwrap(), 7, DType::F32).unwrap();
    let config = LoraConfig { r: 4, ..LoraConfig::default() };
    let adapter = Adapter::new(&model, config, 3).unwrap();
    model.attach("a", adapter).unwrap();
    model.activate(Some("a")).unwrap();
    // B is 0 at the start, so that A would learn nothing.
    let params = model.trained_mut();
    for slot in 0..params.len() {
        let shape = params.tensor(slot).shape().to_vec();
        if params.name(slot).contains("lora_B") {
            let at = |i: usize| (((i * 37 + slot * 11) % 101) as f32 / 50.0 - 1.0) * 0.1;
            let values = (0..shape.iter().product()).map(at).collect();
            params.set(slot, Tensor::from_f32(values, &shape).unwrap()).unwrap();
        }
    }
    model
}

/// Persons with one to three sequences of 2 to 40 tokens.
fn people(count: usize) -> Vec<Person> {
    let mut state = 4321u64;
    let mut next = |below: u64| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % below
    };
    let mut person = || -> Person {
        let sequences = 1 + next(3);
        (0..sequences)
            .map(|_| {
                let tokens = 2 + next(39);
                (0..tokens).map(|_| next(96) as i32).collect()
            })
            .collect()
    };
    (0..count).map(|_| person()).collect()
}

/// Rows of every packed batch: see [`portions_change_no_bit`].
const ROWS: usize = 1024;

/// The gradients of Σ `weight` · mean loss of a person's tokens. After the persons come rows that
/// are nobody's and have no loss.
fn walk(model: &Model, persons: &[&Person], weight: f32, mut grads: Grads) -> Grads {
    let sequences: Vec<&[i32]> = persons.iter().flat_map(|p| p.iter()).map(|s| &s[..]).collect();
    let mut batch = Batch::next_token(&sequences);
    batch.fill_up(ROWS, 500).unwrap();
    assert_eq!(batch.input_ids.len(), ROWS);
    let mut slopes = Vec::new();
    for person in persons {
        let tokens: usize = person.iter().map(Vec::len).sum();
        slopes.extend(vec![-weight / (tokens - person.len()) as f32; tokens]);
    }
    slopes.resize(ROWS, 0.0);
    let mut tape = Tape::recording();
    let found = model.token_log_probs(&mut tape, &batch, &ForwardOptions::default()).unwrap();
    let seed = Tensor::from_f32(slopes, found.log_probs.shape()).unwrap();
    tape.backward_from(&[(&found.log_probs, seed)], &mut grads).unwrap();
    grads
}

fn by_person(model: &Model, persons: &[&Person]) -> Grads {
    let mut groups = Vec::new();
    let mut start = 0;
    for person in persons {
        let end = start + person.iter().map(Vec::len).sum::<usize>();
        groups.push(start..end);
        start = end;
    }
    groups.push(start..ROWS);
    walk(model, persons, 1.0, Grads::by_group(model.trained().len(), groups).unwrap())
}

/// The persons' gradients, without those of the rows that are nobody's.
fn slices(grads: &Grads, persons: usize) -> Vec<Option<&[f32]>> {
    let of = |g: &Tensor| g.len() / g.shape()[0] * persons;
    grads.iter().map(|g| g.map(|g| &g.as_f32().unwrap()[..of(g)])).collect()
}

fn sizes(model: &Model) -> Vec<usize> {
    model.trained().tensors().iter().map(Tensor::len).collect()
}

fn pairs(model: &Model) -> Blocks {
    let pairs: Vec<_> = model.adapter("a").unwrap().pairs().map(|(_, slots)| slots).collect();
    Blocks::by_pair(sizes(model), &pairs).unwrap()
}

fn identity() -> Identity {
    Identity { run: "run".into(), data: "data".into(), config: "config".into() }
}

/// One step of everybody with these thresholds and no noise.
fn bare_step(model: &Model, people: &[Person], blocks: Blocks, bound: f64) -> Vec<Vec<f32>> {
    let folder = tempfile::tempdir().unwrap();
    let mut ledger = Ledger::create(&folder.path().join("ledger"), &identity()).unwrap();
    let key = Key::insecure(1);
    let bounds = vec![bound; blocks.len()];
    let mut sum = ClippedSum::new(blocks, bounds.clone(), Rule::Clip, Grid::Fine).unwrap();
    let drawn = Sampler::new(&key, 1.0).unwrap().draw(ledger.next_stream(), people.len());
    let drawn: Vec<&Person> = drawn.into_iter().map(|i| &people[i]).collect();
    assert_eq!(drawn.len(), people.len());
    sum.add(drawn.len(), &slices(&by_person(model, &drawn), drawn.len())).unwrap();
    let scales = Split::Flat.scales(0.0, &bounds, &sum.blocks().dims()).unwrap();
    let spent = ledger.spend(0, 1.0, 0.0, &key).unwrap();
    sum.release(spent, &Noise::new(&key), &scales, people.len() as f64).unwrap()
}

fn assert_close(got: &[f32], want: impl Iterator<Item = f64>, most: f64, what: &str) {
    let want: Vec<f64> = want.collect();
    assert_eq!(got.len(), want.len());
    let size = want.iter().fold(0f64, |most, x| most.max(x.abs()));
    for (got, want) in got.iter().zip(want) {
        let off = (f64::from(*got) - want).abs();
        assert!(off <= most * size, "{what}: {got} for {want}, off by {:e}", off / size);
    }
}

/// A person among others and the same person alone, in a batch of their own: sums of the same f32
/// numbers in another order, 1e-5 of the largest.
#[test]
fn persons_gradients_are_those_of_persons_alone() {
    let (model, people) = (model(), people(9));
    let all: Vec<&Person> = people.iter().collect();
    let together = by_person(&model, &all);
    for (at, &person) in all.iter().enumerate() {
        let alone = walk(&model, &[person], 1.0, Grads::new(model.trained().len()));
        for (slot, together) in slices(&together, 9).into_iter().enumerate() {
            let alone = alone.get(slot).unwrap().as_f32().unwrap();
            let own = &together.unwrap()[at * alone.len()..][..alone.len()];
            let want = alone.iter().map(|&x| f64::from(x));
            assert_close(own, want, 1e-5, model.trained().name(slot));
        }
    }
}

/// Two ways of summing the same f32 numbers, through two layers: 1e-5 of the largest, as for
/// gradients by group.
#[test]
fn without_noise_and_clipping_it_is_the_mean_of_persons_means() {
    let (model, people) = (model(), people(9));
    let all: Vec<&Person> = people.iter().collect();
    let plain = walk(&model, &all, 1.0 / 9.0, Grads::new(model.trained().len()));
    for blocks in [Blocks::flat(sizes(&model)).unwrap(), pairs(&model)] {
        let released = bare_step(&model, &people, blocks, 1e9);
        for (slot, released) in released.iter().enumerate() {
            let plain = plain.get(slot).unwrap().as_f32().unwrap().iter();
            assert_close(released, plain.map(|&x| f64::from(x)), 1e-5, model.trained().name(slot));
        }
    }
}

/// The formulas in float64, from the same persons' gradients; what is released is rounded to f32
/// once.
#[test]
fn with_clipping_it_is_the_formula() {
    let (model, people) = (model(), people(9));
    let all: Vec<&Person> = people.iter().collect();
    let grads = by_person(&model, &all);
    let own = |slot: usize, person: usize| -> Vec<f64> {
        let all = slices(&grads, 9)[slot].unwrap();
        let size = all.len() / 9;
        all[person * size..][..size].iter().map(|&x| f64::from(x)).collect()
    };
    let slots = model.trained().len();
    let flat = Blocks::flat(sizes(&model)).unwrap();
    for blocks in [flat, pairs(&model)] {
        // The median norm, so that half are clipped.
        let one = vec![1.0; blocks.len()];
        let mut sum = ClippedSum::new(blocks.clone(), one, Rule::Clip, Grid::Fine).unwrap();
        let mut norms = sum.add(9, &slices(&grads, 9)).unwrap().norms;
        norms.sort_by(f64::total_cmp);
        let bound = norms[norms.len() / 2];
        let mut clipped = 0;
        let mut want: Vec<Vec<f64>> =
            sizes(&model).into_iter().map(|size| vec![0.0; size]).collect();
        for person in 0..9 {
            let mut squares = vec![0.0; blocks.len()];
            for slot in 0..slots {
                squares[blocks.block_of(slot)] +=
                    own(slot, person).iter().map(|x| x * x).sum::<f64>();
            }
            let safe = bound * (1.0 - 2f64.powi(-10));
            let factors: Vec<f64> = squares.iter().map(|s| (safe / s.sqrt()).min(1.0)).collect();
            clipped += factors.iter().filter(|&&f| f < 1.0).count();
            for (slot, want) in want.iter_mut().enumerate() {
                let factor = factors[blocks.block_of(slot)];
                let own = own(slot, person);
                want.iter_mut().zip(own).for_each(|(want, x)| *want += factor * x / 9.0);
            }
        }
        assert!(clipped.abs_diff(9 * blocks.len() / 2) <= 1, "{clipped} are clipped");
        let released = bare_step(&model, &people, blocks, bound);
        for (slot, (released, want)) in released.iter().zip(&want).enumerate() {
            // Rounded once: 2⁻²⁴ of itself.
            assert_close(released, want.iter().copied(), 1e-7, model.trained().name(slot));
        }
    }
}

/// What a run is cut into.
#[derive(Clone, Copy)]
struct Cut {
    /// Persons that go through the model together.
    portion: usize,
    threads: usize,
    /// The process ends after this step and another goes on.
    stop: Option<u64>,
    grid: Grid,
}

/// What a checkpoint would hold.
struct State {
    model: Model,
    step: u64,
    mark: Option<Mark>,
}

/// Steps up to `until`, by plain gradient descent.
fn go_on(state: State, until: u64, people: &[Person], path: &Path, cut: Cut) -> State {
    let State { mut model, step, mark } = state;
    let mut ledger = match &mark {
        None => Ledger::create(path, &identity()).unwrap(),
        mark => Ledger::open(path, &identity(), mark.as_ref()).unwrap(),
    };
    let key = Key::insecure(5);
    let (sampler, noise) = (Sampler::new(&key, 0.4).unwrap(), Noise::new(&key));
    let blocks = pairs(&model);
    let (bounds, dims) = (vec![0.3; blocks.len()], blocks.dims());
    let mut sum = ClippedSum::new(blocks, bounds.clone(), Rule::Clip, cut.grid).unwrap();
    let scales = Split::LeastEnergy.scales(0.8, &bounds, &dims).unwrap();
    for step in step..until {
        let drawn = sampler.draw(ledger.next_stream(), people.len());
        for portion in drawn.chunks(cut.portion) {
            let persons: Vec<&Person> = portion.iter().map(|&i| &people[i]).collect();
            sum.add(persons.len(), &slices(&by_person(&model, &persons), persons.len())).unwrap();
        }
        let spent = ledger.spend(step, 0.4, 0.8, &key).unwrap();
        let update = sum.release(spent, &noise, &scales, 0.4 * people.len() as f64).unwrap();
        for (tensor, update) in model.trained_mut().tensors_mut().iter_mut().zip(update) {
            let values = tensor.as_f32_mut().unwrap();
            values.iter_mut().zip(update).for_each(|(value, update)| *value -= 1e-3 * update);
        }
    }
    let mark = Some(ledger.mark());
    State { model, step: until, mark }
}

fn run(people: &[Person], cut: Cut) -> (Vec<Vec<u32>>, Mark) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(cut.threads).build().unwrap();
    pool.install(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        let mut state = State { model: model(), step: 0, mark: None };
        if let Some(stop) = cut.stop {
            state = go_on(state, stop, people, &path, cut);
        }
        let state = go_on(state, 5, people, &path, cut);
        let bits = |t: &Tensor| t.as_f32().unwrap().iter().map(|x| x.to_bits()).collect();
        (state.model.trained().tensors().iter().map(bits).collect(), state.mark.unwrap())
    })
}

#[test]
fn threads_and_resuming_change_no_bit() {
    let people = people(12);
    for grid in [Grid::Fine, Grid::Hardened] {
        let whole = Cut { portion: 12, threads: 1, stop: None, grid };
        let one = run(&people, whole);
        for cut in [
            Cut { threads: 2, ..whole },
            Cut { threads: 5, ..whole },
            Cut { stop: Some(2), ..whole },
            Cut { stop: Some(0), threads: 3, ..whole },
        ] {
            assert!(run(&people, cut) == one, "{} threads, stopped {:?}", cut.threads, cut.stop);
        }
    }
}

/// Products of few rows sum in another order than those of many, so that a person's gradient would
/// depend, in its last bits, on who else is in the portion: on other persons' data, which the
/// sensitivity does not allow for. Batches of equally many rows, filled up with rows that are
/// nobody's, leave no such difference.
#[test]
fn portions_change_no_bit() {
    let people = people(12);
    let whole = Cut { portion: 12, threads: 2, stop: None, grid: Grid::Fine };
    let one = run(&people, whole);
    for portion in [1, 2, 5] {
        assert!(run(&people, Cut { portion, ..whole }) == one, "portions of {portion}");
    }
}

#[test]
fn an_empty_draw_releases_noise_and_costs_a_line() {
    let model = model();
    let folder = tempfile::tempdir().unwrap();
    let mut ledger = Ledger::create(&folder.path().join("ledger"), &identity()).unwrap();
    let key = Key::insecure(2);
    let blocks = pairs(&model);
    let (bounds, dims) = (vec![0.5; blocks.len()], blocks.dims());
    let mut sum = ClippedSum::new(blocks, bounds.clone(), Rule::Clip, Grid::Fine).unwrap();
    let drawn = Sampler::new(&key, 1e-9).unwrap().draw(ledger.next_stream(), 50);
    assert!(drawn.is_empty());
    let scales = Split::Equal.scales(1.2, &bounds, &dims).unwrap();
    let spent = ledger.spend(0, 1e-9, 1.2, &key).unwrap();
    let released = sum.release(spent, &Noise::new(&key), &scales, 4.0).unwrap();
    assert_eq!(ledger.entries().len(), 1);
    assert_eq!(ledger.spent().unwrap()[0].steps(), 1);
    let squares: f64 = released.iter().flatten().map(|&x| f64::from(x).powi(2)).sum();
    let count = released.iter().map(Vec::len).sum::<usize>() as f64;
    // s/B on every element; five standard errors of a variance.
    let variance = (scales[0] / 4.0).powi(2);
    let off = squares / count / variance - 1.0;
    assert!(off.abs() < 5.0 * (2.0 / count).sqrt(), "{off}");
}
