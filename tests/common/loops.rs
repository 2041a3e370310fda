//! The definitions of attention as loops over plain f64 arrays, token by token. They are the truth that the fast forms
//! are held to: never optimised, and written without a look at those forms.

use std::collections::VecDeque;

/// Which keys of a token get softmax weights.
#[derive(Debug, Clone, Copy)]
pub enum Keys {
    /// None: all keys, the token's own among them, are linear.
    Linear,
    /// The last `n`.
    Sliding(usize),
    /// Those of the token's block of `n` and of the block before it.
    Terraced(usize),
}

/// Window and linear attention under one denominator, in its recurrent form.
pub struct Hybrid {
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub keys: Keys,
    pub affine: bool,
}

impl Hybrid {
    /// `qkv` [T, H + 2 Hkv, D] rotated, `phi` [T, 2 H, F], `factors` [H] before the sigmoid -> [T, H, D].
    pub fn run(&self, qkv: &[f64], phi: &[f64], factors: &[f64]) -> Vec<f64> {
        let Hybrid { heads, kv_heads, dim, .. } = *self;
        let packed = heads + 2 * kv_heads;
        let time = qkv.len() / (packed * dim);
        let width = phi.len() / (time * 2 * heads);
        let row = |t: usize, head: usize| &qkv[(t * packed + head) * dim..][..dim];
        let feature = |t: usize, map: usize| &phi[(t * 2 * heads + map) * width..][..width];
        let mut y = vec![0.0; time * heads * dim];
        for h in 0..heads {
            let (key, value) = (heads + h / (heads / kv_heads), heads + kv_heads + h / (heads / kv_heads));
            let sigma = 1.0 / (1.0 + (-factors[h]).exp());
            let lambda = if self.affine { 1.0 - sigma } else { 1.0 };
            let (mut s, mut z) = (vec![0.0; width * dim], vec![0.0; width]);
            let mut ring = VecDeque::new();
            for t in 0..time {
                ring.push_back(t);
                let leaving = match self.keys {
                    Keys::Linear => 1,
                    Keys::Sliding(n) => ring.len().saturating_sub(n),
                    Keys::Terraced(n) if t % n == 0 && t >= 2 * n => n,
                    Keys::Terraced(_) => 0,
                };
                for p in ring.drain(..leaving) {
                    for f in 0..width {
                        z[f] += feature(p, heads + h)[f];
                        for d in 0..dim {
                            s[f * dim + d] += feature(p, heads + h)[f] * row(p, value)[d];
                        }
                    }
                }
                let (mut num, mut den) = (vec![0.0; dim], 0.0);
                let scores: Vec<f64> =
                    ring.iter().map(|p| dot(row(t, h), row(*p, key)) / (dim as f64).sqrt()).collect();
                let top = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
                for (p, score) in ring.iter().zip(&scores) {
                    let weight = sigma * (score - top).exp();
                    den += weight;
                    (0..dim).for_each(|d| num[d] += weight * row(*p, value)[d]);
                }
                den += lambda * dot(feature(t, h), &z);
                for d in 0..dim {
                    let linear: f64 = (0..width).map(|f| feature(t, h)[f] * s[f * dim + d]).sum();
                    y[(t * heads + h) * dim + d] = (num[d] + lambda * linear) / f64::max(den, 1e-12);
                }
            }
        }
        y
    }
}

/// Turns the pairs (x_d, x_{d + D/2}) of a head at `position` by `position * inverse_frequencies[d]`.
pub fn rotate(head: &mut [f64], position: usize, inverse_frequencies: &[f64]) {
    let half = head.len() / 2;
    for (d, frequency) in inverse_frequencies.iter().enumerate() {
        let (sin, cos) = (position as f64 * frequency).sin_cos();
        let (a, b) = (head[d], head[d + half]);
        head[d] = a * cos - b * sin;
        head[d + half] = b * cos + a * sin;
    }
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
