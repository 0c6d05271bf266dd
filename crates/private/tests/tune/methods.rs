//! What methods do.

use tercet_private::tune::{Budget, Mode};

use crate::common::{Room, json, records, run};

#[test]
fn quantile_moves_its_threshold_and_random_actions_move_theirs() {
    let room = Room::new();
    let thresholds = |name: &str, more: &[&str]| -> Vec<f64> {
        let config = room.config(name, more);
        run(&config, false).unwrap();
        records(&config).iter().map(|r| r.measures["threshold"]).collect()
    };
    let fixed = thresholds("fixed", &[]);
    assert!(fixed.iter().all(|&c| (c / 0.1 - 1.0).abs() < 1e-12), "{fixed:?}");
    // Far above every norm, it must fall: by exp(−0.2·(1 − ½)) a step, but for noise.
    let quantile = thresholds(
        "quantile",
        &[
            "private.method=\"quantile\"",
            "private.threshold=1e4",
            "private.quantile.count_noise=3.0",
        ],
    );
    assert!(quantile[5] < 0.9 * quantile[0], "{quantile:?}");
    let random = thresholds("random", &["private.method=\"random-action\"", "private.every=2"]);
    assert!(random[0] == random[1] && random[1] != random[2] && random[2] == random[3]);
    let halved = thresholds(
        "schedule",
        &[
            "private.method=\"schedule\"",
            "private.schedule.threshold=[1.0, 0.5]",
            "private.schedule.pieces=3",
        ],
    );
    let ratios: Vec<f64> = halved.iter().map(|c| c / halved[0]).collect();
    for (ratio, want) in ratios.iter().zip([1.0, 1.0, 0.5f64.sqrt(), 0.5f64.sqrt(), 0.5, 0.5]) {
        assert!((ratio - want).abs() < 1e-12, "{ratios:?}");
    }
}

#[test]
fn adaptive_noise_has_a_price_that_is_named_before_the_start() {
    let room = Room::new();
    let plan = |more: &[&str]| {
        let config = room.config("run", more);
        let budget = Budget::plan(&config).unwrap();
        (budget.lines(&config).iter().map(|l| l.1.clone()).collect::<String>(), budget)
    };
    let (text, m1) = plan(&["private.method=\"random-action\""]);
    assert!(m1.mode == Mode::M1 && m1.price().is_none() && text.contains("sigma is fixed"));
    let (text, m2) = plan(&["private.method=\"random-action\"", "private.mode=\"m2\""]);
    let price = m2.price().unwrap();
    assert!(price > 0.0 && m2.fixed_sigma == Some(m1.sigma), "{price}");
    assert!(text.contains("more noise than fixed sigma"), "{text}");
    // The reference's price: T = 3816, B = 64 of 81412, ε = 4: 8 %.
    let (_, paper) = plan(&[
        "private.method=\"random-action\"",
        "private.mode=\"m2\"",
        "private.people=81412",
        "train.batch=64",
        "train.steps=3816",
        "private.epsilon=4.0",
        "private.delta=1e-5",
    ]);
    assert!((paper.fixed_sigma.unwrap() / 0.4879 - 1.0).abs() < 1e-3, "{paper:?}");
    assert!((paper.price().unwrap() - 0.08).abs() < 0.01, "{:?}", paper.price());
    let (_, m3) = plan(&["private.method=\"schedule\"", "private.schedule.sigma=[1.4, 0.7]"]);
    assert_eq!(m3.mode, Mode::M3);
}

#[test]
fn a_control_without_noise_says_so_everywhere() {
    let room = Room::new();
    let config = room.config("run", &["private.share=0.1", "private.noise=false"]);
    let report = run(&config, false).unwrap();
    for folder in [&config.output, report.checkpoint.as_ref().unwrap()] {
        let promise = json(&folder.join("privacy.json"));
        assert_eq!(promise["private"], false);
        assert!(promise["epsilon"].is_null() && promise["target"].is_null());
        assert!(promise["warnings"][0].as_str().unwrap().contains("NOT PRIVATE"));
    }
    assert!(records(&config).iter().all(|r| !r.measures.contains_key("epsilon")));
    let budget = Budget::plan(&config).unwrap();
    assert!(budget.lines(&config).iter().any(|(_, text)| text.contains("NOT PRIVATE")));
}

#[test]
fn frozen_as_stay_as_they_are() {
    let room = Room::new();
    let lora = |more: &[&str], name: &str| {
        let report = run(&room.config(name, more), false).unwrap();
        let model = tercet_model::Model::load(&room.at("model")).unwrap();
        let adapter =
            tercet_model::Adapter::load(report.checkpoint.as_ref().unwrap(), &model).unwrap();
        let params = adapter.params();
        let of = |a: &str| -> Vec<f32> {
            (0..params.len())
                .filter(|&slot| params.name(slot).contains(a))
                .flat_map(|slot| params.tensor(slot).to_vec_f32().unwrap())
                .collect()
        };
        (of("lora_A"), of("lora_B"))
    };
    let start = {
        let model = tercet_model::Model::load(&room.at("model")).unwrap();
        let config = room.config("none", &[]).lora.unwrap();
        let adapter = tercet_model::Adapter::new(&model, config, 0).unwrap();
        let params = adapter.params();
        (0..params.len())
            .filter(|&slot| params.name(slot).contains("lora_A"))
            .flat_map(|slot| params.tensor(slot).to_vec_f32().unwrap())
            .collect::<Vec<f32>>()
    };
    let (a, b) = lora(&["private.freeze_a=true", "train.weight_decay=0.1"], "frozen");
    assert!(a == start && b.iter().any(|&x| x != 0.0));
    let (a, _) = lora(&[], "free");
    assert!(a != start);
}

#[test]
fn a_learnt_controller_moves_thresholds_and_noise_and_warns_that_it_learns_little() {
    let room = Room::new();
    let more = ["private.method=\"rldp\"", "private.every=1", "train.steps=12"];
    let config = room.config("m1", &more);
    let lines = Budget::plan(&config).unwrap().lines(&config);
    let warning = &lines.iter().find(|line| line.0 == "WARNING" && line.1.contains("decisions"));
    assert!(warning.unwrap().1.contains("from 12 decisions (one in 1 steps), the first 5"));
    let seen = |config: &tercet_private::tune::PrivateConfig, measure: &str| -> Vec<f64> {
        records(config).iter().map(|r| r.measures[measure]).collect()
    };
    let report = run(&config, false).unwrap();
    let thresholds = seen(&config, "threshold");
    assert!(thresholds.windows(2).all(|w| w[0] != w[1]), "{thresholds:?}");
    let sigmas = seen(&config, "sigma");
    assert!(sigmas.iter().all(|&s| s == sigmas[0]), "m1 has one sigma: {sigmas:?}");
    assert!(report.checkpoint.unwrap().join("state/policy.bin").is_file());

    let config = room.config("m2", &[&more[..], &["private.mode=\"m2\""]].concat());
    let nominal = Budget::plan(&config).unwrap().sigma;
    run(&config, false).unwrap();
    let sigmas = seen(&config, "sigma");
    let inside = |&s: &f64| s == nominal || (0.7..=2.0).contains(&(s / nominal));
    assert!(sigmas.iter().all(inside) && sigmas.iter().any(|&s| s != nominal), "{sigmas:?}");
    // A control without noise has no sigma to move, and runs.
    let more = [&more[..], &["private.mode=\"m2\"", "private.noise=false"]].concat();
    let config = room.config("off", &more);
    run(&config, false).unwrap();
    assert!(seen(&config, "sigma").iter().all(|&s| s == 0.0));
}
