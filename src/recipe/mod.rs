//! A recipe: everything that shapes a conversion, as one typed TOML file.
//!
//! A file states only what differs from the defaults below or from the recipe it `extends`. Unknown keys are refused,
//! all problems at once. `margay recipe show` prints the full result.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
    /// Which layers are converted.
    pub layers: Layers,
    /// What replaces softmax attention.
    pub mixer: Mixer,
    pub data: Data,
    /// Stage 1: attention transfer, one layer at a time.
    pub transfer: Transfer,
    /// Stage 2: LoRA on the whole student.
    pub recover: Recover,
    pub export: Export,
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

/// `"all"`, a list of layer indices, or `{ keep = [...] }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Layers {
    All(All),
    /// These layers are converted, the others keep softmax.
    Only(Vec<usize>),
    /// These layers keep softmax, the others are converted.
    Keep(Keep),
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum All {
    All,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Keep {
    pub keep: Vec<usize>,
}

/// What replaces softmax attention: `kind` names a row of the mixer registry, the other keys are that mixer's own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Mixer {
    /// Learned feature maps beside a softmax window, one shared denominator (arXiv 2410.10254).
    Lolcats(crate::mixers::lolcats::Config),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Data {
    /// Files, globs, folders or hub data set ids; `--data` replaces them.
    pub sources: Vec<String>,
    /// Field of JSONL and Parquet rows that holds the text.
    pub field: String,
    /// How rows become text.
    pub format: Format,
    /// In Alpaca rows, train on the answer only.
    pub mask_prompt: bool,
    /// Share of the packed rows held back for validation.
    pub validation: f64,
    /// At most this many validation tokens are used at each evaluation.
    pub validation_tokens: usize,
    /// Token put before each document: `auto` does what the tokenizer does.
    pub bos: Join,
    /// Token put after each document: `auto` adds it when no BOS separates documents.
    pub eos: Join,
    /// Seed of the split and of the order of rows.
    pub seed: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// By file name and content: `.txt`/`.md` text, `.jsonl` by its fields, `.json` Alpaca, `.parquet`.
    Auto,
    Text,
    Alpaca,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Join {
    Auto,
    Always,
    Never,
}

/// Attention transfer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Transfer {
    /// Training tokens; 0 skips the stage.
    pub tokens: u64,
    /// Tokens per sequence.
    pub seq_len: usize,
    /// Sequences per optimiser step.
    pub batch: usize,
    /// Sequences at once; `batch` is reached by accumulation. 0 picks what fits.
    pub micro_batch: usize,
    pub lr: f64,
    /// Learning rate of window factors and other scalars; defaults to `lr`.
    pub lr_scalars: Option<f64>,
    pub optimizer: Optimizer,
    pub schedule: Schedule,
    /// Optimiser steps between evaluations.
    pub eval_every: usize,
    /// Weight of the mean squared error on per-head outputs, mean over layers.
    pub mse_weight: f64,
    /// Weight of the cross-entropy of attention weights (needs T x T weights: short sequences only).
    pub attention_ce_weight: f64,
    pub seed: Option<u64>,
}

/// LoRA recovery.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Recover {
    /// Training tokens; 0 skips the stage.
    pub tokens: u64,
    pub seq_len: usize,
    pub batch: usize,
    pub micro_batch: usize,
    pub lr: f64,
    /// Learning rate of the mixers' own parameters; 0 freezes them.
    pub lr_mixer: f64,
    pub optimizer: Optimizer,
    pub schedule: Schedule,
    pub eval_every: usize,
    /// Weight of next-token cross-entropy.
    pub ce_weight: f64,
    /// Weight of the forward KL to the teacher's logits; 0 runs no teacher.
    pub kl_weight: f64,
    pub lora: Lora,
    pub seed: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Lora {
    pub rank: usize,
    pub alpha: f64,
    pub dropout: f64,
    /// Projections by their checkpoint names.
    pub targets: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Optimizer {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 never clips.
    pub clip: f64,
}

/// How the learning rate moves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Schedule {
    Constant {
        /// Share of the steps spent warming up linearly.
        #[serde(default)]
        warmup: f64,
    },
    /// Cosine from the peak to `floor` x peak.
    Cosine {
        #[serde(default)]
        warmup: f64,
        #[serde(default)]
        floor: f64,
    },
    /// Lowered by `factor` when validation has not improved for more than `patience` evaluations.
    Plateau {
        #[serde(default = "Schedule::factor")]
        factor: f64,
        #[serde(default = "Schedule::patience")]
        patience: usize,
        #[serde(default = "Schedule::min_lr")]
        min_lr: f64,
        #[serde(default)]
        warmup: f64,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// Largest shard, such as `5GB` or `500MB`.
    pub max_shard_size: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Verify {
    /// Tokens of the validation split used for perplexity and agreement.
    pub tokens: usize,
    /// Contexts at which speed and state are measured.
    pub contexts: Vec<usize>,
}

impl Schedule {
    fn factor() -> f64 {
        0.1
    }
    fn patience() -> usize {
        10
    }
    fn min_lr() -> f64 {
        1e-5
    }
    pub fn plateau() -> Self {
        Schedule::Plateau { factor: 0.1, patience: 10, min_lr: 1e-5, warmup: 0.0 }
    }
}

impl Default for Recipe {
    fn default() -> Self {
        Recipe {
            about: String::new(),
            base: Base::default(),
            seed: 0,
            layers: Layers::All(All::All),
            mixer: Mixer::Lolcats(Default::default()),
            data: Data::default(),
            transfer: Transfer::default(),
            recover: Recover::default(),
            export: Export::default(),
            verify: Verify::default(),
        }
    }
}

impl Default for Data {
    fn default() -> Self {
        Data {
            sources: Vec::new(),
            field: "text".into(),
            format: Format::Auto,
            mask_prompt: true,
            validation: 0.02,
            validation_tokens: 65_536,
            bos: Join::Auto,
            eos: Join::Auto,
            seed: None,
        }
    }
}

impl Default for Optimizer {
    fn default() -> Self {
        Optimizer { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, clip: 1.0 }
    }
}

impl Default for Transfer {
    fn default() -> Self {
        Transfer {
            tokens: 20_000_000,
            seq_len: 1024,
            batch: 8,
            micro_batch: 0,
            lr: 1e-2,
            lr_scalars: None,
            optimizer: Optimizer::default(),
            schedule: Schedule::plateau(),
            eval_every: 100,
            mse_weight: 1000.0,
            attention_ce_weight: 0.0,
            seed: None,
        }
    }
}

impl Default for Recover {
    fn default() -> Self {
        Recover {
            tokens: 20_000_000,
            seq_len: 1024,
            batch: 8,
            micro_batch: 0,
            lr: 1e-4,
            lr_mixer: 0.0,
            optimizer: Optimizer::default(),
            schedule: Schedule::plateau(),
            eval_every: 100,
            ce_weight: 1.0,
            kl_weight: 0.0,
            lora: Lora::default(),
            seed: None,
        }
    }
}

impl Default for Lora {
    fn default() -> Self {
        Lora {
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            targets: ["q_proj", "k_proj", "v_proj", "o_proj"].map(String::from).to_vec(),
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
        Verify { tokens: 65_536, contexts: vec![1024, 8192] }
    }
}

impl Mixer {
    /// The mixer's own view of its keys.
    pub fn design(&self) -> &dyn crate::mixers::Design {
        match self {
            Mixer::Lolcats(config) => config,
        }
    }
}

impl Recipe {
    /// The layers of a model of `count` layers that are converted, ascending; layers out of range are an error text.
    pub fn converted(&self, count: usize) -> Result<Vec<usize>, String> {
        let listed: &[usize] = match &self.layers {
            Layers::All(_) => &[],
            Layers::Only(list) => list,
            Layers::Keep(keep) => &keep.keep,
        };
        if let Some(bad) = listed.iter().find(|l| **l >= count) {
            return Err(format!(
                "`layers` names layer {bad}, but the model has layers 0 to {}",
                count.saturating_sub(1)
            ));
        }
        let inside = |l: &usize| match &self.layers {
            Layers::All(_) => true,
            Layers::Only(list) => list.contains(l),
            Layers::Keep(keep) => !keep.keep.contains(l),
        };
        Ok((0..count).filter(inside).collect())
    }
}
