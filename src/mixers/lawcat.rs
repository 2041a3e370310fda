//! LAWCAT (arXiv 2509.18467): a short causal convolution on queries and keys, Hedgehog features, GLA decay, weights that
//! sum to 1; where asked a softmax window under the same denominator.
//!
//! Keys and gates are repeated to the query heads before the convolution, so every query head filters its own. State: `s`
//! [B, H, F, D + 1] in f32; the rows a convolution looks back on; with a window `k`, `v` [B, w, Hkv, D] rotated, the
//! convolved keys `left` [B, w, H, D] and log decays `gates` [B, w - 1, H, F] of the keys in it.

use candle_core::{Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use super::State;
use super::linear::{Layer, Linear, graph, state};
use super::parts::conv::ShortConv;
use super::parts::gate::{Decays, Gate, GateKind};
use super::parts::maps::{FeatureMap, Form, Maps};
use super::parts::shared::{Branch, Shared};
use super::pass::{Pass, repeat};
use super::{Design, Heads, Mixer, MixerDef, Spec};
use crate::families::Architecture;
#[cfg(feature = "cuda")]
use crate::ops::decode::linear::{self as fixed, Frame, Reads};
use crate::ops::gated_linear_attn::GatedLinearAttn;
use crate::params::Param;

pub const DEF: MixerDef = MixerDef {
    name: "lawcat",
    about: "short convolution on queries and keys, Hedgehog features, GLA decay, normalised",
    variants,
};

/// Keys of `[mixer]` with `kind = "lawcat"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Taps of the convolution.
    #[schemars(range(min = 1))]
    pub conv: usize,
    /// Start of all taps but the token's own, which starts at 1.
    pub conv_init_coeff: f64,
    /// Features of convolved queries and keys, never negative.
    pub feature_map: FeatureMap,
    /// Columns of each feature-map weight; 0 takes half of head_dim. Two-sided maps give twice as many features.
    pub feature_dim: usize,
    /// One map for queries and keys.
    pub tie_qk: bool,
    /// What the state forgets.
    pub gate: Gate,
    /// Softmax keys under the same denominator, self included; 0 as published.
    pub window: usize,
    /// Start of the window factor before the sigmoid (-2.197 is sigmoid 0.1).
    pub window_factor: f64,
    /// The linear part weighs 1 - sigmoid(window factor) instead of 1.
    pub affine: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            conv: 4,
            conv_init_coeff: 1e-3,
            feature_map: FeatureMap::SoftmaxDim,
            feature_dim: 0,
            tie_qk: true,
            gate: Gate { normaliser: 16.0, bias: 0.0, ..Gate::of(GateKind::LowRank) },
            window: 0,
            window_factor: -2.197_224_577_336_219_6,
            affine: false,
        }
    }
}

fn variants() -> Vec<Box<dyn Design>> {
    let base = Config::default();
    let list = [
        base.clone(),
        Config { window: 8, tie_qk: false, ..base.clone() },
        Config { window: 8, conv: 2, gate: Gate::of(GateKind::ScalarHead), feature_dim: 3, ..base },
    ];
    list.into_iter().map(|c| Box::new(c) as Box<dyn Design>).collect()
}

const CONV: [&str; 2] = ["q_conv1d.weight", "k_conv1d.weight"];

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
        self.form(a).check_positive(a)
    }

    fn specs(&self, a: &Architecture) -> Vec<Spec> {
        let (form, channels) = (self.form(a), a.heads * a.head_dim);
        let mut specs = form.specs(a);
        specs.extend(CONV.map(|name| ShortConv::spec(name, channels, self.conv, self.conv_init_coeff)));
        specs.extend(self.gate.specs(a, form.width()));
        specs.extend(Shared::specs(a.heads, self.window, self.window_factor, "", 0));
        specs
    }

    fn gate(&self, a: &Architecture) -> Option<(&Gate, usize)> {
        Some((&self.gate, self.form(a).width()))
    }

    fn build(&self, a: &Architecture, layer: usize, params: Vec<Param>) -> Box<dyn Mixer> {
        let form = self.form(a);
        let linear = Lawcat {
            convs: CONV.map(|name| ShortConv::build(name, &params)),
            maps: form.build(a, &params),
            decays: self.gate.build(a, layer, form.width(), &params),
            shared: Shared::build(self.window, self.affine, "lizard.sinks", &params),
        };
        Box::new(Layer { linear, beside: None, params })
    }

    fn state_bytes(&self, a: &Architecture, _: usize, element: usize) -> usize {
        let (width, wide) = (self.form(a).width(), a.heads * a.head_dim);
        let channels = if self.gate.per_channel() { width } else { 1 };
        state(a.heads, width, a.head_dim + 1)
            + 2 * ShortConv::state_bytes(wide, self.conv, element)
            + self.window * (2 * a.kv_heads * a.head_dim + wide) * element
            + state(a.heads, self.window.saturating_sub(1), channels)
    }

    fn graph_width(&self, a: &Architecture) -> usize {
        graph(a, self.form(a).width(), self.gate.per_channel())
    }

    fn flops_per_token(&self, a: &Architecture, seq_len: usize) -> f64 {
        let form = self.form(a);
        let local = (4 * self.window.min(seq_len) + 4 * self.conv) as f64 * a.head_dim as f64;
        let per_head = form.flops(a) + 4.0 * (form.width() * (a.head_dim + 1)) as f64 + local;
        a.heads as f64 * per_head + self.gate.flops(a, form.width())
    }
}

struct Lawcat {
    convs: [Option<ShortConv>; 2],
    maps: Maps,
    decays: Decays,
    shared: Shared,
}

impl Lawcat {
    /// Convolution `which` of `x` [B, T, H, D].
    fn filter(&self, which: usize, x: &Tensor, pass: &mut Pass) -> Result<Tensor> {
        self.convs[which].as_ref().map_or_else(|| Ok(x.clone()), |conv| conv.apply(x, false, pass))
    }
}

impl Linear for Lawcat {
    fn mix(&self, x: &Heads, v: &Tensor, pass: &mut Pass) -> Result<Tensor> {
        let q = self.filter(0, &x.queries()?, pass)?;
        let own = self.filter(1, &repeat(&x.keys()?, x.heads / x.kv_heads)?, pass)?;
        let (time, size) = (own.dim(1)?, self.shared.size);
        let branch = Branch {
            queries: self.maps.queries(&q)?,
            gates: self.decays.log(x)?,
            // The keys behind the window are those of before, convolved then.
            op: GatedLinearAttn::UNSCALED,
            keys: &|_, pass| self.maps.own_keys(&pass.behind("left", &own, size)?.narrow(1, 0, time)?),
        };
        self.shared.mix(x, v, pass, &branch)
    }

    #[cfg(feature = "cuda")]
    fn fixed(&self, at: Frame, state: &State, reads: &mut Reads) -> Result<fixed::Linear> {
        if self.shared.size > 0 {
            candle_core::bail!("filtered keys that wait in a window have no one-token kernel");
        }
        let (maps, weights) = self.maps.fixed()?;
        let (decay, tau) = self.decays.fixed(at, reads)?;
        let [queries, keys] = self.convs.each_ref().map(|c| c.as_ref().map(ShortConv::fixed));
        let conv = at.conv(state, [queries, keys, None], true)?;
        let layer = fixed::Linear::new(at, state, self.maps.form.width())?.counted(at, state)?;
        Ok(fixed::Linear { maps, weights, conv, decay, tau, ..layer })
    }

    fn window(&self) -> usize {
        self.shared.size
    }

    fn decays(&self, x: &Heads) -> Result<Option<Tensor>> {
        self.decays.log(x).map(Some)
    }
}
