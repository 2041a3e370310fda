//! Causal softmax attention with grouped key heads and an optional sliding window: the teacher and kept layers.
//!
//! `y_i = Σ_j softmax_j(q_i·k_j / sqrt(D)) v_j` over `i - window < j <= i`; `qkv` [B, T, H + 2 Hkv, D] rotated,
//! result [B, T, H, D].
//!
//! It is [`super::hybrid_attn`] without a linear part: the window's share σ cancels, keys before the window are dropped.

use candle_core::{CpuStorage, CustomOp1, D, Device, Layout, Result, Shape, Tensor};

use super::cpu;
use super::hybrid_attn::{Core, HybridAttn, Window};

/// The op's constants.
#[derive(Debug, Clone, Copy)]
pub struct SoftmaxAttn {
    pub heads: usize,
    pub kv_heads: usize,
    /// Keys a row sees, self included; all earlier ones when absent.
    pub window: Option<usize>,
}

impl SoftmaxAttn {
    /// Attention over a whole sequence, in blocks of rows.
    pub fn forward(&self, qkv: &Tensor) -> Result<Tensor> {
        if super::fast(qkv) {
            return qkv.contiguous()?.apply_op1(*self);
        }
        Ok(self.parallel(qkv)?.0)
    }

    /// The definition with T x T weights in plain tensor operations: result and weights [B, H, T, T].
    pub fn parallel(&self, qkv: &Tensor) -> Result<(Tensor, Tensor)> {
        let (_, time, _, dim) = qkv.dims4()?;
        let (h, g) = (self.heads, self.kv_heads);
        let heads = |from, count| qkv.narrow(2, from, count)?.transpose(1, 2)?.contiguous();
        let (q, k, v) = (heads(0, h)?, heads(h, g)?, heads(h + g, g)?);
        let (k, v) = (repeat_kv(&k, h / g)?, repeat_kv(&v, h / g)?);
        let mask = causal_mask(time, time, self.window, qkv.device())?.to_dtype(qkv.dtype())?;
        let scores = (q.matmul(&k.t()?)? * (dim as f64).powf(-0.5))?.broadcast_add(&mask)?;
        let weights = softmax(&scores)?;
        Ok((weights.matmul(&v)?.transpose(1, 2)?.contiguous()?, weights))
    }

    fn core<'a>(&self, shape: &Shape, qkv: &'a [f32]) -> Result<Core<'a>> {
        let window = Window::Sliding(self.window.unwrap_or(usize::MAX));
        let shape_of = HybridAttn { heads: self.heads, kv_heads: self.kv_heads, window, affine: false };
        Core::new(shape_of, shape, qkv, None, &vec![0.0; self.heads])
    }
}

/// [B, Hkv, T, D] -> [B, Hkv * groups, T, D]: query head h reads key head h / groups, whole heads repeated.
pub fn repeat_kv(x: &Tensor, groups: usize) -> Result<Tensor> {
    let (b, h, t, d) = x.dims4()?;
    if groups == 1 {
        return Ok(x.clone());
    }
    x.unsqueeze(2)?.broadcast_as((b, h, groups, t, d))?.reshape((b, h * groups, t, d))
}

/// 0 where the last `rows` positions of `time` may look, -inf elsewhere: [rows, time].
pub fn causal_mask(rows: usize, time: usize, window: Option<usize>, device: &Device) -> Result<Tensor> {
    let past = time - rows;
    let cell = |n: usize| {
        let (i, j) = (past + n / time, n % time);
        if j <= i && window.is_none_or(|w| j + w > i) { 0f32 } else { f32::NEG_INFINITY }
    };
    Tensor::from_iter((0..rows * time).map(cell), device)?.reshape((rows, time))
}

/// Softmax over the last axis, with a gradient.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}

impl CustomOp1 for SoftmaxAttn {
    fn name(&self) -> &'static str {
        "softmax_attn"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, t, _, d) = layout.shape().dims4()?;
        let core = self.core(layout.shape(), cpu::elements(qkv, layout)?)?;
        Ok((CpuStorage::F32(core.forward()), (b, t, self.heads, d).into()))
    }

    fn bwd(&self, qkv: &Tensor, res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let grads = cpu::with(qkv, |x| {
            let core = self.core(qkv.shape(), x)?;
            cpu::with(res, |y| cpu::with(&grad, |dy| Ok(core.backward(y, dy, true))))
        })?;
        grads.qkv.map(|g| Tensor::from_vec(g, qkv.shape(), qkv.device())).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{INPUTS, check, input};
    use super::*;

    #[test]
    fn fast_equals_plain() {
        for kind in INPUTS {
            for time in [1, 63, 64, 65, 200] {
                for window in [None, Some(1), Some(16), Some(1000)] {
                    let op = SoftmaxAttn { heads: 4, kv_heads: 2, window };
                    let x = [input(kind, &[2, time, 8, 8], 1)];
                    check(&format!("{kind}, {time}, {window:?}"), &x, 2e-5, |x| op.forward(&x[0]));
                }
            }
        }
    }
}
