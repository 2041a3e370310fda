//! The one-token step of a layer that is linear in its values ([`crate::mixers::linear`]), as one kernel:
//! `kernels/decode_linear.cu`. What gates read of the layer's input is a product before it ([`Reads`]).
//!
//! A mixer fills in a [`Linear`] from its tensors and its state; parts that mixers share fill in theirs.

use std::ffi::{c_int, c_void};
use std::ptr::null;

use candle_core::{DType, Device, Result, Tensor, bail};

use super::{Fixed, Token, ring, writable};
use crate::families::Architecture;
use crate::mixers::State;
use crate::ops::cuda::{launch, pointer};
use crate::ops::gated_linear_attn::LOWEST;

/// Features of a query or a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Map {
    SoftmaxDim = 0,
    ExpDim = 1,
    Relu = 2,
    Elu = 3,
    Softmax = 4,
    Identity = 5,
    Silu = 6,
    /// x / sqrt(|x|² + 1e-6)
    Unit = 7,
    /// What the gate lets go, (1 - b) σ(-x): a key of HGRN2.
    Released = 8,
    Exp = 9,
}

/// Where log decays come from; see [`crate::mixers::parts::gate::GateKind`].
#[derive(Debug, Default)]
pub enum Decay {
    #[default]
    Keep,
    /// f32 `[H]`
    Fixed(Tensor),
    /// Bias f32 `[1]` or `[H]`, logits at this column.
    Scalar(Tensor, usize),
    /// Bias and factor f32 `[H]`, logits at this column.
    StepSize(Tensor, Tensor, usize),
    /// Bias f32 [Hkv width], matrix f32 [Hkv width, rank], inner numbers at this column.
    LowRank(Tensor, Tensor, usize),
    Pooled,
    /// Logit f32 `[H]` of the lower bound.
    Bounded(Option<Tensor>),
}

/// What becomes of the state.
#[derive(Debug, Default)]
pub enum Rule {
    #[default]
    Gated,
    /// Bias f32 `[H]` of the write strength, logits at this column.
    Delta(Tensor, usize),
    /// Keys of the slots f32 [B, H, D, M]; the state holds their values.
    Slots(Tensor),
    /// Sums of values f32 [B, H, D].
    Magnitude(Tensor),
    /// Sums of queries f32 [B, H, F] and largest exponents [B, H].
    Augmented(Tensor, Tensor),
}

/// A ring of rotated keys and values, bf16 [B, window + 1, Hkv, D].
#[derive(Debug)]
pub struct Window {
    pub size: usize,
    pub rotary: bool,
    k: Tensor,
    v: Tensor,
}

/// The softmax window of a layer.
#[derive(Debug, Default)]
pub enum Joined {
    #[default]
    Alone,
    /// Weights f32 [2, H]; logits that scale them at this column.
    Beside(Window, Tensor, Option<usize>),
    /// Factors before the sigmoid f32 `[H]`, sinks `[m]`, log decays f32 [B, window, H, 1 or F], affine.
    Shared(Window, Tensor, Option<Tensor>, Tensor, bool),
    /// Weights f32 `[H]`, sinks `[m]`.
    Anchored(Window, Tensor, Option<Tensor>),
}

/// Short convolutions: filters f32 [channels, taps] and the rows that they look back on, [B, taps, H + 2 Hkv, D].
#[derive(Debug)]
pub struct Conv {
    pub q: Option<Tensor>,
    pub k: Option<Tensor>,
    pub v: Option<Tensor>,
    /// Every query head has a filter of its own for keys.
    pub own_keys: bool,
    pub taps: usize,
    rows: Tensor,
}

/// Norm and gate of the output.
#[derive(Debug, Default)]
pub struct Finish {
    /// f32 [H, D]
    pub norm: Option<Tensor>,
    /// Bias f32 [H D], logits at this column, and whether the curve is silu.
    pub gate: Option<(Tensor, usize, bool)>,
}

/// Rows that the step wants multiplied with the layer's input.
#[derive(Debug, Default)]
pub struct Reads {
    fine: Vec<Tensor>,
    coarse: Vec<Tensor>,
}

impl Reads {
    fn rows(list: &[Tensor]) -> usize {
        list.iter().map(|w| w.dims()[0]).sum()
    }

    /// A weight [n, N] whose products are wanted as if it were f32: its bf16 rounding and the rest. Their first column.
    pub fn fine(&mut self, weight: &Tensor) -> Result<usize> {
        let at = Self::rows(&self.fine);
        self.fine.push(weight.to_dtype(DType::F32)?);
        Ok(at)
    }

    /// A weight [n, N] in bf16; the first column from the end of the fine ones.
    pub fn coarse(&mut self, weight: &Tensor) -> Result<usize> {
        let at = Self::rows(&self.coarse);
        self.coarse.push(weight.to_dtype(DType::BF16)?);
        Ok(at)
    }

    /// All of it, bf16 [2 fine + coarse, N], and how many are fine.
    fn whole(&self) -> Result<(Option<Tensor>, usize)> {
        let fine = Self::rows(&self.fine);
        let mut all = Vec::new();
        if fine > 0 {
            let weight = Tensor::cat(&self.fine, 0)?;
            let near = weight.to_dtype(DType::BF16)?;
            let rest = (weight - near.to_dtype(DType::F32)?)?.to_dtype(DType::BF16)?;
            all.extend([near, rest]);
        }
        all.extend(self.coarse.iter().cloned());
        Ok((if all.is_empty() { None } else { Some(Tensor::cat(&all, 0)?.contiguous()?) }, fine))
    }
}

/// Sizes of a step, and the device: what a mixer makes its tensors for.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    pub batch: usize,
    pub architecture: &'a Architecture,
    pub device: &'a Device,
}

impl Frame<'_> {
    /// A parameter in f32, flat.
    pub fn flat(&self, x: &Tensor) -> Result<Tensor> {
        x.to_dtype(DType::F32)?.flatten_all()?.copy()
    }

    /// A tensor of the state in f32 of this shape; zeros where there is none yet.
    pub fn state(&self, state: &State, name: &str, shape: &[usize]) -> Result<Tensor> {
        match state.tensors.get(name) {
            Some(t) => t.to_dtype(DType::F32)?.reshape(shape)?.copy(),
            None => Tensor::zeros(shape, DType::F32, self.device),
        }
    }

    /// The window of `size` keys that the state holds as `k` and `v`.
    pub fn window(&self, state: &State, size: usize, rotary: bool) -> Result<Window> {
        let a = self.architecture;
        let held = |name| match state.tensors.get(name) {
            // Rows before the first token are zeros.
            Some(t) => {
                let m = t.dim(1)?.min(state.seen);
                ring(Some(&t.narrow(1, t.dim(1)? - m, m)?), state.seen, size + 1, &[self.batch, a.kv_heads, a.head_dim])
            }
            None => Tensor::zeros((self.batch, size + 1, a.kv_heads, a.head_dim), DType::BF16, self.device),
        };
        Ok(Window { size, rotary, k: held("k")?, v: held("v")? })
    }

    /// The last rows of `name` [B, n, ..] as a ring of `slots`, f32.
    pub fn rows(&self, state: &State, name: &str, slots: usize, row: &[usize]) -> Result<Tensor> {
        match state.tensors.get(name) {
            Some(t) => {
                let m = t.dim(1)?.min(state.seen);
                let held = t.narrow(1, t.dim(1)? - m, m)?.to_dtype(DType::F32)?;
                let held = held.reshape([&[self.batch, m], row].concat())?;
                ring(Some(&held), state.seen, slots, &[&[self.batch], row].concat())
            }
            None => Tensor::zeros([&[self.batch, slots], row].concat(), DType::F32, self.device),
        }
    }

    /// Convolutions whose filters and whose names in the state are given, of queries, keys and values.
    pub fn conv(&self, state: &State, filters: [Option<(&Tensor, &str)>; 3], own_keys: bool) -> Result<Option<Conv>> {
        let a = self.architecture;
        let Some(taps) = filters.iter().flatten().map(|(w, _)| w.dim(2)).next().transpose()? else { return Ok(None) };
        let heads = [a.heads, a.kv_heads, a.kv_heads];
        let (mut rows, mut weights) = (Vec::new(), Vec::new());
        for ((filter, heads), which) in filters.into_iter().zip(heads).zip(0..) {
            let row = [if which == 1 && own_keys { a.heads } else { heads }, a.head_dim];
            rows.push(match filter {
                Some((_, name)) => {
                    let held = self.rows(state, name, taps, &row)?;
                    // Query heads of a group look back on the same keys.
                    let group = row[0] / heads;
                    let first: Vec<u32> = (0..heads).map(|h| (h * group) as u32).collect();
                    held.index_select(&Tensor::new(first, self.device)?, 2)?
                }
                None => Tensor::zeros((self.batch, taps, heads, a.head_dim), DType::F32, self.device)?,
            });
            weights.push(filter.map(|(w, _)| w.to_dtype(DType::F32)?.reshape(((), taps))?.copy()).transpose()?);
        }
        let [v, k, q] = [weights.pop().flatten(), weights.pop().flatten(), weights.pop().flatten()];
        Ok(Some(Conv { q, k, v, own_keys, taps, rows: Tensor::cat(&rows, 2)?.contiguous()? }))
    }
}

/// The layer: what [`crate::mixers::linear::Linear`] computes for one token.
pub struct Linear {
    /// Of queries and of keys.
    pub maps: [Map; 2],
    /// bf16 [H, D, C] of both.
    pub weights: Option<[Tensor; 2]>,
    /// Features per key; rows of the state.
    pub width: usize,
    /// Whether maps see rotated queries and keys.
    pub rotary: bool,
    pub conv: Option<Conv>,
    /// silu before the maps, of queries and keys and of values.
    pub silu: [bool; 2],
    pub decay: Decay,
    /// Log decays of the sigmoid kinds are multiplied by this.
    pub tau: f64,
    /// Log decays below it count as that.
    pub lowest: f64,
    pub rule: Rule,
    pub scale: f64,
    /// f32 [B, H, width, D]
    pub s: Tensor,
    /// f32 [B, H, width] where weights are counted.
    pub z: Option<Tensor>,
    /// Whether results are divided by the count.
    pub normalised: bool,
    /// Values are multiplied by the step size of the decay.
    pub written: bool,
    /// What the value itself weighs, f32 `[H]`.
    pub skip: Option<Tensor>,
    pub joined: Joined,
    pub finish: Finish,
    /// What [`Linear::reading`] sets.
    pub read: Option<Tensor>,
    pub fine: usize,
    /// Of the output's norm.
    pub eps: f64,
}

impl Linear {
    /// A gated state of `width` rows that keeps everything, without map, window or norm; `s` of the state.
    pub fn new(at: Frame, state: &State, width: usize) -> Result<Linear> {
        let a = at.architecture;
        let (d, h) = (a.head_dim, a.heads);
        // Of a kernel's block of 512 threads, which hold up to 16 rows of four columns each.
        if !d.is_multiple_of(8) || d > 256 || width.div_ceil(512 / (d / 4)) > 16 {
            bail!("a state of {width} rows of {d} is more than a one-token kernel holds")
        }
        Ok(Linear {
            maps: [Map::Identity; 2],
            weights: None,
            width,
            rotary: false,
            conv: None,
            silu: [false; 2],
            decay: Decay::Keep,
            tau: 1.0,
            lowest: LOWEST,
            rule: Rule::Gated,
            scale: 1.0,
            s: at.state(state, "s", &[at.batch, h, width, d])?,
            z: None,
            normalised: false,
            written: false,
            skip: None,
            joined: Joined::Alone,
            finish: Finish::default(),
            read: None,
            fine: 0,
            eps: a.norm_eps,
        })
    }

    /// With weights that sum to 1: the state counts in `z`.
    pub fn counted(self, at: Frame, state: &State) -> Result<Linear> {
        let z = at.state(state, "z", &[at.batch, at.architecture.heads, self.width])?;
        Ok(Linear { z: Some(z), normalised: true, ..self })
    }

    /// With the rows that it reads.
    pub fn reading(self, reads: &Reads) -> Result<Linear> {
        let (read, fine) = reads.whole()?;
        Ok(Linear { read, fine, ..self })
    }

    fn raw(&self, t: &Token) -> Result<Raw> {
        let n = |x: usize| x as c_int;
        let optional = |x: Option<&Tensor>| x.map_or(Ok(null()), pointer);
        let changing = |x: Option<&Tensor>| x.map_or(Ok(std::ptr::null_mut()), writable);
        let (gate_kind, gate, rate, decay_at, one_gate, rank) = match &self.decay {
            Decay::Keep => (0, None, None, 0, false, 0),
            Decay::Fixed(g) => (1, Some(g), None, 0, false, 0),
            Decay::Scalar(bias, at) => (2, Some(bias), None, *at, bias.elem_count() == 1, 0),
            Decay::StepSize(bias, rate, at) => (3, Some(bias), Some(rate), *at, false, 0),
            Decay::LowRank(bias, second, at) => (4, Some(bias), Some(second), *at, false, second.dim(1)?),
            Decay::Pooled => (5, None, None, 0, false, 0),
            Decay::Bounded(bound) => (6, bound.as_ref(), None, 0, false, 0),
        };
        let (rule, beta, first, top, beta_at) = match &self.rule {
            Rule::Gated => (0, None, None, None, 0),
            Rule::Delta(bias, at) => (1, Some(bias), None, None, *at),
            Rule::Slots(keys) => (2, None, Some(keys), None, 0),
            Rule::Magnitude(values) => (3, None, Some(values), None, 0),
            Rule::Augmented(queries, top) => (4, None, Some(queries), Some(top), 0),
        };
        let (joined, window, weights, sinks, waits, affine, mix_at) = match &self.joined {
            Joined::Alone => (0, None, None, None, None, false, None),
            Joined::Beside(w, weights, mix) => (1, Some(w), Some(weights), None, None, false, *mix),
            Joined::Shared(w, f, sinks, waits, affine) => {
                (2, Some(w), Some(f), sinks.as_ref(), Some(waits), *affine, None)
            }
            Joined::Anchored(w, alpha, sinks) => (3, Some(w), Some(alpha), sinks.as_ref(), None, false, None),
        };
        let conv = self.conv.as_ref();
        let (out_bias, out_at, silu_out) = match &self.finish.gate {
            Some((bias, at, silu)) => (Some(bias), 2 * self.fine + at, *silu),
            None => (None, 0, false),
        };
        let weights_of = |which: usize| self.weights.as_ref().map(|w| &w[which]);
        Ok(Raw {
            qkv: t.qkv,
            table: t.table,
            position: t.position,
            read: t.read,
            map_q: optional(weights_of(0))?,
            map_k: optional(weights_of(1))?,
            taps_q: optional(conv.and_then(|c| c.q.as_ref()))?,
            taps_k: optional(conv.and_then(|c| c.k.as_ref()))?,
            taps_v: optional(conv.and_then(|c| c.v.as_ref()))?,
            rows: changing(conv.map(|c| &c.rows))?,
            gate: optional(gate)?,
            rate: optional(rate)?,
            beta: optional(beta)?,
            s: writable(&self.s)?,
            z: changing(self.z.as_ref())?,
            first: changing(first)?,
            top: changing(top)?,
            ring_k: changing(window.map(|w| &w.k))?,
            ring_v: changing(window.map(|w| &w.v))?,
            waits: changing(waits)?,
            weights: optional(weights)?,
            sinks: optional(sinks)?,
            skip: optional(self.skip.as_ref())?,
            norm: optional(self.finish.norm.as_ref())?,
            out_bias: optional(out_bias)?,
            y: t.y,
            batch: n(t.batch),
            heads: n(t.heads),
            kv_heads: n(t.kv_heads),
            dim: n(t.dim),
            cols: n(weights_of(0).map_or(Ok(0), |w| w.dim(2))?),
            width: n(self.width),
            rank: n(rank),
            taps: n(conv.map_or(0, |c| c.taps)),
            window: n(window.map_or(0, |w| w.size)),
            sink_count: n(sinks.map_or(0, Tensor::elem_count)),
            reads: n(self.read.as_ref().map_or(Ok(0), |w| w.dim(0))?),
            fine: n(self.fine),
            decay_at: n(decay_at),
            beta_at: n(beta_at),
            mix_at: mix_at.map_or(-1, n),
            out_at: n(out_at),
            map_of_q: self.maps[0] as c_int,
            map_of_k: self.maps[1] as c_int,
            gate_kind,
            rule,
            joined,
            rotary: self.rotary as c_int,
            window_rotary: window.is_some_and(|w| w.rotary) as c_int,
            own_keys: conv.is_some_and(|c| c.own_keys) as c_int,
            silu: self.silu[0] as c_int,
            silu_values: self.silu[1] as c_int,
            one_gate: one_gate as c_int,
            written: self.written as c_int,
            normalised: self.normalised as c_int,
            affine: affine as c_int,
            silu_out: silu_out as c_int,
            scale: self.scale as f32,
            tau: self.tau as f32,
            lowest: self.lowest as f32,
            eps: self.eps as f32,
        })
    }

    /// What changes with every token.
    fn state(&self) -> impl Iterator<Item = &Tensor> {
        let rule: [Option<&Tensor>; 2] = match &self.rule {
            Rule::Gated | Rule::Delta(..) => [None, None],
            Rule::Slots(x) | Rule::Magnitude(x) => [Some(x), None],
            Rule::Augmented(x, top) => [Some(x), Some(top)],
        };
        let (window, waits) = match &self.joined {
            Joined::Alone => (None, None),
            Joined::Beside(w, ..) | Joined::Anchored(w, ..) => (Some(w), None),
            Joined::Shared(w, _, _, waits, _) => (Some(w), Some(waits)),
        };
        let ring = [window.map(|w| &w.k), window.map(|w| &w.v), waits, self.conv.as_ref().map(|c| &c.rows)];
        [Some(&self.s), self.z.as_ref()].into_iter().chain(rule).chain(ring).flatten()
    }
}

impl Fixed for Linear {
    fn reads(&self) -> Option<&Tensor> {
        self.read.as_ref()
    }

    fn step(&self, t: &Token) -> Result<()> {
        let raw = self.raw(t)?;
        // SAFETY: tensors of the documented shapes on this device, alive with `self`; the token's pointers are its maker's.
        launch(t.device, "decode_linear", |s| unsafe { margay_decode_linear(&raw, t.overlap as c_int, s) })
    }

    fn bytes(&self) -> usize {
        self.state().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }
}

unsafe extern "C" {
    fn margay_decode_linear(p: *const Raw, overlap: c_int, stream: *mut c_void) -> c_int;
}

/// `struct Linear` of the kernel file, which says what is what.
#[repr(C)]
struct Raw {
    qkv: *const c_void,
    table: *const c_void,
    position: *const c_void,
    read: *const c_void,
    map_q: *const c_void,
    map_k: *const c_void,
    taps_q: *const c_void,
    taps_k: *const c_void,
    taps_v: *const c_void,
    rows: *mut c_void,
    gate: *const c_void,
    rate: *const c_void,
    beta: *const c_void,
    s: *mut c_void,
    z: *mut c_void,
    first: *mut c_void,
    top: *mut c_void,
    ring_k: *mut c_void,
    ring_v: *mut c_void,
    waits: *mut c_void,
    weights: *const c_void,
    sinks: *const c_void,
    skip: *const c_void,
    norm: *const c_void,
    out_bias: *const c_void,
    y: *mut c_void,
    batch: c_int,
    heads: c_int,
    kv_heads: c_int,
    dim: c_int,
    cols: c_int,
    width: c_int,
    rank: c_int,
    taps: c_int,
    window: c_int,
    sink_count: c_int,
    reads: c_int,
    fine: c_int,
    decay_at: c_int,
    beta_at: c_int,
    mix_at: c_int,
    out_at: c_int,
    map_of_q: c_int,
    map_of_k: c_int,
    gate_kind: c_int,
    rule: c_int,
    joined: c_int,
    rotary: c_int,
    window_rotary: c_int,
    own_keys: c_int,
    silu: c_int,
    silu_values: c_int,
    one_gate: c_int,
    written: c_int,
    normalised: c_int,
    affine: c_int,
    silu_out: c_int,
    scale: f32,
    tau: f32,
    lowest: f32,
    eps: f32,
}
