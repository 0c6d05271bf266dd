//! What changes no bit: portions, threads, stopping and going on.

use crate::common::{Room, attempts, result, run, run_until};

#[test]
fn portions_and_threads_change_no_bit() {
    let room = Room::new();
    let whole = result(&run(&room.config("whole", &[]), false).unwrap());
    for (name, more) in [
        ("one", &["private.micro_people=1"][..]),
        ("four", &["private.micro_people=4"]),
        ("rows", &["train.micro_tokens=16384"]),
        ("recompute", &["train.recompute=true"]),
    ] {
        assert!(result(&run(&room.config(name, more), false).unwrap()) == whole, "{name}");
    }
    // The cut may change on the way, when memory turns out to be short.
    let config = room.config("smaller", &[]);
    run_until(&config, false, 3).unwrap();
    let config = room.config("smaller", &["private.micro_people=2"]);
    assert!(result(&run(&config, true).unwrap()) == whole, "another cut after a stop");
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let config = room.config(&format!("threads{threads}"), &[]);
        let alone = pool.install(|| run(&config, false).unwrap());
        assert!(result(&alone) == whole, "{threads} threads");
    }
}

#[test]
fn stopping_and_going_on_changes_no_bit_and_costs_nothing_for_every_method() {
    let room = Room::new();
    for (name, more) in [
        ("dp-sgd", &["private.share=0.1"][..]),
        ("auto-s", &["train.dtype=\"bf16\""]),
        ("quantile", &["private.quantile.count_noise=5.0"]),
        ("adaclip", &[]),
        ("geoclip", &[]),
        ("per-layer", &["private.division=\"least-energy\"", "private.balance=true"]),
        ("schedule", &["private.schedule.sigma=[1.5, 0.8]", "private.schedule.threshold=[2, 1]"]),
        ("random-action", &["private.every=2"]),
        ("random-action", &["private.every=2", "private.mode=\"m2\"", "private.freeze_a=true"]),
        ("per-layer", &["private.hardened=true"]),
        ("dp-sgd", &["private.tangent=true"]),
        ("quantile", &["private.quantile.count_noise=5.0", "private.tangent=true"]),
        ("rldp", &["private.every=1", "train.steps=9"]),
        ("rldp", &["private.every=1", "train.steps=9", "private.division=\"controlled\""]),
        ("rldp", &["private.every=1", "train.steps=9", "private.mode=\"m2\""]),
    ] {
        let method = format!("private.method=\"{name}\"");
        let all = [&[&method[..]], more].concat();
        let folder = |which: &str| format!("{which}-{name}-{}", more.len() + more.concat().len());
        let whole = run(&room.config(&folder("whole"), &all), false).unwrap();
        assert!(whole.finished, "{name}");
        let config = room.config(&folder("parts"), &all);
        for until in [1, 4, 7] {
            let part = run_until(&config, until > 1, until).unwrap();
            assert_eq!(part.steps, until.min(whole.steps), "{name}");
        }
        let end = run(&config, true).unwrap();
        assert!(result(&end) == result(&whole), "{name} {more:?}");
        assert_eq!(attempts(&config) as u64, whole.steps, "{name}: a stop cost a step");
        let epsilon = |config: &tercet_private::tune::PrivateConfig| {
            crate::common::json(&config.output.join("privacy.json"))["epsilon"].as_f64().unwrap()
        };
        assert!(epsilon(&config) <= 8.0 && epsilon(&config) > 1.0, "{name}");
    }
}
