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

use candle_core::{D, Result, Tensor};

use crate::mixers::linear::{cast, log_sigmoid};
use crate::mixers::pass::{Pass, wide_of};
use crate::mixers::{Heads, Spec};
use crate::ops::hybrid_attn::MIN_DENOMINATOR;
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

    /// Both branches: [B, T, H, V].
    pub fn mix(&self, x: &Heads, v: &Tensor, pass: &mut Pass, branch: &Branch) -> Result<Tensor> {
        let keys = x.rotated()?.narrow(2, x.heads, x.kv_heads)?;
        if self.size == 0 {
            let k = (branch.keys)(&keys, pass)?;
            return pass.normalised("s", [&branch.queries, &k, v], &branch.gates, MIN_DENOMINATOR);
        }
        let window = pass.window(x, self.size, v)?;
        let (k, v) = &window.left;
        let waited = pass.recent("gates", &branch.gates, self.size)?.exp()?;
        let waited = if waited.rank() == 3 { waited.unsqueeze(3)? } else { waited };
        let k = (branch.keys)(k, pass)?;
        let k = k.broadcast_mul(&waited.to_dtype(k.dtype())?)?.broadcast_mul(&window.has_left)?;
        let (sum, count) = pass.counted("s", [&branch.queries, &k, v], &branch.gates)?;

        // Everything of a row in f32: [B, T, H, 1].
        let mut top = wide_of(&window.top)?.unsqueeze(3)?;
        let own = top.clone();
        let mut sunk = None;
        if let Some(sinks) = &self.sinks {
            let sinks = cast(sinks, &top)?.reshape((1, 1, 1, ()))?;
            top = top.broadcast_maximum(&sinks.max_keepdim(D::Minus1)?)?;
            sunk = Some(sinks.broadcast_sub(&top)?.exp()?.sum_keepdim(D::Minus1)?);
        }
        let sigma = match &self.factors {
            Some(f) => log_sigmoid(&cast(f, &top)?)?.exp()?.reshape((1, 1, x.heads, 1))?,
            None => Tensor::ones((1, 1, x.heads, 1), top.dtype(), top.device())?,
        };
        let mass = (wide_of(&window.mass)?.unsqueeze(3)? * (own - &top)?.exp()?)?.broadcast_mul(&sigma)?;
        let (mut sum, mut count) = (wide_of(&sum)?, wide_of(&count)?);
        if self.affine {
            let lambda = (1.0 - &sigma)?;
            (sum, count) = (sum.broadcast_mul(&lambda)?, count.broadcast_mul(&lambda)?);
        }
        let mut den = (&mass + count)?;
        if let Some(sunk) = sunk {
            den = (den + sunk.broadcast_mul(&sigma)?)?;
        }
        let soft = wide_of(&window.y)?.broadcast_mul(&mass)?;
        pass.of_window(|| soft.broadcast_div(&den)?.to_dtype(window.y.dtype()))?;
        (soft + sum)?.broadcast_div(&den)?.to_dtype(window.y.dtype())
    }
}
