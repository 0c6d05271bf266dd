//! Where runs begin: rewards of 0, a loss of ln 2, and what is refused before the first step.

use std::f64::consts::LN_2;

use serde_json::{Value, json};

use crate::room::{Room, disturb, records, refused, rows, run, run_with, weights};
use crate::tiny_chat::{model, tokenizer, write_model, write_rows};

const MAPPO: &str = "align.terms=[{objective='mappo'}]";

#[test]
fn the_first_loss_is_ln_2_and_the_first_rewards_are_0() {
    let room = Room::new(&rows(8));
    for (i, overrides) in [
        &[][..],
        &[MAPPO],
        &["lora.r=2"],
        &["align.ld_alpha=0.3"],
        &[MAPPO, "align.ld_alpha=0.0", "train.micro_tokens=1"],
        &["train.dtype=bf16", "train.recompute=true"],
        &["align.precompute=true", "train.micro_tokens=1"],
    ]
    .iter()
    .enumerate()
    {
        let config = room.config(&format!("run{i}"), &[overrides, &["train.steps=2"][..]].concat());
        let mut notes = Vec::new();
        run_with(&config, false, u64::MAX, &mut notes).unwrap();
        let record = &records(&config)[0];
        assert_eq!(record.loss, Some(LN_2), "{overrides:?}");
        for name in ["rewards/chosen", "rewards/rejected", "rewards/margins"] {
            assert_eq!(record.measures[name], 0.0, "{overrides:?}: {name}");
        }
        assert!(notes.iter().any(|note| note.contains("rewards begin at 0")), "{notes:?}");
        assert!(record.grad_norm.unwrap() > 0.0);
        for name in ["squeezing.svg", "delta.svg", "rows.jsonl", "curve.svg"] {
            assert!(config.output.join(name).exists(), "{name}");
        }
    }
}

#[test]
fn mappo_with_delta_1_is_dpo_bit_for_bit_over_a_run() {
    let mut ones = rows(8);
    ones.iter_mut().for_each(|row| row["delta"] = json!(1));
    let room = Room::new(&ones);
    let end = |output: &str, overrides: &[&str]| {
        let config = room.config(output, overrides);
        let folder = run(&config, false).unwrap().checkpoint.unwrap();
        let losses: Vec<_> = records(&config).iter().map(|r| (r.loss, r.grad_norm)).collect();
        (weights(&folder), losses)
    };
    let dpo = end("dpo", &[]);
    assert!(end("mappo", &[MAPPO]) == dpo);
    assert!(end("term", &["align.terms=[{objective='dpo', mappo=true}]"]) == dpo);
    ones[0]["delta"] = json!(0.999);
    crate::tiny_chat::write_rows(&room.at("rows.jsonl"), &ones);
    assert!(end("less", &[MAPPO]) != dpo, "this test could not fail");
}

#[test]
fn what_is_easily_told_apart_is_learnt_within_sixty_steps() {
    let easy: Vec<Value> = (0..16)
        .map(|i| json!({"prompt": format!("{i}?"), "chosen": "yes", "rejected": "no"}))
        .collect();
    let room = Room::new(&easy);
    let sure = ["train.steps=60", "train.batch=8", "train.lr=3e-3"];
    for (name, more) in [("full", &[][..]), ("lora", &["lora={r=2, alpha=8.0}"])] {
        let config = room.config(name, &[&sure[..], more].concat());
        run(&config, false).unwrap();
        let records = records(&config);
        let last = records.last().unwrap();
        assert_eq!(last.measures["rewards/accuracies"], 1.0, "{name}");
        assert!(last.loss.unwrap() < 0.5 * LN_2, "{name}: {:?}", last.loss);
        assert!(last.measures["rewards/margins"] > 1.0, "{name}");
    }
}

#[test]
fn a_reference_that_reads_otherwise_is_refused_and_one_that_does_not_is_taken() {
    let room = Room::new(&rows(4));
    let other = room.at("other");
    write_model(&other, 2);
    let with = "align.reference='".to_owned() + other.to_str().unwrap() + "'";
    // Another model is not taken for the policy by mistake.
    let unsaid = refused(room.try_config("unsaid", &[with.as_str()]));
    assert!(unsaid.contains("would not begin at 0"), "{unsaid}");
    let meant = "align.reference_differs=true";
    let config = |output: &str| room.try_config(output, &[with.as_str(), meant]);
    let mut notes = Vec::new();
    let taken = config("taken").unwrap();
    run_with(&taken, false, 2, &mut notes).unwrap();
    assert!(notes.iter().any(|note| note.contains("another model")), "{notes:?}");
    assert_ne!(records(&taken)[0].loss, Some(LN_2));

    let file = other.join("tokenizer.json");
    std::fs::write(&file, tokenizer(&["ab"], &Value::Null)).unwrap();
    assert!(refused(config("a")).contains("another tokenizer.json"));
    std::fs::copy(room.at("model/tokenizer.json"), &file).unwrap();

    let edit = |name: &str, key: &str, value: u64| {
        let path = other.join(name);
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config[key] = json!(value);
        std::fs::write(&path, config.to_string()).unwrap();
    };
    edit("config.json", "max_position_embeddings", 32);
    assert!(refused(config("b")).contains("context of 32 tokens"));
    edit("config.json", "max_position_embeddings", 96);

    let larger = tercet_model::ModelConfig { vocab_size: 300, ..model(1).config().clone() };
    let larger = tercet_model::Model::new(larger, 1, tercet_tensor::DType::F32).unwrap();
    larger.save(&other).unwrap();
    assert!(refused(config("c")).contains("a vocabulary of 300 tokens, the policy one of 264"));
    let absent = room.try_config("d", &["align.reference='absent'"]);
    assert!(refused(absent).contains("absent"));
    for name in ["a", "b", "c", "d"] {
        assert!(!room.at(name).exists(), "{name} was left behind");
    }
}

#[test]
fn a_reference_elsewhere_that_is_the_policy_gives_its_numbers() {
    let room = Room::new(&rows(8));
    let same = format!("align.reference='{}'", room.at("model").display());
    let (own, named) = (room.config("own", &[]), room.config("named", &[same.as_str()]));
    let [own, named] =
        [own, named].map(|config| weights(&run(&config, false).unwrap().checkpoint.unwrap()));
    assert!(own == named);
}

#[test]
fn nonsense_is_refused_in_the_name_of_its_key_and_leaves_nothing() {
    let room = Room::new(&rows(4));
    for (overrides, said) in [
        (&["lora={r=2, dropout=0.1}"][..], "lora.dropout"),
        (&["lora.r=0"], "r is 0"),
        (&["align.terms=[]"], "align.terms"),
        (&["align.terms=[{objective='dop'}]"], "dop"),
        (&["align.terms=[{objective='dpo', betta=1}]"], "betta"),
        (&["align.terms=[{objective='dpo', beta=-1}]"], "beta"),
        (&["align.terms=[{objective='dpo', beta=nan}]"], "beta"),
        (&["align.terms=[{objective='dpo', gamma=1}]"], "gamma"),
        (&["align.terms=[{objective='kto', mappo=true}]"], "mappo"),
        (&["align.terms='dpo'"], "align.terms"),
        (&["align.ld_alpha=1.5"], "align.ld_alpha"),
        (&["align.ld_alpha=0.5", "align.terms=[{objective='sft'}]"], "align.ld_alpha"),
        (&[MAPPO, "align.delta={source='logistic', scale=-1}"], "align.delta.scale"),
        (&[MAPPO, "align.delta={source='column', scale=2}"], "align.delta.scale"),
        (&["align.delta={source='guess'}"], "source"),
        (&["align.delta.sauce='column'"], "sauce"),
        (&["align.precompute=true", "align.terms=[{objective='simpo'}]"], "align.precompute"),
        (&["align.reference='model'", "align.terms=[{objective='orpo'}]"], "align.reference"),
        (&["align.precompute=true", "align.terms=[{objective='kto'}]"], "align.precompute"),
        (&["train.batch=1", "align.terms=[{objective='kto'}]"], "train.batch"),
        (&["align.term=[]"], "align.terms"),
        (&["train.steps=-1"], "train.steps"),
        (&["train.batch_tokens=64"], "train.batch"),
        (&["data.context=97"], "context of 96"),
        (&["model.path='absent'"], "absent"),
        (&["data.paths=['absent.jsonl']"], "absent.jsonl"),
        (&["align.delta.source='identity'", MAPPO], "line 1"),
    ] {
        let text = refused(room.try_config("run", overrides));
        assert!(text.contains(said), "{overrides:?}: {text}");
        assert!(!room.at("run").exists(), "{overrides:?} left a folder behind");
    }
}

#[test]
fn a_broken_policy_is_said_before_the_first_step() {
    let room = Room::new(&rows(4));
    let mut broken = model(1);
    disturb(&mut broken, 0);
    let slot = broken.params().slot("model.norm.weight").unwrap();
    broken.params_mut().tensors_mut()[slot].as_f32_mut().unwrap()[3] = f32::INFINITY;
    broken.save(&room.at("model")).unwrap();
    let text = refused(room.try_config("run", &[]));
    assert!(text.contains("weights are damaged"), "{text}");
}

#[test]
fn kto_with_a_single_pair_has_no_other_answer_and_is_refused() {
    let room = Room::new(&rows(1));
    let kto = ["align.terms=[{objective='kto'}]", "train.batch=2"];
    assert!(refused(room.try_config("run", &kto)).contains("a second pair"));
    // A single held-out pair borrows the answer of one that is trained on.
    let several = Room::new(&rows(3));
    let one = several.at("one.jsonl");
    write_rows(&one, &rows(4)[3..]);
    let held_out = format!("data.validation_paths=['{}']", one.display());
    let config = several.config("run", &[&kto[..], &[held_out.as_str()]].concat());
    assert!(run(&config, false).unwrap().validation_loss.is_some_and(f64::is_finite));
}
