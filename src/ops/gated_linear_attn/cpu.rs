//! The fast form in f32: chunk by chunk, one task per sequence and head.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::super::cpu::{self, Mat, MatMut, Shared, gemm};
use super::{Channels, GatedLinearAttn, LOWEST};

/// Rows per chunk.
const CHUNK: usize = 64;

impl GatedLinearAttn {
    /// The result and the last states.
    pub(super) fn on_cpu(
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
    fn rows(&self, data: &[f32], dim: usize, head: usize, from: usize, n: usize) -> Mat {
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
    #[allow(clippy::too_many_arguments)]
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
