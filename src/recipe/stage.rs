//! One training stage: what it minimises, what it trains, on how much text and how fast.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Data;
use crate::families::{self, Projection};

/// Names a stage cannot have: its progress lies in a folder of its name, its quality in a table beside these forms.
pub const RESERVED: [&str; 13] = [
    "load", "plan", "swap", "select", "selected", "merge", "export", "verify", "teacher", "swapped", "exported",
    "finish", "lock",
];

/// A training stage. `transfer` and `recover` start as the two stages of LoLCATs, any other name as the defaults here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Stage {
    /// What trains: `mixer` (what the mixers added), `lora`, and weights in full: projections, and with a loss at the end
    /// of the student norms, embeddings and head, by the last word of their checkpoint names (`input_layernorm`, `norm`,
    /// `embed_tokens`, `lm_head`). What belongs to layers trains in the converted ones. Such a weight is the frozen one
    /// plus a change that starts at 0 and is kept over the stages; weight decay pulls the change to 0, the weight to the
    /// teacher's. A `lora` stage adds its own adapters. What an earlier stage trained and this one does not name stays as
    /// it is; all is merged at the end.
    #[schemars(schema_with = "train_schema")]
    pub train: Vec<String>,
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
    /// Peak learning rate of everything that has no rate of its own below.
    #[schemars(range(min = 0.0))]
    pub lr: f64,
    /// Peak learning rate of what the mixers added; defaults to `lr`.
    #[schemars(range(min = 0.0))]
    pub lr_mixer: Option<f64>,
    /// Peak learning rate of the mixers' gates, window factors and other scalars; defaults to `lr_mixer`.
    #[schemars(range(min = 0.0))]
    pub lr_scalars: Option<f64>,
    /// Peak learning rate of LoRA; defaults to `lr`.
    #[schemars(range(min = 0.0))]
    pub lr_lora: Option<f64>,
    /// Peak learning rate of projections, norms, embeddings and head that train in full; defaults to `lr`.
    #[schemars(range(min = 0.0))]
    pub lr_projections: Option<f64>,
    /// Optimiser steps between evaluations.
    #[schemars(range(min = 1))]
    pub eval_every: usize,
    /// Seed of this stage; defaults to the recipe's plus the stage's place in `stages`, from 0.
    pub seed: Option<u64>,
    /// Weights of the losses that are minimised together.
    pub loss: Loss,
    /// What `logit_kl` measures.
    pub kl: Kl,
    /// Low-rank adapters, where `train` has `lora`; merged into their weights at the end.
    pub lora: Lora,
    /// AdamW.
    pub optimizer: Optimizer,
    /// How the learning rate moves.
    pub schedule: Schedule,
    /// Text of this stage alone; keys that are not given are those of `[data]`. Quality is measured on `[data]`.
    pub data: Option<Data>,
}

/// Weights of losses, 0 for those that are not used. The first four are taken layer by layer: every converted layer sees
/// the teacher's hidden state, and no graph spans two layers. The other two are taken at the end of the whole student.
/// One stage has losses of one group.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Loss {
    /// Mean squared error of the heads' outputs before `o_proj`, mean over layers.
    #[schemars(range(min = 0.0))]
    pub output_mse: f64,
    /// Cross-entropy of attention weights, mean over layers (needs T x T weights: short sequences only).
    #[schemars(range(min = 0.0))]
    pub attention_ce: f64,
    /// Mean squared error of the attention's output after `o_proj`, mean over layers.
    #[schemars(range(min = 0.0))]
    pub hidden_mse: f64,
    /// Root of the mean square of a token's error after `o_proj`, mean over tokens and layers: tokens with huge norms
    /// weigh less than in `hidden_mse`.
    #[schemars(range(min = 0.0))]
    pub hidden_l2: f64,
    /// Divergence from the teacher's next-token distribution, see `kl`; runs the teacher too.
    #[schemars(range(min = 0.0))]
    pub logit_kl: f64,
    /// Cross-entropy of the next token of the text.
    #[schemars(range(min = 0.0))]
    pub next_token: f64,
}

/// The divergence between the next-token distributions of teacher and student.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Kl {
    /// `forward`: KL(teacher || student), covers all the teacher finds likely; `reverse`: KL(student || teacher), keeps to
    /// what it finds likely.
    pub direction: Direction,
    /// Both logits are divided by it and the divergence is multiplied by its square, which keeps the size of gradients.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub temperature: f64,
    /// Only the teacher's most likely tokens are told apart, all others count as one token; 0 tells all apart.
    pub top_k: usize,
}

/// Which of the two distributions weighs the divergence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    Forward,
    Reverse,
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
    /// Projections by their checkpoint names: of every layer, with a layer-wise loss of the converted ones.
    #[schemars(schema_with = "projections_schema")]
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
    /// Straight from the peak to `floor` x peak.
    Linear {
        /// Share of the steps spent warming up linearly.
        #[serde(default)]
        #[schemars(range(min = 0.0, max = 1.0))]
        warmup: f64,
        /// The end, as a share of the peak.
        #[serde(default)]
        #[schemars(range(min = 0.0, max = 1.0))]
        floor: f64,
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
    /// Warm-up, stable, decay: the peak, then straight to `floor` x peak over the last steps.
    Wsd {
        /// Share of the steps spent warming up linearly.
        #[serde(default = "Schedule::tenth")]
        #[schemars(range(min = 0.0, max = 1.0))]
        warmup: f64,
        /// Share of the steps spent decaying, at the end.
        #[serde(default = "Schedule::tenth")]
        #[schemars(range(min = 0.0, max = 1.0))]
        decay: f64,
        /// The end, as a share of the peak.
        #[serde(default)]
        #[schemars(range(min = 0.0, max = 1.0))]
        floor: f64,
    },
    /// Lowered by `factor` when validation has not improved for more than `patience` evaluations.
    Plateau {
        /// What the learning rate is multiplied by.
        #[serde(default = "Schedule::tenth")]
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

impl Schedule {
    fn tenth() -> f64 {
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
        let (factor, patience, min_lr) = (Self::tenth(), Self::patience(), Self::min_lr());
        Schedule::Plateau { factor, patience, min_lr, warmup: 0.0 }
    }
}

fn projections_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    let names = Projection::ALL.map(Projection::name);
    schemars::json_schema!({ "type": "array", "items": { "type": "string", "enum": names } })
}

fn train_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({ "type": "array", "items": { "type": "string", "enum": trainable() } })
}

/// What `train` may name.
fn trainable() -> Vec<&'static str> {
    let own = ["mixer", "lora"].into_iter().chain(Projection::ALL.map(Projection::name));
    own.chain(families::words()).collect()
}

impl Default for Stage {
    fn default() -> Self {
        Stage {
            train: vec!["mixer".into()],
            tokens: 20_000_000,
            epochs: None,
            seq_len: 1024,
            batch: 8,
            micro_batch: 0,
            lr: 1e-4,
            lr_mixer: None,
            lr_scalars: None,
            lr_lora: None,
            lr_projections: None,
            eval_every: 100,
            seed: None,
            loss: Loss::default(),
            kl: Kl::default(),
            lora: Lora::default(),
            optimizer: Optimizer::default(),
            schedule: Schedule::plateau(),
            data: None,
        }
    }
}

impl Default for Kl {
    fn default() -> Self {
        Kl { direction: Direction::Forward, temperature: 1.0, top_k: 0 }
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

impl Default for Optimizer {
    fn default() -> Self {
        Optimizer { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, clip: 1.0 }
    }
}

impl Loss {
    /// Whether a loss is taken layer by layer.
    pub fn layer_wise(&self) -> bool {
        [self.output_mse, self.attention_ce].iter().any(|w| *w > 0.0) || self.hidden()
    }

    /// Whether `output_mse` is the only layer-wise loss.
    pub fn output_alone(&self) -> bool {
        self.output_mse > 0.0 && self.attention_ce == 0.0 && !self.hidden()
    }

    /// Whether a loss is taken after `o_proj`.
    pub fn hidden(&self) -> bool {
        self.hidden_mse > 0.0 || self.hidden_l2 > 0.0
    }

    /// Whether a loss is taken at the end of the whole student.
    pub fn whole_model(&self) -> bool {
        self.logit_kl > 0.0 || self.next_token > 0.0
    }
}

impl Stage {
    /// Stage 1 of LoLCATs, attention transfer.
    pub fn transfer() -> Self {
        Stage { lr: 1e-2, loss: Loss { output_mse: 1000.0, ..Loss::default() }, ..Stage::default() }
    }

    /// Stage 2 of LoLCATs, recovery by LoRA.
    pub fn recover() -> Self {
        let loss = Loss { next_token: 1.0, ..Loss::default() };
        Stage { train: vec!["lora".into()], loss, ..Stage::default() }
    }

    /// Whether `train` has this word.
    pub fn trains(&self, what: &str) -> bool {
        self.train.iter().any(|word| word == what)
    }

    /// Projections among `train`, in block order.
    pub fn projections(&self) -> Vec<Projection> {
        Projection::ALL.into_iter().filter(|p| self.trains(p.name())).collect()
    }

    /// What else `train` names of the model: norms, embeddings, head.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        let words = families::words();
        self.train.iter().map(String::as_str).filter(move |word| words.contains(word))
    }

    /// Projections that this stage's LoRA sits on, in block order; none where it trains no LoRA.
    pub fn lora_targets(&self) -> Vec<Projection> {
        let named = |p: &Projection| self.trains("lora") && self.lora.targets.iter().any(|t| t == p.name());
        Projection::ALL.into_iter().filter(named).collect()
    }

    /// What stands against the stage in itself: the key and what is wrong with it.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let known = Projection::ALL.map(Projection::name);
        let mut found = Vec::new();
        let mut wrong = |key, text: String| found.push((key, text));
        if self.tokens > 0 && !self.loss.layer_wise() && !self.loss.whole_model() {
            wrong("loss", "has no weight above 0, so there is nothing to learn; `tokens = 0` skips the stage".into());
        }
        if self.loss.layer_wise() && self.loss.whole_model() {
            let text = "mixes losses of single layers (`output_mse`, `attention_ce`, `hidden_mse`, `hidden_l2`) with \
                        losses of the whole model (`logit_kl`, `next_token`); make two stages of them";
            wrong("loss", text.into());
        }
        if self.train.is_empty() {
            wrong("train", "names nothing; `tokens = 0` skips the stage".into());
        }
        let trainable = trainable();
        for bad in self.train.iter().filter(|t| !trainable.contains(&t.as_str())) {
            wrong("train", format!("names `{bad}`; known: {}", trainable.join(", ")));
        }
        for bad in self.lora.targets.iter().filter(|t| !known.contains(&t.as_str())) {
            wrong("lora.targets", format!("names `{bad}`, which is no projection; known: {}", known.join(", ")));
        }
        if self.trains("lora") && self.lora.targets.is_empty() {
            wrong("lora.targets", "is empty, but `train` has `lora`".into());
        }
        if self.loss.layer_wise() {
            let learns = |p: &Projection| p.is_attention() && (*p != Projection::O || self.loss.hidden());
            for (key, list) in [("train", self.projections()), ("lora.targets", self.lora_targets())] {
                for p in list.into_iter().filter(|p| !learns(p)) {
                    let loss = if p == Projection::O { "losses before `o_proj`" } else { "a loss of single layers" };
                    wrong(key, format!("names `{}`, which learns nothing from {loss}", p.name()));
                }
            }
            for word in self.modules() {
                wrong("train", format!("names `{word}`, which trains at the end of the whole student only"));
            }
        }
        if self.micro_batch > self.batch {
            wrong("micro_batch", "must be at most `batch`".into());
        }
        if let Schedule::Wsd { warmup, decay, .. } = self.schedule
            && warmup + decay > 1.0
        {
            wrong("schedule", format!("warms up and decays over {} of the steps, more than all", warmup + decay));
        }
        found
    }

    /// Tokens this stage trains on where one pass over its training text is `train_tokens`.
    pub fn budget(&self, train_tokens: u64) -> u64 {
        self.epochs.map_or(self.tokens, |epochs| self.tokens.min((epochs * train_tokens as f64) as u64))
    }
}
