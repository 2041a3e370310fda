//! Writes the converted model as a self-contained Hugging Face folder.
//!
//! Kept tensors are copied byte for byte from the source under their own names, merged ones are rounded once to the
//! source's precision, new ones stand beside them in f32. `config.json` says every number that shapes the model, and names
//! the two Python files beside it, through which transformers loads the folder.
//!
//! [`formats`] writes the same for other programs.

pub mod adapter;
pub mod formats;
mod gguf;
mod liger;
pub mod lolcats;
mod manifest;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::load::{Linearization, Model};
use crate::checkpoint::writer::{self, Data, Entry, Written, write_atomic};
use crate::error::{Error, Result};
use crate::families::{Claim, Role};
use crate::model::{Decoder, Net};
use crate::progress::Progress;

pub use manifest::{FileRow, Manifest, Reference, reference};

/// What an export is made from.
pub struct Parts<'a> {
    /// The source.
    pub model: &'a Model,
    /// The weights after merging.
    pub decoder: &'a Decoder,
    pub student: &'a Net,
    /// Names of the tensors that changes were folded into.
    pub merged: &'a [String],
}

/// How a folder is written.
pub struct Shape {
    /// Tensors of the base model are rounded to this, `None` leaves them as they are.
    pub dtype: Option<Dtype>,
    pub max_shard_bytes: u64,
}

/// Writes shards, configuration and side files into `dir`; the manifest comes later, with the verify table.
pub fn export(
    parts: &Parts,
    linearization: Option<&Linearization>,
    shape: &Shape,
    dir: &Path,
    progress: &dyn Progress,
) -> Result<Vec<FileRow>> {
    let Parts { model, decoder, student, merged } = *parts;
    let mut entries = base_entries(model, shape.dtype)?;
    if merged.contains(&model.description.name(Role::Embedding)) {
        // A second spelling of it would be the old one.
        entries.retain(|e| model.description.claims.get(&e.name) != Some(&Claim::Tied));
    }
    for entry in entries.iter_mut().filter(|e| merged.contains(&e.name)) {
        if let Some(Claim::Reads(role)) = model.description.claims.get(&entry.name) {
            let (role, dtype) = (*role, entry.dtype);
            entry.data = Data::Lazy(Box::new(move || writer::tensor_bytes(&decoder.stored(role)?, dtype)));
        }
    }
    for param in student.mixers.iter().flat_map(|m| m.params()) {
        let tensor = param.var.as_tensor().to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let shape = tensor.dims().to_vec();
        let data = Data::Lazy(Box::new(move || writer::tensor_bytes(&tensor, Dtype::F32)));
        entries.push(Entry { name: param.name.clone(), dtype: Dtype::F32, shape, data });
    }
    folder(model, linearization, entries, shape, dir, progress)
}

/// The tensors of the base model under their own names.
fn base_entries(model: &Model, dtype: Option<Dtype>) -> Result<Vec<Entry<'_>>> {
    let checkpoint = &model.checkpoint;
    let claims = model.description.claims.iter().filter(|(_, c)| !matches!(c, Claim::Dropped | Claim::Mixer));
    let entry = |(name, _): (&'_ String, &Claim)| {
        let info = checkpoint.info(name)?;
        let dtype = dtype.unwrap_or(info.dtype);
        let data = if dtype == info.dtype {
            Data::Bytes(checkpoint.bytes(name)?)
        } else {
            let (name, wide) = (name.clone(), DType::try_from(info.dtype)?);
            Data::Lazy(Box::new(move || writer::tensor_bytes(&checkpoint.tensor(&name, wide, &Device::Cpu)?, dtype)))
        };
        Ok(Entry { name: name.clone(), dtype, shape: info.shape.clone(), data })
    };
    claims.map(entry).collect()
}

/// Writes tensors, `config.json`, the Python files and the side files of `model` into `dir`.
fn folder(
    model: &Model,
    linearization: Option<&Linearization>,
    mut entries: Vec<Entry>,
    shape: &Shape,
    dir: &Path,
    progress: &dyn Progress,
) -> Result<Vec<FileRow>> {
    let checkpoint = &model.checkpoint;
    entries.sort_by_key(|e| natural(&e.name));
    create(dir)?;
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let written = writer::write_sharded(dir, entries, shape.max_shard_bytes, &metadata, progress)?;
    let mut files: Vec<FileRow> = written.into_iter().map(row).collect();
    files.push(put(dir, "config.json", &config(model, linearization, shape.dtype)?)?);
    if linearization.is_some() {
        files.extend(python(dir)?);
    }
    let mut generation = false;
    for path in checkpoint.side_files() {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        generation |= name == "generation_config.json";
        files.push(put(dir, &name, &std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?)?);
    }
    if !generation {
        files.push(put(dir, "generation_config.json", &generation_config(checkpoint.config.object()))?);
    }
    Ok(files)
}

/// The folder `dir`, made where it is not there.
fn create(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, e))
}

/// Writes one file of an export.
fn put(dir: &Path, name: &str, bytes: &[u8]) -> Result<FileRow> {
    write_atomic(&dir.join(name), bytes)?;
    Ok(describe(name, bytes))
}

/// Writes the model in PyTorch.
fn python(dir: &Path) -> Result<Vec<FileRow>> {
    PYTHON.into_iter().map(|(name, text)| put(dir, name, text.as_bytes())).collect()
}

pub(super) fn describe(name: &str, bytes: &[u8]) -> FileRow {
    use sha2::{Digest, Sha256};
    let sha256 = writer::hex(&Sha256::digest(bytes));
    FileRow { file: name.into(), bytes: bytes.len() as u64, sha256 }
}

fn row(w: Written) -> FileRow {
    FileRow { file: w.file, bytes: w.bytes, sha256: w.sha256 }
}

/// Layer 2 before layer 10.
fn natural(name: &str) -> Vec<(u64, String)> {
    name.split('.').map(|part| (part.parse().unwrap_or(0), part.to_string())).collect()
}

fn pretty(value: &Value) -> Vec<u8> {
    let mut text = format!("{value:#}").into_bytes();
    text.push(b'\n');
    text
}

/// The source's configuration with what changed: the very file where nothing did.
fn config(model: &Model, linearization: Option<&Linearization>, dtype: Option<Dtype>) -> Result<Vec<u8>> {
    let checkpoint = &model.checkpoint;
    let mut config = checkpoint.config.object().clone();
    match dtype {
        Some(dtype) => {
            config.remove("torch_dtype");
            config.insert("dtype".into(), json!(torch_name(dtype)));
        }
        None if linearization.is_none() => {
            let path = checkpoint.dir().join("config.json");
            return std::fs::read(&path).map_err(|e| Error::io("read", &path, e));
        }
        None => {}
    }
    if let Some(l) = linearization {
        config.insert("architectures".into(), json!(["MargayForCausalLM"]));
        config.insert("model_type".into(), json!("margay"));
        config.insert("auto_map".into(), json!(AUTO_MAP.into_iter().collect::<BTreeMap<_, _>>()));
        let architecture = model.architecture();
        let tensors = l.mixer.design().specs(architecture).into_iter().map(|s| (s.name, s.shape));
        let mut linearization = json!(l);
        linearization["tensors"] = json!(tensors.collect::<BTreeMap<_, _>>());
        linearization["norm_eps"] = json!(architecture.norm_eps);
        config.insert("linearization".into(), linearization);
    }
    Ok(pretty(&Value::Object(config)))
}

/// A type as PyTorch calls it.
fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    }
}

/// The model in PyTorch, for transformers: the same for every family and mixer.
const PYTHON: [(&str, &str); 2] = [
    ("configuration_margay.py", include_str!("configuration_margay.py")),
    ("modeling_margay.py", include_str!("modeling_margay.py")),
];

/// Which class of them is which, as transformers looks it up.
const AUTO_MAP: [(&str, &str); 2] = [
    ("AutoConfig", "configuration_margay.MargayConfig"),
    ("AutoModelForCausalLM", "modeling_margay.MargayForCausalLM"),
];

/// Only what generation needs to know, from the model's own configuration.
fn generation_config(config: &Map<String, Value>) -> Vec<u8> {
    let keys = ["bos_token_id", "eos_token_id", "pad_token_id"];
    let known = keys.into_iter().filter_map(|k| config.get(k).filter(|v| !v.is_null()).map(|v| (k.into(), v.clone())));
    pretty(&Value::Object(known.collect()))
}
