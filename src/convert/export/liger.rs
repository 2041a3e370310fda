//! A folder of the [official Liger code](crate::convert::liger), in the words of the transformers it runs with (4.47).

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{FileRow, Shape, base_entries, create, pretty, put, row};
use crate::checkpoint::writer;
use crate::convert::liger;
use crate::convert::load::{Linearization, Model};
use crate::error::{Error, Result};
use crate::progress::Progress;

/// Writes the export `model`; a mixer that is not exactly one of Liger's is refused.
pub(super) fn write(
    model: &Model,
    linearization: &Linearization,
    shape: &Shape,
    dir: &Path,
    progress: &dyn Progress,
) -> Result<Vec<FileRow>> {
    let (class, pool) = liger::class(linearization, model.architecture())?;
    create(dir)?;
    let mut entries = base_entries(model, shape.dtype)?;
    entries.sort_by_key(|e| super::natural(&e.name));
    let metadata = [("format".to_string(), "pt".to_string())].into();
    let written = writer::write_sharded(dir, entries, shape.max_shard_bytes, &metadata, progress)?;
    let mut files: Vec<FileRow> = written.into_iter().map(row).collect();
    let mut config = model.checkpoint.config.object().clone();
    for ours in ["linearization", "auto_map"] {
        config.remove(ours);
    }
    older(&mut config);
    config.insert("_name_or_path".into(), json!(linearization.teacher));
    config.insert("model_type".into(), json!(class.model_type));
    config.insert("architectures".into(), json!([class.architecture]));
    config.insert("pool_size".into(), json!(pool));
    if let Some(dtype) = shape.dtype {
        config.insert("torch_dtype".into(), json!(super::torch_name(dtype)));
    }
    files.push(put(dir, "config.json", &pretty(&Value::Object(config)))?);
    for path in model.checkpoint.side_files() {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        files.push(put(dir, &name, &std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?)?);
    }
    Ok(files)
}

/// Keys that transformers 5 spells anew, as it did before: unknown ones are passed over in silence there, and a rotation
/// would be the default one.
fn older(config: &mut Map<String, Value>) {
    if let Some(dtype) = config.remove("dtype") {
        config.entry("torch_dtype").or_insert(dtype);
    }
    if let Some(Value::Object(mut rope)) = config.remove("rope_parameters") {
        if let Some(theta) = rope.remove("rope_theta") {
            config.insert("rope_theta".into(), theta);
        }
        let plain = rope.get("rope_type").is_none_or(|kind| kind == "default");
        config.insert("rope_scaling".into(), if plain { Value::Null } else { Value::Object(rope) });
    }
}
