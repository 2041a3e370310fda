//! Per-head feature maps of rotated queries and keys (LoLCATs, Hedgehog, T2R).
//!
//! ```text
//! z = x W + b                      x one head of `x` [B, T, heads, D], W [maps, D, C], b [maps, C]
//! softmax_dim   [softmax(z), softmax(-z)]                      F = 2 C
//! exp_dim       [exp(z - max z), exp(min z - z)]               F = 2 C
//! relu          max(z, 0)                                      F = C
//! ```
//! Features are floored at 1e-12 except for relu. Map `m` reads head `sources[m]`, so that the maps of the query heads
//! of a group share one key head without repeating it. Result [B, T, maps, F].

use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::cpu::{self, Mat, Shared, gemm};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    SoftmaxDim,
    ExpDim,
    Relu,
}

/// The op's constants.
#[derive(Debug, Clone)]
pub struct FeatureMap {
    pub activation: Activation,
    /// Head that each map reads.
    pub sources: Vec<usize>,
}

const FLOOR: f32 = 1e-12;
/// Rows per unit of work: z of one block stays in cache.
const BLOCK: usize = 128;

impl FeatureMap {
    /// Features per column of W.
    fn sides(&self) -> usize {
        if self.activation == Activation::Relu { 1 } else { 2 }
    }

    pub fn forward(&self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        if !super::fast(x) {
            return self.plain(x, weight, bias);
        }
        let op = Op { map: self.clone(), x_grad: x.track_op() };
        x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)
    }

    /// The definition in plain tensor operations.
    pub fn plain(&self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let index = self.sources.iter().map(|s| *s as u32).collect::<Vec<_>>();
        let index = Tensor::new(index, x.device())?;
        let x = x.contiguous()?.index_select(&index, 2)?.transpose(1, 2)?.contiguous()?; // [B, maps, T, D]
        let z = x.broadcast_matmul(weight)?.broadcast_add(&bias.unsqueeze(1)?)?; // [B, maps, T, C]
        let features = match self.activation {
            Activation::SoftmaxDim => {
                let sides = [super::softmax_attn::softmax(&z)?, super::softmax_attn::softmax(&z.neg()?)?];
                Tensor::cat(&sides, D::Minus1)?.maximum(FLOOR as f64)?
            }
            Activation::ExpDim => {
                let up = z.broadcast_sub(&z.max_keepdim(D::Minus1)?)?.exp()?;
                let down = z.min_keepdim(D::Minus1)?.broadcast_sub(&z)?.exp()?;
                Tensor::cat(&[up, down], D::Minus1)?.maximum(FLOOR as f64)?
            }
            Activation::Relu => z.relu()?,
        };
        features.transpose(1, 2)?.contiguous()
    }
}

struct Op {
    map: FeatureMap,
    x_grad: bool,
}

/// Sizes of one call.
struct Dims {
    batch: usize,
    time: usize,
    heads: usize,
    dim: usize,
    maps: usize,
    cols: usize,
    width: usize,
}

impl Op {
    fn dims(&self, x: &Shape, weight: &Shape, bias: &Shape) -> Result<Dims> {
        let ((batch, time, heads, dim), (maps, d, cols)) = (x.dims4()?, weight.dims3()?);
        if d != dim || maps != self.map.sources.len() || bias.dims2()? != (maps, cols) {
            candle_core::bail!("feature maps {weight:?} with bias {bias:?} do not fit heads of {x:?}");
        }
        if let Some(s) = self.map.sources.iter().find(|s| **s >= heads) {
            candle_core::bail!("a feature map reads head {s} of {heads}");
        }
        Ok(Dims { batch, time, heads, dim, maps, cols, width: cols * self.map.sides() })
    }

    /// z of a block of rows in `row[..cols]` becomes its features in `row`.
    #[inline(always)]
    fn activate(&self, row: &mut [f32], cols: usize) {
        let (z, other) = row.split_at_mut(cols);
        match self.map.activation {
            Activation::Relu => z.iter_mut().for_each(|z| *z = z.max(0.0)),
            Activation::SoftmaxDim | Activation::ExpDim => {
                let top = cpu::max(z);
                let mut low = f32::INFINITY;
                for z in z.iter() {
                    low = if *z < low { *z } else { low };
                }
                for (z, o) in z.iter_mut().zip(other.iter_mut()) {
                    *o = cpu::exp(low - *z);
                    *z = cpu::exp(*z - top);
                }
                let (up, down) = match self.map.activation {
                    Activation::SoftmaxDim => (1.0 / cpu::sum(z), 1.0 / cpu::sum(other)),
                    _ => (1.0, 1.0),
                };
                z.iter_mut().for_each(|z| *z = (*z * up).max(FLOOR));
                other.iter_mut().for_each(|o| *o = (*o * down).max(FLOOR));
            }
        }
    }

    /// ∂loss/∂z from ∂loss/∂φ and φ of one row.
    #[inline(always)]
    fn activate_backward(&self, phi: &[f32], grad: &[f32], dz: &mut [f32]) {
        let cols = dz.len();
        let (up, down) = (&phi[..cols], &phi[phi.len() - cols..]);
        let (g_up, g_down) = (&grad[..cols], &grad[grad.len() - cols..]);
        let live = |phi: f32, g: f32| if phi > FLOOR { phi * g } else { 0.0 };
        match self.map.activation {
            Activation::Relu => {
                for i in 0..cols {
                    dz[i] = if up[i] > 0.0 { g_up[i] } else { 0.0 };
                }
            }
            Activation::SoftmaxDim => {
                let (mut a, mut b) = (0f32, 0f32);
                for i in 0..cols {
                    a += live(up[i], g_up[i]);
                    b += live(down[i], g_down[i]);
                }
                for i in 0..cols {
                    dz[i] = live(up[i], g_up[i]) - up[i] * a - live(down[i], g_down[i]) + down[i] * b;
                }
            }
            Activation::ExpDim => {
                // The extreme's own exponent is 0 whatever its value: what the others lose goes back to it.
                let (mut a, mut b, mut hi, mut lo) = (0f32, 0f32, 0, 0);
                for i in 0..cols {
                    let (u, d) = (live(up[i], g_up[i]), live(down[i], g_down[i]));
                    dz[i] = u - d;
                    a += u;
                    b += d;
                    hi = if up[i] > up[hi] { i } else { hi };
                    lo = if down[i] > down[lo] { i } else { lo };
                }
                dz[hi] -= a;
                dz[lo] += b;
            }
        }
    }
}

impl CustomOp3 for Op {
    fn name(&self) -> &'static str {
        "feature_map"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
        bias: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let n = self.dims(lx.shape(), lw.shape(), lb.shape())?;
        let (x, w, b) = (cpu::elements(x, lx)?, cpu::elements(weight, lw)?, cpu::elements(bias, lb)?);
        let mut out = vec![0f32; n.batch * n.time * n.maps * n.width];
        let shared = Shared::new(&mut out);
        let blocks = n.time.div_ceil(BLOCK);
        (0..n.batch * blocks * n.maps).into_par_iter().for_each(|task| {
            let (m, block) = (task % n.maps, task / n.maps);
            let (batch, from) = (block / blocks, block % blocks * BLOCK);
            let rows = BLOCK.min(n.time - from);
            let at = batch * n.time + from;
            let source = Mat::new(x, (at * n.heads + self.map.sources[m]) * n.dim, rows, n.dim, n.heads * n.dim);
            let weight = Mat::new(w, m * n.dim * n.cols, n.dim, n.cols, n.cols);
            let (start, stride) = ((at * n.maps + m) * n.width, n.maps * n.width);
            // SAFETY (both): these rows of map m belong to this task alone.
            gemm(unsafe { shared.mat(start, rows, n.cols, stride) }, false, 1.0, source, weight);
            let bias = &b[m * n.cols..(m + 1) * n.cols];
            cpu::vectorised(
                #[inline(always)]
                || {
                    for i in 0..rows {
                        let row = unsafe { shared.row(start + i * stride, n.width) };
                        row.iter_mut().zip(bias).for_each(|(z, b)| *z += b);
                        self.activate(row, n.cols);
                    }
                },
            );
        });
        Ok((CpuStorage::F32(out), (n.batch, n.time, n.maps, n.width).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let n = self.dims(x.shape(), weight.shape(), bias.shape())?;
        let grad = grad.contiguous()?;
        let mut dx = vec![0f32; if self.x_grad { x.elem_count() } else { 0 }];
        let mut dw = vec![0f32; weight.elem_count()];
        let mut db = vec![0f32; bias.elem_count()];
        let mut run = |x: &[f32], w: &[f32], phi: &[f32], grad: &[f32]| {
            let (dx, dw, db) = (Shared::new(&mut dx), Shared::new(&mut dw), Shared::new(&mut db));
            // Maps that read one head add to the same ∂x: one task takes them all, in order.
            (0..n.heads).into_par_iter().for_each_init(
                || vec![0f32; BLOCK * n.cols],
                |dz, head| {
                    for m in (0..n.maps).filter(|m| self.map.sources[*m] == head) {
                        let weight = Mat::new(w, m * n.dim * n.cols, n.dim, n.cols, n.cols);
                        for (batch, from) in
                            (0..n.batch).flat_map(|b| (0..n.time).step_by(BLOCK).map(move |from| (b, from)))
                        {
                            let rows = BLOCK.min(n.time - from);
                            let at = batch * n.time + from;
                            let (start, stride) = ((at * n.maps + m) * n.width, n.maps * n.width);
                            // SAFETY: gradients of map m and of its source head belong to this task alone.
                            let db = unsafe { db.row(m * n.cols, n.cols) };
                            cpu::vectorised(
                                #[inline(always)]
                                || {
                                    for i in 0..rows {
                                        let span = start + i * stride..start + i * stride + n.width;
                                        let dz = &mut dz[i * n.cols..(i + 1) * n.cols];
                                        self.activate_backward(&phi[span.clone()], &grad[span], dz);
                                        db.iter_mut().zip(&*dz).for_each(|(b, z)| *b += z);
                                    }
                                },
                            );
                            let (xs, xr) = ((at * n.heads + head) * n.dim, n.heads * n.dim);
                            let dz = Mat::new(dz, 0, rows, n.cols, n.cols);
                            // SAFETY: as above.
                            let dw = unsafe { dw.mat(m * n.dim * n.cols, n.dim, n.cols, n.cols) };
                            gemm(dw, true, 1.0, Mat::new(x, xs, rows, n.dim, xr).t(), dz);
                            if self.x_grad {
                                // SAFETY: as above.
                                gemm(unsafe { dx.mat(xs, rows, n.dim, xr) }, true, 1.0, dz, weight.t());
                            }
                        }
                    }
                },
            );
            Ok(())
        };
        cpu::with(x, |x| cpu::with(weight, |w| cpu::with(res, |phi| cpu::with(&grad, |g| run(x, w, phi, g)))))?;
        let dx = if self.x_grad { Some(Tensor::from_vec(dx, x.shape(), x.device())?) } else { None };
        let dw = Tensor::from_vec(dw, weight.shape(), weight.device())?;
        Ok((dx, Some(dw), Some(Tensor::from_vec(db, bias.shape(), bias.device())?)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{INPUTS, check, input};
    use super::*;

    #[test]
    fn fast_equals_plain() {
        for activation in [Activation::SoftmaxDim, Activation::ExpDim, Activation::Relu] {
            for kind in INPUTS {
                let x = [input(kind, &[2, 130, 4, 8], 1), input("randn", &[5, 8, 6], 2), input("randn", &[5, 6], 3)];
                let map = FeatureMap { activation, sources: vec![0, 1, 2, 2, 0] };
                check(&format!("{activation:?} {kind}"), &x, 2e-5, |x| map.forward(&x[0], &x[1], &x[2]));
            }
        }
    }
}
