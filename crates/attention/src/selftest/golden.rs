//! Golden cases: inputs and float64 results in two safetensors files.

use std::collections::BTreeMap;

use safetensors::{Dtype, SafeTensors};

use super::case::{Case, INPUTS};
use super::{Check, Fault};
use crate::{Dims, NsaSpec};

/// A golden case: what goes in and what must come out.
#[derive(Clone, Debug)]
pub struct Golden {
    /// Its name, such as `varlen`.
    pub name: String,
    /// The call.
    pub case: Case,
    /// Selected blocks `[T, K, S]`.
    pub indices: Vec<i32>,
    /// Outputs and gradients, float64 rounded to f32.
    pub expected: Tensors,
}

impl Golden {
    /// Reads the bytes of `NAME.input.safetensors` and `NAME.expected.safetensors`.
    pub fn read(name: &str, input: &[u8], expected: &[u8]) -> Check<Self> {
        let fault = |what: &str| Fault(format!("golden case {name}: {what}"));
        let say = |e: safetensors::SafeTensorError| fault(&e.to_string());
        let (_, header) = SafeTensors::read_metadata(input).map_err(say)?;
        let spec = header.metadata().as_ref().and_then(|metadata| metadata.get("spec"));
        let spec = spec.ok_or_else(|| fault("the metadata has no `spec`"))?;
        let spec: NsaSpec = serde_json::from_str(spec).map_err(|e| fault(&e.to_string()))?;
        let file = SafeTensors::deserialize(input).map_err(say)?;
        let shape = |name: &str| match file.tensor(name).map_err(say)?.shape() {
            &[_, heads, dim] => Ok((heads, dim)),
            other => Err(fault(&format!("{name} has shape {other:?}, not three dimensions"))),
        };
        let ((heads, key_dim), (kv_heads, _)) = (shape("q")?, shape("k_slc")?);
        let dims = Dims { heads, kv_heads, key_dim, value_dim: shape("v_slc")?.1 };
        dims.validate()?;
        let (cu_seqlens, tensors) = split(&file, "cu_seqlens").map_err(|e| fault(&e.0))?;
        if let Some(missing) = INPUTS.iter().find(|name| !tensors.contains_key(**name)) {
            return Err(fault(&format!("{missing} is missing")));
        }
        let file = SafeTensors::deserialize(expected).map_err(say)?;
        let (indices, expected) = split(&file, "indices").map_err(|e| fault(&e.0))?;
        let case = Case { spec, dims, cu_seqlens, tensors };
        Ok(Self { name: name.to_owned(), case, indices, expected })
    }
}

type Tensors = BTreeMap<String, Vec<f32>>;

/// The one integer tensor `integers` and all others.
fn split(file: &SafeTensors, integers: &str) -> Check<(Vec<i32>, Tensors)> {
    let mut numbers = Vec::new();
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        let wanted = if name == integers { Dtype::I32 } else { Dtype::F32 };
        if view.dtype() != wanted {
            return Err(Fault(format!("{name} is {:?}, expected {wanted:?}", view.dtype())));
        }
        let words = view.data().as_chunks().0;
        if name == integers {
            numbers = words.iter().map(|word| i32::from_le_bytes(*word)).collect();
        } else {
            tensors.insert(name, words.iter().map(|word| f32::from_le_bytes(*word)).collect());
        }
    }
    Ok((numbers, tensors))
}
