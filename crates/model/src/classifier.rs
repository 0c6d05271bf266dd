//! Sequence classifiers with one label: the reward models of Hugging Face folders
//! (`LlamaForSequenceClassification` and its kin).
//!
//! A decoder without an output matrix and one row, `score.weight`; a text's score is that row
//! times the hidden state of its last token.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use tercet_tensor::{DType, Device, Tape, ops};

use crate::batch::{Inputs, tensor_i32};
use crate::decoder::ForwardOptions;
use crate::layout::{Init, ParamSpec, parameters};
use crate::model::load_config;
use crate::weights_read::WeightFiles;
use crate::{Error, Model, ModelConfig, Result};

/// Tokens of one packed batch; a longer sequence is a batch of its own. 4096 tokens fill the
/// matrix products and keep an 8B model's widest activations under 256 MB.
const PACKED_TOKENS: usize = 4096;

const SCORE: &str = "score.weight";

/// A decoder that gives a text one number.
pub struct SequenceClassifier {
    /// Its output matrix is a stand-in (the embedding) and never used.
    model: Model,
    /// The row of `score.weight`, f32 `[C]`.
    score: Vec<f32>,
    /// `pad_token_id`: the score is read before such tokens.
    pad: Option<i32>,
}

impl SequenceClassifier {
    /// Loads a Hugging Face folder of one label, stored as `dtype`, or as its files are when none
    /// is given (see [`Model::load`]).
    ///
    /// A folder of a causal language model, of another number of labels, or without a
    /// `score.weight` of shape `[1, hidden_size]` is refused.
    pub fn load(dir: &Path, dtype: Option<DType>) -> Result<Self> {
        let (mut config, text) = load_config(dir)?;
        let fields: Value = serde_json::from_str(&text).unwrap_or_default();
        check_kind(&fields).map_err(|reason| Error::file(&dir.join("config.json"), reason))?;
        // There is no output matrix to read.
        config.tie_word_embeddings = true;
        let files = WeightFiles::open(dir)?;
        if !files.has(SCORE) {
            let reason = format!(
                "has no tensor {SCORE}, which every ...ForSequenceClassification has; name the \
                 folder of a reward model"
            );
            return Err(Error::file(dir, reason));
        }
        let shape = vec![1, config.hidden_size];
        let mut specs = parameters(&config);
        specs.push(ParamSpec { name: SCORE.into(), shape, init: Init::Zeros });
        let dtype = dtype.unwrap_or_else(|| files.natural_dtype());
        let mut tensors = files.read(&config, &specs, dtype)?;
        let score = match tensors.pop() {
            Some(row) => row.to_vec_f32()?,
            None => Vec::new(),
        };
        let pad = fields.get("pad_token_id").and_then(Value::as_i64);
        let pad = pad.and_then(|id| i32::try_from(id).ok());
        Ok(Self { model: Model::from_tensors(config, tensors)?, score, pad })
    }

    /// The decoder's shape.
    pub fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    /// Moves the decoder; what is computed with it is computed there.
    pub fn to_device(&mut self, device: &Device) -> Result<()> {
        self.model.to_device(device)
    }

    /// The score of each sequence of token ids, in their order. Sequences are packed, so that
    /// none is padded.
    ///
    /// As in transformers, the score is read at the last token that is not the file's
    /// `pad_token_id`, even where that token was meant (models often pad with the token that ends
    /// a text).
    pub fn score(&self, sequences: &[&[i32]]) -> Result<Vec<f32>> {
        if let Some(empty) = sequences.iter().position(|s| s.is_empty()) {
            return Err(Error::Batch(format!("sequence {empty} has no tokens to score")));
        }
        let mut scores = Vec::with_capacity(sequences.len());
        let mut rest = sequences;
        while !rest.is_empty() {
            let mut tokens = 0;
            let fits = |s: &&&[i32]| {
                tokens += s.len();
                tokens <= PACKED_TOKENS
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (now, later) = rest.split_at(count);
            scores.extend(self.packed(now)?);
            rest = later;
        }
        Ok(scores)
    }

    fn packed(&self, sequences: &[&[i32]]) -> Result<Vec<f32>> {
        let ids = sequences.concat();
        let (mut offsets, mut read_at) = (vec![0], Vec::with_capacity(sequences.len()));
        let mut start = 0;
        for sequence in sequences {
            read_at.push((start + self.last(sequence)) as i32);
            start += sequence.len();
            offsets.push(start as i32);
        }
        let device = self.model.device();
        let inputs = Arc::new(Inputs::new(self.config(), &device, &ids, &offsets)?);
        let tape = &mut Tape::inference();
        let (hidden, _) = self.model.hidden(tape, &inputs, &ForwardOptions::default())?;
        let rows = ops::embedding(tape, &hidden, &tensor_i32(&device, read_at)?)?;
        let rows = rows.value().to_vec_f32()?;
        // In f64, so that a bf16 model's scores are not rounded into ties.
        let dot = |row: &[f32]| -> f64 {
            row.iter().zip(&self.score).map(|(&h, &w)| f64::from(h) * f64::from(w)).sum()
        };
        Ok(rows.chunks_exact(self.score.len()).map(|row| dot(row) as f32).collect())
    }

    /// The last token that is not padding; the first when all are.
    fn last(&self, sequence: &[i32]) -> usize {
        match self.pad {
            None => sequence.len() - 1,
            Some(pad) => sequence.iter().rposition(|&id| id != pad).unwrap_or(0),
        }
    }
}

/// Refuses what is not a classifier of one label, by the fields that say so.
fn check_kind(fields: &Value) -> std::result::Result<(), String> {
    let classes = fields.get("architectures").and_then(Value::as_array);
    let mut classes = classes.into_iter().flatten().filter_map(Value::as_str);
    if let Some(other) = classes.find(|name| !name.ends_with("ForSequenceClassification")) {
        return Err(format!(
            "is of a {other}; a reward model is a ...ForSequenceClassification with one label"
        ));
    }
    // transformers writes the labels' names, some trainers their number too; without either it
    // takes two.
    let names = fields.get("id2label").and_then(Value::as_object).map(|names| names.len() as u64);
    let number = fields.get("num_labels").and_then(Value::as_u64);
    let labels = match (names, number) {
        (Some(1), Some(number)) => number,
        (Some(names), _) => names,
        (None, number) => number.unwrap_or(2),
    };
    match labels {
        1 => Ok(()),
        n => Err(format!(
            "is of a classifier with {n} labels (id2label, num_labels; two when neither is \
             given); a reward model has one"
        )),
    }
}
