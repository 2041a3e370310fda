//! Replaces the attention of the planned layers and initialises what is new.

use candle_core::{Device, Var};

use super::load::tensor_name;
use crate::error::Result;
use crate::families::Architecture;
use crate::mixers::Design;
use crate::model::Net;
use crate::params::Param;

/// The student before training: `design` in the `converted` layers, softmax in the others.
pub fn swap(
    architecture: &Architecture,
    design: &dyn Design,
    converted: &[usize],
    seed: u64,
    device: &Device,
) -> Result<Net> {
    Net::of(architecture, design, converted, |layer, spec| {
        let tensor = spec.init.tensor(&spec.shape, seed, layer)?.to_device(device)?;
        let name = tensor_name(architecture, layer, spec.name);
        Ok(Param { name, var: Var::from_tensor(&tensor)?, scalar: spec.scalar })
    })
}
