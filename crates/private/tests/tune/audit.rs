//! Runs under attack: one without noise is caught, one with a proof is not.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use serde_json::{Value, json};
use tercet_private::audit::report::{Kind, Report, audit};
use tercet_private::clinic::{self, Plan};
use tercet_private::tune::PrivateConfig;
use tercet_private::tune::attack::{Attacked, SCORES, Suspects, attack};
use tercet_tensor::Device;
use tercet_train::Result;

use crate::common::{Room, read, run};
use crate::tiny_chat::{model_with, write_rows};

/// A room whose rows are the planted ones of 40 canaries and six patients, with a model that is
/// wide enough to learn codes by heart.
fn room() -> Room {
    let room = Room::new();
    let plan = Plan { patients: 60, canaries: 40, seed: 4 };
    clinic::write(&plan, &room.at("records")).unwrap();
    let more = json!({
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16,
    });
    model_with(&more, 1).save(&room.at("model")).unwrap();
    let rows: Vec<Value> = lines(&room.at("records/train.jsonl"));
    let is_canary = |row: &Value| row["person"].as_str().unwrap().starts_with("canary");
    let (mut few, others): (Vec<Value>, Vec<Value>) = rows.into_iter().partition(is_canary);
    few.extend(others.into_iter().take(6));
    write_rows(&room.at("rows.jsonl"), &few);
    room
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn config(room: &Room, output: &str, more: &[&str]) -> PrivateConfig {
    let all = [
        "private.unit=\"person\"",
        "private.people=40",
        "train.batch=24",
        "train.steps=150",
        "train.lr=1e-2",
        "lora.r=16",
        "lora.alpha=32",
        "lora.targets=[\"q_proj\",\"v_proj\",\"o_proj\",\"up_proj\",\"down_proj\"]",
        "private.threshold=10",
    ];
    room.config(output, &[&all[..], more].concat())
}

fn attacked(config: &PrivateConfig, suspects: &Suspects) -> Result<Attacked> {
    attack(&config.output, suspects, (&AtomicBool::new(false), &Device::Cpu))
}

fn canaries(room: &Room) -> Suspects {
    let canaries = Some(room.at("records/canaries.jsonl"));
    Suspects { canaries, rows: 100, ..Suspects::default() }
}

fn found(attacked: &Attacked) -> Report {
    audit(&attacked.scores, attacked.delta, 0.05).unwrap()
}

#[test]
fn a_run_without_noise_is_caught_and_a_private_one_is_not() {
    let room = room();
    let off = config(&room, "off", &["private.noise=false"]);
    run(&off, false).unwrap();
    let attacked_off = attacked(&off, &canaries(&room)).unwrap();
    assert_eq!(attacked_off.epsilon, None, "nothing was proven");
    let caught = found(&attacked_off);
    assert!(caught.refutes(1.0));
    // All ten bits there are, less a little; a canary never seen has 1.44.
    assert!(caught.canaries.unwrap().exposure.unwrap().mean > 5.0);
    assert_eq!(lines(&off.output.join(SCORES)).len(), 40);
    // The same scores, the same bytes.
    let before = read(&off.output.join(SCORES));
    attacked(&off, &canaries(&room)).unwrap();
    assert!(read(&off.output.join(SCORES)) == before);

    let private = config(&room, "private", &["private.epsilon=2.0"]);
    run(&private, false).unwrap();
    let all = Suspects {
        members: Some(room.at("rows.jsonl")),
        nonmembers: Some(room.at("records/heldout.jsonl")),
        ..canaries(&room)
    };
    let attacked = attacked(&private, &all).unwrap();
    let proven = attacked.epsilon.unwrap();
    assert!(proven <= 2.0 && proven > 1.9, "{proven}");
    let fine = found(&attacked);
    assert!(!fine.refutes(proven) && fine.membership.is_some());
    let members: Vec<_> = attacked.scores.iter().filter(|s| s.kind == Kind::Member).collect();
    assert_eq!(members.len(), 6, "canaries are no members");
}

#[test]
fn an_audit_of_other_data_is_refused() {
    let room = room();
    let config = config(&room, "run", &["train.steps=1"]);
    let refused = |suspects: &Suspects| attacked(&config, suspects).unwrap_err().to_string();
    let error = refused(&canaries(&room));
    assert!(error.contains("is not the output folder of"), "{error}");
    run(&config, false).unwrap();
    attacked(&config, &canaries(&room)).unwrap();

    // Canaries of another plan; coins turned over; none.
    let plan = Plan { patients: 60, canaries: 40, seed: 5 };
    clinic::write(&plan, &room.at("others")).unwrap();
    let with = |name: &str| Suspects { canaries: Some(room.at(name)), ..canaries(&room) };
    let error = refused(&with("others/canaries.jsonl"));
    assert!(error.contains("canary-") && error.contains("run's rows"), "{error}");
    let manifest = fs::read_to_string(room.at("records/canaries.jsonl")).unwrap();
    let turned: String = manifest
        .lines()
        .map(|line| {
            let mut canary: Value = serde_json::from_str(line).unwrap();
            let planted = canary["included"] == true;
            canary["included"] = json!(!planted);
            canary["line"] = if planted { Value::Null } else { json!(1) };
            format!("{canary}\n")
        })
        .collect();
    for (text, says) in [(&turned[..], "run's rows"), ("", "names no canaries"), ("{}", "line 1")] {
        fs::write(room.at("bad.jsonl"), text).unwrap();
        let error = refused(&with("bad.jsonl"));
        assert!(error.contains(says), "{error}");
    }
    // Members that are strangers, strangers that are members.
    let (rows, held_out) = (room.at("rows.jsonl"), room.at("records/heldout.jsonl"));
    for (members, nonmembers, says) in
        [(&held_out, &held_out, "is of nobody"), (&rows, &rows, "is of somebody")]
    {
        let suspects = Suspects {
            canaries: Some(room.at("records/canaries.jsonl")),
            members: Some(members.clone()),
            nonmembers: Some(nonmembers.clone()),
            rows: 100,
        };
        let error = refused(&suspects);
        assert!(error.contains(says), "{error}");
    }
    let none = Suspects { members: Some(rows.clone()), rows: 0, ..Suspects::default() };
    assert!(refused(&none).contains("at most 0 members"), "nothing would have been compared");
    // Rows that changed since.
    let text = fs::read_to_string(&rows).unwrap();
    fs::write(&rows, text.replace("Diabetes", "diabetes").replacen("code", "Code", 1)).unwrap();
    let error = refused(&canaries(&room));
    assert!(error.contains("is not what step 1 was trained on"), "{error}");
}
