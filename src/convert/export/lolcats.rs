//! Checkpoints of the official LoLCATs code (github.com/HazyResearch/lolcats): `_distill.pt`, the feature maps and window
//! factors of attention transfer, and `_ft.pt`, the LoRA of the second stage. Both hold nothing but what was trained;
//! tensors have our names, those under LoRA PEFT's.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use serde_json::{Value, json};

use super::adapter::{self, Adapter, FOLDER, LORA, PREFIX};
use super::manifest::{Manifest, reference};
use super::{FileRow, Parts, Shape, create, describe, export, pretty, put};
use crate::checkpoint::pytorch;
use crate::convert::load::{Linearization, Model, compute_dtype, tensor_name};
use crate::convert::merge::fold;
use crate::convert::plan;
use crate::error::{Error, Kind, Result};
use crate::families::{Architecture, Claim, Projection};
use crate::mixers::lolcats::{Bias, Config, FeatureMap, WindowKind};
use crate::model::{Decoder, Net};
use crate::params::{Adapters, LowRank, Param};
use crate::progress::Progress;
use crate::recipe::{Loaded, Mixer, Recipe};

/// Writes the export `model` as `<name>_distill.pt`, `<name>_ft.pt` where there is LoRA, and the model's configuration of
/// the official code.
pub(super) fn write(model: &Model, linearization: &Linearization, dir: &Path) -> Result<Vec<FileRow>> {
    let settings = official(model, linearization)?;
    let kept = model.checkpoint.dir().join(FOLDER);
    let lora = match adapter::trained(model)? && kept.join(LORA).is_file() {
        true => adapter::read(&kept)?,
        false => Vec::new(),
    };
    create(dir)?;
    let name = linearization.teacher.rsplit('/').next().unwrap_or("model");
    let mut files = vec![put(dir, &format!("{name}.yaml"), &pretty(&settings))?];
    let mut save = |suffix: &str, tensors: &[(String, Tensor)]| -> Result<()> {
        let (file, path) = (format!("{name}_{suffix}.pt"), dir.join(format!("{name}_{suffix}.pt")));
        pytorch::write(&path, tensors, 0)?;
        files.push(describe(&file, &std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?));
        Ok(())
    };
    let mixers = model.description.claims.iter().filter(|(_, c)| matches!(c, Claim::Mixer));
    let tensor = |name: &String| Ok((name.clone(), model.checkpoint.tensor(name, DType::F32, &Device::Cpu)?));
    save("distill", &mixers.map(|(name, _)| tensor(name)).collect::<Result<Vec<_>>>()?)?;
    if !lora.is_empty() {
        let (settings, tensors) = fine_tuned(&lora)?;
        save("ft", &tensors)?;
        files.push(put(dir, &format!("{name}_ft.yaml"), &pretty(&settings))?);
    }
    Ok(files)
}

/// What an update weighs where nothing else says it: the official settings, rank 8 and `lora_alpha` 16.
const SCALE: f64 = 2.0;

/// LoRA as the official code has it, with its settings: one rank, where some have more rows than others the missing are
/// zero, and one weight of an update, where they differ [`SCALE`].
fn fine_tuned(lora: &[LowRank]) -> Result<(Value, Vec<(String, Tensor)>)> {
    let ranks = lora.iter().map(LowRank::rank).collect::<candle_core::Result<Vec<_>>>()?;
    let rank = ranks.iter().copied().max().unwrap_or(1);
    let scales: Vec<f64> = lora.iter().zip(&ranks).map(|(l, rank)| l.alpha / *rank as f64).collect();
    let scale = scales.first().copied().filter(|first| scales.iter().all(|s| s == first)).unwrap_or(SCALE);
    let mut tensors = Vec::new();
    for ((l, own), weight) in lora.iter().zip(&ranks).zip(&scales) {
        let name = adapter::module(l);
        let (a, b) = (l.a.pad_with_zeros(0, 0, rank - own)?, (&l.b * (weight / scale))?);
        // In memory PEFT's names carry the name of the adapter.
        tensors.push((format!("{PREFIX}{name}.lora_A.default.weight"), a));
        tensors.push((format!("{PREFIX}{name}.lora_B.default.weight"), b.pad_with_zeros(1, 0, rank - own)?));
    }
    let targets: BTreeSet<&str> = lora.iter().map(|l| l.projection.name()).collect();
    let kwargs = json!({
        "r": rank, "lora_alpha": scale * rank as f64, "lora_dropout": 0, "target_modules": targets,
    });
    Ok((json!({ "finetune": { "method": "lora", "kwargs": kwargs } }), tensors))
}

/// The model's configuration in the official code's words, or what it has no word for.
fn official(model: &Model, linearization: &Linearization) -> Result<Value> {
    let refuse = |what: String| {
        Err(Error::new(Kind::Usage, format!("the official LoLCATs code has no {what}")).hint("use `--to transformers`"))
    };
    let Mixer::Lolcats(config) = &linearization.mixer else {
        return refuse(format!("`{}` attention", linearization.mixer.design().name()));
    };
    let feature_map = match config.feature_map {
        FeatureMap::SoftmaxDim => "softmax_dim",
        FeatureMap::ExpDim => "exp_dim",
        FeatureMap::Relu => "relu",
        other => return refuse(format!("feature map {}", json!(other))),
    };
    if config.bias == Bias::Full {
        return refuse("bias per column: it has one number per head".into());
    }
    if model.checkpoint.dir().join(FOLDER).join("changed.safetensors").is_file() {
        return refuse("place for weights that were trained in full".into());
    }
    let a = model.architecture();
    if !matches!(a.family, "llama" | "mistral") {
        return refuse(format!("`{}` models: it has Llama and Mistral", a.family));
    }
    let columns = config.feature_map.cols(config.feature_dim, a.head_dim, a.head_dim.min(64));
    let attention_type = match (config.window, config.window_kind) {
        (0, _) => "lolcats_llama",
        (_, WindowKind::Sliding) => "lolcats_llama_window_sw",
        (_, WindowKind::Terraced) => "lolcats_llama_window_tk",
    };
    let kept: Vec<usize> = (0..a.layers).filter(|l| !linearization.layers.contains(l)).collect();
    Ok(json!({
        "name": linearization.base_model_type,
        "model": { "pretrained_model_name_or_path": linearization.teacher, "torch_dtype": "bfloat16" },
        "attention": {
            "attention_type": attention_type, "state_chunk_len": 1024, "window_size": config.window,
            "affine_attention_factors": config.affine, "init_window_factor": config.window_factor,
            "feature_map": feature_map, "feature_map_kwargs": { "eps": 1e-12, "fullspace": true },
            "layer_idx": null, "learned_kernel": "untied_head_einsum",
            "learned_kernel_kwargs": {
                "feature_dim": columns, "skip_connection": config.skip_connection, "bias": config.bias == Bias::Head,
                "zero_init": config.skip_connection && config.identity_init,
            },
            "tie_qk_kernels": config.tie_qk, "train_qk": false, "softmax_attentions": kept,
        },
    }))
}

/// Official checkpoints over their base model.
struct Official {
    linearization: Linearization,
    net: Net,
    lora: Vec<LowRank>,
}

/// Writes official checkpoints of `base` as an export. The recipe says what the files do not: window, feature map, and the
/// `alpha / rank` of the last stage with LoRA.
pub fn import(
    base: &str,
    recipe: &Loaded,
    files: &[PathBuf],
    shape: &Shape,
    dir: &Path,
    progress: &dyn Progress,
) -> Result<Vec<FileRow>> {
    let model = Model::open(base, progress)?;
    let Official { linearization, net, lora } = Official::read(&model, &recipe.recipe, files)?;
    let trained = recipe.recipe.in_order().filter(|(_, s)| !lora.is_empty() || !s.trains("lora"));
    let stages: Vec<String> = trained.map(|(name, _)| name.into()).collect();
    let device = Device::Cpu;
    let mut decoder =
        Decoder::load(&model.checkpoint, model.architecture(), compute_dtype(&device), &device, progress)?;
    let mut adapter = None;
    let mut merged = Vec::new();
    if !lora.is_empty() {
        let adapters = Adapters::of(lora)?;
        adapter = Some(Adapter::of(&adapters, &decoder, &model.description)?);
        merged = fold(&mut decoder, &adapters, &model)?;
    }
    let parts = Parts { model: &model, decoder: &decoder, student: &net, merged: &merged };
    let mut files = export(&parts, Some(&linearization), shape, dir, progress)?;
    if let Some(adapter) = adapter {
        let stored = |name: &str| Ok(model.checkpoint.info(name)?.dtype);
        files.extend(adapter.write(&linearization.teacher, model.architecture().layers, stored, dir, progress)?);
    }
    let exported = Model::open(&dir.to_string_lossy(), progress)?;
    let tensors = exported.checkpoint.tensors.iter();
    let ids: Vec<u32> = (0..32).map(|i| i % model.architecture().vocab as u32).collect();
    let manifest = Manifest {
        margay: env!("CARGO_PKG_VERSION").into(),
        source: linearization.teacher.clone(),
        revision: linearization.teacher_revision.clone(),
        recipe: recipe.recipe.clone(),
        recipe_origin: recipe.origin.clone(),
        data: Value::Null,
        plan: json!({ "layers": { "converted": linearization.layers } }),
        seconds: 0.0,
        // The stages whose results the files are.
        stages: stages.into_iter().map(|name| (name, json!({}))).collect(),
        merged: None,
        tensors: tensors.map(|(n, i)| (n.clone(), (format!("{:?}", i.dtype), i.shape.clone()))).collect(),
        files: files.clone(),
        reference: Some(reference(&decoder, &net, &ids)?),
        verify: None,
    };
    manifest.write(dir)?;
    Ok(files)
}

impl Official {
    fn read(model: &Model, recipe: &Recipe, files: &[PathBuf]) -> Result<Official> {
        let a = model.architecture();
        let Mixer::Lolcats(config) = &recipe.mixer else {
            return Err(Error::new(
                Kind::Recipe,
                "official LoLCATs checkpoints need a recipe with `kind = \"lolcats\"`",
            )
            .hint("such as `--recipe llama/3.1-8b-lolcats --set mixer.window_kind=terraced`"));
        };
        let mut mixers = BTreeMap::new();
        let mut lora: BTreeMap<(usize, Projection), [Option<Tensor>; 2]> = BTreeMap::new();
        for file in files {
            for (name, tensor) in pytorch::read(file)? {
                let tensor = tensor.to_dtype(DType::F32)?;
                let plain = name.strip_prefix(PREFIX).unwrap_or(&name).replace(".default.", ".");
                match adapter::place(&plain) {
                    Some((layer, p, half)) => lora.entry((layer, p)).or_default()[half] = Some(tensor),
                    None => {
                        mixers.insert(plain, tensor);
                    }
                }
            }
        }
        let (net, layers) = net(a, config, mixers)?;
        let stage = recipe.in_order().filter(|(_, s)| s.trains("lora")).last();
        let scale = stage.map_or(SCALE, |(_, s)| s.lora.alpha / s.lora.rank as f64);
        let lora = adapter::pair(lora, |rank| Ok(scale * rank as f64))?;
        let headers = model.checkpoint.headers();
        let linearization = Linearization {
            format_version: Linearization::FORMAT,
            base_model_type: headers.config.model_type()?.into(),
            base_architectures: headers.config.architectures()?.into_iter().map(String::from).collect(),
            layers,
            mixer: recipe.mixer.clone(),
            teacher: headers.source.repo.clone().unwrap_or_else(|| crate::convert::base_name(&headers.source.id)),
            teacher_revision: headers.source.revision.clone(),
        };
        Ok(Official { linearization, net, lora })
    }
}

/// The net of the layers whose tensors are there; every tensor must find its place.
fn net(a: &Architecture, config: &Config, mut tensors: BTreeMap<String, Tensor>) -> Result<(Net, Vec<usize>)> {
    let design: &dyn crate::mixers::Design = config;
    design.check(a).map_err(|e| Error::new(Kind::Recipe, e))?;
    let specs = design.specs(a);
    let Some(first) = specs.first() else {
        return Err(Error::new(Kind::Recipe, "the recipe's mixer has no tensors, so there is nothing to read"));
    };
    let layers: Vec<usize> = (0..a.layers).filter(|l| tensors.contains_key(&tensor_name(a, *l, first.name))).collect();
    let mut params: BTreeMap<String, Param> = BTreeMap::new();
    for (layer, spec) in layers.iter().flat_map(|l| specs.iter().map(move |s| (*l, s))) {
        let name = tensor_name(a, layer, spec.name);
        let Some(tensor) = tensors.remove(&name) else {
            return Err(Error::new(Kind::Checkpoint, format!("tensor `{name}` is not in the checkpoint"))
                .hint("the recipe's `[mixer]` must be that of the official run"));
        };
        if tensor.dims() != spec.shape.as_slice() {
            let message = format!("tensor `{name}` is {:?}, the recipe makes it {:?}", tensor.dims(), spec.shape);
            return Err(Error::new(Kind::Checkpoint, message).hint("`--set mixer.feature_dim=N` tells its columns"));
        }
        params.insert(name.clone(), Param { name, var: Var::from_tensor(&tensor)?, scalar: spec.scalar });
    }
    if let Some(name) = tensors.keys().next() {
        let message = format!("{} tensors have no place in the model, `{name}` first", tensors.len());
        return Err(Error::new(Kind::Checkpoint, message)
            .hint("the base model, and the recipe's `[mixer]`, must be those of the official run"));
    }
    let net = Net::of(a, design, &layers, |layer, spec| {
        let name = tensor_name(a, layer, spec.name);
        params.get(&name).cloned().ok_or_else(|| Error::new(Kind::Unexpected, format!("`{name}` was not read")))
    })?;
    if layers.is_empty() {
        let message = format!("no layer has a tensor `{}`", first.name);
        return Err(Error::new(Kind::Checkpoint, message).hint("give the `_distill.pt` file too"));
    }
    tracing::debug!("feature maps in layers {}", plan::ranges(&layers));
    Ok((net, layers))
}
