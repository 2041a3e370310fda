//! Lizard as published (arXiv 2507.09025): gated linear attention over all keys, and beside it a softmax window with sinks,
//! each normalised alone, nothing rotated.
//!
//! ```text
//! ŷ_i = Σ_{j<=i} e^{G_i - G_j} φq_i·φk_j v_j / Σ_{j<=i} e^{G_i - G_j} φq_i·φk_j
//! z_i = Σ_{i-w<j<=i} e^{s_ij} v_j / (Σ e^{s_ij} + Σ_n e^{t_n})
//! y_i = ŷ_i + α z_i
//! ```
//!
//! `meta = "sink"` reads the published "meta tokens" as the sink logits t; `meta = "kv"` as keys and values of their own
//! that every row also sees. State: `s` [B, H, F, D + 1] in f32; `k`, `v` [B, w, Hkv, D].

use candle_core::{D, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use super::State;
use super::linear::{Layer, Linear, cast, graph, state};
use super::parts::gate::{Decays, Gate, GateKind};
use super::parts::maps::{FeatureMap, Form, Maps};
use super::pass::{Pass, wide_of};
use super::{Design, Heads, Mixer, MixerDef, Spec};
use crate::families::Architecture;
#[cfg(feature = "cuda")]
use crate::ops::decode::linear::{self as fixed, Frame, Reads};
use crate::ops::gated_linear_attn::{Exponents, GatedLinearAttn};
use crate::ops::hybrid_attn::MIN_DENOMINATOR;
use crate::ops::mix::mix;
use crate::params::{Init, Param, named};

pub const DEF: MixerDef = MixerDef {
    name: "lizard-paper",
    about: "Lizard as published: gated linear attention plus a softmax window with sinks, nothing rotated",
    variants,
};

/// Keys of `[mixer]` with `kind = "lizard-paper"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Softmax keys, self included.
    #[schemars(range(min = 1))]
    pub window: usize,
    /// How many meta tokens a row sees beside its window.
    pub meta_tokens: usize,
    /// What a meta token is.
    pub meta: Meta,
    /// Whether the window sees rotated queries and keys: not in the paper, but no head can look at the token before
    /// without it.
    pub rotary: bool,
    /// Features of queries and keys, not rotated, never negative.
    pub feature_map: FeatureMap,
    /// Columns of each feature-map weight; 0 takes half of head_dim. Two-sided maps give twice as many features.
    pub feature_dim: usize,
    /// What the linear branch forgets.
    pub gate: Gate,
    /// How decays between rows are formed: `pairwise`, or `recentred`, the paper's reparametrisation, which raises log decays
    /// to at least -1 in training and decoding; the paper's `feature_map` with it is `exp`.
    pub exponents: Exponents,
    /// Start of the window's weight α.
    pub alpha: f64,
    /// One α per head instead of one per layer.
    pub alpha_per_head: bool,
}

/// What a meta token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Meta {
    /// A logit in the denominator of the window.
    Sink,
    /// A key and a value.
    Kv,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            window: 128,
            meta_tokens: 4,
            meta: Meta::Sink,
            rotary: false,
            feature_map: FeatureMap::SoftmaxDim,
            feature_dim: 0,
            gate: Gate::of(GateKind::ScalarToken),
            exponents: Exponents::Pairwise,
            alpha: 1.0,
            alpha_per_head: false,
        }
    }
}

fn variants() -> Vec<Box<dyn Design>> {
    let base = Config { window: 8, ..Config::default() };
    let list = [
        base.clone(),
        Config { meta: Meta::Kv, alpha_per_head: true, ..base.clone() },
        Config { meta_tokens: 0, rotary: true, gate: Gate::of(GateKind::ScalarHead), ..base.clone() },
        Config {
            feature_map: FeatureMap::Exp,
            exponents: Exponents::Recentred,
            gate: Gate { bias: 0.5, ..base.gate.clone() },
            ..base
        },
    ];
    list.into_iter().map(|c| Box::new(c) as Box<dyn Design>).collect()
}

const SINKS: &str = "lizard.sinks";
const META: [&str; 2] = ["lizard.meta_k", "lizard.meta_v"];
const ALPHA: &str = "lizard.alpha";

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
        let form = self.form(a);
        let new = |name, shape: &[usize], init, scalar| Spec { name, shape: shape.to_vec(), init, scalar };
        let mut specs = form.specs(a);
        specs.extend(self.gate.specs(a, form.width()));
        let (m, g, d) = (self.meta_tokens, a.kv_heads, a.head_dim);
        match self.meta {
            _ if m == 0 => {}
            // Equal starts would be one sink.
            Meta::Sink => specs.push(new(SINKS, &[m], Init::Ramp { step: 0.1 }, true)),
            Meta::Kv => {
                specs.push(new(META[0], &[m, g, d], Init::Normal { std: 0.02, stream: 0x30 }, false));
                specs.push(new(META[1], &[m, g, d], Init::Normal { std: 0.02, stream: 0x31 }, false));
            }
        }
        let heads = if self.alpha_per_head { a.heads } else { 1 };
        specs.push(new(ALPHA, &[1, heads, 1, 1], Init::Constant(self.alpha), true));
        specs
    }

    fn gate(&self, a: &Architecture) -> Option<(&Gate, usize)> {
        Some((&self.gate, self.form(a).width()))
    }

    fn build(&self, a: &Architecture, layer: usize, params: Vec<Param>) -> Box<dyn Mixer> {
        let form = self.form(a);
        let find = |name: &str| named(&params, name);
        let linear = LizardPaper {
            size: self.window,
            rotary: self.rotary,
            maps: form.build(a, &params),
            decays: self.gate.build(a, layer, form.width(), &params).raised(self.exponents),
            op: GatedLinearAttn { exponents: self.exponents, ..GatedLinearAttn::UNSCALED },
            sinks: find(SINKS),
            meta: find(META[0]).zip(find(META[1])),
            alpha: find(ALPHA),
        };
        Box::new(Layer { linear, beside: None, params })
    }

    fn state_bytes(&self, a: &Architecture, _: usize, element: usize) -> usize {
        state(a.heads, self.form(a).width(), a.head_dim + 1) + 2 * self.window * a.kv_heads * a.head_dim * element
    }

    fn graph_width(&self, a: &Architecture) -> usize {
        graph(a, self.form(a).width(), self.gate.per_channel())
    }

    fn flops_per_token(&self, a: &Architecture, seq_len: usize) -> f64 {
        let form = self.form(a);
        let window = 4.0 * (self.window.min(seq_len) + self.meta_tokens) as f64 * a.head_dim as f64;
        let per_head = form.flops(a) + 4.0 * (form.width() * (a.head_dim + 1)) as f64 + window;
        a.heads as f64 * per_head + self.gate.flops(a, form.width())
    }

    fn convex(&self) -> bool {
        false
    }
}

struct LizardPaper {
    size: usize,
    rotary: bool,
    maps: Maps,
    decays: Decays,
    op: GatedLinearAttn,
    sinks: Option<Param>,
    /// Keys and values [m, Hkv, D] of meta tokens.
    meta: Option<(Param, Param)>,
    alpha: Option<Param>,
}

impl LizardPaper {
    /// α z_i.
    fn anchor(&self, x: &Heads, v: &Tensor, pass: &mut Pass) -> Result<Tensor> {
        let plain;
        let x = if self.rotary {
            x
        } else {
            plain = x.unrotated();
            &plain
        };
        let window = pass.window(x, self.size, v)?;
        let top = wide_of(&window.top)?.unsqueeze(3)?; // [B, T, H, 1]
        let mass = wide_of(&window.mass)?.unsqueeze(3)?;
        let mut den = mass.clone();
        if let Some(sinks) = &self.sinks {
            // Shifted by the window's largest score; a sink far above it is the row.
            let sinks = cast(sinks, &top)?.reshape((1, 1, 1, ()))?;
            den = (den + sinks.broadcast_sub(&top)?.minimum(80.0)?.exp()?.sum_keepdim(D::Minus1)?)?;
        }
        let mut recalled = None;
        if let Some((keys, values)) = &self.meta {
            let (weights, values) = self.recall(x, &top, keys, values)?;
            den = (den + weights.sum_keepdim(D::Minus1)?)?;
            // Meta values are no part of what the layer does to `v`.
            if !matches!(pass, Pass::Weights(_)) {
                recalled = Some(read(&weights, &values)?.to_dtype(v.dtype())?);
            }
        }
        let mut share = den.recip()?;
        if let Some(alpha) = &self.alpha {
            share = share.broadcast_mul(&cast(alpha, &share)?.reshape((1, 1, (), 1))?)?;
        }
        let own = (&share * mass)?.transpose(2, 3)?; // [B, T, 1, H]
        match recalled {
            Some(recalled) => mix(&[&window.y, &recalled], &Tensor::cat(&[own, share.transpose(2, 3)?], 2)?),
            None => mix(&[&window.y], &own),
        }
    }

    /// exp(score - top) [B, T, H, m] of queries and meta keys, and meta values [H, m, D].
    fn recall(&self, x: &Heads, top: &Tensor, keys: &Param, values: &Param) -> Result<(Tensor, Tensor)> {
        let group = x.heads / x.kv_heads;
        let by_head = |p: &Param| -> Result<Tensor> {
            let p = cast(p, top)?.transpose(0, 1)?; // [Hkv, m, D]
            let (g, m, d) = p.dims3()?;
            p.unsqueeze(1)?.broadcast_as((g, group, m, d))?.reshape((g * group, m, d))
        };
        let q = wide_of(&if self.rotary { x.rotated()?.narrow(2, 0, x.heads)? } else { x.queries()? })?;
        let scale = (q.dim(3)? as f64).powf(-0.5);
        let scores = (q.transpose(1, 2)?.contiguous()?.broadcast_matmul(&by_head(keys)?.t()?)? * scale)?;
        let scores = scores.transpose(1, 2)?; // [B, T, H, m]
        Ok((scores.broadcast_sub(top)?.minimum(80.0)?.exp()?, by_head(values)?))
    }
}

/// Σ_m weights [B, T, H, m] values [H, m, D].
fn read(weights: &Tensor, values: &Tensor) -> Result<Tensor> {
    weights.transpose(1, 2)?.contiguous()?.broadcast_matmul(values)?.transpose(1, 2)
}

impl Linear for LizardPaper {
    fn mix(&self, x: &Heads, v: &Tensor, pass: &mut Pass) -> Result<Tensor> {
        let (q, k) = self.maps.apart(&x.qkv)?;
        let gated = pass.normalised("s", self.op, [&q, &k, v], &self.decays.log(x)?, MIN_DENOMINATOR)?;
        let anchor = self.anchor(x, v, pass)?;
        pass.of_window(|| Ok(anchor.clone()))?;
        gated + anchor
    }

    #[cfg(feature = "cuda")]
    fn fixed(&self, at: Frame, state: &State, reads: &mut Reads) -> Result<fixed::Linear> {
        if self.meta.is_some() {
            candle_core::bail!("meta keys and values have no one-token kernel");
        }
        let h = at.architecture.heads;
        let (maps, weights) = self.maps.fixed()?;
        let (decay, tau) = self.decays.fixed(at, reads)?;
        let alpha = match &self.alpha {
            Some(alpha) => at.flat(&alpha.var)?.broadcast_as(h)?.contiguous()?,
            None => Tensor::ones(h, candle_core::DType::F32, at.device)?,
        };
        let sinks = self.sinks.as_ref().map(|sinks| at.flat(&sinks.var)).transpose()?;
        let joined = fixed::Joined::Anchored(at.window(state, self.size, self.rotary)?, alpha, sinks);
        let layer = fixed::Linear::new(at, state, self.maps.form.width())?.counted(at, state)?;
        Ok(fixed::Linear { maps, weights, decay, tau, lowest: self.decays.lowest(), joined, ..layer })
    }

    fn window(&self) -> usize {
        self.size
    }

    fn decays(&self, x: &Heads) -> Result<Option<Tensor>> {
        self.decays.log(x).map(Some)
    }
}
