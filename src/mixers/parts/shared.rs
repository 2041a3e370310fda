//! A softmax window and a decaying linear branch under one denominator: Lizard's default, LAWCAT with its window, BASED.
//!
//! ```text
//! a_ij = σ(f) exp(s_ij - c_i)             i - w < j <= i, s rotated scores, c_i their largest, sinks included
//! a_in = σ(f) exp(t_n - c_i)              sinks: in the denominator only
//! a_ij = λ exp(G_i - G_j) φq_i·φk_j       j <= i - w; λ = 1, or 1 - σ(f) where `affine`
//! y_i  = Σ a v / (Σ a + Σ sinks)
//! ```
//!
//! A key joins the state when it leaves the window, with the decay it met there; the state decays at every step. So no
//! key counts twice, and the exponents are sums of the last `w` gates, never positive.

use candle_core::{Result, Tensor};

use crate::mixers::linear::cast;
use crate::mixers::pass::{Pass, wide_of};
use crate::mixers::{Heads, Spec};
use crate::ops::gated_linear_attn::GatedLinearAttn;
use crate::ops::hybrid_attn::MIN_DENOMINATOR;
use crate::ops::mix::mix;
use crate::ops::shares::{Row, shares};
use crate::params::{Init, Param, named};

/// The window of a shared denominator, with its tensors.
pub struct Shared {
    /// Keys, self included; 0 leaves the linear branch alone.
    pub size: usize,
    /// λ = 1 - σ(f) instead of 1.
    affine: bool,
    /// Window factors before the sigmoid, [1, H, 1, 1].
    factors: Option<Param>,
    /// Sink logits `[m]`, the same for all heads.
    sinks: Option<Param>,
}

const FACTORS: &str = "window_factors";

/// The linear branch: φq [B, T, H, F], log gates [B, T, H] or [B, T, H, F], and φk of keys.
pub struct Branch<'a> {
    pub queries: Tensor,
    pub gates: Tensor,
    pub op: GatedLinearAttn,
    /// φk [B, T, H, F] of the keys that leave the window at these positions, given them rotated [B, T, Hkv, D]; without a
    /// window of all keys.
    pub keys: &'a dyn Fn(&Tensor, &mut Pass) -> Result<Tensor>,
}

impl Shared {
    /// `window_factors`, and `sinks` of them under `sink_name`.
    pub fn specs(heads: usize, size: usize, factor: f64, sink_name: &'static str, sinks: usize) -> Vec<Spec> {
        let mut specs = Vec::new();
        if size > 0 {
            let init = Init::Constant(factor);
            specs.push(Spec { name: FACTORS, shape: vec![1, heads, 1, 1], init, scalar: true });
            if sinks > 0 {
                // Equal starts would be one sink.
                specs.push(Spec { name: sink_name, shape: vec![sinks], init: Init::Ramp { step: 0.1 }, scalar: true });
            }
        }
        specs
    }

    pub fn build(size: usize, affine: bool, sink_name: &str, params: &[Param]) -> Shared {
        let find = |name: &str| named(params, name);
        Shared { size, affine, factors: find(FACTORS), sinks: find(sink_name) }
    }

    /// The same in a one-token step, for `gates` log decays per head.
    #[cfg(feature = "cuda")]
    pub fn fixed(
        &self,
        at: crate::ops::decode::linear::Frame,
        state: &crate::mixers::State,
        gates: usize,
    ) -> Result<crate::ops::decode::linear::Joined> {
        use crate::ops::decode::linear::Joined;
        let Some(factors) = self.factors.as_ref().filter(|_| self.size > 0) else { return Ok(Joined::Alone) };
        let waits = at.rows(state, "gates", self.size, &[at.architecture.heads, gates])?;
        let sinks = self.sinks.as_ref().map(|sinks| at.flat(&sinks.var)).transpose()?;
        let window = at.window(state, self.size, true)?;
        Ok(Joined::Shared(window, at.flat(&factors.var)?, sinks, waits, self.affine))
    }

    /// Both branches: [B, T, H, V].
    pub fn mix(&self, x: &Heads, v: &Tensor, pass: &mut Pass, branch: &Branch) -> Result<Tensor> {
        let keys = x.rotated()?.narrow(2, x.heads, x.kv_heads)?;
        if self.size == 0 {
            let k = (branch.keys)(&keys, pass)?;
            return pass.normalised("s", branch.op, [&branch.queries, &k, v], &branch.gates, MIN_DENOMINATOR);
        }
        let window = pass.window(x, self.size, v)?;
        let (k, v) = &window.left;
        let waited = pass.recent("gates", &branch.gates, self.size)?.exp()?;
        let k = (branch.keys)(k, pass)?;
        let k = match waited.rank() {
            3 => mix(&[&k], &waited.unsqueeze(2)?.broadcast_mul(&window.has_left.to_dtype(waited.dtype())?)?)?,
            _ => k.broadcast_mul(&waited.to_dtype(k.dtype())?)?.broadcast_mul(&window.has_left)?,
        };
        let (sum, count) = pass.counted("s", branch.op, [&branch.queries, &k, v], &branch.gates)?;
        let count = wide_of(&count)?.squeeze(3)?;
        let factors = match &self.factors {
            Some(factors) => cast(factors, &count)?.flatten_all()?,
            None => candle_core::bail!("a shared denominator lacks its window factors"),
        };
        let sinks = self.sinks.as_ref().map(|sinks| cast(sinks, &count)).transpose()?;
        let row = Row { top: &window.top, mass: &window.mass };
        let weights = shares(row, &count, &factors, sinks.as_ref(), self.affine)?;
        pass.of_window(|| mix(&[&window.y], &weights.narrow(2, 0, 1)?))?;
        mix(&[&window.y, &sum], &weights)
    }
}
