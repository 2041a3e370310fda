//! A softmax window beside a linear branch, their outputs added: Liger, and any gated mixer.

use candle_core::{Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::families::Architecture;
use crate::mixers::Spec;
use crate::mixers::linear::cast;
use crate::params::{Init, Param};

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
}

impl Default for Beside {
    fn default() -> Self {
        // Near the window alone: what was softmax is still most of it.
        Beside { size: 64, weight: 0.9, linear_weight: 0.1, learn: true }
    }
}

impl Beside {
    /// No window.
    pub fn none() -> Self {
        Beside { size: 0, ..Self::default() }
    }

    /// `mix_window` and `mix_linear` [1, H, 1, 1], where they are learned.
    pub fn specs(&self, a: &Architecture) -> Vec<Spec> {
        if self.size == 0 || !self.learn {
            return Vec::new();
        }
        let spec =
            |name, start| Spec { name, shape: vec![1, a.heads, 1, 1], init: Init::Constant(start), scalar: true };
        vec![spec("mix_window", self.weight), spec("mix_linear", self.linear_weight)]
    }

    /// The part with its tensors, which are the last of `params`.
    pub fn build(&self, params: &[Param]) -> Option<Mix> {
        let find = |name: &str| params.iter().find(|p| p.name.ends_with(name)).cloned();
        let learned = find("mix_window").zip(find("mix_linear"));
        (self.size > 0).then_some(Mix { size: self.size, weights: [self.weight, self.linear_weight], learned })
    }

    /// Bytes of the keys and values it holds, `element` bytes each.
    pub fn state_bytes(&self, a: &Architecture, element: usize) -> usize {
        2 * self.size * a.kv_heads * a.head_dim * element
    }

    /// Multiply-adds times two per token.
    pub fn flops(&self, a: &Architecture, seq_len: usize) -> f64 {
        4.0 * self.size.min(seq_len) as f64 * (a.heads * a.head_dim) as f64
    }
}

/// [`Beside`] with its tensors.
pub struct Mix {
    pub size: usize,
    weights: [f64; 2],
    learned: Option<(Param, Param)>,
}

impl Mix {
    /// The weighted sum of the window's and the linear branch's output [B, T, H, V].
    pub fn add(&self, window: &Tensor, linear: &Tensor) -> Result<Tensor> {
        match &self.learned {
            Some((w, l)) => {
                let by_head = |p: &Param| cast(p, linear)?.reshape((1, 1, (), 1));
                window.broadcast_mul(&by_head(w)?)? + linear.broadcast_mul(&by_head(l)?)?
            }
            None => (window * self.weights[0])? + (linear * self.weights[1])?,
        }
    }
}
