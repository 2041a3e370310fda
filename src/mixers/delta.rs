//! The delta rule and its gated forms: a state that first unlearns what it holds for a key (arXiv 2406.06484, 2412.06464,
//! 2510.26692; [`crate::ops::delta_rule`]).
//!
//! The gate makes the mixer: none is DeltaNet, `mamba2` (one decay per head) gated DeltaNet, a kind per channel Kimi delta
//! attention. Queries and keys are brought to unit length, since the rule is only stable for keys of length 1 or less.
//!
//! State: `s` [B, H, D, D] in f32; the rows a short convolution looks back on; with a window `k`, `v` [B, w, Hkv, D], keys
//! rotated.

use candle_core::{Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use super::State;
use super::linear::{Layer, Linear, graph, project, state};
use super::parts::beside::Beside;
use super::parts::conv::ShortConv;
use super::parts::gate::{Decays, Gate, GateKind};
use super::parts::output::{Finish, Output, OutputGate};
use super::pass::{Pass, repeat};
use super::{Design, Heads, Mixer, MixerDef, Spec};
use crate::families::Architecture;
#[cfg(feature = "cuda")]
use crate::ops::decode::linear::{self as fixed, Frame, Reads};
use crate::ops::delta_rule::{Decay, DeltaRule};
use crate::ops::gate::{self, Curve};
use crate::params::{Init, Param, named};

pub const DEF: MixerDef = MixerDef {
    name: "delta",
    about: "the delta rule: DeltaNet, gated DeltaNet, Kimi delta attention by their gates",
    variants,
};

/// Keys of `[mixer]` with `kind = "delta"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What the state forgets beside what it unlearns: `none`, a kind per head, or one per channel.
    pub gate: Gate,
    /// Taps of a short causal convolution on queries, keys and values; 0 for none.
    pub conv: usize,
    /// silu on queries, keys (and values, behind a convolution).
    pub silu: bool,
    /// Whether the rule sees rotated queries and keys.
    pub rotary: bool,
    /// What a read weighs.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub scale: f64,
    /// Norm and gate of the output.
    pub output: Output,
    /// Softmax window beside the linear branch.
    pub window: Beside,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            gate: Gate::of(GateKind::None),
            conv: 0,
            silu: false,
            rotary: false,
            scale: 1.0,
            output: Output::default(),
            window: Beside::default(),
        }
    }
}

fn variants() -> Vec<Box<dyn Design>> {
    let window = Beside { size: 8, ..Beside::default() };
    let base = Config { window: window.clone(), ..Config::default() };
    let head = Gate::of(GateKind::Mamba2);
    let channel = Gate { normaliser: 16.0, ..Gate::of(GateKind::LowRank) };
    let full = Output { norm: true, gate: OutputGate::Silu };
    let list = [
        base.clone(),
        Config { rotary: true, window: Beside::none(), ..base.clone() },
        Config { gate: head.clone(), window: Beside { gate: true, ..window.clone() }, ..base.clone() },
        Config { gate: head, conv: 4, silu: true, output: full.clone(), window: Beside::none(), ..base.clone() },
        Config { gate: channel.clone(), window: Beside { learn: false, ..window }, ..base.clone() },
        Config { gate: channel, conv: 3, output: Output { gate: OutputGate::Sigmoid, ..full }, ..base },
    ];
    list.into_iter().map(|c| Box::new(c) as Box<dyn Design>).collect()
}

const CONV: [&str; 3] = ["q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"];
const BETA: [&str; 2] = ["b_proj.weight", "b_proj.bias"];

impl Design for Config {
    fn name(&self) -> &'static str {
        DEF.name
    }

    fn check(&self, _: &Architecture) -> std::result::Result<(), String> {
        Ok(())
    }

    fn specs(&self, a: &Architecture) -> Vec<Spec> {
        let (h, g, d) = (a.heads, a.kv_heads, a.head_dim);
        let mut specs = vec![
            Spec { name: BETA[0], shape: vec![h, a.hidden], init: Init::Constant(0.0), scalar: true },
            Spec { name: BETA[1], shape: vec![h], init: Init::Constant(0.0), scalar: true },
        ];
        if self.conv > 0 {
            let channels = [h * d, g * d, g * d];
            specs.extend(CONV.into_iter().zip(channels).map(|(name, c)| ShortConv::spec(name, c, self.conv, 0.0)));
        }
        specs.extend(self.gate.specs(a, d));
        specs.extend(self.output.specs(a));
        specs.extend(self.window.specs(a));
        specs
    }

    fn gate(&self, a: &Architecture) -> Option<(&Gate, usize)> {
        Some((&self.gate, a.head_dim))
    }

    fn build(&self, a: &Architecture, layer: usize, params: Vec<Param>) -> Box<dyn Mixer> {
        let find = |name: &str| named(&params, name);
        let linear = Delta {
            config: self.clone(),
            beta: BETA.into_iter().filter_map(find).collect(),
            convs: CONV.map(|name| ShortConv::build(name, &params)),
            decays: self.gate.build(a, layer, a.head_dim, &params),
            finish: self.output.build(a, &params),
        };
        Box::new(Layer { linear, beside: self.window.build(&params), params })
    }

    fn state_bytes(&self, a: &Architecture, _: usize, element: usize) -> usize {
        let channels = (a.heads + 2 * a.kv_heads) * a.head_dim;
        state(a.heads, a.head_dim, a.head_dim)
            + ShortConv::state_bytes(channels, self.conv, element)
            + self.window.state_bytes(a, element)
    }

    fn graph_width(&self, a: &Architecture) -> usize {
        graph(a, a.head_dim, self.gate.per_channel())
    }

    fn flops_per_token(&self, a: &Architecture, seq_len: usize) -> f64 {
        // Reads, writes, and the chunk's triangular system beside them.
        let rule = (a.heads * a.head_dim) as f64 * (6.0 * a.head_dim as f64 + 4.0 * 64.0);
        let gates = 2.0 * (a.heads * a.hidden) as f64 + self.gate.flops(a, a.head_dim) + self.output.flops(a);
        rule + gates + self.window.flops(a, seq_len)
    }

    fn convex(&self) -> bool {
        false
    }
}

struct Delta {
    config: Config,
    /// Weight [H, N] and bias `[H]` of β.
    beta: Vec<Param>,
    convs: [Option<ShortConv>; 3],
    decays: Decays,
    finish: Finish,
}

impl Delta {
    /// Convolution `which` and silu of `x` [B, T, heads, D].
    fn prepare(&self, x: &Tensor, which: usize, silu: bool, pass: &mut Pass) -> Result<Tensor> {
        match &self.convs[which] {
            Some(conv) => conv.apply(x, silu, pass),
            None if silu => x.contiguous()?.silu(),
            None => Ok(x.clone()),
        }
    }
}

impl Linear for Delta {
    fn values(&self, x: &Heads, pass: &mut Pass) -> Result<Tensor> {
        let own = x.qkv.narrow(2, x.heads + x.kv_heads, x.kv_heads)?;
        let silu = self.config.silu && self.config.conv > 0;
        repeat(&self.prepare(&own, 2, silu, pass)?, x.heads / x.kv_heads)
    }

    fn mix(&self, x: &Heads, v: &Tensor, pass: &mut Pass) -> Result<Tensor> {
        let qkv = if self.config.rotary { x.rotated()? } else { &x.qkv };
        let q = self.prepare(&qkv.narrow(2, 0, x.heads)?, 0, self.config.silu, pass)?;
        let k = self.prepare(&qkv.narrow(2, x.heads, x.kv_heads)?, 1, self.config.silu, pass)?;
        let [weight, bias] = self.beta.as_slice() else {
            candle_core::bail!("the delta rule lacks its write strength")
        };
        let logits = project(&x.x, weight)?.unsqueeze(3)?; // [B, T, H, 1]
        let beta = gate::Gate::of(Curve::Sigmoid).forward(&logits, Some(&bias.var), None)?.squeeze(3)?;
        let gates = self.decays.log(x)?;
        let decay = match self.config.gate.kind {
            GateKind::None => Decay::None,
            _ if self.config.gate.per_channel() => Decay::Key(&gates),
            _ => Decay::Head(&gates),
        };
        let op = DeltaRule { heads: x.heads, kv_heads: x.kv_heads, scale: self.config.scale, normalize: true };
        pass.delta("s", op, [&q, &k, v], &beta, decay)
    }

    fn finish(&self, y: Tensor, x: &Heads) -> Result<Tensor> {
        self.finish.apply(y, x)
    }

    #[cfg(feature = "cuda")]
    fn fixed(&self, at: Frame, state: &State, reads: &mut Reads) -> Result<fixed::Linear> {
        let [weight, bias] = self.beta.as_slice() else {
            candle_core::bail!("the delta rule lacks its write strength")
        };
        let rule = fixed::Rule::Delta(at.flat(&bias.var)?, reads.fine(&weight.var)?);
        let (decay, tau) = self.decays.fixed(at, reads)?;
        let conv = at.conv(state, self.convs.each_ref().map(|c| c.as_ref().map(ShortConv::fixed)), false)?;
        let silu = [self.config.silu, self.config.silu && self.config.conv > 0];
        let (rotary, scale, finish) = (self.config.rotary, self.config.scale, self.finish.fixed(at, reads)?);
        let layer = fixed::Linear::new(at, state, at.architecture.head_dim)?;
        Ok(fixed::Linear { maps: [fixed::Map::Unit; 2], rotary, conv, silu, decay, tau, rule, scale, finish, ..layer })
    }

    fn decays(&self, x: &Heads) -> Result<Option<Tensor>> {
        if self.config.gate.kind != GateKind::None { self.decays.log(x).map(Some) } else { Ok(None) }
    }
}
