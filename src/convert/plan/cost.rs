//! Steps, operations and memory of the training stages.
//!
//! Operations are multiply-adds times two over the training tokens; evaluations come on top.
//!
//! | per token | operations |
//! |---|---|
//! | layer-wise, blocks before the last converted layer | 2 per parameter |
//! | layer-wise, last converted layer | 2 per parameter of q, k, v |
//! | layer-wise, teacher's attention up to there | 1 x the mixer's |
//! | layer-wise, new attention | 3 x the mixer's: forward, again in the backward pass, gradient of what trains |
//! | layer-wise, where q, k, v are changed | 2 per parameter of theirs: the student's own |
//! | layer-wise after `o_proj` | 6 per parameter of it: teacher, student, gradient of the input |
//! | layer-wise, changes of projections | 6 per parameter: forward, gradients of both sides |
//! | whole model, blocks | 6 per parameter: forward, recomputation, gradient of the input; 4 where the graph was kept |
//! | whole model, changes of projections | 8 per parameter: the same, and their own gradient |
//! | whole model, attention | 5 x the mixer's: forward, recomputation, again in the backward pass, gradient (2) |
//! | whole model, head | 4 per parameter, 6 with KL, 2 more where it trains |
//! | whole model with KL, teacher | 2 per parameter of the blocks, and its attention |
//!
//! Memory is counted in elements per token of a micro-batch, from the tensors that `transfer` and `recover` hold at
//! their widest point. With N hidden, Q query, P packed q, k, v and I MLP widths and E features of all heads:
//!
//! | | elements per token |
//! |---|---|
//! | layer-wise, a converted layer | N + 2 P + 4 Q + 6 E: stream, heads twice, outputs and their gradients, features and theirs twice |
//! | layer-wise, where q, k, v are changed | N + 3 P more: norm, heads, rotated heads and their gradient |
//! | layer-wise after `o_proj` | 4 N more: both outputs, their difference, its gradient |
//! | layer-wise, the MLP after it | 5 N + 2 P + Q + 3 I |
//! | whole model, inputs of blocks | (layers + 5) N, one more with KL |
//! | whole model, one block for its backward pass | 4 N + 3 P + Q + 2 E + 2 I, and three more outputs for each projection that is changed in full or with dropout |
//! | whole model, where the MLP is changed or a norm beside it trains | 2 N + I more |
//! | whole model, gradients of a block | 3 N + the larger of 3 I (5 I where the MLP is changed) and Q + P + 6 E |
//! | verify, a layer of one sequence | as layer-wise |
//!
//! Embeddings and a head that are changed are added up anew for every micro-batch, and the gradient of one that trains is
//! there in f32 beside the sum of all: 4 bytes and the precision of the weights per element.
//!
//! Graphs that are kept are gone before others are computed again, so one of both is alive.
//!
//! Blocks whose graphs fit into 1 GiB, 4 GiB on a GPU, are not computed again. A smaller micro-batch would keep more of
//! them, but loses more in the products than it saves.
//!
//! Verification holds three models: the student, the export and the teacher.
//!
//! The mapped checkpoint is not counted, since the system takes its pages back when it needs them, and neither are
//! program and tokenizer. On a GPU, where the plain forms run, T x T weights are added and the figures are coarser.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::super::trained::Reach;
use crate::families::{Architecture, Place, Projection, Role};
use crate::mixers::Design;
use crate::mixers::softmax;
use crate::ops::head_loss::block_rows;
use crate::recipe::{self, Kl};

/// Where a conversion runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PlanDevice {
    Cpu,
    Cuda,
}

impl From<&candle_core::Device> for PlanDevice {
    fn from(device: &candle_core::Device) -> Self {
        if device.is_cpu() { PlanDevice::Cpu } else { PlanDevice::Cuda }
    }
}

impl PlanDevice {
    /// Bytes of a frozen weight or activation.
    pub(super) fn element(self) -> u64 {
        match self {
            PlanDevice::Cpu => 4,
            PlanDevice::Cuda => 2,
        }
    }
}

/// Sequences at once: `micro` where it is set, else as many as make 2048 tokens on the CPU and 8192 on a GPU; at least
/// 1 and at most `batch`.
pub fn micro_batch(batch: usize, micro: usize, seq_len: usize, device: PlanDevice) -> usize {
    let tokens = match device {
        PlanDevice::Cpu => 2048,
        PlanDevice::Cuda => 8192,
    };
    let wanted = if micro == 0 { tokens / seq_len.max(1) } else { micro };
    wanted.clamp(1, batch.max(1))
}

/// Optimiser steps that train on at least `tokens`; 0 for none.
pub fn steps(tokens: u64, batch: usize, seq_len: usize) -> u64 {
    tokens.div_ceil((batch as u64 * seq_len as u64).max(1))
}

/// One training stage.
#[derive(Debug, Clone, Serialize)]
pub struct Stage {
    pub name: String,
    /// Whether its losses are taken layer by layer.
    pub layer_wise: bool,
    /// Parameters that train.
    pub trainable: u64,
    /// Tokens asked for, after the bound of `epochs`.
    pub tokens: u64,
    /// Optimiser steps; the last one is a whole one.
    pub steps: u64,
    pub tokens_per_step: u64,
    pub seq_len: usize,
    pub batch: usize,
    /// Sequences at once.
    pub micro_batch: usize,
    /// Blocks, the last ones, whose graphs are kept for the backward pass instead of being computed again.
    pub kept: usize,
    /// Multiply-adds times two of all steps.
    pub flops: f64,
    pub memory: Memory,
}

/// Peak memory of a stage in bytes: the parts are alive at the same time.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Memory {
    /// Frozen weights.
    pub weights: u64,
    /// What trains, in f32: parameter, gradient, two moments and the best so far; what is new and rests once.
    pub optimizer: u64,
    /// Inputs of blocks kept for recomputation, and graphs kept in its stead.
    pub inputs: u64,
    /// The larger of one block's graph with its gradients and one block of logits.
    pub working: u64,
    pub total: u64,
}

impl Memory {
    pub(in crate::convert) fn new(weights: u64, optimizer: u64, inputs: u64, working: u64) -> Self {
        Memory { weights, optimizer, inputs, working, total: weights + optimizer + inputs + working }
    }
}

/// Widths of a model in elements per token.
struct Widths {
    hidden: u64,
    query: u64,
    packed: u64,
    mlp: u64,
    features: u64,
    /// Of the mixer's plain operations in training.
    graph: u64,
}

/// What the stages of a recipe would cost that is applied to these layers.
pub fn stages(a: &Architecture, recipe: &recipe::Recipe, converted: &[usize], device: PlanDevice) -> Vec<Stage> {
    Costs::new(a, recipe.mixer.design(), converted, device).stages(recipe, None)
}

/// What the costs of the stages follow from.
pub(super) struct Costs<'a> {
    a: &'a Architecture,
    design: &'a dyn Design,
    converted: &'a [usize],
    device: PlanDevice,
    widths: Widths,
    /// Parameters of all mixers.
    new: u64,
}

impl<'a> Costs<'a> {
    pub fn new(a: &'a Architecture, design: &'a dyn Design, converted: &'a [usize], device: PlanDevice) -> Self {
        let elements = |spec: &crate::mixers::Spec| spec.shape.iter().map(|d| *d as u64).product::<u64>();
        let per_layer: u64 = design.specs(a).iter().map(elements).sum();
        let (head, query) = (a.head_dim as u64, (a.heads * a.head_dim) as u64);
        let widths = Widths {
            hidden: a.hidden as u64,
            query,
            packed: query + 2 * a.kv_heads as u64 * head,
            mlp: a.experts.map_or(0, |e| e.used * e.intermediate).max(a.intermediate) as u64,
            // A linear state sums features times [v, 1] in f32: its size tells the number of features.
            features: design.state_bytes(a, 0, 0) as u64 / (4 * (head + 1)),
            graph: design.graph_width(a) as u64,
        };
        Costs { a, design, converted, device, widths, new: per_layer * converted.len() as u64 }
    }

    /// The stages that have something to train, in order.
    pub fn stages(&self, recipe: &recipe::Recipe, train_tokens: Option<&BTreeMap<String, u64>>) -> Vec<Stage> {
        let (mut found, mut before) = (Vec::new(), Changes::default());
        for (name, s) in recipe.in_order() {
            let reach = Reach::of(s, self.a, self.converted);
            let now = before.with(self.a, s.lora.rank, &reach);
            let again = reach.whole.iter().filter(|(role, _)| before.whole.contains_key(role)).map(|(_, shape)| shape);
            let changing = now.elements() - before.elements()
                + self.full(reach.full.iter().filter(|at| before.full.contains(*at)))
                + again.map(|shape| size(shape)).sum::<u64>();
            let mixers = if s.trains("mixer") { self.new } else { 0 };
            let tokens = train_tokens.and_then(|t| t.get(name)).map_or(s.tokens, |t| s.budget(*t));
            if tokens == 0 || changing + mixers == 0 {
                continue;
            }
            let cost = if s.loss.layer_wise() { self.layer_wise(s, &now) } else { self.whole_model(s, &now) };
            let (trainable, existing) = (changing + mixers, now.elements() + self.new);
            let optimizer = 4 * (5 * trainable + existing - trainable);
            let (steps, tokens_per_step) = (steps(tokens, s.batch, s.seq_len), (s.batch * s.seq_len) as u64);
            found.push(Stage {
                name: name.into(),
                layer_wise: s.loss.layer_wise(),
                trainable,
                tokens,
                steps,
                tokens_per_step,
                seq_len: s.seq_len,
                batch: s.batch,
                micro_batch: cost.micro_batch,
                kept: cost.kept,
                flops: cost.flops_per_token * (steps * tokens_per_step) as f64,
                memory: Memory::new(self.weights(), optimizer, cost.inputs, cost.working + self.casts(&now)),
            });
            before = now;
        }
        found
    }

    fn layer_wise(&self, s: &recipe::Stage, changes: &Changes) -> Cost {
        let micro = micro_batch(s.batch, s.micro_batch, s.seq_len, self.device);
        let (a, w, count) = (self.a, &self.widths, self.converted.len() as f64);
        let heads = [Projection::Q, Projection::K, Projection::V];
        let packed = heads.iter().map(|p| elements(a, *p)).sum::<u64>() as f64;
        let own = self.converted.iter().filter(|l| heads.iter().any(|p| changes.places.contains(&(**l, *p)))).count();
        let last = self.converted.last().copied().unwrap_or(0);

        let frozen = 2.0 * (last as f64 * a.active_parameters() as f64 + packed);
        let teacher = softmax::flops_per_token(a, 0..=last, s.seq_len);
        let student = 3.0 * count * self.design.flops_per_token(a, s.seq_len);
        let output = if s.loss.hidden() { 6.0 * count * elements(a, Projection::O) as f64 } else { 0.0 };
        let changed = 2.0 * own as f64 * packed + 6.0 * changes.products() as f64;

        let squares = match (self.device, s.loss.attention_ce > 0.0) {
            (PlanDevice::Cpu, false) if self.a.softcap.is_none() => [0, 0],
            (_, false) => [0, self.plain_squares(12)],
            (_, true) => [18, 0],
        };
        let more = if own > 0 { w.hidden + 3 * w.packed } else { 0 } + if s.loss.hidden() { 4 * w.hidden } else { 0 };
        Cost {
            micro_batch: micro,
            kept: 0,
            flops_per_token: frozen + teacher + student + output + changed,
            inputs: 0,
            working: self.activations(micro, s.seq_len, self.layer(more + w.graph))
                + self.squares(micro, s.seq_len, squares),
        }
    }

    fn whole_model(&self, s: &recipe::Stage, changes: &Changes) -> Cost {
        let (a, w) = (self.a, &self.widths);
        let (layers, converted) = (a.layers as u64, self.converted.len() as u64);
        let taught = s.loss.logit_kl > 0.0;

        let blocks = layers as f64 * a.active_parameters() as f64;
        let kept = (0..a.layers).filter(|l| !self.converted.contains(l));
        let attention =
            converted as f64 * self.design.flops_per_token(a, s.seq_len) + softmax::flops_per_token(a, kept, s.seq_len);
        let own_head = changes.whole.contains_key(&if a.tied { Role::Embedding } else { Role::Head });
        let per_parameter = if taught { 6.0 } else { 4.0 } + if own_head { 2.0 } else { 0.0 };
        let head = (a.vocab * a.hidden) as f64 * per_parameter;
        let teacher = if taught { 2.0 * blocks + softmax::flops_per_token(a, 0..a.layers, s.seq_len) } else { 0.0 };

        // Low rank without dropout is part of its product.
        let apart = s.lora.dropout > 0.0 || !changes.full.is_empty();
        let changed = |p: &Projection| {
            let there = apart && changes.places.iter().any(|(_, at)| at == p);
            if there { 3 * a.shape(*p)[0] as u64 } else { 0 }
        };
        let low_rank =
            |p: &Projection| s.lora.rank as u64 + if s.lora.dropout > 0.0 { 2 * a.shape(*p)[1] as u64 } else { 0 };
        let mlp = [Projection::Gate, Projection::Up, Projection::Down];
        let beside = |role: &Role| matches!(role, Role::Norm(_, Place::BeforeMlp | Place::AfterMlp, _));
        let mlp = match changes.places.iter().any(|(_, at)| mlp.contains(at)) || changes.whole.keys().any(beside) {
            true => (2 * w.hidden + 3 * w.mlp, 5 * w.mlp),
            false => (2 * w.mlp, 3 * w.mlp),
        };
        let graph = 4 * w.hidden
            + 3 * w.packed
            + w.query
            + 2 * w.features
            + w.graph
            + mlp.0
            + Projection::ALL.iter().map(changed).sum::<u64>()
            + s.lora_targets().iter().map(low_rank).sum::<u64>();
        let gradients = 3 * w.hidden + mlp.1.max(w.query + w.packed + 6 * w.features);
        let plain = self.device == PlanDevice::Cuda || self.a.softcap.is_some();
        // Of layers that stay softmax, which have a graph here; one without walks blocks of rows.
        let whole = if self.converted.len() < self.a.layers { 16 } else { 0 };
        let squares = if plain { [whole, 16].map(|count| self.plain_squares(count)) } else { [0, 0] };
        let graphs = |micro: usize| self.activations(micro, s.seq_len, graph) + self.squares(micro, s.seq_len, squares);

        let room: u64 = match self.device {
            PlanDevice::Cpu => 1 << 30,
            PlanDevice::Cuda => 4 << 30,
        };
        let micro = micro_batch(s.batch, s.micro_batch, s.seq_len, self.device);
        let kept = (room / graphs(micro).max(1)).min(layers);

        let again = (layers - kept) as f64 / layers as f64;
        let passes = |once: f64, more: f64| once + again * more;
        let changed = passes(6.0, 2.0) * changes.products() as f64;
        let block = graphs(micro) * (kept == 0) as u64 + self.activations(micro, s.seq_len, gradients);
        let inputs = self.activations(micro, s.seq_len, (layers + 5 + taught as u64) * w.hidden);
        Cost {
            micro_batch: micro,
            kept: kept as usize,
            flops_per_token: passes(4.0, 2.0) * blocks + changed + passes(4.0, 1.0) * attention + head + teacher,
            inputs: inputs + kept * graphs(micro),
            working: block.max(self.logits(micro * s.seq_len, taught, s.kl == Kl::default()))
                + changes.tables() * (4 + self.device.element()),
        }
    }

    /// Bytes of the changes in full of one layer in the precision of the weights, and of their gradients in it, where
    /// that is not their own.
    fn casts(&self, changes: &Changes) -> u64 {
        let of = |layer: usize| self.full(changes.full.iter().filter(|(l, _)| *l == layer));
        match self.device {
            PlanDevice::Cpu => 0,
            PlanDevice::Cuda => 2 * self.device.element() * (0..self.a.layers).map(of).max().unwrap_or(0),
        }
    }

    fn full<'p>(&self, places: impl Iterator<Item = &'p (usize, Projection)>) -> u64 {
        places.map(|(_, p)| elements(self.a, *p)).sum()
    }

    /// Verification on sequences of `seq_len` tokens.
    pub fn verify(&self, seq_len: usize) -> Memory {
        let working = self.activations(1, seq_len, self.layer(0)) + self.logits(seq_len, true, true);
        Memory::new(3 * self.weights(), 2 * 4 * self.new, 0, working)
    }

    /// Frozen weights of one model in memory.
    fn weights(&self) -> u64 {
        let a = self.a;
        let positions = if a.has_positions() { a.max_positions } else { 0 };
        let embeddings = ((a.vocab * if a.tied { 1 } else { 2 } + positions) * a.hidden) as u64;
        let elements = embeddings + a.layers as u64 * a.block_parameters() as u64 + a.hidden as u64;
        elements * self.device.element()
    }

    /// Elements per token at the widest point of a layer outside of whole-model stages, with `more` beside its attention.
    fn layer(&self, more: u64) -> u64 {
        let w = &self.widths;
        let attention = w.hidden + 2 * w.packed + 4 * w.query + 6 * w.features + more;
        attention.max(5 * w.hidden + 2 * w.packed + w.query + 3 * w.mlp)
    }

    /// Bytes of one block of logits with their gradient, and a teacher's. Kernels write the gradient over the logits.
    fn logits(&self, rows: usize, taught: bool, kernel: bool) -> u64 {
        let per_logit = match (self.device, kernel) {
            (PlanDevice::Cpu, _) => 4 * (2 + taught as u64),
            (PlanDevice::Cuda, true) => self.device.element() * (2 + taught as u64),
            (PlanDevice::Cuda, false) => 4 * (8 + 3 * taught as u64),
        };
        per_logit * (block_rows(self.a.vocab, self.device == PlanDevice::Cuda).min(rows) * self.a.vocab) as u64
    }

    fn activations(&self, micro: usize, seq_len: usize, width: u64) -> u64 {
        micro as u64 * seq_len as u64 * width * self.device.element()
    }

    /// `count` where a GPU has no kernel for heads of this width, or nothing has one for a soft-cap, and the plain forms
    /// run.
    fn plain_squares(&self, count: u64) -> u64 {
        let dim = self.a.head_dim;
        if dim.is_multiple_of(8) && dim <= 128 && self.a.softcap.is_none() { 0 } else { count }
    }

    /// So many matrices of attention weights [micro, H, T, T], and of bands of them [micro, H, T, BAND].
    fn squares(&self, micro: usize, seq_len: usize, [whole, bands]: [u64; 2]) -> u64 {
        let time = seq_len as u64;
        (micro * self.a.heads) as u64 * time * (whole * time + bands * time.min(BAND)) * self.device.element()
    }
}

/// Keys that a chunk of rows meets, for windows of up to 128.
const BAND: u64 = 256;

/// What a stage does and holds, beside weights and training state.
struct Cost {
    micro_batch: usize,
    kept: usize,
    flops_per_token: f64,
    /// Bytes.
    inputs: u64,
    working: u64,
}

/// Changes of weights up to a stage.
#[derive(Default)]
struct Changes {
    /// Elements of all LoRA and of all changes in full.
    low_rank: u64,
    full_rank: u64,
    places: BTreeSet<(usize, Projection)>,
    /// Those of changes in full.
    full: BTreeSet<(usize, Projection)>,
    /// Elements of embeddings, norms and head.
    whole: BTreeMap<Role, u64>,
}

impl Changes {
    /// These and what a stage adds: its own LoRA, changes in full where there were none.
    fn with(&self, a: &Architecture, rank: usize, reach: &Reach) -> Changes {
        let sides = |p: Projection| a.shape(p).iter().map(|d| *d as u64).sum::<u64>();
        let full: BTreeSet<_> = self.full.iter().chain(&reach.full).copied().collect();
        let more = reach.whole.iter().map(|(role, shape)| (*role, size(shape)));
        Changes {
            whole: self.whole.iter().map(|(role, count)| (*role, *count)).chain(more).collect(),
            low_rank: self.low_rank + rank as u64 * reach.lora.iter().map(|(_, p)| sides(*p)).sum::<u64>(),
            full_rank: full.iter().map(|(_, p)| elements(a, *p)).sum(),
            places: self.places.iter().chain(&reach.lora).chain(&full).copied().collect(),
            full,
        }
    }

    /// Elements of what inputs are multiplied by.
    fn products(&self) -> u64 {
        self.low_rank + self.full_rank
    }

    fn elements(&self) -> u64 {
        self.products() + self.whole.values().sum::<u64>()
    }

    /// Elements of embeddings and head.
    fn tables(&self) -> u64 {
        let tables = [Role::Embedding, Role::Positions, Role::Head];
        tables.iter().filter_map(|role| self.whole.get(role)).sum()
    }
}

fn elements(a: &Architecture, p: Projection) -> u64 {
    a.shape(p).iter().map(|d| *d as u64).product()
}

fn size(shape: &[usize]) -> u64 {
    shape.iter().map(|d| *d as u64).product()
}
