//! Short causal convolution with one filter per channel, and silu behind it where asked.
//!
//! ```text
//! z_t[c] = Σ_s w[c, s] x_{t + s}[c]          y = z or z σ(z)
//! ```
//!
//! `rows` [B, n - 1 + T, heads, D] begin with the n - 1 rows before the first token, `weight` [C, 1, n] of the C = heads D
//! channels has the layout of checkpoints: its last tap is the token itself. Result [B, T, heads, D].

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu;
use super::gate::Curve;

/// The op's constants.
#[derive(Debug, Clone, Copy)]
pub struct ShortConv {
    pub silu: bool,
}

/// Rows per unit of work.
const BLOCK: usize = 16;

impl ShortConv {
    pub fn forward(&self, rows: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let (_, length, heads, dim) = rows.dims4()?;
        let (channels, one, taps) = weight.dims3()?;
        if channels != heads * dim || one != 1 || taps == 0 || length + 1 < taps {
            bail!("a convolution of rows {:?} with filters {:?}", rows.shape(), weight.shape())
        }
        if !super::fast(rows) {
            return self.plain(rows, weight);
        }
        rows.contiguous()?.apply_op2(&weight.to_dtype(DType::F32)?.contiguous()?, Op(*self))
    }

    /// The definition in plain tensor operations.
    pub fn plain(&self, rows: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let (_, length, heads, dim) = rows.dims4()?;
        let (weight, taps) = (weight.to_dtype(rows.dtype())?, weight.dim(2)?);
        let part = |tap: usize| {
            let filter = weight.narrow(2, tap, 1)?.reshape((1, 1, heads, dim))?;
            rows.narrow(1, tap, length + 1 - taps)?.broadcast_mul(&filter)
        };
        let z = (1..taps).try_fold(part(0)?, |sum, tap| sum + part(tap)?)?;
        if self.silu { Curve::Silu.plain(&z) } else { Ok(z) }
    }
}

struct Op(ShortConv);

/// Sizes of a call, and its filters tap by tap.
struct Call {
    batch: usize,
    length: usize,
    time: usize,
    channels: usize,
    taps: usize,
    /// [n, C]
    filters: Vec<f32>,
}

impl Call {
    fn new(rows: &Shape, weight: &[f32]) -> Result<Call> {
        let (batch, length, heads, dim) = rows.dims4()?;
        let channels = heads * dim;
        let taps = weight.len() / channels;
        let filters = (0..weight.len()).map(|i| weight[i % channels * taps + i / channels]).collect();
        Ok(Call { batch, length, time: length + 1 - taps, channels, taps, filters })
    }

    /// z of token `at` of all sequences' tokens.
    fn sum(&self, rows: &[f32], at: usize, z: &mut [f32]) {
        let first = (at / self.time * self.length + at % self.time) * self.channels;
        z.fill(0.0);
        for (filter, x) in self.filters.chunks(self.channels).zip(rows[first..].chunks(self.channels)) {
            z.iter_mut().zip(filter).zip(x).for_each(|((z, w), x)| *z += w * x);
        }
    }
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "short_conv"
    }

    fn cpu_fwd(&self, rows: &CpuStorage, lr: &Layout, weight: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, weight) = (cpu::elements(rows, lr)?, cpu::elements(weight, lw)?);
        let call = Call::new(lr.shape(), weight)?;
        let (_, _, heads, dim) = lr.shape().dims4()?;
        let mut y = vec![0f32; call.batch * call.time * call.channels];
        y.par_chunks_mut(BLOCK * call.channels).enumerate().for_each(|(block, y)| {
            cpu::vectorised(|| {
                for (n, y) in y.chunks_mut(call.channels).enumerate() {
                    call.sum(rows, block * BLOCK + n, y);
                    if self.0.silu {
                        y.iter_mut().for_each(|z| *z = Curve::Silu.at(*z).0);
                    }
                }
            });
        });
        Ok((CpuStorage::F32(y), (call.batch, call.time, heads, dim).into()))
    }

    fn bwd(
        &self,
        rows: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (drows, dweight) =
            cpu::with(rows, |x| cpu::with(weight, |w| cpu::with(&grad, |dy| self.slopes(rows.shape(), x, w, dy))))?;
        let drows = Tensor::from_vec(drows, rows.shape(), rows.device())?;
        Ok((Some(drows), Some(Tensor::from_vec(dweight, weight.shape(), weight.device())?)))
    }
}

impl Op {
    /// Gradients of the rows and of the filters.
    fn slopes(&self, shape: &Shape, rows: &[f32], weight: &[f32], dy: &[f32]) -> Result<(Vec<f32>, Vec<f32>)> {
        let call = Call::new(shape, weight)?;
        let Call { batch, length, time, channels, taps, .. } = call;
        let mut dz = dy.to_vec();
        if self.0.silu {
            dz.par_chunks_mut(BLOCK * channels).enumerate().for_each(|(block, dz)| {
                let mut z = vec![0f32; channels];
                cpu::vectorised(|| {
                    for (n, dz) in dz.chunks_mut(channels).enumerate() {
                        call.sum(rows, block * BLOCK + n, &mut z);
                        dz.iter_mut().zip(&z).for_each(|(dz, z)| *dz *= Curve::Silu.at(*z).1);
                    }
                });
            });
        }
        let mut drows = vec![0f32; rows.len()];
        drows.par_chunks_mut(channels).with_min_len(BLOCK).enumerate().for_each(|(n, dx)| {
            let (b, r) = (n / length, n % length);
            for (tap, filter) in call.filters.chunks(channels).enumerate() {
                if let Some(t) = r.checked_sub(tap).filter(|t| *t < time) {
                    let dz = &dz[(b * time + t) * channels..][..channels];
                    dx.iter_mut().zip(filter).zip(dz).for_each(|((dx, w), dz)| *dx += w * dz);
                }
            }
        });
        // Sums of blocks of rows, then over the blocks in order.
        let of_block = |block: usize| {
            let mut sums = vec![0f32; taps * channels];
            for n in block * BLOCK * 4..((block + 1) * BLOCK * 4).min(batch * time) {
                let first = (n / time * length + n % time) * channels;
                let dz = &dz[n * channels..][..channels];
                for (sums, x) in sums.chunks_mut(channels).zip(rows[first..].chunks(channels)) {
                    sums.iter_mut().zip(dz).zip(x).for_each(|((sum, dz), x)| *sum += dz * x);
                }
            }
            sums
        };
        let blocks: Vec<_> = (0..(batch * time).div_ceil(BLOCK * 4)).into_par_iter().map(of_block).collect();
        let mut sums = vec![0f64; taps * channels];
        for block in blocks {
            sums.iter_mut().zip(block).for_each(|(sum, x)| *sum += f64::from(x));
        }
        let dweight = (0..taps * channels).map(|i| sums[i % taps * channels + i / taps] as f32).collect();
        Ok((drows, dweight))
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{INPUTS, check, input};
    use super::*;

    #[test]
    fn fast_equals_plain() {
        for (kind, taps) in INPUTS.into_iter().flat_map(|kind| [1, 2, 4].map(|taps| (kind, taps))) {
            for (time, silu) in [(1, true), (65, false), (65, true), (200, true)] {
                let op = ShortConv { silu };
                let x = [input(kind, &[2, taps - 1 + time, 3, 6], 1), input("randn", &[18, 1, taps], 2)];
                check(&format!("{kind}, {taps} taps, {time}, silu {silu}"), &x, 5e-6, |x| op.forward(&x[0], &x[1]));
            }
        }
    }

    #[test]
    fn filters_of_other_channels_are_refused() {
        let rows = Tensor::zeros((1, 9, 2, 4), DType::F32, &candle_core::Device::Cpu).unwrap();
        for shape in [(6, 1, 4), (8, 2, 4), (8, 1, 11)] {
            let weight = Tensor::zeros(shape, DType::F32, rows.device()).unwrap();
            assert!(ShortConv { silu: false }.forward(&rows, &weight).is_err(), "{shape:?}");
        }
    }
}
