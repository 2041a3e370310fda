//! `y = x Wᵀ` with W [out, in] frozen.
//!
//! candle's matmul computes the gradient of both sides even where one is a constant; for a frozen weight that is half of
//! the backward pass and a tensor as large as the weight. This op has no gradient for W.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, bail};

/// `x` [.., in] -> [.., out].
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    let rows = x.elem_count() / inner;
    if let Some(last) = shape.last_mut() {
        *last = out;
    }
    let x = x.reshape((rows, inner))?;
    let y =
        if x.track_op() { x.contiguous()?.apply_op1(Op { weight: weight.clone() })? } else { x.matmul(&weight.t()?)? };
    y.reshape(shape)
}

struct Op {
    weight: Tensor,
}

impl Op {
    /// The product on either device.
    fn product<S: BackendStorage>(&self, x: &S, layout: &Layout, weight: &S) -> Result<(S, Shape)> {
        let ((rows, inner), (out, _)) = (layout.shape().dims2()?, self.weight.dims2()?);
        let transposed = self.weight.layout().transpose(0, 1)?;
        Ok((x.matmul(weight, (1, rows, out, inner), layout, &transposed)?, (rows, out).into()))
    }
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "frozen_linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        match &*self.weight.storage_and_layout().0 {
            Storage::Cpu(w) => self.product(x, layout, w),
            _ => bail!("input on the CPU, weight on {:?}", self.weight.device().location()),
        }
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        match &*self.weight.storage_and_layout().0 {
            Storage::Cuda(w) => self.product(x, layout, w),
            _ => bail!("input on a GPU, weight on {:?}", self.weight.device().location()),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        grad.contiguous()?.matmul(&self.weight).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{check, input};

    #[test]
    fn gradient_of_the_input_only() {
        let weight = input("randn", &[7, 5], 2);
        check("linear", &[input("randn", &[2, 3, 5], 1)], 2e-6, |x| {
            super::linear(&x[0], &weight.to_dtype(x[0].dtype())?)
        });
    }
}
