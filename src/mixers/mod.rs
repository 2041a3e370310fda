//! The attention of a layer: softmax, and what replaces it. One file per variant.
//!
//! **Adding a mixer**: `src/mixers/<name>.rs` with its recipe keys (`Config`), a [`Design`] for them and a [`Mixer`]; a
//! variant of [`crate::recipe::Mixer`]; a row in [`REGISTRY`]; one recipe. The tests in `tests/mixers.rs` walk the
//! registry, so they already run on it: the three forms agree, nothing looks ahead, every parameter has a gradient.
//!
//! Most mixers are a [`linear::Linear`]: their formula once, composed of [`parts`] and computed in all forms by a
//! [`pass::Pass`]. On a GPU they decode op by op unless `Linear::fixed` says how one kernel takes a step.

pub mod delta;
pub mod gla;
pub mod gsa;
pub mod hgrn2;
pub mod lawcat;
pub mod linear;
pub mod lizard;
pub mod lizard_paper;
pub mod lolcats;
pub mod mala;
pub mod mamba2;
pub mod parts;
pub mod pass;
pub mod rala;
pub mod softmax;

use std::cell::OnceCell;
use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use crate::families::Architecture;
use crate::ops::loss::mse;
use crate::ops::rope::rope;
use crate::params::{Init, Param};

use parts::gate::Gate;

/// Every mixer by its recipe name.
pub const REGISTRY: &[MixerDef] = &[
    softmax::DEF,
    lolcats::DEF,
    lizard::DEF,
    lizard_paper::DEF,
    lawcat::DEF,
    gla::DEF,
    hgrn2::DEF,
    gsa::DEF,
    delta::DEF,
    mamba2::DEF,
    mala::DEF,
    rala::DEF,
];

/// One row of the registry.
pub struct MixerDef {
    /// `kind` in recipes.
    pub name: &'static str,
    pub about: &'static str,
    /// The settings worth testing: every part and mode of the mixer at least once.
    pub variants: fn() -> Vec<Box<dyn Design>>,
}

/// What a mixer is before it has weights: its recipe keys, resolved against a model.
pub trait Design {
    fn name(&self) -> &'static str;
    /// Says why this model cannot be served, if so.
    fn check(&self, architecture: &Architecture) -> std::result::Result<(), String>;
    /// The tensors it adds to a layer.
    fn specs(&self, architecture: &Architecture) -> Vec<Spec>;
    /// What the state forgets, and the channels of a key there; `None` where that has no keys of its own in recipes.
    fn gate(&self, _: &Architecture) -> Option<(&Gate, usize)> {
        None
    }
    /// Whether some tensors start at what their layer sees of the training text.
    fn measures(&self, architecture: &Architecture) -> bool {
        self.gate(architecture).is_some_and(|(gate, _)| gate.attended)
    }
    /// The starts of such tensors by their names in `specs`, from the heads of a layer and the teacher's attention weights
    /// [B, H, T, T].
    fn measure(&self, architecture: &Architecture, _: &Heads, weights: &Tensor) -> Result<Vec<(&'static str, Tensor)>> {
        match self.gate(architecture) {
            Some((gate, width)) if gate.attended => gate.measure(architecture, width, weights),
            _ => Ok(Vec::new()),
        }
    }
    /// The mixer of a layer with its tensors, in the order of `specs`.
    fn build(&self, architecture: &Architecture, layer: usize, params: Vec<Param>) -> Box<dyn Mixer>;
    /// Bytes of one sequence's state after `context` tokens, in one layer; keys and values take `element` bytes.
    fn state_bytes(&self, architecture: &Architecture, context: usize, element: usize) -> usize;
    /// Multiply-adds times two per token and layer beyond the projections: forward, at `seq_len`.
    fn flops_per_token(&self, architecture: &Architecture, seq_len: usize) -> f64;
    /// Elements per token that training keeps of what the mixer computes in plain tensor operations, with their gradients.
    fn graph_width(&self, _: &Architecture) -> usize {
        0
    }
    /// Whether every row of weights is non-negative and sums to 1, so that outputs lie where the teacher's do and
    /// weights can be compared with the teacher's.
    fn convex(&self) -> bool {
        true
    }
}

/// A tensor that a mixer adds.
pub struct Spec {
    /// Name under the layer's `self_attn`.
    pub name: &'static str,
    pub shape: Vec<usize>,
    pub init: Init,
    /// Gates, factors and other scalars.
    pub scalar: bool,
}

/// The attention of one layer.
pub trait Mixer: Send + Sync {
    /// Whole sequence, linear in time and memory where the mixer is: training. [B, T, H, D]
    fn forward(&self, x: &Heads) -> Result<Tensor>;
    /// `weight * mean((y - target)²)` of [`Mixer::forward`]'s y, differentiable in [`Mixer::params`]: attention transfer.
    fn output_mse(&self, x: &Heads, target: &Tensor, weight: f64) -> Result<Tensor> {
        mse(&self.forward(x)?, target, weight)
    }
    /// Whole sequence by the definition, T x T: the oracle. [B, T, H, D] and the normalised weights.
    fn parallel(&self, x: &Heads) -> Result<(Tensor, Weights)>;
    /// The tokens that follow those in the state, one or many: prefill and decoding. [B, T, H, D]
    fn extend(&self, x: &Heads, state: &mut State) -> Result<Tensor>;
    /// What it adds, by export name.
    fn params(&self) -> &[Param];
    /// The state in fixed memory with a one-token step on a GPU, for `batch` sequences of at most `room` tokens; an error
    /// says what stands against it.
    #[cfg(feature = "cuda")]
    fn fixed(
        &self,
        _state: &State,
        _batch: usize,
        _architecture: &Architecture,
        _room: usize,
        _device: &candle_core::Device,
    ) -> Result<Box<dyn crate::ops::decode::Fixed>> {
        candle_core::bail!("a mixer has no one-token kernel")
    }
    /// Natural logarithms of what the state keeps at each position, mean over its channels, [B, T, H]; `None` where it
    /// forgets nothing by itself.
    fn decays(&self, _: &Heads) -> Result<Option<Tensor>> {
        Ok(None)
    }
    /// Most keys its softmax window holds; 0 where there is none.
    fn window(&self) -> usize {
        0
    }
    /// Whether this is the teacher's own attention.
    fn is_softmax(&self) -> bool {
        false
    }
}

/// Attention weights of [`Mixer::parallel`]: what each value weighs in a row before norms and gates of the output.
pub struct Weights {
    /// [B, H, T, T]; rows sum to 1 where [`Design::convex`] says so.
    pub all: Tensor,
    /// The part of `all` that belongs to a softmax window, [B, H, T, T]; `None` where there is none.
    pub window: Option<Tensor>,
}

/// Queries, keys and values of some positions before position encoding, the encoding to apply, and what they were
/// projected from.
pub struct Heads<'a> {
    /// The layer's input behind its norm, [B, T, N]: what gates read.
    pub x: Tensor,
    /// [B, T, H + 2 Hkv, D]
    pub qkv: Tensor,
    pub heads: usize,
    pub kv_heads: usize,
    /// [T, R / 2] for these positions, R of D channels turning.
    pub cos: &'a Tensor,
    pub sin: &'a Tensor,
    /// The teacher bends scores s to cap tanh(s / cap).
    pub softcap: Option<f64>,
    rotated: OnceCell<Tensor>,
}

impl<'a> Heads<'a> {
    pub fn new(x: Tensor, qkv: Tensor, heads: usize, kv_heads: usize, cos: &'a Tensor, sin: &'a Tensor) -> Self {
        Heads { x, qkv, heads, kv_heads, cos, sin, softcap: None, rotated: OnceCell::new() }
    }

    /// The same under the teacher's soft-cap.
    pub fn capped(self, softcap: Option<f64>) -> Self {
        Heads { softcap, ..self }
    }

    /// The same for mixers that do not rotate: `rotated` gives the heads as they are.
    pub fn unrotated(&self) -> Heads<'a> {
        let rotated = OnceCell::from(self.qkv.clone());
        Heads { x: self.x.clone(), qkv: self.qkv.clone(), rotated, ..*self }
    }

    /// Queries [B, T, H, D], not rotated.
    pub fn queries(&self) -> Result<Tensor> {
        self.qkv.narrow(2, 0, self.heads)
    }

    /// Keys [B, T, Hkv, D], not rotated.
    pub fn keys(&self) -> Result<Tensor> {
        self.qkv.narrow(2, self.heads, self.kv_heads)
    }

    /// Values of every query head, [B, T, H, D].
    pub fn values(&self) -> Result<Tensor> {
        let own = self.qkv.narrow(2, self.heads + self.kv_heads, self.kv_heads)?;
        pass::repeat(&own, self.heads / self.kv_heads)
    }

    /// The same with queries and keys rotated; computed once.
    pub fn rotated(&self) -> Result<&Tensor> {
        if let Some(done) = self.rotated.get() {
            return Ok(done);
        }
        let turned = rope(&self.qkv, self.cos, self.sin, self.heads + self.kv_heads)?;
        Ok(self.rotated.get_or_init(|| turned))
    }
}

/// What a mixer remembers of a sequence: named tensors that each mixer documents, and the tokens seen.
#[derive(Default)]
pub struct State {
    pub seen: usize,
    pub tensors: BTreeMap<&'static str, Tensor>,
}

impl State {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.tensors.values().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }
}

/// Rows of a prefill handled at once, so that its weights stay small.
pub(crate) const PIECE: usize = 128;
