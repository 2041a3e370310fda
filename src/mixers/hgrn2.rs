//! HGRN2 (arXiv 2404.07904): gated linear attention whose key is what its gate lets go, key = 1 - e^g, so that a channel
//! forgets as much as it takes in.
//!
//! ```text
//! g = ln(b + (1 - b) σ(f))      f the layer's keys, b a learned lower bound of the decay
//! S = diag(e^g) S + (1 - e^g) vᵀ      y = φqᵀ S
//! ```
//!
//! As published the bounds of all layers are one cumulative softmax over them, the first layer's 0. Here each layer has
//! bounds of its own, since layers train one by one; [`BoundStart::Cumulative`] starts them where that softmax starts.
//!
//! With the layer's own projections as f, q and v it is Liger-HGRN2 (2503.01496). State: `s` [B, H, D, D] in f32; with a
//! window `k`, `v` [B, w, Hkv, D], keys rotated.

use candle_core::{Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use super::State;
use super::linear::{Layer, Linear, cast, graph, state};
use super::parts::beside::Beside;
use super::parts::output::{Finish, Output, OutputGate};
use super::pass::{Pass, wide_of};
use super::{Design, Heads, Mixer, MixerDef, Spec};
use crate::families::Architecture;
#[cfg(feature = "cuda")]
use crate::ops::decode::linear::{self as fixed, Frame, Reads};
use crate::ops::gate::{Curve, Gate, sigmoid};
use crate::ops::gated_linear_attn::GatedLinearAttn;
use crate::ops::softmax::softmax;
use crate::params::{Init, Param, named};

pub const DEF: MixerDef = MixerDef {
    name: "hgrn2",
    about: "gated linear attention whose keys are what its gates let go: HGRN2, Liger-HGRN2",
    variants,
};

/// Keys of `[mixer]` with `kind = "hgrn2"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Features of queries.
    pub query_map: QueryMap,
    /// Learn a lower bound of the decay, one per head.
    pub lower_bound: bool,
    /// Where the lower bounds start.
    pub bound_start: BoundStart,
    /// Norm and gate of the output.
    pub output: Output,
    /// Softmax window beside the linear branch.
    pub window: Beside,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum QueryMap {
    /// softmax(q), as Liger.
    Softmax,
    /// q σ(q), as HGRN2.
    Silu,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BoundStart {
    /// Near 0, at 0.018, in every layer.
    Flat,
    /// At l / L in layer l of L, as HGRN2's cumulative softmax over layers; in layer 0 at 0.018, since 0 would not learn.
    Cumulative,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            query_map: QueryMap::Softmax,
            lower_bound: true,
            bound_start: BoundStart::Flat,
            output: Output::default(),
            window: Beside::default(),
        }
    }
}

fn variants() -> Vec<Box<dyn Design>> {
    let window = Beside { size: 8, ..Beside::default() };
    let list = [
        Config { window: window.clone(), ..Config::default() },
        Config { lower_bound: false, window: Beside { learn: false, ..window }, ..Config::default() },
        Config {
            query_map: QueryMap::Silu,
            bound_start: BoundStart::Cumulative,
            output: Output { norm: true, gate: OutputGate::Silu },
            window: Beside::none(),
            ..Config::default()
        },
    ];
    list.into_iter().map(|c| Box::new(c) as Box<dyn Design>).collect()
}

const LOWER: &str = "lower_bound";
/// Least start of the lower bound, σ(-4).
const LEAST: f64 = 0.017_986_209_962_091_56;

impl Design for Config {
    fn name(&self) -> &'static str {
        DEF.name
    }

    fn check(&self, _: &Architecture) -> std::result::Result<(), String> {
        Ok(())
    }

    fn specs(&self, a: &Architecture) -> Vec<Spec> {
        let mut specs = Vec::new();
        if self.lower_bound {
            let init = match self.bound_start {
                BoundStart::Flat => Init::Constant((LEAST / (1.0 - LEAST)).ln()),
                BoundStart::Cumulative => Init::Depth { least: LEAST, layers: a.layers },
            };
            specs.push(Spec { name: LOWER, shape: vec![a.heads], init, scalar: true });
        }
        specs.extend(self.output.specs(a));
        specs.extend(self.window.specs(a));
        specs
    }

    fn build(&self, a: &Architecture, _: usize, params: Vec<Param>) -> Box<dyn Mixer> {
        let lower = named(&params, LOWER);
        let linear = Hgrn2 { query_map: self.query_map, lower, finish: self.output.build(a, &params) };
        Box::new(Layer { linear, beside: self.window.build(&params), params })
    }

    fn state_bytes(&self, a: &Architecture, _: usize, element: usize) -> usize {
        state(a.heads, a.head_dim, a.head_dim) + self.window.state_bytes(a, element)
    }

    fn graph_width(&self, a: &Architecture) -> usize {
        graph(a, a.head_dim, true)
    }

    fn flops_per_token(&self, a: &Architecture, seq_len: usize) -> f64 {
        let rule = 4.0 * (a.heads * a.head_dim * a.head_dim) as f64;
        rule + self.output.flops(a) + self.window.flops(a, seq_len)
    }

    fn convex(&self) -> bool {
        false
    }
}

struct Hgrn2 {
    query_map: QueryMap,
    /// Logit of the lower bound, `[H]`.
    lower: Option<Param>,
    finish: Finish,
}

impl Hgrn2 {
    /// Log decays and keys [B, T, H, D].
    fn gates(&self, x: &Heads) -> Result<(Tensor, Tensor)> {
        let f = x.keys()?;
        let of = |curve, f: &Tensor| Gate { curve, scale: 1.0, group: x.heads / x.kv_heads }.forward(f, None, None);
        // 1 - e^g = (1 - b) σ(-f), without the loss of a difference.
        let closed = of(Curve::Sigmoid, &f.neg()?)?;
        let Some(lower) = &self.lower else { return Ok((of(Curve::LogSigmoid, &f)?, closed)) };
        let bound = sigmoid(&cast(lower, &closed)?)?.reshape((1, 1, x.heads, 1))?;
        let k = closed.broadcast_mul(&(1.0 - &bound)?)?;
        let open = of(Curve::Sigmoid, &f)?.broadcast_mul(&(1.0 - &bound)?)?;
        Ok((open.broadcast_add(&bound)?.log()?, k))
    }
}

impl Linear for Hgrn2 {
    fn mix(&self, x: &Heads, v: &Tensor, pass: &mut Pass) -> Result<Tensor> {
        let queries = x.queries()?;
        let q = match self.query_map {
            QueryMap::Softmax => softmax(&queries)?,
            QueryMap::Silu => wide_of(&queries)?.silu()?,
        };
        let (gates, k) = self.gates(x)?;
        let like = |t: &Tensor| t.to_dtype(v.dtype());
        let op = GatedLinearAttn::UNSCALED;
        pass.gated("s", op, [&like(&q)?, &like(&k)?, v], &gates)
    }
    #[cfg(feature = "cuda")]
    fn fixed(&self, at: Frame, state: &State, reads: &mut Reads) -> Result<fixed::Linear> {
        let query = if self.query_map == QueryMap::Softmax { fixed::Map::Softmax } else { fixed::Map::Silu };
        let decay = fixed::Decay::Bounded(self.lower.as_ref().map(|b| at.flat(&b.var)).transpose()?);
        let finish = self.finish.fixed(at, reads)?;
        let layer = fixed::Linear::new(at, state, at.architecture.head_dim)?;
        Ok(fixed::Linear { maps: [query, fixed::Map::Released], decay, finish, ..layer })
    }

    fn decays(&self, x: &Heads) -> Result<Option<Tensor>> {
        Ok(Some(self.gates(x)?.0))
    }

    fn finish(&self, y: Tensor, x: &Heads) -> Result<Tensor> {
        self.finish.apply(y, x)
    }
}
