//! The squeezing effect (arXiv 2407.10490) in a softmax of 20 answers that share 6 features: DPO
//! lowers the chosen answer's log-probability and feeds the answer that was likeliest, MaPPO does
//! not. Features and start are this test's own, as the golden demo's are not in its file; its
//! V, K, steps, learning rate, β and its signs are.

mod common;

use common::{golden, number, objectives, random, term};
use tercet_align::objective::{PairLogProbs, ReferenceLogProbs, StepTotals};

const ANSWERS: usize = 20;
const FEATURES: usize = 6;
const STEPS: usize = 200;
const RATE: f64 = 0.5;

/// A start from which DPO squeezes; chosen and rejected are its 15th and 17th likeliest answers.
const SEED: u64 = 13;

struct Model {
    features: Vec<[f64; FEATURES]>,
    weights: [f64; FEATURES],
}

impl Model {
    fn new() -> Self {
        let mut next = random(SEED);
        let features = (0..ANSWERS).map(|_| std::array::from_fn(|_| next())).collect();
        Model { features, weights: std::array::from_fn(|_| 2.0 * next()) }
    }

    fn log_probs(&self) -> Vec<f64> {
        let score = |f: &[f64; FEATURES]| f.iter().zip(&self.weights).map(|(f, w)| f * w).sum();
        let z: Vec<f64> = self.features.iter().map(score).collect();
        let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log_sum = top + z.iter().map(|z| (z - top).exp()).sum::<f64>().ln();
        z.iter().map(|z| z - log_sum).collect()
    }
}

/// Log-probabilities before and after of the chosen, the rejected and the likeliest answer.
fn train(delta: f64) -> [(f64, f64); 3] {
    let mappo = objectives(vec![term("objective = \"mappo\"\nbeta = 0.1")]);
    let mut model = Model::new();
    let before = model.log_probs();
    let mut order: Vec<usize> = (0..ANSWERS).collect();
    order.sort_by(|&a, &b| before[b].total_cmp(&before[a]));
    let (chosen, rejected) = (order[14], order[16]);
    for _ in 0..STEPS {
        let now = model.log_probs();
        let pair = PairLogProbs {
            chosen: now[chosen],
            rejected: now[rejected],
            reference: Some(ReferenceLogProbs {
                chosen: before[chosen],
                rejected: before[rejected],
            }),
            chosen_tokens: 1,
            rejected_tokens: 1,
            delta: Some(delta),
        };
        let slopes = mappo.evaluate(&[pair], &StepTotals::of(&[pair])).unwrap().pairs[0];
        for (answer, slope) in [(chosen, slopes.d_chosen), (rejected, slopes.d_rejected)] {
            for (v, p) in now.iter().enumerate() {
                let dz = slope * (f64::from(u8::from(v == answer)) - p.exp());
                for (w, f) in model.weights.iter_mut().zip(&model.features[v]) {
                    *w -= RATE * dz * f;
                }
            }
        }
    }
    let after = model.log_probs();
    [chosen, rejected, order[0]].map(|answer| (before[answer], after[answer]))
}

#[test]
fn dpo_squeezes_where_mappo_raises_the_chosen_answer() {
    let golden = golden();
    let demo = &golden["squeeze_demo"];
    assert_eq!(number(&demo["V"]), ANSWERS as f64);
    assert_eq!(number(&demo["K"]), FEATURES as f64);
    assert_eq!(number(&demo["steps"]), STEPS as f64);
    assert_eq!(number(&demo["lr"]), RATE);
    for (name, delta) in
        [("dpo", 1.0), ("mappo_0.5", 0.5), ("mappo_0.25", 0.25), ("mappo_0.04", 0.04)]
    {
        let [chosen, rejected, likeliest] = train(delta);
        let change = |(before, after): (f64, f64)| after - before;
        let golden = |key: &str| number(&demo["final"][name][key]) - number(&demo["init"][key]);
        for (what, got, want) in [
            ("chosen", change(chosen), golden("w")),
            ("rejected", change(rejected), golden("l")),
            ("likeliest", change(likeliest), golden("star")),
        ] {
            assert!(got * want > 0.0 && got.abs() > 0.01, "{name}: {what} by {got}, demo {want}");
        }
    }
}
