//! Writes the converted model as a self-contained Hugging Face folder.
//!
//! Kept tensors are copied byte for byte from the source under their own names, merged ones are rounded once to the
//! source's precision, new ones stand beside them in f32. `config.json` says every number that shapes the model.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::load::{Linearization, Model};
use crate::checkpoint::writer::{self, Data, Entry, Written, write_atomic};
use crate::error::{Error, Kind, Result};
use crate::families::{Claim, Role};
use crate::model::{Decoder, Net};
use crate::progress::Progress;

/// `margay.json`: what an export is, where it came from, what it reached.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    pub margay: String,
    pub source: String,
    pub revision: Option<String>,
    /// The full recipe and the text it was read from.
    pub recipe: crate::recipe::Recipe,
    pub recipe_origin: String,
    pub data: Value,
    /// Layers converted and kept, tensors of each fate, and the dropped ones.
    #[serde(default)]
    pub plan: Value,
    pub seconds: f64,
    /// Outcome of each stage that ran, in order, with losses per layer.
    pub stages: Map<String, Value>,
    pub merged: Option<super::merge::Merged>,
    /// Type and shape of every tensor.
    pub tensors: BTreeMap<String, (String, Vec<usize>)>,
    pub files: Vec<FileRow>,
    /// A prompt and what the converted model in memory answered, to check a reopened one against.
    pub reference: Option<Reference>,
    pub verify: Option<Value>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FileRow {
    pub file: String,
    pub bytes: u64,
    pub sha256: String,
}

/// Logits of the last position of a prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    pub ids: Vec<u32>,
    /// The most likely tokens and their logits.
    pub top: Vec<(u32, f32)>,
}

impl Manifest {
    pub const FILE: &'static str = "margay.json";

    /// The manifest of an exported folder, `None` where there is none.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(Self::FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("read", &path, e)),
        };
        serde_json::from_slice(&text).map(Some).map_err(|e| {
            Error::new(Kind::Checkpoint, format!("`{}`: {e}", path.display())).hint("written by another version?")
        })
    }

    pub fn write(&self, dir: &Path) -> Result<()> {
        write_atomic(&dir.join(Self::FILE), &pretty(&json!(self)))
    }
}

/// Logits of a model for a prompt, as [`Reference`] keeps them.
pub fn reference(decoder: &Decoder, net: &Net, ids: &[u32]) -> Result<Reference> {
    let hidden = decoder.hidden(&Tensor::new(ids, &decoder.device)?.unsqueeze(0)?, net)?;
    let last = hidden.narrow(1, ids.len() - 1, 1)?.flatten(0, 1)?.contiguous()?;
    let logits = decoder.logits(&last)?.squeeze(0)?.to_vec1::<f32>()?;
    let mut top: Vec<(u32, f32)> = logits.iter().enumerate().map(|(i, z)| (i as u32, *z)).collect();
    top.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    top.truncate(16);
    Ok(Reference { ids: ids.to_vec(), top })
}

/// What an export is made from.
pub struct Parts<'a> {
    /// The source.
    pub model: &'a Model,
    /// The weights after merging.
    pub decoder: &'a Decoder,
    pub student: &'a Net,
    /// Names of the weights that carry folded adapters.
    pub merged: &'a [String],
}

/// Writes shards, configuration and side files into `dir`; the manifest comes later, with the verify table.
pub fn export(
    parts: &Parts,
    linearization: Option<&Linearization>,
    max_shard_bytes: u64,
    dir: &Path,
    progress: &dyn Progress,
) -> Result<Vec<FileRow>> {
    let Parts { model, decoder, student, merged } = *parts;
    let checkpoint = &model.checkpoint;
    let headers = checkpoint.headers();
    let mut entries = Vec::new();
    for (name, claim) in &model.description.claims {
        if matches!(claim, Claim::Dropped | Claim::Mixer) {
            continue;
        }
        let info = headers.info(name)?;
        let data = match claim {
            Claim::Reads(Role::Weight(layer, p)) if merged.contains(name) => {
                let (layer, p, dtype) = (*layer, *p, info.dtype);
                Data::Lazy(Box::new(move || {
                    writer::tensor_bytes(&decoder.block(layer).stored(&decoder.architecture, p)?, dtype)
                }))
            }
            _ => Data::Bytes(checkpoint.bytes(name)?),
        };
        entries.push(Entry { name: name.clone(), dtype: info.dtype, shape: info.shape.clone(), data });
    }
    for param in student.mixers.iter().flat_map(|m| m.params()) {
        let tensor = param.var.as_tensor().to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let shape = tensor.dims().to_vec();
        let data = Data::Lazy(Box::new(move || writer::tensor_bytes(&tensor, Dtype::F32)));
        entries.push(Entry { name: param.name.clone(), dtype: Dtype::F32, shape, data });
    }
    entries.sort_by_key(|e| natural(&e.name));

    std::fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, e))?;
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let written = writer::write_sharded(dir, entries, max_shard_bytes, &metadata, progress)?;
    let mut files: Vec<FileRow> = written.into_iter().map(row).collect();
    let mut put = |name: &str, bytes: &[u8]| -> Result<()> {
        write_atomic(&dir.join(name), bytes)?;
        files.push(describe(name, bytes));
        Ok(())
    };
    put("config.json", &config(model, linearization)?)?;
    let mut generation = false;
    for path in checkpoint.side_files() {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        generation |= name == "generation_config.json";
        put(&name, &std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?)?;
    }
    if !generation {
        put("generation_config.json", &generation_config(headers.config.object()))?;
    }
    Ok(files)
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

/// The source's configuration with what changed: the very file where no layer was converted.
fn config(model: &Model, linearization: Option<&Linearization>) -> Result<Vec<u8>> {
    let checkpoint = &model.checkpoint;
    let Some(l) = linearization else {
        let path = checkpoint.dir().join("config.json");
        return std::fs::read(&path).map_err(|e| Error::io("read", &path, e));
    };
    let mut config = checkpoint.headers().config.object().clone();
    config.insert("architectures".into(), json!(["MargayForCausalLM"]));
    config.insert("model_type".into(), json!("margay"));
    config.insert("linearization".into(), json!(l));
    Ok(pretty(&Value::Object(config)))
}

/// Only what generation needs to know, from the model's own configuration.
fn generation_config(config: &Map<String, Value>) -> Vec<u8> {
    let keys = ["bos_token_id", "eos_token_id", "pad_token_id"];
    let known = keys.into_iter().filter_map(|k| config.get(k).filter(|v| !v.is_null()).map(|v| (k.into(), v.clone())));
    pretty(&Value::Object(known.collect()))
}
