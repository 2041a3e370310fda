//! A softmax window beside a linear branch, their outputs added: Liger, and any gated mixer.

use candle_core::{Device, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::families::Architecture;
use crate::mixers::Spec;
use crate::mixers::linear::project;
use crate::ops::gate::{self, Curve};
use crate::ops::mix::mix;
use crate::ops::wide;
use crate::params::{Init, Param, named};

const WEIGHTS: [&str; 2] = ["mix_window", "mix_linear"];
const GATE: &str = "mix_gate.weight";

/// Softmax over the last keys, added to the linear branch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Beside {
    /// Keys of the window, self included; 0 leaves the linear branch alone.
    pub size: usize,
    /// What the window's output weighs.
    #[schemars(range(min = 0.0))]
    pub weight: f64,
    /// What the linear branch weighs.
    #[schemars(range(min = 0.0))]
    pub linear_weight: f64,
    /// Learn both weights, one pair per head.
    pub learn: bool,
    /// Let each token change both weights of its row, by a factor between 0 and 2 that is learned from the layer's input:
    /// a head that looks far back for some tokens only can then leave its window for them.
    pub gate: bool,
}

impl Default for Beside {
    fn default() -> Self {
        // Near the window alone: what was softmax is still most of it.
        Beside { size: 64, weight: 0.9, linear_weight: 0.1, learn: true, gate: false }
    }
}

impl Beside {
    /// No window.
    pub fn none() -> Self {
        Beside { size: 0, ..Self::default() }
    }

    /// `mix_window` and `mix_linear` [1, H, 1, 1] where they are learned, `mix_gate.weight` [2 H, N] where tokens gate
    /// them: rows of the window first.
    pub fn specs(&self, a: &Architecture) -> Vec<Spec> {
        let spec = |name, shape, start| Spec { name, shape, init: Init::Constant(start), scalar: true };
        let mut specs = Vec::new();
        if self.size > 0 && self.learn {
            specs.push(spec(WEIGHTS[0], vec![1, a.heads, 1, 1], self.weight));
            specs.push(spec(WEIGHTS[1], vec![1, a.heads, 1, 1], self.linear_weight));
        }
        if self.size > 0 && self.gate {
            specs.push(spec(GATE, vec![2 * a.heads, a.hidden], 0.0));
        }
        specs
    }

    /// The part with its tensors, which are the last of `params`.
    pub fn build(&self, params: &[Param]) -> Option<Mix> {
        let find = |name: &str| named(params, name);
        let learned = find(WEIGHTS[0]).zip(find(WEIGHTS[1]));
        let weights = [self.weight, self.linear_weight];
        (self.size > 0).then_some(Mix { size: self.size, weights, learned, gate: find(GATE) })
    }

    /// Bytes of the keys and values it holds, `element` bytes each.
    pub fn state_bytes(&self, a: &Architecture, element: usize) -> usize {
        2 * self.size * a.kv_heads * a.head_dim * element
    }

    /// Multiply-adds times two per token.
    pub fn flops(&self, a: &Architecture, seq_len: usize) -> f64 {
        let gate = if self.gate { 4.0 * (a.heads * a.hidden) as f64 } else { 0.0 };
        gate + 4.0 * self.size.min(seq_len) as f64 * (a.heads * a.head_dim) as f64
    }
}

/// [`Beside`] with its tensors.
pub struct Mix {
    pub size: usize,
    weights: [f64; 2],
    learned: Option<(Param, Param)>,
    gate: Option<Param>,
}

impl Mix {
    /// The weighted sum of the window's and the linear branch's output [B, T, H, V] of the layer's input `x` [B, T, N].
    pub fn add(&self, x: &Tensor, window: &Tensor, linear: &Tensor) -> Result<Tensor> {
        mix(&[window, linear], &self.weights(x, linear.dim(2)?)?)
    }

    /// The same in a one-token step.
    #[cfg(feature = "cuda")]
    pub fn fixed(
        &self,
        at: crate::ops::decode::linear::Frame,
        state: &crate::mixers::State,
        reads: &mut crate::ops::decode::linear::Reads,
    ) -> Result<crate::ops::decode::linear::Joined> {
        let own = self.own(at.architecture.heads, at.device)?;
        let mix = self.gate.as_ref().map(|w| reads.fine(&w.var)).transpose()?;
        Ok(crate::ops::decode::linear::Joined::Beside(at.window(state, self.size, true)?, at.flat(&own)?, mix))
    }

    /// What both weigh before tokens have a say, [2, H].
    fn own(&self, heads: usize, device: &Device) -> Result<Tensor> {
        match &self.learned {
            Some((w, l)) => Tensor::cat(&[w.var.reshape((1, heads))?, l.var.reshape((1, heads))?], 0),
            None => Tensor::new(&self.weights, device)?.unsqueeze(1)?.repeat((1, heads)),
        }
    }

    /// What both weigh, [2, H] or [B, T, 2, H].
    fn weights(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let dtype = wide(x.dtype());
        let own = self.own(heads, x.device())?.to_dtype(dtype)?;
        let Some(weight) = &self.gate else { return Ok(own) };
        let (b, t, _) = x.dims3()?;
        // Twice the logistic function.
        let factor = gate::Gate { curve: Curve::Sigmoid, scale: 2.0, group: 1 };
        let logits = project(x, weight)?.reshape((b, t, 2, heads))?;
        factor.forward(&logits, None, Some(&own.flatten_all()?))
    }
}
