//! Gated slot attention (arXiv 2409.07146): keys and values are written into a few slots, a softmax over the slots reads
//! them.
//!
//! ```text
//! K̃ = K̃ diag(α) + k sᵀ      Ṽ = diag(α) Ṽ + s vᵀ      α = e^g, s = 1 - α
//! y = softmax(scale qᵀ K̃) Ṽ
//! ```
//!
//! Two gated passes: the first decays on the slots as values, the second on the slots as keys. With pooled keys as the
//! slot gate it is Liger-GSA (2503.01496). State: `slot_keys` [B, H, D, M], `slot_values` [B, H, M, D] in f32; with a window
//! `k`, `v` [B, w, Hkv, D], keys rotated.

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
use crate::ops::gated_linear_attn::{Channels, GatedLinearAttn};
use crate::ops::softmax::softmax;
use crate::params::Param;

pub const DEF: MixerDef = MixerDef {
    name: "gsa",
    about: "keys and values in a few gated slots, read by a softmax: GSA, Liger-GSA",
    variants,
};

/// Keys of `[mixer]` with `kind = "gsa"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Slots per head; 0 takes head_dim.
    pub slots: usize,
    /// Features of queries and keys, without parameters: `identity` as Liger, `silu` as GSA.
    pub feature_map: FeatureMap,
    /// What products of queries and slot keys weigh.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub scale: f64,
    /// What a slot forgets, and with it what it takes in: one of the kinds per channel.
    pub gate: Gate,
    /// Norm and gate of the output.
    pub output: Output,
    /// Softmax window beside the linear branch.
    pub window: Beside,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            slots: 64,
            feature_map: FeatureMap::Identity,
            scale: 1.0,
            gate: Gate { normaliser: 8.0, bias: 0.0, ..Gate::of(GateKind::LowRank) },
            output: Output::default(),
            window: Beside::default(),
        }
    }
}

fn variants() -> Vec<Box<dyn Design>> {
    let window = Beside { size: 8, ..Beside::default() };
    let pooled = Gate { normaliser: 16.0, ..Gate::of(GateKind::Pooled) };
    let base = Config { slots: 5, window: window.clone(), ..Config::default() };
    let list = [
        base.clone(),
        Config { slots: 0, gate: pooled.clone(), window: Beside { learn: false, ..window }, ..base.clone() },
        Config { slots: 4, gate: pooled.clone(), window: Beside::none(), ..base.clone() },
        Config { gate: pooled, ..base.clone() },
        Config {
            feature_map: FeatureMap::Silu,
            output: Output { norm: true, gate: OutputGate::Silu },
            window: Beside::none(),
            ..base
        },
    ];
    list.into_iter().map(|c| Box::new(c) as Box<dyn Design>).collect()
}

impl Config {
    fn slots(&self, a: &Architecture) -> usize {
        if self.slots == 0 { a.head_dim } else { self.slots }
    }
}

impl Design for Config {
    fn name(&self) -> &'static str {
        DEF.name
    }

    fn check(&self, a: &Architecture) -> std::result::Result<(), String> {
        if let Some(cap) = a.softcap {
            return Err(format!(
                "the teacher bends its scores to ±{cap}, and slots are read by a softmax of what is not bent; \
                 take another `mixer.kind`"
            ));
        }
        if !self.gate.per_channel() {
            return Err("`mixer.gate.kind` must be `low_rank` or `pooled`: every slot has a gate of its own".into());
        }
        if self.feature_map.learned() {
            return Err("`mixer.feature_map` must be one without parameters".into());
        }
        Ok(())
    }

    fn specs(&self, a: &Architecture) -> Vec<Spec> {
        let mut specs = self.gate.specs(a, self.slots(a));
        specs.extend(self.output.specs(a));
        specs.extend(self.window.specs(a));
        specs
    }

    fn gate(&self, a: &Architecture) -> Option<(&Gate, usize)> {
        Some((&self.gate, self.slots(a)))
    }

    fn build(&self, a: &Architecture, layer: usize, params: Vec<Param>) -> Box<dyn Mixer> {
        let linear = Gsa {
            scale: self.scale,
            maps: Form::new(self.feature_map, a.head_dim).build(a, &params),
            decays: self.gate.build(a, layer, self.slots(a), &params),
            finish: self.output.build(a, &params),
        };
        Box::new(Layer { linear, beside: self.window.build(&params), params })
    }

    fn state_bytes(&self, a: &Architecture, _: usize, element: usize) -> usize {
        2 * state(a.heads, a.head_dim, self.slots(a)) + self.window.state_bytes(a, element)
    }

    fn graph_width(&self, a: &Architecture) -> usize {
        graph(a, self.slots(a), true)
    }

    fn flops_per_token(&self, a: &Architecture, seq_len: usize) -> f64 {
        let rule = 8.0 * (a.heads * a.head_dim * self.slots(a)) as f64;
        rule + self.gate.flops(a, self.slots(a)) + self.output.flops(a) + self.window.flops(a, seq_len)
    }

    fn convex(&self) -> bool {
        false
    }
}

struct Gsa {
    scale: f64,
    maps: Maps,
    decays: Decays,
    finish: Finish,
}

impl Linear for Gsa {
    fn mix(&self, x: &Heads, v: &Tensor, pass: &mut Pass) -> Result<Tensor> {
        let (q, k) = self.maps.apart(&x.qkv)?;
        let gates = self.decays.log(x)?; // [B, T, H, M]
        let written = (1.0 - gates.exp()?)?.to_dtype(v.dtype())?;
        let first = GatedLinearAttn { scale: self.scale, gated: Channels::Values, ..GatedLinearAttn::UNSCALED };
        let logits = pass.gated("slot_keys", first, [&q, &k, &written], &gates)?;
        let read = softmax(&logits)?.to_dtype(v.dtype())?;
        let second = GatedLinearAttn::UNSCALED;
        pass.gated("slot_values", second, [&read, &written, v], &gates)
    }

    fn finish(&self, y: Tensor, x: &Heads) -> Result<Tensor> {
        self.finish.apply(y, x)
    }

    #[cfg(feature = "cuda")]
    fn fixed(&self, at: Frame, state: &State, reads: &mut Reads) -> Result<fixed::Linear> {
        let (h, d) = (at.architecture.heads, at.architecture.head_dim);
        let (decay, tau) = self.decays.fixed(at, reads)?;
        let slots = self.decays.width();
        if !slots.is_multiple_of(4) {
            candle_core::bail!("{slots} slots: one-token kernels hold a multiple of 4");
        }
        let rule = fixed::Rule::Slots(at.state(state, "slot_keys", &[at.batch, h, d, slots])?);
        let finish = self.finish.fixed(at, reads)?;
        let layer = fixed::Linear::new(at, state, slots)?;
        let s = at.state(state, "slot_values", &[at.batch, h, slots, d])?;
        Ok(fixed::Linear { maps: self.maps.fixed()?.0, decay, tau, rule, scale: self.scale, s, finish, ..layer })
    }

    fn decays(&self, x: &Heads) -> Result<Option<Tensor>> {
        self.decays.log(x).map(Some)
    }
}
