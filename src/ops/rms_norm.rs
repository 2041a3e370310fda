//! RMSNorm with a gradient: `y = x / sqrt(mean(x²) + eps) * weight` over the last axis, weight `[N]` frozen.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::cpu;

pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if !super::fast(x) {
        return plain(x, weight, eps);
    }
    x.contiguous()?.apply_op1(Op { weight: weight.contiguous()?, eps: eps as f32 })
}

/// The definition in plain tensor operations, in f32 or wider.
pub fn plain(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(super::wide(x.dtype()))?;
    let mean = (wide.sqr()?.sum_keepdim(D::Minus1)? / x.dim(D::Minus1)? as f64)?;
    wide.broadcast_div(&(mean + eps)?.sqrt()?)?.to_dtype(x.dtype())?.broadcast_mul(&weight.to_dtype(x.dtype())?)
}

struct Op {
    weight: Tensor,
    eps: f32,
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = cpu::elements(x, layout)?;
        let mut y = vec![0f32; x.len()];
        cpu::with(&self.weight, |w| {
            let n = w.len();
            y.par_chunks_mut(n * 16).zip(x.par_chunks(n * 16)).for_each(|(y, x)| {
                cpu::vectorised(
                    #[inline(always)]
                    || {
                        for (y, x) in y.chunks_mut(n).zip(x.chunks(n)) {
                            let r = 1.0 / (cpu::dot(x, x) / n as f32 + self.eps).sqrt();
                            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                                *y = x * r * w;
                            }
                        }
                    },
                )
            });
            Ok(())
        })?;
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let mut dx = vec![0f32; x.elem_count()];
        let mut run = |w: &[f32], x: &[f32], g: &[f32]| {
            let n = w.len();
            let rows = dx.par_chunks_mut(n * 16).zip(x.par_chunks(n * 16)).zip(g.par_chunks(n * 16));
            rows.for_each(|((dx, x), g)| {
                cpu::vectorised(
                    #[inline(always)]
                    || {
                        for ((dx, x), g) in dx.chunks_mut(n).zip(x.chunks(n)).zip(g.chunks(n)) {
                            let r = 1.0 / (cpu::dot(x, x) / n as f32 + self.eps).sqrt();
                            for ((dx, g), w) in dx.iter_mut().zip(g).zip(w) {
                                *dx = g * w;
                            }
                            let mean = cpu::dot(dx, x) / n as f32 * r * r;
                            for (dx, x) in dx.iter_mut().zip(x) {
                                *dx = r * (*dx - x * mean);
                            }
                        }
                    },
                )
            });
            Ok(())
        };
        cpu::with(&self.weight, |w| cpu::with(x, |x| cpu::with(&grad, |g| run(w, x, g))))?;
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{INPUTS, check, input};

    #[test]
    fn fast_equals_plain() {
        let weight = input("randn", &[24], 7).to_dtype(candle_core::DType::F32).unwrap();
        for kind in INPUTS {
            check(kind, &[input(kind, &[2, 33, 24], 1)], 2e-6, |x| super::rms_norm(&x[0], &weight, 1e-5));
        }
    }
}
