//! What a stage trains of a student, and how fast.

use std::collections::BTreeMap;

use candle_core::{Device, Result};

use crate::families::{Architecture, Projection};
use crate::model::Net;
use crate::params::Param;
use crate::recipe::{Recipe, Stage};

/// Layers and projections whose weights a stage changes.
#[derive(Debug, Default, PartialEq)]
pub struct Reach {
    pub lora: Vec<(usize, Projection)>,
    pub full: Vec<(usize, Projection)>,
}

impl Reach {
    /// LoRA reaches every layer, from losses of single layers the converted ones; full training the converted ones.
    pub fn of(stage: &Stage, layers: usize, converted: &[usize]) -> Reach {
        let all: Vec<usize> = (0..layers).collect();
        let adapted = if stage.loss.layer_wise() { converted } else { &all };
        let places = |layers: &[usize], projections: Vec<Projection>| {
            layers.iter().flat_map(|l| projections.iter().map(move |p| (*l, *p))).collect()
        };
        Reach { lora: places(adapted, stage.lora_targets()), full: places(converted, stage.projections()) }
    }
}

/// Why a weight is merged, by layer and projection: what the stages that `ran` changed.
pub fn merged(
    recipe: &Recipe,
    ran: impl Fn(&str) -> bool,
    layers: usize,
    converted: &[usize],
) -> BTreeMap<(usize, Projection), String> {
    let mut reasons: BTreeMap<(usize, Projection), Vec<String>> = BTreeMap::new();
    for (_, stage) in recipe.in_order().filter(|(name, _)| ran(name)) {
        let Reach { lora, full } = Reach::of(stage, layers, converted);
        let low_rank = format!("LoRA of rank {}", stage.lora.rank);
        let named =
            lora.into_iter().map(|at| (at, low_rank.as_str())).chain(full.into_iter().map(|at| (at, "trained")));
        for (at, reason) in named {
            let known = reasons.entry(at).or_default();
            if !known.iter().any(|r| r == reason) {
                known.push(reason.into());
            }
        }
    }
    reasons.into_iter().map(|(at, list)| (at, list.join(", "))).collect()
}

/// Gives `student` what `stage` trains beside its mixers and puts what earlier stages left to rest.
pub fn prepare(
    student: &mut Net,
    stage: &Stage,
    architecture: &Architecture,
    seed: u64,
    device: &Device,
) -> Result<()> {
    let Reach { lora, full } = Reach::of(stage, architecture.layers, &student.converted());
    if let Some(adapters) = &mut student.adapters {
        adapters.rest();
    }
    if !lora.is_empty() || !full.is_empty() {
        let adapters = student.adapters.get_or_insert_default();
        adapters.add_lora(architecture, &lora, &stage.lora, seed, device)?;
        adapters.add_full(architecture, &full, device)?;
    }
    Ok(())
}

/// A parameter that trains.
pub struct Trained {
    pub param: Param,
    pub layer: usize,
    /// Learning rate at peak.
    pub peak: f64,
}

/// All that `stage` trains of a student it was [prepared](prepare) for, by layer.
pub fn trained(student: &Net, stage: &Stage) -> Vec<Trained> {
    let mut found = Vec::new();
    if stage.trains("mixer") {
        for (layer, mixer) in student.mixers.iter().enumerate() {
            found.extend(mixer.params().iter().map(|param| {
                let own = if param.scalar { stage.lr_scalars } else { None };
                let peak = own.or(stage.lr_mixer).unwrap_or(stage.lr);
                Trained { param: param.clone(), layer, peak }
            }));
        }
    }
    for adapted in student.adapters.iter().flat_map(|a| a.trained()) {
        let own = if adapted.full { stage.lr_projections } else { stage.lr_lora };
        found.push(Trained { param: adapted.param, layer: adapted.layer, peak: own.unwrap_or(stage.lr) });
    }
    found.sort_by_key(|t| t.layer);
    found
}
