//! Lizard with one shared denominator: a softmax window with sinks and gated linear attention behind it (after arXiv
//! 2507.09025; formula in [`super::parts::shared`]).
//!
//! The published form normalises both branches alone and does not rotate ([`super::lizard_paper`]); with one denominator
//! rows sum to 1 and no key counts twice. Gates and features are the published ones.
//!
//! State: `s` [B, H, F, D + 1] in f32; `k`, `v` [B, w, Hkv, D], keys rotated; `gates` [B, w - 1, H] or [B, w - 1, H, F],
//! the log decays keys in the window have met.

use candle_core::{Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use super::State;
use super::linear::{Layer, Linear, graph, state};
use super::parts::gate::{Decays, Gate, GateKind};
use super::parts::maps::{FeatureMap, Form, Maps};
use super::parts::shared::{Branch, Shared};
use super::pass::Pass;
use super::{Design, Heads, Mixer, MixerDef, Spec};
use crate::families::Architecture;
#[cfg(feature = "cuda")]
use crate::ops::decode::linear::{self as fixed, Frame, Reads};
use crate::ops::gated_linear_attn::{Exponents, GatedLinearAttn};
use crate::params::Param;

pub const DEF: MixerDef = MixerDef {
    name: "lizard",
    about: "softmax window with sinks and gated linear attention behind it, one denominator",
    variants,
};

/// Keys of `[mixer]` with `kind = "lizard"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Softmax keys, self included; 0 is gated linear attention alone.
    pub window: usize,
    /// Sink logits in the window's denominator.
    pub sinks: usize,
    /// Start of the window factor before the sigmoid (-2.197 is sigmoid 0.1).
    pub window_factor: f64,
    /// The linear part weighs 1 - sigmoid(window factor) instead of 1.
    pub affine: bool,
    /// Features of rotated queries and keys, never negative.
    pub feature_map: FeatureMap,
    /// Columns of each feature-map weight; 0 takes `min(64, head_dim)`. Two-sided maps give twice as many features.
    pub feature_dim: usize,
    /// One map for queries and keys.
    pub tie_qk: bool,
    /// What the linear branch forgets.
    pub gate: Gate,
    /// How decays between rows are formed: `pairwise`, or `recentred`, the paper's reparametrisation, which raises log decays
    /// to at least -1 in training and decoding; the paper's `feature_map` with it is `exp`.
    pub exponents: Exponents,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            window: 128,
            sinks: 4,
            window_factor: -2.197_224_577_336_219_6,
            affine: false,
            feature_map: FeatureMap::SoftmaxDim,
            feature_dim: 0,
            tie_qk: false,
            gate: Gate::of(GateKind::ScalarToken),
            exponents: Exponents::Pairwise,
        }
    }
}

fn variants() -> Vec<Box<dyn Design>> {
    let base = Config { window: 8, ..Config::default() };
    let gate = |gate: Gate| Config { gate, ..base.clone() };
    let list = [
        base.clone(),
        Config { affine: true, ..gate(Gate::of(GateKind::ScalarHead)) },
        gate(Gate::of(GateKind::Mamba2)),
        Config { feature_dim: 4, ..gate(Gate { normaliser: 16.0, ..Gate::of(GateKind::LowRank) }) },
        Config {
            sinks: 0,
            feature_map: FeatureMap::ExpDim,
            feature_dim: 4,
            ..gate(Gate { normaliser: 16.0, ..Gate::of(GateKind::Pooled) })
        },
        Config { window: 0, sinks: 0, tie_qk: true, ..base.clone() },
        Config {
            feature_map: FeatureMap::Exp,
            feature_dim: 4,
            exponents: Exponents::Recentred,
            ..gate(Gate { bias: 0.5, ..Gate::of(GateKind::ScalarHead) })
        },
    ];
    list.into_iter().map(|c| Box::new(c) as Box<dyn Design>).collect()
}

const SINKS: &str = "lizard.sinks";

impl Config {
    fn form(&self, a: &Architecture) -> Form {
        let cols = self.feature_map.cols(self.feature_dim, a.head_dim, a.head_dim.min(64));
        Form { tie_qk: self.tie_qk, ..Form::new(self.feature_map, cols) }
    }
}

impl Design for Config {
    fn name(&self) -> &'static str {
        DEF.name
    }

    fn check(&self, a: &Architecture) -> std::result::Result<(), String> {
        if self.window == 0 && self.sinks > 0 {
            return Err("`mixer.sinks` stand in the window's denominator: with `window` = 0 set them to 0".into());
        }
        self.form(a).check_positive(a)
    }

    fn specs(&self, a: &Architecture) -> Vec<Spec> {
        let form = self.form(a);
        let mut specs = form.specs(a);
        specs.extend(self.gate.specs(a, form.width()));
        specs.extend(Shared::specs(a.heads, self.window, self.window_factor, SINKS, self.sinks));
        specs
    }

    fn gate(&self, a: &Architecture) -> Option<(&Gate, usize)> {
        Some((&self.gate, self.form(a).width()))
    }

    fn build(&self, a: &Architecture, layer: usize, params: Vec<Param>) -> Box<dyn Mixer> {
        let form = self.form(a);
        let linear = Lizard {
            maps: form.build(a, &params),
            decays: self.gate.build(a, layer, form.width(), &params).raised(self.exponents),
            op: GatedLinearAttn { exponents: self.exponents, ..GatedLinearAttn::UNSCALED },
            shared: Shared::build(self.window, self.affine, SINKS, &params),
        };
        Box::new(Layer { linear, beside: None, params })
    }

    fn state_bytes(&self, a: &Architecture, _: usize, element: usize) -> usize {
        let width = self.form(a).width();
        let channels = if self.gate.per_channel() { width } else { 1 };
        state(a.heads, width, a.head_dim + 1)
            + 2 * self.window * a.kv_heads * a.head_dim * element
            + state(a.heads, self.window.saturating_sub(1), channels)
    }

    fn graph_width(&self, a: &Architecture) -> usize {
        graph(a, self.form(a).width(), self.gate.per_channel())
    }

    fn flops_per_token(&self, a: &Architecture, seq_len: usize) -> f64 {
        let form = self.form(a);
        let window = 4.0 * self.window.min(seq_len) as f64 * a.head_dim as f64;
        let per_head = form.flops(a) + 4.0 * (form.width() * (a.head_dim + 1)) as f64 + window;
        a.heads as f64 * per_head + self.gate.flops(a, form.width())
    }

    fn convex(&self) -> bool {
        self.sinks == 0
    }
}

struct Lizard {
    maps: Maps,
    decays: Decays,
    op: GatedLinearAttn,
    shared: Shared,
}

impl Linear for Lizard {
    fn mix(&self, x: &Heads, v: &Tensor, pass: &mut Pass) -> Result<Tensor> {
        let branch = Branch {
            queries: self.maps.queries(x.rotated()?)?,
            gates: self.decays.log(x)?,
            op: self.op,
            keys: &|k, _| self.maps.keys(k),
        };
        self.shared.mix(x, v, pass, &branch)
    }

    #[cfg(feature = "cuda")]
    fn fixed(&self, at: Frame, state: &State, reads: &mut Reads) -> Result<fixed::Linear> {
        let width = self.maps.form.width();
        let (maps, weights) = self.maps.fixed()?;
        let (decay, tau) = self.decays.fixed(at, reads)?;
        let joined = self.shared.fixed(at, state, if self.decays.per_channel() { width } else { 1 })?;
        let layer = fixed::Linear::new(at, state, width)?.counted(at, state)?;
        let normalised = self.shared.size == 0;
        let lowest = self.decays.lowest();
        Ok(fixed::Linear { maps, weights, rotary: true, decay, tau, lowest, normalised, joined, ..layer })
    }

    fn window(&self) -> usize {
        self.shared.size
    }

    fn decays(&self, x: &Heads) -> Result<Option<Tensor>> {
        self.decays.log(x).map(Some)
    }
}
