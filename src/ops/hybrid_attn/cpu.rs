//! The CPU form, f32: chunks of rows per head, one-thread products, threads over heads.
//!
//! A chunk's rows see the keys from its reach on directly and all earlier ones through the state S = Σ φk_j v_jᵀ,
//! z = Σ φk_j. The backward keeps the states of one head at a time and recomputes the rest. The squared error is that
//! backward with y and its gradient made chunk by chunk, so neither is ever stored.

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
    batch: usize,
    time: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    chunk: usize,
    /// Whether rows of y carry c and the denominator behind them: D + 2 wide.
    mass: bool,
}

/// Where ∂loss/∂y comes from.
#[derive(Clone, Copy)]
pub(in crate::ops) enum Upstream<'a> {
    /// The graph above: y of [`Core::forward`] and its gradient.
    Graph { y: &'a [f32], grad: &'a [f32] },
    /// The squared error Σ (y - target)², whose gradient counts `slope (y - target)`.
    Squares { target: &'a [f32], slope: f32 },
}

/// What [`Core::backward`] gives; gradients are laid out like their tensors.
pub(in crate::ops) struct Grads {
    pub qkv: Option<Vec<f32>>,
    pub features: Vec<f32>,
    pub factors: Vec<f32>,
    /// Σ (y - target)² of [`Upstream::Squares`].
    pub squares: f64,
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

impl Chunk {
    fn rows(&self) -> usize {
        self.end - self.start
    }

    fn keys(&self) -> usize {
        self.end - self.reach
    }
}

/// What one head's pass needs again and again.
#[derive(Default)]
struct Scratch {
    keys: Vec<f32>,        // [D, T]
    values: Vec<f32>,      // [D, T], backward only
    weights: Vec<f32>,     // [rows, keys]
    linear: Vec<f32>,      // [rows, linear keys]
    top: Vec<f32>,         // [rows], c
    den: Vec<f32>,         // [rows]
    y: Vec<f32>,           // [rows, D]
    grad_num: Vec<f32>,    // [rows, D]
    grad_top: Vec<f32>,    // [rows]
    grad_den: Vec<f32>,    // [rows]
    grad_scores: Vec<f32>, // [rows, keys]
    grad_linear: Vec<f32>, // [rows, linear keys]
    grad_fq: Vec<f32>,     // [rows, F]
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
        let window = shape.window;
        Ok(Core { window, qkv, features, sigma, lambda, batch, time, heads, kv_heads, dim, chunk, mass: false })
    }

    /// y becomes [B, T, H, D + 2]: behind each row its c and its denominator.
    pub(in crate::ops) fn with_mass(self) -> Self {
        Core { mass: true, ..self }
    }

    fn chunks(&self) -> Vec<Chunk> {
        let starts = (0..self.time).step_by(self.chunk);
        starts
            .map(|start| {
                let end = (start + self.chunk).min(self.time);
                let reach = self.window.start(start).min(start);
                let linear = if self.features.is_some() { self.window.start(end - 1) - reach } else { 0 };
                Chunk { start, end, reach, linear }
            })
            .collect()
    }

    /// The packed head with the keys of query head `h`.
    fn key(&self, h: usize) -> usize {
        self.heads + h / (self.heads / self.kv_heads)
    }

    fn value(&self, h: usize) -> usize {
        self.key(h) + self.kv_heads
    }

    /// Start of row `t` of packed head `head` of sequence `b`, and the distance of rows.
    fn row_at(&self, b: usize, head: usize, t: usize) -> (usize, usize) {
        let packed = self.heads + 2 * self.kv_heads;
        (((b * self.time + t) * packed + head) * self.dim, packed * self.dim)
    }

    /// Rows `from..to` of packed head `head` of sequence `b`.
    fn rows(&self, b: usize, head: usize, from: usize, to: usize) -> Mat {
        let (start, row) = self.row_at(b, head, from);
        Mat::new(self.qkv, start, to - from, self.dim, row)
    }

    fn width(&self) -> usize {
        self.features.map_or(0, |f| f.1)
    }

    /// Start of row `t` of feature head `head`, and the distance of rows.
    fn phi_at(&self, b: usize, head: usize, t: usize) -> (usize, usize) {
        let width = self.width();
        (((b * self.time + t) * 2 * self.heads + head) * width, 2 * self.heads * width)
    }

    fn phi(&self, b: usize, head: usize, from: usize, to: usize) -> Mat {
        let (start, row) = self.phi_at(b, head, from);
        Mat::new(self.features.map_or(&[], |f| f.0), start, to - from, self.width(), row)
    }

    fn phi_row(&self, b: usize, head: usize, t: usize) -> &[f32] {
        let Some((data, width)) = self.features else { return &[] };
        let (start, _) = self.phi_at(b, head, t);
        &data[start..start + width]
    }

    /// Start of row `t` of head `h` of y.
    fn y_at(&self, b: usize, h: usize, t: usize) -> usize {
        ((b * self.time + t) * self.heads + h) * self.y_width()
    }

    fn y_width(&self) -> usize {
        if self.mass { self.dim + 2 } else { self.dim }
    }

    /// Elements of a state: S [F, D], then z [F].
    fn state_size(&self) -> usize {
        self.width() * (self.dim + 1)
    }

    /// Adds keys `from..to` to a state.
    fn fold(&self, state: &mut [f32], b: usize, h: usize, from: usize, to: usize) {
        let (width, d) = (self.width(), self.dim);
        if width == 0 || to == from {
            return;
        }
        let (s, z) = state.split_at_mut(width * d);
        let fk = self.phi(b, self.heads + h, from, to);
        gemm(MatMut::new(s, 0, width, d, d), true, 1.0, fk.t(), self.rows(b, self.value(h), from, to));
        cpu::vectorised(
            #[inline(always)]
            || (from..to).for_each(|t| cpu::add(z, 1.0, self.phi_row(b, self.heads + h, t))),
        );
    }

    /// Weights [rows, keys] and denominators of one chunk, the unscaled linear products beside them; window weights
    /// carry σ, linear ones λ.
    fn weigh(&self, b: usize, h: usize, c: &Chunk, state: &[f32], s: &mut Scratch) {
        let (rows, keys, linear) = (c.rows(), c.keys(), c.linear);
        s.weights.resize(rows * keys, 0.0);
        s.linear.resize(rows * linear, 0.0);
        s.top.resize(rows, 0.0);
        s.den.resize(rows, 0.0);
        let scale = (self.dim as f32).powf(-0.5);
        let k = Mat::new(&s.keys, c.reach, self.dim, keys, self.time);
        gemm(MatMut::new(&mut s.weights, 0, rows, keys, keys), false, scale, self.rows(b, h, c.start, c.end), k);
        if linear > 0 {
            let (fq, fk) = (self.phi(b, h, c.start, c.end), self.phi(b, self.heads + h, c.reach, c.reach + linear));
            gemm(MatMut::new(&mut s.linear, 0, rows, linear, linear), false, 1.0, fq, fk.t());
        }
        let (sigma, lambda) = (self.sigma[h], self.lambda[h]);
        let z = &state[self.width() * self.dim..];
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
                    s.top[i] = top;
                    s.den[i] = cpu::sum(&row[..to]) + lambda * cpu::dot(self.phi_row(b, h, c.start + i), z);
                }
            },
        );
    }

    /// The window of row `i` of a chunk, as indices into its keys.
    fn span(&self, c: &Chunk, i: usize) -> (usize, usize) {
        let row = c.start + i;
        (self.window.start(row) - c.reach, row + 1 - c.reach)
    }

    /// y of a weighed chunk, into `s.y`.
    fn output(&self, b: usize, h: usize, c: &Chunk, state: &[f32], s: &mut Scratch) {
        let (rows, keys, d) = (c.rows(), c.keys(), self.dim);
        s.y.resize(rows * d, 0.0);
        let v = self.rows(b, self.value(h), c.reach, c.end);
        gemm(MatMut::new(&mut s.y, 0, rows, d, d), false, 1.0, Mat::new(&s.weights, 0, rows, keys, keys), v);
        if c.reach > 0 && self.width() > 0 {
            let (fq, state) = (self.phi(b, h, c.start, c.end), Mat::new(state, 0, self.width(), d, d));
            gemm(MatMut::new(&mut s.y, 0, rows, d, d), true, self.lambda[h], fq, state);
        }
        cpu::vectorised(
            #[inline(always)]
            || {
                for (y, den) in s.y.chunks_mut(d).zip(&s.den) {
                    let inverse = 1.0 / den.max(MIN_DENOMINATOR as f32);
                    y.iter_mut().for_each(|y| *y *= inverse);
                }
            },
        );
    }

    /// y [B, T, H, D], or what [`Core::with_mass`] says.
    pub(in crate::ops) fn forward(&self) -> Vec<f32> {
        let (d, width) = (self.dim, self.y_width());
        let mut out = vec![0f32; self.batch * self.time * self.heads * width];
        let shared = Shared::new(&mut out);
        (0..self.batch * self.heads).into_par_iter().for_each_init(Scratch::default, |s, task| {
            let (b, h) = (task / self.heads, task % self.heads);
            cpu::transpose(self.rows(b, self.key(h), 0, self.time), &mut s.keys);
            let mut state = vec![0f32; self.state_size()];
            let mut folded = 0;
            for c in self.chunks() {
                self.fold(&mut state, b, h, folded, c.reach);
                folded = c.reach;
                self.weigh(b, h, &c, &state, s);
                self.output(b, h, &c, &state, s);
                for (i, y) in s.y.chunks(d).enumerate() {
                    // SAFETY: rows of (b, h) belong to this task alone.
                    let row = unsafe { shared.row(self.y_at(b, h, c.start + i), width) };
                    row[..d].copy_from_slice(y);
                    if self.mass {
                        row[d..].copy_from_slice(&[s.top[i], s.den[i]]);
                    }
                }
            }
        });
        out
    }

    /// Gradients to features and factors, and to `qkv` where asked.
    pub(in crate::ops) fn backward(&self, upstream: Upstream, qkv_grad: bool) -> Grads {
        let group = self.heads / self.kv_heads;
        let mut qkv = qkv_grad.then(|| vec![0f32; self.qkv.len()]);
        let mut features = vec![0f32; self.features.map_or(0, |f| f.0.len())];
        let out = GradBuffers { qkv: qkv.as_mut().map(|qkv| Shared::new(qkv)), features: Shared::new(&mut features) };
        // The heads of a group add to the same key and value gradients: one task takes them all.
        let tasks = (0..self.batch * self.kv_heads).into_par_iter().map_init(Scratch::default, |s, task| {
            let (b, g) = (task / self.kv_heads, task % self.kv_heads);
            (g * group..(g + 1) * group).map(|h| self.backward_head(b, h, upstream, &out, s)).collect()
        });
        let per_head = tasks.collect::<Vec<Vec<(f32, f64)>>>().concat(); // [B, H]
        let mut factors = vec![0f32; self.heads];
        per_head.iter().enumerate().for_each(|(i, (factor, _))| factors[i % self.heads] += factor);
        let squares = per_head.iter().map(|(_, squares)| squares).sum();
        Grads { qkv, features, factors, squares }
    }

    /// The share of (b, h) in ∂loss/∂factor and in the squared error.
    fn backward_head<'o>(
        &self,
        b: usize,
        h: usize,
        upstream: Upstream,
        out: &GradBuffers<'o>,
        s: &mut Scratch,
    ) -> (f32, f64) {
        let (d, width, lambda) = (self.dim, self.width(), self.lambda[h]);
        let (key, value) = (self.key(h), self.value(h));
        let scale = (d as f32).powf(-0.5);
        let chunks = self.chunks();
        cpu::transpose(self.rows(b, key, 0, self.time), &mut s.keys);
        if out.qkv.is_some() || chunks.iter().any(|c| c.linear > 0) {
            cpu::transpose(self.rows(b, value, 0, self.time), &mut s.values);
        }

        // States before each chunk.
        let size = self.state_size();
        let mut states = vec![0f32; size * chunks.len()];
        for i in 1..chunks.len() {
            let (before, after) = states.split_at_mut(i * size);
            after[..size].copy_from_slice(&before[(i - 1) * size..]);
            self.fold(&mut after[..size], b, h, chunks[i - 1].reach, chunks[i].reach);
        }
        // Gradients of Sᵀ [D, F] and of z, summed over the chunks that read them.
        let (mut grad_s, mut grad_z) = (vec![0f32; d * width], vec![0f32; width]);
        // SAFETY (both): rows of (b, h), and of its key head, belong to this task alone.
        let d_qkv = |qkv: &Shared<'o>, head: usize, from: usize, to: usize| unsafe {
            let (start, row) = self.row_at(b, head, from);
            qkv.mat(start, to - from, d, row)
        };
        let d_phi = |head: usize, from: usize, to: usize| unsafe {
            let (start, row) = self.phi_at(b, head, from);
            out.features.mat(start, to - from, width, row)
        };

        let mut linear_share = 0f32; // Σ a ∂loss/∂a over the linear part, over λ
        let mut squares = 0f64;
        for (n, c) in chunks.iter().enumerate().rev() {
            let state = &states[n * size..(n + 1) * size];
            let (rows, keys, linear) = (c.rows(), c.keys(), c.linear);
            self.weigh(b, h, c, state, s);
            squares += self.upstream(b, h, c, state, upstream, s);
            let grad_num = Mat::new(&s.grad_num, 0, rows, d, d);

            // ∂loss/∂a, then through the exponentials and the linear products
            let reached = if out.qkv.is_some() { keys } else { linear };
            s.grad_scores.resize(rows * reached, 0.0);
            s.grad_linear.resize(rows * linear, 0.0);
            let v = Mat::new(&s.values, c.reach, d, reached, self.time);
            gemm(MatMut::new(&mut s.grad_scores, 0, rows, reached, reached), false, 1.0, grad_num, v);
            cpu::vectorised(
                #[inline(always)]
                || {
                    for i in 0..rows {
                        let row = &mut s.grad_scores[i * reached..(i + 1) * reached];
                        let (from, to) = self.span(c, i);
                        let den = s.grad_den[i];
                        if linear > 0 {
                            let products = &s.linear[i * linear..(i + 1) * linear];
                            let target = &mut s.grad_linear[i * linear..(i + 1) * linear];
                            for j in 0..from {
                                target[j] = row[j] + den;
                            }
                            target[from..].fill(0.0);
                            linear_share += cpu::dot(target, products);
                        }
                        if out.qkv.is_some() {
                            through_scores(row, &s.weights[i * keys..(i + 1) * keys], den, s.grad_top[i], from, to);
                        }
                    }
                },
            );
            if let Some(qkv) = &out.qkv {
                let weights = Mat::new(&s.weights, 0, rows, keys, keys);
                gemm(d_qkv(qkv, value, c.reach, c.end), true, 1.0, weights.t(), grad_num);
                let scores = Mat::new(&s.grad_scores, 0, rows, keys, keys);
                gemm(d_qkv(qkv, h, c.start, c.end), true, scale, scores, self.rows(b, key, c.reach, c.end));
                gemm(d_qkv(qkv, key, c.reach, c.end), true, scale, scores.t(), self.rows(b, h, c.start, c.end));
            }
            if width == 0 {
                continue;
            }
            let fq = self.phi(b, h, c.start, c.end);
            if linear > 0 {
                let grads = Mat::new(&s.grad_linear, 0, rows, linear, linear);
                let fk = self.phi(b, self.heads + h, c.reach, c.reach + linear);
                gemm(d_phi(h, c.start, c.end), true, lambda, grads, fk);
                gemm(d_phi(self.heads + h, c.reach, c.reach + linear), true, lambda, grads.t(), fq);
            }
            if c.reach > 0 {
                s.grad_fq.resize(rows * width, 0.0);
                let (state, z) = state.split_at(width * d);
                let state = Mat::new(state, 0, width, d, d);
                gemm(MatMut::new(&mut s.grad_fq, 0, rows, width, width), false, 1.0, grad_num, state.t());
                gemm(MatMut::new(&mut grad_s, 0, d, width, width), true, lambda, grad_num.t(), fq);
                cpu::vectorised(
                    #[inline(always)]
                    || {
                        for (i, grad) in s.grad_fq.chunks_mut(width).enumerate() {
                            let (t, den) = (c.start + i, s.grad_den[i]);
                            let phi = self.phi_row(b, h, t);
                            cpu::add(grad, den, z);
                            cpu::add(&mut grad_z, lambda * den, phi);
                            linear_share += cpu::dot(grad, phi);
                            // SAFETY: as above.
                            cpu::add(unsafe { out.features.row(self.phi_at(b, h, t).0, width) }, lambda, grad);
                        }
                    },
                );
            }
            // Keys folded between the previous chunk and this one were read by this and all later chunks.
            let from = if n == 0 { 0 } else { chunks[n - 1].reach };
            if c.reach > from {
                let grad_s = Mat::new(&grad_s, 0, d, width, width);
                gemm(d_phi(self.heads + h, from, c.reach), true, 1.0, self.rows(b, value, from, c.reach), grad_s);
                cpu::vectorised(
                    #[inline(always)]
                    || {
                        for t in from..c.reach {
                            // SAFETY: as above.
                            let row = unsafe { out.features.row(self.phi_at(b, self.heads + h, t).0, width) };
                            cpu::add(row, 1.0, &grad_z);
                        }
                    },
                );
                if let Some(qkv) = &out.qkv {
                    let fk = self.phi(b, self.heads + h, from, c.reach);
                    gemm(d_qkv(qkv, value, from, c.reach), true, 1.0, fk, grad_s.t());
                }
            }
        }
        // y depends on f through ln(σ/λ) alone, and what the window's part gains by it the linear part loses: ∂/∂f is
        // -λ linear_share times its slope, 1 - σ for λ = 1 and 1 for λ = 1 - σ. Either way:
        let factor = if self.window.capacity() == 0 { 0.0 } else { (self.sigma[h] - 1.0) * linear_share };
        (factor, squares)
    }

    /// ∂loss/∂num, ∂loss/∂den and ∂loss/∂c of a weighed chunk, into `s`; gives its part of the squared error.
    fn upstream(&self, b: usize, h: usize, c: &Chunk, state: &[f32], from: Upstream, s: &mut Scratch) -> f64 {
        let d = self.dim;
        s.grad_num.resize(c.rows() * d, 0.0);
        s.grad_den.resize(c.rows(), 0.0);
        s.grad_top.resize(c.rows(), 0.0);
        if let Upstream::Squares { .. } = from {
            self.output(b, h, c, state, s);
        }
        let mut squares = 0f64;
        cpu::vectorised(
            #[inline(always)]
            || {
                for (i, row) in s.grad_num.chunks_mut(d).enumerate() {
                    let at = self.y_at(b, h, c.start + i);
                    let y = match from {
                        Upstream::Graph { y, grad } => {
                            row.copy_from_slice(&grad[at..at + d]);
                            &y[at..at + d]
                        }
                        Upstream::Squares { target, slope } => {
                            let y = &s.y[i * d..(i + 1) * d];
                            for ((g, y), t) in row.iter_mut().zip(y).zip(&target[at..at + d]) {
                                *g = y - t;
                            }
                            squares += cpu::dot(row, row) as f64;
                            row.iter_mut().for_each(|g| *g *= slope);
                            y
                        }
                    };
                    let den = s.den[i].max(MIN_DENOMINATOR as f32);
                    s.grad_den[i] = if s.den[i] < den { 0.0 } else { -cpu::dot(row, y) / den };
                    s.grad_top[i] = 0.0;
                    if let (true, Upstream::Graph { grad, .. }) = (self.mass, from) {
                        s.grad_top[i] = grad[at + d];
                        s.grad_den[i] += grad[at + d + 1];
                    }
                    row.iter_mut().for_each(|g| *g /= den);
                }
            },
        );
        squares
    }
}

/// ∂loss/∂a of one row becomes ∂loss/∂s: through the exponentials in the window `from..to`, 0 outside. `den` and `top`
/// are the gradients of the denominator and of c.
#[inline(always)]
fn through_scores(row: &mut [f32], weights: &[f32], den: f32, top: f32, from: usize, to: usize) {
    let (mut total, mut best) = (0f32, from);
    for j in from..to {
        row[j] = weights[j] * (row[j] + den);
        total += row[j];
        best = if weights[j] > weights[best] { j } else { best };
    }
    if to > from {
        row[best] += top - total;
    }
    row[..from].fill(0.0);
    row[to..].fill(0.0);
}

struct GradBuffers<'a> {
    qkv: Option<Shared<'a>>,
    features: Shared<'a>,
}
