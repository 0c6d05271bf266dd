//! The optimizer's state on a device, and its one launch.

use tercet_cuda::{Args, Buffer, Gpu, Source};

use super::{SLOTS, SPAN, at, at_mut, kernel};
use crate::adamw::{Rule, SlotState};
use crate::{DType, Device, Grads, Result, Tensor};

const SOURCE: Source = Source { name: "adamw", text: include_str!("adamw.cu"), headers: &[SLOTS] };

/// Words of a row of the table, `Slot` in adamw.cu: weight, half, m, v, gradient, length, first
/// block, and the factor that keeps the weight in the lower half of the last.
const ROW: usize = 8;

/// Moments and masters of all parameters.
#[derive(Clone)]
pub(crate) struct Moments {
    gpu: Gpu,
    m: Vec<Tensor>,
    v: Vec<Tensor>,
    /// Of bf16 parameters.
    master: Vec<Option<Tensor>>,
}

impl Moments {
    /// Zeros, and masters from the parameters.
    pub(crate) fn fresh(gpu: &Gpu, params: &[Tensor]) -> Result<Self> {
        let device = Device::Cuda(gpu.clone());
        let zeros = || -> Result<Vec<Tensor>> {
            params.iter().map(|p| Tensor::zeros_on(&device, DType::F32, p.shape())).collect()
        };
        let master = |p: &Tensor| match p.dtype() {
            DType::BF16 => Ok(Some(p.to_dtype(DType::F32)?)),
            _ => Ok(None),
        };
        let master = params.iter().map(master).collect::<Result<_>>()?;
        Ok(Moments { gpu: gpu.clone(), m: zeros()?, v: zeros()?, master })
    }

    /// The state of a checkpoint, which has been checked against `params`.
    pub(crate) fn upload(gpu: &Gpu, params: &[Tensor], slots: Vec<SlotState>) -> Result<Self> {
        let device = Device::Cuda(gpu.clone());
        let put = |x: Vec<f32>, p: &Tensor| Tensor::from_f32(x, p.shape())?.to_device(&device);
        let mut moments =
            Moments { gpu: gpu.clone(), m: Vec::new(), v: Vec::new(), master: Vec::new() };
        for (slot, p) in slots.into_iter().zip(params) {
            moments.m.push(put(slot.m, p)?);
            moments.v.push(put(slot.v, p)?);
            moments.master.push(slot.master.map(|x| put(x, p)).transpose()?);
        }
        Ok(moments)
    }

    /// The state as a checkpoint holds it.
    pub(crate) fn download(&self) -> Result<Vec<SlotState>> {
        let slots = self.m.iter().zip(&self.v).zip(&self.master);
        slots
            .map(|((m, v), master)| {
                Ok(SlotState {
                    m: m.to_vec_f32()?,
                    v: v.to_vec_f32()?,
                    master: master.as_ref().map(Tensor::to_vec_f32).transpose()?,
                })
            })
            .collect()
    }

    /// Elements of each slot.
    pub(crate) fn lens(&self) -> impl Iterator<Item = usize> {
        self.m.iter().map(Tensor::len)
    }

    /// One step; `keep[slot]` is what decay leaves of a weight. Parameters without a gradient
    /// are left alone.
    pub(crate) fn step(
        &mut self,
        params: &mut [Tensor],
        grads: &Grads,
        rule: &Rule,
        keep: &[f32],
    ) -> Result<()> {
        let mut table: Vec<u64> = Vec::with_capacity(params.len() * ROW);
        let mut blocks = 0u64;
        for (i, p) in params.iter_mut().enumerate() {
            let Some(gradient) = grads.get(i).filter(|g| !g.is_empty()) else { continue };
            let weight = at_mut(p)?;
            let (weight, half) = match &mut self.master[i] {
                Some(master) => (at_mut(master)?, weight),
                None => (weight, 0),
            };
            let (m, v) = (at_mut(&mut self.m[i])?, at_mut(&mut self.v[i])?);
            let (len, factor) = (gradient.len(), u64::from(keep[i].to_bits()));
            table.extend([weight, half, m, v, at(gradient)?, len as u64, blocks, factor]);
            blocks += len.div_ceil(SPAN) as u64;
        }
        if blocks == 0 {
            return Ok(());
        }
        let rows: Buffer = self.gpu.upload(&table)?;
        let kernel = kernel(&self.gpu, &SOURCE, "adamw", DType::F32, &[])?;
        let Rule { beta1, rest1, beta2, rest2, rate, root, eps, grad_scale, .. } = *rule;
        let mut args = Args::new().ptr(rows.ptr()).i32((table.len() / ROW) as i32);
        for number in [beta1, rest1, beta2, rest2, rate, root, eps, grad_scale] {
            args = args.f32(number);
        }
        // SAFETY: the table's rows are live tensors of `len` numbers each.
        Ok(unsafe { kernel.launch([blocks as u32, 1, 1], [256, 1, 1], 0, args) }?)
    }
}

impl std::fmt::Debug for Moments {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Moments({:?}, {} slots)", self.gpu, self.m.len())
    }
}
