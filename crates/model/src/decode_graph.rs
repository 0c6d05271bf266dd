//! One token's way through the model on a GPU, recorded once and launched for every token: at
//! batch 1 the hundred launches of a step cost more than what they compute.

use tercet_tensor::{DType, Device, Gpu, Graph, Tape, Tensor};

use crate::batch::Inputs;
use crate::cache::{LayerCache, mismatch};
use crate::decoder::{Site, into_tensor_error};
use crate::{Model, Result};

/// Tokens beyond the present ones that a graph has room for.
const AHEAD: usize = 1024;

/// A captured step. It reads the token and its position from fixed places on the device.
pub(crate) struct DecodeGraph {
    graph: Graph,
    ids: Tensor,
    positions: Tensor,
    logits: Tensor,
    capacity: usize,
    /// What captured launches read besides: kept as long as they may happen.
    _turns: Option<Tensor>,
}

impl DecodeGraph {
    /// Makes room for `tokens` tokens, the next one included, and some more in every layer, and
    /// captures a step.
    pub fn capture(
        model: &Model,
        gpu: &Gpu,
        layers: &mut [LayerCache],
        tokens: usize,
    ) -> Result<Self> {
        let longest = model.config().max_position_embeddings;
        let mut capacity = longest;
        for layer in layers.iter_mut() {
            capacity = capacity.min(layer.prepare((tokens + AHEAD).min(longest))?);
        }
        let device = Device::Cuda(gpu.clone());
        let turns = match &model.rope {
            Some(table) => Some(table.turns(capacity)?.to_device(&device)?),
            None => None,
        };
        let place = || Tensor::zeros_on(&device, DType::I32, &[1]);
        let (ids, positions) = (place()?, place()?);
        let inputs = Inputs {
            ids: ids.clone(),
            positions: positions.clone(),
            block_positions: Tensor::zeros_on(&device, DType::I32, &[0])?,
            cu_seqlens: vec![0, 1],
        };
        let mut step = || model.step(&inputs, layers, turns.as_ref()).map_err(into_tensor_error);
        // Once for nobody: kernels are compiled, products choose their algorithms, and tables are
        // uploaded before anything is captured. What it writes stands where the next token will.
        positions.overwrite(&Tensor::from_i32(vec![tokens as i32 - 1], &[1])?)?;
        step()?;
        let (graph, logits) = gpu.capture(step)?;
        Ok(Self { graph, ids, positions, logits, capacity, _turns: turns })
    }

    /// Tokens there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The logits `[vocab]` after `token` at `position`.
    pub fn run(&self, token: i32, position: usize) -> Result<Vec<f32>> {
        let one = |value: i32| Tensor::from_i32(vec![value], &[1]);
        self.ids.overwrite(&one(token)?)?;
        self.positions.overwrite(&one(position as i32)?)?;
        self.graph.launch().map_err(tercet_tensor::Error::from)?;
        Ok(self.logits.to_vec_f32()?)
    }
}

impl Model {
    /// One token through all layers, its token and position read on the device: logits
    /// `[1, vocab]`, f32.
    fn step(
        &self,
        inputs: &Inputs,
        layers: &mut [LayerCache],
        turns: Option<&Tensor>,
    ) -> Result<Tensor> {
        let tape = &mut Tape::inference();
        let mut x = self.embed(tape, inputs)?;
        for (layer, held) in layers.iter_mut().enumerate() {
            let caches = &mut [held];
            let site = Site { layer, inputs, caches, dropout: None, step: Some(turns) };
            x = self.layer(tape, &x, site)?.swap_remove(0);
        }
        let hidden = self.norm(tape, &self.slots.norm, &x)?;
        self.head(tape, &hidden)
    }
}

impl LayerCache {
    /// Makes room for `tokens` tokens; returns how many there is room for.
    fn prepare(&mut self, tokens: usize) -> Result<usize> {
        match self {
            Self::CudaNsa(layer) => layer.prepare(tokens),
            Self::CudaDense(layer) => layer.prepare(tokens),
            _ => Err(mismatch()),
        }
    }

    /// See [`crate::cache_cuda::CudaNsa::step`].
    pub fn step_nsa(
        &self,
        positions: &Tensor,
        new: &crate::cache::NsaNew,
        turns: Option<&Tensor>,
    ) -> Result<Tensor> {
        match self {
            Self::CudaNsa(layer) => layer.step(positions, new, turns),
            _ => Err(mismatch()),
        }
    }

    /// See [`crate::cache_cuda::CudaDense::step`].
    pub fn step_dense(&self, positions: &Tensor, qkv: [&Tensor; 3]) -> Result<Tensor> {
        match self {
            Self::CudaDense(layer) => layer.step(positions, qkv),
            _ => Err(mismatch()),
        }
    }
}
