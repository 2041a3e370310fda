//! `margay.json`: what an export is, where it came from, what it reached.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::pretty;
use crate::checkpoint::writer::write_atomic;
use crate::error::{Error, Kind, Result};
use crate::model::{Decoder, Net};

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
    pub merged: Option<crate::convert::merge::Merged>,
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
    let logits = decoder.logits(&last, net)?.squeeze(0)?.to_vec1::<f32>()?;
    let mut top: Vec<(u32, f32)> = logits.iter().enumerate().map(|(i, z)| (i as u32, *z)).collect();
    top.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    top.truncate(16);
    Ok(Reference { ids: ids.to_vec(), top })
}
