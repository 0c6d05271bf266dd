//! What a checkpoint keeps of a private run: how far the ledger had come, and the method's state.

use std::path::Path;

use serde::{Deserialize, Serialize};
use tercet_train::{Error, Result};

use crate::mechanism::ledger::Mark;
use crate::method::State;

/// In a checkpoint.
const NUMBERS: &str = "state/private.json";
/// In a checkpoint: the arrays one after the other, little-endian.
const ARRAYS: &str = "state/private.f32";
/// In a checkpoint of a learnt controller: its policy.
const POLICY: &str = "state/policy.bin";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    mark: Mark,
    /// As IEEE bits: a resumed run must have the same numbers.
    numbers: Vec<u64>,
    /// Elements of each array.
    arrays: Vec<usize>,
}

/// The files of a checkpoint: name and content.
pub fn write(mark: Mark, state: &State) -> Result<Vec<(String, Vec<u8>)>> {
    let kept = Kept {
        mark,
        numbers: state.numbers.iter().map(|x| x.to_bits()).collect(),
        arrays: state.arrays.iter().map(Vec::len).collect(),
    };
    let numbers = serde_json::to_vec_pretty(&kept)
        .map_err(|error| Error::Fault(format!("the method's state has no JSON: {error}")))?;
    let arrays = state.arrays.iter().flatten().flat_map(|x| x.to_le_bytes()).collect();
    let mut files = vec![(NUMBERS.into(), numbers), (ARRAYS.into(), arrays)];
    if !state.policy.is_empty() {
        files.push((POLICY.into(), state.policy.clone()));
    }
    Ok(files)
}

/// Reads them from a checkpoint whose files were verified.
pub fn read(checkpoint: &Path) -> Result<(Mark, State)> {
    let path = checkpoint.join(NUMBERS);
    let refuse = |problem: String| Error::Checkpoint(format!("{}: {problem}", path.display()));
    let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let kept: Kept = serde_json::from_slice(&text).map_err(|error| refuse(error.to_string()))?;
    let arrays = checkpoint.join(ARRAYS);
    let bytes = std::fs::read(&arrays).map_err(Error::io("read", &arrays))?;
    let elements = kept.arrays.iter().try_fold(0usize, |sum, &len| sum.checked_add(len));
    if elements.and_then(|e| e.checked_mul(4)) != Some(bytes.len()) {
        let name = arrays.display();
        return Err(refuse(format!("{name} has {} bytes, which do not fit", bytes.len())));
    }
    let (chunks, _) = bytes.as_chunks();
    let mut floats = chunks.iter().map(|chunk| f32::from_le_bytes(*chunk));
    let arrays = kept.arrays.iter().map(|&len| floats.by_ref().take(len).collect()).collect();
    let numbers = kept.numbers.into_iter().map(f64::from_bits).collect();
    let policy = checkpoint.join(POLICY);
    let policy = match policy.exists() {
        true => std::fs::read(&policy).map_err(Error::io("read", &policy))?,
        false => Vec::new(),
    };
    Ok((kept.mark, State { numbers, arrays, policy }))
}
