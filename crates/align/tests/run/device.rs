//! Alignment on a device does what it does on the CPU. Without a device there is nothing to see,
//! and the tests say so.

use std::f64::consts::LN_2;
use std::sync::atomic::AtomicBool;

use safetensors::SafeTensors;
use tercet_align::{AlignConfig, align};
use tercet_tensor::{Device, Gpu};
use tercet_train::{Control, Report};

use crate::room::{ROUNDING, Room, history, records, rows, run, weights};

fn device() -> Option<Device> {
    match Gpu::open(0) {
        Ok(gpu) => {
            gpu.use_cache(Some(std::env::temp_dir().join("tercet-test-kernels")));
            Some(Device::Cuda(gpu))
        }
        Err(why) => {
            println!("skipped: {why}");
            None
        }
    }
}

fn run_on(device: &Device, config: &AlignConfig) -> Report {
    let stop = AtomicBool::new(false);
    let control = Control { stop: &stop, resume: false, gemm_flops: None, device };
    align(config, &control, &mut |_| {}).unwrap()
}

/// The numbers a run ended with, weights or an adapter, in the order of their names.
fn numbers(report: &Report) -> Vec<f32> {
    let bytes = weights(report.checkpoint.as_ref().unwrap());
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = file.names();
    names.sort();
    let number = |four: &[u8]| f32::from_le_bytes(four.try_into().unwrap());
    names
        .into_iter()
        .flat_map(|name| file.tensor(name).unwrap().data().chunks(4).map(number))
        .collect()
}

#[test]
fn a_device_takes_the_steps_of_the_cpu() {
    let Some(device) = device() else { return };
    let room = Room::new(&rows(8));
    for (i, more) in [
        &["align.terms=[{objective='dpo'}]"][..],
        &["align.terms=[{objective='mappo'}]"],
        &["align.terms=[{objective='mappo'}]", "lora={r=2, alpha=8.0}"],
        &["align.terms=[{objective='dpo'}, {objective='sft', weight=0.3}]"],
        &["align.terms=[{objective='ipo_mean', mappo=true}]"],
        &["align.terms=[{objective='simpo', mappo=true}]"],
        &["align.terms=[{objective='cpo', mappo=true}]"],
        &["align.terms=[{objective='orpo'}]"],
        &["align.terms=[{objective='kto'}]"],
        &["align.terms=[{objective='mappo'}]", "align.ld_alpha=0.3"],
        &["align.terms=[{objective='mappo'}]", "align.precompute=true"],
        &["align.terms=[{objective='mappo'}]", "train.recompute=true", "train.micro_tokens=1"],
    ]
    .iter()
    .enumerate()
    {
        let [here, there] = ["here", "there"].map(|name| room.config(&format!("{name}{i}"), more));
        let (cpu, gpu) = (run(&here, false).unwrap(), run_on(&device, &there));
        let first = [&here, &there].map(|config| records(config).swap_remove(0));
        for (a, b) in [(first[0].loss, first[1].loss), (first[0].grad_norm, first[1].grad_norm)] {
            let (a, b) = (a.unwrap(), b.unwrap());
            assert!((a - b).abs() <= ROUNDING * a.abs(), "{more:?}: {a} against {b}");
        }
        let (a, b) = (numbers(&cpu), numbers(&gpu));
        assert_eq!(a.len(), b.len());
        // Six steps of the warm-up to 10⁻³ move a weight by 5·10⁻³ at most, by the sign of its
        // gradient while there is no history; a sign that falls the other way is rare.
        let apart = a.iter().zip(&b).filter(|(a, b)| (*a - *b).abs() > 1e-4).count();
        assert!(apart * 100 < a.len(), "{more:?}: {apart} of {} numbers apart", a.len());
    }
}

#[test]
fn on_a_device_rewards_begin_at_0_and_a_run_repeats_itself() {
    let Some(device) = device() else { return };
    let room = Room::new(&rows(8));
    for (i, more) in [
        &["train.dtype=bf16"][..],
        &["train.dtype=bf16", "lora={r=2, alpha=8.0}"],
        &["train.dtype=bf16", "align.precompute=true", "train.micro_tokens=1"],
    ]
    .iter()
    .enumerate()
    {
        let all = [*more, &["align.terms=[{objective='mappo'}]"]].concat();
        let twice = ["one", "two"].map(|name| room.config(&format!("{name}{i}"), &all));
        let ends = [0, 1].map(|n| weights(&run_on(&device, &twice[n]).checkpoint.unwrap()));
        assert_eq!(records(&twice[0])[0].loss, Some(LN_2), "{more:?}");
        assert_eq!(records(&twice[0])[0].measures["rewards/margins"], 0.0, "{more:?}");
        assert!(ends[0] == ends[1], "{more:?}");
        assert_eq!(history(&twice[0]), history(&twice[1]), "{more:?}");
    }
}
