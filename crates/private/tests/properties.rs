//! What must hold for any question, not only for those in the table.

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use tercet_private::accounting::calibrate::{self, Accountant};
use tercet_private::accounting::{Phase, gaussian, pld, rdp, zcdp};

fn phase(sigma: f64, rate: f64, steps: u64) -> Phase {
    Phase::new(sigma, rate, steps).unwrap()
}

/// σ from 0.4 to 20, q from 10⁻⁵ to 1, T from 1 to 3·10⁴, δ from 10⁻¹⁴ to 0.1.
fn question() -> impl Strategy<Value = (f64, f64, u64, f64)> {
    (-0.9_f64..3.0, -5.0_f64..=0.0, 0.0_f64..4.5, -14.0_f64..-1.0).prop_map(|(s, q, t, d)| {
        (s.exp(), 10_f64.powf(q).min(1.0), 10_f64.powf(t) as u64, 10_f64.powf(d))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]

    #[test]
    fn the_bounds_hold_the_truth_between_them_and_stay_below_renyi((s, q, t, d) in question()) {
        let phases = [phase(s, q, t)];
        let found = pld::epsilon(&phases, d).unwrap();
        for bounds in [found.remove, found.add] {
            prop_assert!(0.0 <= bounds.lower && bounds.lower <= bounds.upper, "{found:?}");
        }
        let both = found.both();
        // Wanted are 2·10⁻⁴ of Chernoff's ε, which may be some times the true one. Below δ = 10⁻⁸
        // the transform's rounding may be more than that (see the module).
        let width = both.upper - both.lower;
        prop_assert!(d < 1e-8 || width < 2e-3 * both.upper + 1e-3, "{s} {q} {t} {d}: {found:?}");
        // A Rényi bound is an upper bound on the truth, so not below our lower bound; and it is
        // looser than the exact curve, which our upper bound misses by at most the distance above.
        let renyi = rdp::epsilon(&phases, d, &rdp::default_orders()).unwrap().epsilon;
        prop_assert!(both.lower <= renyi, "{both:?} {renyi}");
        prop_assert!(both.upper <= renyi + (both.upper - both.lower), "{both:?} {renyi}");
        prop_assert!(both.lower <= zcdp::epsilon(&phases, d).unwrap());
    }

    #[test]
    fn without_sampling_the_exact_curve_lies_between_the_bounds(
        s in -1.0_f64..4.0, t in 0.0_f64..5.0, d in -14.0_f64..-1.0
    ) {
        let (sigma, steps, delta) = (s.exp(), 10_f64.powf(t) as u64, 10_f64.powf(d));
        let phases = [phase(sigma, 1.0, steps)];
        let mu = gaussian::mu(&phases).unwrap();
        let exact = gaussian::epsilon(mu, delta).unwrap();
        let found = pld::epsilon(&phases, delta).unwrap();
        for bounds in [found.remove, found.add] {
            // The exact value is itself good to some 10⁻¹².
            let slack = 1e-11 * exact;
            prop_assert!(bounds.lower <= exact + slack, "{found:?} {exact}");
            prop_assert!(bounds.upper >= exact - slack, "{found:?} {exact}");
        }
        // And δ at that ε: between the bounds as well.
        if exact > 0.0 && exact < 1e4 {
            let found = pld::delta(&phases, exact).unwrap();
            for bounds in [found.remove, found.add] {
                let slack = 1.0 + 1e-8;
                prop_assert!(bounds.lower <= delta * slack, "{found:?} {delta}");
                prop_assert!(bounds.upper * slack >= delta, "{found:?} {delta}");
                prop_assert!(bounds.upper <= 1.2 * delta + 1e-9, "{found:?} {delta}");
            }
        }
    }

    #[test]
    fn delta_and_epsilon_are_the_same_curve((s, q, t, d) in question()) {
        let phases = [phase(s, q, t)];
        let epsilon = pld::epsilon(&phases, d).unwrap().both();
        if epsilon.lower > 1e-3 && epsilon.upper < 1e4 {
            // At an ε that is surely too small δ is surely missed, and the other way round.
            let at_lower = pld::delta(&phases, epsilon.lower).unwrap().both();
            let at_upper = pld::delta(&phases, epsilon.upper).unwrap().both();
            prop_assert!(at_lower.upper >= d, "{epsilon:?} {at_lower:?} {d}");
            prop_assert!(at_upper.lower <= d, "{epsilon:?} {at_upper:?} {d}");
        }
    }

    #[test]
    fn more_noise_less_sampling_fewer_steps_larger_delta_cost_no_more((s, q, t, d) in question()) {
        let of = |s, q, t, d| pld::epsilon(&[phase(s, q, t)], d).unwrap().both();
        let here = of(s, q, t, d);
        let cheaper = [
            of(1.1 * s, q, t, d),
            of(s, 0.9 * q, t, d),
            of(s, q, t / 2, d),
            of(s, q, t, (2.0 * d).min(0.99)),
        ];
        for other in cheaper {
            prop_assert!(other.lower <= here.upper, "{other:?} {here:?}");
        }
        let orders = rdp::default_orders();
        let renyi = |s, q, t, d| rdp::epsilon(&[phase(s, q, t)], d, &orders).unwrap().epsilon;
        let here = renyi(s, q, t, d);
        let slack = here * 1e-9;
        prop_assert!(renyi(1.1 * s, q, t, d) <= here + slack);
        prop_assert!(renyi(s, 0.9 * q, t, d) <= here + slack);
        prop_assert!(renyi(s, q, t / 2, d) <= here + slack);
        prop_assert!(renyi(s, q, t, (2.0 * d).min(0.99)) <= here + slack);
    }

    #[test]
    fn steps_in_two_phases_are_the_steps_in_one((s, q, t, d) in question()) {
        let whole = pld::epsilon(&[phase(s, q, t)], d).unwrap();
        let parts = [phase(s, q, t - t / 3), phase(s, q, t / 3), phase(2.0 * s, q, 0)];
        prop_assert_eq!(pld::epsilon(&parts, d).unwrap(), whole);
        // A phase that differs by a hair is composed by another transform, and is worth the same.
        let hair = s * (1.0 + 1e-9);
        let parts = [phase(s, q, t - t / 3), phase(hair, q, t / 3)];
        let (parts, whole) = (pld::epsilon(&parts, d).unwrap().both(), whole.both());
        prop_assert!(parts.lower <= whole.upper && whole.lower <= parts.upper * (1.0 + 1e-6));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]

    #[test]
    fn calibrated_noise_never_costs_more_than_the_target(
        target in 0.05_f64..10.0, q in -4.0_f64..0.0, t in 0.0_f64..4.0, d in -10.0_f64..-3.0
    ) {
        let (rate, steps, delta) = (10_f64.powf(q), 10_f64.powf(t) as u64, 10_f64.powf(d));
        for accountant in [Accountant::Pld, Accountant::Rdp] {
            let Ok(found) = calibrate::sigma(accountant, (target, delta), rate, steps) else {
                continue;
            };
            let phases = [phase(found.sigma, rate, steps)];
            let again = accountant.epsilon(&phases, delta).unwrap();
            prop_assert_eq!(again, found.epsilon);
            prop_assert!(again <= target);
            // And hardly less noise would cost more.
            if found.sigma > 0.0101 {
                let less = [phase(found.sigma * (1.0 - 1e-3), rate, steps)];
                prop_assert!(accountant.epsilon(&less, delta).unwrap() > target * (1.0 - 1e-4));
            }
        }
    }
}

#[test]
fn the_edges_of_what_is_accepted_give_numbers_and_end() {
    for sigma in [1e-3, 1.0, 1e9] {
        for rate in [1e-12, 1.0 - 1e-12, 1.0] {
            for steps in [0, 1, 1_000_000_000] {
                for delta in [1e-100, 1e-5, 0.999] {
                    let phases = [phase(sigma, rate, steps)];
                    let both = pld::epsilon(&phases, delta).unwrap().both();
                    let what = format!("{sigma} {rate} {steps} {delta}: {both:?}");
                    assert!(both.lower >= 0.0 && both.lower <= both.upper, "{what}");
                    let renyi = rdp::epsilon(&phases, delta, &rdp::default_orders()).unwrap();
                    assert!(both.lower <= renyi.epsilon, "{what} {renyi:?}");
                    if rate == 1.0 {
                        let mu = gaussian::mu(&phases).unwrap();
                        let exact = gaussian::epsilon(mu, delta).unwrap();
                        assert!(both.lower <= exact * (1.0 + 1e-9), "{what} {exact}");
                        assert!(both.upper >= exact * (1.0 - 1e-9), "{what} {exact}");
                    }
                }
            }
        }
    }
}

#[test]
fn the_same_question_has_the_same_bits() {
    let phases = [phase(0.7, 1e-3, 5000), phase(1.1, 2e-3, 100)];
    let once = pld::epsilon(&phases, 1e-6).unwrap();
    assert_eq!(once, pld::epsilon(&phases, 1e-6).unwrap());
    // The order of the phases does not matter either.
    assert_eq!(once, pld::epsilon(&[phases[1], phases[0]], 1e-6).unwrap());
}
