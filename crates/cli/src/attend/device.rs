//! From checked inputs to results on a GPU, by the ops that models use.

use std::iter::zip;

use tercet_attention::Compressor;
use tercet_tensor::{Device, Grads, Tape, Tensor, Var, choose, ops};

use super::compute::{INPUTS, LINEAR, MLP, Results, phi_name};
use super::input::Input;
use super::output::{Data, Stored};
use crate::device::Choice;

/// Storage types as tensors hold them.
pub trait Held: Stored {
    /// A tensor of these numbers.
    fn tensor(values: Vec<Self>, shape: &[usize]) -> tercet_tensor::Result<Tensor>;
}

impl Held for f32 {
    fn tensor(values: Vec<Self>, shape: &[usize]) -> tercet_tensor::Result<Tensor> {
        Tensor::from_f32(values, shape)
    }
}

impl Held for half::bf16 {
    fn tensor(values: Vec<Self>, shape: &[usize]) -> tercet_tensor::Result<Tensor> {
        Tensor::from_bf16(values, shape)
    }
}

/// The operator on the device, inputs stored as `E`.
pub fn on_device<E: Held>(
    input: &Input,
    device: &Choice,
) -> anyhow::Result<Vec<super::output::Tensor>> {
    let device = device.tensors();
    let tape = &mut Tape::recording();
    let inputs = Inputs::upload::<E>(input, &device, tape)?;
    let [phi_k, phi_v] = ["k", "v"].map(|letter| inputs.phi(input, letter));
    let get = |name: &str| inputs.var(name);
    let k_cmp = ops::compress(tape, &get("k_cmp"), &phi_k, &input.spec, &input.cu_seqlens)?;
    let v_cmp = ops::compress(tape, &get("v_cmp"), &phi_v, &input.spec, &input.cu_seqlens)?;
    let vars = ops::NsaVars {
        q: get("q"),
        k_cmp,
        v_cmp,
        k_slc: get("k_slc"),
        v_slc: get("v_slc"),
        k_win: get("k_win"),
        v_win: get("v_win"),
        gate: get("gate"),
    };
    let all = [&vars.q, &vars.k_cmp, &vars.v_cmp, &vars.k_slc, &vars.v_slc, &vars.k_win];
    let all = all.into_iter().chain([&vars.v_win, &vars.gate]).map(|var| var.value().clone());
    let all: Vec<Tensor> = all.collect();
    let all = <[Tensor; 8]>::try_from(all).map_err(|_| anyhow::anyhow!("eight inputs"))?;
    let chosen = choose(all, &input.spec, &input.cu_seqlens)?;
    let numbers = |tensor: &Tensor| -> anyhow::Result<Data> {
        Ok(E::data(tensor.to_vec_f32()?.into_iter().map(E::from_f32).collect()))
    };

    let mut results = Results::new(input);
    if input.backward {
        let out = ops::attention_nsa(tape, &vars, &input.spec, &input.cu_seqlens)?;
        // The gradient of Σ out · d_out is d_out; the sum is a product of two rows.
        let row = [1, out.value().len()];
        let d_out = tape.leaf(inputs.var("d_out").value().reshape(&row)?);
        let sum = ops::linear(tape, &out.reshape(&row)?, &d_out, None)?;
        let mut grads = Grads::new(inputs.names.len());
        tape.backward(&sum, &mut grads)?;
        for (slot, name) in inputs.names.iter().enumerate().filter(|(_, n)| **n != "d_out") {
            let len: usize = input.shape(name).iter().product();
            let gradient = match grads.get(slot) {
                Some(gradient) => gradient.to_vec_f32()?,
                None => vec![0.0; len],
            };
            // Gradients of φ's parameters are f32 whatever the storage.
            let parameter = name.starts_with("phi_");
            results.gradient(
                name,
                match parameter {
                    true => Data::F32(gradient),
                    false => E::data(gradient.into_iter().map(E::from_f32).collect()),
                },
            );
        }
    }
    let lses = chosen.lses.map(|lse| lse.into_iter().map(f64::from).collect());
    results.forward(numbers(&chosen.out)?, chosen.indices, lses);
    Ok(results.tensors)
}

/// The file's tensors on the device; a tensor's place is the slot of its gradient.
struct Inputs {
    names: Vec<String>,
    vars: Vec<Var>,
}

impl Inputs {
    fn upload<E: Held>(input: &Input, device: &Device, tape: &mut Tape) -> anyhow::Result<Self> {
        let mut names: Vec<String> = INPUTS.map(str::to_owned).into();
        let parameters: &[&str] = match input.spec.compressor {
            Compressor::Mean => &[],
            Compressor::Linear => &LINEAR,
            Compressor::Mlp => &MLP,
        };
        for letter in ["k", "v"] {
            names.extend(parameters.iter().map(|name| phi_name(letter, name)));
        }
        if input.backward {
            names.push("d_out".into());
        }
        let mut tensors = input.read::<E>()?;
        let mut vars = Vec::new();
        for (slot, name) in names.iter().enumerate() {
            let values = tensors.remove(name).unwrap_or_default();
            let tensor = E::tensor(values, &input.shape(name))?.to_device(device)?;
            vars.push(tape.param(tensor, slot));
        }
        Ok(Self { names, vars })
    }

    fn var(&self, name: &str) -> Var {
        let held = zip(&self.names, &self.vars).find(|(held, _)| *held == name);
        // Every name asked for is in the list that was uploaded.
        held.map_or_else(|| self.vars[0].clone(), |(_, var)| var.clone())
    }

    fn phi(&self, input: &Input, letter: &str) -> ops::Phi {
        let var = |name: &str| self.var(&phi_name(letter, name));
        match input.spec.compressor {
            Compressor::Mean => ops::Phi::Mean,
            Compressor::Linear => ops::Phi::Linear { weight: var("weight"), pe: var("pe") },
            Compressor::Mlp => ops::Phi::Mlp {
                weight1: var("weight1"),
                bias1: var("bias1"),
                weight2: var("weight2"),
                bias2: var("bias2"),
                pe: var("pe"),
            },
        }
    }
}
