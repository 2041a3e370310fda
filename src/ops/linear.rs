//! `y = x Wᵀ` with W [out, in] frozen.
//!
//! candle's matmul computes the gradient of both sides even where one is a constant; for a frozen weight that is half of
//! the backward pass and a tensor as large as the weight. This op has no gradient for W.

#[cfg(feature = "cuda")]
use candle_core::DType;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{self, Mat, Shared, gemm};

/// `x` [.., in] -> [.., out]. The last axes of `x` may be several that make up `in`, such as heads and their channels.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    project(x, weight, None, None)
}

/// The same plus `(x Aᵀ) Bᵀ` with A [R, in] and B [out, R], which have gradients, in pieces of that many columns each,
/// [.., out / piece, piece]: one node, since every node between costs passes over tensors as large as `x` and `y` in the
/// backward pass.
pub fn project(x: &Tensor, weight: &Tensor, low_rank: Option<[&Tensor; 2]>, piece: Option<usize>) -> Result<Tensor> {
    let (op, rows) = Op::new(x, weight, piece)?;
    if let Some([a, b]) = low_rank {
        return x.contiguous()?.apply_op3(&a.contiguous()?, &b.contiguous()?, op);
    }
    if x.track_op() || op.fast {
        return x.contiguous()?.apply_op1(op);
    }
    let shape = op.shape.clone();
    x.reshape((rows, weight.dim(1)?))?.matmul(&weight.t()?)?.reshape(shape)
}

/// Below this many rows turning the weight takes longer than multiplying by it.
const FEW_ROWS: usize = 32;

struct Op {
    weight: Tensor,
    /// Of the result.
    shape: Shape,
    fast: bool,
}

impl Op {
    /// The op for `x`, and the rows of `x`.
    fn new(x: &Tensor, weight: &Tensor, piece: Option<usize>) -> Result<(Op, usize)> {
        let (out, inner) = weight.dims2()?;
        let (mut lead, mut width) = (x.rank(), 1);
        while lead > 0 && width < inner {
            lead -= 1;
            width *= x.dim(lead)?;
        }
        if width != inner {
            bail!("a product of {:?} with a weight of {inner} columns", x.shape());
        }
        let rows = x.elem_count() / inner;
        let last = piece.map_or_else(|| vec![out], |length| vec![out / length, length]);
        let shape = Shape::from([&x.dims()[..lead], &last].concat());
        if shape.elem_count() != rows * out {
            bail!("{out} columns in pieces of {last:?}");
        }
        Ok((Op { weight: weight.contiguous()?, shape, fast: super::fast(x) && rows >= FEW_ROWS }, rows))
    }

    /// The f32 product on the CPU: each task turns a panel of W and multiplies all rows by it.
    fn panels(&self, x: &[f32], w: &[f32]) -> Result<CpuStorage> {
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
        Ok(CpuStorage::F32(y))
    }

    fn on_cpu(&self, x: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
        if self.fast {
            return cpu::with(&self.weight, |w| self.panels(cpu::elements(x, layout)?, w));
        }
        match &*self.weight.storage_and_layout().0 {
            Storage::Cpu(w) => product(x, layout, w, self.weight.layout()),
            _ => bail!("input on the CPU, weight on {:?}", self.weight.device().location()),
        }
    }

    fn on_cuda(&self, x: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
        match &*self.weight.storage_and_layout().0 {
            Storage::Cuda(w) => product(x, layout, w, self.weight.layout()),
            _ => bail!("input on a GPU, weight on {:?}", self.weight.device().location()),
        }
    }

    /// `grad` as [rows, out], and what it gives the input through the frozen weight, [rows, in].
    fn back(&self, grad: &Tensor) -> Result<(Tensor, Tensor)> {
        let grad = grad.contiguous()?.reshape(((), self.weight.dim(0)?))?;
        let back = grad.matmul(&self.weight)?;
        Ok((grad, back))
    }
}

/// `x` [rows, in] times the transpose of `w` [out, in], both contiguous, on either device.
fn product<S: BackendStorage>(x: &S, x_layout: &Layout, w: &S, w_layout: &Layout) -> Result<S> {
    let (out, inner) = w_layout.shape().dims2()?;
    let rows = x_layout.shape().elem_count() / inner;
    let flat = Layout::contiguous_with_offset((rows, inner), x_layout.start_offset());
    x.matmul(w, (1, rows, out, inner), &flat, &w_layout.transpose(0, 1)?)
}

/// `y` plus `(x Aᵀ) Bᵀ`.
fn add_low_rank<S: BackendStorage>(y: S, [x, a, b]: [(&S, &Layout); 3]) -> Result<S> {
    let (low, shape) = low(x, a)?;
    let all = Layout::contiguous((shape.dims2()?.0, b.1.shape().dims2()?.0));
    let more = product(&low, &Layout::contiguous(shape), b.0, b.1)?;
    y.binary_impl::<candle_core::op::Add>(&more, &all, &all)
}

/// `x Aᵀ`, [rows, R].
fn low<S: BackendStorage>(x: (&S, &Layout), a: (&S, &Layout)) -> Result<(S, Shape)> {
    let (rank, inner) = a.1.shape().dims2()?;
    let rows = x.1.shape().elem_count() / inner;
    Ok((product(x.0, x.1, a.0, a.1)?, Shape::from((rows, rank))))
}

/// The same as [`add_low_rank`] without a pass of its own over y.
#[cfg(feature = "cuda")]
fn add_low_rank_on_gpu(y: CudaStorage, [x, a, b]: [(&CudaStorage, &Layout); 3]) -> Result<CudaStorage> {
    use super::cuda::{add_product, storage_pointer};
    if !matches!(y.dtype(), DType::BF16 | DType::F32) {
        return add_low_rank(y, [x, a, b]);
    }
    let (low, shape) = low(x, a)?;
    let ((rows, rank), out) = (shape.dims2()?, b.1.shape().dims2()?.0);
    let at = storage_pointer(&y, &Layout::contiguous((rows, out)))?.cast_mut();
    let (low_at, b_at) = (storage_pointer(&low, &Layout::contiguous(shape))?, storage_pointer(b.0, b.1)?);
    // SAFETY: contiguous storage of these shapes; y is ours.
    unsafe { add_product(y.device(), y.dtype(), at, (low_at, b_at), [rows, out, rank], true)? };
    Ok(y)
}

/// `y + x W` with x [rows, R] and W [R, in]; on a GPU it is added into y itself, which nothing else holds.
fn plus_product(y: Tensor, x: &Tensor, w: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if super::cuda::ready(&y) {
        use super::cuda::{add_product, device_of, pointer};
        let (x, w) = (x.contiguous()?, w.contiguous()?);
        let ((rows, columns), rank) = (y.dims2()?, w.dim(0)?);
        let operands = (pointer(&x)?, pointer(&w)?);
        let (device, at) = (device_of(&y)?, pointer(&y)?.cast_mut());
        // SAFETY: contiguous tensors of these shapes; nothing else holds y.
        unsafe { add_product(device, y.dtype(), at, operands, [rows, columns, rank], false)? };
        return Ok(y);
    }
    y + x.matmul(w)?
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "frozen_linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((self.on_cpu(x, layout)?, self.shape.clone()))
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((self.on_cuda(x, layout)?, self.shape.clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.back(grad)?.1.reshape(x.shape()).map(Some)
    }
}

impl CustomOp3 for Op {
    fn name(&self) -> &'static str {
        "frozen_linear_with_low_rank"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = self.on_cpu(x, x_layout)?;
        Ok((add_low_rank(y, [(x, x_layout), (a, a_layout), (b, b_layout)])?, self.shape.clone()))
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        a: &CudaStorage,
        a_layout: &Layout,
        b: &CudaStorage,
        b_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let y = self.on_cuda(x, x_layout)?;
        #[cfg(feature = "cuda")]
        let add_low_rank = add_low_rank_on_gpu;
        Ok((add_low_rank(y, [(x, x_layout), (a, a_layout), (b, b_layout)])?, self.shape.clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (a, b, rows) = (a.detach(), b.detach(), x.detach().reshape(((), a.dim(1)?))?);
        // The input of the first block has no gradient to give.
        let (grad, back) = match x.track_op() {
            true => self.back(grad).map(|(grad, back)| (grad, Some(back)))?,
            false => (grad.contiguous()?.reshape(((), b.dim(0)?))?, None),
        };
        let low = grad.matmul(&b)?; // [rows, R]
        let back = back.map(|back| plus_product(back, &low, &a)?.reshape(x.shape())).transpose()?;
        let to_a = low.t()?.matmul(&rows)?;
        let to_b = grad.t()?.matmul(&rows.matmul(&a.t()?)?)?;
        Ok((back, Some(to_a), Some(to_b)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{check, input};
    use candle_core::DType;

    #[test]
    fn gradient_of_the_input_only() {
        for (rows, out) in [(3, 7), (31, 64), (32, 64), (40, 150)] {
            let weight = input("randn", &[out, 5], 2);
            check("linear", &[input("randn", &[2, rows, 5], 1)], 2e-6, |x| {
                super::linear(&x[0], &weight.to_dtype(x[0].dtype())?)
            });
            let inputs = [input("randn", &[2, rows, 5], 1), input("randn", &[3, 5], 3), input("randn", &[out, 3], 4)];
            check("linear with low rank", &inputs, 5e-6, |x| {
                let weight = weight.to_dtype(x[0].dtype())?;
                match x[0].dtype() {
                    DType::F64 => {
                        let flat = x[0].reshape(((), 5))?;
                        let low = flat.matmul(&x[1].t()?)?.matmul(&x[2].t()?)?;
                        (flat.matmul(&weight.t()?)? + low)?.reshape((2, rows, out))
                    }
                    _ => super::project(&x[0], &weight, Some([&x[1], &x[2]]), None),
                }
            });
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn gpu_equals_plain() {
        for rows in [3, 40, 1000] {
            let weight = input("randn", &[96, 64], 2);
            let of = |x: &candle_core::Tensor| weight.to_device(x.device())?.to_dtype(x.dtype());
            super::super::check::check_gpu(
                &format!("low rank, {rows} rows"),
                &[input("randn", &[2, rows, 64], 1), input("randn", &[8, 64], 3), input("randn", &[96, 8], 4)],
                true,
                |x| super::project(&x[0], &of(&x[0])?, Some([&x[1], &x[2]]), Some(32)),
                |x| {
                    let flat = x[0].reshape(((), 64))?;
                    let low = flat.matmul(&x[1].t()?)?.matmul(&x[2].t()?)?;
                    (flat.matmul(&of(&x[0])?.t()?)? + low)?.reshape((2, rows, 3, 32))
                },
            );
        }
    }

    /// Heads and channels as one axis, and a row width that fits none.
    #[test]
    fn last_axes_are_joined() {
        let (x, weight) = (input("randn", &[2, 40, 3, 4], 1), input("randn", &[7, 12], 2));
        check("joined axes", std::slice::from_ref(&x), 2e-6, |x| super::linear(&x[0], &weight.to_dtype(x[0].dtype())?));
        assert_eq!(super::linear(&x, &weight).unwrap().dims(), [2, 40, 7]);
        let pieces = super::project(&x, &input("randn", &[12, 12], 2), None, Some(4)).unwrap();
        assert_eq!(pieces.dims(), [2, 40, 3, 4]);
        assert!(super::project(&x, &weight, None, Some(4)).is_err());
        assert!(super::linear(&x, &input("randn", &[7, 10], 2)).is_err());
    }
}
