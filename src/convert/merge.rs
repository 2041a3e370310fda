//! Folds what stages changed into the weights it sits on: in f32, cast once to the checkpoint's own precision.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::data::Split;
use crate::error::Result;
use crate::families::Role;
use crate::model::{Decoder, Net};
use crate::params::Adapters;

/// What merging changed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Merged {
    /// Weights that changed.
    pub weights: usize,
    /// Largest absolute difference of a logit between the adapted and the merged model, and the largest logit.
    pub max_logit_difference: f64,
    pub max_logit: f64,
    /// Tokens it was measured on.
    pub tokens: usize,
}

/// Merges the adapters of `student` into `decoder` and removes them. `stored` tells the precision a tensor is exported
/// in: the merged weight is rounded to it, so that the model in memory is the one that will be on disk.
pub fn merge(
    decoder: &mut Decoder,
    student: &mut Net,
    stored: impl Fn(&str) -> Result<safetensors::Dtype>,
    sample: &Split,
) -> Result<Merged> {
    let batch = sample.batch(&[0], &decoder.device)?;
    let tokens = batch.inputs.dim(1)?.min(256);
    let ids = batch.inputs.narrow(1, 0, tokens)?.contiguous()?;
    let before = decoder.logits(&decoder.hidden(&ids, student)?)?;
    let Some(adapters) = student.adapters.take() else {
        return Ok(Merged { weights: 0, max_logit_difference: 0.0, max_logit: largest(&before)?, tokens });
    };
    let weights = fold(decoder, &adapters, stored)?.len();
    let after = decoder.logits(&decoder.hidden(&ids, student)?)?;
    let max_logit_difference = largest(&(&after - &before)?)?;
    Ok(Merged { weights, max_logit_difference, max_logit: largest(&before)?, tokens })
}

/// Folds `adapters` into the weights of `decoder`, rounded to what they are `stored` in, and names those that changed.
pub fn fold(
    decoder: &mut Decoder,
    adapters: &Adapters,
    stored: impl Fn(&str) -> Result<safetensors::Dtype>,
) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for (layer, projection) in adapters.targets() {
        let old = decoder.block(layer).weight(projection)?;
        if let Some(new) = adapters.merged(layer, projection, &old)? {
            let name = decoder.architecture.name(Role::Weight(layer, projection));
            let stored = DType::try_from(stored(&name)?)?;
            let rounded = new.to_dtype(stored)?.to_dtype(decoder.dtype)?;
            decoder.block_mut(layer).set_weight(projection, &rounded)?;
            names.push(name);
        }
    }
    Ok(names)
}

/// Largest absolute value.
pub(super) fn largest(x: &Tensor) -> Result<f64> {
    Ok(x.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar()?)
}
