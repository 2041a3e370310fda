//! Gated linear attention and its kin (arXiv 2312.06635): a state that decays before every key joins it.
//!
//! The gate makes the mixer: a low-rank projection per key channel is GLA, a projection per head simple GLA, a constant per
//! head RetNet (2307.08621) or lightning attention, the pooled keys Liger (2503.01496). Weights are divided by their sum
//! or, with `normalise = "none"`, only scaled.
//!
//! State: `s` [B, H, F, D + 1] in f32, the decayed sum of φk [v, 1] (without the 1 where nothing is divided); with a
//! window `k`, `v` [B, w, Hkv, D], keys rotated.

use candle_core::{Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use super::State;
use super::linear::{Layer, Linear, graph, state};
use super::parts::beside::Beside;
use super::parts::gate::{Decays, Gate, GateKind};
use super::parts::maps::{FeatureMap, Form, Maps};
use super::parts::output::{Finish, Output, OutputGate};
use super::pass::Pass;
use super::{Design, Heads, Mixer, MixerDef, Spec};
use crate::families::Architecture;
#[cfg(feature = "cuda")]
use crate::ops::decode::linear::{self as fixed, Frame, Reads};
use crate::ops::gated_linear_attn::GatedLinearAttn;
use crate::ops::hybrid_attn::MIN_DENOMINATOR;
use crate::params::Param;

pub const DEF: MixerDef = MixerDef {
    name: "gla",
    about: "linear attention with a decaying state: GLA, simple GLA, RetNet, lightning, Liger-GLA by their gates",
    variants,
};

/// Keys of `[mixer]` with `kind = "gla"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Features of queries and keys.
    pub feature_map: FeatureMap,
    /// Columns of each feature-map weight; 0 takes half of head_dim. Two-sided maps give twice as many features.
    pub feature_dim: usize,
    /// One map for queries and keys.
    pub tie_qk: bool,
    /// Whether features see rotated queries and keys.
    pub rotary: bool,
    /// What weights are divided by.
    pub normalise: Normalise,
    /// What products of features weigh; cancels where weights are divided by their sum.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub scale: f64,
    /// What the state forgets.
    pub gate: Gate,
    /// Norm and gate of the output.
    pub output: Output,
    /// Softmax window beside the linear branch.
    pub window: Beside,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Normalise {
    /// The sum of the weights of a row.
    Sum,
    None,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            feature_map: FeatureMap::SoftmaxDim,
            feature_dim: 0,
            tie_qk: false,
            rotary: false,
            normalise: Normalise::Sum,
            scale: 1.0,
            gate: Gate::of(GateKind::LowRank),
            output: Output::default(),
            window: Beside::default(),
        }
    }
}

fn variants() -> Vec<Box<dyn Design>> {
    let window = Beside { size: 8, ..Beside::default() };
    let base = Config { window: window.clone(), ..Config::default() };
    let gate = |kind| Config { gate: Gate::of(kind), ..base.clone() };
    let fixed = Beside { learn: false, ..window };
    let bare = Config { window: Beside::none(), ..base.clone() };
    let raw = Config { feature_map: FeatureMap::Identity, normalise: Normalise::None, scale: 0.35, ..bare.clone() };
    let liger = Gate { normaliser: 16.0, ..Gate::of(GateKind::Pooled) };
    let list = [
        base.clone(),
        Config {
            gate: liger.clone(),
            feature_map: FeatureMap::Softmax,
            normalise: Normalise::None,
            window: fixed,
            ..base.clone()
        },
        Config { gate: liger, feature_dim: 2, ..bare.clone() },
        gate(GateKind::None),
        gate(GateKind::ScalarToken),
        Config { rotary: true, tie_qk: true, ..gate(GateKind::ScalarHead) },
        gate(GateKind::Mamba2),
        gate(GateKind::Retention),
        gate(GateKind::Lightning),
        Config { feature_map: FeatureMap::Silu, output: Output { norm: true, gate: OutputGate::Silu }, ..raw.clone() },
        Config { output: Output { norm: false, gate: OutputGate::Sigmoid }, ..raw },
    ];
    list.into_iter().map(|c| Box::new(c) as Box<dyn Design>).collect()
}

impl Config {
    fn form(&self, a: &Architecture) -> Form {
        let cols = self.feature_map.cols(self.feature_dim, a.head_dim, (a.head_dim / 2).max(1));
        Form { tie_qk: self.tie_qk, ..Form::new(self.feature_map, cols) }
    }
}

impl Design for Config {
    fn name(&self) -> &'static str {
        DEF.name
    }

    fn check(&self, a: &Architecture) -> std::result::Result<(), String> {
        if self.normalise == Normalise::Sum && !self.feature_map.positive() {
            return Err("`mixer.normalise` = \"sum\" needs features that are never negative; take another \
                        `feature_map`, or \"none\""
                .into());
        }
        self.form(a).check(a)
    }

    fn specs(&self, a: &Architecture) -> Vec<Spec> {
        let form = self.form(a);
        let mut specs = form.specs(a);
        specs.extend(self.gate.specs(a, form.width()));
        specs.extend(self.output.specs(a));
        specs.extend(self.window.specs(a));
        specs
    }

    fn gate(&self, a: &Architecture) -> Option<(&Gate, usize)> {
        Some((&self.gate, self.form(a).width()))
    }

    fn build(&self, a: &Architecture, layer: usize, params: Vec<Param>) -> Box<dyn Mixer> {
        let form = self.form(a);
        let linear = Gla {
            config: self.clone(),
            maps: form.build(a, &params),
            decays: self.gate.build(a, layer, form.width(), &params),
            finish: self.output.build(a, &params),
        };
        Box::new(Layer { linear, beside: self.window.build(&params), params })
    }

    fn state_bytes(&self, a: &Architecture, _: usize, element: usize) -> usize {
        let values = a.head_dim + (self.normalise == Normalise::Sum) as usize;
        state(a.heads, self.form(a).width(), values) + self.window.state_bytes(a, element)
    }

    fn graph_width(&self, a: &Architecture) -> usize {
        graph(a, self.form(a).width(), self.gate.per_channel())
    }

    fn flops_per_token(&self, a: &Architecture, seq_len: usize) -> f64 {
        let form = self.form(a);
        let per_head = form.flops(a) + 4.0 * (form.width() * (a.head_dim + 1)) as f64;
        let gates = self.gate.flops(a, form.width()) + self.output.flops(a);
        a.heads as f64 * per_head + gates + self.window.flops(a, seq_len)
    }

    fn convex(&self) -> bool {
        let whole =
            (self.window.size == 0) || (self.window.weight + self.window.linear_weight == 1.0 && !self.window.learn);
        self.normalise == Normalise::Sum && self.output == Output::default() && whole
    }
}

struct Gla {
    config: Config,
    maps: Maps,
    decays: Decays,
    finish: Finish,
}

impl Linear for Gla {
    fn mix(&self, x: &Heads, v: &Tensor, pass: &mut Pass) -> Result<Tensor> {
        let qkv = if self.config.rotary { x.rotated()? } else { &x.qkv };
        let (q, k) = self.maps.apart(qkv)?;
        let gates = self.decays.log(x)?;
        match self.config.normalise {
            Normalise::Sum => pass.normalised("s", GatedLinearAttn::UNSCALED, [&q, &k, v], &gates, MIN_DENOMINATOR),
            Normalise::None => {
                let op = GatedLinearAttn { scale: self.config.scale, ..GatedLinearAttn::UNSCALED };
                pass.gated("s", op, [&q, &k, v], &gates)
            }
        }
    }

    fn finish(&self, y: Tensor, x: &Heads) -> Result<Tensor> {
        self.finish.apply(y, x)
    }

    #[cfg(feature = "cuda")]
    fn fixed(&self, at: Frame, state: &State, reads: &mut Reads) -> Result<fixed::Linear> {
        let width = self.maps.form.width();
        let (maps, weights) = self.maps.fixed()?;
        let (decay, tau) = self.decays.fixed(at, reads)?;
        let mut layer = fixed::Linear::new(at, state, width)?;
        if self.config.normalise == Normalise::Sum {
            layer = layer.counted(at, state)?;
        }
        let (rotary, scale, finish) = (self.config.rotary, self.config.scale, self.finish.fixed(at, reads)?);
        Ok(fixed::Linear { maps, weights, rotary, decay, tau, scale, finish, ..layer })
    }

    fn decays(&self, x: &Heads) -> Result<Option<Tensor>> {
        if self.config.gate.kind != GateKind::None { self.decays.log(x).map(Some) } else { Ok(None) }
    }
}
