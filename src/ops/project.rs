//! `y = x Wᵀ` with W [out, in] trained, in f32 or wider: logits of gates.
//!
//! Gates read the layer's input, which has no gradient while layers are trained one by one. The library would compute one
//! all the same, as large as the input in f32.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, Layout, Result, Shape, Tensor};

/// `x` [.., in] -> [.., out] in the precision of `weight`, which is f32 or wider.
pub fn project(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    match shape.last_mut() {
        Some(last) if *last == inner => *last = out,
        _ => candle_core::bail!("a product of {:?} with a weight of {inner} columns", x.shape()),
    }
    x.contiguous()?.apply_op2(&weight.contiguous()?, Op { shape: shape.into(), of_input: x.track_op() })
}

struct Op {
    /// Of the result.
    shape: Shape,
    /// Whether the input has a gradient.
    of_input: bool,
}

impl Op {
    fn product<S: BackendStorage>(&self, x: &S, lx: &Layout, w: &S, lw: &Layout) -> Result<(S, Shape)> {
        let (out, inner) = lw.shape().dims2()?;
        let rows = self.shape.elem_count() / out;
        let turned = lw.transpose(0, 1)?;
        let y = if x.dtype() == w.dtype() {
            let flat = Layout::contiguous_with_offset((rows, inner), lx.start_offset());
            x.matmul(w, (1, rows, out, inner), &flat, &turned)?
        } else {
            x.to_dtype(lx, w.dtype())?.matmul(w, (1, rows, out, inner), &Layout::contiguous((rows, inner)), &turned)?
        };
        Ok((y, self.shape.clone()))
    }
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "project"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        self.product(x, lx, w, lw)
    }

    fn cuda_fwd(&self, x: &CudaStorage, lx: &Layout, w: &CudaStorage, lw: &Layout) -> Result<(CudaStorage, Shape)> {
        self.product(x, lx, w, lw)
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (out, inner) = w.dims2()?;
        let grad = grad.contiguous()?.reshape(((), out))?;
        let dx = self.of_input.then(|| grad.matmul(w)?.reshape(x.shape())?.to_dtype(x.dtype())).transpose()?;
        let dw = w.track_op().then(|| grad.t()?.matmul(&x.to_dtype(w.dtype())?.reshape(((), inner))?)).transpose()?;
        Ok((dx, dw))
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{INPUTS, check, input};
    use super::*;

    fn plain(x: &[Tensor]) -> Result<Tensor> {
        let (b, t, n) = x[0].dims3()?;
        let x0 = x[0].to_dtype(super::super::wide(x[0].dtype()))?.reshape((b * t, n))?;
        x0.matmul(&x[1].to_dtype(x0.dtype())?.t()?)?.reshape((b, t, ()))
    }

    fn ours(x: &[Tensor]) -> Result<Tensor> {
        project(&x[0], &x[1].to_dtype(super::super::wide(x[1].dtype()))?)
    }

    #[test]
    fn equals_plain() {
        for kind in INPUTS {
            let x = [input(kind, &[2, 33, 24], 1), input("randn", &[5, 24], 2)];
            check(kind, &x, 2e-6, |x| if x[0].dtype() == candle_core::DType::F64 { plain(x) } else { ours(x) });
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn gpu_equals_plain() {
        let x = [input("randn", &[2, 33, 24], 1), input("randn", &[5, 24], 2)];
        super::super::check::check_gpu("projection", &x, true, ours, plain);
    }
}
