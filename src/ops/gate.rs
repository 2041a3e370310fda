//! Gates, from logits to what they do: `y = s f(x + b)`, every channel with its own bias and factor.
//!
//! ```text
//! f   ln σ(z)    ln(1 + e^z)    σ(z)    z σ(z)
//! ```
//!
//! Logits `x` [B, T, G, W], `bias` and `factor` `[G W]` where given; each of the G groups serves `group` heads: result
//! [B, T, G group, W] in f32 or wider. Decays of a state are ln σ, or a softplus with the factor -e^A.

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu;

/// f.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Curve {
    LogSigmoid = 0,
    Softplus = 1,
    Sigmoid = 2,
    Silu = 3,
}

/// The op's constants.
#[derive(Debug, Clone, Copy)]
pub struct Gate {
    pub curve: Curve,
    /// s, beside the factors of channels.
    pub scale: f64,
    /// Heads that read each group.
    pub group: usize,
}

/// ln(1 + e^x) without overflow.
pub fn softplus(x: &Tensor) -> Result<Tensor> {
    x.relu()? + ((x.abs()?.neg()?.exp()? + 1.0)?).log()?
}

/// ln σ(x) = -ln(1 + e^-x), at most 0.
pub fn log_sigmoid(x: &Tensor) -> Result<Tensor> {
    softplus(&x.neg()?)?.neg()
}

/// σ(x).
pub fn sigmoid(x: &Tensor) -> Result<Tensor> {
    log_sigmoid(x)?.exp()
}

impl Curve {
    /// f in plain tensor operations.
    pub fn plain(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Curve::LogSigmoid => log_sigmoid(x),
            Curve::Softplus => softplus(x),
            Curve::Sigmoid => sigmoid(x),
            Curve::Silu => x * sigmoid(x)?,
        }
    }

    /// f(z) and f'(z).
    #[inline(always)]
    pub(super) fn at(self, z: f32) -> (f32, f32) {
        // Of |z| only, so that nothing overflows and nothing cancels.
        let small = cpu::exp(-z.abs());
        let (near, far) = (1.0 / (1.0 + small), small / (1.0 + small));
        let (s, rest) = if z >= 0.0 { (near, far) } else { (far, near) };
        match self {
            Curve::LogSigmoid => (z.min(0.0) - small.ln_1p(), rest),
            Curve::Softplus => (z.max(0.0) + small.ln_1p(), s),
            Curve::Sigmoid => (s, s * rest),
            Curve::Silu => (z * s, s * (1.0 + z * rest)),
        }
    }
}

impl Gate {
    /// One head per group and nothing beside f.
    pub fn of(curve: Curve) -> Gate {
        Gate { curve, scale: 1.0, group: 1 }
    }

    pub fn forward(&self, x: &Tensor, bias: Option<&Tensor>, factor: Option<&Tensor>) -> Result<Tensor> {
        let (_, _, groups, width) = x.dims4()?;
        if let Some(wrong) = [bias, factor].into_iter().flatten().find(|p| p.dims() != [groups * width]) {
            bail!("gates of {groups} groups of {width} channels with {:?} parameters", wrong.shape())
        }
        #[cfg(feature = "cuda")]
        if super::cuda::ready(x) {
            return self.on_gpu(x, bias, factor);
        }
        if !super::fast(x) {
            return self.plain(x, bias, factor);
        }
        let own = |p: Option<&Tensor>, otherwise: f32| match p {
            Some(p) => p.to_dtype(DType::F32)?.contiguous(),
            None => Tensor::full(otherwise, groups * width, x.device()),
        };
        x.contiguous()?.apply_op3(&own(bias, 0.0)?, &own(factor, 1.0)?, Op { gate: *self, groups, width })
    }

    /// The definition in plain tensor operations.
    pub fn plain(&self, x: &Tensor, bias: Option<&Tensor>, factor: Option<&Tensor>) -> Result<Tensor> {
        let (b, t, groups, width) = x.dims4()?;
        let mut y = x.to_dtype(super::wide(x.dtype()))?;
        let own = |p: &Tensor| p.to_dtype(super::wide(x.dtype()))?.reshape((groups, width));
        if let Some(bias) = bias {
            y = y.broadcast_add(&own(bias)?)?;
        }
        y = (self.curve.plain(&y)? * self.scale)?;
        if let Some(factor) = factor {
            y = y.broadcast_mul(&own(factor)?)?;
        }
        let shared = y.unsqueeze(3)?.broadcast_as((b, t, groups, self.group, width))?;
        shared.reshape((b, t, groups * self.group, width))
    }
}

struct Op {
    gate: Gate,
    groups: usize,
    width: usize,
}

/// Rows per unit of work.
const BLOCK: usize = 8;

impl CustomOp3 for Op {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        bias: &CpuStorage,
        lb: &Layout,
        factor: &CpuStorage,
        lf: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, bias, factor) = (cpu::elements(x, lx)?, cpu::elements(bias, lb)?, cpu::elements(factor, lf)?);
        let (b, t, ..) = lx.shape().dims4()?;
        let Op { gate: Gate { curve, scale, group }, groups, width } = *self;
        let (row, scale) = (groups * width, scale as f32);
        let mut y = vec![0f32; x.len() * group];
        y.par_chunks_mut(BLOCK * row * group).zip(x.par_chunks(BLOCK * row)).for_each(|(y, x)| {
            for (y, x) in y.chunks_mut(row * group).zip(x.chunks(row)) {
                let channels = x.chunks(width).zip(bias.chunks(width)).zip(factor.chunks(width));
                for (y, ((x, bias), factor)) in y.chunks_mut(width * group).zip(channels) {
                    let (first, others) = y.split_at_mut(width);
                    for i in 0..width {
                        first[i] = scale * factor[i] * curve.at(x[i] + bias[i]).0;
                    }
                    others.chunks_mut(width).for_each(|other| other.copy_from_slice(first));
                }
            }
        });
        Ok((CpuStorage::F32(y), (b, t, groups * group, width).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        bias: &Tensor,
        factor: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let Op { gate: Gate { curve, scale, group }, groups, width } = *self;
        let (row, scale) = (groups * width, scale as f32);
        let count = x.elem_count();
        let of_factor = factor.track_op();
        let (mut dz, mut ds) = (vec![0f32; count], vec![0f32; if of_factor { count } else { 0 }]);
        let mut run = |x: &[f32], bias: &[f32], factor: &[f32], dy: &[f32]| {
            let (dz, ds) = (cpu::Shared::new(&mut dz), cpu::Shared::new(&mut ds));
            (0..count.div_ceil(BLOCK * row)).into_par_iter().for_each(|block| {
                for cell in block * BLOCK * groups..(count / width).min((block + 1) * BLOCK * groups) {
                    let (at, channel) = (cell * width, cell % groups * width);
                    // SAFETY (both): a group's elements belong to this task alone.
                    let dz = unsafe { dz.row(at, width) };
                    dy[at * group..][..width * group].chunks(width).for_each(|dy| cpu::add(dz, scale, dy));
                    for (i, dz) in dz.iter_mut().enumerate() {
                        let (value, slope) = curve.at(x[at + i] + bias[channel + i]);
                        if of_factor {
                            let own = unsafe { ds.row(at + i, 1) };
                            own[0] = *dz * value;
                        }
                        *dz *= factor[channel + i] * slope;
                    }
                }
            });
            Ok(())
        };
        cpu::with(x, |x| cpu::with(bias, |b| cpu::with(factor, |f| cpu::with(&grad, |dy| run(x, b, f, dy)))))?;
        // Over the rows, in order.
        let sums = |rows: &[f32]| {
            let mut sums = vec![0f64; row];
            for row in rows.chunks(row) {
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
            }
            Tensor::from_iter(sums.into_iter().map(|x| x as f32), x.device())
        };
        let dbias = bias.track_op().then(|| sums(&dz)).transpose()?;
        let dfactor = of_factor.then(|| sums(&ds)).transpose()?;
        Ok((Some(Tensor::from_vec(dz, x.shape(), x.device())?), dbias, dfactor))
    }
}

#[cfg(feature = "cuda")]
impl Gate {
    fn on_gpu(&self, x: &Tensor, bias: Option<&Tensor>, factor: Option<&Tensor>) -> Result<Tensor> {
        use super::cuda::{Output, code, device_of, joint, launch, pointer};
        use std::ffi::{c_int, c_void};
        use std::ptr::{null, null_mut};
        unsafe extern "C" {
            fn margay_gate(
                y: *mut c_void,
                x: *const c_void,
                bias: *const c_void,
                factor: *const c_void,
                rows: c_int,
                groups: c_int,
                width: c_int,
                group: c_int,
                curve: c_int,
                scale: f32,
                dtype: c_int,
                stream: *mut c_void,
            ) -> c_int;
            fn margay_gate_scratch(rows: c_int, groups: c_int, width: c_int) -> usize;
            fn margay_gate_bwd(
                dz: *mut c_void,
                dbias: *mut c_void,
                dfactor: *mut c_void,
                scratch: *mut c_void,
                x: *const c_void,
                bias: *const c_void,
                factor: *const c_void,
                dy: *const c_void,
                rows: c_int,
                groups: c_int,
                width: c_int,
                group: c_int,
                curve: c_int,
                scale: f32,
                dtype: c_int,
                stream: *mut c_void,
            ) -> c_int;
        }
        let (b, t, groups, width) = x.dims4()?;
        let [rows, g, w, group] = [b * t, groups, width, self.group].map(|n| n as c_int);
        let (curve, scale, dtype) = (self.curve as c_int, self.scale as f32, code(x.dtype())?);
        let own = |p: Option<&Tensor>| p.map(|p| p.to_dtype(DType::F32)?.contiguous()).transpose();
        let (x, bias, factor) = (x.contiguous()?, own(bias)?, own(factor)?);
        let at = |p: &Option<Tensor>| p.as_ref().map(pointer).transpose().map(|p| p.unwrap_or(null()));
        let y = Output::new(device_of(&x)?, (b, t, groups * self.group, width), DType::F32)?;
        let (y_at, x_at, bias_at, factor_at) = (y.pointer()?, pointer(&x)?, at(&bias)?, at(&factor)?);
        // SAFETY: contiguous [B, T, G, W], [G W] and [B, T, G group, W] on this device.
        launch(device_of(&x)?, "gate", |stream| unsafe {
            margay_gate(y_at, x_at, bias_at, factor_at, rows, g, w, group, curve, scale, dtype, stream)
        })?;
        let inputs = [Some(&x), bias.as_ref(), factor.as_ref()];
        let inputs: Vec<&Tensor> = inputs.into_iter().flatten().collect();
        let kept = (x.clone(), bias.clone(), factor.clone());
        let mut results = joint(&inputs, vec![y], "gate", move |given| {
            let (x, bias, factor) = &kept;
            let Some((_, dy)) = given.first().and_then(Option::as_ref) else { bail!("gates without a gradient") };
            let device = device_of(x)?;
            let fresh = |p: &Option<Tensor>| match p.as_ref().filter(|p| p.track_op()) {
                Some(p) => Output::new(device, p.shape(), DType::F32).map(Some),
                None => Ok(None),
            };
            let to = |o: &Option<Output>| o.as_ref().map(Output::pointer).transpose().map(|p| p.unwrap_or(null_mut()));
            let (dz, dbias, dfactor) = (Output::new(device, x.shape(), DType::F32)?, fresh(bias)?, fresh(factor)?);
            // SAFETY: arithmetic on sizes.
            let scratch = Output::scratch(device, unsafe { margay_gate_scratch(rows, g, w) })?;
            let (dz_at, db_at, df_at, scratch_at) = (dz.pointer()?, to(&dbias)?, to(&dfactor)?, scratch.pointer()?);
            let (x_at, bias_at, factor_at, dy_at) = (pointer(x)?, at(bias)?, at(factor)?, pointer(dy)?);
            // SAFETY: as above; gradients are f32 and like what they belong to, the scratch as large as asked for.
            launch(device, "gate backward", |stream| unsafe {
                margay_gate_bwd(
                    dz_at, db_at, df_at, scratch_at, x_at, bias_at, factor_at, dy_at, rows, g, w, group, curve, scale,
                    dtype, stream,
                )
            })?;
            let mut grads = vec![Some(dz.tensor().to_dtype(x.dtype())?)];
            grads.extend(bias.is_some().then(|| dbias.map(Output::tensor)));
            grads.extend(factor.is_some().then(|| dfactor.map(Output::tensor)));
            Ok(grads)
        })?;
        Ok(results.swap_remove(0))
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{INPUTS, check, input};
    use super::*;

    const CURVES: [Curve; 4] = [Curve::LogSigmoid, Curve::Softplus, Curve::Sigmoid, Curve::Silu];

    /// Every curve, with and without parameters.
    fn each(width: usize, test: impl Fn(&str, Gate, &[Tensor])) {
        for (kind, curve) in INPUTS.into_iter().flat_map(|kind| CURVES.map(|curve| (kind, curve))) {
            for parameters in 0..3 {
                let gate = Gate { curve, scale: 0.25, group: 1 + parameters };
                let mut x = vec![input(kind, &[2, 33, 3, width], 1)];
                x.extend((0..parameters).map(|n| input("randn", &[3 * width], 2 + n as u64)));
                test(&format!("{kind}, {curve:?}, {parameters} parameters of {width}"), gate, &x);
            }
        }
    }

    #[test]
    fn fast_equals_plain() {
        for width in [1, 6] {
            each(width, |what, gate, x| check(what, x, 2e-6, |x| gate.forward(&x[0], x.get(1), x.get(2))));
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn gpu_equals_plain() {
        for width in [1, 6, 64] {
            each(width, |what, gate, x| {
                let plain = |x: &[Tensor]| gate.plain(&x[0], x.get(1), x.get(2));
                let op = |x: &[Tensor]| gate.forward(&x[0], x.get(1), x.get(2));
                super::super::check::check_gpu(what, x, true, op, plain);
            });
        }
    }

    #[test]
    fn far_logits_are_finite() {
        let x = Tensor::new(&[-1e4f32, -90.0, 0.0, 90.0, 1e4], &candle_core::Device::Cpu).unwrap();
        for curve in CURVES {
            let x = candle_core::Var::from_tensor(&x.reshape((1, 1, 1, 5)).unwrap()).unwrap();
            let y = Gate::of(curve).forward(&x, None, None).unwrap();
            let grads = y.sum_all().unwrap().backward().unwrap();
            for found in [&y, grads.get(&x).unwrap()] {
                let found = found.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert!(found.iter().all(|v| v.is_finite()), "{curve:?}: {found:?}");
            }
        }
    }
}
