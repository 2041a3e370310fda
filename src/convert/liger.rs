//! Folders of the official Liger code (github.com/OpenSparseLLMs/Linearization): the base model's tensors under their own
//! names, since its mixers have none, and a `config.json` that names its classes. Such a folder is a converted model here.

use super::load::Linearization;
use crate::checkpoint::config::Config;
use crate::error::{Error, Kind, Result};
use crate::families::{Architecture, RopeScaling};
use crate::mixers::gla::Normalise;
use crate::mixers::hgrn2::QueryMap;
use crate::mixers::parts::beside::Beside;
use crate::mixers::parts::gate::{Gate, GateKind};
use crate::mixers::parts::maps::FeatureMap;
use crate::mixers::parts::output::Output;
use crate::recipe::{Mixer, Recipe};

/// A class of the official code.
pub struct Class {
    pub model_type: &'static str,
    pub architecture: &'static str,
    /// `model_type` of the base model, and the class it had.
    base: [&'static str; 2],
    /// The mixer, as in the recipes `llama/liger-…`.
    kind: &'static str,
}

const LLAMA: [&str; 2] = ["llama", "LlamaForCausalLM"];
const CLASSES: [Class; 5] = [
    Class { model_type: "liger_gla", architecture: "LigerGLAForCausalLM", base: LLAMA, kind: "gla" },
    Class { model_type: "liger_gsa", architecture: "LigerGSAForCausalLM", base: LLAMA, kind: "gsa" },
    Class { model_type: "liger_hgrn2", architecture: "LigerHGRN2ForCausalLM", base: LLAMA, kind: "hgrn2" },
    Class {
        model_type: "liger_mistral_gla",
        architecture: "LigerMistralGLAForCausalLM",
        base: ["mistral", "MistralForCausalLM"],
        kind: "gla",
    },
    Class {
        model_type: "liger_qwen2_gla",
        architecture: "LigerQwen2GLAForCausalLM",
        base: ["qwen2", "Qwen2ForCausalLM"],
        kind: "gla",
    },
];

/// Keys of its window: its 64 is 65, the own key not counted, in versions of transformers up to its time.
const WINDOWS: [usize; 2] = [64, 65];
/// What window and linear branch weigh.
const HALF: f64 = 0.5;
/// `pool_size` where a configuration has none.
const POOL: usize = 64;

/// What a `config.json` of the official code describes, `None` where it is of another program.
pub fn read(config: &Config) -> Result<Option<Linearization>> {
    let named = config.architectures()?;
    let Some(class) = CLASSES.iter().find(|class| named.contains(&class.architecture)) else { return Ok(None) };
    let slots = match class.kind {
        "gsa" => vec![format!("mixer.slots={}", config.opt_usize("pool_size")?.unwrap_or(POOL))],
        _ => Vec::new(),
    };
    let [base, architecture] = class.base.map(String::from);
    Ok(Some(Linearization {
        format_version: Linearization::FORMAT,
        base_model_type: base,
        base_architectures: vec![architecture],
        layers: (0..config.usize("num_hidden_layers")?).collect(),
        mixer: Recipe::load(&format!("llama/liger-{}", class.kind), &slots)?.recipe.mixer,
        teacher: config.opt_str("_name_or_path")?.unwrap_or_default().into(),
        teacher_revision: None,
    }))
}

/// The class that computes what a converted model does, and its `pool_size`; else an error says what the code lacks.
pub fn class(linearization: &Linearization, a: &Architecture) -> Result<(&'static Class, usize)> {
    let refuse = |what: String| Error::new(Kind::Usage, format!("the official Liger code has no {what}"));
    let (kind, pool) = variant(&linearization.mixer, a)
        .map_err(|what| refuse(what).hint("it has what the recipes llama/liger-gla, liger-gsa and liger-hgrn2 make"))?;
    let class = CLASSES.iter().find(|class| class.base[0] == a.family && class.kind == kind);
    let class = class.ok_or_else(|| refuse(format!("{kind} for `{}`", a.family)))?;
    if linearization.layers.len() != a.layers {
        return Err(refuse("way to say which layers stay softmax in this class".into())
            .hint("convert all layers, or use `--to transformers`"));
    }
    // Its attention has projections of its own, and for Mistral a rotation.
    if a.qkv_bias != (a.family == "qwen2") || a.o_bias {
        return Err(refuse(format!("`{}` with these biases of attention", a.family)));
    }
    if a.family == "qwen2" && a.heads * a.head_dim != a.hidden {
        return Err(refuse("`head_dim` in Qwen2's configuration".into()));
    }
    if a.family == "mistral" && a.ropes.iter().any(|rope| rope.scaling != RopeScaling::None) {
        return Err(refuse("scaled rotation for `mistral`".into()));
    }
    Ok((class, pool))
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
    .ok_or_else(|| format!("`{}` attention with these settings", mixer.design().name()))?;
    let fixed =
        |w: &Beside| WINDOWS.contains(&w.size) && w.weight == HALF && w.linear_weight == HALF && !w.learn && !w.gate;
    match fixed(window) && output == &Output::default() {
        true => Ok(found),
        false => Err("window or output gate other than 64 or 65 keys, half and half, and none".into()),
    }
}
