//! A recipe: everything that shapes a conversion, as one typed TOML file.
//!
//! A file states only what differs from the defaults below or from the recipe it `extends`. Unknown keys are refused,
//! all problems at once. `margay recipe show` prints the full result.
//!
//! The doc comments, ranges and lists of this file are the JSON Schema of a recipe, and that schema is what
//! [`Recipe::load`] checks a file against and what [`Recipe::to_toml`] takes its comments from: a key is described here
//! and nowhere else.

mod check;
mod layers;
mod load;
mod show;
mod source;
mod stage;

use std::collections::BTreeMap;

pub use layers::{Best, By, Every, Keep, KeepBest, Layers, Word};
pub use load::Loaded;
pub use show::schema;
pub use source::{Shipped, list, shipped};
pub use stage::{Direction, Kl, Lora, Loss, Optimizer, RESERVED, Schedule, Stage};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::families::Architecture;

/// The full recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// One line for `recipe list` and the model card.
    pub about: String,
    /// The checkpoint the recipe was written for.
    pub base: Base,
    /// Seed of everything random; a stage may have its own.
    pub seed: u64,
    /// Which layers are converted: `"all"`, a list of indices, or those that stay softmax: `{ keep = [...] }`, the last of
    /// each group with `{ every = 4 }`, or those that need it most with `{ keep_best = { count = 2 } }`.
    pub layers: Layers,
    /// What replaces softmax attention: `kind` names a mixer, the other keys are its own.
    pub mixer: Mixer,
    /// Text for training and validation.
    pub data: Data,
    /// The training stages that run, in this order: names of the tables `[stage.<name>]`.
    pub stages: Vec<String>,
    /// Every training stage by its name; a table that `stages` does not name is not used.
    pub stage: BTreeMap<String, Stage>,
    /// The folder that is written.
    pub export: Export,
    /// How the export is measured.
    pub verify: Verify,
}

/// The checkpoint a recipe was written for; `convert` warns when another is given.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Base {
    /// Hub id, `org/name`.
    pub repo: Option<String>,
    /// Commit, branch or tag.
    pub revision: Option<String>,
}

/// What replaces softmax attention: `kind` names a mixer, the other keys are its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Mixer {
    /// Learned feature maps beside a softmax window, one shared denominator (arXiv 2410.10254).
    Lolcats(crate::mixers::lolcats::Config),
    /// Softmax window with sinks and gated linear attention behind it, one denominator (after arXiv 2507.09025).
    Lizard(crate::mixers::lizard::Config),
    /// Lizard as published: both branches normalised alone, nothing rotated (arXiv 2507.09025).
    LizardPaper(crate::mixers::lizard_paper::Config),
    /// Short convolution, Hedgehog features, GLA decay, normalised (arXiv 2509.18467).
    Lawcat(crate::mixers::lawcat::Config),
    /// Linear attention with a decaying state: GLA, simple GLA, RetNet, lightning, Liger-GLA (arXiv 2312.06635).
    Gla(crate::mixers::gla::Config),
    /// Gated linear attention whose keys are what its gates let go (arXiv 2404.07904).
    Hgrn2(crate::mixers::hgrn2::Config),
    /// Keys and values in a few gated slots (arXiv 2409.07146).
    Gsa(crate::mixers::gsa::Config),
    /// The delta rule: DeltaNet, gated DeltaNet, Kimi delta attention (arXiv 2406.06484, 2412.06464, 2510.26692).
    Delta(crate::mixers::delta::Config),
    /// Mamba-2 started from attention (arXiv 2405.21060).
    Mamba2(crate::mixers::mamba2::Config),
    /// Magnitude-aware linear attention, causal (arXiv 2507.00698).
    Mala(crate::mixers::mala::Config),
    /// Rank-augmented linear attention, causal (arXiv 2411.07635).
    Rala(crate::mixers::rala::Config),
}

/// Text for training and validation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Data {
    /// Files, globs, folders or hub data set ids; `--data` replaces them.
    pub sources: Vec<String>,
    /// Field of JSONL and Parquet rows that holds the text.
    #[schemars(length(min = 1))]
    pub field: String,
    /// How rows become text.
    pub format: Format,
    /// In Alpaca rows and conversations, train on the answers only.
    pub mask_prompt: bool,
    /// Text to measure on, read like `sources`, which then train as a whole; without it a share of them is held back.
    pub held_out: Vec<String>,
    /// Share of the packed rows held back for validation, where `held_out` names no text.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub validation: f64,
    /// At most this many validation tokens are used at each evaluation.
    #[schemars(range(min = 1))]
    pub validation_tokens: usize,
    /// Token put before each document: `auto` does what the tokenizer does.
    pub bos: Join,
    /// Token put after each document: `auto` adds it when no BOS separates documents.
    pub eos: Join,
    /// Seed of the split; defaults to the recipe's.
    pub seed: Option<u64>,
}

/// How rows become text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// By file name and content: `.txt`/`.md` text, the rows of `.jsonl`, `.json` and `.parquet` by their fields.
    Auto,
    Text,
    Alpaca,
    /// Rows with `messages` (`role`, `content`) or `conversations` (`from`, `value`), by the model's chat template.
    Chat,
}

/// Whether a token is put between documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Join {
    Auto,
    Always,
    Never,
}

/// The folder that is written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// Largest shard, such as `5GB` or `500MB` (powers of ten; `GiB` and `MiB` are powers of two).
    #[schemars(extend("format" = "bytes"))]
    pub max_shard_size: String,
}

/// How the export is measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Verify {
    /// Tokens of the validation split used for perplexity and agreement.
    #[schemars(range(min = 1))]
    pub tokens: usize,
    /// Contexts at which speed and state are measured.
    #[schemars(inner(range(min = 1)))]
    pub contexts: Vec<usize>,
}

impl Default for Recipe {
    fn default() -> Self {
        Recipe {
            about: String::new(),
            base: Base::default(),
            seed: 0,
            layers: Layers::Word(Word::All),
            mixer: Mixer::Lolcats(Default::default()),
            data: Data::default(),
            stages: ["transfer", "recover"].map(String::from).to_vec(),
            stage: [("transfer", Stage::transfer()), ("recover", Stage::recover())]
                .map(|(name, stage)| (name.to_string(), stage))
                .into(),
            export: Export::default(),
            verify: Verify::default(),
        }
    }
}

impl Default for Data {
    fn default() -> Self {
        Data {
            sources: Vec::new(),
            held_out: Vec::new(),
            field: "text".into(),
            format: Format::Auto,
            mask_prompt: true,
            validation: 0.02,
            validation_tokens: 32_768,
            bos: Join::Auto,
            eos: Join::Auto,
            seed: None,
        }
    }
}

impl Default for Export {
    fn default() -> Self {
        Export { max_shard_size: "5GB".into() }
    }
}

impl Default for Verify {
    fn default() -> Self {
        Verify { tokens: 32_768, contexts: vec![1024, 8192] }
    }
}

impl Mixer {
    /// The mixer's own view of its keys.
    pub fn design(&self) -> &dyn crate::mixers::Design {
        match self {
            Mixer::Lolcats(config) => config,
            Mixer::Lizard(config) => config,
            Mixer::LizardPaper(config) => config,
            Mixer::Lawcat(config) => config,
            Mixer::Gla(config) => config,
            Mixer::Hgrn2(config) => config,
            Mixer::Gsa(config) => config,
            Mixer::Delta(config) => config,
            Mixer::Mamba2(config) => config,
            Mixer::Mala(config) => config,
            Mixer::Rala(config) => config,
        }
    }
}

impl Export {
    /// Bytes of the largest shard. Errors: the text is not a size.
    pub fn max_shard_bytes(&self) -> crate::Result<u64> {
        crate::checkpoint::writer::parse_size(&self.max_shard_size)
    }
}

impl Recipe {
    /// The recipe with no sequence longer than the positions a model was made for.
    pub fn within(&self, max_positions: usize) -> Recipe {
        let mut fitted = self.clone();
        for stage in fitted.stage.values_mut() {
            stage.seq_len = stage.seq_len.min(max_positions);
        }
        fitted
    }

    /// The stages that run, in order; a name without a table is left out, and refused where a recipe is loaded.
    pub fn in_order(&self) -> impl Iterator<Item = (&str, &Stage)> {
        self.stages.iter().filter_map(|name| self.stage.get(name).map(|stage| (name.as_str(), stage)))
    }

    /// [`Layers::converted`] of a model.
    pub fn converted(&self, architecture: &Architecture) -> Result<Vec<usize>, String> {
        self.layers.converted(architecture)
    }
}
