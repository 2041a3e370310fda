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
use crate::convert::load::{Linearization, Model};
use crate::error::{Error, Kind, Result};
use crate::families::{Claim, Projection, Role};
use crate::model::Decoder;
use crate::params::{Adapters, LowRank};
use crate::progress::Progress;

/// Folder of an export.
pub const FOLDER: &str = "adapter";
pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const LORA: &str = "adapter_model.safetensors";
/// Weights trained in full, in an export's folder.
const CHANGED: &str = "changed.safetensors";
const MIXERS: &str = "mixers.safetensors";
/// Before every name of a PEFT file.
pub(super) const PREFIX: &str = "base_model.model.";

/// Changes of projections before they are merged.
pub struct Adapter {
    low_rank: Vec<LowRank>,
    /// Whole weights [out, in] by checkpoint name, without their LoRA.
    full: Vec<(String, Tensor)>,
}

impl Adapter {
    /// Of a student over `decoder`, whose weights are those of the base model still.
    pub fn of(adapters: &Adapters, decoder: &Decoder) -> Result<Adapter> {
        let full = adapters.full().map(|(layer, p, delta)| {
            let weight = decoder.block(layer).weight(p)?.to_dtype(DType::F32)?;
            Ok((decoder.architecture.name(Role::Weight(layer, p)), (weight + delta)?))
        });
        Ok(Adapter { low_rank: adapters.low_rank()?, full: full.collect::<Result<_>>()? })
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
            files.push(put(&place, CONFIG, &pretty(&peft_config(&self.low_rank, base, layers)?))?);
            let mut entries = Vec::new();
            for low_rank in &self.low_rank {
                for (end, tensor) in [("lora_A", &low_rank.a), ("lora_B", &low_rank.b)] {
                    let name = format!("{PREFIX}{}.{end}.weight", module(low_rank));
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
}

/// A tensor to write.
fn entry(name: String, tensor: &Tensor, dtype: Dtype) -> Entry<'static> {
    let tensor = tensor.clone();
    let shape = tensor.dims().to_vec();
    Entry { name, dtype, shape, data: Data::Lazy(Box::new(move || tensor_bytes(&tensor, dtype))) }
}

/// `model.layers.3.self_attn.q_proj`.
pub(super) fn module(low_rank: &LowRank) -> String {
    format!("model.layers.{}.{}", low_rank.layer, low_rank.projection.path())
}

/// The LoRA in a PEFT folder.
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

/// `adapter_config.json`. Projections are named alone where every layer has them, else with their layers; ranks other than
/// the most common one are listed.
fn peft_config(low_rank: &[LowRank], base: &str, layers: usize) -> Result<Value> {
    let mut counts: BTreeMap<(usize, u64), usize> = BTreeMap::new();
    for l in low_rank {
        *counts.entry((l.rank()?, l.alpha.to_bits())).or_default() += 1;
    }
    let common = counts.into_iter().max_by_key(|(_, count)| *count).map(|(common, _)| common);
    let (rank, alpha) = common.map_or((1, 1.0), |(rank, alpha)| (rank, f64::from_bits(alpha)));
    let (mut ranks, mut alphas) = (BTreeMap::new(), BTreeMap::new());
    for l in low_rank {
        if (l.rank()?, l.alpha) != (rank, alpha) {
            ranks.insert(module(l), l.rank()?);
            alphas.insert(module(l), l.alpha);
        }
    }
    let names: BTreeSet<&str> = low_rank.iter().map(|l| l.projection.name()).collect();
    let targets: Vec<String> = match low_rank.len() == names.len() * layers {
        true => names.into_iter().map(String::from).collect(),
        false => low_rank.iter().map(module).collect(),
    };
    Ok(json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": true,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": targets,
        "rank_pattern": ranks, "alpha_pattern": alphas,
    }))
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
         What a conversion by Margay changed of `{base}`: the tensors of its mixers, and LoRA where that was trained.\n\n\
         ```python\n\
         from peft import PeftModel\n\
         from transformers.dynamic_module_utils import get_class_from_dynamic_module\n\n\
         margay = get_class_from_dynamic_module(\"modeling_margay.MargayForCausalLM\", folder)\n\
         model = margay.from_adapter(folder)         # base weights, mixers of this folder\n\
         model = PeftModel.from_pretrained(model, folder)  # where there is LoRA\n\
         ```\n"
    )
}
