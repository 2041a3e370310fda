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
        #[cfg(feature = "cuda")]
        if cuda::fits(self, x, weight)? {
            return cuda::forward(self, x, weight, bias);
        }
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
                let (low, top) = (cpu::min(z), cpu::max(z));
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
                let (a, b) = (cpu::dot_with(up, g_up, live), cpu::dot_with(down, g_down, live));
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

/// Launches of `kernels/feature_map.cu`.
#[cfg(feature = "cuda")]
pub(super) mod cuda {
    use std::ffi::{c_int, c_void};
    use std::ptr::{null, null_mut};

    use candle_core::{DType, Result, Tensor};

    use super::super::cuda::{Output, device_of, launch, pointer, ready};
    use super::{Activation, FeatureMap};

    unsafe extern "C" {
        fn margay_feature_map_scratch(rows: i64, dim: c_int, maps: c_int, cols: c_int) -> usize;
        fn margay_feature_map_fwd(
            x: *const c_void,
            weight: *const c_void,
            bias: *const c_void,
            out: *mut c_void,
            sources: *const c_int,
            rows: i64,
            heads: c_int,
            dim: c_int,
            maps: c_int,
            cols: c_int,
            activation: c_int,
            stream: *mut c_void,
        ) -> c_int;
        fn margay_feature_map_bwd(
            x: *const c_void,
            weight: *const c_void,
            bias: *const c_void,
            phi: *const c_void,
            dphi: *const c_void,
            dx: *mut c_void,
            dweight: *mut c_void,
            dbias: *mut c_void,
            scratch: *mut c_void,
            sources: *const c_int,
            rows: i64,
            heads: c_int,
            dim: c_int,
            maps: c_int,
            cols: c_int,
            activation: c_int,
            stream: *mut c_void,
        ) -> c_int;
        fn margay_feature_map_dweight(
            x: *const c_void,
            dz: *const c_void,
            dweight: *mut c_void,
            scratch: *mut c_void,
            sources: *const c_int,
            rows: i64,
            heads: c_int,
            dim: c_int,
            maps: c_int,
            cols: c_int,
            stream: *mut c_void,
        ) -> c_int;
    }

    /// Whether the kernels take these tensors.
    pub fn fits(map: &FeatureMap, x: &Tensor, weight: &Tensor) -> Result<bool> {
        let (maps, dim, cols) = weight.dims3()?;
        let sizes = maps <= 1024 && [dim, cols].iter().all(|n| n.is_multiple_of(8) && *n <= 128);
        // SAFETY: arithmetic on sizes and a question about the chip.
        let held = || unsafe { margay_feature_map_scratch(1, dim as c_int, maps as c_int, cols as c_int) } > 0;
        Ok(ready(x)
            && [x, weight].iter().all(|t| t.dtype() == DType::BF16)
            && sizes
            && held()
            && dim == x.dim(3)?
            && maps == map.sources.len()
            && map.sources.iter().all(|s| x.dim(2).is_ok_and(|heads| *s < heads)))
    }

    /// Sizes of one call.
    struct Call {
        sources: Vec<c_int>,
        rows: i64,
        heads: c_int,
        dim: c_int,
        maps: c_int,
        cols: c_int,
        activation: c_int,
    }

    fn call(map: &FeatureMap, x: &Tensor, cols: usize) -> Result<Call> {
        let (batch, time, heads, dim) = x.dims4()?;
        let activation = match map.activation {
            Activation::SoftmaxDim => 0,
            Activation::ExpDim => 1,
            Activation::Relu => 2,
        };
        let sources: Vec<c_int> = map.sources.iter().map(|s| *s as c_int).collect();
        let maps = sources.len() as c_int;
        let (heads, dim, cols) = (heads as c_int, dim as c_int, cols as c_int);
        Ok(Call { sources, rows: (batch * time) as i64, heads, dim, maps, cols, activation })
    }

    /// φ [B, T, maps, F] of contiguous `x` and `weight`.
    pub fn features(map: &FeatureMap, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Output> {
        let (cols, device) = (weight.dim(2)?, device_of(x)?);
        let c = call(map, x, cols)?;
        let out = Output::new(device, (x.dim(0)?, x.dim(1)?, map.sources.len(), cols * map.sides()), DType::BF16)?;
        let (x, w, out_at) = (pointer(x)?, pointer(weight)?, out.pointer()?);
        let b = bias.map(pointer).transpose()?.unwrap_or(null());
        // SAFETY: contiguous tensors of this device in the layouts and sizes of the call.
        launch(device, "feature_map_fwd", |stream| unsafe {
            let s = c.sources.as_ptr();
            margay_feature_map_fwd(x, w, b, out_at, s, c.rows, c.heads, c.dim, c.maps, c.cols, c.activation, stream)
        })?;
        Ok(out)
    }

    /// ∂loss/∂W [maps, D, C] in f32 from ∂loss/∂z [B, T, maps, C].
    pub fn weight_gradient(map: &FeatureMap, x: &Tensor, dz: &Tensor) -> Result<Tensor> {
        let device = device_of(x)?;
        let c = call(map, x, dz.dim(3)?)?;
        let out = Output::new(device, (map.sources.len(), x.dim(3)?, dz.dim(3)?), DType::F32)?;
        // SAFETY: arithmetic on sizes.
        let bytes = unsafe { margay_feature_map_scratch(c.rows, c.dim, c.maps, c.cols) };
        let scratch = Output::scratch(device, bytes)?;
        let (x, dz, out_at, scratch) = (pointer(x)?, pointer(dz)?, out.pointer()?, scratch.pointer()?);
        // SAFETY: as above.
        launch(device, "feature_map_dweight", |stream| unsafe {
            let s = c.sources.as_ptr();
            margay_feature_map_dweight(x, dz, out_at, scratch, s, c.rows, c.heads, c.dim, c.maps, c.cols, stream)
        })?;
        Ok(out.tensor())
    }

    pub fn forward(map: &FeatureMap, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let (x, weight) = (x.contiguous()?, weight.contiguous()?);
        let bias = bias.to_dtype(DType::BF16)?.contiguous()?;
        let out = features(map, &x, &weight, Some(&bias))?;
        let (map, x_grad, weight_grad) = (map.clone(), x.track_op(), weight.track_op() || bias.track_op());
        let backward = move |[x, weight, bias]: &[&Tensor; 3], phi: &Tensor, dphi: &Tensor| {
            let (device, c) = (device_of(x)?, call(&map, x, weight.dim(2)?)?);
            let dx = if x_grad { Some(Output::new(device, x.shape(), DType::BF16)?) } else { None };
            let fresh = |like: &Tensor| Output::new(device, like.shape(), DType::F32);
            let dw = if weight_grad { Some((fresh(weight)?, fresh(bias)?)) } else { None };
            // SAFETY: arithmetic on sizes.
            let bytes = unsafe { margay_feature_map_scratch(c.rows, c.dim, c.maps, c.cols) };
            let scratch = Output::scratch(device, if weight_grad { bytes } else { 0 })?;
            let at = |o: Option<&Output>| o.map(Output::pointer).transpose().map(|p| p.unwrap_or(null_mut()));
            let (dx_at, dw_at) = (at(dx.as_ref())?, at(dw.as_ref().map(|d| &d.0))?);
            let (db_at, scratch) = (at(dw.as_ref().map(|d| &d.1))?, scratch.pointer()?);
            let (x_at, w, b, phi, dphi) =
                (pointer(x)?, pointer(weight)?, pointer(bias)?, pointer(phi)?, pointer(dphi)?);
            // SAFETY: as above; null gradients are not computed.
            launch(device, "feature_map_bwd", |stream| unsafe {
                let s = c.sources.as_ptr();
                margay_feature_map_bwd(
                    x_at,
                    w,
                    b,
                    phi,
                    dphi,
                    dx_at,
                    dw_at,
                    db_at,
                    scratch,
                    s,
                    c.rows,
                    c.heads,
                    c.dim,
                    c.maps,
                    c.cols,
                    c.activation,
                    stream,
                )
            })?;
            let (dw, db) = match dw {
                Some((w, b)) => (Some(w.tensor().to_dtype(DType::BF16)?), Some(b.tensor().to_dtype(DType::BF16)?)),
                None => (None, None),
            };
            Ok([dx.map(Output::tensor), dw, db])
        };
        out.node([&x, &weight, &bias], "feature_map", Box::new(backward))
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
