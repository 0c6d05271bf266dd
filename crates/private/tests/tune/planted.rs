//! Canaries that a run plants itself: they catch a run without noise, refute none with it, and are
//! part of what a run must go on with.

use std::fs;
use std::sync::atomic::AtomicBool;

use serde_json::{Value, json};
use tercet_private::audit::report::{Report, audit};
use tercet_private::tune::PrivateConfig;
use tercet_private::tune::attack::{Attacked, Suspects, attack};
use tercet_tensor::Device;
use tercet_train::Result;

use crate::common::{Room, error, json, result, run, run_until};
use crate::tiny_chat::model_with;

/// Twelve persons and 240 gradients, half of which are in each step.
const GRADIENTS: [&str; 5] = [
    "private.people=400",
    "train.batch=200",
    "train.steps=8",
    "private.canaries.kind=\"gradient\"",
    "private.canaries.count=240",
];

fn config(room: &Room, output: &str, more: &[&str]) -> PrivateConfig {
    room.config(output, &[&["lora.r=16", "lora.alpha=32"], &GRADIENTS[..], more].concat())
}

fn attacked(config: &PrivateConfig) -> Result<Attacked> {
    let suspects = Suspects { rows: 100, ..Suspects::default() };
    attack(&config.output, &suspects, (&AtomicBool::new(false), &Device::Cpu))
}

/// What the run's own canaries show, and the ε that was proven.
fn found(config: &PrivateConfig) -> (Report, Option<f64>) {
    let attacked = attacked(config).unwrap();
    (audit(&attacked.scores, attacked.delta, 0.05).unwrap(), attacked.epsilon)
}

#[test]
fn gradient_canaries_catch_a_run_without_noise_and_refute_no_proof() {
    let room = Room::new();
    for (name, more) in [
        ("flat", &[][..]),
        ("adapters", &["private.method=\"per-layer\"", "private.division=\"equal\""]),
        ("auto-s", &["private.method=\"auto-s\""]),
        ("quantile", &["private.method=\"quantile\"", "private.quantile.count_noise=30.0"]),
        ("adaclip", &["private.method=\"adaclip\""]),
        ("balance", &["private.balance=true"]),
        ("tangent", &["private.tangent=true"]),
        ("rldp", &["private.method=\"rldp\"", "private.every=2"]),
    ] {
        let off = [more, &["private.noise=false"]].concat();
        let off = config(&room, &format!("off-{name}"), &off);
        run(&off, false).unwrap();
        let (caught, proven) = found(&off);
        assert_eq!(proven, None);
        assert!(caught.refutes(2.0), "{name}: {:?}", caught.canaries);

        let on = config(&room, name, &[more, &["private.epsilon=2.0"]].concat());
        run(&on, false).unwrap();
        let (fine, proven) = found(&on);
        let proven = proven.unwrap();
        assert!(proven > 1.9 && !fine.refutes(proven), "{name}: {:?}", fine.canaries);
    }
}

/// A bound that is always 0 would refute nothing, either: at ε = 12 and with nearly everybody in each
/// step there is something to see, which an accountant that says 2 would not survive.
#[test]
fn the_bound_of_gradient_canaries_refutes_a_proof_that_is_false() {
    let room = Room::new();
    let weak = config(&room, "weak", &["private.epsilon=12.0", "train.batch=380"]);
    run(&weak, false).unwrap();
    let (seen, proven) = found(&weak);
    let shown = seen.canaries.as_ref().unwrap().epsilon;
    assert!(shown > 2.0 && shown <= proven.unwrap(), "{shown} of {proven:?}");
}

#[test]
fn rows_of_tokens_catch_a_run_without_noise_and_refute_no_proof() {
    let room = Room::new();
    let more = json!({
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16,
    });
    model_with(&more, 1).save(&room.at("model")).unwrap();
    let all = [
        "private.people=60",
        "train.batch=30",
        "train.steps=120",
        "train.lr=1e-2",
        "lora.r=16",
        "lora.alpha=32",
        "lora.targets=[\"q_proj\",\"v_proj\",\"o_proj\",\"up_proj\",\"down_proj\"]",
        "private.threshold=10",
        "private.canaries.kind=\"tokens\"",
        "private.canaries.count=40",
    ];
    let off = room.config("off", &[&all[..], &["private.noise=false"]].concat());
    run(&off, false).unwrap();
    let (caught, _) = found(&off);
    assert!(caught.refutes(1.0), "{:?}", caught.canaries);
    // Ranked among 1023 other rows; never seen it would be 1.44.
    assert!(caught.canaries.unwrap().exposure.unwrap().mean > 5.0);
    let on = room.config("on", &[&all[..], &["private.epsilon=2.0"]].concat());
    run(&on, false).unwrap();
    let (fine, proven) = found(&on);
    assert!(!fine.refutes(proven.unwrap()), "{:?}", fine.canaries);
}

#[test]
fn canaries_change_nobodys_coin_and_no_promise() {
    let room = Room::new();
    let settings = ["private.people=400", "train.batch=200", "train.steps=2"];
    let without = room.config("without", &settings);
    let with = [&settings[..], &GRADIENTS[3..]].concat();
    let with = room.config("with", &with);
    run(&without, false).unwrap();
    run(&with, false).unwrap();
    let promise = |config: &PrivateConfig| json(&config.output.join("privacy.json"));
    let (a, mut b) = (promise(&without), promise(&with));
    assert_eq!(b["canaries"], json!({"kind": "gradient", "count": 240}));
    b.as_object_mut().unwrap().remove("canaries");
    assert_eq!(a, b);
    // The plan lies beside the run and in no checkpoint's public part.
    let plan = fs::read_to_string(with.output.join("canaries.jsonl")).unwrap();
    assert_eq!(plan.lines().count(), 240);
    let checkpoint = with.output.join("checkpoints/2");
    assert!(!checkpoint.exists() || !checkpoint.join("canaries.jsonl").exists());
}

#[test]
fn stopping_and_going_on_changes_no_score() {
    let room = Room::new();
    let whole = config(&room, "whole", &["private.epsilon=4.0"]);
    let end = run(&whole, false).unwrap();
    let parts = config(&room, "parts", &["private.epsilon=4.0"]);
    for until in [2, 5] {
        run_until(&parts, until > 2, until).unwrap();
    }
    assert!(result(&run(&parts, true).unwrap()) == result(&end));
    assert_eq!(attacked(&parts).unwrap().scores, attacked(&whole).unwrap().scores);
}

#[test]
fn a_plan_that_is_missing_or_edited_ends_the_resume_and_the_audit() {
    let room = Room::new();
    let config = config(&room, "run", &["private.epsilon=4.0"]);
    run_until(&config, false, 3).unwrap();
    let path = config.output.join("canaries.jsonl");
    let plan = fs::read_to_string(&path).unwrap();
    let both = |says: &[&str]| {
        for error in [error(&config, true), attacked(&config).unwrap_err().to_string()] {
            assert!(says.iter().any(|says| error.contains(says)), "{error}");
        }
    };
    fs::remove_file(&path).unwrap();
    both(&["without their coins"]);
    let edit = |f: &dyn Fn(&mut Vec<Value>)| {
        let mut lines: Vec<Value> =
            plan.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        f(&mut lines);
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        fs::write(&path, text).unwrap();
    };
    edit(&|lines| lines[7]["included"] = json!(!lines[7]["included"].as_bool().unwrap()));
    both(&["A changed canaries.jsonl has the same effect"]);
    edit(&|lines| lines[7]["elements"][0] = json!(9_999_999));
    both(&["does not have the 240 canaries"]);
    edit(&|lines| drop(lines.pop()));
    both(&["does not have the 240 canaries"]);
    edit(&|lines| lines[7]["id"] = lines[8]["id"].clone());
    both(&["of an earlier one"]);
    fs::write(&path, "\u{0}garbage").unwrap();
    both(&["is not a canary"]);
    fs::write(&path, &plan).unwrap();
    run(&config, true).unwrap();
    attacked(&config).unwrap();
}

#[test]
fn settings_of_canaries_that_make_no_sense_are_refused_by_key() {
    let room = Room::new();
    for (more, says) in [
        (&["private.canaries.count=8", "private.canaries.kind=\"gradient\""][..], "count"),
        (&["private.canaries.count=100000", "private.canaries.kind=\"tokens\""], "count"),
        (&["private.canaries.count=20", "private.canaries.kind=\"tokens\""], "leaves no room"),
        (&["private.canaries.count=100"], "kind"),
        (&["private.canaries.count=100", "private.canaries.kind=\"rows\""], "kind"),
        (&["private.canaries.kind=\"tokens\""], "count"),
        (
            &[
                "private.canaries.count=100",
                "private.canaries.kind=\"tokens\"",
                "private.canaries.length=3",
            ],
            "length",
        ),
    ] {
        let error = room.try_config("bad", more).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    // More than there are coordinates; more persons than were declared.
    let many = config(&room, "many", &["private.canaries.count=60000", "private.people=70000"]);
    let says = error(&many, false);
    assert!(says.contains("private.canaries.count") && says.contains("coordinate"), "{says}");
    assert!(!many.output.exists(), "nothing was begun");
    // Twelve persons and 240 canaries, whatever their coins say: who may try again until they please
    // has no fair ones.
    let few = config(&room, "few", &["private.people=251"]);
    let says = error(&few, false);
    assert!(says.contains("room for private.canaries.count = 240"), "{says}");
    assert!(!few.output.exists(), "nothing was begun");
    run(&config(&room, "just", &["private.people=252", "train.steps=1"]), false).unwrap();
    // A run that planted none has nothing to audit with.
    let none = room.config("none", &["train.steps=1"]);
    run(&none, false).unwrap();
    let says = attacked(&none).unwrap_err().to_string();
    assert!(says.contains("planted no canaries"), "{says}");
}
