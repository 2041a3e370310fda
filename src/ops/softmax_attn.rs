//! Causal softmax attention with grouped key heads, an optional sliding window, soft-cap and sinks: the teacher and kept
//! layers.
//!
//! ```text
//! s_ij = q_i·k_j / sqrt(D), or cap tanh(q_i·k_j / sqrt(D) / cap)        i - window < j <= i
//! y_i  = Σ_j exp(s_ij) v_j / (Σ_j exp(s_ij) + exp(sink))                the sink's term only where sinks are given
//! ```
//!
//! `qkv` [B, T, H + 2 Hkv, D] rotated, `sinks` `[H]`, result [B, T, H, D].
//!
//! What a row's softmax was divided by is its largest score and Σ_j exp(s_ij - largest): with them a result is joined to
//! another attention's under one denominator, as the sink's share is.
//!
//! On the CPU it is [`super::hybrid_attn`] without a linear part: the window's share σ is 1, keys before the window are
//! dropped. On a GPU (bf16) blocks of keys stream past blocks of rows and nothing of size T x T is formed. Elsewhere a
//! window is served by blocks of rows, each against the band of keys it sees, linear in T, and no window by blocks of rows
//! where there is no gradient.

use candle_core::{CpuStorage, CustomOp1, D, DType, Device, Layout, Result, Shape, Tensor};

use super::cpu;
use super::hybrid_attn::{Core, HybridAttn, Upstream, Window};

/// Rows that meet all keys at once where no window limits them and the plain form runs.
const ROWS: usize = 128;

/// The op's constants.
#[derive(Debug, Clone, Copy)]
pub struct SoftmaxAttn {
    pub heads: usize,
    pub kv_heads: usize,
    /// Keys a row sees, self included; all earlier ones when absent.
    pub window: Option<usize>,
    /// Scores are bent to stay between -cap and cap.
    pub softcap: Option<f32>,
}

impl SoftmaxAttn {
    /// Attention over a whole sequence, in blocks of rows.
    pub fn forward(&self, qkv: &Tensor) -> Result<Tensor> {
        self.forward_with_sinks(qkv, None)
    }

    /// The same with one logit per head that takes its share of every row and gives nothing.
    pub fn forward_with_sinks(&self, qkv: &Tensor, sinks: Option<&Tensor>) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if super::cuda::ready(qkv) && qkv.dtype() == candle_core::DType::BF16 && self.has_kernel(qkv.dim(3)?) {
            let sinks = sinks.map(|s| s.to_dtype(candle_core::DType::F32)?.contiguous()).transpose()?;
            return self.on_gpu(&qkv.contiguous()?, sinks.as_ref());
        }
        let Some(sinks) = sinks else {
            return match self.is_fast(qkv) {
                true => qkv.contiguous()?.apply_op1(Op { shape: *self, mass: false }),
                false => Ok(self.forward_with_mass(qkv)?.0),
            };
        };
        let (y, top, mass) = self.forward_with_mass(qkv)?;
        let share = ((top + mass.log()?)?.broadcast_sub(&sinks.to_dtype(mass.dtype())?)? * 0.5)?.tanh()?;
        let share = ((share + 1.0)? * 0.5)?; // the logistic function; no exponential overflows in its gradient
        y.broadcast_mul(&share.unsqueeze(3)?.to_dtype(y.dtype())?)
    }

    /// The same with what a row's softmax was divided by: y [B, T, H, D], and in f32 the row's largest score `top`
    /// [B, T, H] and `mass` = Σ exp(s - top) [B, T, H]; all three differentiable. `top`'s gradient goes to the key that
    /// holds the maximum, as in [`super::hybrid_attn`].
    pub fn forward_with_mass(&self, qkv: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let (_, time, _, dim) = qkv.dims4()?;
        #[cfg(feature = "cuda")]
        if self.is_kernel(qkv) {
            return self.mass_on_gpu(&qkv.contiguous()?);
        }
        if self.is_fast(qkv) {
            let all = qkv.contiguous()?.apply_op1(Op { shape: *self, mass: true })?; // [B, T, H, D + 2]
            let scalar = |at| all.narrow(3, at, 1)?.squeeze(3)?.contiguous();
            return Ok((all.narrow(3, 0, dim)?.contiguous()?, scalar(dim)?, scalar(dim + 1)?));
        }
        match self.window {
            Some(window) if qkv.dtype() != DType::F64 && 2 * window.max(64) < time => {
                self.banded_with_mass(qkv, window)
            }
            None if qkv.dtype() != DType::F64 && !qkv.track_op() && ROWS < time => self.rowwise_with_mass(qkv),
            _ => self.parallel_with_mass(qkv),
        }
    }

    /// [`SoftmaxAttn::forward_with_mass`] by the definition, T x T.
    pub fn parallel_with_mass(&self, qkv: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let (_, time, _, _) = qkv.dims4()?;
        let [q, k, v] = self.split(&qkv.to_dtype(super::wide(qkv.dtype()))?)?;
        let mask = causal_mask(time, time, self.window, qkv.device())?;
        self.gather(self.divide([&q, &k, &v], &mask)?, qkv)
    }

    /// The same in blocks of rows one after the other, each against all keys up to its end: where nothing asks for a
    /// gradient, whose graph would keep all blocks.
    fn rowwise_with_mass(&self, qkv: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let time = qkv.dim(1)?;
        let [q, k, v] = self.split(&qkv.to_dtype(super::wide(qkv.dtype()))?)?;
        let block = |from: usize| {
            let rows = ROWS.min(time - from);
            let until = |x: &Tensor| x.narrow(2, 0, from + rows)?.contiguous();
            let mask = causal_mask(rows, from + rows, None, qkv.device())?;
            self.divide([&q.narrow(2, from, rows)?.contiguous()?, &until(&k)?, &until(&v)?], &mask)
        };
        let blocks = (0..time).step_by(ROWS).map(block).collect::<Result<Vec<_>>>()?;
        let join = |part: usize| Tensor::cat(&blocks.iter().map(|block| &block[part]).collect::<Vec<_>>(), 2);
        self.gather([join(0)?, join(1)?, join(2)?], qkv)
    }

    /// The same in blocks of as many rows as a window holds, at least 64, each against the band of keys it sees. Bands
    /// are gathered by index: the gradient of a gather costs what it gathered, that of a slice the whole tensor.
    fn banded_with_mass(&self, qkv: &Tensor, window: usize) -> Result<(Tensor, Tensor, Tensor)> {
        let (batch, time, _, dim) = qkv.dims4()?;
        let rows = window.max(64);
        let (blocks, band) = (time.div_ceil(rows), rows + window - 1);
        // What cell `j` of a block's band would be without clamping, window - 1 later: row `i` sees cells i..i + window.
        let late = |block: usize, j: usize| block * rows + j;
        let ids = (0..blocks * band).map(|n| late(n / band, n % band).saturating_sub(window - 1).min(time - 1) as u32);
        let ids = Tensor::from_iter(ids, qkv.device())?;
        // Whether cells of a block lie behind the first token, and what a row sees of any block.
        let seen = |visible: bool| if visible { 0f32 } else { f32::NEG_INFINITY };
        let real = (0..blocks * band).map(|n| seen(late(n / band, n % band) + 1 >= window));
        let real = Tensor::from_iter(real, qkv.device())?.reshape((blocks, 1, band))?;
        let near = (0..rows * band).map(|n| seen(n / band <= n % band && n % band < n / band + window));
        let near = Tensor::from_iter(near, qkv.device())?.reshape((1, rows, band))?;
        let mask = real.broadcast_add(&near)?;

        let heads = batch * self.heads;
        let [q, k, v] = self.split(&qkv.to_dtype(super::wide(qkv.dtype()))?)?;
        let q = q.pad_with_zeros(2, 0, blocks * rows - time)?.reshape((heads, blocks, rows, dim))?;
        let bands = |x: &Tensor| x.index_select(&ids, 2)?.reshape((heads, blocks, band, dim));
        let parts = self.divide([&q, &bands(&k)?, &bands(&v)?], &mask)?;
        self.gather(parts, qkv)
    }

    /// Queries, keys and values [B, H, T, D] each, key heads repeated.
    fn split(&self, qkv: &Tensor) -> Result<[Tensor; 3]> {
        let (h, g) = (self.heads, self.kv_heads);
        let heads = |from, count| qkv.narrow(2, from, count)?.transpose(1, 2)?.contiguous();
        Ok([heads(0, h)?, repeat_kv(&heads(h, g)?, h / g)?, repeat_kv(&heads(h + g, g)?, h / g)?])
    }

    /// s [.., rows, keys], with the mask added, of queries [.., rows, D] and keys [.., keys, D].
    fn scores(&self, q: &Tensor, k: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let scores = (q.matmul(&k.t()?)? * (q.dim(D::Minus1)? as f64).powf(-0.5))?;
        self.bend(scores)?.broadcast_add(&mask.to_dtype(q.dtype())?)
    }

    /// y [.., rows, D], top and mass [.., rows, 1] of queries, keys and values.
    fn divide(&self, [q, k, v]: [&Tensor; 3], mask: &Tensor) -> Result<[Tensor; 3]> {
        let scores = self.scores(q, k, mask)?;
        let top = scores.max_keepdim(D::Minus1)?;
        let terms = scores.broadcast_sub(&top)?.exp()?;
        let mass = terms.sum_keepdim(D::Minus1)?;
        Ok([terms.matmul(v)?.broadcast_div(&mass)?, top, mass])
    }

    /// The result of `divide` over blocks of rows, [B, T, H, ..] like `qkv`.
    fn gather(&self, parts: [Tensor; 3], qkv: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let (batch, time, _, _) = qkv.dims4()?;
        let rows = |x: &Tensor| {
            let x = x.reshape((batch, self.heads, (), x.dim(D::Minus1)?))?.narrow(2, 0, time)?;
            x.transpose(1, 2)?.contiguous()
        };
        let [y, top, mass] = &parts;
        Ok((rows(y)?.to_dtype(qkv.dtype())?, rows(top)?.squeeze(3)?, rows(mass)?.squeeze(3)?))
    }

    /// The definition with T x T weights in plain tensor operations: result and weights [B, H, T, T].
    pub fn parallel(&self, qkv: &Tensor) -> Result<(Tensor, Tensor)> {
        self.parallel_with_sinks(qkv, None)
    }

    /// The same with sinks; the weights of a row then sum to what the sink leaves.
    pub fn parallel_with_sinks(&self, qkv: &Tensor, sinks: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        let (batch, time, _, _) = qkv.dims4()?;
        let [q, k, v] = self.split(qkv)?;
        let scores = self.scores(&q, &k, &causal_mask(time, time, self.window, qkv.device())?)?;
        let weights = match sinks {
            None => softmax(&scores)?,
            Some(sinks) => {
                let shape = (batch, self.heads, time, 1);
                let sinks = sinks.to_dtype(qkv.dtype())?.reshape((1, self.heads, 1, 1))?.broadcast_as(shape)?;
                softmax(&Tensor::cat(&[scores, sinks.contiguous()?], 3)?)?.narrow(3, 0, time)?.contiguous()?
            }
        };
        Ok((weights.matmul(&v)?.transpose(1, 2)?.contiguous()?, weights))
    }

    /// The soft-cap.
    pub(crate) fn bend(&self, scores: Tensor) -> Result<Tensor> {
        self.softcap.map_or(Ok(scores.clone()), |cap| bend(&scores, f64::from(cap)))
    }

    /// Whether the fast CPU form serves this tensor.
    fn is_fast(&self, qkv: &Tensor) -> bool {
        super::fast(qkv) && self.softcap.is_none()
    }
}

/// `cap tanh(x / cap)`: x bent to stay between -cap and cap.
pub fn bend(x: &Tensor, cap: f64) -> Result<Tensor> {
    (x / cap)?.tanh()? * cap
}

/// [B, Hkv, T, D] -> [B, Hkv * groups, T, D]: query head h reads key head h / groups, whole heads repeated.
pub fn repeat_kv(x: &Tensor, groups: usize) -> Result<Tensor> {
    let (b, h, t, d) = x.dims4()?;
    if groups == 1 {
        return Ok(x.clone());
    }
    x.unsqueeze(2)?.broadcast_as((b, h, groups, t, d))?.reshape((b, h * groups, t, d))
}

/// 0 where the last `rows` positions of `time` may look, -inf elsewhere: [rows, time].
pub fn causal_mask(rows: usize, time: usize, window: Option<usize>, device: &Device) -> Result<Tensor> {
    let past = time - rows;
    let cell = |n: usize| {
        let (i, j) = (past + n / time, n % time);
        if j <= i && window.is_none_or(|w| j + w > i) { 0f32 } else { f32::NEG_INFINITY }
    };
    Tensor::from_iter((0..rows * time).map(cell), device)?.reshape((rows, time))
}

/// Softmax over the last axis, with a gradient.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}

/// The fast CPU form.
struct Op {
    shape: SoftmaxAttn,
    /// Rows end in their largest score and what they were divided by.
    mass: bool,
}

impl Op {
    fn core<'a>(&self, shape: &Shape, qkv: &'a [f32]) -> Result<Core<'a>> {
        let SoftmaxAttn { heads, kv_heads, window, .. } = self.shape;
        let window = Window::Sliding(window.unwrap_or(usize::MAX));
        let hybrid = HybridAttn { heads, kv_heads, window, affine: false, softcap: None };
        // σ(∞) = 1: the denominator is Σ exp(s - top) itself.
        let core = Core::new(hybrid, shape, qkv, None, &vec![f32::INFINITY; heads])?;
        Ok(if self.mass { core.with_mass() } else { core })
    }
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "softmax_attn"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, t, _, d) = layout.shape().dims4()?;
        let core = self.core(layout.shape(), cpu::elements(qkv, layout)?)?;
        let width = if self.mass { d + 2 } else { d };
        Ok((CpuStorage::F32(core.forward()), (b, t, self.shape.heads, width).into()))
    }

    fn bwd(&self, qkv: &Tensor, res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let grads = cpu::with(qkv, |x| {
            let core = self.core(qkv.shape(), x)?;
            cpu::with(res, |y| cpu::with(&grad, |dy| Ok(core.backward(Upstream::Graph { y, grad: dy }, true))))
        })?;
        grads.qkv.map(|g| Tensor::from_vec(g, qkv.shape(), qkv.device())).transpose()
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use super::super::cuda::{Output, device_of, joint, launch, pointer};
    use super::*;
    use std::ffi::{c_int, c_void};

    unsafe extern "C" {
        fn margay_softmax_attn_fwd(
            qkv: *const c_void,
            sinks: *const c_void,
            y: *mut c_void,
            lse: *mut c_void,
            top: *mut c_void,
            mass: *mut c_void,
            batch: c_int,
            time: c_int,
            heads: c_int,
            kv_heads: c_int,
            dim: c_int,
            window: c_int,
            scale: f32,
            softcap: f32,
            stream: *mut c_void,
        ) -> c_int;
        fn margay_softmax_attn_bwd_scratch(batch: c_int, time: c_int, heads: c_int, dim: c_int) -> usize;
        fn margay_softmax_attn_bwd(
            qkv: *const c_void,
            sinks: *const c_void,
            y: *const c_void,
            dy: *const c_void,
            lse: *const c_void,
            dlse: *const c_void,
            dqkv: *mut c_void,
            dsinks: *mut c_void,
            scratch: *mut c_void,
            batch: c_int,
            time: c_int,
            heads: c_int,
            kv_heads: c_int,
            dim: c_int,
            window: c_int,
            scale: f32,
            softcap: f32,
            stream: *mut c_void,
        ) -> c_int;
        fn margay_softmax_attn_top_bwd(
            qkv: *const c_void,
            top: *const c_void,
            dtop: *const c_void,
            best: *mut c_void,
            dqkv: *mut c_void,
            batch: c_int,
            time: c_int,
            heads: c_int,
            kv_heads: c_int,
            dim: c_int,
            window: c_int,
            scale: f32,
            softcap: f32,
            stream: *mut c_void,
        ) -> c_int;
    }

    impl SoftmaxAttn {
        /// Whether `forward` is a kernel for this tensor.
        pub fn is_kernel(&self, qkv: &Tensor) -> bool {
            let bf16 = qkv.dtype() == candle_core::DType::BF16;
            bf16 && super::super::cuda::ready(qkv) && qkv.dim(3).is_ok_and(|d| self.has_kernel(d))
        }

        /// Whether the kernels take heads of this size.
        pub(super) fn has_kernel(&self, dim: usize) -> bool {
            dim <= 256 && dim.is_multiple_of(8) && self.heads.is_multiple_of(self.kv_heads)
        }

        /// The node keeps the log-sum-exp of every row for its backward: 4 bytes against a row's 2 D, while making it again
        /// would cost the forward pass.
        pub(super) fn on_gpu(&self, qkv: &Tensor, sinks: Option<&Tensor>) -> Result<Tensor> {
            let op = *self;
            let (mut results, lse) = op.launch_forward(qkv, sinks, false)?;
            let y = results.swap_remove(0);
            match sinks {
                None => y.node(
                    [qkv],
                    "softmax_attn",
                    Box::new(move |[qkv], y, dy| Ok([Some(op.launch_backward(qkv, None, [y, dy, &lse], None)?.0)])),
                ),
                Some(sinks) => y.node(
                    [qkv, sinks],
                    "softmax_attn",
                    Box::new(move |[qkv, sinks], y, dy| {
                        let (dqkv, dsinks) = op.launch_backward(qkv, Some(sinks), [y, dy, &lse], None)?;
                        Ok([Some(dqkv), dsinks])
                    }),
                ),
            }
        }

        /// B, T, H, Hkv, D, window; scale, soft-cap.
        fn numbers(&self, qkv: &Tensor, sinks: Option<&Tensor>) -> Result<([c_int; 6], [f32; 2])> {
            let (batch, time, heads, dim) = qkv.dims4()?;
            if heads != self.heads + 2 * self.kv_heads {
                candle_core::bail!("{heads} packed heads, not {} + 2 x {}", self.heads, self.kv_heads);
            }
            if let Some(sinks) = sinks.filter(|s| s.elem_count() != self.heads) {
                candle_core::bail!("sinks {:?} for {} heads", sinks.shape(), self.heads);
            }
            let window = self.window.map_or(0, |w| w.min(time));
            let ints = [batch, time, self.heads, self.kv_heads, dim, window].map(|n| n as c_int);
            Ok((ints, [(dim as f32).powf(-0.5), self.softcap.unwrap_or(0.0)]))
        }

        /// Result, largest scores and what rows were divided by. With lse = top + ln mass, what mass gets goes to lse and,
        /// negative, to top.
        pub(super) fn mass_on_gpu(&self, qkv: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
            let op = *self;
            let (results, lse) = op.launch_forward(qkv, None, true)?;
            let kept = qkv.clone();
            let results = joint(&[qkv], results, "softmax_attn", move |given| {
                let [y, top, mass] = given else { candle_core::bail!("{} gradients of three results", given.len()) };
                let (y, dy) = match y {
                    Some((y, dy)) => (y.clone(), dy.clone()),
                    None => {
                        let (batch, time, _, dim) = kept.dims4()?;
                        let none = Tensor::zeros((batch, time, op.heads, dim), DType::BF16, kept.device())?;
                        (none.clone(), none)
                    }
                };
                let of_lse = mass.as_ref().map(|(mass, grad)| mass * grad).transpose()?;
                let of_top = match (top.as_ref().map(|(_, grad)| grad), &of_lse) {
                    (Some(own), Some(share)) => Some((own - share)?),
                    (Some(own), None) => Some(own.clone()),
                    (None, Some(share)) => Some(share.neg()?),
                    (None, None) => None,
                };
                let (dqkv, _) = op.launch_backward(&kept, None, [&y, &dy, &lse], of_lse.as_ref())?;
                if let Some(of_top) = of_top {
                    let top = match (top, mass) {
                        (Some((top, _)), _) => top.clone(),
                        (None, Some((mass, _))) => (lse.transpose(1, 2)? - mass.log()?)?,
                        (None, None) => lse.transpose(1, 2)?.contiguous()?,
                    };
                    op.launch_top(&kept, &top, &of_top, &dqkv)?;
                }
                Ok(vec![Some(dqkv)])
            })?;
            match <[Tensor; 3]>::try_from(results) {
                Ok([y, top, mass]) => Ok((y, top, mass)),
                Err(results) => candle_core::bail!("{} results, not three", results.len()),
            }
        }

        /// y, with `mass` also top and mass; and lse.
        fn launch_forward(&self, qkv: &Tensor, sinks: Option<&Tensor>, mass: bool) -> Result<(Vec<Output>, Tensor)> {
            let ([b, t, h, g, d, window], [scale, cap]) = self.numbers(qkv, sinks)?;
            let (batch, time, _, dim) = qkv.dims4()?;
            let device = device_of(qkv)?;
            let y = Output::new(device, (batch, time, self.heads, dim), DType::BF16)?;
            let lse = Output::new(device, (batch, self.heads, time), DType::F32)?;
            let rows = || Output::new(device, (batch, time, self.heads), DType::F32);
            let extra = if mass { vec![rows()?, rows()?] } else { Vec::new() };
            let (x, s) = (pointer(qkv)?, sinks.map(pointer).transpose()?.unwrap_or(std::ptr::null()));
            let at =
                |i: usize| extra.get(i).map(Output::pointer).transpose().map(|p| p.unwrap_or(std::ptr::null_mut()));
            let (y_at, lse_at, top_at, mass_at) = (y.pointer()?, lse.pointer()?, at(0)?, at(1)?);
            // SAFETY: contiguous [B, T, H + 2 Hkv, D] and [B, T, H, D] bf16, [B, H, T], [B, T, H] and [H] f32, all on this
            // device.
            launch(device, "softmax_attn", |stream| unsafe {
                margay_softmax_attn_fwd(x, s, y_at, lse_at, top_at, mass_at, b, t, h, g, d, window, scale, cap, stream)
            })?;
            Ok((std::iter::once(y).chain(extra).collect(), lse.tensor()))
        }

        /// Adds to `dqkv` what a gradient [B, T, H] of the largest scores gives.
        fn launch_top(&self, qkv: &Tensor, top: &Tensor, grad: &Tensor, dqkv: &Tensor) -> Result<()> {
            let ([b, t, h, g, d, window], [scale, cap]) = self.numbers(qkv, None)?;
            let device = device_of(qkv)?;
            let best = Output::new(device, b as usize * h as usize * t as usize, DType::U32)?;
            let (top, grad) = (top.contiguous()?, grad.contiguous()?);
            let (x, top, grad, best_at) = (pointer(qkv)?, pointer(&top)?, pointer(&grad)?, best.pointer()?);
            let dx = pointer(dqkv)?.cast_mut();
            // SAFETY: shapes as in the forward launch; dqkv was made for this backward pass and nothing else reads it yet.
            launch(device, "softmax_attn top", |stream| unsafe {
                margay_softmax_attn_top_bwd(x, top, grad, best_at, dx, b, t, h, g, d, window, scale, cap, stream)
            })
        }

        fn launch_backward(
            &self,
            qkv: &Tensor,
            sinks: Option<&Tensor>,
            [y, dy, lse]: [&Tensor; 3],
            dlse: Option<&Tensor>,
        ) -> Result<(Tensor, Option<Tensor>)> {
            let ([b, t, h, g, d, window], [scale, cap]) = self.numbers(qkv, sinks)?;
            let device = device_of(qkv)?;
            let dqkv = Output::new(device, qkv.shape(), DType::BF16)?;
            let dsinks = sinks.map(|s| Output::new(device, s.shape(), DType::F32)).transpose()?;
            // SAFETY: arithmetic on four counts, and what kind of device is current.
            let scratch = Output::scratch(device, unsafe { margay_softmax_attn_bwd_scratch(b, t, h, d) })?;
            let (x, s) = (pointer(qkv)?, sinks.map(pointer).transpose()?.unwrap_or(std::ptr::null()));
            let (y, dy, lse) = (pointer(y)?, pointer(dy)?, pointer(lse)?);
            let dlse = dlse.map(pointer).transpose()?.unwrap_or(std::ptr::null());
            let ds_at = dsinks.as_ref().map(Output::pointer).transpose()?.unwrap_or(std::ptr::null_mut());
            let (dx, room) = (dqkv.pointer()?, scratch.pointer()?);
            // SAFETY: shapes as in the forward launch, gradients shaped like what they belong to, and the scratch asked for.
            launch(device, "softmax_attn backward", |stream| unsafe {
                margay_softmax_attn_bwd(
                    x, s, y, dy, lse, dlse, dx, ds_at, room, b, t, h, g, d, window, scale, cap, stream,
                )
            })?;
            Ok((dqkv.tensor(), dsinks.map(Output::tensor)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{INPUTS, check, input};
    use super::*;

    #[test]
    fn fast_equals_plain() {
        for kind in INPUTS {
            for time in [1, 63, 64, 65, 200] {
                for window in [None, Some(1), Some(16), Some(1000)] {
                    let op = SoftmaxAttn { heads: 4, kv_heads: 2, window, softcap: None };
                    let x = [input(kind, &[2, time, 8, 8], 1)];
                    check(&format!("{kind}, {time}, {window:?}"), &x, 2e-5, |x| op.forward(&x[0]));
                }
            }
        }
    }

    /// Result, largest score and mass, in the fast form and by bands, with all their gradients.
    #[test]
    fn mass_equals_plain() {
        // Where hundreds of keys nearly tie, f32 may give the maximum to another one; lse does not depend on which.
        let joined = |kind: &str, parts: Result<(Tensor, Tensor, Tensor)>| {
            let (y, top, mass) = parts?;
            let lse = (&top + mass.log()?)?;
            let top = if ["randn", "large"].contains(&kind) { top } else { lse.clone() };
            Tensor::cat(&[y, top.unsqueeze(3)?, lse.unsqueeze(3)?], 3)
        };
        for kind in INPUTS {
            for time in [1, 63, 64, 65, 300] {
                for window in [None, Some(1), Some(16), Some(64)] {
                    let x = [input(kind, &[2, time, 8, 8], 1)];
                    for (heads, kv_heads, softcap) in [(4, 2, None), (6, 1, None), (4, 2, Some(5.0))] {
                        let op = SoftmaxAttn { heads, kv_heads, window, softcap };
                        let oracle = |x: &Tensor| x.dtype() == DType::F64;
                        let what = format!("{kind}, {time}, {window:?}, {heads} over {kv_heads}, {softcap:?}");
                        check(&what, &x, 2e-5, |x| match oracle(&x[0]) {
                            true => joined(kind, op.parallel_with_mass(&x[0])),
                            false => joined(kind, op.forward_with_mass(&x[0])),
                        });
                        let Some(window) = window else {
                            check(&format!("rows: {what}"), &x, 2e-5, |x| match oracle(&x[0]) {
                                true => joined(kind, op.parallel_with_mass(&x[0])),
                                false => joined(kind, op.rowwise_with_mass(&x[0])),
                            });
                            continue;
                        };
                        check(&format!("bands: {what}"), &x, 2e-5, |x| match oracle(&x[0]) {
                            true => joined(kind, op.parallel_with_mass(&x[0])),
                            false => joined(kind, op.banded_with_mass(&x[0], window)),
                        });
                    }
                }
            }
        }
    }

    /// The same on a GPU, gradients of all three results included. Where scores are so large that one key holds a row, the
    /// gradient of its mass is the difference of two parts, each rounded to bf16, and nothing but rounding: there the mass
    /// gets none.
    #[cfg(feature = "cuda")]
    #[test]
    fn mass_kernels_equal_plain() {
        let joined = |parts: Result<(Tensor, Tensor, Tensor)>, large: bool| {
            let (y, top, mass) = parts?;
            let mass = if large { mass.detach() } else { mass };
            Tensor::cat(&[y.to_dtype(top.dtype())?, top.unsqueeze(3)?, mass.log()?.unsqueeze(3)?], 3)
        };
        for (kind, time, window) in ["randn", "large"]
            .into_iter()
            .flat_map(|kind| [1, 65, 200].map(|time| (kind, time)))
            .flat_map(|(kind, time)| [None, Some(1), Some(16), Some(64), Some(128)].map(|w| (kind, time, w)))
        {
            for (heads, kv_heads, dim, softcap) in [(4, 2, 64, None), (3, 1, 128, Some(20.0)), (2, 2, 80, None)] {
                let op = SoftmaxAttn { heads, kv_heads, window, softcap };
                let x = [input(kind, &[2, time, heads + 2 * kv_heads, dim], 1)];
                let what = format!("{kind}, {time}, {window:?}, {heads} over {kv_heads} x {dim}, {softcap:?}");
                let large = kind == "large";
                let plain = |x: &[Tensor]| joined(op.parallel_with_mass(&x[0]), large);
                let ours = |x: &[Tensor]| joined(op.forward_with_mass(&x[0]), large);
                // The plain form computes in f32. The kernel takes Σ dy y from y in bf16, which is most of a gradient where
                // few keys hold a row, and rounds dq and dk once more where the largest score's share is added.
                super::super::check::check_gpu_within(if large { 2e-2 } else { 3e-3 }, &what, &x, false, ours, plain);
            }
        }
    }

    #[test]
    fn fast_sinks_equal_plain() {
        for kind in INPUTS {
            for (time, window) in [(1, None), (65, None), (65, Some(16)), (300, Some(64))] {
                let op = SoftmaxAttn { heads: 4, kv_heads: 2, window, softcap: None };
                let x = [input(kind, &[2, time, 8, 8], 1), input("large", &[4], 2)];
                check(&format!("{kind}, {time}, {window:?}"), &x, 2e-5, |x| match x[0].dtype() {
                    DType::F64 => Ok(op.parallel_with_sinks(&x[0], Some(&x[1]))?.0),
                    _ => op.forward_with_sinks(&x[0], Some(&x[1])),
                });
            }
        }
    }

    /// Sinks and soft-cap against the formula written out in f64 over plain arrays.
    #[test]
    fn plain_form_has_sinks_and_a_cap() {
        let (heads, time, dim, cap) = (2, 9, 4, 1.5f32);
        let x = input("randn", &[1, time, 3 * heads, dim], 5);
        let sinks = input("randn", &[heads], 6);
        let op = SoftmaxAttn { heads, kv_heads: heads, window: Some(4), softcap: Some(cap) };
        let y = op.forward_with_sinks(&x, Some(&sinks)).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let (x, sinks) = (x.flatten_all().unwrap().to_vec1::<f64>().unwrap(), sinks.to_vec1::<f64>().unwrap());
        let at = |t: usize, head: usize, d: usize| x[(t * 3 * heads + head) * dim + d];
        for i in 0..time {
            for (h, sink) in sinks.iter().enumerate() {
                let (mut sum, mut row) = (sink.exp(), vec![0.0; dim]);
                for j in (i + 1).saturating_sub(4)..=i {
                    let dot: f64 = (0..dim).map(|d| at(i, h, d) * at(j, heads + h, d)).sum();
                    let weight = (f64::from(cap) * (dot / (dim as f64).sqrt() / f64::from(cap)).tanh()).exp();
                    sum += weight;
                    (0..dim).for_each(|d| row[d] += weight * at(j, 2 * heads + h, d));
                }
                for (d, row) in row.iter().enumerate() {
                    assert!((y[(i * heads + h) * dim + d] - row / sum).abs() < 1e-12, "row {i}, head {h}");
                }
            }
        }
    }

    /// The kernels against the plain form in f64: at most twice the error of the plain form in bf16, for the result and every
    /// gradient, and the same bits twice.
    #[cfg(feature = "cuda")]
    #[test]
    fn kernels_equal_plain() {
        use candle_core::{DType, Var};
        let Ok(gpu) = super::super::gpu(0) else {
            eprintln!("skipped: there is no GPU here");
            return;
        };
        let cast = |x: &Tensor, dtype| x.to_dtype(dtype).unwrap();
        let norm =
            |x: &Tensor| cast(x, DType::F64).sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
        let case = |kind: &str,
                    shape: [usize; 3],
                    dim: usize,
                    (window, softcap, sinks): (Option<usize>, Option<f32>, bool)| {
            let [time, heads, kv_heads] = shape;
            let op = SoftmaxAttn { heads, kv_heads, window, softcap };
            let on_gpu = |x: Tensor| cast(&cast(&x, DType::F32).to_device(&gpu).unwrap(), DType::BF16);
            let x = on_gpu(input(kind, &[2, time, heads + 2 * kv_heads, dim], 1));
            let dy = on_gpu(input("randn", &[2, time, heads, dim], 2));
            let sink = sinks.then(|| on_gpu(input("randn", &[heads], 3)));
            let run = |dtype: DType, plain: bool| {
                let x = Var::from_tensor(&cast(&x, dtype)).unwrap();
                // Sinks are f32 parameters; the plain form in f64 takes them as such.
                let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
                let sink = sink.as_ref().map(|s| Var::from_tensor(&cast(s, wide)).unwrap());
                let with = sink.as_ref().map(|s| s.as_tensor());
                let y = if plain {
                    op.parallel_with_sinks(&x, with).unwrap().0
                } else {
                    op.forward_with_sinks(&x, with).unwrap()
                };
                let grads = (&y * &cast(&dy, dtype)).unwrap().sum_all().unwrap().backward().unwrap();
                let dx = grads.get(&x).unwrap();
                let part = |from, count| dx.narrow(2, from, count).unwrap();
                let (dq, dk, dv) = (part(0, heads), part(heads, kv_heads), part(heads + kv_heads, kv_heads));
                let mut all = vec![("y", y), ("dq", dq), ("dk", dk), ("dv", dv)];
                all.extend(sink.map(|s| ("dsink", grads.get(&s).unwrap().clone())));
                all
            };
            let (wanted, plain) = (run(DType::F64, true), run(DType::BF16, true));
            let (mine, again) = (run(DType::BF16, false), run(DType::BF16, false));
            for (((name, wanted), plain), (mine, again)) in wanted.iter().zip(plain).zip(mine.into_iter().zip(again)) {
                let off = |x: &Tensor| norm(&(cast(x, DType::F64) - wanted).unwrap());
                // Where the gradient cancels to nothing, rounding is relative to the terms that cancelled.
                let room = (2.0 * off(&plain.1)).max(1e-3 * norm(&dy)).max(1e-6 * norm(wanted));
                let what = format!("{name}: {kind}, {shape:?} x {dim}, {window:?}, {softcap:?}, {sinks}");
                assert!(off(&mine.1) <= room, "{what}: {:e} > {room:e}", off(&mine.1));
                assert_eq!(norm(&(mine.1 - again.1).unwrap()), 0.0, "{what}: differs the second time");
            }
        };
        for kind in INPUTS {
            for time in [1, 63, 64, 65, 1000] {
                for window in [None, Some(1), Some(16), Some(64), Some(1000)] {
                    case(kind, [time, 4, 2], 128, (window, None, false));
                }
            }
        }
        for dim in [8, 64, 80, 96, 128, 256] {
            for window in [None, Some(64)] {
                case("randn", [200, 4, 2], dim, (window, Some(20.0), true));
                case("randn", [333, 3, 3], dim, (window, None, false));
                case("randn", [130, 32, 8], dim, (window, None, true));
            }
        }
        case("randn", [4096, 2, 1], 128, (None, None, false));
        case("randn", [4096, 2, 2], 64, (Some(64), None, false));
    }
}
