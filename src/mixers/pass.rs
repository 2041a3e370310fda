//! One formula, three forms: a [`Linear`](super::linear::Linear) writes its layer once, in terms of what a [`Pass`] offers,
//! and the pass decides how it is computed.
//!
//! | pass | computes | with |
//! |---|---|---|
//! | `Whole` | a sequence from its beginning: training | chunkwise ops, linear in time |
//! | `Continue` | the tokens behind those in a state: prefill and decoding | the same ops from the state, or one step |
//! | `Definition` | a sequence, token by token and with T x T windows | the oracle |
//! | `Weights` | the same for `v` = the T x T identity | attention weights, since everything here is linear in `v` |

use candle_core::{D, DType, Result, Tensor};

use super::{Heads, PIECE, State};
use crate::ops::delta_rule::{Decay, DeltaRule};
use crate::ops::gated_linear_attn::GatedLinearAttn;
use crate::ops::mix::mix;
use crate::ops::softmax_attn::{SoftmaxAttn, bend, causal_mask, repeat_kv};
use crate::ops::wide;

/// How a formula is computed.
pub enum Pass<'a> {
    Whole,
    Continue(&'a mut State),
    Definition,
    /// With the part of the weights that belongs to a window inside the formula, once that is known.
    Weights(Option<Tensor>),
}

/// A softmax window of some rows, and what leaves it.
pub struct Window {
    /// Σ exp(s - top) v / mass: [B, T, H, V].
    pub y: Tensor,
    /// Largest score of the row, [B, T, H].
    pub top: Tensor,
    /// Σ exp(s - top) over the window, [B, T, H].
    pub mass: Tensor,
    /// Rotated key [B, T, Hkv, D] and value [B, T, H, V] that left the window at each position; zeros where none did.
    pub left: (Tensor, Tensor),
    /// 1 where a key has left, [1, T, 1, 1].
    pub has_left: Tensor,
}

impl Pass<'_> {
    /// Where weights are asked for, remembers which of them are a window's, [B, T, H, T].
    pub fn of_window(&mut self, part: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        if let Pass::Weights(window) = self {
            *window = Some(part()?);
        }
        Ok(())
    }

    /// Tokens before this pass.
    pub fn seen(&self) -> usize {
        match self {
            Pass::Continue(state) => state.seen,
            _ => 0,
        }
    }

    /// `S_t = e^{g_t} S + k vᵀ`, `y = scale qᵀ S` ([`crate::ops::gated_linear_attn`]): q, k [B, T, H, K], v [B, T, H, V],
    /// log gates [B, T, H], [B, T, H, K or V] or `[H]`; the state is kept under `name`.
    pub fn gated(
        &mut self,
        name: &'static str,
        op: GatedLinearAttn,
        [q, k, v]: [&Tensor; 3],
        gates: &Tensor,
    ) -> Result<Tensor> {
        match self {
            Pass::Whole => Ok(op.forward(q, k, v, gates, None)?.0),
            Pass::Definition | Pass::Weights(_) => Ok(op.recurrent(q, k, v, gates, None)?.0),
            Pass::Continue(state) => {
                let before = state.tensors.get(name);
                let (y, after) = match before {
                    Some(before) if q.dim(1)? == 1 => {
                        let one = |x: &Tensor| x.squeeze(1);
                        let gates = if gates.rank() == 1 { gates.clone() } else { one(gates)? };
                        let (y, after) = op.step(&one(q)?, &one(k)?, &one(v)?, &gates, before)?;
                        (y.unsqueeze(1)?, after)
                    }
                    before => op.forward(q, k, v, gates, before)?,
                };
                state.tensors.insert(name, after);
                Ok(y)
            }
        }
    }

    /// The same with weights that sum to 1: the state also counts, and divides by its count where that is at least
    /// `least`. The scale of `op` cancels.
    pub fn normalised(
        &mut self,
        name: &'static str,
        op: GatedLinearAttn,
        [q, k, v]: [&Tensor; 3],
        gates: &Tensor,
        least: f64,
    ) -> Result<Tensor> {
        let (sum, count) = self.counted(name, op, [q, k, v], gates)?;
        mix(&[&sum], &wide_of(&count)?.maximum(least)?.recip()?.transpose(2, 3)?)
    }

    /// `Σ a_ij v_j` [B, T, H, V] and `Σ a_ij` [B, T, H, 1], a_ij = scale e^{G_i - G_j} q_i·k_j. The count is one more column of
    /// the values; on a GPU, whose kernels are made for whole heads, it is a state of its own, `z`.
    pub fn counted(
        &mut self,
        name: &'static str,
        op: GatedLinearAttn,
        [q, k, v]: [&Tensor; 3],
        gates: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        if let Pass::Whole = self {
            return op.counted(q, k, v, gates);
        }
        let (width, one) = (v.dim(3)?, v.narrow(3, 0, 1)?.ones_like()?);
        if v.device().is_cuda() {
            return Ok((self.gated(name, op, [q, k, v], gates)?, self.gated("z", op, [q, k, &one], gates)?));
        }
        let y = self.gated(name, op, [q, k, &Tensor::cat(&[v, &one], 3)?], gates)?;
        Ok((y.narrow(3, 0, width)?, y.narrow(3, width, 1)?))
    }

    /// The delta rule of `op` ([`crate::ops::delta_rule`]): q [B, T, H, D], k [B, T, Hkv, D], v [B, T, H, V], β [B, T, H];
    /// the state is kept under `name`.
    pub fn delta(
        &mut self,
        name: &'static str,
        op: DeltaRule,
        [q, k, v]: [&Tensor; 3],
        beta: &Tensor,
        decay: Decay,
    ) -> Result<Tensor> {
        if let Pass::Definition | Pass::Weights(_) = self {
            return op.recurrent(q, k, v, beta, decay);
        }
        let group = op.heads / op.kv_heads;
        let k = repeat(k, group)?;
        let (op, qkv) = (DeltaRule { kv_heads: op.heads, ..op }, Tensor::cat(&[q, &k, v], 2)?);
        let Pass::Continue(state) = self else { return op.forward(&qkv, beta, decay, None) };
        let (y, after) = match state.tensors.get(name) {
            Some(before) if q.dim(1)? == 1 => op.step(&qkv, beta, decay, before)?,
            before => op.forward_with_state(&qkv, beta, decay, before)?,
        };
        state.tensors.insert(name, after);
        Ok(y)
    }

    /// `x` [B, T, ..] with the `rows` rows before it in front, [B, rows + T, ..]; zeros before the first. The last
    /// `rows` are kept under `name`.
    pub fn behind(&mut self, name: &'static str, x: &Tensor, rows: usize) -> Result<Tensor> {
        if rows == 0 {
            return Ok(x.clone());
        }
        let Pass::Continue(state) = self else { return x.pad_with_zeros(1, rows, 0) };
        let all = match state.tensors.get(name) {
            Some(before) => Tensor::cat(&[before, x], 1)?,
            None => x.pad_with_zeros(1, rows, 0)?,
        };
        state.tensors.insert(name, all.narrow(1, x.dim(1)?, rows)?.copy()?);
        Ok(all)
    }

    /// Sums over the last `rows` positions, the own one included, of `x` [B, T, ..]: by doubling, so that nothing is
    /// lost in a long running sum.
    pub fn recent(&mut self, name: &'static str, x: &Tensor, rows: usize) -> Result<Tensor> {
        let time = x.dim(1)?;
        if rows == 0 {
            return x.zeros_like();
        }
        // `run` sums `span` rows ending at each row; `sum` covers the rows of the set bits so far.
        let mut run = self.behind(name, x, rows - 1)?;
        let (mut span, mut covered, mut sum) = (1, 0, None::<Tensor>);
        loop {
            let back = |x: &Tensor, by: usize| match by {
                0 => Ok(x.clone()),
                _ => x.narrow(1, 0, x.dim(1)?.saturating_sub(by))?.pad_with_zeros(1, by.min(x.dim(1)?), 0),
            };
            if rows & span != 0 {
                let part = back(&run, covered)?;
                covered += span;
                sum = Some(sum.map_or(Ok(part.clone()), |s| s + part)?);
            }
            if covered == rows {
                break;
            }
            run = (&run + back(&run, span)?)?;
            span *= 2;
        }
        sum.map_or_else(|| x.zeros_like(), |s| s.narrow(1, s.dim(1)? - time, time))
    }

    /// The largest of `x` [B, T, H] up to each position, and up to the position before (at the first, its own).
    pub fn running_max(&mut self, name: &'static str, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let time = x.dim(1)?;
        let first = x.narrow(1, 0, 1)?;
        let before = match self {
            Pass::Continue(state) => state.tensors.get(name).cloned(),
            _ => None,
        };
        let all = Tensor::cat(&[before.as_ref().unwrap_or(&first), x], 1)?; // [B, 1 + T, H]
        let (mut top, mut span) = (all, 1);
        while span <= time {
            let (head, tail) = (top.narrow(1, 0, span)?, top.narrow(1, span, time + 1 - span)?);
            top = Tensor::cat(&[head, tail.maximum(&top.narrow(1, 0, time + 1 - span)?)?], 1)?;
            span *= 2;
        }
        if let Pass::Continue(state) = self {
            state.tensors.insert(name, top.narrow(1, time, 1)?.copy()?);
        }
        Ok((top.narrow(1, 1, time)?, top.narrow(1, 0, time)?))
    }

    /// y of [`Pass::window`] alone: of a whole sequence it is the op that softmax layers use.
    pub fn beside(&mut self, x: &Heads, size: usize, v: &Tensor) -> Result<Tensor> {
        if let Pass::Whole = self {
            return window_of(x, size).forward(x.rotated()?);
        }
        Ok(self.window(x, size, v)?.y)
    }

    /// Softmax of rotated queries over the last `size` keys, self included. `v` [B, T, H, V] are the values of `x`, in the
    /// definition any others.
    pub fn window(&mut self, x: &Heads, size: usize, v: &Tensor) -> Result<Window> {
        let qkv = x.rotated()?;
        let (h, g) = (x.heads, x.kv_heads);
        let time = qkv.dim(1)?;
        let k = qkv.narrow(2, h, g)?;
        let attn = window_of(x, size);
        let seen = self.seen();
        let waiting = size.saturating_sub(seen).min(time);
        let rows = |value: fn(_, _, _) -> Result<Tensor>, n| value((1, n, 1, 1), qkv.dtype(), qkv.device());
        let has_left = match waiting {
            0 => rows(Tensor::ones, time)?,
            _ if waiting == time => rows(Tensor::zeros, time)?,
            _ => rows(Tensor::ones, time - waiting)?.pad_with_zeros(1, waiting, 0)?,
        };
        let first = |x: &Tensor| x.narrow(1, 0, time);
        let (y, top, mass, left) = match self {
            Pass::Whole => {
                let (y, top, mass) = attn.forward_with_mass(qkv)?;
                let left = (first(&k.pad_with_zeros(1, size, 0)?)?, first(&v.pad_with_zeros(1, size, 0)?)?);
                (y, top, mass, left)
            }
            Pass::Definition | Pass::Weights(_) => {
                let (y, top, mass) = band(x, &qkv.narrow(2, 0, h)?, &k, v, size, 0)?;
                let left = (first(&k.pad_with_zeros(1, size, 0)?)?, first(&v.pad_with_zeros(1, size, 0)?)?);
                (y, top, mass, left)
            }
            Pass::Continue(_) => {
                let held = seen.min(size);
                let own = qkv.narrow(2, h + g, g)?;
                let keys = self.behind("k", &k, size)?;
                let values = self.behind("v", &own, size)?; // [B, size + T, Hkv, D]
                let left = (first(&keys)?, repeat(&first(&values)?, h / g)?);
                let (y, top, mass) = if seen == 0 {
                    attn.forward_with_mass(qkv)?
                } else {
                    let wide = repeat(&values, h / g)?;
                    let mut parts = Vec::new();
                    for from in (0..time).step_by(PIECE) {
                        let n = PIECE.min(time - from);
                        // Rows before the first token are left out; keys reach back `size` at most.
                        let start = (size - held).max(from);
                        let cut = |x: &Tensor| x.narrow(1, start, size + from + n - start);
                        let q = qkv.narrow(2, 0, h)?.narrow(1, from, n)?;
                        parts.push(band(x, &q, &cut(&keys)?, &cut(&wide)?, size, size + from - start)?);
                    }
                    let join = |f: fn(&(Tensor, Tensor, Tensor)) -> &Tensor| {
                        Tensor::cat(&parts.iter().map(f).collect::<Vec<_>>(), 1)
                    };
                    (join(|p| &p.0)?, join(|p| &p.1)?, join(|p| &p.2)?)
                };
                (y, top, mass, left)
            }
        };
        Ok(Window { y, top, mass, left, has_left })
    }
}

/// Softmax attention over the last `size` keys of these heads.
fn window_of(x: &Heads, size: usize) -> SoftmaxAttn {
    let softcap = x.softcap.map(|cap| cap as f32);
    SoftmaxAttn { heads: x.heads, kv_heads: x.kv_heads, window: Some(size), softcap }
}

/// Softmax of `q` [B, n, H, D] over `k` [B, past + n, Hkv, D] and `v` [B, past + n, H, V], at most `size` keys a row: y, the
/// largest score and the mass, as [`SoftmaxAttn::forward_with_mass`] gives them.
fn band(x: &Heads, q: &Tensor, k: &Tensor, v: &Tensor, size: usize, past: usize) -> Result<(Tensor, Tensor, Tensor)> {
    let (_, n, _, dim) = q.dims4()?;
    let dtype = wide(q.dtype());
    let by_head = |x: &Tensor| x.to_dtype(dtype)?.transpose(1, 2)?.contiguous();
    let (q, k, v) = (by_head(q)?, repeat_kv(&by_head(k)?, x.heads / x.kv_heads)?, by_head(v)?);
    let mask = causal_mask(n, past + n, Some(size), q.device())?.to_dtype(dtype)?;
    let scores = (q.matmul(&k.t()?)? * (dim as f64).powf(-0.5))?;
    let scores = x.softcap.map_or(Ok(scores.clone()), |cap| bend(&scores, cap))?.broadcast_add(&mask)?;
    let top = scores.max_keepdim(D::Minus1)?;
    let weights = scores.broadcast_sub(&top)?.exp()?;
    let mass = weights.sum_keepdim(D::Minus1)?;
    let y = weights.broadcast_div(&mass)?.matmul(&v)?;
    let rows = |x: &Tensor| x.squeeze(3)?.transpose(1, 2)?.contiguous();
    let y = y.transpose(1, 2)?.contiguous()?.to_dtype(x.qkv.dtype())?;
    Ok((y, rows(&top)?, rows(&mass)?))
}

/// [B, T, Hkv, D] -> [B, T, Hkv * group, D]: query head h reads key head h / group.
pub fn repeat(x: &Tensor, group: usize) -> Result<Tensor> {
    let (b, t, g, d) = x.dims4()?;
    match group {
        1 => Ok(x.clone()),
        _ => x.unsqueeze(3)?.broadcast_as((b, t, g, group, d))?.reshape((b, t, g * group, d)),
    }
}

/// In at least f32.
pub fn wide_of(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(wide(x.dtype()))
}

/// The identity as values of `time` keys, [B, T, H, T]: what makes outputs of the definition weights.
pub fn unit_values(b: usize, time: usize, heads: usize, dtype: DType, like: &Tensor) -> Result<Tensor> {
    Tensor::eye(time, dtype, like.device())?
        .reshape((1, time, 1, time))?
        .broadcast_as((b, time, heads, time))?
        .contiguous()
}
