//! Folds what stages changed into the weights it sits on: in f32, cast once to the checkpoint's own precision.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::load::Model;
use crate::data::Split;
use crate::error::Result;
use crate::families::Role;
use crate::model::{Decoder, Net};
use crate::params::Adapters;

/// What merging changed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Merged {
    /// Tensors that changed.
    pub weights: usize,
    /// Largest absolute difference of a logit between the adapted and the merged model, and the largest logit.
    pub max_logit_difference: f64,
    pub max_logit: f64,
    /// Tokens it was measured on.
    pub tokens: usize,
}

/// Merges the adapters of `student` into `decoder` and removes them; also the names of the tensors that changed. Merged
/// weights are rounded to the precision that `model` has them in, so that what is in memory is what will be on disk.
pub fn merge(decoder: &mut Decoder, student: &mut Net, model: &Model, sample: &Split) -> Result<(Merged, Vec<String>)> {
    let batch = sample.batch(&[0], &decoder.device)?;
    let tokens = batch.inputs.dim(1)?.min(256);
    let ids = batch.inputs.narrow(1, 0, tokens)?.contiguous()?;
    let before = decoder.logits(&decoder.hidden(&ids, student)?, student)?;
    let Some(adapters) = student.adapters.take() else {
        let unchanged = Merged { weights: 0, max_logit_difference: 0.0, max_logit: largest(&before)?, tokens };
        return Ok((unchanged, Vec::new()));
    };
    let names = fold(decoder, &adapters, model)?;
    let after = decoder.logits(&decoder.hidden(&ids, student)?, student)?;
    let max_logit_difference = largest(&(&after - &before)?)?;
    Ok((Merged { weights: names.len(), max_logit_difference, max_logit: largest(&before)?, tokens }, names))
}

/// Folds `adapters` into the weights of `decoder`, rounded to what they are stored in, and names those that changed.
pub fn fold(decoder: &mut Decoder, adapters: &Adapters, model: &Model) -> Result<Vec<String>> {
    let dtype = decoder.dtype;
    let mut names = Vec::new();
    let mut rounded = |role: Role, new: Tensor| -> Result<Tensor> {
        let name = model.description.name(role);
        let stored = DType::try_from(model.checkpoint.info(&name)?.dtype)?;
        names.push(name);
        Ok(new.to_dtype(stored)?.to_dtype(dtype)?)
    };
    for (layer, projection) in adapters.targets() {
        let old = decoder.block(layer).weight(projection)?;
        if let Some(new) = adapters.merged(layer, projection, &old)? {
            let new = rounded(Role::Weight(layer, projection), new)?;
            decoder.block_mut(layer).set_weight(projection, &new)?;
        }
    }
    for role in adapters.roles() {
        if let Some(new) = adapters.changed(role, &decoder.stored(role)?)? {
            decoder.set(role, &rounded(role, new.detach())?)?;
        }
    }
    names.dedup(); // of projections that share a tensor
    Ok(names)
}

/// Largest absolute value.
pub(super) fn largest(x: &Tensor) -> Result<f64> {
    Ok(x.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar()?)
}
