//! A folder of the official Liger code (github.com/OpenSparseLLMs/Linearization): the base model's tensors under their own
//! names, since its mixers have none, and a `config.json` that names its classes.

use std::path::Path;

use serde_json::{Value, json};

use super::{FileRow, Shape, base_entries, create, pretty, put, row};
use crate::checkpoint::writer;
use crate::convert::load::{Linearization, Model};
use crate::error::{Error, Kind, Result};
use crate::families::Architecture;
use crate::mixers::gla::Normalise;
use crate::mixers::hgrn2::QueryMap;
use crate::mixers::parts::beside::Beside;
use crate::mixers::parts::gate::{Gate, GateKind};
use crate::mixers::parts::maps::FeatureMap;
use crate::mixers::parts::output::Output;
use crate::progress::Progress;
use crate::recipe::Mixer;

/// Keys of its window, and what window and linear branch weigh.
const WINDOW: usize = 64;
const HALF: f64 = 0.5;

/// Writes the export `model`; a mixer that is not exactly one of Liger's is refused.
pub(super) fn write(
    model: &Model,
    linearization: &Linearization,
    shape: &Shape,
    dir: &Path,
    progress: &dyn Progress,
) -> Result<Vec<FileRow>> {
    let a = model.architecture();
    let refuse = |what: String| Error::new(Kind::Usage, format!("the official Liger code has no {what}"));
    let (kind, pool) = variant(&linearization.mixer, a)
        .map_err(|what| refuse(what).hint("it has what the recipes llama/liger-gla, liger-gsa and liger-hgrn2 make"))?;
    // Its classes by base model: Llama has all three, Mistral GLA alone.
    let (model_type, class) = match (a.family, kind) {
        ("llama", "gla") => ("liger_gla", "LigerGLAForCausalLM"),
        ("llama", "gsa") => ("liger_gsa", "LigerGSAForCausalLM"),
        ("llama", "hgrn2") => ("liger_hgrn2", "LigerHGRN2ForCausalLM"),
        ("mistral", "gla") => ("liger_mistral_gla", "LigerMistralGLAForCausalLM"),
        (family, kind) => return Err(refuse(format!("{kind} for `{family}`"))),
    };
    if linearization.layers.len() != a.layers {
        return Err(refuse("way to say which layers stay softmax in this class".into())
            .hint("convert all layers, or use `--to transformers`"));
    }
    create(dir)?;
    let mut entries = base_entries(model, shape.dtype)?;
    entries.sort_by_key(|e| super::natural(&e.name));
    let written = writer::write_sharded(dir, entries, shape.max_shard_bytes, &Default::default(), progress)?;
    let mut files: Vec<FileRow> = written.into_iter().map(row).collect();
    let mut config = model.checkpoint.config.object().clone();
    for ours in ["linearization", "auto_map"] {
        config.remove(ours);
    }
    config.insert("model_type".into(), json!(model_type));
    config.insert("architectures".into(), json!([class]));
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

/// Which of Liger's variants a mixer is, and its channels per key head; else what it lacks.
fn variant(mixer: &Mixer, a: &Architecture) -> Result<(&'static str, usize), String> {
    let pooled = |gate: &Gate| gate.kind == GateKind::Pooled && gate.normaliser == 16.0;
    let (found, window, output) = match mixer {
        Mixer::Gla(c) => {
            let same = c.feature_map == FeatureMap::Softmax && c.normalise == Normalise::None && c.scale == 1.0;
            (same && !c.rotary && pooled(&c.gate)).then_some((("gla", a.head_dim), &c.window, &c.output))
        }
        Mixer::Gsa(c) => {
            let slots = if c.slots == 0 { a.head_dim } else { c.slots };
            let same = c.feature_map == FeatureMap::Identity && c.scale == 1.0;
            (same && pooled(&c.gate)).then_some((("gsa", slots), &c.window, &c.output))
        }
        Mixer::Hgrn2(c) => {
            let same = c.query_map == QueryMap::Softmax && !c.lower_bound;
            same.then_some((("hgrn2", a.head_dim), &c.window, &c.output))
        }
        _ => None,
    }
    .map(|(found, window, output)| (Some(found), Some(window), Some(output)))
    .unwrap_or_default();
    let fixed = |w: &Beside| w.size == WINDOW && w.weight == HALF && w.linear_weight == HALF && !w.learn;
    match found {
        Some(found) if window.is_some_and(fixed) && output == Some(&Output::default()) => Ok(found),
        Some(_) => Err("window or output gate other than 64 keys, half and half, and none".into()),
        None => Err(format!("`{}` attention with these settings", mixer.design().name())),
    }
}
