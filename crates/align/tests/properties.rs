//! What holds of every objective: slopes are slopes, micro-batches add up, Δ = 1 is DPO, and bad
//! input is an error.

mod common;

use common::{near, objectives, term};
use proptest::prelude::*;
use tercet_align::objective::{
    Mismatched, ObjectiveConfig, Objectives, PairLogProbs, ReferenceLogProbs, StepTotals,
    TermConfig, kto_z, ld_weight, metrics,
};

/// Every objective with parameters that leave nothing out.
const ALL: [&str; 26] = [
    "objective = \"dpo\"",
    "objective = \"mappo\"",
    "objective = \"dpo_norm\"\nbeta = 5.0",
    "objective = \"ipo_mean\"",
    "objective = \"ipo_mean\"\nmappo = true",
    "objective = \"ipo_sum\"",
    "objective = \"ipo_sum\"\nmappo = true",
    "objective = \"simpo\"",
    "objective = \"simpo\"\nmappo = true\nbeta = 0.5",
    "objective = \"cpo\"\nnll = \"seq_mean\"",
    "objective = \"cpo\"\nmappo = true\nlambda = 0.2",
    "objective = \"hinge\"",
    "objective = \"robust\"\nlabel_smoothing = 0.1",
    "objective = \"cdpo\"\nlabel_smoothing = 0.1",
    "objective = \"exo\"",
    "objective = \"discopop\"\ntau = 0.5",
    "objective = \"apo_zero\"",
    "objective = \"apo_down\"",
    "objective = \"bco\"",
    "objective = \"nca\"",
    "objective = \"sppo\"",
    "objective = \"orpo\"",
    "objective = \"kto\"\ndesirable_weight = 1.3",
    "objective = \"sft\"",
    "objective = \"sft\"\nnll = \"seq_sum\"",
    "objective = \"dpo\"\nbeta = 0.3\nweight = 2.5",
];

/// A pair around its reference.
fn any_pair() -> impl Strategy<Value = PairLogProbs> {
    let sums = (-80.0..-1.0f64, -80.0..-1.0f64, -20.0..20.0f64, -20.0..20.0f64);
    (sums, 1usize..50, 1usize..50, 0.0..1.0f64).prop_map(|(sums, n, m, delta)| {
        let (chosen, rejected, a, b) = sums;
        PairLogProbs {
            chosen,
            rejected,
            reference: Some(ReferenceLogProbs {
                chosen: (chosen - a).min(0.0),
                rejected: (rejected - b).min(0.0),
            }),
            chosen_tokens: n,
            rejected_tokens: m,
            delta: Some(delta),
        }
    })
}

fn totals(pairs: &[PairLogProbs]) -> StepTotals {
    StepTotals { kto_z: Some(0.25), ..StepTotals::of(pairs) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn slopes_are_the_losss_differences(
        pairs in prop::collection::vec(any_pair(), 1..5),
        which in 0..ALL.len(),
    ) {
        let objective = objectives(vec![term(ALL[which]), term("objective = \"sft\"\nweight = 0.2")]);
        let loss = |pairs: &[PairLogProbs]| {
            objective.evaluate(pairs, &totals(pairs)).unwrap().loss
        };
        let found = objective.evaluate(&pairs, &totals(&pairs)).unwrap();
        const STEP: f64 = 1e-5;
        for i in 0..pairs.len() {
            for rejected in [false, true] {
                let moved = |by: f64| {
                    let mut moved = pairs.clone();
                    let sum = if rejected { &mut moved[i].rejected } else { &mut moved[i].chosen };
                    *sum += by;
                    loss(&moved)
                };
                // A hinge has no slope at its corner.
                let corner = ALL[which].contains("hinge")
                    && (found.pairs[i].u.unwrap() - 1.0).abs() < 2.0 * STEP;
                let want = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
                let got = match rejected {
                    true => found.pairs[i].d_rejected,
                    false => found.pairs[i].d_chosen,
                };
                // A difference of losses below 10⁴ loses 10⁴·2⁻⁵³/STEP; its own error is STEP²
                // times a third derivative, at most about β³ or, in odds of short answers, more.
                let bound = 1e-6 + 2e-16 * found.loss.abs() / STEP;
                if !corner {
                    near(&format!("{} pair {i}", ALL[which]), got, want, 1e-5, bound);
                }
            }
        }
    }

    #[test]
    fn micro_batches_add_up_to_the_whole_step(
        pairs in prop::collection::vec(any_pair(), 2..9),
        cut in 1usize..8,
        which in 0..ALL.len(),
    ) {
        let objective = objectives(vec![term(ALL[which]), term("objective = \"sft\"\nweight = 0.2")]);
        let totals = totals(&pairs);
        let whole = objective.evaluate(&pairs, &totals).unwrap();
        let (left, right) = pairs.split_at(cut.min(pairs.len()));
        let parts = [left, right].map(|part| objective.evaluate(part, &totals).unwrap());
        near("loss", parts[0].loss + parts[1].loss, whole.loss, 1e-14, 1e-14);
        let joined: Vec<_> = parts.iter().flat_map(|part| part.pairs.clone()).collect();
        prop_assert_eq!(joined, whole.pairs);
    }

    #[test]
    fn a_delta_of_one_gives_the_objectives_without_it_bit_for_bit(
        mut pairs in prop::collection::vec(any_pair(), 1..5),
        beta in 0.01..3.0f64,
    ) {
        pairs.iter_mut().for_each(|pair| pair.delta = Some(1.0));
        for name in ["dpo", "ipo_mean", "ipo_sum", "simpo", "cpo"] {
            let plain = format!("objective = {name:?}\nbeta = {beta:?}");
            let [with, without] = [format!("{plain}\nmappo = true"), plain]
                .map(|text| objectives(vec![term(&text)]).evaluate(&pairs, &totals(&pairs)).unwrap());
            prop_assert_eq!(with, without);
        }
    }

    #[test]
    fn at_the_reference_dpo_and_mappo_are_ln_2(mut pair in any_pair(), beta in 0.01..10.0f64) {
        let reference = ReferenceLogProbs { chosen: pair.chosen, rejected: pair.rejected };
        pair.reference = Some(reference);
        for name in ["dpo", "mappo"] {
            let objective = objectives(vec![term(&format!("objective = {name:?}\nbeta = {beta:?}"))]);
            let found = objective.evaluate(&[pair], &totals(&[pair])).unwrap();
            prop_assert_eq!(found.loss, std::f64::consts::LN_2);
            let rewards = found.pairs[0].rewards.unwrap();
            prop_assert_eq!((rewards.chosen, rewards.rejected, rewards.accurate()), (0.0, 0.0, false));
        }
    }
}

fn pair() -> PairLogProbs {
    PairLogProbs {
        chosen: -42.5,
        rejected: -61.25,
        reference: Some(ReferenceLogProbs { chosen: -45.0, rejected: -58.0 }),
        chosen_tokens: 32,
        rejected_tokens: 41,
        delta: Some(0.625),
    }
}

#[test]
fn numbers_that_are_none_are_errors_that_say_which() {
    let objective = objectives(vec![term("objective = \"mappo\"")]);
    let refusal = |pair: PairLogProbs| {
        let error = objective.evaluate(&[pair], &StepTotals::of(&[pair])).unwrap_err();
        error.to_string()
    };
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.5] {
        assert!(refusal(PairLogProbs { chosen: bad, ..pair() }).contains("of chosen is"));
        assert!(refusal(PairLogProbs { rejected: bad, ..pair() }).contains("of rejected is"));
        let reference = Some(ReferenceLogProbs { chosen: -1.0, rejected: bad });
        assert!(refusal(PairLogProbs { reference, ..pair() }).contains("rejected (reference) is"));
    }
    for bad in [f64::NAN, 1.5, -1.5] {
        assert!(refusal(PairLogProbs { delta: Some(bad), ..pair() }).contains("Δ is"));
    }
    assert!(refusal(PairLogProbs { delta: None, ..pair() }).contains("never taken for 1"));
    assert!(refusal(PairLogProbs { reference: None, ..pair() }).contains("reference"));
    assert!(refusal(PairLogProbs { chosen_tokens: 0, ..pair() }).contains("has no tokens"));
    // Finite sums whose square is not.
    let huge = PairLogProbs { chosen: -1e200, ..pair() };
    let square = objectives(vec![term("objective = \"ipo_sum\"")]);
    let text = square.evaluate(&[huge], &StepTotals::of(&[huge])).unwrap_err().to_string();
    assert!(text.contains("beyond what f64 holds"), "{text}");
}

#[test]
fn totals_that_cannot_be_the_steps_are_errors() {
    let kto = objectives(vec![term("objective = \"kto\"")]);
    let pairs = [pair(), pair()];
    let refusal = |totals: &StepTotals| kto.evaluate(&pairs, totals).unwrap_err().to_string();
    let whole = totals(&pairs);
    assert!(refusal(&StepTotals { pairs: 1, ..whole }).contains("the step's pairs is 1"));
    assert!(refusal(&StepTotals { chosen_tokens: 63, ..whole }).contains("chosen_tokens is 63"));
    for z in [None, Some(-0.1), Some(f64::NAN)] {
        assert!(refusal(&StepTotals { kto_z: z, ..whole }).contains("kto_z"));
    }
    let none = kto.evaluate(&[], &totals(&[])).unwrap();
    assert_eq!((none.loss, none.pairs.len()), (0.0, 0));
}

#[test]
fn ktos_reference_point_is_a_mean_that_is_never_negative() {
    let of = |policy, reference| Mismatched { policy, reference };
    assert_eq!(kto_z(&[of(-10.0, -12.0), of(-10.0, -9.0)]).unwrap(), 0.5);
    assert_eq!(kto_z(&[of(-10.0, -9.0)]).unwrap(), 0.0);
    assert!(kto_z(&[]).is_err() && kto_z(&[of(f64::NAN, 0.0)]).is_err());
}

#[test]
fn a_certain_answer_has_finite_odds() {
    let orpo = objectives(vec![term("objective = \"orpo\"")]);
    let evaluate = |chosen, rejected| {
        let pair = PairLogProbs { chosen, rejected, ..pair() };
        orpo.evaluate(&[pair], &StepTotals::of(&[pair])).unwrap().pairs[0]
    };
    for (chosen, rejected) in [(0.0, -30.0), (-30.0, 0.0), (0.0, 0.0), (-1e5, -1e5)] {
        let found = evaluate(chosen, rejected);
        assert!(found.d_chosen < 0.0 && found.d_rejected >= 0.0, "{found:?}");
    }
}

#[test]
fn configurations_are_checked_by_key_value_and_range() {
    let refusal = |text: &str| {
        let config = ObjectiveConfig { terms: vec![term(text)], ld_alpha: 1.0 };
        Objectives::new(&config).unwrap_err().to_string()
    };
    for (text, expected) in [
        (
            "objective = \"dpo\"\nbeta = 0.0",
            "`terms[0].beta (dpo)` is 0, expected a number above 0",
        ),
        ("objective = \"dpo\"\nbeta = nan", "is NaN, expected a number above 0"),
        ("objective = \"dpo\"\nbeta = inf", "is inf, expected a number above 0"),
        ("objective = \"dpo\"\nweight = -1.0", "`terms[0].weight (dpo)` is -1"),
        ("objective = \"dpo\"\ngamma = 1.0", "`terms[0].gamma (dpo)` is no parameter"),
        ("objective = \"dpo\"\nlabel_smoothing = 0.1", "is no parameter of this objective"),
        ("objective = \"sft\"\nbeta = 0.1", "`terms[0].beta (sft)` is no parameter"),
        ("objective = \"robust\"", "`terms[0].label_smoothing (robust)` is missing"),
        (
            "objective = \"robust\"\nlabel_smoothing = 0.5",
            "is 0.5, expected a number of at least 0",
        ),
        ("objective = \"exo\"\nlabel_smoothing = 0.0", "is 0, expected a number above 0"),
        ("objective = \"simpo\"\ngamma = -1.0", "`terms[0].gamma (simpo)` is -1"),
        ("objective = \"cpo\"\nlambda = -0.1", "`terms[0].lambda (cpo)` is -0.1"),
        ("objective = \"discopop\"\ntau = 0.0", "`terms[0].tau (discopop)` is 0"),
        ("objective = \"kto\"\ndesirable_weight = 0.0", "desirable_weight (kto)` is 0"),
        ("objective = \"hinge\"\nmappo = true", "`terms[0].mappo (hinge)` is not defined"),
        ("objective = \"sft\"\nmappo = true", "is not defined for this objective"),
    ] {
        let got = refusal(text);
        assert!(got.contains(expected), "{text}: {got}");
    }
    let of = |text: &str| toml::from_str::<ObjectiveConfig>(text);
    assert!(of("terms = [{ objective = \"dpo\", betta = 0.1 }]").is_err());
    assert!(of("terms = [{ objective = \"dpoo\" }]").is_err());
    assert!(of("terms = []\nalpha = 1.0").is_err());
    assert!(Objectives::new(&of("terms = []").unwrap()).is_err());
    let ld = |ld_alpha: f64, name: &str| {
        let terms = vec![term(&format!("objective = {name:?}"))];
        Objectives::new(&ObjectiveConfig { terms, ld_alpha })
    };
    assert!(ld(0.5, "dpo").is_ok() && ld(1.1, "dpo").is_err() && ld(f64::NAN, "dpo").is_err());
    assert!(ld(0.5, "cpo").unwrap_err().to_string().contains("cpo learns the likelihood"));
}

#[test]
fn a_configuration_survives_being_written_and_read() {
    let terms: Vec<TermConfig> = ALL.iter().map(|text| term(text)).collect();
    for term in &terms {
        assert!(toml::to_string(term).unwrap().contains(term.objective.name()));
    }
    let config = ObjectiveConfig { terms, ld_alpha: 1.0 };
    let text = toml::to_string(&config).unwrap();
    assert_eq!(toml::from_str::<ObjectiveConfig>(&text).unwrap(), config);
}

#[test]
fn what_an_objective_needs_is_asked_for_and_nothing_else() {
    let needs = |text: &str| {
        let found = objectives(vec![term(text)]);
        (found.needs_reference(), found.needs_delta(), found.needs_kto_z())
    };
    assert_eq!(needs("objective = \"dpo\""), (true, false, false));
    assert_eq!(needs("objective = \"mappo\""), (true, true, false));
    assert_eq!(needs("objective = \"simpo\"\nmappo = true"), (false, true, false));
    assert_eq!(needs("objective = \"kto\""), (true, false, true));
    assert_eq!(needs("objective = \"sft\""), (false, false, false));
    let bare = PairLogProbs { reference: None, delta: None, ..pair() };
    for name in ["simpo", "cpo", "orpo", "sft"] {
        let objective = objectives(vec![term(&format!("objective = {name:?}"))]);
        assert!(objective.evaluate(&[bare], &StepTotals::of(&[bare])).is_ok(), "{name}");
    }
}

#[test]
fn terms_are_weighted_and_reported_one_by_one() {
    let both =
        objectives(vec![term("objective = \"mappo\""), term("objective = \"sft\"\nweight = 0.2")]);
    let one = |text: &str| objectives(vec![term(text)]).evaluate(&[pair()], &totals(&[pair()]));
    let found = both.evaluate(&[pair()], &totals(&[pair()])).unwrap();
    let (mappo, sft) = (one("objective = \"mappo\"").unwrap(), one("objective = \"sft\"").unwrap());
    assert_eq!(found.terms, [mappo.loss, 0.2 * sft.loss]);
    assert_eq!(found.loss, mappo.loss + 0.2 * sft.loss);
    let want = mappo.pairs[0].d_chosen + 0.2 * sft.pairs[0].d_chosen;
    assert_eq!(found.pairs[0].d_chosen, want);
    let names: Vec<&str> = metrics(&[pair()], &found.pairs).iter().map(|(name, _)| *name).collect();
    assert!(names.contains(&"rewards/accuracies") && names.contains(&"objective/weight"));
    // Supervised training alone has no rewards to report.
    let names: Vec<&str> = metrics(&[pair()], &sft.pairs).iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["logps/chosen", "logps/rejected"]);
}

#[test]
fn tokens_past_the_shorter_answer_weigh_alpha() {
    let weights: Vec<f64> = (0..5).map(|i| ld_weight(i, 5, 3, 0.25)).collect();
    assert_eq!(weights, [1.0, 1.0, 1.0, 0.25, 0.25]);
    assert_eq!((0..3).map(|i| ld_weight(i, 5, 3, 0.0)).sum::<f64>(), 3.0);
}
