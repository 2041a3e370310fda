//! An export rewritten for another program.

use std::path::Path;

use super::{FileRow, Manifest, Shape, adapter, base_entries, describe, gguf, liger, lolcats, put};
use crate::checkpoint::writer::{Data, Entry};
use crate::convert::load::{Linearization, Model};
use crate::error::{Error, Kind, Result};
use crate::families::Claim;
use crate::progress::Progress;

pub use super::gguf::is_file as is_gguf;

/// What to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A folder that transformers loads, as every conversion writes it.
    Transformers,
    /// What changed of the base model: LoRA as a PEFT folder, and the mixers.
    Adapter,
    /// Checkpoints of the official LoLCATs code: `_distill.pt` and `_ft.pt`.
    Lolcats,
    /// A folder of the official Liger code.
    Liger,
    /// One file for llama.cpp, of a model without converted layers.
    Gguf,
}

impl Format {
    pub const ALL: [(&'static str, Format); 5] = [
        ("transformers", Format::Transformers),
        ("adapter", Format::Adapter),
        ("lolcats", Format::Lolcats),
        ("liger", Format::Liger),
        ("gguf", Format::Gguf),
    ];
}

/// Writes `model` into the new folder `out`: a converted one, but for GGUF, where `out` may be a file too.
pub fn write(
    model: &Model,
    format: Format,
    shape: &Shape,
    out: &Path,
    progress: &dyn Progress,
) -> Result<Vec<FileRow>> {
    let converted = || {
        model.description.linearization.as_ref().ok_or_else(|| {
            let message = format!("`{}` is not a converted model", model.checkpoint.source.id);
            Error::new(Kind::Usage, message).hint("give a folder that `margay convert` wrote")
        })
    };
    match format {
        Format::Transformers => whole(model, converted()?, shape, out, progress),
        Format::Adapter => adapter::write(model, converted()?, shape, out, progress),
        Format::Lolcats => lolcats::write(model, converted()?, out),
        Format::Liger => liger::write(model, converted()?, shape, out, progress),
        Format::Gguf => gguf::write(model, shape, out, progress),
    }
}

/// The whole model, with its manifest, card and log.
fn whole(
    model: &Model,
    linearization: &Linearization,
    shape: &Shape,
    dir: &Path,
    progress: &dyn Progress,
) -> Result<Vec<FileRow>> {
    let checkpoint = &model.checkpoint;
    let mut entries = base_entries(model, shape.dtype)?;
    for (name, _) in model.description.claims.iter().filter(|(_, c)| matches!(c, Claim::Mixer)) {
        let info = checkpoint.info(name)?;
        let data = Data::Bytes(checkpoint.bytes(name)?);
        entries.push(Entry { name: name.clone(), dtype: info.dtype, shape: info.shape.clone(), data });
    }
    let tensors = entries.iter().map(|e| (e.name.clone(), (format!("{:?}", e.dtype), e.shape.clone()))).collect();
    let mut files = super::folder(model, Some(linearization), entries, shape, dir, progress)?;
    let old = Manifest::read(checkpoint.dir())?;
    for FileRow { file: name, .. } in old.iter().flat_map(|m| &m.files) {
        let path = checkpoint.dir().join(name);
        // What was not written anew, but for the old weights.
        if path.is_file() && !files.iter().any(|f| f.file == *name) && !is_weights(name) {
            if let Some(parent) = dir.join(name).parent() {
                super::create(parent)?;
            }
            files.push(put(dir, name, &std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?)?);
        }
    }
    if let Some(old) = old {
        Manifest { tensors, files: files.clone(), ..old }.write(dir)?;
        let bytes = std::fs::read(dir.join(Manifest::FILE)).map_err(|e| Error::io("read", dir, e))?;
        files.push(describe(Manifest::FILE, &bytes));
    }
    Ok(files)
}

fn is_weights(name: &str) -> bool {
    !name.contains('/') && (name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json"))
}
