//! Properties of the audit, and what arbitrary bytes do to everything that reads a file.

use std::time::Instant;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use tercet_private::audit::one_run::{best, guess};
use tercet_private::audit::report::{Scored, audit, parse};
use tercet_private::audit::{canary, exposure::exposure, membership::infer};
use tercet_private::clinic::secret;
use tercet_private::rldp::Agent;

/// Scores with many ties, and coins.
fn canaries() -> impl Strategy<Value = Vec<(f64, bool)>> {
    let score = prop_oneof![(-4i32..4).prop_map(f64::from), -5.0..5.0];
    prop::collection::vec((score, any::<bool>()), 0..60)
}

fn apart(rows: &[(f64, bool)]) -> (Vec<f64>, Vec<bool>) {
    rows.iter().copied().unzip()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]

    #[test]
    fn guesses_depend_neither_on_the_order_of_rows_nor_on_the_scale_of_scores(
        rows in canaries(), made in 0usize..80, turn in 0usize..60,
    ) {
        let (scores, coins) = apart(&rows);
        let first = guess(&scores, &coins, made).unwrap();
        prop_assert!(first.right <= first.made && first.made <= (made as u64).min(rows.len() as u64));
        let mut turned = rows.clone();
        turned.reverse();
        turned.rotate_left(turn.min(rows.len()));
        let (others, other_coins) = apart(&turned);
        prop_assert_eq!(guess(&others, &other_coins, made).unwrap(), first);
        // Times four is exact: order and ties stay.
        let scaled: Vec<f64> = scores.iter().map(|score| score * 4.0).collect();
        prop_assert_eq!(guess(&scaled, &coins, made).unwrap(), first);
    }

    #[test]
    fn which_guesses_are_made_does_not_depend_on_the_coins(rows in canaries(), made in 0usize..80) {
        let (scores, coins) = apart(&rows);
        let opposite: Vec<bool> = coins.iter().map(|coin| !coin).collect();
        let (one, other) =
            (guess(&scores, &coins, made).unwrap(), guess(&scores, &opposite, made).unwrap());
        prop_assert_eq!(one.made, other.made);
        prop_assert_eq!(one.right + other.right, one.made);
    }

    #[test]
    fn a_larger_delta_or_more_confidence_never_raises_the_bound(rows in canaries()) {
        let (scores, coins) = apart(&rows);
        let bound = |delta, p| best(&scores, &coins, delta, p).map(|found| found.1);
        if let Ok(loose) = bound(0.0, 0.1) {
            prop_assert!(bound(0.0, 0.01).unwrap() <= loose);
            prop_assert!(bound(1e-3, 0.1).unwrap() <= loose);
        }
    }

    #[test]
    fn the_auc_of_the_opposite_question_is_the_rest(
        a in prop::collection::vec((-4i32..4).prop_map(f64::from), 2..40),
        b in prop::collection::vec((-4i32..4).prop_map(f64::from), 2..40),
    ) {
        let (one, other) = (infer(&a, &b, 0.05).unwrap(), infer(&b, &a, 0.05).unwrap());
        prop_assert!((one.auc + other.auc - 1.0).abs() < 1e-12);
        let interval = one.auc_interval;
        prop_assert!(0.0 <= interval.low && interval.low <= one.auc + 1e-12);
        prop_assert!(one.auc <= interval.high + 1e-12 && interval.high <= 1.0);
        prop_assert!(one.roc.windows(2).all(|w| w[0].0 <= w[1].0 && w[0].1 <= w[1].1));
        prop_assert!(one.balanced_accuracy >= 0.5);
    }

    #[test]
    fn exposure_lies_between_nothing_and_all_bits(
        canary in -9.0..9.0f64, others in prop::collection::vec(-9.0..9.0f64, 1..50),
    ) {
        let bits = exposure(canary, &others).unwrap();
        prop_assert!((0.0..=((others.len() + 1) as f64).log2() + 1e-12).contains(&bits));
    }

    #[test]
    fn no_text_and_no_bytes_end_in_a_panic(text in any::<String>(), bytes in any::<Vec<u8>>()) {
        prop_assert!(Agent::from_bytes(&bytes).is_err());
        let _ = parse(&text).and_then(|rows: Vec<Scored>| audit(&rows, 1e-5, 0.05));
        let _ = canary::read_manifest(&text);
        let _ = secret::read(&text);
    }

    #[test]
    fn no_numbers_end_in_a_panic(
        scores in prop::collection::vec(any::<f64>(), 0..20), delta in any::<f64>(), p in any::<f64>(),
    ) {
        let coins: Vec<bool> = (0..scores.len()).map(|i| i.is_multiple_of(2)).collect();
        let _ = best(&scores, &coins, delta, p);
        let _ = infer(&scores, &scores, p);
        let _ = exposure(delta, &scores);
    }
}

/// `cargo test --release -p tercet-private --test attacks a_decision -- --ignored --nocapture`
#[test]
#[ignore = "measures"]
fn a_decision_takes_milliseconds() {
    // Sixty adapters and the noise: what SmolLM2-135M has with q and v.
    let mut agent = Agent::new(6 + 3 * 60, 61, 1).unwrap();
    let state = |i: u32| (0..186).map(|j| ((i * 31 + j * 7) as f32).sin()).collect::<Vec<f32>>();
    for i in 0..40 {
        agent.decide(&state(i), (i > 0).then_some(0.1)).unwrap();
    }
    let start = Instant::now();
    for i in 40..140 {
        agent.decide(&state(i), Some(0.1)).unwrap();
    }
    println!("{:.2} ms a decision", start.elapsed().as_secs_f64() * 10.0);
    let start = Instant::now();
    let bytes = agent.to_bytes().unwrap();
    let written = start.elapsed();
    let again = Agent::from_bytes(&bytes).unwrap();
    println!(
        "checkpoint of {} bytes: {written:?}, read in {:?}",
        bytes.len(),
        start.elapsed() - written
    );
    assert!(again == agent);
}
