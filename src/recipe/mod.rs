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

pub use layers::{All, Best, By, Every, Keep, KeepBest, Layers};
pub use load::Loaded;
pub use show::schema;
pub use source::{Shipped, list, shipped};

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
    /// Which layers are converted: `"all"`, a list of indices, or those that stay softmax: `{ keep = [...] }`, the last of
    /// each group with `{ every = 4 }`, or those that need it most with `{ keep_best = { count = 2 } }`.
    pub layers: Layers,
    /// What replaces softmax attention: `kind` names a mixer, the other keys are its own.
    pub mixer: Mixer,
    /// Text for training and validation.
    pub data: Data,
    /// Stage 1: attention transfer, one layer at a time.
    pub transfer: Transfer,
    /// Stage 2: LoRA on the whole student.
    pub recover: Recover,
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
    /// In Alpaca rows, train on the answer only.
    pub mask_prompt: bool,
    /// Share of the packed rows held back for validation.
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
    /// By file name and content: `.txt`/`.md` text, `.jsonl` by its fields, `.json` Alpaca, `.parquet`.
    Auto,
    Text,
    Alpaca,
}

/// Whether a token is put between documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Join {
    Auto,
    Always,
    Never,
}

/// Stage 1: attention transfer, one layer at a time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Transfer {
    /// Training tokens; 0 skips the stage. Passes over the data repeat until they are reached.
    pub tokens: u64,
    /// At most this many passes over the training text, where that is fewer tokens.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub epochs: Option<f64>,
    /// Tokens per sequence.
    #[schemars(range(min = 2))]
    pub seq_len: usize,
    /// Sequences per optimiser step.
    #[schemars(range(min = 1))]
    pub batch: usize,
    /// Sequences at once; `batch` is reached by accumulation. 0 picks what fits.
    pub micro_batch: usize,
    /// Peak learning rate.
    #[schemars(range(min = 0.0))]
    pub lr: f64,
    /// Learning rate of window factors and other scalars; defaults to `lr`.
    #[schemars(range(min = 0.0))]
    pub lr_scalars: Option<f64>,
    /// AdamW.
    pub optimizer: Optimizer,
    /// How the learning rate moves.
    pub schedule: Schedule,
    /// Optimiser steps between evaluations.
    #[schemars(range(min = 1))]
    pub eval_every: usize,
    /// Weight of the mean squared error on per-head outputs, mean over layers.
    #[schemars(range(min = 0.0))]
    pub mse_weight: f64,
    /// Weight of the cross-entropy of attention weights (needs T x T weights: short sequences only).
    #[schemars(range(min = 0.0))]
    pub attention_ce_weight: f64,
    /// Seed of this stage; defaults to the recipe's.
    pub seed: Option<u64>,
}

/// Stage 2: LoRA on the whole student.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Recover {
    /// Training tokens; 0 skips the stage. Passes over the data repeat until they are reached.
    pub tokens: u64,
    /// At most this many passes over the training text, where that is fewer tokens.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub epochs: Option<f64>,
    /// Tokens per sequence.
    #[schemars(range(min = 2))]
    pub seq_len: usize,
    /// Sequences per optimiser step.
    #[schemars(range(min = 1))]
    pub batch: usize,
    /// Sequences at once; `batch` is reached by accumulation. 0 picks what fits.
    pub micro_batch: usize,
    /// Peak learning rate of the LoRA matrices.
    #[schemars(range(min = 0.0))]
    pub lr: f64,
    /// Learning rate of the mixers' own parameters; 0 freezes them.
    #[schemars(range(min = 0.0))]
    pub lr_mixer: f64,
    /// AdamW.
    pub optimizer: Optimizer,
    /// How the learning rate moves.
    pub schedule: Schedule,
    /// Optimiser steps between evaluations.
    #[schemars(range(min = 1))]
    pub eval_every: usize,
    /// Weight of next-token cross-entropy.
    #[schemars(range(min = 0.0))]
    pub ce_weight: f64,
    /// Weight of the forward KL to the teacher's logits; 0 runs no teacher.
    #[schemars(range(min = 0.0))]
    pub kl_weight: f64,
    /// Low-rank adapters, merged into their weights afterwards.
    pub lora: Lora,
    /// Seed of this stage; defaults to the recipe's.
    pub seed: Option<u64>,
}

/// Low-rank adapters: W + alpha / rank x B A.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Lora {
    /// Rows of A.
    #[schemars(range(min = 1))]
    pub rank: usize,
    /// The update weighs `alpha` / `rank`.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub alpha: f64,
    /// Share of the adapter's inputs dropped in training.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub dropout: f64,
    /// Projections by their checkpoint names.
    #[schemars(schema_with = "Lora::targets_schema")]
    pub targets: Vec<String>,
}

/// AdamW with decoupled decay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Optimizer {
    /// Decay of the mean of gradients.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub beta2: f64,
    /// Added to the root of the second moment.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub eps: f64,
    /// Decoupled weight decay.
    #[schemars(range(min = 0.0))]
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 never clips.
    #[schemars(range(min = 0.0))]
    pub clip: f64,
}

/// How the learning rate moves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Schedule {
    /// The peak, after warm-up.
    Constant {
        /// Share of the steps spent warming up linearly.
        #[serde(default)]
        #[schemars(range(min = 0.0, max = 1.0))]
        warmup: f64,
    },
    /// Cosine from the peak to `floor` x peak.
    Cosine {
        /// Share of the steps spent warming up linearly.
        #[serde(default)]
        #[schemars(range(min = 0.0, max = 1.0))]
        warmup: f64,
        /// The end, as a share of the peak.
        #[serde(default)]
        #[schemars(range(min = 0.0, max = 1.0))]
        floor: f64,
    },
    /// Lowered by `factor` when validation has not improved for more than `patience` evaluations.
    Plateau {
        /// What the learning rate is multiplied by.
        #[serde(default = "Schedule::factor")]
        #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
        factor: f64,
        /// Evaluations without improvement that are let pass.
        #[serde(default = "Schedule::patience")]
        patience: usize,
        /// Never below this.
        #[serde(default = "Schedule::min_lr")]
        #[schemars(range(min = 0.0))]
        min_lr: f64,
        /// Share of the steps spent warming up linearly.
        #[serde(default)]
        #[schemars(range(min = 0.0, max = 1.0))]
        warmup: f64,
    },
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
    /// The schedule of the LoLCATs code: a tenth after more than ten flat evaluations, down to 1e-5.
    pub fn plateau() -> Self {
        let (factor, patience, min_lr) = (Self::factor(), Self::patience(), Self::min_lr());
        Schedule::Plateau { factor, patience, min_lr, warmup: 0.0 }
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
            validation_tokens: 32_768,
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
            epochs: None,
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
            epochs: None,
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

/// Projections of a block that can carry an adapter, by their checkpoint names.
pub const LORA_TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

impl Lora {
    fn targets_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "array", "items": { "type": "string", "enum": LORA_TARGETS } })
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

impl Transfer {
    /// Tokens this stage trains on where one pass over the training text is `train_tokens`.
    pub fn budget(&self, train_tokens: u64) -> u64 {
        budget(self.tokens, self.epochs, train_tokens)
    }
}

impl Recover {
    /// Tokens this stage trains on where one pass over the training text is `train_tokens`.
    pub fn budget(&self, train_tokens: u64) -> u64 {
        budget(self.tokens, self.epochs, train_tokens)
    }
}

fn budget(tokens: u64, epochs: Option<f64>, train_tokens: u64) -> u64 {
    epochs.map_or(tokens, |epochs| tokens.min((epochs * train_tokens as f64) as u64))
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
        for seq_len in [&mut fitted.transfer.seq_len, &mut fitted.recover.seq_len] {
            *seq_len = (*seq_len).min(max_positions);
        }
        fitted
    }

    /// [`Layers::converted`] of a model of `count` layers.
    pub fn converted(&self, count: usize) -> Result<Vec<usize>, String> {
        self.layers.converted(count)
    }
}
