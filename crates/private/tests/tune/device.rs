//! A private run on a device does what the CPU's does: the same persons, the same noise, gradients
//! to rounding. Without a device there is nothing to see, and the tests say so.

use std::sync::atomic::AtomicBool;

use tercet_model::{Adapter, Model};
use tercet_private::tune::{PrivateConfig, tune};
use tercet_tensor::{Device, Gpu};
use tercet_train::{Control, Report};

use crate::common::{Room, result, run};

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

fn run_on(device: &Device, config: &PrivateConfig) -> Report {
    let stop = AtomicBool::new(false);
    let control = Control { stop: &stop, resume: false, gemm_flops: None, device };
    tune(config, &control, &mut |_| {}).unwrap()
}

/// The weights of the adapter that a run ended with.
fn weights(room: &Room, report: &Report) -> Vec<f32> {
    let model = Model::load(&room.at("model")).unwrap();
    let adapter = Adapter::load(report.checkpoint.as_ref().unwrap(), &model).unwrap();
    let tensors = adapter.params().tensors().iter();
    tensors.flat_map(|tensor| tensor.to_vec_f32().unwrap()).collect()
}

/// One step of the first: without momentum's history a weight moves by lr·g/|g|, which is the same
/// wherever the gradient is far from 0; noise makes it so.
#[test]
fn a_device_takes_the_steps_of_the_cpu() {
    let Some(device) = device() else { return };
    for (name, more) in [
        ("dp-sgd", &[][..]),
        ("quantile", &["private.quantile.count_noise=5.0"]),
        ("auto-s", &[]),
        ("adaclip", &[]),
        ("per-layer", &["private.balance=true"]),
        ("rldp", &["private.every=2"]),
        (
            "per-layer",
            &[
                "private.people=60",
                "private.canaries.kind=\"gradient\"",
                "private.canaries.count=16",
            ],
        ),
    ] {
        let room = Room::new();
        let method = format!("private.method=\"{name}\"");
        let all = [&[&method[..], "train.lr=1e-3", "train.steps=4"], more].concat();
        let here = weights(&room, &run(&room.config("here", &all), false).unwrap());
        let there = weights(&room, &run_on(&device, &room.config("there", &all)));
        // Four steps move a weight by 4·10⁻³ at most; a sign that falls the other way is rare.
        let apart = |(a, b): &(&f32, &f32)| (*a - *b).abs() > 1e-4;
        let apart = here.iter().zip(&there).filter(apart).count();
        assert!(apart * 100 < here.len(), "{name}: {apart} of {}", here.len());
    }
}

#[test]
fn portions_change_no_bit_on_a_device() {
    let Some(device) = device() else { return };
    let room = Room::new();
    let whole = result(&run_on(&device, &room.config("whole", &[])));
    for micro in [1, 4] {
        let more = format!("private.micro_people={micro}");
        let config = room.config(&format!("micro{micro}"), &[&more]);
        assert!(result(&run_on(&device, &config)) == whole, "{micro} at once");
    }
    assert!(result(&run_on(&device, &room.config("again", &[]))) == whole, "twice");
}
