//! Starts of new tensors that are read off the teacher: what its layers see of some of the training text.

use candle_core::{Device, Tensor};

use crate::data::Split;
use crate::error::{Error, Kind, Result};
use crate::mixers::Design;
use crate::model::{Decoder, Net};
use crate::params::named;

/// Sequences that are looked at, and tokens of each.
const SEQUENCES: usize = 4;
const TOKENS: usize = 256;

/// Sets what `design` measures in the converted layers of `student`, on a few sequences of `train` that `seed` draws.
/// The same text and seed give the same starts.
pub fn measure(
    decoder: &Decoder,
    teacher: &Net,
    student: &Net,
    design: &dyn Design,
    train: &Split,
    seed: u64,
) -> Result<()> {
    if !design.measures(&decoder.architecture) {
        return Ok(());
    }
    train.require(1)?;
    let batch = train.batch(&train.draw(seed, 0, SEQUENCES.min(train.len())), &Device::Cpu)?;
    let ids = batch.inputs.narrow(1, 0, TOKENS.min(train.seq_len()))?.to_device(&decoder.device)?;
    of_text(decoder, teacher, student, design, &ids)
}

/// The same on token `ids` [B, T].
pub fn of_text(decoder: &Decoder, teacher: &Net, student: &Net, design: &dyn Design, ids: &Tensor) -> Result<()> {
    let tables = decoder.tables(0, ids.dim(1)?)?;
    let mut x = decoder.embed(ids, None)?;
    for (layer, (mixer, softmax)) in student.mixers.iter().zip(&teacher.mixers).enumerate() {
        let block = decoder.block(layer);
        let heads = block.heads(&x, &tables, None, None)?;
        let (y, weights) = softmax.parallel(&heads)?;
        if !mixer.is_softmax() {
            for (name, start) in design.measure(&decoder.architecture, &heads, &weights.all)? {
                let missing = || Error::new(Kind::Unexpected, format!("layer {layer} has no `{name}` to start"));
                let param = named(mixer.params(), name).ok_or_else(missing)?;
                param.var.set(&start.to_device(&decoder.device)?)?;
            }
        }
        x = block.finish(&x, &y, None, None)?.detach();
    }
    Ok(())
}
