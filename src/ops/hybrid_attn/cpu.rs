//! The CPU form, f32: chunks of rows per head, one-thread products, threads over heads.
//!
//! A chunk's rows see the keys from its reach on directly and all earlier ones through the state S = Σ φk_j [v_j, 1].
//! The backward keeps the states of one head at a time and recomputes the rest.

use candle_core::{Result, Shape};
use rayon::prelude::*;

use super::super::cpu::{self, Mat, MatMut, Shared, gemm};
use super::{HybridAttn, MIN_DENOMINATOR, Window};

/// One call's buffers and sizes, shared by this op and by plain softmax attention (no features: keys before the window
/// are dropped).
pub(in crate::ops) struct Core<'a> {
    window: Window,
    qkv: &'a [f32],
    /// φ and its width.
    features: Option<(&'a [f32], usize)>,
    sigma: Vec<f32>,
    lambda: Vec<f32>,
    affine: bool,
    batch: usize,
    time: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    chunk: usize,
}

/// Gradients of [`Core::backward`], laid out like their tensors.
pub(in crate::ops) struct Grads {
    pub qkv: Option<Vec<f32>>,
    pub features: Vec<f32>,
    pub factors: Vec<f32>,
}

/// One chunk of rows of one head.
struct Chunk {
    /// Rows `start..end`, keys `reach..end`; keys before `reach` are in the state.
    start: usize,
    end: usize,
    reach: usize,
    /// Keys `reach..reach + linear` are in the linear part of some row.
    linear: usize,
}

/// What one head's pass over a chunk needs again and again.
#[derive(Default)]
struct Scratch {
    weights: Vec<f32>,     // [rows, keys]
    linear: Vec<f32>,      // [rows, linear keys]
    num: Vec<f32>,         // [rows, D + 1]
    den: Vec<f32>,         // [rows]
    grad_num: Vec<f32>,    // [rows, D + 1]
    grad_scores: Vec<f32>, // [rows, keys]
    grad_linear: Vec<f32>, // [rows, linear keys]
    tmp: Vec<f32>,         // [rows, F]
}

impl<'a> Core<'a> {
    pub(in crate::ops) fn new(
        shape: HybridAttn,
        qkv_shape: &Shape,
        qkv: &'a [f32],
        features: Option<(&'a [f32], usize)>,
        factors: &[f32],
    ) -> Result<Self> {
        let (batch, time, packed, dim) = qkv_shape.dims4()?;
        let (heads, kv_heads) = (shape.heads, shape.kv_heads);
        if packed != heads + 2 * kv_heads || !heads.is_multiple_of(kv_heads) || factors.len() != heads {
            candle_core::bail!("attention of {heads} heads over {kv_heads} key heads got {packed} packed heads");
        }
        if let Some((phi, width)) = features
            && phi.len() != batch * time * 2 * heads * width
        {
            candle_core::bail!(
                "attention features have {} elements, not {batch}x{time}x{}x{width}",
                phi.len(),
                2 * heads
            );
        }
        let sigma: Vec<f32> = factors.iter().map(|f| 1.0 / (1.0 + (-f).exp())).collect();
        let lambda = sigma.iter().map(|s| if shape.affine { 1.0 - s } else { 1.0 }).collect();
        let chunk = match features {
            Some(_) => shape.window.chunk(),
            None => 64,
        };
        let affine = shape.affine;
        Ok(Core {
            window: shape.window,
            qkv,
            features,
            sigma,
            lambda,
            affine,
            batch,
            time,
            heads,
            kv_heads,
            dim,
            chunk,
        })
    }

    fn chunks(&self) -> Vec<Chunk> {
        let starts = (0..self.time).step_by(self.chunk);
        starts
            .map(|start| {
                let end = (start + self.chunk).min(self.time);
                let reach = self.window.start(start).min(start);
                Chunk { start, end, reach, linear: self.window.start(end - 1) - reach }
            })
            .collect()
    }

    fn key_head(&self, head: usize) -> usize {
        head / (self.heads / self.kv_heads)
    }

    /// Rows `from..to` of packed head `head` of sequence `b`.
    fn rows(&self, b: usize, head: usize, from: usize, to: usize) -> Mat {
        let packed = self.heads + 2 * self.kv_heads;
        let start = ((b * self.time + from) * packed + head) * self.dim;
        Mat::new(self.qkv, start, to - from, self.dim, packed * self.dim)
    }

    /// Start of row `t` of feature head `head`, and the distance of rows.
    fn phi_at(&self, width: usize, b: usize, head: usize, t: usize) -> (usize, usize) {
        (((b * self.time + t) * 2 * self.heads + head) * width, 2 * self.heads * width)
    }

    fn phi(&self, b: usize, head: usize, from: usize, to: usize) -> Mat {
        let (data, width) = self.features.unwrap_or((&[], 0));
        let (start, row) = self.phi_at(width, b, head, from);
        Mat::new(data, start, to - from, width, row)
    }

    fn width(&self) -> usize {
        self.features.map_or(0, |f| f.1)
    }

    /// Adds keys `from..to` to the state [F, D + 1].
    fn fold(&self, state: &mut [f32], b: usize, h: usize, from: usize, to: usize) {
        let Some((data, width)) = self.features.filter(|_| to > from) else { return };
        let v = self.rows(b, self.heads + self.kv_heads + self.key_head(h), from, to);
        let side = self.dim + 1;
        gemm(MatMut::new(state, 0, width, self.dim, side), true, 1.0, self.phi(b, self.heads + h, from, to).t(), v);
        for t in from..to {
            let (start, _) = self.phi_at(width, b, self.heads + h, t);
            for (f, phi) in data[start..start + width].iter().enumerate() {
                state[f * side + self.dim] += phi;
            }
        }
    }

    /// Weights [rows, keys] of one chunk, the unscaled linear products beside them; window weights carry σ.
    fn weigh(&self, b: usize, h: usize, c: &Chunk, s: &mut Scratch) {
        let (rows, keys) = (c.end - c.start, c.end - c.reach);
        s.weights.resize(rows * keys, 0.0);
        let scale = (self.dim as f32).powf(-0.5);
        let (q, k) = (self.rows(b, h, c.start, c.end), self.rows(b, self.heads + self.key_head(h), c.reach, c.end));
        gemm(MatMut::new(&mut s.weights, 0, rows, keys, keys), false, scale, q, k.t());
        let linear = if self.features.is_some() { c.linear } else { 0 };
        s.linear.resize(rows * linear, 0.0);
        if linear > 0 {
            let (fq, fk) = (self.phi(b, h, c.start, c.end), self.phi(b, self.heads + h, c.reach, c.reach + linear));
            gemm(MatMut::new(&mut s.linear, 0, rows, linear, linear), false, 1.0, fq, fk.t());
        }
        let (sigma, lambda) = (self.sigma[h], self.lambda[h]);
        cpu::vectorised(
            #[inline(always)]
            || {
                for i in 0..rows {
                    let row = &mut s.weights[i * keys..(i + 1) * keys];
                    let (from, to) = self.span(c, i);
                    let top = cpu::max(&row[from..to]);
                    for a in &mut row[from..to] {
                        *a = sigma * cpu::exp(*a - top);
                    }
                    match linear {
                        0 => row[..from].fill(0.0),
                        n => {
                            let products = &s.linear[i * n..];
                            for (a, p) in row[..from].iter_mut().zip(products) {
                                *a = lambda * p;
                            }
                        }
                    }
                    row[to..].fill(0.0);
                }
            },
        );
    }

    /// The window of row `i` of a chunk, as indices into its keys.
    fn span(&self, c: &Chunk, i: usize) -> (usize, usize) {
        let row = c.start + i;
        (self.window.start(row) - c.reach, row + 1 - c.reach)
    }

    /// Denominators of a chunk's rows into `s.den`; `s.num` holds λ φq [S, z] before the weights' part is added.
    fn denominators(&self, b: usize, h: usize, c: &Chunk, state: &[f32], s: &mut Scratch) {
        let (rows, keys, side) = (c.end - c.start, c.end - c.reach, self.dim + 1);
        s.num.clear();
        s.num.resize(rows * side, 0.0);
        if self.features.is_some() && c.reach > 0 {
            let out = MatMut::new(&mut s.num, 0, rows, side, side);
            gemm(
                out,
                false,
                self.lambda[h],
                self.phi(b, h, c.start, c.end),
                Mat::new(state, 0, self.width(), side, side),
            );
        }
        s.den.clear();
        s.den.extend((0..rows).map(|i| cpu::sum(&s.weights[i * keys..(i + 1) * keys]) + s.num[i * side + self.dim]));
    }

    /// y [B, T, H, D].
    pub(in crate::ops) fn forward(&self) -> Vec<f32> {
        let mut out = vec![0f32; self.batch * self.time * self.heads * self.dim];
        let shared = Shared::new(&mut out);
        let (d, side) = (self.dim, self.dim + 1);
        (0..self.batch * self.heads).into_par_iter().for_each_init(Scratch::default, |s, task| {
            let (b, h) = (task / self.heads, task % self.heads);
            let mut state = vec![0f32; self.width() * side];
            let mut folded = 0;
            for c in self.chunks() {
                self.fold(&mut state, b, h, folded, c.reach);
                folded = c.reach;
                self.weigh(b, h, &c, s);
                self.denominators(b, h, &c, &state, s);
                let (rows, keys) = (c.end - c.start, c.end - c.reach);
                let v = self.rows(b, self.heads + self.kv_heads + self.key_head(h), c.reach, c.end);
                let weights = Mat::new(&s.weights, 0, rows, keys, keys);
                gemm(MatMut::new(&mut s.num, 0, rows, d, side), true, 1.0, weights, v);
                for i in 0..rows {
                    let inverse = 1.0 / s.den[i].max(MIN_DENOMINATOR as f32);
                    let start = ((b * self.time + c.start + i) * self.heads + h) * d;
                    // SAFETY: rows of (b, h) belong to this task alone.
                    let row = unsafe { shared.row(start, d) };
                    for (y, num) in row.iter_mut().zip(&s.num[i * side..]) {
                        *y = num * inverse;
                    }
                }
            }
        });
        out
    }

    /// Gradients for `grad` = ∂loss/∂y at the result `y` of [`Core::forward`].
    pub(in crate::ops) fn backward(&self, y: &[f32], grad: &[f32], qkv_grad: bool) -> Grads {
        let group = self.heads / self.kv_heads;
        let mut qkv = if qkv_grad { vec![0f32; self.qkv.len()] } else { Vec::new() };
        let mut features = vec![0f32; self.features.map_or(0, |f| f.0.len())];
        let mut per_task = vec![0f32; self.batch * self.heads]; // ∂loss/∂f before the sum over the batch
        {
            let out = GradBuffers {
                qkv: Shared::new(&mut qkv),
                features: Shared::new(&mut features),
                factors: Shared::new(&mut per_task),
                with_qkv: qkv_grad,
            };
            // The heads of a group add to the same key and value gradients: one task takes them all.
            (0..self.batch * self.kv_heads).into_par_iter().for_each_init(Scratch::default, |s, task| {
                let (b, g) = (task / self.kv_heads, task % self.kv_heads);
                for h in g * group..(g + 1) * group {
                    self.backward_head(b, h, y, grad, &out, s);
                }
            });
        }
        let sum = |h| (0..self.batch).map(|b| per_task[b * self.heads + h]).sum();
        let factors = (0..self.heads).map(sum).collect();
        Grads { qkv: qkv_grad.then_some(qkv), features, factors }
    }

    fn backward_head(&self, b: usize, h: usize, y: &[f32], grad: &[f32], out: &GradBuffers, s: &mut Scratch) {
        let (d, side, width) = (self.dim, self.dim + 1, self.width());
        let packed = self.heads + 2 * self.kv_heads;
        let (key, value) = (self.heads + self.key_head(h), self.heads + self.kv_heads + self.key_head(h));
        let scale = (d as f32).powf(-0.5);
        let (sigma, lambda) = (self.sigma[h], self.lambda[h]);
        let chunks = self.chunks();

        // States before each chunk.
        let size = width * side;
        let mut states = vec![0f32; size * chunks.len()];
        for i in 1..chunks.len() {
            let (before, after) = states.split_at_mut(i * size);
            after[..size].copy_from_slice(&before[(i - 1) * size..]);
            self.fold(&mut after[..size], b, h, chunks[i - 1].reach, chunks[i].reach);
        }
        let mut grad_state = vec![0f32; size]; // of [S, z], summed over the chunks that read it
        let (mut grad_sigma, mut grad_lambda) = (0f32, 0f32);
        // SAFETY (both): rows of (b, h), and of its key head, belong to this task alone.
        let d_qkv = |head: usize, from: usize, to: usize| unsafe {
            out.qkv.mat(((b * self.time + from) * packed + head) * d, to - from, d, packed * d)
        };
        let d_phi = |head: usize, from: usize, to: usize| unsafe {
            let (start, row) = self.phi_at(width, b, head, from);
            out.features.mat(start, to - from, width, row)
        };

        for (n, c) in chunks.iter().enumerate().rev() {
            let state = &states[n * size..(n + 1) * size];
            let (rows, keys) = (c.end - c.start, c.end - c.reach);
            let linear = if self.features.is_some() { c.linear } else { 0 };
            self.weigh(b, h, c, s);
            self.denominators(b, h, c, state, s);
            let v = self.rows(b, value, c.reach, c.end);

            // ∂loss/∂[num, den]
            s.grad_num.resize(rows * side, 0.0);
            for i in 0..rows {
                let at = ((b * self.time + c.start + i) * self.heads + h) * d;
                let (dy, y) = (&grad[at..at + d], &y[at..at + d]);
                let inverse = 1.0 / s.den[i].max(MIN_DENOMINATOR as f32);
                let row = &mut s.grad_num[i * side..(i + 1) * side];
                for (n, dy) in row.iter_mut().zip(dy) {
                    *n = dy * inverse;
                }
                let clamped = s.den[i] < MIN_DENOMINATOR as f32;
                row[d] = if clamped { 0.0 } else { -cpu::dot(dy, y) * inverse };
            }
            let grad_num = Mat::new(&s.grad_num, 0, rows, d, side);
            if out.with_qkv {
                let weights = Mat::new(&s.weights, 0, rows, keys, keys);
                gemm(d_qkv(value, c.reach, c.end), true, 1.0, weights.t(), grad_num);
            }

            // ∂loss/∂a, then through the exponentials and the linear products
            s.grad_scores.resize(rows * keys, 0.0);
            gemm(MatMut::new(&mut s.grad_scores, 0, rows, keys, keys), false, 1.0, grad_num, v.t());
            s.grad_linear.resize(rows * linear, 0.0);
            cpu::vectorised(
                #[inline(always)]
                || {
                    for i in 0..rows {
                        let row = &mut s.grad_scores[i * keys..(i + 1) * keys];
                        let weights = &s.weights[i * keys..(i + 1) * keys];
                        let (from, to) = self.span(c, i);
                        let den = s.grad_num[i * side + d];
                        if linear > 0 {
                            let products = &s.linear[i * linear..(i + 1) * linear];
                            let target = &mut s.grad_linear[i * linear..(i + 1) * linear];
                            let mut total = 0f32;
                            for j in 0..from {
                                let da = row[j] + den;
                                total += da * products[j];
                                target[j] = da * lambda;
                            }
                            target[from..].fill(0.0);
                            grad_lambda += total;
                        }
                        let (mut total, mut best) = (0f32, from);
                        for j in from..to {
                            row[j] = weights[j] * (row[j] + den);
                            total += row[j];
                            best = if weights[j] > weights[best] { j } else { best };
                        }
                        if to > from {
                            row[best] -= total;
                        }
                        grad_sigma += total;
                        row[..from].fill(0.0);
                        row[to..].fill(0.0);
                    }
                },
            );
            if out.with_qkv {
                let scores = Mat::new(&s.grad_scores, 0, rows, keys, keys);
                gemm(d_qkv(h, c.start, c.end), true, scale, scores, self.rows(b, key, c.reach, c.end));
                gemm(d_qkv(key, c.reach, c.end), true, scale, scores.t(), self.rows(b, h, c.start, c.end));
            }
            if self.features.is_none() {
                continue;
            }
            let fq = self.phi(b, h, c.start, c.end);
            if linear > 0 {
                let grads = Mat::new(&s.grad_linear, 0, rows, linear, linear);
                let fk = self.phi(b, self.heads + h, c.reach, c.reach + linear);
                gemm(d_phi(h, c.start, c.end), true, 1.0, grads, fk);
                gemm(d_phi(self.heads + h, c.reach, c.reach + linear), true, 1.0, grads.t(), fq);
            }
            if c.reach > 0 {
                let grad_num = Mat::new(&s.grad_num, 0, rows, side, side);
                let state = Mat::new(state, 0, width, side, side);
                if self.affine {
                    s.tmp.resize(rows * width, 0.0);
                    gemm(MatMut::new(&mut s.tmp, 0, rows, width, width), false, 1.0, grad_num, state.t());
                    grad_lambda += (0..rows)
                        .map(|i| {
                            let (start, _) = self.phi_at(width, b, h, c.start + i);
                            let phi = self.features.map_or(&[][..], |f| &f.0[start..start + width]);
                            cpu::dot(phi, &s.tmp[i * width..(i + 1) * width])
                        })
                        .sum::<f32>();
                }
                gemm(d_phi(h, c.start, c.end), true, lambda, grad_num, state.t());
                gemm(MatMut::new(&mut grad_state, 0, width, side, side), true, lambda, fq.t(), grad_num);
            }
            // Keys folded between the previous chunk and this one were read by this and all later chunks.
            let from = if n == 0 { 0 } else { chunks[n - 1].reach };
            if c.reach > from {
                let values = self.rows(b, value, from, c.reach);
                let gs = Mat::new(&grad_state, 0, width, d, side);
                gemm(d_phi(self.heads + h, from, c.reach), true, 1.0, values, gs.t());
                for t in from..c.reach {
                    let (start, _) = self.phi_at(width, b, self.heads + h, t);
                    // SAFETY: as above.
                    let row = unsafe { out.features.row(start, width) };
                    for (f, g) in row.iter_mut().enumerate() {
                        *g += grad_state[f * side + d];
                    }
                }
                if out.with_qkv {
                    gemm(d_qkv(value, from, c.reach), true, 1.0, self.phi(b, self.heads + h, from, c.reach), gs);
                }
            }
        }
        // a = σ e: ∂/∂σ = Σ a ∂a / σ, and σ' = σ (1 - σ).
        let mut factor = grad_sigma * (1.0 - sigma);
        if self.affine {
            factor -= grad_lambda * sigma * (1.0 - sigma);
        }
        // SAFETY: one element per (b, h).
        unsafe { out.factors.row(b * self.heads + h, 1)[0] = factor };
    }
}

struct GradBuffers<'a> {
    qkv: Shared<'a>,
    features: Shared<'a>,
    factors: Shared<'a>,
    with_qkv: bool,
}
