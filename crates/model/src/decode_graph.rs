//! A token of each of some sequences, all the way through the model on a GPU; where nothing has to
//! ask the host, recorded once and launched for every token: at batch 1 the hundred launches of a
//! step cost more than what they compute.

use tercet_attention::NsaSpec;
use tercet_tensor::caches::{Partial, Rows};
use tercet_tensor::{
    Compressor, DType, Device, Draw, Drawn, Draws, Fork, Gpu, Graph, Pinned, Tape, Tensor, ops,
};

use crate::batch::Inputs;
use crate::cache::{LayerCache, NsaNew, mismatch};
use crate::decoder::{Site, into_tensor_error};
use crate::{Model, Result};

/// A row of a step: its sequence's number, the token, its position.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Token {
    pub sequence: usize,
    pub id: i32,
    pub position: usize,
}

/// Where n rows stand: fixed places on the device that launches read.
pub(crate) struct Places {
    /// Tokens and positions; 0 where a row rests.
    inputs: Inputs,
    /// Positions, −1 where a row rests.
    positions: Tensor,
    sequences: Tensor,
    /// Of the compressed block that a token completes: its number (−1: none) and its first token.
    numbers: Tensor,
    starts: Tensor,
    /// See [`Model::turns`].
    turns: Option<Tensor>,
    /// By layer, of φ for keys and values: see [`ops::compress_shift`].
    shifts: Vec<[Option<Tensor>; 2]>,
}

impl Places {
    /// `rows` resting rows, with the [`Model::turns`] of all tokens there is room for.
    pub fn new(model: &Model, device: &Device, rows: usize, turns: Option<Tensor>) -> Result<Self> {
        let place = || Tensor::zeros_on(device, DType::I32, &[rows]);
        let inputs = Inputs {
            ids: place()?,
            positions: place()?,
            block_positions: Tensor::zeros_on(device, DType::I32, &[0])?,
            cu_seqlens: (0..=rows as i32).collect(),
        };
        let (positions, sequences) = (place()?, place()?);
        let (numbers, starts, shifts) = (place()?, place()?, model.shifts()?);
        let places = Self { inputs, positions, sequences, numbers, starts, turns, shifts };
        places.write(&[], model.config().nsa.as_ref())?;
        Ok(places)
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.positions.len()
    }

    /// Puts `tokens` into the first rows; the others rest.
    pub fn write(&self, tokens: &[Token], spec: Option<&NsaSpec>) -> Result<()> {
        let rows = self.rows();
        let put = |to: &Tensor, rest: i32, of: &dyn Fn(&Token) -> i32| {
            let mut values: Vec<i32> = tokens.iter().map(of).collect();
            values.resize(rows, rest);
            Ok::<_, crate::Error>(to.overwrite(&Tensor::from_i32(values, &[rows])?)?)
        };
        put(&self.inputs.ids, 0, &|token| token.id)?;
        put(&self.inputs.positions, 0, &|token| token.position as i32)?;
        put(&self.positions, -1, &|token| token.position as i32)?;
        put(&self.sequences, 0, &|token| token.sequence as i32)?;
        if let Some(spec) = spec {
            let (block, stride) = (spec.compress_block as i32, spec.compress_stride as i32);
            let start = |token: &Token| token.position as i32 + 1 - block;
            put(&self.starts, -block, &start)?;
            put(&self.numbers, -1, &|token| match start(token) {
                first if first >= 0 && first % stride == 0 => first / stride,
                _ => -1,
            })?;
        }
        Ok(())
    }

    fn rows_at(&self) -> Rows<'_> {
        Rows { positions: &self.positions, sequences: &self.sequences }
    }
}

/// Launches of a step that do not need one another and run beside one another once captured: with
/// a few rows each fills a few multiprocessors for five microseconds.
pub(crate) struct Branches(Option<Fork>);

impl Branches {
    /// The first branch begins, if this is a step on a device; else nothing happens, here and below.
    pub fn begin(model: &Model, step: bool) -> Result<Self> {
        Ok(Self(match model.device() {
            Device::Cuda(gpu) if step => Some(gpu.fork().map_err(tercet_tensor::Error::from)?),
            _ => None,
        }))
    }

    /// What follows needs nothing that came since the first branch began.
    pub fn next(&self) -> Result<()> {
        let Some(fork) = &self.0 else { return Ok(()) };
        Ok(fork.branch().map_err(tercet_tensor::Error::from)?)
    }

    /// What follows needs all of them.
    pub fn join(self) -> Result<()> {
        let Some(fork) = self.0 else { return Ok(()) };
        Ok(fork.join().map_err(tercet_tensor::Error::from)?)
    }
}

/// A captured step of n rows.
pub(crate) struct DecodeGraph {
    graph: Graph,
    places: Places,
    logits: Tensor,
    host: Pinned,
    /// `None` for a vocabulary that is too large.
    draws: Option<Draws>,
    capacity: usize,
}

impl DecodeGraph {
    /// Captures a step of `rows` rows over layers that have room for `capacity` tokens of each
    /// sequence, whose [`Model::turns`] these are.
    pub fn capture(
        model: &Model,
        gpu: &Gpu,
        layers: &mut [LayerCache],
        rows: usize,
        (capacity, turns): (usize, Option<Tensor>),
    ) -> Result<Self> {
        let places = Places::new(model, &Device::Cuda(gpu.clone()), rows, turns)?;
        let mut step = || model.step(&places, layers).map_err(into_tensor_error);
        // Once with all rows resting: kernels are compiled, products choose their algorithms, and
        // tables are uploaded before anything is captured.
        step()?;
        let (graph, logits) = gpu.capture(step)?;
        let host =
            gpu.pinned(logits.len() * size_of::<f32>()).map_err(tercet_tensor::Error::from)?;
        let vocab = model.config().vocab_size;
        let draws = (vocab <= Draws::VOCAB).then(|| Draws::new(gpu, rows, vocab)).transpose()?;
        Ok(Self { graph, places, logits, host, draws, capacity })
    }

    /// Tokens there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Launches a step of `tokens`, draws what comes after them, and reads the logits `[n, vocab]`
    /// there when they are `wanted`: none else.
    pub fn run(
        &mut self,
        tokens: &[Token],
        spec: Option<&NsaSpec>,
        (draws, wanted): (&[Option<Draw>], bool),
    ) -> Result<(Vec<Option<Drawn>>, &[f32])> {
        self.places.write(tokens, spec)?;
        self.graph.launch().map_err(tercet_tensor::Error::from)?;
        let drawn = match &mut self.draws {
            Some(own) => own.run(&self.logits, draws)?,
            None => Vec::new(),
        };
        let rows = if wanted { tokens.len() } else { 0 };
        let count = rows * (self.logits.len() / self.places.rows());
        Ok((drawn, self.logits.read_first(count, &mut self.host)?))
    }
}

impl Model {
    /// Cosines and sines of the first positions, f32 `[positions, 2, D/2]`, for steps that average
    /// the keys of a block themselves; `None` where no step reads them.
    pub(crate) fn turns(&self, device: &Device, positions: usize) -> Result<Option<Tensor>> {
        let averages = |spec: &NsaSpec| spec.compressor == Compressor::Mean;
        Ok(match &self.rope {
            Some(table) if self.config().nsa.as_ref().is_some_and(averages) => {
                Some(table.turns(positions)?.to_device(device)?)
            }
            _ => None,
        })
    }

    /// A token of each row through all layers, read on the device: logits `[n, vocab]`, f32.
    pub(crate) fn step(&self, places: &Places, layers: &mut [LayerCache]) -> Result<Tensor> {
        let (inputs, tape) = (&places.inputs, &mut Tape::inference());
        let mut x = self.embed(tape, inputs)?;
        for (layer, held) in layers.iter_mut().enumerate() {
            let caches = &mut [held];
            let site =
                Site { layer, inputs, caches, sequence: 0, dropout: None, step: Some(places) };
            x = self.layer(tape, &x, site)?.swap_remove(0);
        }
        let hidden = self.norm(tape, &self.slots.norm, &x)?;
        self.head(tape, &hidden)
    }

    /// Attention of an NSA layer's step over its caches; compression rows of `new` are raw.
    pub(crate) fn step_nsa(
        &self,
        tape: &mut Tape,
        cache: &LayerCache,
        new: &NsaNew,
        phi: [&ops::Phi; 2],
        (layer_number, places): (usize, &Places),
    ) -> Result<Tensor> {
        let (LayerCache::CudaNsa(layer), Some(spec)) = (cache, &self.config().nsa) else {
            return Err(mismatch());
        };
        let rows = places.rows_at();
        if layer.is_mean() {
            return layer.step_mean(rows, new, places.turns.as_ref());
        }
        // Every row's newest l tokens are a block of their own, kept where one is complete.
        let l = spec.compress_block;
        let each = NsaSpec { compress_stride: l, select_block: l, ..spec.clone() };
        let offsets = [0, (places.rows() * l) as i32];
        let [k_raw, v_raw] = layer.tails(rows, &places.starts, [new.k_cmp, new.v_cmp])?;
        let [k_shift, v_shift] = places.shifts.get(layer_number).ok_or_else(mismatch)?;
        let [k_phi, v_phi] = phi;
        let (k_raw, v_raw) = (tape.leaf(k_raw), tape.leaf(v_raw));
        let branches = Branches::begin(self, true)?;
        let k = ops::compress_shifted(tape, &k_raw, k_phi, k_shift.as_ref(), &each, &offsets)?;
        let k = self.rotate(tape, k, &places.starts)?;
        branches.next()?;
        let v = ops::compress_shifted(tape, &v_raw, v_phi, v_shift.as_ref(), &each, &offsets)?;
        branches.join()?;
        let new = NsaNew { k_cmp: k.value(), v_cmp: v.value(), ..*new };
        layer.step_ready(rows, &new, &places.numbers)
    }
}

impl LayerCache {
    /// Makes room for `tokens` tokens; returns how many there is room for.
    pub fn prepare(&mut self, tokens: usize) -> Result<usize> {
        match self {
            Self::CudaNsa(layer) => layer.prepare(tokens),
            Self::CudaDense(layer) => layer.prepare(tokens),
            _ => Err(mismatch()),
        }
    }

    /// A sequence takes steps from here on.
    pub fn prime(&mut self, sequence: usize) -> Result<()> {
        match self {
            Self::CudaNsa(layer) => layer.prime(sequence),
            _ => Ok(()),
        }
    }

    /// See [`crate::cache_cuda::CudaDense::step`].
    pub fn step_dense(&self, places: &Places, qkv: [&Tensor; 3]) -> Result<Tensor> {
        match self {
            Self::CudaDense(layer) => layer.step(places.rows_at(), qkv),
            _ => Err(mismatch()),
        }
    }

    /// Notes that a step of these sequences has been launched.
    pub fn advance(&mut self, sequences: &[usize]) -> Result<()> {
        match self {
            Self::CudaNsa(layer) => layer.advance(sequences),
            Self::CudaDense(layer) => layer.advance(sequences),
            _ => Err(mismatch()),
        }
    }

    /// Forgets what a sequence holds.
    pub fn clear(&mut self, sequence: usize) -> Result<()> {
        match self {
            Self::CudaNsa(layer) => layer.clear(sequence),
            Self::CudaDense(layer) => layer.clear(sequence),
            _ => Err(mismatch()),
        }
    }

    /// What sequence `from` holds becomes what `to` holds, too; see
    /// [`tercet_tensor::caches::Pages::copy`].
    pub fn copy(&mut self, from: usize, to: usize, partial: Partial) -> Result<()> {
        match self {
            Self::CudaNsa(layer) => layer.copy(from, to, partial),
            Self::CudaDense(layer) => layer.copy(from, to, partial),
            _ => Err(mismatch()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelConfig;

    #[test]
    fn only_steps_that_average_keys_hold_cosines_and_sines() {
        let model = |nsa: &str| {
            let text = format!(
                r#"{{"model_type": "tercet", "vocab_size": 96, "hidden_size": 32,
                    "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64{nsa}}}"#
            );
            let config: ModelConfig = serde_json::from_str(&text).unwrap();
            Model::new(config, 1, DType::F32).unwrap()
        };
        let spec = |compressor: &str| {
            format!(
                r#", "nsa": {{"compress_block": 8, "compress_stride": 4, "select_block": 8,
                    "select_count": 3, "window": 8, "compressor": "{compressor}"}}"#
            )
        };
        let turns = |nsa: &str| model(nsa).turns(&Device::Cpu, 40).unwrap();
        assert_eq!(turns(&spec("mean")).unwrap().shape(), [40, 2, 8]);
        assert!(turns("").is_none() && turns(&spec("mlp")).is_none());
        assert!(turns(&spec("linear")).is_none());
    }
}
