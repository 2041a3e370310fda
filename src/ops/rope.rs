//! Rotary position embedding in the half-split layout, with a gradient.
//!
//! Pairs (x_d, x_{d + R/2}) of the first R channels of a head turn by `position * inverse_frequency[d]`, the others stay;
//! most families have R = D. `x` [B, T, heads, D] packs queries, keys and values; only the first `rotated` heads turn.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::cpu;

/// Cosines and sines [T, R / 2] of the positions of `x`.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, rotated: usize) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if super::cuda::ready(x) && x.dim(3)?.is_multiple_of(4) && 2 * cos.dim(1)? == x.dim(3)? {
        let table = |t: &Tensor| t.to_dtype(candle_core::DType::F32)?.contiguous();
        return on_gpu(&x.contiguous()?, &table(cos)?, &table(sin)?, rotated);
    }
    if !super::fast(x) {
        return plain(x, cos, sin, rotated);
    }
    let op = Op { cos: cos.contiguous()?, sin: sin.contiguous()?, rotated, sign: 1.0 };
    x.contiguous()?.apply_op1(op)
}

/// The definition in plain tensor operations.
pub fn plain(x: &Tensor, cos: &Tensor, sin: &Tensor, rotated: usize) -> Result<Tensor> {
    let (_, time, heads, dim) = x.dims4()?;
    let half = cos.dim(1)?;
    let table = |t: &Tensor| t.to_dtype(x.dtype())?.reshape((1, time, 1, half));
    let (cos, sin) = (table(cos)?, table(sin)?);
    let turned = x.narrow(2, 0, rotated)?;
    let (a, b) = (turned.narrow(3, 0, half)?, turned.narrow(3, half, half)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let turned = match dim - 2 * half {
        0 => Tensor::cat(&[first, second], 3)?,
        rest => Tensor::cat(&[first, second, turned.narrow(3, 2 * half, rest)?], 3)?,
    };
    if rotated == heads {
        return Ok(turned);
    }
    Tensor::cat(&[turned, x.narrow(2, rotated, heads - rotated)?], 2)
}

#[cfg(feature = "cuda")]
fn on_gpu(x: &Tensor, cos: &Tensor, sin: &Tensor, rotated: usize) -> Result<Tensor> {
    use super::cuda::{Output, code, device_of, launch, pointer};
    use std::ffi::{c_int, c_void};
    unsafe extern "C" {
        fn margay_rope(
            y: *mut c_void,
            x: *const c_void,
            cos: *const c_void,
            sin: *const c_void,
            rows: c_int,
            time: c_int,
            heads: c_int,
            dim: c_int,
            rotated: c_int,
            sign: f32,
            dtype: c_int,
            stream: *mut c_void,
        ) -> c_int;
    }
    let (cos, sin) = (cos.clone(), sin.clone());
    let run = move |x: &Tensor, sign: f32| -> Result<Output> {
        let ((batch, time, heads, dim), device) = (x.dims4()?, device_of(x)?);
        if cos.elem_count() != time * dim / 2 {
            candle_core::bail!("rotary table {:?} for {time} positions of {dim}", cos.shape());
        }
        let y = Output::new(device, x.shape(), x.dtype())?;
        let (out, x_at, cos_at, sin_at) = (y.pointer()?, pointer(x)?, pointer(&cos)?, pointer(&sin)?);
        let dtype = code(x.dtype())?;
        let [rows, time, heads, dim, rotated] = [batch * time, time, heads, dim, rotated].map(|n| n as c_int);
        // SAFETY: x and y are contiguous [rows, heads, dim], the tables [time, dim / 2] f32, all on this device.
        launch(device, "rope", |stream| unsafe {
            margay_rope(out, x_at, cos_at, sin_at, rows, time, heads, dim, rotated, sign, dtype, stream)
        })?;
        Ok(y)
    };
    let y = run(x, 1.0)?;
    y.node([x], "rope", Box::new(move |_, _, grad| Ok([Some(run(grad, -1.0)?.tensor())])))
}

struct Op {
    cos: Tensor,
    sin: Tensor,
    rotated: usize,
    /// -1 turns back: the gradient.
    sign: f32,
}

impl Op {
    fn apply(&self, x: &[f32], shape: &Shape) -> Result<Vec<f32>> {
        let (_, time, heads, dim) = shape.dims4()?;
        let half = self.cos.dim(1)?;
        let mut y = x.to_vec();
        cpu::with(&self.cos, |cos| {
            cpu::with(&self.sin, |sin| {
                if cos.len() != time * half || 2 * half > dim {
                    candle_core::bail!("rotary table of {} elements for {time} positions of {half}", cos.len());
                }
                y.par_chunks_mut(heads * dim).enumerate().for_each(|(row, y)| {
                    let t = row % time;
                    let (cos, sin) = (&cos[t * half..(t + 1) * half], &sin[t * half..(t + 1) * half]);
                    for head in y[..self.rotated * dim].chunks_mut(dim) {
                        let (a, b) = head[..2 * half].split_at_mut(half);
                        for i in 0..half {
                            let (x, y, s) = (a[i], b[i], sin[i] * self.sign);
                            a[i] = x * cos[i] - y * s;
                            b[i] = y * cos[i] + x * s;
                        }
                    }
                });
                Ok(())
            })
        })?;
        Ok(y)
    }
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = self.apply(cpu::elements(x, layout)?, layout.shape())?;
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let back = Op { cos: self.cos.clone(), sin: self.sin.clone(), rotated: self.rotated, sign: -self.sign };
        let dx = cpu::with(&grad.contiguous()?, |g| back.apply(g, x.shape()))?;
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{INPUTS, check, input};

    #[test]
    fn fast_equals_plain() {
        let angle = input("large", &[37, 4], 3).to_dtype(candle_core::DType::F32).unwrap();
        let (cos, sin) = (angle.cos().unwrap(), angle.sin().unwrap());
        for kind in INPUTS {
            // All of a head turns, or 8 channels of 12.
            for (rotated, dim) in [(3, 8), (5, 8), (3, 12), (5, 12)] {
                check(kind, &[input(kind, &[2, 37, 5, dim], 1)], 2e-6, |x| super::rope(&x[0], &cos, &sin, rotated));
            }
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn gpu_equals_plain() {
        let angle = input("large", &[37, 32], 3).to_dtype(candle_core::DType::F32).unwrap();
        let (cos, sin) = (angle.cos().unwrap(), angle.sin().unwrap());
        for (kind, rotated) in INPUTS.into_iter().flat_map(|kind| [3, 5].map(|r| (kind, r))) {
            let tables = |x: &candle_core::Tensor| Ok((cos.to_device(x.device())?, sin.to_device(x.device())?));
            super::super::check::check_gpu(
                &format!("{kind}, {rotated}"),
                &[input(kind, &[2, 37, 5, 64], 1)],
                true,
                |x| tables(&x[0]).and_then(|(cos, sin)| super::rope(&x[0], &cos, &sin, rotated)),
                |x| tables(&x[0]).and_then(|(cos, sin)| super::plain(&x[0], &cos, &sin, rotated)),
            );
        }
    }
}
