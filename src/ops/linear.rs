//! `y = x Wᵀ` with W [out, in] frozen.
//!
//! candle's matmul computes the gradient of both sides even where one is a constant; for a frozen weight that is half of
//! the backward pass and a tensor as large as the weight. This op has no gradient for W.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{self, Mat, Shared, gemm};

/// `x` [.., in] -> [.., out].
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    let rows = x.elem_count() / inner;
    if let Some(last) = shape.last_mut() {
        *last = out;
    }
    let x = x.reshape((rows, inner))?;
    let fast = super::fast(&x) && rows >= FEW_ROWS;
    let y = if x.track_op() || fast {
        x.contiguous()?.apply_op1(Op { weight: weight.contiguous()?, fast })?
    } else {
        x.matmul(&weight.t()?)?
    };
    y.reshape(shape)
}

/// Below this many rows turning the weight takes longer than multiplying by it.
const FEW_ROWS: usize = 32;

struct Op {
    weight: Tensor,
    fast: bool,
}

impl Op {
    /// The f32 product on the CPU: each task turns a panel of W and multiplies all rows by it.
    fn panels(&self, x: &[f32], w: &[f32]) -> Result<(CpuStorage, Shape)> {
        const PANEL: usize = 64;
        let (out, inner) = self.weight.dims2()?;
        let rows = x.len() / inner;
        let mut y = vec![0f32; rows * out];
        let shared = Shared::new(&mut y);
        (0..out.div_ceil(PANEL)).into_par_iter().for_each(|panel| {
            let from = panel * PANEL;
            let cols = PANEL.min(out - from);
            let turned = Mat::new(w, from * inner, cols, inner, inner).t();
            // SAFETY: these columns belong to this task alone.
            let y = unsafe { shared.mat(from, rows, cols, out) };
            gemm(y, false, 1.0, Mat::new(x, 0, rows, inner, inner), turned);
        });
        Ok((CpuStorage::F32(y), (rows, out).into()))
    }

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
        if self.fast {
            return cpu::with(&self.weight, |w| self.panels(cpu::elements(x, layout)?, w));
        }
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
        for (rows, out) in [(3, 7), (31, 64), (32, 64), (40, 150)] {
            let weight = input("randn", &[out, 5], 2);
            check("linear", &[input("randn", &[2, rows, 5], 1)], 2e-6, |x| {
                super::linear(&x[0], &weight.to_dtype(x[0].dtype())?)
            });
        }
    }
}
