//! Softmax window and linear attention under one denominator (LoLCATs, arXiv 2410.10254).
//!
//! ```text
//! s_ij = q_i·k_j / sqrt(D), or bent by a cap      c_i = max of s_ij over the window of row i
//! a_ij = σ(f) exp(s_ij - c_i)                     j inside the window of i
//! a_ij = λ φq_i·φk_j                              j before it; λ = 1, or 1 - σ(f) where `affine`
//! y_i  = Σ_j a_ij v_j / Σ_j a_ij
//! ```
//!
//! Window terms are shifted by the row's maximum, linear terms are not: the strongest window key always weighs σ(f). So
//! `c_i` is part of the function and its gradient goes to the key that holds the maximum; another shift would give
//! another function.
//!
//! Shapes: `qkv` [B, T, H + 2 Hkv, D] with rotated queries and keys, `features` [B, T, 2 H, F] (φq of every head, then
//! φk of every *query* head), `factors` `[H]` the window factors before the sigmoid; result [B, T, H, D].
//!
//! The fast forms walk chunks of rows with the state S = Σ φk_j [v_j, 1] of all keys before the chunk's reach, so
//! their cost is linear in T: `cpu.rs`. What they do not serve, such as a cap, is plain tensor operations over such chunks.

#[cfg(any(feature = "cuda", test))]
mod branches;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor};

use super::cpu::{elements, with};
use super::loss::{mse, with_gradient};
use super::softmax_attn::{bend, repeat_kv};
pub(super) use cpu::{Core, Upstream};

/// Which keys lie in the softmax window of a row; all earlier ones belong to the linear part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// The last `n` keys, self included; 0 leaves everything to the linear part.
    Sliding(usize),
    /// The row's own block of `n` and the whole block before it; blocks start at position 0.
    Terraced(usize),
}

impl Window {
    /// First position in the window of row `i`; `i + 1` when it is empty.
    pub fn start(self, i: usize) -> usize {
        match self {
            Window::Sliding(n) => (i + 1).saturating_sub(n),
            Window::Terraced(n) => (i / n).saturating_sub(1) * n,
        }
    }

    /// Most keys a window holds.
    pub fn capacity(self) -> usize {
        match self {
            Window::Sliding(n) => n,
            Window::Terraced(n) => 2 * n,
        }
    }

    /// Rows per chunk of the form in plain operations: at least 64, and so many blocks that no window reaches beyond the
    /// chunk before.
    fn rows(self) -> usize {
        match self {
            Window::Sliding(n) => n.max(64),
            Window::Terraced(n) => n * 64usize.div_ceil(n),
        }
    }

    /// Rows per chunk of the chunkwise forms: near 64; a terraced chunk never crosses a block.
    fn chunk(self) -> usize {
        match self {
            Window::Sliding(n) => n.clamp(32, 64),
            Window::Terraced(n) => (1..=n.min(64)).rev().find(|c| n.is_multiple_of(*c)).unwrap_or(1),
        }
    }
}

/// The op's constants.
#[derive(Debug, Clone, Copy)]
pub struct HybridAttn {
    pub heads: usize,
    pub kv_heads: usize,
    pub window: Window,
    /// λ = 1 - σ(f) instead of 1.
    pub affine: bool,
    /// Scores are bent to stay between -cap and cap; plain tensor operations serve this.
    pub softcap: Option<f32>,
}

/// Smallest denominator of a row: reached only without a window.
pub const MIN_DENOMINATOR: f64 = 1e-12;

impl HybridAttn {
    /// Linear-time form with gradients to all three tensors.
    pub fn forward(&self, qkv: &Tensor, features: &Tensor, factors: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        {
            if let Some(y) = self.on_gpu(qkv, features, factors)? {
                return Ok(y);
            }
            if let Window::Sliding(size @ 1..) = self.window
                && super::cuda::ready(qkv)
                && qkv.dtype() == DType::BF16
            {
                return self.by_branches(size, qkv, features, factors);
            }
        }
        if !self.is_fast(qkv) {
            return match qkv.dtype() != DType::F64 && self.window.rows() < qkv.dim(1)? / 2 {
                true => self.chunked(qkv, features, factors),
                false => Ok(self.parallel(qkv, features, factors)?.0),
            };
        }
        let op = Op { shape: *self, qkv_grad: qkv.track_op() };
        qkv.contiguous()?.apply_op3(&features.contiguous()?, &factors.contiguous()?, op)
    }

    /// `forward` where it is a kernel; None where it is not.
    #[cfg(feature = "cuda")]
    pub fn on_gpu(&self, qkv: &Tensor, features: &Tensor, factors: &Tensor) -> Result<Option<Tensor>> {
        if self.softcap.is_some() { Ok(None) } else { cuda::forward(self, qkv, features, factors) }
    }

    /// `weight * mean((y - target)²)`, a scalar f32 with gradients to `features` and `factors`. Where nothing asks for
    /// those of `qkv` it is computed chunk by chunk with its gradients, and y is never stored.
    pub fn mse(
        &self,
        qkv: &Tensor,
        features: &Tensor,
        factors: &Tensor,
        target: &Tensor,
        weight: f64,
    ) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if !qkv.track_op()
            && self.softcap.is_none()
            && let Some(loss) = cuda::mse(self, qkv, features, factors, target, weight)?
        {
            return Ok(loss);
        }
        if self.is_fast(qkv) && !qkv.track_op() {
            return self.chunked_mse(&qkv.contiguous()?, features, factors, &target.contiguous()?, weight);
        }
        mse(&self.forward(qkv, features, factors)?, target, weight)
    }

    /// `mse` on the CPU.
    fn chunked_mse(
        &self,
        qkv: &Tensor,
        features: &Tensor,
        factors: &Tensor,
        target: &Tensor,
        weight: f64,
    ) -> Result<Tensor> {
        let (phi, f) = (features.contiguous()?, factors.contiguous()?);
        let count = target.elem_count() as f64;
        let slope = (2.0 * weight / count) as f32;
        let grads = with(qkv, |x| {
            with(&phi, |phi_data| {
                with(&f, |f| {
                    let core = Core::new(*self, qkv.shape(), x, Some((phi_data, phi.dim(3)?)), f)?;
                    with(target, |target| Ok(core.backward(Upstream::Squares { target, slope }, false)))
                })
            })
        })?;
        let scalar = |value: f64| Tensor::new(value as f32, qkv.device());
        let of = |data: Vec<f32>, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device());
        let value = with_gradient(&phi, scalar(grads.squares * weight / count)?, of(grads.features, &phi)?)?;
        value + with_gradient(&f, scalar(0.0)?, of(grads.factors, &f)?)?
    }

    /// `forward` on the features of softmax maps without bias, `weight` [2 H, D, C], in one op; None where it does not
    /// exist for these tensors.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    pub fn with_maps(&self, qkv: &Tensor, weight: &Tensor, factors: &Tensor) -> Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        let y = if self.softcap.is_some() { Ok(None) } else { cuda::with_maps(self, qkv, weight, factors) };
        #[cfg(not(feature = "cuda"))]
        let y = Ok(None);
        y
    }

    /// `mse` on the features of such maps, with gradients to `weight` and `factors` alone; None where it does not exist
    /// for these tensors.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    pub fn mse_with_maps(
        &self,
        qkv: &Tensor,
        weight: &Tensor,
        factors: &Tensor,
        target: &Tensor,
        loss_weight: f64,
    ) -> Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        let loss = match qkv.track_op() || self.softcap.is_some() {
            true => Ok(None),
            false => cuda::mse_with_maps(self, qkv, weight, factors, target, loss_weight),
        };
        #[cfg(not(feature = "cuda"))]
        let loss = Ok(None);
        loss
    }

    /// The definition with T x T weights, in plain tensor operations. Gives the result and the weights
    /// [B, H, T, T], each row summing to 1; the weights of the linear part are those outside the window.
    pub fn parallel(&self, qkv: &Tensor, features: &Tensor, factors: &Tensor) -> Result<(Tensor, Tensor)> {
        let (_, time, _, dim) = qkv.dims4()?;
        let (h, g) = (self.heads, self.kv_heads);
        let heads = |from, count| qkv.narrow(2, from, count)?.transpose(1, 2)?.contiguous();
        let (q, k, v) = (heads(0, h)?, heads(h, g)?, heads(h + g, g)?);
        let (k, v) = (repeat_kv(&k, h / g)?, repeat_kv(&v, h / g)?);
        let phi = |from| features.narrow(2, from, h)?.transpose(1, 2)?.contiguous();
        let (fq, fk) = (phi(0)?, phi(h)?);

        let window = self.window_mask(time, qkv.dtype(), qkv.device())?; // [T, T], 1 inside
        let causal = Tensor::tril2(time, qkv.dtype(), qkv.device())?;
        let linear = (&causal - &window)?;
        let scores = self.bend((q.matmul(&k.t()?)? * (dim as f64).powf(-0.5))?)?;
        let outside = ((&window - 1.0)? * 1e30)?; // 0 inside, -1e30 outside
        let scores = scores.broadcast_mul(&window)?.broadcast_add(&outside)?;
        let top = scores.max_keepdim(D::Minus1)?.clamp(-1e29, f64::MAX)?; // finite where the window is empty
        let factor = sigmoid(&factors.to_dtype(qkv.dtype())?)?.reshape((1, h, 1, 1))?;
        let soft = scores.broadcast_sub(&top)?.exp()?.broadcast_mul(&window)?.broadcast_mul(&factor)?;
        let mut lin = fq.matmul(&fk.t()?)?.broadcast_mul(&linear)?;
        if self.affine {
            lin = lin.broadcast_mul(&(1.0 - factor)?)?;
        }
        let weights = (soft + lin)?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?.maximum(MIN_DENOMINATOR)?)?;
        Ok((weights.matmul(&v)?.transpose(1, 2)?.contiguous()?, weights))
    }

    /// The same in plain tensor operations of memory linear in T, in f32: chunks of rows side by side, each against the
    /// keys of its own chunk and of the one before, and the state of all chunks before those.
    fn chunked(&self, qkv: &Tensor, features: &Tensor, factors: &Tensor) -> Result<Tensor> {
        let (batch, time, _, dim) = qkv.dims4()?;
        let (h, g, rows, device) = (self.heads, self.kv_heads, self.window.rows(), qkv.device());
        let chunks = time.div_ceil(rows);
        let wide = |x: &Tensor| x.to_dtype(DType::F32)?.transpose(1, 2)?.contiguous(); // [B, heads, T, ..]
        let split = |x: &Tensor| {
            let x = x.pad_with_zeros(2, 0, chunks * rows - time)?;
            x.reshape((batch * h, chunks, rows, x.dim(3)?))
        };
        let heads = |from, count| repeat_kv(&wide(&qkv.narrow(2, from, count)?)?, h / count);
        let phi = |from| split(&wide(&features.narrow(2, from, h)?)?);
        let (q, k, v) = (split(&heads(0, h)?)?, split(&heads(h, g)?)?, heads(h + g, g)?);
        let v = split(&Tensor::cat(&[&v, &v.narrow(3, 0, 1)?.ones_like()?], 3)?)?; // [B H, chunks, rows, D + 1]
        let (fq, fk) = (phi(0)?, phi(h)?);
        // A chunk's keys behind those of the one before.
        let band = |x: &Tensor| Tensor::cat(&[&x.pad_with_zeros(1, 1, 0)?.narrow(1, 0, chunks)?, x], 2)?.contiguous();

        // Of row i and the cells of its band, whose first is key (i / rows - 1) * rows: [chunks, rows, 2 rows].
        let cells = |inside: &dyn Fn(usize, usize) -> bool| {
            let cell = |n: usize| {
                let (i, j) = (n / (2 * rows), n / (2 * rows) / rows * rows + n % (2 * rows));
                j.checked_sub(rows).is_some_and(|j| inside(i, j)) as u8 as f32
            };
            Tensor::from_iter((0..2 * chunks * rows * rows).map(cell), device)?.reshape((chunks, rows, 2 * rows))
        };
        let window = cells(&|i, j| j <= i && j >= self.window.start(i))?;
        let before = cells(&|i, j| j < self.window.start(i))?;
        let factor = sigmoid(&factors.to_dtype(DType::F32)?)?.reshape((1, h))?.broadcast_as((batch, h))?;
        let factor = factor.reshape((batch * h, 1, 1, 1))?;

        let scores = self.bend((q.matmul(&band(&k)?.t()?)? * (dim as f64).powf(-0.5))?)?;
        let scores = scores.broadcast_mul(&window)?.broadcast_add(&((&window - 1.0)? * 1e30)?)?;
        let top = scores.max_keepdim(D::Minus1)?.clamp(-1e29, f64::MAX)?;
        let soft = scores.broadcast_sub(&top)?.exp()?.broadcast_mul(&window)?;
        let near = fq.matmul(&band(&fk)?.t()?)?.broadcast_mul(&before)?;
        // States of single chunks, then for each chunk the sum over those before its band: [B H, chunks, F, D + 1].
        let states = fk.t()?.matmul(&v)?;
        let (width, columns) = (states.dim(2)?, states.dim(3)?);
        let earlier = (0..chunks * chunks).map(|n| (n % chunks + 1 < n / chunks) as u8 as f32);
        let earlier = Tensor::from_iter(earlier, device)?.reshape((chunks, chunks))?;
        let states = earlier.broadcast_matmul(&states.reshape((batch * h, chunks, width * columns))?)?;
        let far = fq.matmul(&states.reshape((batch * h, chunks, width, columns))?)?;
        // Factors weigh sums, not single terms: their gradient cancels less.
        let v = band(&v)?;
        let (soft, linear) = (soft.matmul(&v)?.broadcast_mul(&factor)?, (near.matmul(&v)? + far)?);
        let linear = if self.affine { linear.broadcast_mul(&(1.0 - factor)?)? } else { linear };
        let sums = (soft + linear)?;
        let y = sums.narrow(3, 0, dim)?.broadcast_div(&sums.narrow(3, dim, 1)?.maximum(MIN_DENOMINATOR)?)?;
        let y = y.reshape((batch, h, chunks * rows, dim))?.narrow(2, 0, time)?;
        y.transpose(1, 2)?.contiguous()?.to_dtype(qkv.dtype())
    }

    /// The soft-cap.
    pub(crate) fn bend(&self, scores: Tensor) -> Result<Tensor> {
        self.softcap.map_or(Ok(scores.clone()), |cap| bend(&scores, f64::from(cap)))
    }

    /// Whether the fast CPU form serves this tensor.
    fn is_fast(&self, qkv: &Tensor) -> bool {
        super::fast(qkv) && self.softcap.is_none()
    }

    /// 1 where key j lies in the window of row i, else 0: [T, T].
    pub fn window_mask(&self, time: usize, dtype: candle_core::DType, device: &candle_core::Device) -> Result<Tensor> {
        let cell = |n: usize| {
            let (i, j) = (n / time, n % time);
            (j <= i && j >= self.window.start(i)) as u8 as f32
        };
        Tensor::from_iter((0..time * time).map(cell), device)?.reshape((time, time))?.to_dtype(dtype)
    }
}

/// The logistic function in plain tensor operations.
pub(crate) fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

struct Op {
    shape: HybridAttn,
    /// Whether queries, keys and values need a gradient (not in attention transfer).
    qkv_grad: bool,
}

impl CustomOp3 for Op {
    fn name(&self) -> &'static str {
        "hybrid_attn"
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        qkv_layout: &Layout,
        features: &CpuStorage,
        features_layout: &Layout,
        factors: &CpuStorage,
        factors_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (b, t, _, d) = qkv_layout.shape().dims4()?;
        let core = Core::new(
            self.shape,
            qkv_layout.shape(),
            elements(qkv, qkv_layout)?,
            Some((elements(features, features_layout)?, features_layout.shape().dims4()?.3)),
            elements(factors, factors_layout)?,
        )?;
        Ok((CpuStorage::F32(core.forward()), (b, t, self.shape.heads, d).into()))
    }

    fn bwd(
        &self,
        qkv: &Tensor,
        features: &Tensor,
        factors: &Tensor,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let grads = with(qkv, |x| {
            with(features, |phi| {
                with(factors, |f| {
                    let core = Core::new(self.shape, qkv.shape(), x, Some((phi, features.dim(3)?)), f)?;
                    with(res, |y| with(&grad, |dy| Ok(core.backward(Upstream::Graph { y, grad: dy }, self.qkv_grad))))
                })
            })
        })?;
        let of = |data: Vec<f32>, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device());
        Ok((
            grads.qkv.map(|g| of(g, qkv)).transpose()?,
            Some(of(grads.features, features)?),
            Some(of(grads.factors, factors)?),
        ))
    }
}
#[cfg(test)]
mod tests {
    use super::super::check::{INPUTS, check, input};
    use super::*;

    /// The op, its inputs and what to call them, over windows, lengths and hostile inputs.
    fn cases(mut visit: impl FnMut(&str, HybridAttn, [Tensor; 3])) {
        use Window::*;
        for kind in INPUTS {
            for time in [1, 15, 63, 64, 65, 200] {
                for window in
                    [Sliding(0), Sliding(1), Sliding(16), Sliding(64), Sliding(500), Terraced(16), Terraced(96)]
                {
                    // With a cap, shorter texts are served by the definition.
                    let long = if time > 128 { [(false, Some(3.0)), (true, Some(3.0))].as_slice() } else { &[] };
                    for &(affine, softcap) in [(false, None), (true, None)].iter().chain(long) {
                        let op = HybridAttn { heads: 4, kv_heads: 2, window, affine, softcap };
                        let phi = input("randn", &[2, time, 8, 6], 2).abs().unwrap();
                        let x = [input(kind, &[2, time, 8, 8], 1), phi, input("randn", &[4], 3)];
                        visit(&format!("{kind}, {time}, {window:?}, affine {affine}, {softcap:?}"), op, x);
                    }
                }
            }
        }
    }

    #[test]
    fn fast_equals_plain() {
        // Without a window no factor acts, and candle reports that as a zero gradient.
        cases(|what, op, x| check(what, &x, 5e-5, |x| op.forward(&x[0], &x[1], &x[2])));
    }

    /// The form of two ops in f32 against the definition in f64.
    #[test]
    fn branches_equal_plain() {
        cases(|what, op, x| {
            let Window::Sliding(size @ 1..) = op.window else { return };
            if x[0].dim(1).unwrap() < 64 {
                return;
            }
            check(what, &x, 5e-5, |x| match x[0].dtype() {
                DType::F64 => Ok(op.parallel(&x[0], &x[1], &x[2])?.0),
                _ => op.by_branches(size, &x[0], &x[1], &x[2]),
            });
        });
    }

    #[test]
    fn fused_loss_equals_plain() {
        cases(|what, op, [qkv, phi, factors]| {
            let target = input("randn", &[2, qkv.dim(1).unwrap(), 4, 8], 4);
            // ∂loss/∂y = y - target where values are near 1, times the features' size over theirs where they are large.
            let square = qkv.sqr().unwrap().mean_all().unwrap().to_scalar::<f64>().unwrap();
            let weight = 0.5 * target.elem_count() as f64 / square.max(1.0);
            // A factor's gradient sums over all rows what cancels in each to (v - y) / v, a thousandth for `ones`.
            check(what, &[phi, factors], 1e-4, |x| {
                let like = |t: &Tensor| t.to_dtype(x[0].dtype());
                op.mse(&like(&qkv)?, &x[0], &x[1], &like(&target)?, weight)
            })
        });
    }

    #[test]
    fn fused_loss_reaches_queries_and_keys() {
        let op = HybridAttn { heads: 4, kv_heads: 2, window: Window::Sliding(4), affine: false, softcap: None };
        let phi = input("randn", &[2, 20, 8, 6], 2).abs().unwrap();
        let x = [input("randn", &[2, 20, 8, 8], 1), phi, input("randn", &[4], 3)];
        let target = input("randn", &[2, 20, 4, 8], 4);
        check("mse", &x, 5e-5, |x| op.mse(&x[0], &x[1], &x[2], &target.to_dtype(x[0].dtype())?, 1000.0));
    }

    #[test]
    fn windows() {
        let span = |w: Window, i: usize| i + 1 - w.start(i);
        assert_eq!((0..6).map(|i| span(Window::Sliding(3), i)).collect::<Vec<_>>(), [1, 2, 3, 3, 3, 3]);
        assert_eq!((0..7).map(|i| span(Window::Terraced(2), i)).collect::<Vec<_>>(), [1, 2, 3, 4, 3, 4, 3]);
        assert_eq!(span(Window::Sliding(0), 9), 0);
    }
}
