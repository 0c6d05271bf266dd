//! Every case of the golden file: values and slopes of each pair, whole batches, token level.

mod common;

use common::{golden, golden_near, near, number, numbers, objectives, pairs, term};
use serde_json::Value;
use tercet_align::delta::{DeltaConfig, DeltaSource, NegativeDelta, PairScores};
use tercet_align::objective::{Objectives, PairLogProbs, ReferenceLogProbs, StepTotals, metrics};
use tercet_align::select::{Pick, best_and_worst};

/// The Δ a case asks for, by pair.
fn deltas(golden: &Value, params: &Value) -> Vec<Option<f64>> {
    let all = numbers(&golden["delta"]);
    match &params["delta"] {
        Value::Null => vec![None; all.len()],
        Value::Number(x) => vec![x.as_f64(); all.len()],
        Value::String(text) if text == "r_w-r_l" => all.into_iter().map(Some).collect(),
        Value::String(text) if text == "clip(r_w-r_l,0,1)" => {
            all.into_iter().map(|d| Some(d.clamp(0.0, 1.0))).collect()
        }
        other => panic!("a delta that the test does not know: {other}"),
    }
}

/// The objective of a case; none for those that sort a whole batch, which are not offered.
fn objective(name: &str, params: &Value) -> Option<Objectives> {
    let (mappo, plain) = match name.strip_prefix("mappo_") {
        Some(plain) => (true, plain),
        None => (false, name),
    };
    let objective = match plain {
        "aot" | "aot_unpaired" => return None,
        "dpo_sigmoid" => "dpo",
        "ipo_avg" => "ipo_mean",
        "cpo_pref" => "cpo",
        "sigmoid_norm" => "dpo_norm",
        "exo_pair" => "exo",
        "nca_pair" => "nca",
        "bco_pair" => "bco",
        "sppo_hard" => "sppo",
        "orpo_or_term" => "orpo",
        same => same,
    };
    let mut text = format!("objective = \"{objective}\"\n");
    if mappo {
        text += "mappo = true\n";
    }
    if plain == "cpo_pref" {
        text += "lambda = 0.0\n";
    }
    for (key, value) in params.as_object().unwrap() {
        let key = match key.as_str() {
            "delta" | "kl" => continue,
            "desirable" => "desirable_weight",
            "undesirable" => "undesirable_weight",
            same => same,
        };
        text += &format!("{key} = {:?}\n", number(value));
    }
    Some(objectives(vec![term(&text)]))
}

/// Checks every case with pairs that `change` has seen, within the given bounds.
fn check_cases(change: fn(f64) -> f64, near: &dyn Fn(&str, f64, f64)) -> usize {
    let golden = golden();
    let mut checked = 0;
    for case in golden["cases"].as_array().unwrap() {
        let (name, params) = (case["name"].as_str().unwrap(), &case["params"]);
        let Some(objective) = objective(name, params) else { continue };
        let z = params["kl"].as_f64();
        let slopes = ["grad_logp_w", "grad_logp_l"].map(|key| numbers(&case[key]));
        let losses = match name {
            "kto" => {
                let sides = ["loss_w", "loss_l"].map(|key| numbers(&case[key]));
                sides[0].iter().zip(&sides[1]).map(|(w, l)| w + l).collect()
            }
            _ => numbers(&case["loss"]),
        };
        let deltas = deltas(&golden, params);
        for (i, mut pair) in pairs(&golden).into_iter().enumerate() {
            pair.delta = deltas[i];
            pair.chosen = change(pair.chosen);
            pair.rejected = change(pair.rejected);
            let totals = StepTotals { kto_z: z, ..StepTotals::of(&[pair]) };
            let found = objective.evaluate(&[pair], &totals).unwrap();
            let (mut loss, mut d_chosen) = (found.loss, found.pairs[0].d_chosen);
            let mut d_rejected = found.pairs[0].d_rejected;
            match name {
                // The file has the odds' term alone; the likelihood's is checked as `sft`.
                "orpo_or_term" => {
                    let sft = objectives(vec![term("objective = \"sft\"")]);
                    let rest = sft.evaluate(&[pair], &totals).unwrap();
                    loss -= rest.loss;
                    d_chosen -= rest.pairs[0].d_chosen;
                }
                // The file has a loss for each answer, the objective their mean.
                "kto" => {
                    (loss, d_chosen, d_rejected) = (2.0 * loss, 2.0 * d_chosen, 2.0 * d_rejected)
                }
                _ => {}
            }
            let what = format!("{name} {params} pair {i}");
            near(&what, loss, losses[i]);
            near(&format!("{what}, chosen"), d_chosen, slopes[0][i]);
            near(&format!("{what}, rejected"), d_rejected, slopes[1][i]);
        }
        checked += 1;
    }
    checked
}

#[test]
fn every_case_is_met_within_the_files_own_tolerance() {
    // 41 cases, of which aot and aot_unpaired sort within the batch.
    assert_eq!(check_cases(|x| x, &golden_near), 39);
}

#[test]
fn sums_rounded_to_f32_give_the_same_to_f32s_precision() {
    // Sums up to 512 are off by at most 2⁻¹⁶ (those of 900 are whole numbers), a margin at β = 0.1
    // by 3·10⁻⁶, and a logistic loss, relative to itself, by as much.
    let near = |what: &str, got, want| near(what, got, want, 1e-5, 1e-6);
    assert_eq!(check_cases(|x| f64::from(x as f32), &near), 39);
}

#[test]
fn batches_of_cpo_are_met_with_every_mean_of_the_likelihood() {
    let golden = golden();
    let cases = golden["batch_cpo"].as_array().unwrap();
    for case in cases {
        let params = &case["params"];
        let text = format!(
            "objective = \"cpo\"\nmappo = true\nbeta = {:?}\ncpo_alpha = {:?}\nnll = {}",
            number(&params["beta"]),
            number(&params["lambda"]),
            params["nll"]
        );
        let objective = objectives(vec![term(&text)]);
        let mut batch = pairs(&golden);
        for (pair, delta) in batch.iter_mut().zip(deltas(&golden, params)) {
            (pair.delta, pair.reference) = (delta, None);
        }
        let totals = StepTotals::of(&batch);
        let found = objective.evaluate(&batch, &totals).unwrap();
        golden_near(&format!("{params}"), found.loss, number(&case["loss"]));
        let want = ["grad_logp_w", "grad_logp_l"].map(|key| numbers(&case[key]));
        for (i, pair) in found.pairs.iter().enumerate() {
            golden_near(&format!("{params} {i}, chosen"), pair.d_chosen, want[0][i]);
            golden_near(&format!("{params} {i}, rejected"), pair.d_rejected, want[1][i]);
        }
        let likelihood = format!("objective = \"sft\"\nnll = {}", params["nll"]);
        let nll = objectives(vec![term(&likelihood)]).evaluate(&batch, &totals).unwrap().loss;
        golden_near("nll", nll, number(&case["nll"]));
        golden_near("pref", found.loss - number(&params["lambda"]) * nll, number(&case["pref"]));
    }
    assert_eq!(cases.len(), 12);
}

#[test]
fn means_and_rewards_of_the_batch_are_met() {
    let golden = golden();
    let batch = pairs(&golden);
    let dpo = objectives(vec![term("objective = \"dpo\"")]);
    let found = dpo.evaluate(&batch, &StepTotals::of(&batch)).unwrap();
    golden_near("mean", found.loss, number(&golden["cases"][0]["mean"]));
    let want = &golden["rewards_dpo_beta0.1"];
    let [chosen, rejected, margins, accuracies] =
        ["chosen", "rejected", "margins", "accuracies"].map(|key| numbers(&want[key]));
    for (i, pair) in found.pairs.iter().enumerate() {
        let rewards = pair.rewards.unwrap();
        golden_near("chosen", rewards.chosen, chosen[i]);
        golden_near("rejected", rewards.rejected, rejected[i]);
        golden_near("margin", rewards.margin(), margins[i]);
        assert_eq!(f64::from(u8::from(rewards.accurate())), accuracies[i], "{i}");
    }
}

#[test]
fn the_loss_is_the_likelihoods_plus_the_log_prior() {
    // Equations 5 and 6 with the sign that yields equation 8: MAP = MLE + ln p(r).
    let golden = golden();
    let want = &golden["prior_identity"];
    let [map, mle, prior] = ["map", "mle", "log_prior_eq5"].map(|key| numbers(&want[key]));
    let both =
        ["mappo", "dpo"].map(|name| objectives(vec![term(&format!("objective = {name:?}"))]));
    let deltas = numbers(&golden["delta"]);
    for (i, mut pair) in pairs(&golden).into_iter().enumerate() {
        pair.delta = Some(deltas[i]);
        let totals = StepTotals::of(&[pair]);
        let [got_map, got_mle] =
            [0, 1].map(|which| both[which].evaluate(&[pair], &totals).unwrap().loss);
        golden_near("MAP", got_map, map[i]);
        golden_near("MLE", got_mle, mle[i]);
        near("identity", got_map, got_mle + prior[i], 1e-13, 1e-13);
    }
}

#[test]
fn mappos_slope_is_a_mix_of_dpos_direction_and_the_supervised_one() {
    let golden = golden();
    let want = &golden["gradient_decomposition"];
    let [weight, by_w, by_l] = ["weight", "grad_w", "grad_l"].map(|key| numbers(&want[key]));
    let mappo = objectives(vec![term("objective = \"mappo\"")]);
    let deltas = numbers(&golden["delta"]);
    for (i, mut pair) in pairs(&golden).into_iter().enumerate() {
        pair.delta = Some(deltas[i]);
        let found = mappo.evaluate(&[pair], &StepTotals::of(&[pair])).unwrap().pairs[0];
        golden_near("chosen", found.d_chosen, by_w[i]);
        golden_near("rejected", found.d_rejected, by_l[i]);
        // weight·(Δ·(−1, 1) + (1 − Δ)·(−1, 0)).
        let (delta, weight) = (deltas[i], weight[i]);
        golden_near("mix, chosen", found.d_chosen, -weight * (delta + (1.0 - delta)));
        golden_near("mix, rejected", found.d_rejected, weight * delta);
    }
}

#[test]
fn best_and_worst_of_n_are_met_with_their_delta() {
    let golden = golden();
    let cases = golden["selection"].as_array().unwrap();
    for case in cases {
        let scores = numbers(&case["raw_scores"]);
        let pick = best_and_worst(&scores, scores.len()).unwrap();
        let Some(want) = case["best_worst"].as_array() else {
            assert_eq!(pick, Pick::Tied);
            continue;
        };
        let [best, worst] = [0, 1].map(|i| want[i].as_u64().unwrap() as usize);
        assert_eq!(pick, Pick::Pair { best, worst });
        let pair =
            PairScores { delta: None, chosen: Some(scores[best]), rejected: Some(scores[worst]) };
        let logistic = DeltaConfig {
            source: DeltaSource::Logistic,
            negative: NegativeDelta::Error,
            ..Default::default()
        };
        golden_near("Δ", logistic.raw(&pair).unwrap(), number(&case["delta"]));
    }
    assert_eq!(cases.len(), 4);
}

/// Log-softmax of a row of logits.
fn log_softmax(z: &[f64]) -> Vec<f64> {
    let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = top + z.iter().map(|z| (z - top).exp()).sum::<f64>().ln();
    z.iter().map(|z| z - log_sum).collect()
}

/// One row of the token-level case: logits `[T][V]`, and its completion's places and tokens. The
/// logits at place t predict token t + 1.
struct Row {
    logits: Vec<Vec<f64>>,
    tokens: Vec<(usize, usize)>,
}

impl Row {
    fn read(case: &Value, logits: &str, row: usize) -> Row {
        let ids = numbers(&case["input_ids"][row]);
        let mask = numbers(&case["completion_mask"][row]);
        let places = (1..ids.len()).filter(|&t| mask[t] != 0.0);
        Row {
            logits: case[logits][row].as_array().unwrap().iter().map(numbers).collect(),
            tokens: places.map(|t| (t - 1, ids[t] as usize)).collect(),
        }
    }

    fn sum(&self, weight: impl Fn(usize) -> f64) -> f64 {
        let log_prob = |&(place, token): &(usize, usize)| log_softmax(&self.logits[place])[token];
        self.tokens.iter().enumerate().map(|(i, at)| weight(i) * log_prob(at)).sum()
    }
}

#[test]
fn token_level_losses_reach_the_logits() {
    use tercet_align::objective::{ObjectiveConfig, ld_weight};
    let golden = golden();
    let case = &golden["token_level"];
    let policy: Vec<Row> = (0..4).map(|row| Row::read(case, "logits", row)).collect();
    let reference: Vec<Row> = (0..4).map(|row| Row::read(case, "ref_logits", row)).collect();
    let (r_w, r_l) = (numbers(&case["r_w"]), numbers(&case["r_l"]));
    let losses = case["losses"].as_object().unwrap();
    for (name, want) in losses {
        let (text, ld_alpha) = match name.as_str() {
            "dpo" => ("objective = \"dpo\"", 1.0),
            "dpo_simpo" => ("objective = \"simpo\"\nbeta = 2.0\ngamma = 1.0", 1.0),
            "dpo_ipo_avg" => ("objective = \"ipo_mean\"", 1.0),
            "dpo_cpo_token_mean" => ("objective = \"cpo\"\nlambda = 0.2", 1.0),
            "mappo" => ("objective = \"mappo\"", 1.0),
            "mappo_simpo" => ("objective = \"simpo\"\nbeta = 2.0\ngamma = 1.0\nmappo = true", 1.0),
            "mappo_ipo_avg" => ("objective = \"ipo_mean\"\nmappo = true", 1.0),
            "mappo_cpo_token_mean" => ("objective = \"cpo\"\nlambda = 0.2\nmappo = true", 1.0),
            "sft" => ("objective = \"sft\"", 1.0),
            _ => ("objective = \"dpo\"", number(&want["ld_alpha"])),
        };
        let config = ObjectiveConfig { terms: vec![term(text)], ld_alpha };
        let objective = Objectives::new(&config).unwrap();
        let weights = |pair: usize| {
            let (w, l) = (policy[pair].tokens.len(), policy[pair + 2].tokens.len());
            move |i: usize| ld_weight(i, w, l, ld_alpha)
        };
        let batch: Vec<PairLogProbs> = (0..2)
            .map(|pair| PairLogProbs {
                chosen: policy[pair].sum(weights(pair)),
                rejected: policy[pair + 2].sum(weights(pair)),
                reference: Some(ReferenceLogProbs {
                    chosen: reference[pair].sum(weights(pair)),
                    rejected: reference[pair + 2].sum(weights(pair)),
                }),
                chosen_tokens: policy[pair].tokens.len(),
                rejected_tokens: policy[pair + 2].tokens.len(),
                delta: Some(r_w[pair] - r_l[pair]),
            })
            .collect();
        let found = objective.evaluate(&batch, &StepTotals::of(&batch)).unwrap();
        golden_near(name, found.loss, number(&want["loss"]));
        for row in 0..4 {
            let slope = match row < 2 {
                true => found.pairs[row].d_chosen,
                false => found.pairs[row - 2].d_rejected,
            };
            let mut slopes = vec![vec![0.0; 7]; 8];
            for (i, &(place, token)) in policy[row].tokens.iter().enumerate() {
                let g = slope * weights(row % 2)(i);
                for (v, p) in log_softmax(&policy[row].logits[place]).iter().enumerate() {
                    slopes[place][v] = g * (f64::from(u8::from(v == token)) - p.exp());
                }
            }
            for (place, got) in slopes.iter().enumerate() {
                let want = numbers(&want["grad_logits"][row][place]);
                for (v, (got, want)) in got.iter().zip(&want).enumerate() {
                    golden_near(&format!("{name}: row {row}, place {place}, {v}"), *got, *want);
                }
            }
        }
        if name == "dpo" {
            let want = &case["metrics"];
            for (name, got) in metrics(&batch, &found.pairs) {
                if !name.starts_with("objective/") {
                    golden_near(name, got, number(&want[name]));
                }
            }
        }
    }
    assert_eq!(losses.len(), 12);
}
