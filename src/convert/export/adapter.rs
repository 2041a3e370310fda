//! What training changed of the base model, apart from it: LoRA as a PEFT folder, weights trained in full, and the tensors
//! of the mixers.
//!
//! A conversion that trained projections leaves the first two in the export's folder `adapter`, since merging loses them.
//! The format `adapter` puts all of it into one folder:
//!
//! | file | what |
//! |---|---|
//! | `adapter_config.json`, `adapter_model.safetensors` | LoRA as PEFT keeps it |
//! | `mixers.safetensors` | tensors of the mixers, and weights trained in full, under their checkpoint names |
//! | `config.json`, `*.py` | the converted model for transformers, which takes its other weights from the base |

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use serde_json::{Value, json};

use super::{FileRow, Shape, create, describe, pretty, put, row};
use crate::checkpoint::Config;
use crate::checkpoint::writer::{Data, Entry, tensor_bytes, write_single};
use crate::convert::load::{Description, Linearization, MIXERS, Model};
use crate::error::{Error, Kind, Result};
use crate::families::{Architecture, Claim, Family, Layout, Names, Projection, Role};
use crate::model::Decoder;
use crate::params::{Adapters, LowRank};
use crate::progress::Progress;

/// Folder of an export.
pub const FOLDER: &str = "adapter";
pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const LORA: &str = "adapter_model.safetensors";
/// Weights trained in full, in an export's folder.
const CHANGED: &str = "changed.safetensors";
/// Before every name of a PEFT file.
pub(super) const PREFIX: &str = "base_model.model.";

/// Changes of weights before they are merged.
pub struct Adapter {
    low_rank: Vec<Lora>,
    /// Whole weights by checkpoint name and as the checkpoint has them, without their LoRA.
    full: Vec<(String, Tensor)>,
    names: &'static Names,
    /// Modules hold [in, out].
    columns: bool,
}

/// The LoRA of a module as PEFT has it.
struct Lora {
    /// From the model on: `model.layers.3.self_attn.q_proj`.
    module: String,
    /// The projection that stands for the module.
    leader: Projection,
    a: Tensor,
    b: Tensor,
    alpha: f64,
}

impl Adapter {
    /// Of a student over `decoder`, whose weights are those of the base model still, as `base` describes it.
    pub fn of(adapters: &Adapters, decoder: &Decoder, base: &Description) -> Result<Adapter> {
        let a = &decoder.architecture;
        let mut modules: BTreeMap<(usize, Projection), Vec<LowRank>> = BTreeMap::new();
        for low_rank in adapters.low_rank()? {
            modules.entry((low_rank.layer, a.names.leader(low_rank.projection))).or_default().push(low_rank);
        }
        let low_rank = modules.into_iter().map(|((layer, leader), parts)| lora(a, layer, leader, &parts));
        let mut deltas: BTreeMap<(usize, Projection), BTreeMap<Projection, Tensor>> = BTreeMap::new();
        for (layer, p, delta) in adapters.full() {
            deltas.entry((layer, a.names.leader(p))).or_default().insert(p, delta);
        }
        let full = deltas.into_iter().map(|((layer, leader), deltas)| {
            let part = |p| {
                let weight = decoder.block(layer).weight(p)?.to_dtype(DType::F32)?;
                deltas.get(&p).map_or(Ok(weight.clone()), |delta| weight + delta)
            };
            let rows = a.names.beside(leader).map(part).collect::<candle_core::Result<Vec<_>>>()?;
            Ok((a.name(Role::Weight(layer, leader)), a.stored(leader, &Tensor::cat(&rows, 0)?)?))
        });
        let whole = adapters.roles().map(|role| {
            let tensor = decoder.stored(role)?;
            Ok((base.name(role), adapters.changed(role, &tensor)?.unwrap_or(tensor).detach()))
        });
        Ok(Adapter {
            low_rank: low_rank.collect::<Result<_>>()?,
            full: full.chain(whole).collect::<Result<_>>()?,
            names: Family::usual_names(a),
            columns: a.layout == Layout::Columns,
        })
    }

    /// Writes the files of [`FOLDER`] into the export `dir`. `base` is the model they belong to, `stored` the type of a
    /// weight in the export.
    pub fn write(
        &self,
        base: &str,
        layers: usize,
        stored: impl Fn(&str) -> Result<Dtype>,
        dir: &Path,
        progress: &dyn Progress,
    ) -> Result<Vec<FileRow>> {
        let place = dir.join(FOLDER);
        create(&place)?;
        let mut files = Vec::new();
        if !self.low_rank.is_empty() {
            files.push(put(&place, CONFIG, &pretty(&self.peft_config(base, layers)?))?);
            let mut entries = Vec::new();
            for low_rank in &self.low_rank {
                for (end, tensor) in [("lora_A", &low_rank.a), ("lora_B", &low_rank.b)] {
                    let name = format!("{PREFIX}{}.{end}.weight", low_rank.module);
                    entries.push(entry(name, tensor, Dtype::F32));
                }
            }
            files.push(row(write_single(&place, LORA, entries, progress)?));
        }
        if !self.full.is_empty() {
            let entries = self.full.iter().map(|(name, weight)| Ok(entry(name.clone(), weight, stored(name)?)));
            files.push(row(write_single(&place, CHANGED, entries.collect::<Result<_>>()?, progress)?));
        }
        files.iter_mut().for_each(|f| f.file = format!("{FOLDER}/{}", f.file));
        Ok(files)
    }

    /// `adapter_config.json`. Modules are named alone where every layer has them, else with their layers; ranks other than
    /// the most common one are listed.
    fn peft_config(&self, base: &str, layers: usize) -> Result<Value> {
        let mut counts: BTreeMap<(usize, u64), usize> = BTreeMap::new();
        for l in &self.low_rank {
            *counts.entry((l.a.dim(0)?, l.alpha.to_bits())).or_default() += 1;
        }
        let common = counts.into_iter().max_by_key(|(_, count)| *count).map(|(common, _)| common);
        let (rank, alpha) = common.map_or((1, 1.0), |(rank, alpha)| (rank, f64::from_bits(alpha)));
        let (mut ranks, mut alphas) = (BTreeMap::new(), BTreeMap::new());
        for l in &self.low_rank {
            if (l.a.dim(0)?, l.alpha) != (rank, alpha) {
                ranks.insert(&l.module, l.a.dim(0)?);
                alphas.insert(&l.module, l.alpha);
            }
        }
        let leaders: BTreeSet<Projection> = self.low_rank.iter().map(|l| l.leader).collect();
        let targets: Vec<&str> = match self.low_rank.len() == leaders.len() * layers {
            true => leaders.into_iter().map(|p| self.short(p)).collect(),
            false => self.low_rank.iter().map(|l| l.module.as_str()).collect(),
        };
        Ok(json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": true,
            "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": targets,
            "rank_pattern": ranks, "alpha_pattern": alphas, "fan_in_fan_out": self.columns,
        }))
    }

    /// The last part of a module's name, or all of it under its block where that is another's too.
    fn short(&self, p: Projection) -> &'static str {
        let last = |module: &'static str| module.rsplit('.').next().unwrap_or(module);
        let module = self.names.module(p);
        let twice = self.names.projections.iter().any(|other| *other != module && last(other) == last(module));
        if twice { module } else { last(module) }
    }
}

/// The LoRA of the tensor that `leader` stands for, from that of the projections in it: side by side, each writing its own
/// rows with its own weight.
fn lora(a: &Architecture, layer: usize, leader: Projection, parts: &[LowRank]) -> Result<Lora> {
    let names = Family::usual_names(a);
    let module = format!("{}.{layer}.{}", names.blocks, names.module(leader));
    if let ([one], 1) = (parts, a.names.beside(leader).count()) {
        return Ok(Lora { module, leader, a: one.a.clone(), b: one.b.clone(), alpha: one.alpha });
    }
    let ranks = parts.iter().map(LowRank::rank).collect::<candle_core::Result<Vec<_>>>()?;
    let rank = ranks.iter().sum();
    let mut rows = Vec::new();
    for p in a.names.beside(leader) {
        let index = parts.iter().position(|part| part.projection == p);
        rows.push(match index.map(|i| (&parts[i], ranks[i], ranks[..i].iter().sum::<usize>())) {
            Some((part, own, before)) => {
                (&part.b * (part.alpha / own as f64))?.pad_with_zeros(1, before, rank - before - own)?
            }
            None => Tensor::zeros((a.shape(p)[0], rank), parts[0].b.dtype(), parts[0].b.device())?,
        });
    }
    let inner = Tensor::cat(&parts.iter().map(|part| &part.a).collect::<Vec<_>>(), 0)?;
    let b = a.in_order(leader, &Tensor::cat(&rows, 0)?)?;
    Ok(Lora { module, leader, a: inner, b, alpha: rank as f64 })
}

/// A tensor to write.
fn entry(name: String, tensor: &Tensor, dtype: Dtype) -> Entry<'static> {
    let tensor = tensor.clone();
    let shape = tensor.dims().to_vec();
    Entry { name, dtype, shape, data: Data::Lazy(Box::new(move || tensor_bytes(&tensor, dtype))) }
}

/// `model.layers.3.self_attn.q_proj`, as Llama's class has it.
pub(super) fn module(low_rank: &LowRank) -> String {
    format!("model.layers.{}.{}", low_rank.layer, low_rank.projection.path())
}

/// The LoRA in a PEFT folder of a model in Llama's spelling.
pub(super) fn read(folder: &Path) -> Result<Vec<LowRank>> {
    let path = folder.join(CONFIG);
    let text = std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
    let config = Config::parse(&text, &path.to_string_lossy())?;
    let (rank, alpha) = (config.f64("r")?, config.f64("lora_alpha")?);
    let (ranks, alphas) = (config.opt_object("rank_pattern")?, config.opt_object("alpha_pattern")?);
    let mut halves: BTreeMap<(usize, Projection), [Option<Tensor>; 2]> = BTreeMap::new();
    for (name, tensor) in candle_core::safetensors::load(folder.join(LORA), &Device::Cpu)? {
        let Some((layer, p, half)) = name.strip_prefix(PREFIX).and_then(place) else {
            let message = format!("tensor `{name}` in `{}` is no LoRA of a projection", folder.join(LORA).display());
            return Err(Error::new(Kind::Checkpoint, message));
        };
        halves.entry((layer, p)).or_default()[half] = Some(tensor);
    }
    let mut found = pair(halves, |_| Ok(0.0))?;
    for l in &mut found {
        let own = |pattern: &Option<Config>, all: f64| match pattern {
            Some(pattern) => Ok(pattern.opt_f64(&module(l))?.unwrap_or(all)),
            None => Ok::<f64, Error>(all),
        };
        l.alpha = own(&alphas, alpha)? / own(&ranks, rank)? * l.rank()? as f64;
    }
    Ok(found)
}

/// LoRA of both its halves, A and B, whose `alpha` its rank tells.
pub(super) fn pair(
    halves: BTreeMap<(usize, Projection), [Option<Tensor>; 2]>,
    alpha: impl Fn(usize) -> Result<f64>,
) -> Result<Vec<LowRank>> {
    let whole = |((layer, projection), halves): ((usize, Projection), [Option<Tensor>; 2])| match halves {
        [Some(a), Some(b)] => {
            let alpha = alpha(a.dim(0)?)?;
            Ok(LowRank { layer, projection, a, b, alpha })
        }
        _ => {
            let message = format!("layer {layer} has one half of the LoRA of {} only", projection.name());
            Err(Error::new(Kind::Checkpoint, message).hint("give all files of the adapter"))
        }
    };
    halves.into_iter().map(whole).collect()
}

/// Layer, projection and half of `model.layers.3.self_attn.q_proj.lora_A.weight`.
pub(super) fn place(name: &str) -> Option<(usize, Projection, usize)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (path, half) = rest.split_once(".lora_")?;
    let projection = Projection::ALL.into_iter().find(|p| p.path() == path)?;
    let half = match half {
        "A.weight" => 0,
        "B.weight" => 1,
        _ => return None,
    };
    Some((layer.parse().ok()?, projection, half))
}

/// Writes the export `model` as an adapter of its base.
pub(super) fn write(
    model: &Model,
    linearization: &Linearization,
    shape: &Shape,
    dir: &Path,
    progress: &dyn Progress,
) -> Result<Vec<FileRow>> {
    let checkpoint = &model.checkpoint;
    create(dir)?;
    let kept = trained(model)?;
    let mut files = Vec::new();
    for name in [CONFIG, LORA].into_iter().filter(|_| kept) {
        let path = checkpoint.dir().join(FOLDER).join(name);
        if path.is_file() {
            files.push(put(dir, name, &std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?)?);
        }
    }
    let mut entries = Vec::new();
    for (name, _) in model.description.claims.iter().filter(|(_, c)| matches!(c, Claim::Mixer)) {
        let info = checkpoint.info(name)?;
        let data = Data::Bytes(checkpoint.bytes(name)?);
        entries.push(Entry { name: name.clone(), dtype: info.dtype, shape: info.shape.clone(), data });
    }
    let changed = checkpoint.dir().join(FOLDER).join(CHANGED);
    if kept && changed.is_file() {
        for (name, tensor) in candle_core::safetensors::load(&changed, &Device::Cpu)? {
            let stored = checkpoint.info(&name)?.dtype;
            entries.push(entry(name, &tensor, shape.dtype.unwrap_or(stored)));
        }
    }
    entries.sort_by_key(|e| super::natural(&e.name));
    files.push(row(write_single(dir, MIXERS, entries, progress)?));
    files.push(put(dir, "config.json", &super::config(model, Some(linearization), shape.dtype)?)?);
    files.extend(super::python(dir)?);
    let readme = usage(&linearization.teacher);
    files.push(describe("README.md", readme.as_bytes()));
    crate::checkpoint::writer::write_atomic(&dir.join("README.md"), readme.as_bytes())?;
    Ok(files)
}

/// Whether the export has its changes of projections apart from the weights they are merged into; an export that merged
/// some and did not keep them is refused.
pub(super) fn trained(model: &Model) -> Result<bool> {
    let dir = model.checkpoint.dir();
    if dir.join(FOLDER).is_dir() {
        return Ok(true);
    }
    let merged = super::Manifest::read(dir)?.and_then(|m| m.merged).is_some_and(|m| m.weights > 0);
    if merged {
        let message = format!("`{}` has its adapters merged and no folder `{FOLDER}` that keeps them", dir.display());
        return Err(Error::new(Kind::Checkpoint, message).hint("convert again: conversions keep it since 0.1.0"));
    }
    Ok(false)
}

/// `README.md`: how the folder is loaded.
fn usage(base: &str) -> String {
    format!(
        "---\nlibrary_name: peft\nbase_model: {base}\ntags:\n- margay\n- linear-attention\n---\n\n\
         What a conversion by Margay changed of `{base}`: the tensors of its mixers, and where they were\n\
         trained LoRA, norms, embeddings and head.\n\n\
         ```python\n\
         from peft import PeftModel\n\
         from transformers.dynamic_module_utils import get_class_from_dynamic_module\n\n\
         margay = get_class_from_dynamic_module(\"modeling_margay.MargayForCausalLM\", folder)\n\
         model = margay.from_adapter(folder)         # base weights, mixers of this folder\n\
         model = PeftModel.from_pretrained(model, folder)  # where there is LoRA\n\
         ```\n"
    )
}
