//! A mixture of experts: each token goes through the experts with the largest scores.
//!
//! ```text
//! p = softmax(router x)                                 [E], at least in f32
//! y = Σ_e in the K largest  w_e · expert_e(x)           w = p, or p over the sum of the K
//! ```
//!
//! Which experts a token meets has no gradient; their weights and outputs have.

use candle_core::{D, DType, Result as TensorResult, Tensor};

use crate::error::Result;
use crate::families::{self, Projection, Role};
use crate::ops::glu::{Activation, glu};
use crate::ops::linear::linear;
use crate::ops::softmax_attn::softmax;
use crate::ops::wide;

/// Frozen weights of a layer's experts.
pub struct Experts {
    shape: families::Experts,
    /// [E, N]
    router: Tensor,
    /// Gate and up [2 I, N], and down [N, I], of each expert.
    each: Vec<(Tensor, Tensor)>,
}

impl Experts {
    pub(super) fn load(
        shape: families::Experts,
        layer: usize,
        read: &dyn Fn(Role) -> Result<Tensor>,
    ) -> Result<Experts> {
        let expert = |e: usize| {
            let part = |p| read(Role::Expert(layer, e, p));
            let gate_up = Tensor::cat(&[part(Projection::Gate)?, part(Projection::Up)?], 0)?;
            Ok((gate_up, part(Projection::Down)?))
        };
        let each = (0..shape.count).map(expert).collect::<Result<_>>()?;
        Ok(Experts { shape, router: read(Role::Router(layer))?, each })
    }

    /// `x` [B, T, N] -> [B, T, N].
    pub(super) fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        let (b, t, n) = x.dims3()?;
        let (rows, used) = (b * t, self.shape.used);
        let flat = x.reshape((rows, n))?;
        let scores = linear(&flat, &self.router)?;
        let p = softmax(&scores.to_dtype(wide(scores.dtype()))?)?; // [rows, E]
        let chosen = largest(&p.detach().to_dtype(DType::F64)?.to_vec2()?, used);
        let places = Tensor::from_vec(chosen.clone(), (rows, used), x.device())?;
        let mut weights = p.gather(&places, 1)?; // [rows, K]
        if self.shape.normalised {
            weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        }
        // Outputs expert by expert, then back in the order of `chosen`.
        let (mut outputs, mut order) = (Vec::new(), vec![0u32; chosen.len()]);
        let mut count = 0u32;
        for (e, (gate_up, down)) in self.each.iter().enumerate() {
            let own: Vec<usize> = (0..chosen.len()).filter(|i| chosen[*i] as usize == e).collect();
            if own.is_empty() {
                continue;
            }
            for i in &own {
                order[*i] = count;
                count += 1;
            }
            let ids = Tensor::from_iter(own.iter().map(|i| (i / used) as u32), x.device())?;
            outputs.push(linear(&glu(&linear(&flat.index_select(&ids, 0)?, gate_up)?, Activation::Silu)?, down)?);
        }
        let order = Tensor::from_vec(order, rows * used, x.device())?;
        let y = Tensor::cat(&outputs, 0)?.index_select(&order, 0)?.reshape((rows, used, n))?;
        y.broadcast_mul(&weights.to_dtype(y.dtype())?.unsqueeze(2)?)?.sum(1)?.reshape((b, t, n))
    }
}

/// The `k` largest of each row by index, the first of equals first; rows one behind the other.
fn largest(rows: &[Vec<f64>], k: usize) -> Vec<u32> {
    let mut all = Vec::with_capacity(rows.len() * k);
    for row in rows {
        let mut order: Vec<u32> = (0..row.len() as u32).collect();
        order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
        all.extend_from_slice(&order[..k]);
    }
    all
}
