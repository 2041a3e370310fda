//! Weighted sums by head: `y = Σ_n w_n x_n` of one or two tensors [B, T, H, D].
//!
//! `weights` are [N, H], one for all rows of a head, or [B, T, N, H], each row's own, in at least f32: a softmax window
//! beside a linear branch, a gate of whole heads, a division of rows by what they sum to.

use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu;

/// The sum of `parts`, in their precision.
pub fn mix(parts: &[&Tensor], weights: &Tensor) -> Result<Tensor> {
    let shape = Sizes::of(parts, weights)?;
    #[cfg(feature = "cuda")]
    if super::cuda::ready(parts[0]) && parts.iter().all(|x| x.dtype() == parts[0].dtype()) {
        return on_gpu(shape, parts, weights);
    }
    if !parts.iter().all(|x| super::fast(x)) {
        return plain(parts, weights);
    }
    let weights = weights.to_dtype(candle_core::DType::F32)?.contiguous()?;
    let (a, b) = both(parts)?;
    let grads = [a.track_op(), parts.len() > 1 && b.track_op(), weights.track_op()];
    a.apply_op3(&b, &weights, Op { shape, grads })
}

/// The definition in plain tensor operations, in f32 or wider.
pub fn plain(parts: &[&Tensor], weights: &Tensor) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (n, x) in parts.iter().enumerate() {
        let wide = x.to_dtype(super::wide(x.dtype()))?;
        let own = weights.to_dtype(wide.dtype())?.narrow(D::Minus2, n, 1)?.squeeze(D::Minus2)?.unsqueeze(D::Minus1)?;
        let part = wide.broadcast_mul(&own)?;
        sum = Some(sum.map_or(Ok(part.clone()), |sum| sum + part)?);
    }
    sum.map_or_else(|| bail!("a mixture of nothing"), |sum| sum.to_dtype(parts[0].dtype()))
}

/// Both parts, contiguous; a single one stands in both places, and only the first is read.
fn both(parts: &[&Tensor]) -> Result<(Tensor, Tensor)> {
    let first = parts[0].contiguous()?;
    let second = parts.get(1).map_or_else(|| Ok(first.clone()), |second| second.contiguous())?;
    Ok((first, second))
}

/// Sizes of one call.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    rows: usize,
    heads: usize,
    dim: usize,
    parts: usize,
    /// Whether rows have weights of their own.
    by_row: bool,
}

impl Sizes {
    fn of(parts: &[&Tensor], weights: &Tensor) -> Result<Sizes> {
        let [first, rest @ ..] = parts else { bail!("a mixture of nothing") };
        let (b, t, heads, dim) = first.dims4()?;
        let n = parts.len();
        let by_row = weights.rank() == 4;
        let fits = if by_row { weights.dims() == [b, t, n, heads] } else { weights.dims() == [n, heads] };
        if n > 2 || !fits || rest.iter().any(|x| x.dims() != first.dims()) {
            bail!("a mixture of {n} parts {:?} with weights {:?}", first.dims(), weights.dims())
        }
        Ok(Sizes { rows: b * t, heads, dim, parts: n, by_row })
    }

    /// Where the weights of a row begin.
    fn weights(&self, row: usize) -> usize {
        if self.by_row { row * self.parts * self.heads } else { 0 }
    }
}

struct Op {
    shape: Sizes,
    /// Which of both parts and the weights have gradients.
    grads: [bool; 3],
}

/// Rows per unit of work.
const BLOCK: usize = 8;

impl CustomOp3 for Op {
    fn name(&self) -> &'static str {
        "mix"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (a, b, w) = (cpu::elements(a, la)?, cpu::elements(b, lb)?, cpu::elements(w, lw)?);
        let Sizes { heads, dim, parts, .. } = self.shape;
        let mut y = vec![0f32; a.len()];
        let width = heads * dim;
        y.par_chunks_mut(BLOCK * width).enumerate().for_each(|(block, y)| {
            cpu::vectorised(
                #[inline(always)]
                || {
                    for (i, y) in y.chunks_mut(width).enumerate() {
                        let row = block * BLOCK + i;
                        let (a, b) = (&a[row * width..][..width], &b[row * width..][..width]);
                        let w = &w[self.shape.weights(row)..][..parts * heads];
                        for (h, y) in y.chunks_mut(dim).enumerate() {
                            let x = &a[h * dim..][..dim];
                            y.iter_mut().zip(x).for_each(|(y, x)| *y = w[h] * x);
                            if parts > 1 {
                                cpu::add(y, w[heads + h], &b[h * dim..][..dim]);
                            }
                        }
                    }
                },
            )
        });
        Ok((CpuStorage::F32(y), la.shape().clone()))
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        weights: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let Sizes { rows, heads, dim, parts, by_row } = self.shape;
        let width = heads * dim;
        let room = |wanted: bool| vec![0f32; if wanted { rows * width } else { 0 }];
        let (mut da, mut db) = (room(self.grads[0]), room(self.grads[1]));
        let mut dw = vec![0f32; if self.grads[2] { rows * parts * heads } else { 0 }];
        let mut run = |a: &[f32], b: &[f32], w: &[f32], dy: &[f32]| {
            let (da, db, dw) = (cpu::Shared::new(&mut da), cpu::Shared::new(&mut db), cpu::Shared::new(&mut dw));
            (0..rows.div_ceil(BLOCK)).into_par_iter().for_each(|block| {
                cpu::vectorised(
                    #[inline(always)]
                    || {
                        for row in block * BLOCK..rows.min((block + 1) * BLOCK) {
                            let w = &w[self.shape.weights(row)..][..parts * heads];
                            for h in 0..heads {
                                let at = row * width + h * dim;
                                let dy = &dy[at..][..dim];
                                for (n, (x, dx)) in [(a, &da), (b, &db)].into_iter().enumerate().take(parts) {
                                    if self.grads[n] {
                                        // SAFETY (both): a row's elements belong to this task alone.
                                        let dx = unsafe { dx.row(at, dim) };
                                        dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx = w[n * heads + h] * dy);
                                    }
                                    if self.grads[2] {
                                        let own = unsafe { dw.row((row * parts + n) * heads + h, 1) };
                                        own[0] = cpu::dot(&x[at..][..dim], dy);
                                    }
                                }
                            }
                        }
                    },
                )
            });
            Ok(())
        };
        cpu::with(a, |a| cpu::with(b, |b| cpu::with(weights, |w| cpu::with(&grad, |dy| run(a, b, w, dy)))))?;
        if self.grads[2] && !by_row {
            let mut sums = vec![0f64; parts * heads];
            for row in dw.chunks(parts * heads) {
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
            }
            dw = sums.into_iter().map(|x| x as f32).collect();
        }
        let of = |n: usize, data, like: &Tensor| {
            self.grads[n].then(|| Tensor::from_vec(data, like.shape(), like.device())).transpose()
        };
        Ok((of(0, da, a)?, of(1, db, b)?, of(2, dw, weights)?))
    }
}

#[cfg(feature = "cuda")]
fn on_gpu(shape: Sizes, parts: &[&Tensor], weights: &Tensor) -> Result<Tensor> {
    use super::cuda::{Output, code, device_of, launch, pointer};
    use std::ffi::{c_int, c_void};
    use std::ptr::{null, null_mut};
    unsafe extern "C" {
        fn margay_mix(
            y: *mut c_void,
            a: *const c_void,
            b: *const c_void,
            w: *const c_void,
            rows: c_int,
            heads: c_int,
            dim: c_int,
            by_row: c_int,
            dtype: c_int,
            stream: *mut c_void,
        ) -> c_int;
        fn margay_mix_scratch(rows: c_int, heads: c_int, parts: c_int) -> usize;
        fn margay_mix_bwd(
            da: *mut c_void,
            db: *mut c_void,
            dw: *mut c_void,
            scratch: *mut c_void,
            a: *const c_void,
            b: *const c_void,
            dy: *const c_void,
            w: *const c_void,
            rows: c_int,
            heads: c_int,
            dim: c_int,
            by_row: c_int,
            dtype: c_int,
            stream: *mut c_void,
        ) -> c_int;
    }
    let weights = weights.to_dtype(candle_core::DType::F32)?.contiguous()?;
    let (a, b) = both(parts)?;
    let two = parts.len() > 1;
    let grads = [a.track_op(), two && b.track_op(), weights.track_op()];
    let (rows, heads, dim) = (shape.rows as c_int, shape.heads as c_int, shape.dim as c_int);
    let (by_row, dtype) = (shape.by_row as c_int, code(a.dtype())?);
    let second = move |b: &Tensor| if two { pointer(b) } else { Ok(null()) };

    let y = Output::new(device_of(&a)?, a.shape(), a.dtype())?;
    let (y_at, a_at, b_at, w_at) = (y.pointer()?, pointer(&a)?, second(&b)?, pointer(&weights)?);
    // SAFETY: parts and y are contiguous [rows, H, D] of one precision, the weights f32, all on this device.
    launch(device_of(&a)?, "mix", |stream| unsafe {
        margay_mix(y_at, a_at, b_at, w_at, rows, heads, dim, by_row, dtype, stream)
    })?;
    let backward = move |[a, b, w]: &[&Tensor; 3], _: &Tensor, dy: &Tensor| {
        let device = device_of(a)?;
        let fresh =
            |n: usize, like: &Tensor| grads[n].then(|| Output::new(device, like.shape(), like.dtype())).transpose();
        let (da, db, dw) = (fresh(0, a)?, fresh(1, b)?, fresh(2, w)?);
        let at = |x: &Option<Output>| x.as_ref().map(Output::pointer).transpose().map(|p| p.unwrap_or(null_mut()));
        // SAFETY: arithmetic on sizes.
        let scratch = match shape.by_row || !grads[2] {
            true => None,
            false => Some(Output::scratch(device, unsafe { margay_mix_scratch(rows, heads, shape.parts as c_int) })?),
        };
        let (da_at, db_at, dw_at, scratch_at) = (at(&da)?, at(&db)?, at(&dw)?, at(&scratch)?);
        let (a_at, b_at, dy_at, w_at) = (pointer(a)?, second(b)?, pointer(dy)?, pointer(w)?);
        // SAFETY: as above; gradients are like what they belong to, the scratch as large as asked for.
        launch(device, "mix backward", |stream| unsafe {
            margay_mix_bwd(
                da_at, db_at, dw_at, scratch_at, a_at, b_at, dy_at, w_at, rows, heads, dim, by_row, dtype, stream,
            )
        })?;
        Ok([da.map(Output::tensor), db.map(Output::tensor), dw.map(Output::tensor)])
    };
    y.node([&a, &b, &weights], "mix", Box::new(backward))
}

#[cfg(test)]
mod tests {
    use super::super::check::{INPUTS, check, input};
    use super::*;

    /// Two parts and one, weights by head and by row.
    fn each(dim: usize, test: impl Fn(&str, &[Tensor])) {
        for kind in INPUTS {
            for parts in [1, 2] {
                for by_row in [false, true] {
                    let mut x: Vec<Tensor> = (0..parts).map(|n| input(kind, &[2, 33, 3, dim], n as u64)).collect();
                    let lead: &[usize] = if by_row { &[2, 33] } else { &[] };
                    x.push(input("randn", &[lead, &[parts, 3]].concat(), 9));
                    test(&format!("{kind}, {parts} parts of {dim}, by row: {by_row}"), &x);
                }
            }
        }
    }

    fn split(x: &[Tensor]) -> (Vec<&Tensor>, &Tensor) {
        (x[..x.len() - 1].iter().collect(), &x[x.len() - 1])
    }

    #[test]
    fn fast_equals_plain() {
        each(10, |what, x| {
            check(what, x, 2e-6, |x| {
                let (parts, weights) = split(x);
                mix(&parts, weights)
            })
        });
    }

    /// Heads cut from more of them.
    #[test]
    fn parts_may_have_gaps() {
        let x = [input("randn", &[2, 9, 5, 4], 1), input("randn", &[1, 3], 2)];
        check("gaps", &x, 2e-6, |x| mix(&[&x[0].narrow(2, 1, 3)?], &x[1]));
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn gpu_equals_plain() {
        for dim in [10, 64, 128] {
            each(dim, |what, x| {
                let run = |f: fn(&[&Tensor], &Tensor) -> Result<Tensor>| {
                    move |x: &[Tensor]| {
                        let (parts, weights) = split(x);
                        f(&parts, weights)
                    }
                };
                super::super::check::check_gpu(what, x, true, run(mix), run(plain));
            });
        }
    }
}
