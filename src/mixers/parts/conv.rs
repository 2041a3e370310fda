//! Short causal convolution, one filter per channel: local position where there is no rotation.
//!
//! ```text
//! y_t[c] = Σ_s w[c, s] x_{t - (n - 1) + s}[c]          the last tap is the token itself
//! ```

use candle_core::{Result, Tensor};

use crate::mixers::Spec;
use crate::mixers::linear::cast;
use crate::mixers::pass::Pass;
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

    /// Of `x` [B, T, heads, D].
    pub fn apply(&self, x: &Tensor, pass: &mut Pass) -> Result<Tensor> {
        let (_, time, heads, dim) = x.dims4()?;
        let weight = cast(&self.weight, x)?;
        let taps = weight.dim(2)?;
        let rows = pass.behind(self.rows, x, taps - 1)?; // [B, taps - 1 + T, heads, D]
        let mut y: Option<Tensor> = None;
        for tap in 0..taps {
            let filter = weight.narrow(2, tap, 1)?.reshape((1, 1, heads, dim))?;
            let part = rows.narrow(1, tap, time)?.broadcast_mul(&filter)?;
            y = Some(y.map_or(Ok(part.clone()), |y| y + part)?);
        }
        y.map_or_else(|| Ok(x.clone()), Ok)
    }

    /// Bytes of the rows it holds, `element` bytes a value.
    pub fn state_bytes(channels: usize, taps: usize, element: usize) -> usize {
        channels * taps.saturating_sub(1) * element
    }
}
