//! What `attend` reads, checked before any work is done.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use safetensors::Dtype;
use tercet_attention::{Compressor, Dims, Element, NsaSpec, sequences};

use super::tensor_file::TensorFile;
use crate::error::user;

/// Sequence offsets, `[B + 1]`, integers; without them all tokens are one sequence.
const CU_SEQLENS: &str = "cu_seqlens";
/// The gradient of `out`.
const D_OUT: &str = "d_out";

/// Checked inputs; tensors are read on demand.
pub struct Input {
    file: TensorFile,
    /// Blocks, counts, window and compressor.
    pub spec: NsaSpec,
    /// Heads and dimensions.
    pub dims: Dims,
    /// Sequence offsets, B+1.
    pub cu_seqlens: Vec<i32>,
    /// T.
    pub tokens: usize,
    /// M of an mlp; 0 for other compressors.
    pub hidden: usize,
    /// Whether gradients are asked for.
    pub backward: bool,
    /// Shapes by name: what goes in and, when asked for, has a gradient.
    shapes: BTreeMap<String, Vec<usize>>,
}

/// The tensors, by name.
pub type Tensors<T> = BTreeMap<String, Vec<T>>;

/// A dimension's letter and size, for shapes in messages.
type Layout = Vec<(char, usize)>;

impl Input {
    /// Opens `path` and checks spec, names, dtypes, shapes and `cu_seqlens`.
    pub fn open(path: &Path, spec: Option<&Path>, backward: bool) -> anyhow::Result<Self> {
        let file = TensorFile::open(path)?;
        let spec = read_spec(&file, spec)?;
        let tensors = file.tensors();
        let q = rank3(&file, &tensors, "q", "[T, H, D]")?;
        let k = rank3(&file, &tensors, "k_slc", "[T, K, D]")?;
        let v = rank3(&file, &tensors, "v_slc", "[T, K, V]")?;
        let (tokens, hidden) = (q[0], hidden_width(&file, &tensors, &spec)?);
        let dims = Dims { heads: q[1], kv_heads: k[1], key_dim: q[2], value_dim: v[2] };
        dims.validate().with_context(|| file.name())?;

        let mut shapes = BTreeMap::new();
        let layouts = layouts(&spec, dims, tokens, hidden);
        for (name, layout) in &layouts {
            if name == D_OUT && !backward {
                continue;
            }
            let why = if name == D_OUT { "; --backward needs it" } else { "" };
            let (dtype, shape) = find(&file, &tensors, name, &format!("{}{why}", show(layout)))?;
            if !matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64) {
                return Err(user(format!(
                    "{}: {name} is {dtype:?}; expected F32, BF16, F16 or F64",
                    file.name()
                )));
            }
            if !shape.iter().eq(layout.iter().map(|(_, n)| n)) {
                return Err(user(format!(
                    "{}: {name} has shape {shape:?}, expected {}",
                    file.name(),
                    show(layout)
                )));
            }
            shapes.insert(name.clone(), shape.clone());
        }
        let known = |name: &str| name == CU_SEQLENS || layouts.iter().any(|l| l.0 == name);
        if let Some(extra) = tensors.keys().find(|name| !known(name)) {
            let names: Vec<&str> = layouts.iter().map(|l| l.0.as_str()).collect();
            return Err(user(format!(
                "{}: unexpected tensor {extra}; with compressor {} the file may hold {}, \
                 {CU_SEQLENS}",
                file.name(),
                compressor_name(&spec),
                names.join(", ")
            )));
        }
        let cu_seqlens = read_cu_seqlens(&file, &tensors, tokens)?;
        Ok(Self { file, spec, dims, cu_seqlens, tokens, hidden, backward, shapes })
    }

    /// Reads every tensor but `cu_seqlens` as `E`; each element must be a finite number.
    pub fn read<E: Element>(&self) -> anyhow::Result<Tensors<E>> {
        let mut tensors = Tensors::new();
        for (name, shape) in &self.shapes {
            let values = self.file.read(name, |i, x| {
                let stored = E::from_f32(x as f32);
                if stored.to_f32().is_finite() {
                    return Ok(stored);
                }
                let place: Vec<String> = position(shape, i).iter().map(usize::to_string).collect();
                let place = place.join(", ");
                let what = if x.is_finite() {
                    format!("{x:e}, too large for this dtype")
                } else {
                    format!("{x}; inputs must be finite numbers")
                };
                Err(user(format!("{}: {name}[{place}] is {what}", self.file.name())))
            })?;
            tensors.insert(name.clone(), values);
        }
        Ok(tensors)
    }

    /// The shape of an input.
    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.shapes[name].clone()
    }
}

/// Where element `i` stands in a tensor of this shape.
fn position(shape: &[usize], mut i: usize) -> Vec<usize> {
    let mut place = Vec::new();
    for &n in shape.iter().rev() {
        place.push(i % n);
        i /= n;
    }
    place.reverse();
    place
}

fn read_spec(file: &TensorFile, path: Option<&Path>) -> anyhow::Result<NsaSpec> {
    let (text, place) = match (path, file.entry("spec")) {
        (Some(path), _) => {
            let place = path.display().to_string();
            let text =
                std::fs::read_to_string(path).with_context(|| format!("cannot read {place}"))?;
            (text, place)
        }
        (None, Some(text)) => (text.to_owned(), format!("spec of {}", file.name())),
        (None, None) => {
            return Err(user(format!(
                "{} has no spec; give one with --spec SPEC.json, or as the metadata entry `spec`, \
                 such as {}",
                file.name(),
                serde_json::to_string(&NsaSpec::default())?
            )));
        }
    };
    let spec: NsaSpec = serde_json::from_str(&text).with_context(|| place.clone())?;
    spec.validate().with_context(|| place)?;
    Ok(spec)
}

fn compressor_name(spec: &NsaSpec) -> &'static str {
    match spec.compressor {
        Compressor::Mean => "mean",
        Compressor::Linear => "linear",
        Compressor::Mlp => "mlp",
    }
}

/// The dtype and shape of a tensor that must be there.
fn find<'a>(
    file: &TensorFile,
    tensors: &'a BTreeMap<String, (Dtype, Vec<usize>)>,
    name: &str,
    expected: &str,
) -> anyhow::Result<&'a (Dtype, Vec<usize>)> {
    tensors.get(name).ok_or_else(|| {
        user(format!("{}: tensor {name} is missing; expected {expected}", file.name()))
    })
}

/// The shape of a tensor that must be there and have three dimensions.
fn rank3(
    file: &TensorFile,
    tensors: &BTreeMap<String, (Dtype, Vec<usize>)>,
    name: &str,
    expected: &str,
) -> anyhow::Result<[usize; 3]> {
    let (_, shape) = find(file, tensors, name, expected)?;
    shape.as_slice().try_into().map_err(|_| {
        user(format!("{}: {name} has shape {shape:?}, expected {expected}", file.name()))
    })
}

/// M, read off `phi_k_bias1` `[K, M]`.
fn hidden_width(
    file: &TensorFile,
    tensors: &BTreeMap<String, (Dtype, Vec<usize>)>,
    spec: &NsaSpec,
) -> anyhow::Result<usize> {
    if spec.compressor != Compressor::Mlp {
        return Ok(0);
    }
    match find(file, tensors, "phi_k_bias1", "[K, M]")?.1[..] {
        [_, hidden] if hidden > 0 => Ok(hidden),
        ref shape => Err(user(format!(
            "{}: phi_k_bias1 has shape {shape:?}, expected [K, M] with M at least 1",
            file.name()
        ))),
    }
}

/// Every tensor that the file should hold, `d_out` last.
fn layouts(spec: &NsaSpec, dims: Dims, tokens: usize, hidden: usize) -> Vec<(String, Layout)> {
    let (t, h, k) = (('T', tokens), ('H', dims.heads), ('K', dims.kv_heads));
    let (d, v) = (('D', dims.key_dim), ('V', dims.value_dim));
    let mut all: Vec<(String, Layout)> = vec![("q".into(), vec![t, h, d])];
    for branch in ["cmp", "slc", "win"] {
        all.push((format!("k_{branch}"), vec![t, k, d]));
        all.push((format!("v_{branch}"), vec![t, k, v]));
    }
    all.push(("gate".into(), vec![t, h, ('3', 3)]));
    let l = spec.compress_block;
    for (letter, c) in [("k", d), ("v", v)] {
        let mut add =
            |name: &str, layout: Layout| all.push((format!("phi_{letter}_{name}"), layout));
        // A block of absurd length times a dimension stays far inside 64 bits; see NsaSpec.
        let block = ('l', l * c.1);
        match spec.compressor {
            Compressor::Mean => {}
            Compressor::Linear => {
                add("weight", vec![k, block, c]);
                add("pe", vec![k, ('l', l), c]);
            }
            Compressor::Mlp => {
                let m = ('M', hidden);
                add("weight1", vec![k, block, m]);
                add("bias1", vec![k, m]);
                add("weight2", vec![k, m, c]);
                add("bias2", vec![k, c]);
                add("pe", vec![k, ('l', l), c]);
            }
        }
    }
    all.push((D_OUT.into(), vec![t, h, v]));
    all
}

/// A layout with its numbers, such as `[T 5, H 4, D 16]`.
fn show(layout: &Layout) -> String {
    let parts: Vec<String> = layout
        .iter()
        .map(|&(letter, n)| if letter == '3' { "3".into() } else { format!("{letter} {n}") })
        .collect();
    format!("[{}]", parts.join(", "))
}

fn read_cu_seqlens(
    file: &TensorFile,
    tensors: &BTreeMap<String, (Dtype, Vec<usize>)>,
    tokens: usize,
) -> anyhow::Result<Vec<i32>> {
    let Some((dtype, shape)) = tensors.get(CU_SEQLENS) else {
        let tokens = i32::try_from(tokens).map_err(|_| {
            user(format!("{}: {tokens} tokens are more than {}", file.name(), i32::MAX))
        })?;
        return Ok(vec![0, tokens]);
    };
    if !matches!(dtype, Dtype::I32 | Dtype::I64) || shape.len() != 1 {
        return Err(user(format!(
            "{}: {CU_SEQLENS} is {dtype:?} of shape {shape:?}, expected I32 [B + 1]",
            file.name()
        )));
    }
    let offsets = file.read(CU_SEQLENS, |i, x| {
        let whole = x as i32;
        if f64::from(whole) != x {
            return Err(user(format!(
                "{}: {CU_SEQLENS}[{i}] is {x}, outside the range of I32",
                file.name()
            )));
        }
        Ok(whole)
    })?;
    sequences(&offsets, tokens).with_context(|| file.name())?;
    Ok(offsets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_in_row_major_order() {
        assert_eq!(position(&[2, 3, 4], 0), [0, 0, 0]);
        assert_eq!(position(&[2, 3, 4], 23), [1, 2, 3]);
        assert_eq!(position(&[2, 3, 4], 14), [1, 0, 2]);
    }
}
