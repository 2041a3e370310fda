//! The MLP of a block: dense, with or without a gate, or a mixture of experts.

use candle_core::{Result as TensorResult, Tensor};

use super::experts::Experts;
use crate::families::{Activation, Projection};
use crate::ops::glu::{glu, glu_back};
use crate::ops::loss::pulled;
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

impl Mlp {
    /// [B, T, N] of `x` [B, T, N].
    pub(super) fn forward(&self, x: &Tensor, lora: Option<&Adapters>, noise: Option<u64>) -> TensorResult<Tensor> {
        match self {
            Mlp::Dense(mlp) => {
                let inner = mlp.inner(&mlp.gate_up.apply(mlp.layer, x, lora, noise)?)?;
                mlp.down.apply(mlp.layer, &inner, lora, noise)
            }
            Mlp::Experts(experts) => experts.forward(x),
        }
    }

    /// Whether something changes a weight in here.
    pub(super) fn is_changed(&self, lora: Option<&Adapters>) -> bool {
        let parts = [Projection::Gate, Projection::Up, Projection::Down];
        match self {
            Mlp::Dense(mlp) => lora.is_some_and(|lora| parts.iter().any(|p| lora.changes(mlp.layer, *p))),
            Mlp::Experts(_) => false,
        }
    }

    /// What the unchanged MLP's value and gradient are computed from: gate and up of `x`, [B, T, 2 I]; with experts `x`.
    pub(super) fn begin(&self, x: &Tensor) -> TensorResult<Tensor> {
        match self {
            Mlp::Dense(mlp) => mlp.gate_up.apply(mlp.layer, x, None, None),
            Mlp::Experts(_) => Ok(x.clone()),
        }
    }

    /// The unchanged MLP's value from there, [B, T, N].
    pub(super) fn end(&self, begun: &Tensor) -> TensorResult<Tensor> {
        match self {
            Mlp::Dense(mlp) => mlp.down.apply(mlp.layer, &mlp.inner(begun)?, None, None),
            Mlp::Experts(experts) => experts.forward(begun),
        }
    }

    /// What the gradient of that value gives the input, both [B, T, N].
    pub(super) fn pull_back(&self, begun: &Tensor, gradient: &Tensor) -> TensorResult<Tensor> {
        let mlp = match self {
            Mlp::Dense(mlp) => mlp,
            Mlp::Experts(experts) => return pulled(begun, gradient, |x| experts.forward(x)),
        };
        let inner = mlp.down.pull_back(gradient)?;
        let begun = match mlp.gated {
            true => glu_back(begun, mlp.activation, &inner)?,
            false => pulled(begun, &inner, |x| mlp.activation.apply(x))?,
        };
        mlp.gate_up.pull_back(&begun)
    }
}

impl Dense {
    /// What `down` multiplies, [B, T, I], of gate and up.
    fn inner(&self, gate_up: &Tensor) -> TensorResult<Tensor> {
        if self.gated { glu(gate_up, self.activation) } else { self.activation.apply(gate_up) }
    }
}
