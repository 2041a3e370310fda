//! `act(gate) * up`, elementwise, with gate and up side by side: [.., 2 N] -> [.., N]. SwiGLU with SiLU, GeGLU with GELU.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::cpu;
use super::loss::pulled;

/// The nonlinearity of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// x Φ(x)
    Gelu,
    /// The same with tanh in place of the error function.
    GeluTanh,
}

impl Activation {
    /// Of every element, in plain tensor operations.
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Activation::Silu => x.silu(),
            Activation::Gelu => x.gelu_erf(),
            Activation::GeluTanh => x.gelu(),
        }
    }
}

pub fn glu(gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if super::cuda::ready(gate_up) {
        return on_gpu(&gate_up.contiguous()?, activation);
    }
    if !super::fast(gate_up) || activation != Activation::Silu {
        return plain(gate_up, activation);
    }
    gate_up.contiguous()?.apply_op1(Op)
}

/// What the gradient [.., N] of the result gives `gate_up`, [.., 2 N].
pub fn glu_back(gate_up: &Tensor, activation: Activation, gradient: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if super::cuda::ready(gate_up) {
        return Ok(run(&gate_up.contiguous()?, activation, Some(&gradient.contiguous()?))?.tensor());
    }
    if !super::fast(gate_up) || activation != Activation::Silu {
        return pulled(gate_up, gradient, |x| plain(x, activation));
    }
    gradients(&gate_up.contiguous()?, &gradient.contiguous()?)
}

/// The definition in plain tensor operations.
pub fn plain(gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    let n = gate_up.dim(D::Minus1)? / 2;
    activation.apply(&gate_up.narrow(D::Minus1, 0, n)?)? * gate_up.narrow(D::Minus1, n, n)?
}

/// The shape with half as many columns.
fn halved(shape: &Shape) -> Result<(Shape, usize)> {
    let mut dims = shape.dims().to_vec();
    match dims.last_mut() {
        Some(last) if last.is_multiple_of(2) => {
            *last /= 2;
            let n = *last;
            Ok((dims.into(), n))
        }
        _ => candle_core::bail!("gate and up side by side need an even last axis, got {shape:?}"),
    }
}

#[cfg(feature = "cuda")]
fn on_gpu(x: &Tensor, act: Activation) -> Result<Tensor> {
    run(x, act, None)?.node([x], "glu", Box::new(move |[x], _, grad| Ok([Some(run(x, act, Some(grad))?.tensor())])))
}

/// The result, or with a gradient of it that of `x`.
#[cfg(feature = "cuda")]
fn run(x: &Tensor, activation: Activation, grad: Option<&Tensor>) -> Result<super::cuda::Output> {
    use super::cuda::{Output, code, device_of, launch, pointer};
    use std::ffi::{c_int, c_void};
    unsafe extern "C" {
        fn margay_glu(
            y: *mut c_void,
            x: *const c_void,
            dy: *const c_void,
            rows: c_int,
            n: c_int,
            activation: c_int,
            dtype: c_int,
            stream: *mut c_void,
        ) -> c_int;
    }
    let ((half, n), device) = (halved(x.shape())?, device_of(x)?);
    let y = Output::new(device, if grad.is_some() { x.shape().clone() } else { half }, x.dtype())?;
    let (out, x_at, dtype) = (y.pointer()?, pointer(x)?, code(x.dtype())?);
    let g_at = grad.map(pointer).transpose()?.unwrap_or(std::ptr::null());
    let rows = (x.elem_count() / (2 * n)) as c_int;
    // SAFETY: x and dx are contiguous [rows, 2 n], y and dy [rows, n], of one precision on this device.
    launch(device, "glu", |stream| unsafe {
        margay_glu(out, x_at, g_at, rows, n as c_int, activation as c_int, dtype, stream)
    })?;
    Ok(y)
}

struct Op;

/// Rows per unit of work.
const BLOCK: usize = 8;

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, (shape, n)) = (cpu::elements(x, layout)?, halved(layout.shape())?);
        let mut y = vec![0f32; x.len() / 2];
        y.par_chunks_mut(BLOCK * n).zip(x.par_chunks(BLOCK * 2 * n)).for_each(|(y, x)| {
            cpu::vectorised(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_mut(n).zip(x.chunks(2 * n)) {
                        let (gate, up) = x.split_at(n);
                        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
                            *y = g * cpu::sigmoid(*g) * u;
                        }
                    }
                },
            )
        });
        Ok((CpuStorage::F32(y), shape))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        gradients(x, &grad.contiguous()?).map(Some)
    }
}

/// On the CPU, of contiguous f32.
fn gradients(x: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let (_, n) = halved(x.shape())?;
    let mut dx = vec![0f32; x.elem_count()];
    let mut run = |x: &[f32], grad: &[f32]| {
        let rows = dx.par_chunks_mut(BLOCK * 2 * n).zip(x.par_chunks(BLOCK * 2 * n)).zip(grad.par_chunks(BLOCK * n));
        rows.for_each(|((dx, x), grad)| {
            cpu::vectorised(
                #[inline(always)]
                || {
                    for ((dx, x), dy) in dx.chunks_mut(2 * n).zip(x.chunks(2 * n)).zip(grad.chunks(n)) {
                        let ((dg, du), (g, u)) = (dx.split_at_mut(n), x.split_at(n));
                        for i in 0..n {
                            let s = cpu::sigmoid(g[i]);
                            du[i] = dy[i] * g[i] * s;
                            dg[i] = dy[i] * u[i] * s * (1.0 + g[i] * (1.0 - s));
                        }
                    }
                },
            )
        });
        Ok(())
    };
    cpu::with(x, |x| cpu::with(grad, |dy| run(x, dy)))?;
    Tensor::from_vec(dx, x.shape(), x.device())
}

#[cfg(test)]
mod tests {
    use super::super::check::{INPUTS, check, input};
    use super::Activation;

    const ALL: [Activation; 3] = [Activation::Silu, Activation::Gelu, Activation::GeluTanh];

    #[test]
    fn fast_equals_plain() {
        for kind in INPUTS {
            let x = [input(kind, &[3, 41, 10], 1)];
            for activation in ALL {
                check(kind, &x, 2e-6, |x| super::glu(&x[0], activation));
            }
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn gpu_equals_plain() {
        for (kind, n) in INPUTS.into_iter().flat_map(|kind| [10, 64, 1376].map(|n| (kind, n))) {
            let x = [input(kind, &[3, 41, n], 1)];
            for a in ALL {
                let what = format!("{a:?}, {kind}, {n}");
                super::super::check::check_gpu(&what, &x, true, |x| super::glu(&x[0], a), |x| super::plain(&x[0], a));
            }
        }
    }
}
