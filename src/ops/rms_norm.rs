//! RMSNorm with a gradient: `y = x / sqrt(mean(x²) + eps) * weight` over the last axis, weight `[N]`; one in f32 multiplies
//! before the result is rounded to the precision of `x`. The weight is mostly frozen and only then part of the kernels.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::cpu;
use super::loss::pulled;

pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if weight.track_op() {
        return trained(x, weight, eps);
    }
    #[cfg(feature = "cuda")]
    if super::cuda::ready(x) {
        return on_gpu(&x.contiguous()?, &weight.contiguous()?, eps as f32);
    }
    if !super::fast(x) {
        return plain(x, weight, eps);
    }
    x.contiguous()?.apply_op1(Op { weight: weight.contiguous()?, eps: eps as f32 })
}

/// With a gradient for the weight as well.
fn trained(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let dtype = super::wide(x.dtype());
    let normed = rms_norm(x, &Tensor::ones(weight.shape(), dtype, x.device())?, eps)?;
    normed.to_dtype(dtype)?.broadcast_mul(&weight.to_dtype(dtype)?)?.to_dtype(x.dtype())
}

/// What the gradient of the result gives `x`.
pub fn rms_norm_back(x: &Tensor, weight: &Tensor, eps: f64, gradient: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if super::cuda::ready(x) {
        let (x, weight, gradient) = (x.contiguous()?, weight.contiguous()?, gradient.contiguous()?);
        return Ok(run(&x, &weight, eps as f32, Some(&gradient))?.tensor());
    }
    if !super::fast(x) {
        return pulled(x, gradient, |x| plain(x, weight, eps));
    }
    let op = Op { weight: weight.contiguous()?, eps: eps as f32 };
    op.gradients(&x.contiguous()?, &gradient.contiguous()?)
}

/// The definition in plain tensor operations, in f32 or wider.
pub fn plain(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(super::wide(x.dtype()))?;
    let mean = (wide.sqr()?.sum_keepdim(D::Minus1)? / x.dim(D::Minus1)? as f64)?;
    let y = wide.broadcast_div(&(mean + eps)?.sqrt()?)?;
    if weight.dtype() == wide.dtype() {
        return y.broadcast_mul(weight)?.to_dtype(x.dtype());
    }
    y.to_dtype(x.dtype())?.broadcast_mul(&weight.to_dtype(x.dtype())?)
}

#[cfg(feature = "cuda")]
fn on_gpu(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let weight = weight.clone();
    let y = run(x, &weight, eps, None)?;
    y.node([x], "rms_norm", Box::new(move |[x], _, grad| Ok([Some(run(x, &weight, eps, Some(grad))?.tensor())])))
}

/// The result, or with a gradient of it that of `x`.
#[cfg(feature = "cuda")]
fn run(x: &Tensor, weight: &Tensor, eps: f32, grad: Option<&Tensor>) -> Result<super::cuda::Output> {
    use super::cuda::{Output, code, device_of, launch, pointer};
    use std::ffi::{c_int, c_void};
    unsafe extern "C" {
        fn margay_rms_norm(
            y: *mut c_void,
            x: *const c_void,
            w: *const c_void,
            g: *const c_void,
            rows: c_int,
            n: c_int,
            eps: f32,
            dtype: c_int,
            w_dtype: c_int,
            stream: *mut c_void,
        ) -> c_int;
    }
    let (device, n) = (device_of(x)?, weight.elem_count());
    let y = Output::new(device, x.shape(), x.dtype())?;
    let (out, x_at, w_at) = (y.pointer()?, pointer(x)?, pointer(weight)?);
    let (dtype, w_dtype) = (code(x.dtype())?, code(weight.dtype())?);
    let g_at = grad.map(pointer).transpose()?.unwrap_or(std::ptr::null());
    let rows = (x.elem_count() / n) as c_int;
    // SAFETY: all operands are contiguous [rows, n] or [n] of these precisions on this device.
    launch(device, "rms_norm", |stream| unsafe {
        margay_rms_norm(out, x_at, w_at, g_at, rows, n as c_int, eps, dtype, w_dtype, stream)
    })?;
    Ok(y)
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
        self.gradients(x, &grad.contiguous()?).map(Some)
    }
}

impl Op {
    /// On the CPU, of contiguous f32.
    fn gradients(&self, x: &Tensor, grad: &Tensor) -> Result<Tensor> {
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
        cpu::with(&self.weight, |w| cpu::with(x, |x| cpu::with(grad, |g| run(w, x, g))))?;
        Tensor::from_vec(dx, x.shape(), x.device())
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

    #[test]
    fn a_weight_that_trains_has_its_gradient() {
        let inputs = [input("randn", &[2, 33, 24], 1), input("randn", &[24], 7)];
        check("weight", &inputs, 2e-6, |x| match x[0].dtype() {
            candle_core::DType::F64 => super::plain(&x[0], &x[1], 1e-5),
            _ => super::rms_norm(&x[0], &x[1], 1e-5),
        });
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn gpu_equals_plain() {
        for (kind, n) in INPUTS.into_iter().flat_map(|kind| [24, 1000, 4096].map(|n| (kind, n))) {
            let weight = input("randn", &[n], 7);
            for exact in [false, true] {
                let of = |x: &candle_core::Tensor| {
                    let dtype = if exact { super::super::wide(x.dtype()) } else { x.dtype() };
                    weight.to_device(x.device())?.to_dtype(dtype)
                };
                super::super::check::check_gpu(
                    &format!("{kind}, {n}, weight in f32: {exact}"),
                    &[input(kind, &[2, 33, n], 1)],
                    true,
                    |x| super::rms_norm(&x[0], &of(&x[0])?, 1e-5),
                    |x| super::plain(&x[0], &of(&x[0])?, 1e-5),
                );
            }
        }
    }
}
