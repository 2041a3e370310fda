//! What stands between a recurrence and `o_proj`: a norm per head and a gate read off the layer's input.

use candle_core::{Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::families::Architecture;
use crate::mixers::linear::project;
use crate::mixers::pass::wide_of;
use crate::mixers::{Heads, Spec};
use crate::ops::gate::{Curve, Gate};
use crate::ops::rms_norm::rms_norm;
use crate::ops::wide;
use crate::params::{Init, Param, named};

/// Norm and gate of the output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Output {
    /// RMS norm of each head's output.
    pub norm: bool,
    /// What the output is multiplied by.
    pub gate: OutputGate,
}

/// Gates of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutputGate {
    None,
    /// silu(W x + b)
    Silu,
    /// σ(W x + b)
    Sigmoid,
}

impl Default for Output {
    fn default() -> Self {
        Output { norm: false, gate: OutputGate::None }
    }
}

const NORM: &str = "o_norm.weight";
const GATE: [&str; 2] = ["g_proj.weight", "g_proj.bias"];

impl Output {
    pub fn specs(&self, a: &Architecture) -> Vec<Spec> {
        let new = |name, shape: &[usize], init, scalar| Spec { name, shape: shape.to_vec(), init, scalar };
        let mut specs = Vec::new();
        if self.norm {
            // A weight per head and channel: the teacher's heads differ in size.
            specs.push(new(NORM, &[a.heads, a.head_dim], Init::Constant(1.0), false));
        }
        // The gate starts at 1 where it can, so that it does nothing yet: silu(1.2785) = 1, σ(4) = 0.98.
        let open = match self.gate {
            OutputGate::None => return specs,
            OutputGate::Silu => 1.278_464_542_761,
            OutputGate::Sigmoid => 4.0,
        };
        let width = a.heads * a.head_dim;
        specs.push(new(GATE[0], &[width, a.hidden], Init::Constant(0.0), false));
        specs.push(new(GATE[1], &[width], Init::Constant(open), false));
        specs
    }

    pub fn build(&self, a: &Architecture, params: &[Param]) -> Finish {
        let find = |name: &str| named(params, name);
        Finish { kind: self.gate, norm: find(NORM), gate: find(GATE[0]).zip(find(GATE[1])), eps: a.norm_eps }
    }

    /// Multiply-adds times two per token.
    pub fn flops(&self, a: &Architecture) -> f64 {
        if self.gate == OutputGate::None { 0.0 } else { 2.0 * (a.heads * a.head_dim * a.hidden) as f64 }
    }
}

/// [`Output`] with its tensors.
pub struct Finish {
    kind: OutputGate,
    norm: Option<Param>,
    gate: Option<(Param, Param)>,
    eps: f64,
}

impl Finish {
    /// The same in a one-token step.
    #[cfg(feature = "cuda")]
    pub fn fixed(
        &self,
        at: crate::ops::decode::linear::Frame,
        reads: &mut crate::ops::decode::linear::Reads,
    ) -> Result<crate::ops::decode::linear::Finish> {
        let norm = self.norm.as_ref().map(|w| at.flat(&w.var)).transpose()?;
        let gate = match &self.gate {
            Some((weight, bias)) => {
                Some((at.flat(&bias.var)?, reads.coarse(&weight.var)?, self.kind == OutputGate::Silu))
            }
            None => None,
        };
        Ok(crate::ops::decode::linear::Finish { norm, gate })
    }

    /// Of `y` [B, T, H, D] for the layer input of `x`.
    pub fn apply(&self, y: Tensor, x: &Heads) -> Result<Tensor> {
        let (b, t, h, d) = y.dims4()?;
        let out = match &self.norm {
            Some(_) => rms_norm(&y, &Tensor::ones(d, wide(y.dtype()), y.device())?, self.eps)?,
            None => y,
        };
        // The norm's weight of every head and channel, [H D], is a factor of the gate.
        let weight = self.norm.as_ref().map(|w| w.var.flatten_all()?.to_dtype(wide(out.dtype()))).transpose()?;
        let factor = match (&self.gate, weight) {
            (Some((weight, bias)), norm) => {
                let curve = if self.kind == OutputGate::Silu { Curve::Silu } else { Curve::Sigmoid };
                let logits = project(&x.x, weight)?.reshape((b, t, h, d))?;
                Gate::of(curve).forward(&logits, Some(&bias.var), norm.as_ref())?
            }
            (None, Some(norm)) => norm.reshape((1, 1, h, d))?,
            (None, None) => return Ok(out),
        };
        wide_of(&out)?.broadcast_mul(&factor)?.to_dtype(out.dtype())
    }
}
