//! Everything a conversion would do, from `config.json` and safetensors headers alone: the fate of every tensor, what
//! trains, for how long and in how much memory.
//!
//! The plan is a contract: the stages follow its layers, steps and micro-batches, and verification compares the export
//! with [`Plan::exported`].

mod cost;
mod table;

use std::collections::BTreeMap;

use safetensors::Dtype;
use serde::Serialize;

pub use cost::{Memory, PlanDevice, Stage, micro_batch, stages, steps};
pub use table::{Section, bytes, count, heads, ranges};

use super::load::{Description, tensor_name, understand};
use super::trained::{self, Reach};
use crate::checkpoint::{Config, Headers, Place, Source, TensorInfo, byte_size};
use crate::error::{Error, Kind, Result};
use crate::families::{Architecture, Claim, Names, Projection, Role};
use crate::mixers::{Design, softmax};
use crate::recipe::{self, Loaded};

/// A conversion before it happens.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    pub model: Model,
    pub recipe: Recipe,
    pub device: PlanDevice,
    pub layers: Layers,
    /// Every tensor of the source, then every new one, each by name.
    pub tensors: Vec<Tensor>,
    /// Number and size of the tensors of each fate.
    pub fates: BTreeMap<Fate, Total>,
    /// The training stages that run, in order.
    pub stages: Vec<Stage>,
    /// Memory of verification, after the stages.
    pub verify: Memory,
    pub disk: Disk,
    /// What the user should look at.
    pub warnings: Vec<String>,
    /// Targets in a row of packed text: the longest sequence of a stage.
    #[serde(skip)]
    pub row_len: usize,
}

/// The source model.
#[derive(Debug, Clone, Serialize)]
pub struct Model {
    /// As the user typed it.
    pub id: String,
    /// The commit, where it comes from the hub.
    pub revision: Option<String>,
    pub family: &'static str,
    pub layers: usize,
    pub parameters: u64,
    pub bytes: u64,
    /// Precisions of the tensors, the most frequent first.
    pub dtypes: Vec<Dtype>,
    /// Whether there were weights, or only a `config.json` that describes them.
    pub weights: bool,
}

/// The recipe in short.
#[derive(Debug, Clone, Serialize)]
pub struct Recipe {
    pub name: String,
    pub about: String,
    pub mixer: recipe::Mixer,
}

/// Which layers change their attention, ascending.
#[derive(Debug, Clone, Serialize)]
pub struct Layers {
    /// All of them where the ones to keep are yet to be chosen.
    pub converted: Vec<usize>,
    pub kept: Vec<usize>,
    /// How many layers a selection will keep, once the layer-wise stages are over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen: Option<usize>,
    /// Bytes that keys and values of the kept layers add with every token: of those that see everything.
    pub cache_per_token: usize,
    /// How many kept layers see a window of keys, and how wide it is: their cache does not grow beyond it.
    #[serde(skip_serializing_if = "is_zero")]
    pub windowed: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// What becomes of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// Exported byte for byte.
    Kept,
    /// Exported with what trained folded in, in its own precision.
    Merged,
    /// The second spelling of a tied embedding, exported byte for byte.
    Tied,
    /// Not exported.
    Dropped,
    /// Added by a mixer, in f32.
    New,
}

/// One tensor and its fate.
#[derive(Debug, Clone, Serialize)]
pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: u64,
    pub fate: Fate,
    /// Why it is dropped, what is merged into it, how it starts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Total {
    pub tensors: usize,
    pub bytes: u64,
}

/// Bytes on disk.
#[derive(Debug, Clone, Serialize)]
pub struct Disk {
    /// The exported weights.
    pub export: u64,
    /// Saved training states: parameters, best parameters and both moments, the last state and the one before it.
    pub run: u64,
    /// Shards to download where the cache does not hold them yet; 0 for a local folder.
    pub download: u64,
}

impl Plan {
    /// Plans a conversion. `train_tokens` is one pass over the training text of each stage, where that is known: it bounds
    /// stages with `epochs`.
    ///
    /// Errors: a tensor that is missing, misshapen, unknown or of a type that is not read; a model that was converted
    /// before; layers out of range; a mixer that does not fit the model; a stage that makes no sense.
    pub fn of(
        headers: &Headers,
        loaded: &Loaded,
        device: PlanDevice,
        train_tokens: Option<&BTreeMap<String, u64>>,
    ) -> Result<Plan> {
        let description = Description::of(headers)?;
        if let Some(l) = &description.linearization {
            let message = format!("`{}` was converted already, from `{}`", headers.source.id, l.teacher);
            return Err(Error::new(Kind::Config, message).hint("give the original model"));
        }
        let a = &description.architecture;
        let recipe = &loaded.recipe.within(a.max_positions);
        let refuse = |text: String| {
            Error::new(Kind::Recipe, format!("recipe `{}` does not fit `{}`: {text}", loaded.origin, headers.source.id))
                .hint("`margay inspect` shows the model's layers and sizes, `margay recipe list --model` what fits it")
        };
        let converted = recipe.converted(a).map_err(refuse)?;
        let design = recipe.mixer.design();
        design.check(a).map_err(refuse)?;
        design.gate(a).map_or(Ok(()), |(gate, _)| gate.check()).map_err(refuse)?;
        for (name, stage) in recipe.in_order() {
            if let Some((key, text)) = stage.problems().into_iter().next() {
                return Err(refuse(format!("`stage.{name}.{key}` {text}")));
            }
            let Reach { lora, full, .. } = Reach::of(stage, a, &converted);
            let missing = |(l, p): &&(usize, Projection)| !a.projections(*l).any(|there| there == *p);
            if let Some((layer, p)) = lora.iter().chain(&full).find(missing) {
                let what = match a.experts(*layer) {
                    Some(_) => "which is made of experts that stay as they are",
                    None => "which has none",
                };
                return Err(refuse(format!("`stage.{name}` trains `{}` of layer {layer}, {what}", p.name())));
            }
            if let Some(word) = stage.modules().find(|word| a.named(word).is_empty()) {
                let known: Vec<&str> = a.names.words().filter(|word| !a.named(word).is_empty()).collect();
                let text = format!("`stage.{name}.train` names `{word}`, which this model has not");
                return Err(refuse(format!("{text}; beside projections it has {}", known.join(", "))));
            }
            if stage.loss.attention_ce > 0.0 && !design.convex() {
                let mixer = design.name();
                let text = "compares attention weights with the teacher's, which sum to 1";
                let why = format!("those of this `{mixer}` do not: its rows are not divided by their sum");
                return Err(refuse(format!("`stage.{name}.loss.attention_ce` {text}; {why}")));
            }
        }

        let chosen = recipe.layers.best().map(|best| best.kept(a.layers).map_err(refuse)).transpose()?;
        let costs = cost::Costs::new(a, design, &converted, device);
        let stages = costs.stages(recipe, train_tokens);
        let asked = recipe.in_order().map(|(_, stage)| stage.seq_len).max();
        let row_len = stages.iter().map(|s| s.seq_len).max().or(asked).unwrap_or(a.max_positions.min(1024));
        let verify = costs.verify(row_len);

        if let Some(best) = recipe.layers.best()
            && (best.by, &best.ranking) == (recipe::By::TransferMse, &None)
            && !recipe.in_order().any(|(name, s)| s.loss.layer_wise() && stages.iter().any(|run| run.name == name))
        {
            return Err(refuse("`transfer-mse` ranks layers by the loss of a layer-wise stage, and none runs".into()));
        }

        let ran = |name: &str| stages.iter().any(|s| s.name == name);
        let merged = trained::merged(recipe, ran, a, &converted);
        let mut tensors = Vec::with_capacity(headers.tensors.len());
        for (name, info) in &headers.tensors {
            let claim = description.claims.get(name).copied();
            tensors.push(source_tensor(headers, name, info, claim, &merged, a.names)?);
        }
        tensors.extend(converted.iter().flat_map(|layer| new_tensors(a, design, *layer)));

        let mut fates: BTreeMap<Fate, Total> = BTreeMap::new();
        for tensor in &tensors {
            let total = fates.entry(tensor.fate).or_default();
            total.tensors += 1;
            total.bytes += tensor.bytes;
        }
        let export = tensors.iter().filter(|t| t.fate != Fate::Dropped).map(|t| t.bytes).sum();
        let run = stages.iter().map(|s| s.trainable * 4 * 4 * 2).sum();
        let element = device.element() as usize;
        let kept: Vec<usize> = (0..a.layers).filter(|l| !converted.contains(l)).collect();
        let growing = kept.iter().filter(|l| a.layer(**l).window.is_none()).count();
        let windows = kept.iter().filter_map(|l| a.layer(*l).window).collect::<Vec<_>>();
        let download = if headers.source.repo.is_some() { headers.files.iter().map(|f| f.bytes).sum() } else { 0 };
        Ok(Plan {
            model: Model {
                id: headers.source.id.clone(),
                revision: headers.source.revision.clone(),
                family: description.family.name,
                layers: a.layers,
                parameters: headers.parameters(),
                bytes: headers.bytes(),
                dtypes: dtypes(headers),
                weights: !headers.files.is_empty(),
            },
            recipe: Recipe { name: loaded.origin.clone(), about: recipe.about.clone(), mixer: recipe.mixer.clone() },
            device,
            warnings: warnings(headers, a, &loaded.recipe, &converted, &stages),
            layers: Layers {
                cache_per_token: 2 * a.kv_heads * a.head_dim * element * chosen.unwrap_or(growing),
                windowed: windows.len(),
                window: windows.into_iter().max(),
                kept,
                converted,
                chosen,
            },
            tensors,
            fates,
            stages,
            verify,
            disk: Disk { export, run, download },
            row_len,
        })
    }

    /// `softmax stays in 2 of 16 layers, 8.19 kB of cache per token`, and when they are chosen; `None` where no layer
    /// stays softmax or none changes.
    pub fn hybrid(&self) -> Option<String> {
        let Layers { kept, converted, chosen, cache_per_token, windowed, window } = &self.layers;
        let count = chosen.unwrap_or(kept.len());
        if count == 0 || converted.is_empty() {
            return None;
        }
        let cache = bytes(*cache_per_token as u64);
        let when = match (chosen, self.stages.iter().rfind(|stage| stage.layer_wise)) {
            (None, _) => String::new(),
            (Some(_), Some(stage)) => format!(", chosen after `{}`", stage.name),
            (Some(_), None) => ", chosen before training".into(),
        };
        let local = match window {
            Some(window) => format!(" ({windowed} of them see {window} keys and stop there)"),
            None => String::new(),
        };
        Some(format!(
            "softmax stays in {count} of {} layers, {cache} of cache per token{local}{when}",
            self.model.layers
        ))
    }

    /// Bytes of one sequence's state after `context` tokens, all layers.
    pub fn state_bytes(&self, a: &Architecture, context: usize) -> usize {
        let Layers { kept, chosen, cache_per_token, .. } = &self.layers;
        let converted = a.layers - chosen.unwrap_or(kept.len());
        let linear = self.recipe.mixer.design().state_bytes(a, context, self.device.element() as usize);
        let element = self.device.element() as usize;
        let local = kept.iter().copied().filter(|l| a.layer(*l).window.is_some());
        converted * linear + cache_per_token * context + softmax::cache_bytes(a, local, context, element)
    }

    /// A training stage by its name in the recipe, where it runs.
    pub fn stage(&self, name: &str) -> Option<&Stage> {
        self.stages.iter().find(|s| s.name == name)
    }

    /// Name, shape and type of every tensor the export must hold.
    pub fn exported(&self) -> BTreeMap<String, (Vec<usize>, Dtype)> {
        let exported = self.tensors.iter().filter(|t| t.fate != Fate::Dropped);
        exported.map(|t| (t.name.clone(), (t.shape.clone(), t.dtype))).collect()
    }
}

/// Opens a model for planning or inspection: a hub id or a folder, which may hold a `config.json` alone.
pub fn open(model: &str) -> Result<Headers> {
    const WEIGHTS: [&str; 7] = [".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".pkl"];
    if let Place::Local(dir) = Place::of(model)? {
        let entries = std::fs::read_dir(&dir).map_err(|e| Error::io("read the folder", &dir, e))?;
        let names: Vec<_> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        let weights = names.iter().any(|n| WEIGHTS.iter().any(|end| n.ends_with(end)));
        if names.iter().any(|n| n == "config.json") && !weights {
            let config = Config::read(&dir.join("config.json"))?;
            return described(config, Source { id: model.into(), dir: Some(dir), ..Source::default() });
        }
    }
    Headers::open(model)
}

/// The headers that a `config.json` describes, for a model without weights: every tensor of its architecture in its
/// `torch_dtype`, no files.
pub fn described(config: Config, source: Source) -> Result<Headers> {
    let (_, a, linearization) = understand(&config)?;
    let key = if config.get("torch_dtype").is_some() { "torch_dtype" } else { "dtype" };
    let dtype = match config.opt_str(key)? {
        None | Some("float32") => Dtype::F32,
        Some("bfloat16") => Dtype::BF16,
        Some("float16") => Dtype::F16,
        Some(other) => return Err(config.wrong(key, &other.into(), "float32, bfloat16 or float16")),
    };
    let base = a.tensors().into_iter().map(|(name, (_, shape))| (name, shape, dtype));
    let added = linearization.map(|l| l.tensors(&a)).unwrap_or_default();
    let added = added.into_iter().map(|(name, shape)| (name, shape, Dtype::F32));
    let mut tensors = BTreeMap::new();
    for (name, shape, dtype) in base.chain(added) {
        let bytes = byte_size(dtype, &shape).ok_or_else(|| {
            Error::new(Kind::Config, format!("{}: `{name}` would have shape {shape:?}", config.file()))
                .hint("check the sizes in config.json")
        })?;
        tensors.insert(name, TensorInfo { dtype, shape, bytes, file: 0, offset: 0 });
    }
    Ok(Headers { config, tensors, files: Vec::new(), side_files: Vec::new(), source })
}

fn source_tensor(
    headers: &Headers,
    name: &str,
    info: &TensorInfo,
    claim: Option<Claim>,
    merged: &BTreeMap<Role, String>,
    names: &Names,
) -> Result<Tensor> {
    let changed = |claim: Option<Claim>| match claim {
        // Projections that share a tensor mostly change for the same reason; the first that changes says it.
        Some(Claim::Reads(Role::Weight(layer, p))) => {
            names.beside(p).find_map(|p| merged.get(&Role::Weight(layer, p)).cloned())
        }
        Some(Claim::Reads(role)) => merged.get(&role).cloned(),
        _ => None,
    };
    let (fate, note) = match claim {
        Some(Claim::Reads(_)) if changed(claim).is_some() => (Fate::Merged, changed(claim)),
        Some(Claim::Reads(_) | Claim::Mixer) => (Fate::Kept, None),
        Some(Claim::Tied) if merged.contains_key(&Role::Embedding) => {
            (Fate::Dropped, Some("the embedding once more, which is trained".into()))
        }
        Some(Claim::Tied) => (Fate::Tied, Some("same weights as the embedding".into())),
        Some(Claim::Dropped) => (Fate::Dropped, Some("a buffer that is recomputed".into())),
        None => {
            let message = format!("`{name}` in `{}` was claimed by nothing", headers.source.id);
            let hint =
                "its family has no such tensor: is `model_type` right? One that belongs to no model can be removed";
            return Err(Error::new(Kind::Checkpoint, message).hint(hint));
        }
    };
    if fate != Fate::Dropped && !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        let message = format!("`{name}` in `{}` is {}; weights are F32, F16 or BF16", headers.source.id, info.dtype);
        return Err(
            Error::new(Kind::Checkpoint, message).hint("quantized checkpoints are not read; use the original weights")
        );
    }
    Ok(Tensor { name: name.into(), dtype: info.dtype, shape: info.shape.clone(), bytes: info.bytes, fate, note })
}

/// What the mixer adds to a layer.
fn new_tensors(a: &Architecture, design: &dyn Design, layer: usize) -> Vec<Tensor> {
    let new = |spec: crate::mixers::Spec| Tensor {
        name: tensor_name(a, layer, spec.name),
        dtype: Dtype::F32,
        bytes: 4 * spec.shape.iter().map(|d| *d as u64).product::<u64>(),
        shape: spec.shape,
        fate: Fate::New,
        note: Some(format!("starts {}", spec.init)),
    };
    design.specs(a).into_iter().map(new).collect()
}

/// Precisions of the tensors, the most frequent first.
pub(super) fn dtypes(headers: &Headers) -> Vec<Dtype> {
    let mut counts: Vec<(usize, Dtype)> = Vec::new();
    for info in headers.tensors.values() {
        match counts.iter_mut().find(|(_, dtype)| *dtype == info.dtype) {
            Some((count, _)) => *count += 1,
            None => counts.push((1, info.dtype)),
        }
    }
    counts.sort_by_key(|(count, _)| std::cmp::Reverse(*count));
    counts.into_iter().map(|(_, dtype)| dtype).collect()
}

fn warnings(
    headers: &Headers,
    a: &Architecture,
    recipe: &recipe::Recipe,
    converted: &[usize],
    stages: &[Stage],
) -> Vec<String> {
    let source = &headers.source;
    let mut list = Vec::new();
    if headers.files.is_empty() {
        list.push(format!("`{}` has no weights: tensors are those its config.json describes", source.id));
    } else if !headers.tokenizer() {
        list.push(format!("`{}` has no tokenizer.json, which a conversion needs", source.id));
    }
    match (&recipe.base.repo, &source.repo) {
        (Some(wanted), Some(given)) if wanted != given => {
            list.push(format!("the recipe was written for `{wanted}`, not `{given}`"));
        }
        (Some(_), Some(given)) => {
            if let (Some(wanted), Some(read)) = (&recipe.base.revision, &source.revision)
                && !read.starts_with(wanted.as_str())
            {
                list.push(format!("the recipe was written for revision {wanted} of `{given}`, not {read}"));
            }
        }
        _ => {}
    }
    if converted.is_empty() {
        list.push("no layer is converted".into());
    }
    let (local, global): (Vec<usize>, Vec<usize>) = (0..a.layers).partition(|l| a.layer(*l).window.is_some());
    let window = local.first().and_then(|l| a.layer(*l).window);
    let needless: Vec<usize> = local.into_iter().filter(|l| converted.contains(l)).collect();
    if let (Some(window), false, false) = (window, global.is_empty(), needless.is_empty()) {
        list.push(format!(
            "the teacher sees {window} keys in layers {}, whose cache does not grow beyond them: only layers {} need \
             converting (`layers = \"global\"`)",
            ranges(&needless),
            ranges(&global)
        ));
    }
    for stage in stages {
        let Stage { name, seq_len, tokens_per_step, tokens, .. } = stage;
        let asked = recipe.stage.get(name).map_or(*seq_len, |s| s.seq_len);
        if asked > *seq_len {
            list.push(format!(
                "`stage.{name}.seq_len` {asked} becomes {seq_len}, the positions the model was made for"
            ));
        }
        if tokens < tokens_per_step {
            list.push(format!("stage `{name}` has {tokens} tokens, less than the {tokens_per_step} of one step"));
        }
    }
    list
}
