//! Softmax over the last axis: feature maps without weights, queries of HGRN2, slots of GSA.
//!
//! ```text
//! y_i = exp(x_i - m) / Σ_j exp(x_j - m)          m = max x          dx = y (dy - Σ_j y_j dy_j)
//! ```
//!
//! `x` [.., D], result like it; sums are in at least f32.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::cpu;
use super::softmax_attn;

pub fn softmax(x: &Tensor) -> Result<Tensor> {
    if super::fast(x) && x.elem_count() > 0 { x.contiguous()?.apply_op1(Op) } else { plain(x) }
}

/// The definition in plain tensor operations.
pub fn plain(x: &Tensor) -> Result<Tensor> {
    softmax_attn::softmax(&x.to_dtype(super::wide(x.dtype()))?)?.to_dtype(x.dtype())
}

struct Op;

/// Rows per unit of work.
const BLOCK: usize = 32;

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut y = cpu::elements(x, layout)?.to_vec();
        let width = layout.dims().last().copied().unwrap_or(1);
        y.par_chunks_mut(BLOCK * width).for_each(|rows| {
            cpu::vectorised(|| {
                for row in rows.chunks_mut(width) {
                    let top = cpu::max(row);
                    row.iter_mut().for_each(|x| *x = cpu::exp(*x - top));
                    let share = 1.0 / cpu::sum(row);
                    row.iter_mut().for_each(|x| *x *= share);
                }
            });
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (grad, y) = (grad.contiguous()?, y.contiguous()?);
        let width = x.dims().last().copied().unwrap_or(1);
        let dx = cpu::with(&y, |y| {
            cpu::with(&grad, |dy| {
                let mut dx = dy.to_vec();
                dx.par_chunks_mut(BLOCK * width).zip(y.par_chunks(BLOCK * width)).for_each(|(dx, y)| {
                    cpu::vectorised(|| {
                        for (dx, y) in dx.chunks_mut(width).zip(y.chunks(width)) {
                            let mean = cpu::dot(dx, y);
                            dx.iter_mut().zip(y).for_each(|(dx, y)| *dx = y * (*dx - mean));
                        }
                    });
                });
                Ok(dx)
            })
        })?;
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{INPUTS, check, input};
    use super::*;

    #[test]
    fn fast_equals_plain() {
        for (kind, width) in INPUTS.into_iter().flat_map(|kind| [1, 6, 64, 100].map(|width| (kind, width))) {
            let x = [input(kind, &[2, 33, 3, width], 1)];
            check(&format!("{kind}, {width} wide"), &x, 5e-6, |x| softmax(&x[0]));
        }
    }

    #[test]
    fn far_rows_are_finite() {
        let x = Tensor::new(&[[-1e4f32, 0.0, 1e4], [-1e4, -1e4, -1e4]], &candle_core::Device::Cpu).unwrap();
        let rows = softmax(&x).unwrap().to_vec2::<f32>().unwrap();
        assert!(rows[0][0] < 1e-30 && rows[0][1] < 1e-30 && rows[0][2] == 1.0, "{rows:?}");
        assert!(rows[1].iter().all(|y| (y - 1.0 / 3.0).abs() < 1e-6), "{rows:?}");
    }
}
