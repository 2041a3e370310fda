//! The fast form on the CPU: one head's chunks at a time, in f32.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::super::cpu::{self, Mat, MatMut, Shared, gemm};
use super::{CHUNK, Kind, NORM_EPS, Op};

/// Rows inside which decays per channel are taken pair by pair; between blocks they factor over the block's edge.
const BLOCK: usize = 16;

impl Op {
    fn core<'a>(&self, qkv: &'a [f32], small: &'a [f32], key: &'a [f32]) -> Core<'a> {
        let (n, _) = self.sizes();
        let (beta, rest) = small.split_at(n);
        let (gate, state) = match self.kind {
            Kind::None => (&[][..], rest),
            Kind::Head => rest.split_at(n),
            Kind::Key => (key, rest),
        };
        Core { op: *self, qkv, beta, gate, state: self.first.then_some(state) }
    }
}

impl CustomOp3 for Op {
    fn name(&self) -> &'static str {
        "delta_rule"
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        qkv_layout: &Layout,
        small: &CpuStorage,
        small_layout: &Layout,
        key: &CpuStorage,
        key_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let core = self.core(
            cpu::elements(qkv, qkv_layout)?,
            cpu::elements(small, small_layout)?,
            cpu::elements(key, key_layout)?,
        );
        let out = core.forward();
        let shape =
            if self.last { out.len().into() } else { (self.batch, self.time, self.rule.heads, self.dim).into() };
        Ok((CpuStorage::F32(out), shape))
    }

    fn bwd(
        &self,
        qkv: &Tensor,
        small: &Tensor,
        key: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (dx, dsmall, dkey) = cpu::with(qkv, |x| {
            cpu::with(small, |small| {
                cpu::with(key, |key| cpu::with(&grad, |grad| Ok(self.core(x, small, key).backward(grad))))
            })
        })?;
        let of = |data: Vec<f32>, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device());
        let dkey = if self.kind == Kind::Key { Some(of(dkey, key)?) } else { None };
        Ok((Some(of(dx, qkv)?), Some(of(dsmall, small)?), dkey))
    }
}

/// The fast CPU form: one call's buffers.
struct Core<'a> {
    op: Op,
    qkv: &'a [f32],
    beta: &'a [f32],
    /// Log decays: empty, [B, T, H] or [B, T, H, D].
    gate: &'a [f32],
    state: Option<&'a [f32]>,
}

/// What one head's pass over a chunk needs; matrices of [rows, D] or [rows, rows].
#[derive(Default)]
struct Scratch {
    rows: usize,
    q: Vec<f32>, // of unit length where asked
    k: Vec<f32>,
    q_norm: Vec<f32>, // 1 / length
    k_norm: Vec<f32>,
    beta: Vec<f32>,
    sum: Vec<f32>, // G, one column or D
    qd: Vec<f32>,  // scale q e^G
    kd: Vec<f32>,  // k e^G
    ke: Vec<f32>,  // k e^{G_C - G}
    m: Vec<f32>,
    p: Vec<f32>,
    tau: Vec<f32>,
    y: Vec<f32>,
    u: Vec<f32>, // β R, then U
    x: Vec<f32>,
    dq: Vec<f32>,
    row: Vec<f32>, // gradient of k as row of M
    col: Vec<f32>, // and as column of M and P
    dp: Vec<f32>,
    dm: Vec<f32>,
    end: Vec<f32>, // [D] gradient of the chunk's last G
    tmp: [Vec<f32>; 3],
}

/// Clears `x` to `len` zeros.
fn zeros(x: &mut Vec<f32>, len: usize) {
    x.clear();
    x.resize(len, 0.0);
}

impl Core<'_> {
    fn dim(&self) -> usize {
        self.op.dim
    }

    fn packed(&self) -> usize {
        self.op.rule.heads + 2 * self.op.rule.kv_heads
    }

    /// Start of position `t` of packed head `head`.
    fn at(&self, b: usize, t: usize, head: usize) -> usize {
        ((b * self.op.time + t) * self.packed() + head) * self.dim()
    }

    /// Start of position `t` of a [B, T, H, width] tensor.
    fn own(&self, b: usize, t: usize, h: usize, width: usize) -> usize {
        ((b * self.op.time + t) * self.op.rule.heads + h) * width
    }

    /// Packed heads of the key and the value of query head `h`.
    fn key_value(&self, h: usize) -> (usize, usize) {
        let rule = &self.op.rule;
        let key = rule.heads + h / (rule.heads / rule.kv_heads);
        (key, key + rule.kv_heads)
    }

    fn starts(&self) -> Vec<usize> {
        (0..self.op.time).step_by(CHUNK).collect()
    }

    /// Everything about a chunk that does not depend on the state.
    fn prepare(&self, b: usize, h: usize, start: usize, s: &mut Scratch) {
        let (d, rule) = (self.dim(), &self.op.rule);
        let n = CHUNK.min(self.op.time - start);
        s.rows = n;
        let scale = rule.scale as f32;
        let unit = |head: usize, out: &mut Vec<f32>, norms: &mut Vec<f32>| {
            out.clear();
            norms.clear();
            for t in start..start + n {
                let x = &self.qkv[self.at(b, t, head)..][..d];
                let norm = if rule.normalize { 1.0 / (cpu::dot(x, x) + NORM_EPS as f32).sqrt() } else { 1.0 };
                norms.push(norm);
                out.extend(x.iter().map(|x| x * norm));
            }
        };
        unit(h, &mut s.q, &mut s.q_norm);
        unit(self.key_value(h).0, &mut s.k, &mut s.k_norm);
        s.beta.clear();
        s.beta.extend((start..start + n).map(|t| self.beta[self.own(b, t, h, 1)]));

        let width = match self.op.kind {
            Kind::None => 0,
            Kind::Head => 1,
            Kind::Key => d,
        };
        s.sum.clear();
        for i in 0..n {
            let at = self.own(b, start + i, h, width);
            for c in 0..width {
                let before = if i > 0 { s.sum[(i - 1) * width + c] } else { 0.0 };
                s.sum.push(before + self.gate[at + c]);
            }
        }
        s.qd.clear();
        s.qd.extend(s.q.iter().map(|q| q * scale));
        s.kd.clone_from(&s.k);
        s.ke.clone_from(&s.k);
        if width > 0 {
            cpu::vectorised(
                #[inline(always)]
                || {
                    let last = &s.sum[(n - 1) * width..];
                    for i in 0..n {
                        let sum = &s.sum[i * width..(i + 1) * width];
                        let rows = (&mut s.qd[i * d..(i + 1) * d], &mut s.kd[i * d..(i + 1) * d]);
                        let ke = &mut s.ke[i * d..(i + 1) * d];
                        for c in 0..d {
                            let (g, end) = if width == 1 { (sum[0], last[0]) } else { (sum[c], last[c]) };
                            let up = cpu::exp(g);
                            rows.0[c] *= up;
                            rows.1[c] *= up;
                            ke[c] *= cpu::exp(end - g);
                        }
                    }
                },
            );
        }
        self.products(s);
        // τ_i = -M_i - Σ_{k < i} M_ik β_k τ_k
        zeros(&mut s.tau, n * n);
        cpu::vectorised(
            #[inline(always)]
            || {
                for i in 0..n {
                    let (before, rest) = s.tau.split_at_mut(i * n);
                    let row = &mut rest[..i];
                    let m = &s.m[i * n..i * n + i];
                    row.iter_mut().zip(m).for_each(|(x, m)| *x = -m);
                    for k in 1..i {
                        let f = m[k] * s.beta[k];
                        for (x, t) in row.iter_mut().zip(&before[k * n..k * n + k]) {
                            *x -= f * t;
                        }
                    }
                }
            },
        );
    }

    /// M and P of a chunk.
    fn products(&self, s: &mut Scratch) {
        let (d, n, scale) = (self.dim(), s.rows, self.op.rule.scale as f32);
        zeros(&mut s.m, n * n);
        zeros(&mut s.p, n * n);
        if self.op.kind != Kind::Key {
            let (q, k) = (Mat::new(&s.q, 0, n, d, d), Mat::new(&s.k, 0, n, d, d));
            gemm(MatMut::new(&mut s.m, 0, n, n, n), false, 1.0, k, k.t());
            gemm(MatMut::new(&mut s.p, 0, n, n, n), false, scale, q, k.t());
            let sum = if self.op.kind == Kind::Head { Some(&s.sum[..]) } else { None };
            decay_pairs(sum, n, &mut s.m, &mut s.p);
            return;
        }
        for from in (0..n).step_by(BLOCK) {
            let to = (from + BLOCK).min(n);
            if from > 0 {
                self.scale_block(s, from, to);
                let [q, k, before] = &s.tmp;
                let (q, k) = (Mat::new(q, 0, to - from, d, d), Mat::new(k, 0, to - from, d, d));
                let before = Mat::new(before, 0, from, d, d);
                gemm(MatMut::new(&mut s.m, from * n, to - from, from, n), false, 1.0, k, before.t());
                gemm(MatMut::new(&mut s.p, from * n, to - from, from, n), false, scale, q, before.t());
            }
            cpu::vectorised(
                #[inline(always)]
                || {
                    for i in from..to {
                        for j in from..=i {
                            let (gi, gj) = (&s.sum[i * d..(i + 1) * d], &s.sum[j * d..(j + 1) * d]);
                            let (qi, ki) = (&s.q[i * d..(i + 1) * d], &s.k[i * d..(i + 1) * d]);
                            let kj = &s.k[j * d..(j + 1) * d];
                            let (mut m, mut p) = ([0f32; 16], [0f32; 16]);
                            for c in 0..d {
                                let ke = kj[c] * cpu::exp(gi[c] - gj[c]);
                                m[c % 16] += ki[c] * ke;
                                p[c % 16] += qi[c] * ke;
                            }
                            s.p[i * n + j] = scale * p.iter().sum::<f32>();
                            s.m[i * n + j] = if j < i { m.iter().sum() } else { 0.0 };
                        }
                    }
                },
            );
        }
    }

    /// Into `tmp`: q and k of a block's rows times e^{G - r}, all keys before it times e^{r - G}, r the sum before it.
    fn scale_block(&self, s: &mut Scratch, from: usize, to: usize) {
        let d = self.dim();
        let Scratch { tmp: [q, k, before], sum, q: q_all, k: k_all, .. } = s;
        for x in [&mut *q, &mut *k] {
            zeros(x, (to - from) * d);
        }
        zeros(before, from * d);
        let edge = &sum[(from - 1) * d..from * d];
        cpu::vectorised(
            #[inline(always)]
            || {
                for i in from..to {
                    for c in 0..d {
                        let e = cpu::exp(sum[i * d + c] - edge[c]);
                        q[(i - from) * d + c] = q_all[i * d + c] * e;
                        k[(i - from) * d + c] = k_all[i * d + c] * e;
                    }
                }
                for j in 0..from {
                    for c in 0..d {
                        before[j * d + c] = k_all[j * d + c] * cpu::exp(edge[c] - sum[j * d + c]);
                    }
                }
            },
        );
    }

    /// Y and U of a chunk from the state before it.
    fn solve(&self, b: usize, h: usize, start: usize, state: &[f32], s: &mut Scratch) {
        let (d, n) = (self.dim(), s.rows);
        s.y.clear();
        let value = self.key_value(h).1;
        (start..start + n).for_each(|t| s.y.extend_from_slice(&self.qkv[self.at(b, t, value)..][..d]));
        gemm(MatMut::new(&mut s.y, 0, n, d, d), true, -1.0, Mat::new(&s.kd, 0, n, d, d), Mat::new(state, 0, d, d, d));
        times_rows(&mut s.u, &s.y, &s.beta, d);
        let u = Mat::new(&s.u, 0, n, d, d);
        gemm(MatMut::new(&mut s.y, 0, n, d, d), true, 1.0, Mat::new(&s.tau, 0, n, n, n), u);
        times_rows(&mut s.u, &s.y, &s.beta, d);
    }

    /// state <- e^{G_C} state + (k e^{G_C - G})ᵀ U
    fn advance(&self, state: &mut [f32], s: &Scratch) {
        let (d, n) = (self.dim(), s.rows);
        self.fade(state, s);
        gemm(MatMut::new(state, 0, d, d, d), true, 1.0, Mat::new(&s.ke, 0, n, d, d).t(), Mat::new(&s.u, 0, n, d, d));
    }

    /// The decay of a state over a chunk.
    fn fade(&self, state: &mut [f32], s: &Scratch) {
        let (d, n) = (self.dim(), s.rows);
        if self.op.kind == Kind::None {
            return;
        }
        let width = s.sum.len() / n;
        for (c, row) in state.chunks_mut(d).enumerate() {
            let e = s.sum[(n - 1) * width + if width == 1 { 0 } else { c }].exp();
            row.iter_mut().for_each(|x| *x *= e);
        }
    }

    fn first(&self, task: usize) -> Vec<f32> {
        let size = self.dim() * self.dim();
        self.state.map_or_else(|| vec![0.0; size], |s| s[task * size..(task + 1) * size].to_vec())
    }

    /// o [B, T, H, D], followed by the last state where asked.
    fn forward(&self) -> Vec<f32> {
        let (d, heads) = (self.dim(), self.op.rule.heads);
        let count = self.beta.len() * d;
        let size = if self.op.last { d * d } else { 0 };
        let mut out = vec![0f32; count + self.op.batch * heads * size];
        let shared = Shared::new(&mut out);
        (0..self.op.batch * heads).into_par_iter().for_each_init(Scratch::default, |s, task| {
            let (b, h) = (task / heads, task % heads);
            let mut state = self.first(task);
            for start in self.starts() {
                self.prepare(b, h, start, s);
                self.solve(b, h, start, &state, s);
                let n = s.rows;
                // SAFETY (both): rows of (b, h) belong to this task alone.
                let o = || unsafe { shared.mat(self.own(b, start, h, d), n, d, heads * d) };
                gemm(o(), false, 1.0, Mat::new(&s.qd, 0, n, d, d), Mat::new(&state, 0, d, d, d));
                gemm(o(), true, 1.0, Mat::new(&s.p, 0, n, n, n), Mat::new(&s.u, 0, n, d, d));
                self.advance(&mut state, s);
            }
            if self.op.last {
                // SAFETY: this state belongs to this task alone.
                unsafe { shared.row(count + task * size, size) }.copy_from_slice(&state);
            }
        });
        out
    }

    /// Gradients of qkv, of the small inputs and of the decays per channel.
    fn backward(&self, grad: &[f32]) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let rule = &self.op.rule;
        let (n, states) = self.op.sizes();
        let mut qkv = vec![0f32; self.qkv.len()];
        let gates = if self.op.kind == Kind::Head { n } else { 0 };
        let mut small = vec![0f32; n + gates + if self.op.first { states } else { 0 }];
        let mut key = vec![0f32; if self.op.kind == Kind::Key { self.gate.len() } else { 0 }];
        {
            let out = [Shared::new(&mut qkv), Shared::new(&mut small), Shared::new(&mut key)];
            // The heads of a group add to the same key and value gradients: one task takes them all.
            let group = rule.heads / rule.kv_heads;
            (0..self.op.batch * rule.kv_heads).into_par_iter().for_each_init(Scratch::default, |s, task| {
                let (b, g) = (task / rule.kv_heads, task % rule.kv_heads);
                for h in g * group..(g + 1) * group {
                    self.backward_head(b, h, grad, &out, s);
                }
            });
        }
        (qkv, small, key)
    }

    fn backward_head(&self, b: usize, h: usize, grad: &[f32], out: &[Shared; 3], s: &mut Scratch) {
        let (d, heads) = (self.dim(), self.op.rule.heads);
        let (size, task, count) = (d * d, b * heads + h, self.beta.len());
        let starts = self.starts();
        let mut states = self.first(task);
        for (i, start) in starts.iter().enumerate().take(starts.len() - 1) {
            self.prepare(b, h, *start, s);
            let mut state = states[i * size..].to_vec();
            self.solve(b, h, *start, &state, s);
            self.advance(&mut state, s);
            states.extend_from_slice(&state);
        }
        let mut ds = match self.op.last {
            true => grad[count * d + task * size..][..size].to_vec(),
            false => vec![0f32; size],
        };
        for (i, &start) in starts.iter().enumerate().rev() {
            let state = &states[i * size..(i + 1) * size];
            self.prepare(b, h, start, s);
            self.solve(b, h, start, state, s);
            self.backward_chunk(b, h, start, state, &mut ds, grad, s);
            self.collect(b, h, start, out, s);
        }
        if self.op.first {
            let gates = if self.op.kind == Kind::Head { count } else { 0 };
            // SAFETY: this state belongs to this task alone.
            unsafe { out[1].row(count + gates + task * size, size) }.copy_from_slice(&ds);
        }
    }

    /// From the gradient `ds` of the state after a chunk to that before it; gradients of q, k and v in `s`.
    #[allow(clippy::too_many_arguments)]
    fn backward_chunk(
        &self,
        b: usize,
        h: usize,
        start: usize,
        state: &[f32],
        ds: &mut [f32],
        grad: &[f32],
        s: &mut Scratch,
    ) {
        let (d, n, heads) = (self.dim(), s.rows, self.op.rule.heads);
        let scale = self.op.rule.scale as f32;
        let grad = Mat::new(grad, self.own(b, start, h, d), n, d, heads * d);
        let before = Mat::new(state, 0, d, d, d);
        // X = dU + τᵀ β dU, dU = Pᵀ do + ke dS'
        zeros(&mut s.x, n * d);
        gemm(MatMut::new(&mut s.x, 0, n, d, d), false, 1.0, Mat::new(&s.p, 0, n, n, n).t(), grad);
        gemm(MatMut::new(&mut s.x, 0, n, d, d), true, 1.0, Mat::new(&s.ke, 0, n, d, d), Mat::new(ds, 0, d, d, d));
        let mut dr = std::mem::take(&mut s.tmp[0]);
        times_rows(&mut dr, &s.x, &s.beta, d);
        let tau = Mat::new(&s.tau, 0, n, n, n);
        gemm(MatMut::new(&mut s.x, 0, n, d, d), true, 1.0, tau.t(), Mat::new(&dr, 0, n, d, d));
        times_rows(&mut dr, &s.x, &s.beta, d);
        let dr_mat = Mat::new(&dr, 0, n, d, d);
        let u = Mat::new(&s.u, 0, n, d, d);

        for x in [&mut s.dp, &mut s.dm] {
            zeros(x, n * n);
        }
        gemm(MatMut::new(&mut s.dp, 0, n, n, n), false, scale, grad, u.t());
        gemm(MatMut::new(&mut s.dm, 0, n, n, n), false, -1.0, dr_mat, u.t());
        for i in 0..n {
            s.dp[i * n + i + 1..(i + 1) * n].fill(0.0);
            s.dm[i * n + i..(i + 1) * n].fill(0.0);
        }
        for x in [&mut s.dq, &mut s.row, &mut s.col] {
            zeros(x, n * d);
        }
        gemm(MatMut::new(&mut s.dq, 0, n, d, d), false, scale, grad, before.t());
        gemm(MatMut::new(&mut s.row, 0, n, d, d), false, -1.0, dr_mat, before.t());
        gemm(MatMut::new(&mut s.col, 0, n, d, d), false, 1.0, u, Mat::new(ds, 0, d, d, d).t());

        // The last sum of the chunk: through k e^{G_C - G} and through e^{G_C} S.
        zeros(&mut s.end, d);
        if self.op.kind != Kind::None {
            let width = s.sum.len() / n;
            cpu::vectorised(
                #[inline(always)]
                || {
                    for i in 0..n {
                        for c in 0..d {
                            let w = if width == 1 { 0 } else { c };
                            let g = s.sum[i * width + w];
                            let (up, down) = (cpu::exp(g), cpu::exp(s.sum[(n - 1) * width + w] - g));
                            s.dq[i * d + c] *= up;
                            s.row[i * d + c] *= up;
                            s.col[i * d + c] *= down;
                            s.end[c] += s.col[i * d + c] * s.k[i * d + c];
                        }
                    }
                    for c in 0..d {
                        let e = cpu::exp(s.sum[(n - 1) * width + if width == 1 { 0 } else { c }]);
                        s.end[c] += e * cpu::dot(&state[c * d..(c + 1) * d], &ds[c * d..(c + 1) * d]);
                    }
                },
            );
        }
        // dS = e^{G_C} dS' + qdᵀ do - kdᵀ dR
        self.fade(ds, s);
        gemm(MatMut::new(ds, 0, d, d, d), true, 1.0, Mat::new(&s.qd, 0, n, d, d).t(), grad);
        gemm(MatMut::new(ds, 0, d, d, d), true, -1.0, Mat::new(&s.kd, 0, n, d, d).t(), dr_mat);
        s.tmp[0] = dr;
        self.products_back(s);
    }

    /// Adds what dM and dP give to the gradients of q and k.
    fn products_back(&self, s: &mut Scratch) {
        let (d, n) = (self.dim(), s.rows);
        if self.op.kind != Kind::Key {
            let sum = if self.op.kind == Kind::Head { Some(&s.sum[..]) } else { None };
            decay_pairs(sum, n, &mut s.dm, &mut s.dp);
            let (q, k) = (Mat::new(&s.q, 0, n, d, d), Mat::new(&s.k, 0, n, d, d));
            let (dp, dm) = (Mat::new(&s.dp, 0, n, n, n), Mat::new(&s.dm, 0, n, n, n));
            gemm(MatMut::new(&mut s.dq, 0, n, d, d), true, 1.0, dp, k);
            gemm(MatMut::new(&mut s.row, 0, n, d, d), true, 1.0, dm, k);
            gemm(MatMut::new(&mut s.col, 0, n, d, d), true, 1.0, dm.t(), k);
            gemm(MatMut::new(&mut s.col, 0, n, d, d), true, 1.0, dp.t(), q);
            return;
        }
        let mut part = Vec::new();
        for from in (0..n).step_by(BLOCK) {
            let to = (from + BLOCK).min(n);
            let rows = to - from;
            if from > 0 {
                self.scale_block(s, from, to);
                let (dp, dm) = (Mat::new(&s.dp, from * n, rows, from, n), Mat::new(&s.dm, from * n, rows, from, n));
                let edge = (from - 1) * d;
                for (gradient, out) in [(dp, &mut s.dq), (dm, &mut s.row)] {
                    zeros(&mut part, rows * d);
                    gemm(
                        MatMut::new(&mut part, 0, rows, d, d),
                        false,
                        1.0,
                        gradient,
                        Mat::new(&s.tmp[2], 0, from, d, d),
                    );
                    for i in 0..rows {
                        for c in 0..d {
                            let e = cpu::exp(s.sum[(from + i) * d + c] - s.sum[edge + c]);
                            out[(from + i) * d + c] += part[i * d + c] * e;
                        }
                    }
                }
                zeros(&mut part, from * d);
                gemm(MatMut::new(&mut part, 0, from, d, d), false, 1.0, dp.t(), Mat::new(&s.tmp[0], 0, rows, d, d));
                gemm(MatMut::new(&mut part, 0, from, d, d), true, 1.0, dm.t(), Mat::new(&s.tmp[1], 0, rows, d, d));
                for j in 0..from {
                    for c in 0..d {
                        s.col[j * d + c] += part[j * d + c] * cpu::exp(s.sum[edge + c] - s.sum[j * d + c]);
                    }
                }
            }
            cpu::vectorised(
                #[inline(always)]
                || {
                    for i in from..to {
                        for j in from..=i {
                            let (p, m) = (s.dp[i * n + j], s.dm[i * n + j]);
                            let (gi, gj) = (&s.sum[i * d..(i + 1) * d], &s.sum[j * d..(j + 1) * d]);
                            let (qi, ki) = (&s.q[i * d..(i + 1) * d], &s.k[i * d..(i + 1) * d]);
                            let kj = &s.k[j * d..(j + 1) * d];
                            let (dq, row) = (&mut s.dq[i * d..(i + 1) * d], &mut s.row[i * d..(i + 1) * d]);
                            let col = &mut s.col[j * d..(j + 1) * d];
                            for c in 0..d {
                                let e = cpu::exp(gi[c] - gj[c]);
                                dq[c] += p * kj[c] * e;
                                row[c] += m * kj[c] * e;
                                col[c] += (p * qi[c] + m * ki[c]) * e;
                            }
                        }
                    }
                },
            );
        }
    }

    /// Writes a chunk's gradients: sums of dG from the end, lengths of q and k.
    fn collect(&self, b: usize, h: usize, start: usize, out: &[Shared; 3], s: &mut Scratch) {
        let (d, n, rule) = (self.dim(), s.rows, &self.op.rule);
        let count = self.beta.len();
        let (key, value) = self.key_value(h);
        for i in (0..n).rev() {
            let span = i * d..(i + 1) * d;
            let (q, k) = (&s.q[span.clone()], &s.k[span.clone()]);
            let (dq, row, col) = (&s.dq[span.clone()], &s.row[span.clone()], &s.col[span.clone()]);
            let at = self.own(b, start + i, h, 1);
            // SAFETY (all): positions of (b, h), and of its key head, belong to this task alone.
            unsafe {
                out[1].row(at, 1)[0] = cpu::dot(&s.x[span.clone()], &s.y[span.clone()]);
                if self.op.kind != Kind::None {
                    for c in 0..d {
                        s.end[c] += q[c] * dq[c] + k[c] * (row[c] - col[c]);
                    }
                }
                match self.op.kind {
                    Kind::None => (),
                    Kind::Head => out[1].row(count + at, 1)[0] = s.end.iter().sum(),
                    Kind::Key => out[2].row(at * d, d).copy_from_slice(&s.end),
                }
                let dk: Vec<f32> = row.iter().zip(col).map(|(a, b)| a + b).collect();
                let through = |out: &mut [f32], x: &[f32], dx: &[f32], norm: f32| {
                    let along = if rule.normalize { cpu::dot(x, dx) } else { 0.0 };
                    for c in 0..d {
                        out[c] += norm * (dx[c] - along * x[c]);
                    }
                };
                through(out[0].row(self.at(b, start + i, h), d), q, dq, s.q_norm[i]);
                through(out[0].row(self.at(b, start + i, key), d), k, &dk, s.k_norm[i]);
                let dv = out[0].row(self.at(b, start + i, value), d);
                for (dv, x) in dv.iter_mut().zip(&s.x[span]) {
                    *dv += s.beta[i] * x;
                }
            }
        }
    }
}

/// Both matrices [n, n] times e^{G_i - G_j}, the first kept strictly below the diagonal, the second with it.
fn decay_pairs(sum: Option<&[f32]>, n: usize, strict: &mut [f32], lower: &mut [f32]) {
    cpu::vectorised(
        #[inline(always)]
        || {
            for i in 0..n {
                let (m, p) = (&mut strict[i * n..(i + 1) * n], &mut lower[i * n..(i + 1) * n]);
                if let Some(sum) = sum {
                    for j in 0..i {
                        let e = cpu::exp(sum[i] - sum[j]);
                        m[j] *= e;
                        p[j] *= e;
                    }
                }
                m[i..].fill(0.0);
                p[i + 1..].fill(0.0);
            }
        },
    );
}

/// out = rows of `x` [n, d], each times its factor.
fn times_rows(out: &mut Vec<f32>, x: &[f32], factors: &[f32], d: usize) {
    out.clear();
    for (row, f) in x.chunks(d).zip(factors) {
        out.extend(row.iter().map(|x| x * f));
    }
}
