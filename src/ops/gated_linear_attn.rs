//! Gated linear attention: a state that decays before every key joins it (GLA, arXiv 2312.06635).
//!
//! ```text
//! S_t = exp(g_t) S_{t-1} + k_t v_tᵀ              y_t = scale · q_tᵀ S_t              g_t <= 0
//! ```
//!
//! With a gate per key channel it is GLA, HGRN2 and the second pass of GSA; with one per head RetNet, lightning attention,
//! simple GLA, SSD and Lizard's gated branch. With a gate per value channel (`S_t = S_{t-1} exp(g_t) + k_t v_tᵀ`) it is the
//! first pass of GSA.
//!
//! Shapes: `q`, `k` [B, T, H, K], `v` [B, T, H, V], result [B, T, H, V]; `gates` are natural logarithms, [B, T, H, K] (or V)
//! per channel, [B, T, H] per head or `[H]` constant; states [B, H, K, V] in f32 or wider. Packed sequences have B = 1 and
//! their bounds, and one state each.
//!
//! Chunkwise, with G the sums of the gates inside a chunk and S the state before it:
//!
//! ```text
//! y_i = scale · (q_i e^{G_i})ᵀ S + Σ_{j<=i} A_ij v_j        A_ij = scale · Σ_d q_i[d] k_j[d] e^{G_i[d] - G_j[d]}
//! S  <- e^{G_C} S + Σ_j (k_j e^{G_C - G_j}) v_jᵀ
//! ∂g_t = Σ_{i>=t} (q_i ⊙ ∂q_i - k_i ⊙ ∂k_i) over all later rows
//! ```
//!
//! Every exponent that is formed is a difference that cannot be positive. With gates per channel the fast forms split
//! pairs by the highest bit h in which the rows' places differ: row i is in the upper half of a block of 2h, key j in its
//! lower half, and with a the last row of the lower half `e^{G_i - G_j} = e^{G_i - G_a} e^{G_a - G_j}`. So each of six
//! levels is a plain product of one scaled copy of the rows with itself. Gates below [`LOWEST`] count as that.
//!
//! Gates per value channel need no code of their own: with `A` for `q_i`, `k_j` and their decay the sum
//! `Σ A_ij (v_j·y_i)` gives the result above as its derivative by y, and by q the form with gated values, where y, v, k
//! stand for queries, keys and values. So that result is a ∂q, and its gradients are a result and the other gradients.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{self, Mat, MatMut, Shared, gemm};

/// Smallest gate: its exponential is 0 in f32, and sums of a chunk of such gates keep their precision.
pub const LOWEST: f64 = -128.0;

/// Rows per chunk of the fast forms.
const CHUNK: usize = 64;

/// The channels that gates per channel belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channels {
    Keys,
    Values,
}

/// The op's constants.
#[derive(Debug, Clone, Copy)]
pub struct GatedLinearAttn {
    pub scale: f64,
    /// Which side of the state decays, with gates per channel.
    pub gated: Channels,
}

impl GatedLinearAttn {
    /// Whole sequences: the result, and the state after the last position (outside the graph). All five tensors get
    /// gradients.
    pub fn forward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        gates: &Tensor,
        initial: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        self.run(q, k, v, gates, initial, None)
    }

    /// Sequences packed into one row (B = 1): sequence n is `bounds[n]..bounds[n + 1]` and has its own state.
    pub fn forward_packed(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        gates: &Tensor,
        initial: Option<&Tensor>,
        bounds: &[usize],
    ) -> Result<(Tensor, Tensor)> {
        let (batch, time, ..) = q.dims4()?;
        if batch != 1 || bounds.len() < 2 || bounds[0] != 0 || bounds[bounds.len() - 1] != time || !bounds.is_sorted() {
            bail!("bounds {bounds:?} do not split one row of {time} positions (batch {batch})")
        }
        self.run(q, k, v, gates, initial, Some(bounds))
    }

    fn run(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        gates: &Tensor,
        initial: Option<&Tensor>,
        bounds: Option<&[usize]>,
    ) -> Result<(Tensor, Tensor)> {
        let (b, t, h, key_dim) = q.dims4()?;
        let value_dim = v.dim(D::Minus1)?;
        let states = bounds.map_or(b, |b| b.len() - 1);
        let per_channel = gates.rank() == 4;
        let gates = if gates.rank() == 1 { gates.reshape((1, 1, h))?.broadcast_as((b, t, h))? } else { gates.clone() };
        let channels = if self.gated == Channels::Keys { key_dim } else { value_dim };
        let wanted = if per_channel { vec![b, t, h, channels] } else { vec![b, t, h] };
        if k.dims() != q.dims() || v.dims() != [b, t, h, value_dim] || gates.dims() != wanted {
            bail!(
                "gated attention of queries {:?} got keys {:?}, values {:?}, gates {:?}",
                q.dims(),
                k.dims(),
                v.dims(),
                gates.dims()
            )
        }
        if let Some(s) = initial
            && s.dims() != [states, h, key_dim, value_dim]
        {
            bail!("gated attention needs states [{states}, {h}, {key_dim}, {value_dim}], got {:?}", s.dims())
        }
        #[cfg(feature = "cuda")]
        if gpu::ready(self, q, v, &gates) {
            return gpu::forward(self, q, k, v, &gates, initial, bounds);
        }
        if super::fast(q) {
            return self.on_cpu(q, k, v, &gates, initial, bounds);
        }
        let Some(bounds) = bounds else { return self.chunked(q, k, v, &gates, initial) };
        let (mut results, mut finals) = (Vec::new(), Vec::new());
        for n in 0..states {
            let (from, count) = (bounds[n], bounds[n + 1] - bounds[n]);
            let part = |x: &Tensor| x.narrow(1, from, count);
            let initial = initial.map(|s| s.narrow(0, n, 1)).transpose()?;
            let (y, last) = self.chunked(&part(q)?, &part(k)?, &part(v)?, &part(&gates)?, initial.as_ref())?;
            results.push(y);
            finals.push(last);
        }
        Ok((Tensor::cat(&results, 1)?, Tensor::cat(&finals, 0)?))
    }

    /// One token: q, k [B, H, K], v [B, H, V], gates [B, H, K] (or V), [B, H] or `[H]`, state [B, H, K, V]; the result
    /// [B, H, V] and the next state.
    pub fn step(&self, q: &Tensor, k: &Tensor, v: &Tensor, gates: &Tensor, state: &Tensor) -> Result<(Tensor, Tensor)> {
        let wide = |x: &Tensor| x.to_dtype(state.dtype());
        let decay = wide(gates)?.maximum(LOWEST)?.exp()?;
        let decay = match gates.rank() {
            3 if self.gated == Channels::Values => decay.unsqueeze(2)?,
            3 => decay.unsqueeze(3)?,
            2 => decay.unsqueeze(2)?.unsqueeze(3)?,
            _ => decay.reshape((1, (), 1, 1))?,
        };
        let write = wide(k)?.unsqueeze(3)?.broadcast_mul(&wide(v)?.unsqueeze(2)?)?;
        let state = (state.broadcast_mul(&decay)? + write)?;
        let y = (wide(q)?.unsqueeze(2)?.contiguous()?.matmul(&state)? * self.scale)?;
        Ok((y.squeeze(2)?.to_dtype(v.dtype())?, state))
    }

    /// The definition, token by token.
    pub fn recurrent(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        gates: &Tensor,
        initial: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        let mut state = self.first_state(q, v, initial)?;
        let mut rows = Vec::new();
        for t in 0..q.dim(1)? {
            let at = |x: &Tensor| x.narrow(1, t, 1)?.squeeze(1);
            let gate = if gates.rank() == 1 { gates.clone() } else { at(gates)? };
            let (y, next) = self.step(&at(q)?, &at(k)?, &at(v)?, &gate, &state)?;
            rows.push(y);
            state = next;
        }
        Ok((Tensor::stack(&rows, 1)?, state))
    }

    /// The chunkwise form in plain tensor operations, exponents pair by pair, in f32 or wider.
    pub fn chunked(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        gates: &Tensor,
        initial: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        let (_, time, ..) = q.dims4()?;
        let (dtype, per_channel) = (super::wide(q.dtype()), gates.rank() == 4);
        let mut state = self.first_state(q, v, initial)?;
        let by_head = |x: &Tensor| x.to_dtype(dtype)?.transpose(1, 2)?.contiguous();
        let (q, k, values) = ((by_head(q)? * self.scale)?, by_head(k)?, by_head(v)?);
        let gates = by_head(gates)?.maximum(LOWEST)?;
        let gates = if per_channel { gates } else { gates.unsqueeze(3)? };
        // With gates per channel a chunk holds [B, H, rows, rows, K] exponentials.
        let chunk = if per_channel { 16 } else { CHUNK };
        let mut rows = Vec::new();
        for start in (0..time).step_by(chunk) {
            let n = chunk.min(time - start);
            let part = |x: &Tensor| x.narrow(2, start, n)?.contiguous();
            let (q, k, v) = (part(&q)?, part(&k)?, part(&values)?);
            let sums = part(&gates)?.cumsum(2)?; // [B, H, n, K or 1]
            let causal = Tensor::tril2(n, dtype, q.device())?;
            let outside = ((&causal - 1.0)? * 1e30)?;
            let last = sums.narrow(2, n - 1, 1)?;
            let (decay, rest) = (sums.exp()?, last.broadcast_sub(&sums)?.exp()?);
            let gaps = if per_channel {
                let gaps = sums.unsqueeze(3)?.broadcast_sub(&sums.unsqueeze(2)?)?; // [B, H, n, n, channels]
                gaps.broadcast_add(&outside.unsqueeze(2)?)?.exp()?
            } else {
                sums.broadcast_sub(&sums.transpose(2, 3)?)?.broadcast_add(&outside)?.exp()? // [B, H, n, n]
            };
            if per_channel && self.gated == Channels::Values {
                let weights = q.matmul(&k.t()?)?.unsqueeze(4)?;
                let inside = gaps.broadcast_mul(&weights)?.broadcast_mul(&v.unsqueeze(2)?)?.sum(3)?;
                rows.push((inside + (q.matmul(&state)? * decay)?)?);
                state = (state.broadcast_mul(&last.exp()?)? + k.t()?.matmul(&(v * rest)?)?)?;
                continue;
            }
            let weights = if per_channel {
                gaps.broadcast_mul(&q.unsqueeze(3)?)?.broadcast_mul(&k.unsqueeze(2)?)?.sum(D::Minus1)?
            } else {
                (q.matmul(&k.t()?)? * gaps)?
            };
            rows.push((weights.matmul(&v)? + q.broadcast_mul(&decay)?.matmul(&state)?)?);
            let keys = k.broadcast_mul(&rest)?.t()?;
            state = (state.broadcast_mul(&last.exp()?.transpose(2, 3)?)? + keys.matmul(&v)?)?;
        }
        if rows.is_empty() {
            return Ok((v.clone(), state));
        }
        Ok((Tensor::cat(&rows, 2)?.transpose(1, 2)?.contiguous()?.to_dtype(v.dtype())?, state))
    }

    fn first_state(&self, q: &Tensor, v: &Tensor, initial: Option<&Tensor>) -> Result<Tensor> {
        let dtype = super::wide(q.dtype());
        match initial {
            Some(state) => state.to_dtype(dtype)?.contiguous(),
            None => Tensor::zeros((q.dim(0)?, q.dim(2)?, q.dim(3)?, v.dim(3)?), dtype, q.device()),
        }
    }

    /// The fast form in f32.
    fn on_cpu(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        gates: &Tensor,
        initial: Option<&Tensor>,
        bounds: Option<&[usize]>,
    ) -> Result<(Tensor, Tensor)> {
        let (b, t, heads, key_dim) = q.dims4()?;
        let spans = match bounds {
            Some(bounds) => bounds.windows(2).map(|w| (w[0], w[1])).collect(),
            None => (0..b).map(|n| (n * t, (n + 1) * t)).collect::<Vec<_>>(),
        };
        let swapped = gates.rank() == 4 && self.gated == Channels::Values;
        let initial = match initial {
            Some(state) if swapped => state.t()?.contiguous()?,
            Some(state) => state.contiguous()?,
            None => {
                let (rows, columns) = if swapped { (v.dim(3)?, key_dim) } else { (key_dim, v.dim(3)?) };
                Tensor::zeros((spans.len(), heads, rows, columns), DType::F32, q.device())?
            }
        };
        let call = Arc::new(Call {
            q: q.contiguous()?,
            k: k.contiguous()?,
            v: v.contiguous()?,
            gates: gates.to_dtype(DType::F32)?.contiguous()?,
            initial,
            spans,
            scale: self.scale as f32,
            swapped,
        });
        let (y, last) = call.forward()?;

        // Ops have at most three inputs. The result hangs on the gates, the state and a stand-in for queries, keys and
        // values; their gradients, found together with the others, wait for the stand-in's turn.
        let found = Arc::new(Mutex::new(None));
        let theirs = found.clone();
        let stand_in =
            Known::new(vec![0.0], 1, move |_: &Tensor| match theirs.lock().ok().and_then(|mut f| f.take()) {
                Some(grads) => Ok(grads),
                None => bail!("gated attention has no gradients to give"),
            });
        let stand_in = call.q.apply_op3(&call.k, &call.v, stand_in)?;
        let kept = call.clone();
        let node = Known::new(y, call.v.shape().clone(), move |grad: &Tensor| {
            let grads = kept.backward(grad)?;
            let of = |data, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device());
            if let Ok(mut found) = found.lock() {
                *found = Some([of(grads.q, &kept.q)?, of(grads.k, &kept.k)?, of(grads.v, &kept.v)?]);
            }
            let nothing = Tensor::zeros(1, DType::F32, grad.device())?;
            Ok([nothing, of(grads.gates, &kept.gates)?, of(grads.initial, &kept.initial)?])
        });
        let y = stand_in.apply_op3(&call.gates, &call.initial, node)?;
        let last = Tensor::from_vec(last, call.initial.shape(), q.device())?;
        Ok((y, if swapped { last.t()? } else { last }))
    }
}

/// An op whose result was computed before.
struct Known<F> {
    result: Mutex<Option<Vec<f32>>>,
    shape: Shape,
    backward: F,
}

impl<F: Fn(&Tensor) -> Result<[Tensor; 3]>> Known<F> {
    fn new(result: Vec<f32>, shape: impl Into<Shape>, backward: F) -> Self {
        Known { result: Mutex::new(Some(result)), shape: shape.into(), backward }
    }
}

impl<F: Fn(&Tensor) -> Result<[Tensor; 3]> + Send + Sync> CustomOp3 for Known<F> {
    fn name(&self) -> &'static str {
        "gated_linear_attn"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        match self.result.lock().ok().and_then(|mut r| r.take()) {
            Some(result) => Ok((CpuStorage::F32(result), self.shape.clone())),
            None => bail!("the result of gated attention was taken twice"),
        }
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [x, y, z] = (self.backward)(&grad.contiguous()?)?;
        Ok((Some(x), Some(y), Some(z)))
    }
}

/// The tensors of one call, contiguous, and the bounds of its sequences in rows of all batches.
struct Call {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    initial: Tensor,
    spans: Vec<(usize, usize)>,
    scale: f32,
    /// The values' channels are gated: `v` and `k` change places, the states are transposed.
    swapped: bool,
}

impl Call {
    fn core<R>(&self, q: &Tensor, k: &Tensor, v: &Tensor, f: impl FnOnce(&Core) -> R) -> Result<R> {
        let (_, _, heads, key_dim) = k.dims4()?;
        let (value_dim, per_channel) = (v.dim(3)?, self.gates.rank() == 4);
        cpu::with(q, |q| {
            cpu::with(k, |k| {
                cpu::with(v, |v| {
                    cpu::with(&self.gates, |gates| {
                        cpu::with(&self.initial, |initial| {
                            let (spans, scale) = (&self.spans, self.scale);
                            Ok(f(&Core {
                                q,
                                k,
                                v,
                                gates,
                                initial,
                                spans,
                                heads,
                                key_dim,
                                value_dim,
                                per_channel,
                                scale,
                            }))
                        })
                    })
                })
            })
        })
    }

    /// The result and the last states.
    fn forward(&self) -> Result<(Vec<f32>, Vec<f32>)> {
        if !self.swapped {
            return self.core(&self.q, &self.k, &self.v, |core| core.forward());
        }
        // What stands for q does not matter: ∂q and the states do not depend on it.
        self.core(&self.v, &self.v, &self.k, |core| cpu::with(&self.q, |q| Ok((core.backward(q).q, core.forward().1))))?
    }

    fn backward(&self, grad: &Tensor) -> Result<Grads> {
        if !self.swapped {
            return self.core(&self.q, &self.k, &self.v, |core| cpu::with(grad, |dy| Ok(core.backward(dy))))?;
        }
        self.core(grad, &self.v, &self.k, |core| {
            let found = cpu::with(&self.q, |q| Ok(core.backward(q)))?;
            Ok(Grads { q: core.forward().0, k: found.v, v: found.k, ..found })
        })?
    }
}

struct Core<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    gates: &'a [f32],
    initial: &'a [f32],
    spans: &'a [(usize, usize)],
    heads: usize,
    key_dim: usize,
    value_dim: usize,
    per_channel: bool,
    scale: f32,
}

/// Gradients, laid out like their tensors.
struct Grads {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    gates: Vec<f32>,
    initial: Vec<f32>,
}

struct GradBuffers<'a> {
    q: Shared<'a>,
    k: Shared<'a>,
    v: Shared<'a>,
    gates: Shared<'a>,
    initial: Shared<'a>,
}

/// What one head's pass over a chunk of `n` rows needs again and again.
struct Scratch {
    sums: Vec<f64>, // [n, K], with one gate per head the same in every channel; differences of large sums are exact
    scaled: Vec<f32>, // [n, K]
    weights: Vec<f32>, // [n, CHUNK]: A
    dweights: Vec<f32>, // [n, CHUNK]: ∂A / scale
    dq: Vec<f32>,   // [n, K]
    dk: Vec<f32>,   // [n, K]
    product: Vec<f32>, // [n, K]
    flow: Vec<f32>, // [n, K]: q ∂q - k ∂k without the pairs i = j
    tail: Vec<f32>, // [K]: the same over all later rows
}

impl Scratch {
    fn new(key_dim: usize) -> Self {
        let rows = || vec![0f32; CHUNK * key_dim];
        Scratch {
            sums: vec![0f64; CHUNK * key_dim],
            scaled: rows(),
            weights: vec![0f32; CHUNK * CHUNK],
            dweights: vec![0f32; CHUNK * CHUNK],
            dq: rows(),
            dk: rows(),
            product: rows(),
            flow: rows(),
            tail: vec![0f32; key_dim],
        }
    }
}

/// The levels of a chunk and the blocks of each: (h, first row of the lower half, rows of the upper half).
fn blocks(n: usize) -> impl Iterator<Item = (usize, Vec<(usize, usize)>)> {
    [32, 16, 8, 4, 2, 1].into_iter().map(move |h| {
        let starts = (0..n).step_by(2 * h).filter(move |start| start + h < n);
        (h, starts.map(|start| (start, h.min(n - start - h))).collect())
    })
}

impl Core<'_> {
    fn rows<'a>(&self, data: &'a [f32], dim: usize, head: usize, from: usize, n: usize) -> Mat {
        Mat::new(data, (from * self.heads + head) * dim, n, dim, self.heads * dim)
    }

    fn row<'a>(&self, data: &'a [f32], dim: usize, head: usize, t: usize) -> &'a [f32] {
        &data[(t * self.heads + head) * dim..][..dim]
    }

    /// G of rows `from..from + n`.
    fn sum_gates(&self, s: &mut Scratch, head: usize, from: usize, n: usize) {
        let dim = self.key_dim;
        for i in 0..n {
            let (before, row) = s.sums.split_at_mut(i * dim);
            let before = &before[before.len().saturating_sub(dim)..];
            let width = if self.per_channel { dim } else { 1 };
            let gates = self.row(self.gates, width, head, from + i);
            for (d, sum) in row[..dim].iter_mut().enumerate() {
                let gate = gates[if self.per_channel { d } else { 0 }].max(LOWEST as f32);
                *sum = gate as f64 + if i > 0 { before[d] } else { 0.0 };
            }
        }
    }

    /// Rows scaled by e^{-|G - G_anchor|}: keys in lower halves, queries in upper halves.
    fn fill(&self, s: &mut Scratch, head: usize, from: usize, h: usize, start: usize, n: usize) {
        let dim = self.key_dim;
        let anchor = &s.sums[(start + h - 1) * dim..][..dim];
        for i in start..start + h + n {
            let x = self.row(if i & h == 0 { self.k } else { self.q }, dim, head, from + i);
            let own = &s.sums[i * dim..][..dim];
            for (((to, x), own), anchor) in s.scaled[i * dim..][..dim].iter_mut().zip(x).zip(own).zip(anchor) {
                *to = x * cpu::exp(-(own - anchor).abs() as f32);
            }
        }
    }

    /// `s.scaled` = x e^{G} or x e^{G_n - G}.
    fn scale_rows(&self, s: &mut Scratch, x: &[f32], head: usize, from: usize, n: usize, to_end: bool, by: f32) {
        let dim = self.key_dim;
        let last = &s.sums[(n - 1) * dim..][..dim];
        cpu::vectorised(
            #[inline(always)]
            || {
                for i in 0..n {
                    let (x, own) = (self.row(x, dim, head, from + i), &s.sums[i * dim..][..dim]);
                    for (((to, x), own), last) in s.scaled[i * dim..][..dim].iter_mut().zip(x).zip(own).zip(last) {
                        *to = by * x * cpu::exp(if to_end { last - own } else { *own } as f32);
                    }
                }
            },
        );
    }

    /// A into `s.weights`.
    fn weigh(&self, s: &mut Scratch, head: usize, from: usize, n: usize) {
        let dim = self.key_dim;
        let (q, k) = (self.rows(self.q, dim, head, from, n), self.rows(self.k, dim, head, from, n));
        if !self.per_channel {
            gemm(MatMut::new(&mut s.weights, 0, n, n, CHUNK), false, self.scale, q, k.t());
            self.decay_weights(&mut s.weights, &s.sums, n);
            return;
        }
        s.weights.fill(0.0);
        for i in 0..n {
            let t = from + i;
            s.weights[i * CHUNK + i] =
                self.scale * cpu::dot(self.row(self.q, dim, head, t), self.row(self.k, dim, head, t));
        }
        for (h, blocks) in blocks(n) {
            for (start, upper) in blocks {
                cpu::vectorised(
                    #[inline(always)]
                    || self.fill(s, head, from, h, start, upper),
                );
                let rows = |at: usize, n: usize| Mat::new(&s.scaled, at * dim, n, dim, dim);
                if h >= 8 {
                    let out = MatMut::new(&mut s.weights, (start + h) * CHUNK + start, upper, h, CHUNK);
                    gemm(out, false, self.scale, rows(start + h, upper), rows(start, h).t());
                    continue;
                }
                for i in start + h..start + h + upper {
                    for j in start..start + h {
                        let (x, y) = (&s.scaled[i * dim..][..dim], &s.scaled[j * dim..][..dim]);
                        s.weights[i * CHUNK + j] = self.scale * cpu::dot(x, y);
                    }
                }
            }
        }
    }

    /// Multiplies by e^{G_i - G_j} with one gate per head, and clears what lies above the diagonal.
    fn decay_weights(&self, weights: &mut [f32], sums: &[f64], n: usize) {
        let dim = self.key_dim;
        cpu::vectorised(
            #[inline(always)]
            || {
                for i in 0..n {
                    let row = &mut weights[i * CHUNK..(i + 1) * CHUNK];
                    for (j, w) in row[..=i].iter_mut().enumerate() {
                        *w *= cpu::exp((sums[i * dim] - sums[j * dim]) as f32);
                    }
                    row[i + 1..].fill(0.0);
                }
            },
        );
    }

    /// state = e^{G_n} state + (x e^..)ᵀ y, the scaled rows being in `s.scaled`.
    fn advance(&self, state: &mut [f32], s: &Scratch, y: Mat, n: usize) {
        let (dim, width) = (self.key_dim, self.value_dim);
        for (row, sum) in state.chunks_mut(width).zip(&s.sums[(n - 1) * dim..]) {
            let decay = cpu::exp(*sum as f32);
            row.iter_mut().for_each(|x| *x *= decay);
        }
        let x = Mat::new(&s.scaled, 0, n, dim, dim);
        gemm(MatMut::new(state, 0, dim, width, width), true, 1.0, x.t(), y);
    }

    fn tasks(&self) -> impl IndexedParallelIterator<Item = (usize, usize)> {
        let heads = self.heads;
        (0..self.spans.len() * heads).into_par_iter().map(move |task| (task / heads, task % heads))
    }

    /// y, and the states after the last rows.
    fn forward(&self) -> (Vec<f32>, Vec<f32>) {
        let (dim, width) = (self.key_dim, self.value_dim);
        let (mut y, mut last) = (vec![0f32; self.v.len()], self.initial.to_vec());
        let (out, states) = (Shared::new(&mut y), Shared::new(&mut last));
        self.tasks().for_each_init(
            || Scratch::new(dim),
            |s, (n, head)| {
                // SAFETY: one state per task.
                let state = unsafe { states.row((n * self.heads + head) * dim * width, dim * width) };
                for from in (self.spans[n].0..self.spans[n].1).step_by(CHUNK) {
                    let rows = CHUNK.min(self.spans[n].1 - from);
                    let v = self.rows(self.v, width, head, from, rows);
                    self.sum_gates(s, head, from, rows);
                    self.weigh(s, head, from, rows);
                    // SAFETY: rows of a span and head belong to this task alone.
                    let out =
                        || unsafe { out.mat((from * self.heads + head) * width, rows, width, self.heads * width) };
                    gemm(out(), false, 1.0, Mat::new(&s.weights, 0, rows, rows, CHUNK), v);
                    self.scale_rows(s, self.q, head, from, rows, false, self.scale);
                    let before = Mat::new(state, 0, dim, width, width);
                    gemm(out(), true, 1.0, Mat::new(&s.scaled, 0, rows, dim, dim), before);
                    self.scale_rows(s, self.k, head, from, rows, true, 1.0);
                    self.advance(state, s, v, rows);
                }
            },
        );
        (y, last)
    }

    fn backward(&self, dy: &[f32]) -> Grads {
        let like = |x: &[f32]| vec![0f32; x.len()];
        let mut grads = Grads {
            q: like(self.q),
            k: like(self.k),
            v: like(self.v),
            gates: like(self.gates),
            initial: like(self.initial),
        };
        let out = GradBuffers {
            q: Shared::new(&mut grads.q),
            k: Shared::new(&mut grads.k),
            v: Shared::new(&mut grads.v),
            gates: Shared::new(&mut grads.gates),
            initial: Shared::new(&mut grads.initial),
        };
        let tasks = self.tasks();
        tasks.for_each_init(|| Scratch::new(self.key_dim), |s, (n, head)| self.backward_head(n, head, dy, &out, s));
        grads
    }

    fn backward_head(&self, n: usize, head: usize, dy: &[f32], out: &GradBuffers, s: &mut Scratch) {
        let (dim, width) = (self.key_dim, self.value_dim);
        let size = dim * width;
        let at = (n * self.heads + head) * size;
        let starts: Vec<usize> = (self.spans[n].0..self.spans[n].1).step_by(CHUNK).collect();
        let rows_of = |from: usize| CHUNK.min(self.spans[n].1 - from);

        // States before each chunk.
        let mut states = self.initial[at..at + size].to_vec();
        for &from in &starts[..starts.len().saturating_sub(1)] {
            let mut state = states[states.len() - size..].to_vec();
            self.sum_gates(s, head, from, CHUNK);
            self.scale_rows(s, self.k, head, from, CHUNK, true, 1.0);
            self.advance(&mut state, s, self.rows(self.v, width, head, from, CHUNK), CHUNK);
            states.extend_from_slice(&state);
        }
        // SAFETY: one state per task.
        let dstate = unsafe { out.initial.row(at, size) };

        for (c, &from) in starts.iter().enumerate().rev() {
            let (state, rows) = (&states[c * size..(c + 1) * size], rows_of(from));
            let (before, after) = (Mat::new(state, 0, dim, width, width), Mat::new(dstate, 0, dim, width, width));
            let (dy_rows, v) = (self.rows(dy, width, head, from, rows), self.rows(self.v, width, head, from, rows));
            self.sum_gates(s, head, from, rows);
            self.weigh(s, head, from, rows);

            // ∂v
            // SAFETY (here and below): rows of a span and head belong to this task alone.
            let dv = || unsafe { out.v.mat((from * self.heads + head) * width, rows, width, self.heads * width) };
            gemm(dv(), false, 1.0, Mat::new(&s.weights, 0, rows, rows, CHUNK).t(), dy_rows);
            self.scale_rows(s, self.k, head, from, rows, true, 1.0);
            gemm(dv(), true, 1.0, Mat::new(&s.scaled, 0, rows, dim, dim), after);

            // ∂q and ∂k through the states
            gemm(MatMut::new(&mut s.dq, 0, rows, dim, dim), false, self.scale, dy_rows, before.t());
            gemm(MatMut::new(&mut s.dk, 0, rows, dim, dim), false, 1.0, v, after.t());
            self.through_states(s, state, dstate, head, from, rows);

            // and inside the chunk
            gemm(MatMut::new(&mut s.dweights, 0, rows, rows, CHUNK), false, 1.0, dy_rows, v.t());
            if self.per_channel {
                self.levels(s, head, from, rows);
                self.flow(s, head, from, rows);
                for i in 0..rows {
                    let same = self.scale * s.dweights[i * CHUNK + i];
                    let (q, k) = (self.row(self.q, dim, head, from + i), self.row(self.k, dim, head, from + i));
                    for d in 0..dim {
                        s.dq[i * dim + d] += same * k[d];
                        s.dk[i * dim + d] += same * q[d];
                    }
                }
            } else {
                self.flow(s, head, from, rows);
                // The pair of row i and key j moves every gate between them.
                for i in 0..rows {
                    for j in 0..i {
                        let moved = s.weights[i * CHUNK + j] * s.dweights[i * CHUNK + j];
                        s.flow[i * dim] += moved;
                        s.flow[j * dim] -= moved;
                    }
                }
                self.decay_weights(&mut s.dweights, &s.sums, rows);
                let d = Mat::new(&s.dweights, 0, rows, rows, CHUNK);
                let (q, k) = (self.rows(self.q, dim, head, from, rows), self.rows(self.k, dim, head, from, rows));
                gemm(MatMut::new(&mut s.dq, 0, rows, dim, dim), true, self.scale, d, k);
                gemm(MatMut::new(&mut s.dk, 0, rows, dim, dim), true, self.scale, d.t(), q);
            }
            for i in (0..rows).rev() {
                let place = ((from + i) * self.heads + head) * dim;
                // SAFETY: as above.
                let (dq, dk) = unsafe { (out.q.row(place, dim), out.k.row(place, dim)) };
                dq.copy_from_slice(&s.dq[i * dim..][..dim]);
                dk.copy_from_slice(&s.dk[i * dim..][..dim]);
                let gates = if self.per_channel { dim } else { 1 };
                // SAFETY: as above.
                let dg = unsafe { out.gates.row(((from + i) * self.heads + head) * gates, gates) };
                for (d, dg) in dg.iter_mut().enumerate() {
                    s.tail[d] += s.flow[i * dim + d];
                    *dg = s.tail[d];
                }
            }
            self.scale_rows(s, self.q, head, from, rows, false, self.scale);
            self.advance(dstate, s, dy_rows, rows);
        }
    }

    /// Decays ∂q and ∂k of the states' part; `s.tail` becomes what later rows and the state move the gates by.
    fn through_states(&self, s: &mut Scratch, state: &[f32], dstate: &[f32], head: usize, from: usize, rows: usize) {
        let (dim, width) = (self.key_dim, self.value_dim);
        cpu::vectorised(
            #[inline(always)]
            || {
                let last = &s.sums[(rows - 1) * dim..][..dim];
                for d in 0..dim {
                    let (x, y) = (&state[d * width..][..width], &dstate[d * width..][..width]);
                    s.tail[d] = cpu::exp(last[d] as f32) * cpu::dot(x, y);
                }
                for i in 0..rows {
                    let k = self.row(self.k, dim, head, from + i);
                    let own = &s.sums[i * dim..][..dim];
                    let (dq, dk) = (&mut s.dq[i * dim..][..dim], &mut s.dk[i * dim..][..dim]);
                    for d in 0..dim {
                        dq[d] *= cpu::exp(own[d] as f32);
                        dk[d] *= cpu::exp((last[d] - own[d]) as f32);
                        s.tail[d] += k[d] * dk[d];
                    }
                }
            },
        );
        if !self.per_channel {
            s.tail[0] = cpu::sum(&s.tail);
        }
    }

    /// `s.flow` = q ∂q - k ∂k as they stand; with one gate per head its sum over channels, in channel 0.
    fn flow(&self, s: &mut Scratch, head: usize, from: usize, rows: usize) {
        let dim = self.key_dim;
        for i in 0..rows {
            let (q, k) = (self.row(self.q, dim, head, from + i), self.row(self.k, dim, head, from + i));
            let (dq, dk) = (&s.dq[i * dim..][..dim], &s.dk[i * dim..][..dim]);
            let flow = &mut s.flow[i * dim..][..dim];
            if self.per_channel {
                for d in 0..dim {
                    flow[d] = q[d] * dq[d] - k[d] * dk[d];
                }
            } else {
                flow[0] = cpu::dot(q, dq) - cpu::dot(k, dk);
            }
        }
    }

    /// ∂q and ∂k of all pairs of different rows, level by level.
    fn levels(&self, s: &mut Scratch, head: usize, from: usize, rows: usize) {
        let dim = self.key_dim;
        for (h, blocks) in blocks(rows) {
            for (start, upper) in blocks {
                cpu::vectorised(
                    #[inline(always)]
                    || self.fill(s, head, from, h, start, upper),
                );
                let d = Mat::new(&s.dweights, (start + h) * CHUNK + start, upper, h, CHUNK);
                let scaled = |at: usize, n: usize| Mat::new(&s.scaled, at * dim, n, dim, dim);
                let product = &mut s.product;
                let scale = self.scale;
                gemm(MatMut::new(product, (start + h) * dim, upper, dim, dim), false, scale, d, scaled(start, h));
                gemm(MatMut::new(product, start * dim, h, dim, dim), false, scale, d.t(), scaled(start + h, upper));
                let anchor = &s.sums[(start + h - 1) * dim..][..dim];
                let (product, sums) = (&s.product, &s.sums);
                let (dq, dk) = (&mut s.dq, &mut s.dk);
                cpu::vectorised(
                    #[inline(always)]
                    || {
                        for i in start..start + h + upper {
                            let to = if i & h == 0 { &mut dk[i * dim..][..dim] } else { &mut dq[i * dim..][..dim] };
                            let (x, own) = (&product[i * dim..][..dim], &sums[i * dim..][..dim]);
                            for (((to, x), own), anchor) in to.iter_mut().zip(x).zip(own).zip(anchor) {
                                *to += x * cpu::exp(-(own - anchor).abs() as f32);
                            }
                        }
                    },
                );
            }
        }
    }
}

/// The CUDA form (`kernels/gated_linear_attn.cu`): bf16, tensor cores.
#[cfg(feature = "cuda")]
mod gpu {
    use std::ffi::{c_int, c_longlong, c_void};

    use super::super::cuda::{self, Output, device_of, launch, pointer};
    use super::*;

    unsafe extern "C" {
        fn margay_gated_linear_attn_fits(key_dim: c_int, value_dim: c_int, gates_on: c_int) -> c_int;
        fn margay_gated_linear_attn_scratch(
            sequences: c_int,
            time: c_longlong,
            packed: c_int,
            heads: c_int,
            key_dim: c_int,
            value_dim: c_int,
            backward: c_int,
        ) -> usize;
        fn margay_gated_linear_attn_fwd(
            q: *const c_void,
            k: *const c_void,
            v: *const c_void,
            gates: *const c_void,
            initial: *const c_void,
            y: *mut c_void,
            last: *mut c_void,
            scratch: *mut c_void,
            starts: *const c_void,
            sequences: c_int,
            time: c_longlong,
            heads: c_int,
            key_dim: c_int,
            value_dim: c_int,
            gates_on: c_int,
            f32_gates: c_int,
            gate_stride: c_longlong,
            scale: f32,
            stream: *mut c_void,
        ) -> c_int;
        fn margay_gated_linear_attn_bwd(
            q: *const c_void,
            k: *const c_void,
            v: *const c_void,
            gates: *const c_void,
            initial: *const c_void,
            dy: *const c_void,
            dlast: *const c_void,
            dq: *mut c_void,
            dk: *mut c_void,
            dv: *mut c_void,
            dgates: *mut c_void,
            dinitial: *mut c_void,
            scratch: *mut c_void,
            starts: *const c_void,
            sequences: c_int,
            time: c_longlong,
            heads: c_int,
            key_dim: c_int,
            value_dim: c_int,
            gates_on: c_int,
            f32_gates: c_int,
            gate_stride: c_longlong,
            scale: f32,
            stream: *mut c_void,
        ) -> c_int;
    }

    /// Widest head the kernels hold.
    const WIDEST: usize = 128;

    pub fn ready(op: &GatedLinearAttn, q: &Tensor, v: &Tensor, gates: &Tensor) -> bool {
        let (Ok(key_dim), Ok(value_dim)) = (q.dim(D::Minus1), v.dim(D::Minus1)) else { return false };
        let (rows, columns) = op.sides(key_dim, value_dim, gates);
        let fits = key_dim <= WIDEST && value_dim <= WIDEST && q.dtype() == DType::BF16 && v.dtype() == DType::BF16;
        // SAFETY: reads attributes of the device.
        let shared = || unsafe { margay_gated_linear_attn_fits(rows as c_int, columns as c_int, op.gates_on(gates)) };
        fits && cuda::ready(q) && shared() != 0
    }

    impl GatedLinearAttn {
        /// How the kernels call the place of the gates.
        fn gates_on(&self, gates: &Tensor) -> c_int {
            match self.gated {
                _ if gates.rank() != 4 => 0,
                Channels::Keys => 1,
                Channels::Values => 2,
            }
        }

        /// The sides of a state, the gated one first.
        fn sides(&self, key_dim: usize, value_dim: usize, gates: &Tensor) -> (usize, usize) {
            if self.gates_on(gates) == 2 { (value_dim, key_dim) } else { (key_dim, value_dim) }
        }
    }

    /// Heads of other widths are filled up with zeros, which change nothing: keys of 0 write nothing and read nothing.
    pub fn forward(
        op: &GatedLinearAttn,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        gates: &Tensor,
        initial: Option<&Tensor>,
        bounds: Option<&[usize]>,
    ) -> Result<(Tensor, Tensor)> {
        let (key_dim, value_dim) = (q.dim(3)?, v.dim(3)?);
        let full = |n: usize| if n <= 64 { 64 } else { WIDEST };
        let (keys, values) = (full(key_dim), full(value_dim));
        if (keys, values) == (key_dim, value_dim) {
            return exact(op, q, k, v, gates, initial, bounds);
        }
        let wider = |x: &Tensor, dim: usize, to: usize| x.pad_with_zeros(dim, 0, to - x.dim(dim)?);
        let gates = match op.gates_on(gates) {
            0 => gates.clone(),
            1 => wider(gates, 3, keys)?,
            _ => wider(gates, 3, values)?,
        };
        let initial = initial.map(|s| wider(&wider(s, 2, keys)?, 3, values)).transpose()?;
        let (q, k, v) = (wider(q, 3, keys)?, wider(k, 3, keys)?, wider(v, 3, values)?);
        let (y, last) = exact(op, &q, &k, &v, &gates, initial.as_ref(), bounds)?;
        Ok((y.narrow(3, 0, value_dim)?, last.narrow(2, 0, key_dim)?.narrow(3, 0, value_dim)?))
    }

    /// One call's operands, kept for the backward pass.
    struct Run {
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        initial: Option<Tensor>,
        starts: Option<Tensor>,
        sequences: usize,
        time: usize,
        scale: f32,
        gates_on: c_int,
        gate_grad: bool,
    }

    fn exact(
        op: &GatedLinearAttn,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        gates: &Tensor,
        initial: Option<&Tensor>,
        bounds: Option<&[usize]>,
    ) -> Result<(Tensor, Tensor)> {
        let (b, t, ..) = q.dims4()?;
        let device = device_of(q)?;
        let gates = if gates.dtype() == DType::BF16 { gates.clone() } else { gates.to_dtype(DType::F32)? };
        let starts = match bounds {
            Some(bounds) => {
                let bounds: Vec<u32> = bounds.iter().map(|b| *b as u32).collect();
                Some(Tensor::new(bounds, q.device())?)
            }
            None => None,
        };
        let swapped = op.gates_on(&gates) == 2;
        let run = Arc::new(Run {
            q: q.contiguous()?,
            k: k.to_dtype(DType::BF16)?.contiguous()?,
            v: v.contiguous()?,
            gate_grad: gates.track_op(),
            gates: gates.contiguous()?,
            initial: match initial {
                Some(s) if swapped => Some(s.to_dtype(DType::F32)?.t()?.contiguous()?),
                Some(s) => Some(s.to_dtype(DType::F32)?.contiguous()?),
                None => None,
            },
            gates_on: op.gates_on(&gates),
            sequences: bounds.map_or(b, |b| b.len() - 1),
            starts,
            time: t,
            scale: op.scale as f32,
        });
        let (y, last) = run.forward()?;

        // As on the CPU: a stand-in carries the gradients of queries, keys and values.
        let found = Arc::new(Mutex::new(None));
        let theirs = found.clone();
        let stand_in = Output::new(device, 1, DType::F32)?.node(
            [&run.q, &run.k, &run.v],
            "gated_linear_attn",
            Box::new(move |_, _, _| match theirs.lock().ok().and_then(|mut f| f.take()) {
                Some(grads) => Ok(grads),
                None => bail!("gated attention has no gradients to give"),
            }),
        )?;
        let kept = run.clone();
        let backward = move |grad: &Tensor| -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
            let (inputs, gates, initial) = kept.backward(grad)?;
            if let Ok(mut found) = found.lock() {
                *found = Some(inputs);
            }
            Ok((Some(Tensor::zeros(1, DType::F32, grad.device())?), gates, initial))
        };
        let y = match &run.initial {
            None => y.node(
                [&stand_in, &run.gates],
                "gated_linear_attn",
                Box::new(move |_, _, grad| backward(grad).map(|(x, gates, _)| [x, gates])),
            )?,
            Some(initial) => y.node(
                [&stand_in, &run.gates, initial],
                "gated_linear_attn",
                Box::new(move |_, _, grad| backward(grad).map(|(x, gates, initial)| [x, gates, initial])),
            )?,
        };
        Ok((y, if swapped { last.t()? } else { last }))
    }

    type InputGrads = [Option<Tensor>; 3];

    impl Run {
        /// Heads, and the sides of a state, the gated one first.
        fn dims(&self) -> Result<(usize, usize, usize)> {
            let (h, k, v) = (self.q.dim(2)?, self.q.dim(3)?, self.v.dim(3)?);
            Ok(if self.gates_on == 2 { (h, v, k) } else { (h, k, v) })
        }

        fn scratch(&self, backward: bool) -> Result<Output> {
            let (h, k, v) = self.dims()?;
            let (sequences, packed) = (self.sequences as c_int, self.starts.is_some() as c_int);
            // SAFETY: plain arithmetic.
            let bytes = unsafe {
                margay_gated_linear_attn_scratch(
                    sequences,
                    self.time as c_longlong,
                    packed,
                    h as c_int,
                    k as c_int,
                    v as c_int,
                    backward as c_int,
                )
            };
            Output::scratch(device_of(&self.q)?, bytes)
        }

        fn gate_stride(&self) -> c_longlong {
            self.gates.dims()[2..].iter().product::<usize>() as c_longlong
        }

        fn optional(x: &Option<Tensor>) -> Result<*const c_void> {
            Ok(x.as_ref().map(pointer).transpose()?.unwrap_or(std::ptr::null()))
        }

        fn forward(&self) -> Result<(Output, Tensor)> {
            let ((h, k, v), device) = (self.dims()?, device_of(&self.q)?);
            let y = Output::new(device, self.v.shape(), DType::BF16)?;
            let last = Output::new(device, (self.sequences, h, k, v), DType::F32)?;
            let scratch = self.scratch(false)?;
            let (q_at, k_at, v_at, g_at) =
                (pointer(&self.q)?, pointer(&self.k)?, pointer(&self.v)?, pointer(&self.gates)?);
            let (initial, starts) = (Run::optional(&self.initial)?, Run::optional(&self.starts)?);
            let (out, last_at, scratch_at) = (y.pointer()?, last.pointer()?, scratch.pointer()?);
            // SAFETY: contiguous operands of the shapes checked in `run`; the scratch has the size asked for.
            launch(device, "gated_linear_attn", |stream| unsafe {
                margay_gated_linear_attn_fwd(
                    q_at,
                    k_at,
                    v_at,
                    g_at,
                    initial,
                    out,
                    last_at,
                    scratch_at,
                    starts,
                    self.sequences as c_int,
                    self.time as c_longlong,
                    h as c_int,
                    k as c_int,
                    v as c_int,
                    self.gates_on,
                    (self.gates.dtype() == DType::F32) as c_int,
                    self.gate_stride(),
                    self.scale,
                    stream,
                )
            })?;
            Ok((y, last.tensor()))
        }

        /// Gradients of queries, keys and values, of the gates, of the initial states.
        fn backward(&self, grad: &Tensor) -> Result<(InputGrads, Option<Tensor>, Option<Tensor>)> {
            let ((h, k, v), device) = (self.dims()?, device_of(&self.q)?);
            let grad = grad.to_dtype(DType::BF16)?.contiguous()?;
            let like = |x: &Tensor| Output::new(device, x.shape(), x.dtype());
            let (dq, dk, dv) = (like(&self.q)?, like(&self.k)?, like(&self.v)?);
            let dgates = if self.gate_grad { Some(like(&self.gates)?) } else { None };
            let dinitial = self.initial.as_ref().map(like).transpose()?;
            let scratch = self.scratch(true)?;
            let (q_at, k_at, v_at, g_at) =
                (pointer(&self.q)?, pointer(&self.k)?, pointer(&self.v)?, pointer(&self.gates)?);
            let (initial, starts) = (Run::optional(&self.initial)?, Run::optional(&self.starts)?);
            let address = |x: &Option<Output>| {
                Ok::<_, candle_core::Error>(match x {
                    Some(x) => x.pointer()?,
                    None => std::ptr::null_mut(),
                })
            };
            let (dy_at, dgates_at, dinitial_at) = (pointer(&grad)?, address(&dgates)?, address(&dinitial)?);
            let (dq_at, dk_at, dv_at, scratch_at) = (dq.pointer()?, dk.pointer()?, dv.pointer()?, scratch.pointer()?);
            // SAFETY: as in the forward pass; gradients have the shapes of their tensors.
            launch(device, "gated_linear_attn", |stream| unsafe {
                margay_gated_linear_attn_bwd(
                    q_at,
                    k_at,
                    v_at,
                    g_at,
                    initial,
                    dy_at,
                    std::ptr::null(),
                    dq_at,
                    dk_at,
                    dv_at,
                    dgates_at,
                    dinitial_at,
                    scratch_at,
                    starts,
                    self.sequences as c_int,
                    self.time as c_longlong,
                    h as c_int,
                    k as c_int,
                    v as c_int,
                    self.gates_on,
                    (self.gates.dtype() == DType::F32) as c_int,
                    self.gate_stride(),
                    self.scale,
                    stream,
                )
            })?;
            let inputs = [Some(dq.tensor()), Some(dk.tensor()), Some(dv.tensor())];
            Ok((inputs, dgates.map(Output::tensor), dinitial.map(Output::tensor)))
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::check::{INPUTS, check, input};
    use super::*;

    const KINDS: [&str; 5] = ["usual", "soft", "strong", "cut", "none"];

    /// Gates of the named kind, f64.
    fn gates(kind: &str, shape: &[usize]) -> Tensor {
        let x = input("randn", shape, 4);
        let usual = (x.neg().unwrap().exp().unwrap() + 1.0).unwrap().log().unwrap().neg().unwrap(); // log sigmoid
        match kind {
            "soft" => (usual / 16.0).unwrap(),
            "strong" => (usual.zeros_like().unwrap() - 20.0).unwrap(),
            // One in twenty forgets everything.
            "cut" => {
                let mut data = (usual / 16.0).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
                data.iter_mut().step_by(21).for_each(|g| *g = -1e4);
                Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
            }
            "none" => usual.zeros_like().unwrap(),
            _ => usual,
        }
    }

    fn inputs(kind: &str, gate_kind: &str, time: usize, place: (bool, Channels)) -> [Tensor; 5] {
        let (b, h, k, v) = (2, 3, 6, 5);
        let gates = match place {
            (false, _) => gates(gate_kind, &[b, time, h]),
            (_, Channels::Keys) => gates(gate_kind, &[b, time, h, k]),
            (_, Channels::Values) => gates(gate_kind, &[b, time, h, v]),
        };
        [
            input(kind, &[b, time, h, k], 1),
            input(kind, &[b, time, h, k], 2),
            input(kind, &[b, time, h, v], 3),
            gates,
            input("randn", &[b, h, k, v], 5),
        ]
    }

    const OP: GatedLinearAttn = GatedLinearAttn { scale: 0.4, gated: Channels::Keys };

    /// The places of gates: per head, per key channel, per value channel.
    const PLACES: [(bool, Channels); 3] = [(false, Channels::Keys), (true, Channels::Keys), (true, Channels::Values)];

    fn near(what: &str, x: &Tensor, wanted: &Tensor, tolerance: f64) {
        let flat = |x: &Tensor| x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        assert_eq!(x.dims(), wanted.dims(), "{what}");
        let wanted = flat(wanted);
        let scale = wanted.iter().fold(1e-9f64, |m, x| m.max(x.abs()));
        for (a, b) in flat(x).iter().zip(&wanted) {
            assert!((a - b).abs() <= tolerance * scale, "{what}: {a:e}, not {b:e} (scale {scale:e})");
        }
    }

    #[test]
    fn chunks_equal_recurrence() {
        for place in PLACES {
            let op = GatedLinearAttn { gated: place.1, ..OP };
            for kind in KINDS {
                for time in [1, 15, 16, 63, 64, 65, 130] {
                    let [q, k, v, g, s] = inputs("randn", kind, time, place);
                    let (wanted, last) = op.recurrent(&q, &k, &v, &g, Some(&s)).unwrap();
                    let (y, end) = op.chunked(&q, &k, &v, &g, Some(&s)).unwrap();
                    let what = format!("{kind}, {time}, {place:?}");
                    near(&what, &y, &wanted, 1e-12);
                    near(&what, &end, &last, 1e-12);
                    let f32s = [&q, &k, &v, &g, &s].map(|x| x.to_dtype(DType::F32).unwrap());
                    let [q, k, v, g, s] = &f32s;
                    let (y, end) = op.forward(q, k, v, g, Some(s)).unwrap();
                    near(&what, &y, &wanted, 3e-6);
                    near(&what, &end, &last, 3e-6);
                }
            }
        }
    }

    #[test]
    fn fast_equals_plain() {
        for place in PLACES {
            let op = GatedLinearAttn { gated: place.1, ..OP };
            for kind in INPUTS {
                for gate_kind in KINDS {
                    for time in [1, 15, 63, 64, 65, 200] {
                        let x = inputs(kind, gate_kind, time, place);
                        let what = format!("{kind}, gates {gate_kind}, {time}, {place:?}");
                        let run = |x: &[Tensor]| Ok(op.forward(&x[0], &x[1], &x[2], &x[3], Some(&x[4]))?.0);
                        check(&what, &x, 2e-5, run);
                    }
                }
            }
        }
    }

    #[test]
    fn long_and_wide() {
        for per_channel in [false, true] {
            let (time, h, dim) = (1000, 2, 32);
            let shape = [1, time, h, dim];
            let g = if per_channel { gates("soft", &shape) } else { gates("soft", &shape[..3]) };
            let x = [input("randn", &shape, 1), input("randn", &shape, 2), input("randn", &shape, 3), g];
            check("long", &x, 3e-5, |x| Ok(OP.forward(&x[0], &x[1], &x[2], &x[3], None)?.0));
        }
    }

    #[test]
    fn one_gate_for_all_positions() {
        let [q, k, v, ..] = inputs("randn", "usual", 70, PLACES[0]).map(|x| x.to_dtype(DType::F32).unwrap());
        let constant = Tensor::new(&[-0.1f32, -1.0, 0.0], &Device::Cpu).unwrap();
        let (y, last) = OP.forward(&q, &k, &v, &constant, None).unwrap();
        let (wanted, end) = OP.recurrent(&q, &k, &v, &constant, None).unwrap();
        near("result", &y, &wanted, 2e-6);
        near("state", &last, &end, 2e-6);
    }

    #[test]
    fn packed_sequences_do_not_meet() {
        let bounds = [0, 37, 37, 101, 130];
        for place in PLACES {
            let op = GatedLinearAttn { gated: place.1, ..OP };
            let [q, k, v, g, _] = inputs("randn", "soft", 130, place).map(|x| x.narrow(0, 0, 1).unwrap());
            let states = input("randn", &[4, 3, 6, 5], 6);
            check("packed", &[q.clone(), k.clone(), v.clone(), g.clone(), states.clone()], 2e-5, |x| {
                Ok(op.forward_packed(&x[0], &x[1], &x[2], &x[3], Some(&x[4]), &bounds)?.0)
            });
            let f32s = [&q, &k, &v, &g, &states].map(|x| x.to_dtype(DType::F32).unwrap());
            let [q, k, v, g, states] = &f32s;
            let (y, last) = op.forward_packed(q, k, v, g, Some(states), &bounds).unwrap();
            for n in 0..4 {
                let part = |x: &Tensor| x.narrow(1, bounds[n], bounds[n + 1] - bounds[n]).unwrap();
                let state = states.narrow(0, n, 1).unwrap();
                if bounds[n] == bounds[n + 1] {
                    near("an empty sequence keeps its state", &last.narrow(0, n, 1).unwrap(), &state, 0.0);
                    continue;
                }
                let (one, end) = op.forward(&part(q), &part(k), &part(v), &part(g), Some(&state)).unwrap();
                near("packed result", &part(&y), &one, 0.0);
                near("packed state", &last.narrow(0, n, 1).unwrap(), &end, 0.0);
            }
        }
        let [q, k, v, g, _] = inputs("randn", "soft", 8, PLACES[0]);
        assert!(OP.forward_packed(&q, &k, &v, &g, None, &[0, 8]).is_err(), "two rows are not one");
    }

    #[test]
    fn shapes_are_checked() {
        let [q, k, v, g, s] = inputs("randn", "usual", 9, PLACES[1]);
        let error = OP.forward(&q, &k, &v, &g.narrow(3, 0, 5).unwrap(), None).unwrap_err().to_string();
        assert!(error.contains("[2, 9, 3, 5]"), "{error}");
        assert!(OP.forward(&q, &k, &v, &g, Some(&s.narrow(1, 0, 2).unwrap())).is_err());
    }
}
