//! Features whose products are exponentials to second order (BASED, arXiv 2402.18668): with r = sqrt(C)
//!
//! ```text
//! φ(u) = [1, u_i / sqrt(r), u_i u_j w_ij / r for i <= j]        w_ij = 1, on the diagonal sqrt(1/2)
//! φ(u)·φ(u') = 1 + s + s²/2                                    s = u·u' / r
//! ```
//!
//! `u` [.., C], result [.., 1 + C + C (C + 1) / 2] like it: the upper triangle stands for both.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::cpu;

/// Features of `cols` columns.
pub const fn width(cols: usize) -> usize {
    1 + cols + cols * (cols + 1) / 2
}

pub fn taylor(u: &Tensor) -> Result<Tensor> {
    if super::fast(u) { u.contiguous()?.apply_op1(Op) } else { plain(u) }
}

/// The definition in plain tensor operations: pairs are picked by products with matrices of zeros and ones.
pub fn plain(u: &Tensor) -> Result<Tensor> {
    let c = u.dim(candle_core::D::Minus1)?;
    let root = (c as f64).sqrt();
    let pairs: Vec<(usize, usize)> = (0..c).flat_map(|i| (i..c).map(move |j| (i, j))).collect();
    let pick = |cell: &dyn Fn(usize, (usize, usize)) -> f64| {
        let cells = (0..c).flat_map(|row| pairs.iter().map(move |pair| cell(row, *pair)));
        Tensor::from_iter(cells.collect::<Vec<_>>(), u.device())?.reshape((c, pairs.len()))?.to_dtype(u.dtype())
    };
    let rows = u.contiguous()?.reshape(((), c))?;
    let left = rows.matmul(&pick(&|row, pair| if pair.0 == row { weight(pair.0, pair.1) / root } else { 0.0 })?)?;
    let right = rows.matmul(&pick(&|row, pair| (pair.1 == row) as u8 as f64)?)?;
    let first = rows.narrow(1, 0, 1)?.ones_like()?;
    let all = Tensor::cat(&[first, (rows / root.sqrt())?, (left * right)?], 1)?;
    let mut shape = u.dims().to_vec();
    shape.pop();
    shape.push(width(c));
    all.reshape(shape)
}

/// w_ij.
fn weight(i: usize, j: usize) -> f64 {
    if i == j { std::f64::consts::FRAC_1_SQRT_2 } else { 1.0 }
}

struct Op;

/// Rows per unit of work.
const BLOCK: usize = 64;

/// Factors of the linear and of the squared features, and what the diagonal has beside the latter.
fn factors(cols: usize) -> [f32; 3] {
    let root = (cols as f64).sqrt();
    [(1.0 / root.sqrt()) as f32, (1.0 / root) as f32, weight(0, 0) as f32]
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "taylor"
    }

    fn cpu_fwd(&self, u: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let u = cpu::elements(u, layout)?;
        let mut shape = layout.dims().to_vec();
        let cols = shape.pop().unwrap_or(1).max(1);
        shape.push(width(cols));
        let [linear, squared, diagonal] = factors(cols);
        let mut y = vec![0f32; u.len() / cols * width(cols)];
        y.par_chunks_mut(BLOCK * width(cols)).zip(u.par_chunks(BLOCK * cols)).for_each(|(y, u)| {
            cpu::vectorised(|| {
                for (y, u) in y.chunks_mut(width(cols)).zip(u.chunks(cols)) {
                    let (first, mut pairs) = y.split_at_mut(1 + cols);
                    first[0] = 1.0;
                    first[1..].iter_mut().zip(u).for_each(|(y, u)| *y = linear * u);
                    for i in 0..cols {
                        let (row, rest) = std::mem::take(&mut pairs).split_at_mut(cols - i);
                        row.iter_mut().zip(&u[i..]).for_each(|(y, other)| *y = squared * u[i] * other);
                        row[0] *= diagonal;
                        pairs = rest;
                    }
                }
            });
        });
        Ok((CpuStorage::F32(y), shape.into()))
    }

    fn bwd(&self, u: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let cols = u.dims().last().copied().unwrap_or(1).max(1);
        let [linear, squared, diagonal] = factors(cols);
        let du = cpu::with(u, |u| {
            cpu::with(&grad, |dy| {
                let mut du = vec![0f32; u.len()];
                let rows = u.par_chunks(BLOCK * cols).zip(dy.par_chunks(BLOCK * width(cols)));
                du.par_chunks_mut(BLOCK * cols).zip(rows).for_each(|(du, (u, dy))| {
                    cpu::vectorised(|| {
                        for ((du, u), dy) in du.chunks_mut(cols).zip(u.chunks(cols)).zip(dy.chunks(width(cols))) {
                            let (first, mut pairs) = dy.split_at(1 + cols);
                            du.iter_mut().zip(&first[1..]).for_each(|(du, dy)| *du = linear * dy);
                            for i in 0..cols {
                                let (row, rest) = pairs.split_at(cols - i);
                                du[i] += squared * 2.0 * diagonal * row[0] * u[i]
                                    + squared * cpu::dot(&row[1..], &u[i + 1..]);
                                cpu::add(&mut du[i + 1..], squared * u[i], &row[1..]);
                                pairs = rest;
                            }
                        }
                    });
                });
                Ok(du)
            })
        })?;
        Tensor::from_vec(du, u.shape(), u.device()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{INPUTS, check, input};
    use super::*;

    #[test]
    fn fast_equals_plain() {
        for (kind, cols) in INPUTS.into_iter().flat_map(|kind| [1, 3, 16].map(|cols| (kind, cols))) {
            check(&format!("{kind}, {cols}"), &[input(kind, &[2, 65, 3, cols], 1)], 5e-6, |x| taylor(&x[0]));
        }
    }

    #[test]
    fn products_are_exponentials_to_second_order() {
        let [u, v] = [1, 2].map(|seed| input("randn", &[20, 9], seed));
        let product = (taylor(&u).unwrap() * taylor(&v).unwrap()).unwrap().sum(1).unwrap().to_vec1::<f64>().unwrap();
        let score = ((u * v).unwrap().sum(1).unwrap() / 3.0).unwrap().to_vec1::<f64>().unwrap();
        for (found, s) in product.iter().zip(score) {
            assert!((found - (1.0 + s + s * s / 2.0)).abs() < 1e-12, "{found} of {s}");
        }
    }
}
