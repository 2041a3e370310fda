//! Replaces the attention of the planned layers and initialises what is new.

use candle_core::{Device, Var};

use super::load::tensor_name;
use crate::error::Result;
use crate::families::Architecture;
use crate::mixers::softmax::Softmax;
use crate::mixers::{Design, Mixer};
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
    let mixer = |layer: usize| -> Result<Box<dyn Mixer>> {
        if !converted.contains(&layer) {
            return Ok(Softmax.build(architecture, Vec::new()));
        }
        let start = |spec: crate::mixers::Spec| -> Result<Param> {
            let tensor = spec.init.tensor(&spec.shape, seed, layer)?.to_device(device)?;
            let name = tensor_name(layer, spec.name);
            Ok(Param { name, var: Var::from_tensor(&tensor)?, scalar: spec.scalar })
        };
        let params = design.specs(architecture).into_iter().map(start).collect::<Result<Vec<_>>>()?;
        Ok(design.build(architecture, params))
    };
    Ok(Net { mixers: (0..architecture.layers).map(mixer).collect::<Result<_>>()?, adapters: None })
}
