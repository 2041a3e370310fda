//! Steps, operations and memory of the training stages.
//!
//! Operations are multiply-adds times two over the training tokens; evaluations come on top.
//!
//! | per token | operations |
//! |---|---|
//! | transfer, blocks before the last converted layer | 2 per parameter |
//! | transfer, last converted layer | 2 per parameter of q, k, v |
//! | transfer, teacher's attention up to there | 1 x the mixer's |
//! | transfer, new attention | 3 x the mixer's: forward, again in the backward pass, gradient of maps and factors |
//! | recover, blocks | 6 per parameter: forward, recomputation, gradient of the input |
//! | recover, adapters | 8 per parameter: the same, and the gradient of A and B |
//! | recover, attention | 5 x the mixer's: forward, recomputation, again in the backward pass, gradient (2) |
//! | recover, head | 4 per parameter, 6 with KL |
//! | recover with KL, teacher | 2 per parameter of the blocks, and its attention |
//!
//! Memory is counted in elements per token of a micro-batch, from the tensors that `transfer` and `recover` hold at
//! their widest point. With N hidden, Q query, P packed q, k, v and I MLP widths and E features of all heads:
//!
//! | | elements per token |
//! |---|---|
//! | transfer, a converted layer | N + 2 P + 4 Q + 6 E: stream, heads twice, outputs and their gradients, features and theirs twice |
//! | transfer, the MLP after it | 5 N + 2 P + Q + 3 I |
//! | recover, inputs of blocks | (layers + 5) N, one more with KL |
//! | recover, graph of one block | 6 N + 3 P + Q + 2 E + 3 I, and three more outputs for each adapted projection |
//! | recover, its gradients | 3 N + the larger of 5 I and Q + P + 6 E |
//! | verify, a layer of one sequence | as in transfer |
//!
//! Verification holds three models: the student, the export and the teacher.
//!
//! The mapped checkpoint is not counted, since the system takes its pages back when it needs them, and neither are
//! program and tokenizer. On a GPU, where the plain forms run, T x T weights are added and the figures are coarser.

use serde::Serialize;

use crate::families::{Architecture, Projection};
use crate::mixers::Design;
use crate::mixers::softmax::Softmax;
use crate::ops::head_loss::block_rows;
use crate::recipe;

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
    pub name: &'static str,
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
    /// Multiply-adds times two of all steps.
    pub flops: f64,
    pub memory: Memory,
}

/// Peak memory of a stage in bytes: the parts are alive at the same time.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Memory {
    /// Frozen weights.
    pub weights: u64,
    /// What trains, in f32: parameter, gradient, two moments and the best so far; new parameters that rest once.
    pub optimizer: u64,
    /// Inputs kept for recomputation.
    pub inputs: u64,
    /// The larger of one block's graph with its gradients and one block of logits.
    pub working: u64,
    pub total: u64,
}

impl Memory {
    fn new(weights: u64, optimizer: u64, inputs: u64, working: u64) -> Self {
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
            mlp: a.intermediate as u64,
            // A linear state sums features times [v, 1] in f32: its size tells the number of features.
            features: design.state_bytes(a, 0, 0) as u64 / (4 * (head + 1)),
        };
        Costs { a, design, converted, device, widths, new: per_layer * converted.len() as u64 }
    }

    /// Attention transfer; `None` where nothing trains.
    pub fn transfer(&self, s: &recipe::Transfer, train_tokens: Option<u64>) -> Option<Stage> {
        let a = self.a;
        let last = *self.converted.last()?;
        let tokens = train_tokens.map_or(s.tokens, |t| s.budget(t));
        let micro = micro_batch(s.batch, s.micro_batch, s.seq_len, self.device);

        let heads: usize = [Projection::Q, Projection::K, Projection::V].map(|p| elements(a, p)).iter().sum();
        let frozen = 2.0 * (last as f64 * a.block_parameters() as f64 + heads as f64);
        let teacher = (last + 1) as f64 * Softmax.flops_per_token(a, s.seq_len);
        let student = 3.0 * self.converted.len() as f64 * self.design.flops_per_token(a, s.seq_len);

        let squares = match (self.device, s.attention_ce_weight > 0.0) {
            (PlanDevice::Cpu, false) => 0,
            (PlanDevice::Cuda, false) => self.plain_squares(12),
            (_, true) => 18,
        };
        let working = self.activations(micro, s.seq_len, self.layer()) + self.squares(micro, s.seq_len, squares);
        let size = Size { tokens, seq_len: s.seq_len, batch: s.batch, micro };
        let params = Params { trainable: self.new, resting: 0 };
        self.stage("transfer", size, params, frozen + teacher + student, 0, working)
    }

    /// LoRA recovery; `None` where nothing trains.
    pub fn recover(&self, s: &recipe::Recover, targets: &[Projection], train_tokens: Option<u64>) -> Option<Stage> {
        let (a, w) = (self.a, &self.widths);
        let tokens = train_tokens.map_or(s.tokens, |t| s.budget(t));
        let micro = micro_batch(s.batch, s.micro_batch, s.seq_len, self.device);
        let (layers, converted) = (a.layers as u64, self.converted.len() as u64);
        let rank = s.lora.rank as u64;
        let sides = |p: &Projection| a.shape(*p).iter().map(|d| *d as u64).sum::<u64>();
        let adapters = layers * rank * targets.iter().map(sides).sum::<u64>();
        let taught = s.kl_weight > 0.0;

        let blocks = layers as f64 * a.block_parameters() as f64;
        let softmax = Softmax.flops_per_token(a, s.seq_len);
        let attention =
            converted as f64 * self.design.flops_per_token(a, s.seq_len) + (layers - converted) as f64 * softmax;
        let head = (a.vocab * a.hidden) as f64 * if taught { 6.0 } else { 4.0 };
        let teacher = if taught { 2.0 * blocks + layers as f64 * softmax } else { 0.0 };
        let flops = 6.0 * blocks + 8.0 * adapters as f64 + 5.0 * attention + head + teacher;

        let adapted = |p: &Projection| {
            let [out, inner] = a.shape(*p).map(|d| d as u64);
            3 * out + rank + if s.lora.dropout > 0.0 { 2 * inner } else { 0 }
        };
        let graph = 6 * w.hidden
            + 3 * w.packed
            + w.query
            + 2 * w.features
            + 3 * w.mlp
            + targets.iter().map(adapted).sum::<u64>();
        let gradients = 3 * w.hidden + (5 * w.mlp).max(w.query + w.packed + 6 * w.features);
        let squares = if self.device == PlanDevice::Cuda { self.plain_squares(16) } else { 0 };
        let block = self.activations(micro, s.seq_len, graph + gradients) + self.squares(micro, s.seq_len, squares);
        let logits = self.logits(micro * s.seq_len, taught);
        let inputs = self.activations(micro, s.seq_len, (layers + 5 + taught as u64) * w.hidden);
        let size = Size { tokens, seq_len: s.seq_len, batch: s.batch, micro };
        let params = match s.lr_mixer > 0.0 {
            true => Params { trainable: adapters + self.new, resting: 0 },
            false => Params { trainable: adapters, resting: self.new },
        };
        self.stage("recover", size, params, flops, inputs, block.max(logits))
    }

    /// Verification on sequences of `seq_len` tokens.
    pub fn verify(&self, seq_len: usize) -> Memory {
        let working = self.activations(1, seq_len, self.layer()) + self.logits(seq_len, true);
        Memory::new(3 * self.weights(), 2 * 4 * self.new, 0, working)
    }

    /// Frozen weights of one model in memory.
    fn weights(&self) -> u64 {
        let a = self.a;
        let embeddings = (a.vocab * a.hidden) as u64 * if a.tied { 1 } else { 2 };
        let elements = embeddings + a.layers as u64 * a.block_parameters() as u64 + a.hidden as u64;
        elements * self.device.element()
    }

    /// Elements per token at the widest point of a layer outside of recovery.
    fn layer(&self) -> u64 {
        let w = &self.widths;
        let attention = w.hidden + 2 * w.packed + 4 * w.query + 6 * w.features;
        attention.max(5 * w.hidden + 2 * w.packed + w.query + 3 * w.mlp)
    }

    /// Bytes of one block of logits with their gradient, and a teacher's.
    fn logits(&self, rows: usize, taught: bool) -> u64 {
        let copies = match self.device {
            PlanDevice::Cpu => 2 + taught as u64,
            PlanDevice::Cuda => 8 + 3 * taught as u64,
        };
        4 * copies * (block_rows(self.a.vocab, self.device == PlanDevice::Cuda).min(rows) * self.a.vocab) as u64
    }

    fn activations(&self, micro: usize, seq_len: usize, width: u64) -> u64 {
        micro as u64 * seq_len as u64 * width * self.device.element()
    }

    /// `count` where a GPU has no kernel for heads of this width and the plain forms run.
    fn plain_squares(&self, count: u64) -> u64 {
        let dim = self.a.head_dim;
        if dim.is_multiple_of(8) && dim <= 128 { 0 } else { count }
    }

    /// `count` matrices of attention weights [micro, H, T, T].
    fn squares(&self, micro: usize, seq_len: usize, count: u64) -> u64 {
        (micro * self.a.heads) as u64 * (seq_len as u64).pow(2) * count * self.device.element()
    }

    fn stage(
        &self,
        name: &'static str,
        size: Size,
        params: Params,
        flops_per_token: f64,
        inputs: u64,
        working: u64,
    ) -> Option<Stage> {
        let Size { tokens, seq_len, batch, micro } = size;
        let Params { trainable, resting } = params;
        if tokens == 0 || trainable == 0 {
            return None;
        }
        let optimizer = 4 * (5 * trainable + resting);
        let (steps, tokens_per_step) = (steps(tokens, batch, seq_len), (batch * seq_len) as u64);
        Some(Stage {
            name,
            trainable,
            tokens,
            steps,
            tokens_per_step,
            seq_len,
            batch,
            micro_batch: micro,
            flops: flops_per_token * (steps * tokens_per_step) as f64,
            memory: Memory::new(self.weights(), optimizer, inputs, working),
        })
    }
}

/// The sizes a stage's settings ask for.
struct Size {
    tokens: u64,
    seq_len: usize,
    batch: usize,
    micro: usize,
}

/// New parameters of a stage: those that train and those that rest.
struct Params {
    trainable: u64,
    resting: u64,
}

fn elements(a: &Architecture, p: Projection) -> usize {
    a.shape(p).iter().product()
}
