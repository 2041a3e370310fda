//! Mamba-2 in the place of attention: values enter as x, keys as B, queries as C (arXiv 2405.21060), so it starts from the
//! layer it replaces.
//!
//! ```text
//! mamba_in_llama (2408.15237, M1)   h = e^{-e^A dt} h + B (dt x)ᵀ      dt = softplus(W x + dt_bias)
//! mohawk (2408.10189)               h = σ(-a) h + B xᵀ                 a = W x + b, one number per head
//! y = hᵀ C + D x,      times silu(z), z read off the layer's input
//! ```
//!
//! State: `s` [B, H, D, D] in f32; the rows the convolution looks back on; with a window `k`, `v` [B, w, Hkv, D], keys rotated.

use candle_core::{Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use super::State;
use super::linear::{Layer, Linear, cast, graph, project, state};
use super::parts::beside::Beside;
use super::parts::conv::ShortConv;
use super::parts::output::{Finish, Output, OutputGate};
use super::pass::{Pass, repeat, wide_of};
use super::{Design, Heads, Mixer, MixerDef, Spec};
use crate::families::Architecture;
#[cfg(feature = "cuda")]
use crate::ops::decode::linear::{self as fixed, Frame, Reads};
use crate::ops::gate::{self, Curve};
use crate::ops::gated_linear_attn::GatedLinearAttn;
use crate::ops::mix::mix;
use crate::params::{Init, Param, named};

pub const DEF: MixerDef =
    MixerDef { name: "mamba2", about: "Mamba-2 started from attention: values, keys, queries as x, B, C", variants };

/// Keys of `[mixer]` with `kind = "mamba2"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the decay comes from, and whether x is multiplied by the step size.
    pub layout: Layout,
    /// Taps of the convolution on x, B and C; 0 for none. It starts as the identity.
    pub conv: usize,
    /// silu behind the convolution.
    pub silu: bool,
    /// Bring B and C to unit length per head and weigh the read by sqrt(head_dim): pretrained queries and keys are large.
    pub bc_norm: bool,
    /// Norm and gate of the output.
    pub output: Output,
    /// Softmax window beside the recurrence.
    pub window: Beside,
}

/// How attention's projections become Mamba-2's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// Continuous time: a step size per token and head scales decay and input.
    MambaInLlama,
    /// Discrete: a decay per token and head, the input as it is.
    Mohawk,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            layout: Layout::MambaInLlama,
            conv: 4,
            silu: false,
            bc_norm: true,
            output: Output { norm: true, gate: OutputGate::Silu },
            window: Beside::default(),
        }
    }
}

fn variants() -> Vec<Box<dyn Design>> {
    let window = Beside { size: 8, ..Beside::default() };
    let list = [
        Config { window, ..Config::default() },
        Config { silu: true, bc_norm: false, window: Beside::none(), ..Config::default() },
        Config {
            layout: Layout::Mohawk,
            output: Output { norm: false, gate: OutputGate::Silu },
            window: Beside::none(),
            ..Config::default()
        },
        Config {
            layout: Layout::Mohawk,
            conv: 0,
            output: Output::default(),
            window: Beside::none(),
            ..Config::default()
        },
    ];
    list.into_iter().map(|c| Box::new(c) as Box<dyn Design>).collect()
}

const CONV: [&str; 3] = ["x_conv1d.weight", "B_conv1d.weight", "C_conv1d.weight"];
const DT: [&str; 4] = ["dt_proj.weight", "dt_bias", "A_log", "D"];

impl Design for Config {
    fn name(&self) -> &'static str {
        DEF.name
    }

    fn check(&self, _: &Architecture) -> std::result::Result<(), String> {
        if self.silu && self.conv == 0 {
            return Err("`mixer.silu` stands behind the convolution: with `conv` = 0 set it to false".into());
        }
        Ok(())
    }

    fn specs(&self, a: &Architecture) -> Vec<Spec> {
        let (h, g, d) = (a.heads, a.kv_heads, a.head_dim);
        let new = |name, shape: &[usize], init| Spec { name, shape: shape.to_vec(), init, scalar: true };
        let mut specs = vec![new(DT[0], &[h, a.hidden], Init::Constant(0.0))];
        match self.layout {
            Layout::MambaInLlama => {
                specs.push(new(DT[1], &[h], Init::Steps { low: 1e-3, high: 0.1, stream: 0x40 }));
                specs.push(new(DT[2], &[h], Init::Constant(0.0)));
            }
            // σ(4) = 0.98 of the state is kept.
            Layout::Mohawk => specs.push(new(DT[1], &[h], Init::Constant(-4.0))),
        }
        specs.push(new(DT[3], &[h], Init::Constant(1.0)));
        if self.conv > 0 {
            let channels = [g * d, g * d, h * d];
            specs.extend(CONV.into_iter().zip(channels).map(|(name, c)| ShortConv::spec(name, c, self.conv, 0.0)));
        }
        specs.extend(self.output.specs(a));
        specs.extend(self.window.specs(a));
        specs
    }

    fn build(&self, a: &Architecture, _: usize, params: Vec<Param>) -> Box<dyn Mixer> {
        let find = |name: &str| named(&params, name);
        let linear = Mamba2 {
            config: self.clone(),
            step: find(DT[0]).zip(find(DT[1])),
            a_log: find(DT[2]),
            skip: find(DT[3]),
            convs: CONV.map(|name| ShortConv::build(name, &params)),
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
        graph(a, a.head_dim, false)
    }

    fn flops_per_token(&self, a: &Architecture, seq_len: usize) -> f64 {
        let rule = 4.0 * (a.heads * a.head_dim * a.head_dim) as f64;
        let gates = 2.0 * (a.heads * a.hidden) as f64 + self.output.flops(a);
        rule + gates + self.window.flops(a, seq_len)
    }

    fn convex(&self) -> bool {
        false
    }
}

struct Mamba2 {
    config: Config,
    /// Weight [H, N] and bias `[H]` of the step size or decay.
    step: Option<(Param, Param)>,
    /// ln of the decay rate, `[H]`.
    a_log: Option<Param>,
    /// D, `[H]`.
    skip: Option<Param>,
    convs: [Option<ShortConv>; 3],
    finish: Finish,
}

impl Mamba2 {
    /// Convolution `which` and silu of `x` [B, T, heads, D].
    fn prepare(&self, x: &Tensor, which: usize, pass: &mut Pass) -> Result<Tensor> {
        match &self.convs[which] {
            Some(conv) => conv.apply(x, self.config.silu, pass),
            None => Ok(x.clone()),
        }
    }

    /// softplus(W x + b): step sizes [B, T, H], or what σ of its negative keeps.
    fn step(&self, x: &Heads) -> Result<Tensor> {
        let Some((weight, bias)) = &self.step else { candle_core::bail!("mamba2 lacks its step sizes") };
        let logits = project(&x.x, weight)?.unsqueeze(3)?; // [B, T, H, 1]
        gate::Gate::of(Curve::Softplus).forward(&logits, Some(&bias.var), None)?.squeeze(3)
    }

    fn log_decays(&self, step: &Tensor) -> Result<Tensor> {
        match &self.a_log {
            Some(a) => step.broadcast_mul(&cast(a, step)?.exp()?.neg()?),
            // σ(-a) = e^{-softplus(a)}
            None => step.neg(),
        }
    }

    /// To unit length where asked.
    fn unit(&self, x: Tensor) -> Result<Tensor> {
        if !self.config.bc_norm {
            return Ok(x);
        }
        let wide = wide_of(&x)?;
        let length = (wide.sqr()?.sum_keepdim(3)? + 1e-6)?.sqrt()?;
        wide.broadcast_div(&length)?.to_dtype(x.dtype())
    }
}

impl Linear for Mamba2 {
    fn values(&self, x: &Heads, pass: &mut Pass) -> Result<Tensor> {
        let own = x.qkv.narrow(2, x.heads + x.kv_heads, x.kv_heads)?;
        repeat(&self.prepare(&own, 0, pass)?, x.heads / x.kv_heads)
    }

    fn mix(&self, x: &Heads, v: &Tensor, pass: &mut Pass) -> Result<Tensor> {
        let b = self.unit(self.prepare(&x.keys()?, 1, pass)?)?;
        let c = self.unit(self.prepare(&x.queries()?, 2, pass)?)?;
        let b = repeat(&b, x.heads / x.kv_heads)?;
        let step = self.step(x)?;
        let gates = self.log_decays(&step)?;
        let written = match self.config.layout {
            Layout::MambaInLlama => mix(&[v], &step.unsqueeze(2)?)?,
            Layout::Mohawk => v.clone(),
        };
        let scale = if self.config.bc_norm { (x.qkv.dim(3)? as f64).sqrt() } else { 1.0 };
        let y = pass.gated("s", GatedLinearAttn { scale, ..GatedLinearAttn::UNSCALED }, [&c, &b, &written], &gates)?;
        match &self.skip {
            Some(skip) => {
                let skip = cast(skip, &step)?.unsqueeze(0)?; // [1, H]
                mix(&[&y, v], &Tensor::cat(&[skip.ones_like()?, skip], 0)?)
            }
            None => Ok(y),
        }
    }

    fn finish(&self, y: Tensor, x: &Heads) -> Result<Tensor> {
        self.finish.apply(y, x)
    }

    #[cfg(feature = "cuda")]
    fn fixed(&self, at: Frame, state: &State, reads: &mut Reads) -> Result<fixed::Linear> {
        let Some((weight, bias)) = &self.step else { candle_core::bail!("mamba2 lacks its step sizes") };
        let bias = at.flat(&bias.var)?;
        let rate = match &self.a_log {
            Some(a) => at.flat(&a.var)?.exp()?.neg()?,
            None => bias.ones_like()?.neg()?,
        };
        let decay = fixed::Decay::StepSize(bias, rate, reads.fine(&weight.var)?);
        let map = if self.config.bc_norm { fixed::Map::Unit } else { fixed::Map::Identity };
        let [values, keys, queries] = self.convs.each_ref().map(|c| c.as_ref().map(ShortConv::fixed));
        let conv = at.conv(state, [queries, keys, values], false)?;
        let d = at.architecture.head_dim;
        Ok(fixed::Linear {
            maps: [map; 2],
            conv,
            silu: [self.config.silu; 2],
            decay,
            scale: if self.config.bc_norm { (d as f64).sqrt() } else { 1.0 },
            written: self.config.layout == Layout::MambaInLlama,
            skip: self.skip.as_ref().map(|skip| at.flat(&skip.var)).transpose()?,
            finish: self.finish.fixed(at, reads)?,
            ..fixed::Linear::new(at, state, d)?
        })
    }

    fn decays(&self, x: &Heads) -> Result<Option<Tensor>> {
        self.log_decays(&self.step(x)?).map(Some)
    }
}
