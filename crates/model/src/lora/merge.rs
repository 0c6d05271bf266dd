//! An adapter becomes part of the weights: `W += s·B·A`.

use rayon::prelude::*;
use tercet_tensor::{DType, Device, Tape, Tensor, ops};

use super::adapter::{Adapter, Place};
use super::fresh_stamp;
use crate::{Model, Result};

impl Model {
    /// Adds an attached adapter's update to the weights, computed in f32 and rounded once to the
    /// model's storage type, and detaches it. What the model computes stays the same to rounding.
    pub fn merge(&mut self, name: &str) -> Result<()> {
        let at = self.adapters.find(name).ok_or_else(|| self.adapters.unknown(name))?;
        let adapter = &self.adapters.held[at].1;
        let seats: Vec<_> = adapter.seats().collect();
        let merged: Result<Vec<(usize, Tensor)>> = seats
            .into_par_iter()
            .map(|(weight, place)| {
                Ok((weight, merged(self.params.tensor(weight), adapter, place)?))
            })
            .collect();
        for (weight, tensor) in merged? {
            self.params.set(weight, tensor)?;
        }
        self.detach(name);
        self.stamp = fresh_stamp();
        Ok(())
    }
}

/// `W + s·B·A` in W's storage type, where W lives.
fn merged(weight: &Tensor, adapter: &Adapter, place: Place) -> Result<Tensor> {
    let wide = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32);
    let (a, b) = (wide(adapter.params.tensor(place.a))?, wide(adapter.params.tensor(place.b))?);
    let tape = &mut Tape::inference();
    let (b, a) = (tape.leaf(b), tape.leaf(transposed(&a)?));
    let update = ops::linear(tape, &b, &a, None)?;
    let update = ops::scale(tape, &update, adapter.config.scale() as f32)?;
    let old = tape.leaf(wide(weight)?);
    let sum = ops::add(tape, &old, &update)?;
    Ok(sum.value().to_dtype(weight.dtype())?.to_device(&weight.device())?)
}

/// The transpose of an f32 matrix.
fn transposed(matrix: &Tensor) -> Result<Tensor> {
    let (rows, columns) = (matrix.shape()[0], matrix.shape()[1]);
    let from = matrix.as_f32()?;
    let values = (0..rows * columns).map(|at| from[(at % rows) * columns + at / rows]).collect();
    Ok(Tensor::from_f32(values, &[columns, rows])?)
}
