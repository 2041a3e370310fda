//! `silu(gate) * up`, elementwise, with a gradient to both.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::cpu;

pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if !super::fast(gate) {
        return plain(gate, up);
    }
    gate.contiguous()?.apply_op2(&up.contiguous()?, Op)
}

/// The definition in plain tensor operations.
pub fn plain(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()? * up
}

struct Op;

/// Elements per unit of work.
const BLOCK: usize = 1 << 13;

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, gate: &CpuStorage, lg: &Layout, up: &CpuStorage, lu: &Layout) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (cpu::elements(gate, lg)?, cpu::elements(up, lu)?);
        let mut y = vec![0f32; gate.len()];
        y.par_chunks_mut(BLOCK).zip(gate.par_chunks(BLOCK)).zip(up.par_chunks(BLOCK)).for_each(|((y, g), u)| {
            cpu::vectorised(
                #[inline(always)]
                || {
                    for ((y, g), u) in y.iter_mut().zip(g).zip(u) {
                        *y = g * cpu::sigmoid(*g) * u;
                    }
                },
            )
        });
        Ok((CpuStorage::F32(y), lg.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let mut dg = vec![0f32; gate.elem_count()];
        let mut du = vec![0f32; gate.elem_count()];
        let mut run = |gate: &[f32], up: &[f32], grad: &[f32]| {
            let outputs = dg.par_chunks_mut(BLOCK).zip(du.par_chunks_mut(BLOCK));
            let inputs = gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)).zip(grad.par_chunks(BLOCK));
            outputs.zip(inputs).for_each(|((dg, du), ((g, u), dy))| {
                cpu::vectorised(
                    #[inline(always)]
                    || {
                        for i in 0..dg.len() {
                            let s = cpu::sigmoid(g[i]);
                            du[i] = dy[i] * g[i] * s;
                            dg[i] = dy[i] * u[i] * s * (1.0 + g[i] * (1.0 - s));
                        }
                    },
                )
            });
            Ok(())
        };
        cpu::with(gate, |g| cpu::with(up, |u| cpu::with(&grad, |dy| run(g, u, dy))))?;
        let of = |data, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device()).map(Some);
        Ok((of(dg, gate)?, of(du, up)?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{INPUTS, check, input};

    #[test]
    fn fast_equals_plain() {
        for kind in INPUTS {
            let x = [input(kind, &[3, 41, 5], 1), input(kind, &[3, 41, 5], 2)];
            check(kind, &x, 2e-6, |x| super::swiglu(&x[0], &x[1]));
        }
    }
}
