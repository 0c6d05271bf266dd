//! The ways to compute a case: the float64 reference, the CPU kernels, and what a device adds.

use std::collections::BTreeMap;

use half::{bf16, f16};

use super::Check;
use super::case::Case;
use super::exact::{reference, reference_attend};
use super::fast::{fast, fast_attend, fast_decode};
use super::plain::{plain, plain_attend};
use crate::Element;
use crate::cpu::Mask;

/// What computing a case gives, in the golden files' names; besides those, the branches' outputs
/// `out_cmp, out_slc, out_win` and the compressed keys and values `compressed_k, compressed_v`.
/// Gradients are there when the case has a `d_out`.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Selected blocks `[T, K, S]`.
    pub indices: Vec<i32>,
    /// Everything else.
    pub tensors: BTreeMap<String, Vec<f64>>,
}

impl Outcome {
    /// A tensor by its name; empty when there is none.
    pub fn get(&self, name: &str) -> &[f64] {
        self.tensors.get(name).map_or(&[], Vec::as_slice)
    }

    /// Row `t` of a tensor with one row a token.
    pub fn row(&self, name: &str, t: usize, tokens: usize) -> &[f64] {
        let x = self.get(name);
        let width = x.len() / tokens;
        &x[t * width..(t + 1) * width]
    }
}

/// Half the distance from 1 to the next float64.
pub const UNIT64: f64 = f64::EPSILON / 2.0;
/// Half the distance from 1 to the next f32.
pub const UNIT32: f64 = f32::EPSILON as f64 / 2.0;
/// Half the distance from 1 to the next bf16.
pub const UNIT16: f64 = 1.0 / 256.0;

/// How a way stores its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// float64, the reference only.
    F64,
    /// f32.
    F32,
    /// bf16.
    Bf16,
    /// IEEE half.
    F16,
}

impl Storage {
    /// Its unit roundoff.
    pub fn unit(self) -> f64 {
        match self {
            Self::F64 => UNIT64,
            Self::F32 => UNIT32,
            Self::Bf16 => UNIT16,
            Self::F16 => 1.0 / 2048.0,
        }
    }

    /// The case with inputs that it can store.
    pub fn stored(self, case: &Case) -> Case {
        match self {
            Self::F64 | Self::F32 => case.clone(),
            Self::Bf16 => case.rounded::<bf16>(),
            Self::F16 => case.rounded::<f16>(),
        }
    }

    /// The plain formula of this storage type, reading the blocks `indices`.
    pub fn plain(self, case: &Case, indices: &[i32]) -> Outcome {
        match self {
            Self::F64 | Self::F32 => plain::<f32>(case, indices),
            Self::Bf16 => plain::<bf16>(case, indices),
            Self::F16 => plain::<f16>(case, indices),
        }
    }

    /// See [`Storage::plain`]; dense or window attention over a branch's keys and values.
    pub fn plain_attend(self, case: &Case, branch: &str, mask: Mask) -> Outcome {
        match self {
            Self::F64 | Self::F32 => plain_attend::<f32>(case, branch, mask),
            Self::Bf16 => plain_attend::<bf16>(case, branch, mask),
            Self::F16 => plain_attend::<f16>(case, branch, mask),
        }
    }
}

/// The whole operator on a case.
pub type Run<'a> = Box<dyn Fn(&Case) -> Check<Outcome> + Send + Sync + 'a>;
/// Dense or window attention over one branch's keys and values; see [`reference_attend`].
pub type Attend<'a> = Box<dyn Fn(&Case, &str, Mask) -> Check<Outcome> + Send + Sync + 'a>;
/// Decoding of one sequence in chunks of so many tokens: outputs `[T, H, V]` and indices.
pub type Decode<'a> =
    Box<dyn Fn(&Case, &[usize]) -> Check<(Vec<f64>, Vec<i32>)> + Send + Sync + 'a>;

/// A way to compute a case.
pub struct Way<'a> {
    /// Such as `cpu bf16`.
    pub name: String,
    /// Unit roundoff of its arithmetic.
    pub unit: f64,
    /// How it stores inputs and results.
    pub storage: Storage,
    /// The operator, forward and, for cases with a `d_out`, backward.
    pub run: Run<'a>,
    /// Dense and window attention.
    pub attend: Attend<'a>,
    /// Decoding over a cache, where the way has it.
    pub decode: Option<Decode<'a>>,
}

impl Way<'_> {
    /// The float64 reference, which must pass every oracle too.
    pub fn reference() -> Self {
        Way {
            name: "reference".into(),
            unit: UNIT64,
            storage: Storage::F64,
            run: Box::new(reference),
            attend: Box::new(reference_attend),
            decode: None,
        }
    }

    /// The CPU kernels with f32 storage.
    pub fn cpu_f32() -> Self {
        Self::cpu::<f32>("cpu f32", Storage::F32)
    }

    /// The CPU kernels with bf16 storage.
    pub fn cpu_bf16() -> Self {
        Self::cpu::<bf16>("cpu bf16", Storage::Bf16)
    }

    fn cpu<E: Element>(name: &str, storage: Storage) -> Self {
        Way {
            name: name.into(),
            unit: UNIT32,
            storage,
            run: Box::new(fast::<E>),
            attend: Box::new(fast_attend::<E>),
            decode: Some(Box::new(fast_decode::<E>)),
        }
    }

    /// The case with inputs that this way can store.
    pub fn stored(&self, case: &Case) -> Case {
        self.storage.stored(case)
    }
}

/// Widens a slice.
pub(super) fn widen<E: Element>(x: &[E]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}
