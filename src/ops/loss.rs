//! Losses whose gradient is computed with the value, in one pass.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, D, DType, Layout, Result, Shape, Storage, Tensor, Var, bail};
use rayon::prelude::*;

use super::cpu;

/// A scalar `value` (on the device of `x`) whose gradient with respect to `x` is already known.
pub fn with_gradient(x: &Tensor, value: Tensor, gradient: Tensor) -> Result<Tensor> {
    x.apply_op1(Known { value: value.reshape(())?, gradient })
}

/// What the gradient of `f(x)` gives `x`.
pub fn pulled(x: &Tensor, gradient: &Tensor, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let x = Var::from_tensor(&x.detach())?;
    let zero = Tensor::zeros((), DType::F32, x.device())?;
    let found = with_gradient(&f(x.as_tensor())?, zero, gradient.clone())?.backward()?.remove(&x);
    found.map_or_else(|| bail!("a function without gradient"), Ok)
}

struct Known {
    value: Tensor,
    gradient: Tensor,
}

impl CustomOp1 for Known {
    fn name(&self) -> &'static str {
        "known_gradient"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match &*self.value.storage_and_layout().0 {
            Storage::Cpu(value) => Ok((value.try_clone(self.value.layout())?, Shape::from(()))),
            _ => bail!("loss value on {:?}", self.value.device().location()),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        match &*self.value.storage_and_layout().0 {
            Storage::Cuda(value) => Ok((value.try_clone(self.value.layout())?, Shape::from(()))),
            _ => bail!("loss value on {:?}", self.value.device().location()),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        // A loss is mostly differentiated itself; on the CPU looking whether it is costs less than a product with 1.
        if grad.device().is_cpu() && grad.to_dtype(DType::F32)?.to_scalar::<f32>()? == 1.0 {
            return Ok(Some(self.gradient.clone()));
        }
        #[cfg(feature = "cuda")]
        if super::cuda::ready(&self.gradient) && self.gradient.is_contiguous() {
            return scaled(&self.gradient, &grad.to_dtype(DType::F32)?).map(Some);
        }
        self.gradient.broadcast_mul(&grad.to_dtype(self.gradient.dtype())?).map(Some)
    }
}

/// `gradient` times the scalar `factor`, which stays on the device.
#[cfg(feature = "cuda")]
fn scaled(gradient: &Tensor, factor: &Tensor) -> Result<Tensor> {
    use super::cuda::{Output, code, device_of, launch, pointer};
    use std::ffi::{c_int, c_void};
    unsafe extern "C" {
        fn margay_scale(
            y: *mut c_void,
            x: *const c_void,
            factor: *const c_void,
            count: usize,
            dtype: c_int,
            stream: *mut c_void,
        ) -> c_int;
    }
    let device = device_of(gradient)?;
    let y = Output::new(device, gradient.shape(), gradient.dtype())?;
    let (out, x, s) = (y.pointer()?, pointer(gradient)?, pointer(factor)?);
    if x.align_offset(16) != 0 {
        return gradient.broadcast_mul(&factor.to_dtype(gradient.dtype())?);
    }
    let (count, dtype) = (gradient.elem_count(), code(gradient.dtype())?);
    // SAFETY: both hold `count` elements of this precision, the factor one f32, all on this device.
    launch(device, "scale", |stream| unsafe { margay_scale(out, x, s, count, dtype, stream) })?;
    Ok(y.tensor())
}

/// The definition in plain tensor operations.
fn plain_mse(x: &Tensor, target: &Tensor, weight: f64) -> Result<Tensor> {
    let dtype = super::wide(x.dtype());
    let difference = (x.to_dtype(dtype)? - target.to_dtype(dtype)?)?;
    difference.sqr()?.mean_all()? * weight
}

#[cfg(feature = "cuda")]
fn mse_on_gpu(x: &Tensor, target: &Tensor, weight: f64) -> Result<Tensor> {
    use super::cuda::{Output, code, device_of, launch, pointer};
    use std::ffi::{c_int, c_void};
    unsafe extern "C" {
        fn margay_mse(
            value: *mut c_void,
            grad: *mut c_void,
            x: *const c_void,
            target: *const c_void,
            scratch: *mut c_void,
            weight: f32,
            count: usize,
            dtype: c_int,
            stream: *mut c_void,
        ) -> c_int;
    }
    let device = device_of(x)?;
    let (value, gradient) = (Output::new(device, 1, DType::F32)?, Output::new(device, x.shape(), x.dtype())?);
    let scratch = Output::scratch(device, 4096)?;
    let (value_at, grad_at, room) = (value.pointer()?, gradient.pointer()?, scratch.pointer()?);
    let (x_at, target_at, dtype) = (pointer(x)?, pointer(target)?, code(x.dtype())?);
    let (count, weight) = (x.elem_count(), weight as f32);
    // SAFETY: x, target and gradient are contiguous, of one shape and precision, on this device.
    launch(device, "mse", |stream| unsafe {
        margay_mse(value_at, grad_at, x_at, target_at, room, weight, count, dtype, stream)
    })?;
    with_gradient(x, value.tensor(), gradient.tensor())
}

/// `weight * mean((x - target)²)` over all elements, a scalar f32.
pub fn mse(x: &Tensor, target: &Tensor, weight: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if super::cuda::ready(x) && target.dtype() == x.dtype() && target.dims() == x.dims() {
        let (x, target) = (x.contiguous()?, target.contiguous()?);
        let aligned = |x: &Tensor| Ok::<_, candle_core::Error>(super::cuda::pointer(x)?.align_offset(16) == 0);
        if aligned(&x)? && aligned(&target)? {
            return mse_on_gpu(&x, &target, weight);
        }
    }
    if !super::fast(x) {
        return plain_mse(x, target, weight);
    }
    let (x, target) = (x.contiguous()?, target.contiguous()?);
    const BLOCK: usize = 1 << 14;
    let mut gradient = vec![0f32; x.elem_count()];
    let slope = (2.0 * weight / x.elem_count() as f64) as f32;
    let sum = cpu::with(&x, |a| {
        cpu::with(&target, |b| {
            let blocks = gradient.par_chunks_mut(BLOCK).zip(a.par_chunks(BLOCK)).zip(b.par_chunks(BLOCK));
            let sums: Vec<f32> = blocks
                .map(|((g, a), b)| {
                    cpu::vectorised(
                        #[inline(always)]
                        || {
                            for ((g, a), b) in g.iter_mut().zip(a).zip(b) {
                                *g = a - b;
                            }
                            let sum = cpu::dot(g, g);
                            g.iter_mut().for_each(|g| *g *= slope);
                            sum
                        },
                    )
                })
                .collect();
            Ok(sums.iter().map(|s| *s as f64).sum::<f64>())
        })
    })?;
    let value = Tensor::new((sum * weight / x.elem_count() as f64) as f32, x.device())?;
    let gradient = Tensor::from_vec(gradient, x.shape(), x.device())?;
    with_gradient(&x, value, gradient)
}

/// `weight * mean over rows of ‖x - target‖₂ N^-1/2` of rows [.., N], a scalar f32: the root of each row's mean square, so
/// that a few huge rows weigh less than in [`mse`]. Where a row is met exactly its gradient is 0.
pub fn l2(x: &Tensor, target: &Tensor, weight: f64) -> Result<Tensor> {
    /// Below this an error is rounding, and its direction noise.
    const SMALLEST: f64 = 1e-12;
    let dtype = super::wide(x.dtype());
    let difference = (x.detach().to_dtype(dtype)? - target.detach().to_dtype(dtype)?)?;
    let root = difference.sqr()?.mean_keepdim(D::Minus1)?.sqrt()?; // [.., 1]
    let value = (root.mean_all()? * weight)?;
    let gradient = difference.broadcast_div(&root.maximum(SMALLEST)?)?;
    let gradient = (gradient * (weight / x.elem_count() as f64))?.to_dtype(x.dtype())?;
    with_gradient(x, value, gradient)
}

#[cfg(test)]
mod tests {
    use super::super::check::{INPUTS, check, input};
    use super::*;

    #[test]
    fn mse_fast_equals_plain() {
        for kind in INPUTS {
            let target = input(kind, &[3, 50, 7], 5);
            // Differences of nearly equal f32 values carry 1e-7 / 1e-3 of relative error.
            check(kind, &[input(kind, &[3, 50, 7], 1)], 2e-4, |x| {
                super::mse(&x[0], &target.to_dtype(x[0].dtype())?, 1000.0)
            });
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn mse_on_gpu_equals_plain() {
        for (kind, width) in INPUTS.into_iter().flat_map(|kind| [7, 64].map(|width| (kind, width))) {
            let target = input(kind, &[3, 50, width], 5);
            let of = |x: &Tensor| target.to_dtype(DType::BF16)?.to_dtype(x.dtype())?.to_device(x.device());
            let x = [input(kind, &[3, 50, width], 1)];
            // The gradient is rounded, and once more when it is multiplied by that of the loss.
            super::super::check::check_gpu_within(
                6e-3,
                &format!("{kind}, {width}"),
                &x,
                true,
                |x| mse(&x[0], &of(&x[0])?, 1000.0),
                |x| plain_mse(&x[0], &of(&x[0])?, 1000.0),
            );
        }
    }

    #[test]
    fn l2_equals_autograd() {
        for kind in INPUTS {
            let target = input(kind, &[3, 50, 7], 5);
            check(kind, &[input(kind, &[3, 50, 7], 1)], 2e-4, |x| {
                let target = target.to_dtype(x[0].dtype())?;
                match x[0].dtype() {
                    DType::F64 => (&x[0] - target)?.sqr()?.sum(2)?.sqrt()?.mean_all()? * (0.3 * 7f64.powf(-0.5)),
                    _ => l2(&x[0], &target, 0.3),
                }
            });
        }
    }

    #[test]
    fn l2_of_what_is_met_exactly_has_no_gradient() -> Result<()> {
        let x = candle_core::Var::from_tensor(&Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &candle_core::Device::Cpu)?)?;
        let loss = l2(&x, &Tensor::new(&[[1f32, 2.0], [0.0, 0.0]], x.device())?, 2.0)?;
        let slope = 0.5 / 12.5f32.sqrt(); // weight / (rows N) over the root of the mean square
        let gradient = loss.backward()?.get(&x).unwrap().to_vec2::<f32>()?;
        assert_eq!(gradient[0], [0.0, 0.0]);
        assert!((gradient[1][0] - 3.0 * slope).abs() < 1e-6 && (gradient[1][1] - 4.0 * slope).abs() < 1e-6);
        Ok(())
    }
}
