//! Magnitude-aware linear attention (arXiv 2507.00698), made causal: means over the whole become means over the prefix.
//!
//! ```text
//! z_i = scale φq_i · mean_{j<=i} φk_j
//! w_ij = scale / n_i φq_i·φk_j (1 + 1 / (z_i + ε)) - z_i / n_i          n_i = i + 1; rows sum to 1, weights may be negative
//! ```
//!
//! State: `s` [B, H, F, D + 1] and `sum` [B, H, 1, D] in f32; with a window `k`, `v` [B, w, Hkv, D], keys rotated.

use candle_core::{Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use super::State;
use super::linear::{Layer, Linear, graph, state};
use super::parts::beside::Beside;
use super::parts::maps::{FeatureMap, Form, Maps};
use super::pass::{Pass, wide_of};
use super::{Design, Heads, Mixer, MixerDef, Spec};
use crate::families::Architecture;
#[cfg(feature = "cuda")]
use crate::ops::decode::linear::{self as fixed, Frame, Reads};
use crate::ops::gated_linear_attn::GatedLinearAttn;
use crate::params::Param;

pub const DEF: MixerDef = MixerDef {
    name: "mala",
    about: "magnitude-aware linear attention, causal: what a row does not look at is subtracted",
    variants,
};

/// Keys of `[mixer]` with `kind = "mala"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Features of queries and keys, never negative.
    pub feature_map: FeatureMap,
    /// Columns of each feature-map weight; 0 takes half of head_dim. Two-sided maps give twice as many features.
    pub feature_dim: usize,
    /// Whether features see rotated queries and keys.
    pub rotary: bool,
    /// Softmax window beside the linear branch.
    pub window: Beside,
}

impl Default for Config {
    fn default() -> Self {
        Config { feature_map: FeatureMap::Elu, feature_dim: 0, rotary: false, window: Beside::default() }
    }
}

fn variants() -> Vec<Box<dyn Design>> {
    let list = [
        Config { window: Beside { size: 8, ..Beside::default() }, ..Config::default() },
        Config { window: Beside::none(), feature_map: FeatureMap::SoftmaxDim, rotary: true, ..Config::default() },
    ];
    list.into_iter().map(|c| Box::new(c) as Box<dyn Design>).collect()
}

/// ε of the formula.
const EPS: f64 = 1e-6;

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
        specs.extend(self.window.specs(a));
        specs
    }

    fn build(&self, a: &Architecture, _: usize, params: Vec<Param>) -> Box<dyn Mixer> {
        let linear = Mala { rotary: self.rotary, maps: self.form(a).build(a, &params) };
        Box::new(Layer { linear, beside: self.window.build(&params), params })
    }

    fn state_bytes(&self, a: &Architecture, _: usize, element: usize) -> usize {
        let sums = state(a.heads, self.form(a).width(), a.head_dim + 1) + state(a.heads, 1, a.head_dim);
        sums + self.window.state_bytes(a, element)
    }

    fn graph_width(&self, a: &Architecture) -> usize {
        graph(a, self.form(a).width(), false)
    }

    fn flops_per_token(&self, a: &Architecture, seq_len: usize) -> f64 {
        let form = self.form(a);
        a.heads as f64 * (form.flops(a) + 4.0 * (form.width() * (a.head_dim + 1)) as f64)
            + self.window.flops(a, seq_len)
    }

    fn convex(&self) -> bool {
        false
    }
}

struct Mala {
    rotary: bool,
    maps: Maps,
}

impl Linear for Mala {
    #[cfg(feature = "cuda")]
    fn fixed(&self, at: Frame, state: &State, _: &mut Reads) -> Result<fixed::Linear> {
        let (width, a) = (self.maps.form.width(), at.architecture);
        let (maps, weights) = self.maps.fixed()?;
        let rule = fixed::Rule::Magnitude(at.state(state, "sum", &[at.batch, a.heads, a.head_dim])?);
        let layer = fixed::Linear::new(at, state, width)?.counted(at, state)?;
        let scale = (width as f64).powf(-0.5);
        Ok(fixed::Linear { maps, weights, rotary: self.rotary, rule, scale, normalised: false, ..layer })
    }

    fn mix(&self, x: &Heads, v: &Tensor, pass: &mut Pass) -> Result<Tensor> {
        let (b, t, h, _) = v.dims4()?;
        let seen = pass.seen();
        let (q, k) = self.maps.apart(if self.rotary { x.rotated()? } else { &x.qkv })?;
        let scale = (q.dim(3)? as f64).powf(-0.5);
        let still = Tensor::zeros((b, t, h), crate::ops::wide(v.dtype()), v.device())?;
        let (sum, count) = pass.counted("s", GatedLinearAttn::UNSCALED, [&q, &k, v], &still)?;
        let ones = Tensor::ones((b, t, h, 1), v.dtype(), v.device())?;
        let op = GatedLinearAttn::UNSCALED;
        let values = pass.gated("sum", op, [&ones, &ones, v], &still)?;

        let rows = Tensor::from_iter((0..t).map(|i| 1.0 / (seen + i + 1) as f64), v.device())?;
        let rows = rows.reshape((1, t, 1, 1))?.to_dtype(still.dtype())?;
        let z = (wide_of(&count)?.broadcast_mul(&rows)? * scale)?; // [B, T, H, 1]
        let stretch = ((&z + EPS)?.recip()? + 1.0)?;
        let straight = (wide_of(&sum)?.broadcast_mul(&rows)? * scale)?.broadcast_mul(&stretch)?;
        let spread = wide_of(&values)?.broadcast_mul(&rows)?.broadcast_mul(&z)?;
        (straight - spread)?.to_dtype(v.dtype())
    }
}
