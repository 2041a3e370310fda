//! Rank-augmented linear attention (arXiv 2411.07635), made causal: a key is weighed once, when it is written, by how much
//! the queries so far look at it.
//!
//! ```text
//! e_j = exp(scale q̄_j·φk_j)      q̄_j the mean of φq up to j
//! y_i = φq_i Σ_{j<=i} e_j φk_j v_jᵀ / φq_i Σ_{j<=i} e_j φk_j,      times a gate read off the layer's input
//! ```
//!
//! The largest exponent so far is taken out of the state as a decay, so nothing overflows. State: `s` [B, H, F, D + 1],
//! `queries` [B, H, 1, F] and `top` [B, 1, H] in f32; with a window `k`, `v` [B, w, Hkv, D], keys rotated.

use candle_core::{D, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use super::State;
use super::linear::{Layer, Linear, graph, state};
use super::parts::beside::Beside;
use super::parts::maps::{FeatureMap, Form, Maps};
use super::parts::output::{Finish, Output, OutputGate};
use super::pass::{Pass, wide_of};
use super::{Design, Heads, Mixer, MixerDef, Spec};
use crate::families::Architecture;
#[cfg(feature = "cuda")]
use crate::ops::decode::linear::{self as fixed, Frame, Reads};
use crate::ops::gated_linear_attn::GatedLinearAttn;
use crate::ops::hybrid_attn::MIN_DENOMINATOR;
use crate::params::Param;

pub const DEF: MixerDef = MixerDef {
    name: "rala",
    about: "rank-augmented linear attention, causal: keys weighed by the queries before them, a gated output",
    variants,
};

/// Keys of `[mixer]` with `kind = "rala"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Features of queries and keys, never negative.
    pub feature_map: FeatureMap,
    /// Columns of each feature-map weight; 0 takes half of head_dim. Two-sided maps give twice as many features.
    pub feature_dim: usize,
    /// Whether features see rotated queries and keys.
    pub rotary: bool,
    /// Norm and gate of the output.
    pub output: Output,
    /// Softmax window beside the linear branch.
    pub window: Beside,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            feature_map: FeatureMap::Elu,
            feature_dim: 0,
            rotary: false,
            output: Output { norm: false, gate: OutputGate::Sigmoid },
            window: Beside::default(),
        }
    }
}

fn variants() -> Vec<Box<dyn Design>> {
    let bare = Output::default();
    let list = [
        Config { window: Beside { size: 8, ..Beside::default() }, ..Config::default() },
        Config {
            window: Beside::none(),
            feature_map: FeatureMap::ExpDim,
            rotary: true,
            output: bare,
            ..Config::default()
        },
    ];
    list.into_iter().map(|c| Box::new(c) as Box<dyn Design>).collect()
}

impl Config {
    fn form(&self, a: &Architecture) -> Form {
        Form::new(self.feature_map, self.feature_map.cols(self.feature_dim, a.head_dim, (a.head_dim / 2).max(1)))
    }
}

impl Design for Config {
    fn name(&self) -> &'static str {
        DEF.name
    }

    fn check(&self, a: &Architecture) -> std::result::Result<(), String> {
        self.form(a).check_positive(a)
    }

    fn specs(&self, a: &Architecture) -> Vec<Spec> {
        let mut specs = self.form(a).specs(a);
        specs.extend(self.output.specs(a));
        specs.extend(self.window.specs(a));
        specs
    }

    fn build(&self, a: &Architecture, _: usize, params: Vec<Param>) -> Box<dyn Mixer> {
        let maps = self.form(a).build(a, &params);
        let linear = Rala { rotary: self.rotary, maps, finish: self.output.build(a, &params) };
        Box::new(Layer { linear, beside: self.window.build(&params), params })
    }

    fn state_bytes(&self, a: &Architecture, _: usize, element: usize) -> usize {
        let width = self.form(a).width();
        let sums = state(a.heads, width, a.head_dim + 1) + state(a.heads, 1, width) + state(a.heads, 1, 1);
        sums + self.window.state_bytes(a, element)
    }

    fn graph_width(&self, a: &Architecture) -> usize {
        graph(a, self.form(a).width(), false)
    }

    fn flops_per_token(&self, a: &Architecture, seq_len: usize) -> f64 {
        let form = self.form(a);
        let per_head = form.flops(a) + 4.0 * (form.width() * (a.head_dim + 1)) as f64;
        a.heads as f64 * per_head + self.output.flops(a) + self.window.flops(a, seq_len)
    }

    fn convex(&self) -> bool {
        self.window.size == 0 && self.output == Output::default()
    }
}

struct Rala {
    rotary: bool,
    maps: Maps,
    finish: Finish,
}

impl Linear for Rala {
    #[cfg(feature = "cuda")]
    fn fixed(&self, at: Frame, state: &State, reads: &mut Reads) -> Result<fixed::Linear> {
        let (width, h) = (self.maps.form.width(), at.architecture.heads);
        let (maps, weights) = self.maps.fixed()?;
        let queries = at.state(state, "queries", &[at.batch, h, width])?;
        let rule = fixed::Rule::Augmented(queries, at.state(state, "top", &[at.batch, h])?);
        let (scale, finish) = ((width as f64).powf(-0.5), self.finish.fixed(at, reads)?);
        let layer = fixed::Linear::new(at, state, width)?.counted(at, state)?;
        Ok(fixed::Linear { maps, weights, rotary: self.rotary, rule, scale, finish, ..layer })
    }

    fn mix(&self, x: &Heads, v: &Tensor, pass: &mut Pass) -> Result<Tensor> {
        let (b, t, h, _) = v.dims4()?;
        let (seen, dtype) = (pass.seen(), crate::ops::wide(v.dtype()));
        let (q, k) = self.maps.apart(if self.rotary { x.rotated()? } else { &x.qkv })?;
        let scale = (q.dim(3)? as f64).powf(-0.5);

        // q̄: a running sum is a recurrence of width 1.
        let ones = Tensor::ones((b, t, h, 1), v.dtype(), v.device())?;
        let still = Tensor::zeros((b, t, h), dtype, v.device())?;
        let op = GatedLinearAttn::UNSCALED;
        let sums = pass.gated("queries", op, [&ones, &ones, &q], &still)?;
        let rows = Tensor::from_iter((0..t).map(|i| 1.0 / (seen + i + 1) as f64), v.device())?;
        let mean = wide_of(&sums)?.broadcast_mul(&rows.reshape((1, t, 1, 1))?.to_dtype(dtype)?)?;
        let exponent = ((mean * wide_of(&k)?)?.sum(D::Minus1)? * scale)?; // [B, T, H]

        // The largest so far cancels between numerator and denominator: no gradient goes through it.
        let (top, before) = pass.running_max("top", &exponent.detach())?;
        let k = wide_of(&k)?.broadcast_mul(&(&exponent - &top)?.exp()?.unsqueeze(3)?)?.to_dtype(v.dtype())?;
        pass.normalised("s", GatedLinearAttn::UNSCALED, [&q, &k, v], &(before - &top)?, MIN_DENOMINATOR)
    }

    fn finish(&self, y: Tensor, x: &Heads) -> Result<Tensor> {
        self.finish.apply(y, x)
    }
}
