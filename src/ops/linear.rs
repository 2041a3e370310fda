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
    /// Sizes (batch, rows, out, in), the transposed layout of W and the shape of the result.
    fn plan(&self, layout: &Layout) -> Result<((usize, usize, usize, usize), Layout, Shape)> {
        let ((rows, inner), (out, _)) = (layout.shape().dims2()?, self.weight.dims2()?);
        Ok(((1, rows, out, inner), self.weight.layout().transpose(0, 1)?, (rows, out).into()))
    }
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "frozen_linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (sizes, weight_layout, shape) = self.plan(layout)?;
        match &*self.weight.storage_and_layout().0 {
            Storage::Cpu(w) => Ok((x.matmul(w, sizes, layout, &weight_layout)?, shape)),
            _ => bail!("input on the CPU, weight on {:?}", self.weight.device().location()),
        }
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (sizes, weight_layout, shape) = self.plan(layout)?;
        match &*self.weight.storage_and_layout().0 {
            Storage::Cuda(w) => Ok((x.matmul(w, sizes, layout, &weight_layout)?, shape)),
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
