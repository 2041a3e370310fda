//! Short causal convolution, one filter per channel ([`crate::ops::short_conv`]): local position where there is no rotation.

use candle_core::{Result, Tensor};

use crate::mixers::Spec;
use crate::mixers::pass::Pass;
use crate::ops::short_conv;
use crate::params::{Init, Param, named};

/// A convolution with its filters.
pub struct ShortConv {
    weight: Param,
    /// The state's name for the rows before.
    rows: &'static str,
}

impl ShortConv {
    /// Filters [channels, 1, taps], the layout of checkpoints; the token's own tap starts at 1, the others at `others`.
    pub fn spec(name: &'static str, channels: usize, taps: usize, others: f64) -> Spec {
        Spec { name, shape: vec![channels, 1, taps], init: Init::LastTap { others }, scalar: false }
    }

    /// The convolution of the parameter that ends in `name`; `None` where there is none.
    pub fn build(name: &'static str, params: &[Param]) -> Option<ShortConv> {
        named(params, name).map(|weight| ShortConv { weight, rows: name })
    }

    /// Filters [channels, 1, taps] and the state's name for the rows before.
    #[cfg(feature = "cuda")]
    pub fn fixed(&self) -> (&Tensor, &str) {
        (&self.weight.var, self.rows)
    }

    /// Of `x` [B, T, heads, D], and behind it silu where asked.
    pub fn apply(&self, x: &Tensor, silu: bool, pass: &mut Pass) -> Result<Tensor> {
        let weight = &self.weight.var;
        let rows = pass.behind(self.rows, x, weight.dim(2)? - 1)?; // [B, taps - 1 + T, heads, D]
        short_conv::ShortConv { silu }.forward(&rows, weight)
    }

    /// Bytes of the rows it holds, `element` bytes a value.
    pub fn state_bytes(channels: usize, taps: usize, element: usize) -> usize {
        channels * taps.saturating_sub(1) * element
    }
}
