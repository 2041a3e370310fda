//! What a stage trains of a student, and how fast.

use std::collections::BTreeMap;

use candle_core::{Device, Result};

use crate::families::{Architecture, Projection, Role};
use crate::model::Net;
use crate::params::Param;
use crate::recipe::{Recipe, Stage};

/// What a stage changes of the weights.
#[derive(Debug, Default, PartialEq)]
pub struct Reach {
    pub lora: Vec<(usize, Projection)>,
    pub full: Vec<(usize, Projection)>,
    /// Embeddings, norms and head, with their shapes.
    pub whole: Vec<(Role, Vec<usize>)>,
}

impl Reach {
    /// LoRA reaches every layer, from losses of single layers the converted ones; full training the converted ones, and
    /// what belongs to no layer.
    pub fn of(stage: &Stage, a: &Architecture, converted: &[usize]) -> Reach {
        let all: Vec<usize> = (0..a.layers).collect();
        let adapted = if stage.loss.layer_wise() { converted } else { &all };
        let places = |layers: &[usize], projections: Vec<Projection>| {
            layers.iter().flat_map(|l| projections.iter().map(move |p| (*l, *p))).collect()
        };
        let mut whole: Vec<(Role, Vec<usize>)> = stage.modules().flat_map(|word| a.named(word)).collect();
        whole.retain(|(role, _)| role.layer().is_none_or(|layer| converted.contains(&layer)));
        whole.sort();
        whole.dedup(); // a tied embedding by both its names
        Reach { lora: places(adapted, stage.lora_targets()), full: places(converted, stage.projections()), whole }
    }
}

/// Why a tensor is merged, projections that share one each by itself: what the stages that `ran` changed.
pub fn merged(
    recipe: &Recipe,
    ran: impl Fn(&str) -> bool,
    a: &Architecture,
    converted: &[usize],
) -> BTreeMap<Role, String> {
    let mut reasons: BTreeMap<Role, Vec<String>> = BTreeMap::new();
    for (_, stage) in recipe.in_order().filter(|(name, _)| ran(name)) {
        let Reach { lora, full, whole } = Reach::of(stage, a, converted);
        let low_rank = format!("LoRA of rank {}", stage.lora.rank);
        let projection = |(layer, p)| Role::Weight(layer, p);
        let trained = full.into_iter().map(projection).chain(whole.into_iter().map(|(role, _)| role));
        let named = lora.into_iter().map(|at| (projection(at), low_rank.as_str()));
        for (role, reason) in named.chain(trained.map(|role| (role, "trained"))) {
            let known = reasons.entry(role).or_default();
            if !known.iter().any(|r| r == reason) {
                known.push(reason.into());
            }
        }
    }
    reasons.into_iter().map(|(role, list)| (role, list.join(", "))).collect()
}

/// Gives `student` what `stage` trains beside its mixers and puts what earlier stages left to rest.
pub fn prepare(
    student: &mut Net,
    stage: &Stage,
    architecture: &Architecture,
    seed: u64,
    device: &Device,
) -> Result<()> {
    let Reach { lora, full, whole } = Reach::of(stage, architecture, &student.converted());
    if let Some(adapters) = &mut student.adapters {
        adapters.rest();
    }
    if !lora.is_empty() || !full.is_empty() || !whole.is_empty() {
        let adapters = student.adapters.get_or_insert_default();
        adapters.add_lora(architecture, &lora, &stage.lora, seed, device)?;
        adapters.add_full(architecture, &full, device)?;
        adapters.add_whole(architecture, &whole, device)?;
    }
    Ok(())
}

/// A parameter that trains.
pub struct Trained {
    pub param: Param,
    /// Where it is in one.
    pub layer: Option<usize>,
    /// Learning rate at peak.
    pub peak: f64,
}

/// All that `stage` trains of a student it was [prepared](prepare) for, by layer, first what is in none.
pub fn trained(student: &Net, stage: &Stage) -> Vec<Trained> {
    let mut found = Vec::new();
    if stage.trains("mixer") {
        for (layer, mixer) in student.mixers.iter().enumerate() {
            found.extend(mixer.params().iter().map(|param| {
                let own = if param.scalar { stage.lr_scalars } else { None };
                let peak = own.or(stage.lr_mixer).unwrap_or(stage.lr);
                Trained { param: param.clone(), layer: Some(layer), peak }
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
