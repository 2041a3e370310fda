//! The MLP of a block: dense, with or without a gate, or a mixture of experts.

use candle_core::{D, Result as TensorResult, Tensor};

use super::experts::Experts;
use crate::families::Activation;
use crate::ops::swiglu::swiglu;
use crate::params::{Adapters, Stack};

/// The MLP of a block.
pub enum Mlp {
    Dense(Dense),
    Experts(Experts),
}

/// `down · (act(gate x) * up x)`, without the gate `down · act(up x)`.
pub struct Dense {
    pub(super) layer: usize,
    pub(super) activation: Activation,
    pub(super) gated: bool,
    /// Gate, where there is one, and up.
    pub(super) gate_up: Stack,
    pub(super) down: Stack,
}

impl Dense {
    /// What `down` multiplies, [B, T, I].
    pub(super) fn inner(&self, x: &Tensor, lora: Option<&Adapters>, noise: Option<u64>) -> TensorResult<Tensor> {
        let x = self.gate_up.apply(self.layer, x, lora, noise)?;
        match (self.gated, self.activation) {
            (true, Activation::Silu) => swiglu(&x),
            (true, activation) => {
                let n = x.dim(D::Minus1)? / 2;
                activate(activation, &x.narrow(D::Minus1, 0, n)?)? * x.narrow(D::Minus1, n, n)?
            }
            (false, activation) => activate(activation, &x),
        }
    }
}

fn activate(activation: Activation, x: &Tensor) -> TensorResult<Tensor> {
    match activation {
        Activation::Silu => x.silu(),
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
    }
}
