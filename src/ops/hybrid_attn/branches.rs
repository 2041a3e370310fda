//! The window and the linear branch by their own ops, joined by their shares of the denominator: where kernels of the whole
//! do not serve.

use candle_core::{Result, Tensor};

use super::super::gated_linear_attn::GatedLinearAttn;
use super::super::mix::mix;
use super::super::shares::{Row, shares};
use super::super::softmax_attn::SoftmaxAttn;
use super::super::wide;
use super::HybridAttn;

impl HybridAttn {
    /// The same with a sliding window of `size` keys, each branch by its own op: where kernels of the whole do not serve,
    /// as with a cap, wide heads or many features.
    pub(super) fn by_branches(&self, size: usize, qkv: &Tensor, features: &Tensor, factors: &Tensor) -> Result<Tensor> {
        let (batch, time, _, dim) = qkv.dims4()?;
        let (h, g) = (self.heads, self.kv_heads);
        let softmax = SoftmaxAttn { heads: h, kv_heads: g, window: Some(size), softcap: self.softcap };
        let (near, top, mass) = softmax.forward_with_mass(qkv)?;
        // A key joins the linear branch when it leaves the window.
        let left = |x: &Tensor| x.pad_with_zeros(1, size, 0)?.narrow(1, 0, time);
        let v = left(&qkv.narrow(2, h + g, g)?)?.unsqueeze(3)?.broadcast_as((batch, time, g, h / g, dim))?;
        let (q, k) = (features.narrow(2, 0, h)?, left(&features.narrow(2, h, h)?)?);
        let open = Tensor::zeros(h, wide(qkv.dtype()), qkv.device())?;
        let v = v.reshape((batch, time, h, dim))?;
        let (far, count) = GatedLinearAttn::UNSCALED.counted(&q, &k, &v, &open)?;
        let count = count.to_dtype(mass.dtype())?.squeeze(3)?;
        let factors = factors.to_dtype(mass.dtype())?;
        let weights = shares(Row { top: &top, mass: &mass }, &count, &factors, None, self.affine)?;
        mix(&[&near, &far], &weights)
    }
}
