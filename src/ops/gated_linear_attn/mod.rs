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
//! With [`Exponents::Recentred`] (Lizard, arXiv 2507.09025) a chunk is one product, `A = scale (q e^c)(k e^-c)ᵀ` below the
//! diagonal, c_i = G_i - G_1, in plain tensor operations. The step and the recurrence are the same.
//!
//! Gates per value channel need no code of their own: with `A` for `q_i`, `k_j` and their decay the sum
//! `Σ A_ij (v_j·y_i)` gives the result above as its derivative by y, and by q the form with gated values, where y, v, k
//! stand for queries, keys and values. So that result is a ∂q, and its gradients are a result and the other gradients.

mod cpu;
#[cfg(feature = "cuda")]
mod gpu;

use candle_core::{D, Result, Tensor, bail};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Smallest gate: its exponential is 0 in f32, and sums of a chunk of such gates keep their precision.
pub const LOWEST: f64 = -128.0;

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
    pub exponents: Exponents,
}

/// How decays between the rows of a chunk are formed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Exponents {
    /// Of differences, pair by pair, never positive.
    #[default]
    Pairwise,
    /// Folded into queries and keys of at most 64 rows, from the first of them on, so that weights are one product. Log
    /// decays below -1 count as -1, since a key's exponent grows with every row.
    Recentred,
}

impl Exponents {
    /// Smallest gate that the sums of a chunk stay within f32 with: mixers raise theirs to it.
    pub fn floor(self) -> f64 {
        match self {
            Exponents::Pairwise => LOWEST,
            Exponents::Recentred => -1.0,
        }
    }
}

impl GatedLinearAttn {
    pub const UNSCALED: Self = GatedLinearAttn { scale: 1.0, gated: Channels::Keys, exponents: Exponents::Pairwise };

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

    /// The same with what weights sum to: `Σ a_ij v_j` [B, T, H, V] and `Σ a_ij` [B, T, H, 1],
    /// a_ij = scale e^{G_i - G_j} q_i·k_j. The count is one more column of the values, where it has no kernel of its own.
    pub fn counted(&self, q: &Tensor, k: &Tensor, v: &Tensor, gates: &Tensor) -> Result<(Tensor, Tensor)> {
        let gates = &by_row(gates, q)?;
        #[cfg(feature = "cuda")]
        if self.exponents == Exponents::Pairwise && gpu::counts(self, q, v, gates) {
            let (y, count) = gpu::counted(self, q, k, v, gates)?;
            return Ok((y, count.unsqueeze(3)?));
        }
        let (width, one) = (v.dim(3)?, v.narrow(3, 0, 1)?.ones_like()?);
        if v.device().is_cuda() {
            let count = self.forward(q, k, &one, gates, None)?.0;
            return Ok((self.forward(q, k, v, gates, None)?.0, count));
        }
        let y = self.forward(q, k, &Tensor::cat(&[v, &one], 3)?, gates, None)?.0;
        Ok((y.narrow(3, 0, width)?, y.narrow(3, width, 1)?))
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
        let gates = by_row(gates, q)?;
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
        let pairwise = self.exponents == Exponents::Pairwise;
        if !pairwise && self.gated == Channels::Values {
            bail!("gates of value channels have pairwise exponents only")
        }
        #[cfg(feature = "cuda")]
        if pairwise && gpu::ready(self, q, v, &gates) {
            return gpu::forward(self, q, k, v, &gates, initial, bounds);
        }
        if pairwise && super::fast(q) {
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
        let decay = wide(gates)?.maximum(self.exponents.floor())?.exp()?;
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

    /// The chunkwise form in plain tensor operations, in f32 or wider.
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
        let gates = by_head(gates)?.maximum(self.exponents.floor())?;
        let gates = if per_channel { gates } else { gates.unsqueeze(3)? };
        // Pair by pair a chunk with gates per channel holds [B, H, rows, rows, K] exponentials.
        let recentred = self.exponents == Exponents::Recentred;
        let chunk = if per_channel && !recentred { 16 } else { 64 };
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
            let gaps = || match per_channel {
                true => {
                    let gaps = sums.unsqueeze(3)?.broadcast_sub(&sums.unsqueeze(2)?)?; // [B, H, n, n, channels]
                    gaps.broadcast_add(&outside.unsqueeze(2)?)?.exp()
                }
                false => sums.broadcast_sub(&sums.transpose(2, 3)?)?.broadcast_add(&outside)?.exp(), // [B, H, n, n]
            };
            if per_channel && self.gated == Channels::Values {
                let weights = q.matmul(&k.t()?)?.unsqueeze(4)?;
                let inside = gaps()?.broadcast_mul(&weights)?.broadcast_mul(&v.unsqueeze(2)?)?.sum(3)?;
                rows.push((inside + (q.matmul(&state)? * decay)?)?);
                state = (state.broadcast_mul(&last.exp()?)? + k.t()?.matmul(&(v * rest)?)?)?;
                continue;
            }
            let weights = if recentred {
                let from_first = sums.broadcast_sub(&sums.narrow(2, 0, 1)?)?;
                let (q, k) = (q.broadcast_mul(&from_first.exp()?)?, k.broadcast_mul(&from_first.neg()?.exp()?)?);
                q.matmul(&k.t()?)?.broadcast_mul(&causal)?
            } else if per_channel {
                gaps()?.broadcast_mul(&q.unsqueeze(3)?)?.broadcast_mul(&k.unsqueeze(2)?)?.sum(D::Minus1)?
            } else {
                (q.matmul(&k.t()?)? * gaps()?)?
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
}

/// Constant gates `[H]` as those of every row of `q`, [B, T, H]; others as they are.
fn by_row(gates: &Tensor, q: &Tensor) -> Result<Tensor> {
    let (b, t, h, _) = q.dims4()?;
    if gates.rank() == 1 { gates.reshape((1, 1, h))?.broadcast_as((b, t, h)) } else { Ok(gates.clone()) }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::super::check::{INPUTS, check, input};
    use super::*;

    pub(super) const KINDS: [&str; 5] = ["usual", "soft", "strong", "cut", "none"];

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
        sized(kind, gate_kind, [2, time, 3, 6, 5], place)
    }

    /// q, k, v, gates, states for [B, T, H, K, V].
    pub(super) fn sized(kind: &str, gate_kind: &str, dims: [usize; 5], place: (bool, Channels)) -> [Tensor; 5] {
        let [b, time, h, k, v] = dims;
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

    const OP: GatedLinearAttn = GatedLinearAttn { scale: 0.4, ..GatedLinearAttn::UNSCALED };

    /// The places of gates: per head, per key channel, per value channel.
    pub(super) const PLACES: [(bool, Channels); 3] =
        [(false, Channels::Keys), (true, Channels::Keys), (true, Channels::Values)];

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

    /// The reparametrised form against the recurrence: gates down to -1, chunks whose exponents add up to 63.
    #[test]
    fn recentred_chunks_equal_recurrence() {
        let op = GatedLinearAttn { exponents: Exponents::Recentred, ..OP };
        for place in &PLACES[..2] {
            for kind in KINDS {
                for time in [1, 63, 64, 65, 130] {
                    let what = format!("{kind}, {time}, {place:?}");
                    let [q, k, v, g, s] = inputs("randn", kind, time, *place);
                    let (wanted, last) = op.recurrent(&q, &k, &v, &g, Some(&s)).unwrap();
                    let raised = g.maximum(-1.0).unwrap();
                    near(&what, &OP.recurrent(&q, &k, &v, &raised, Some(&s)).unwrap().0, &wanted, 1e-12);
                    let f32s = [&q, &k, &v, &g, &s].map(|x| x.to_dtype(DType::F32).unwrap());
                    let [q, k, v, g, s] = &f32s;
                    let (y, end) = op.forward(q, k, v, g, Some(s)).unwrap();
                    near(&what, &y, &wanted, 1e-5);
                    near(&what, &end, &last, 1e-5);
                }
                let x = inputs("randn", kind, 130, *place);
                check(&format!("{kind}, {place:?}"), &x, 5e-5, |x| {
                    let op = if x[0].dtype() == DType::F64 { OP } else { op };
                    let gates = x[3].maximum(-1.0)?;
                    Ok(op.forward(&x[0], &x[1], &x[2], &gates, Some(&x[4]))?.0)
                });
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
