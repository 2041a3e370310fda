//! One-token steps on CUDA, up to [`MOST`] sequences at once: skinny products `y = x Wᵀ` with what surrounds them, and the
//! attention of one token from a state in fixed memory.
//!
//! Nothing here is differentiated or allocates; a step is a list of launches over buffers that stay where they are, so
//! that it can be captured in a graph ([`crate::model::Steps`]). Formulas and layouts: `kernels/decode.cu`. The plain
//! form of a step is [`crate::mixers::Mixer::extend`].

pub mod linear;

use std::ffi::{c_int, c_void};
use std::ptr::null_mut;

use candle_core::{CudaDevice, Result, Tensor};

use super::cuda::{capability, launch, pointer};

/// Sequences that a step serves at most.
pub const MOST: usize = 16;

/// What a product is followed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Nothing: f32 rows.
    Plain = 0,
    /// Added to the stream; the next norm is prepared.
    Add = 1,
    /// silu(gate) * up of two halves.
    Swiglu = 2,
    /// f32 rows and the largest of each block.
    Logits = 3,
}

/// Operands of a product: `struct Product` of the kernel file, which says what is what.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Product {
    pub w: *const c_void,
    pub x: *const c_void,
    pub bias: *const c_void,
    pub squares: *const c_void,
    pub out: *mut c_void,
    pub stream: *mut c_void,
    pub next: *const c_void,
    pub scaled: *mut c_void,
    pub squares_out: *mut c_void,
    pub best: *mut c_void,
    pub best_at: *mut c_void,
    pub rows: c_int,
    pub inner: c_int,
    pub batch: c_int,
    pub parts: c_int,
    pub eps: f32,
}

impl Default for Product {
    fn default() -> Self {
        let (none, some) = (std::ptr::null(), null_mut());
        Product {
            w: none,
            x: none,
            bias: none,
            squares: none,
            out: some,
            stream: some,
            next: none,
            scaled: some,
            squares_out: some,
            best: some,
            best_at: some,
            rows: 0,
            inner: 0,
            batch: 0,
            parts: 0,
            eps: 0.0,
        }
    }
}

/// The first launch of a step: `struct Embed`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Embed {
    pub tokens: *const c_void,
    pub embedding: *const c_void,
    pub next: *const c_void,
    pub frequencies: *const c_void,
    pub position: *const c_void,
    pub stream: *mut c_void,
    pub scaled: *mut c_void,
    pub squares: *mut c_void,
    pub table: *mut c_void,
    pub hidden: c_int,
    pub batch: c_int,
    pub pairs: c_int,
    pub vocab: c_int,
}

#[repr(C)]
struct RawLolcats {
    qkv: *const c_void,
    table: *const c_void,
    position: *const c_void,
    map_q: *const c_void,
    map_k: *const c_void,
    bias_q: *const c_void,
    bias_k: *const c_void,
    factors: *const c_void,
    ring_k: *mut c_void,
    ring_v: *mut c_void,
    s: *mut c_void,
    z: *mut c_void,
    y: *mut c_void,
    batch: c_int,
    heads: c_int,
    kv_heads: c_int,
    dim: c_int,
    cols: c_int,
    width: c_int,
    split: c_int,
    window: c_int,
    terraced: c_int,
    affine: c_int,
    activation: c_int,
}

#[repr(C)]
struct RawCached {
    qkv: *const c_void,
    table: *const c_void,
    position: *const c_void,
    k: *mut c_void,
    v: *mut c_void,
    partial: *mut c_void,
    y: *mut c_void,
    batch: c_int,
    heads: c_int,
    kv_heads: c_int,
    dim: c_int,
    slots: c_int,
    splits: c_int,
}

unsafe extern "C" {
    fn margay_decode_product(p: *const Product, mode: c_int, tall: c_int, overlap: c_int, stream: *mut c_void)
    -> c_int;
    fn margay_decode_embed_parts(hidden: c_int) -> c_int;
    fn margay_decode_embed(p: *const Embed, stream: *mut c_void) -> c_int;
    fn margay_decode_choose(
        tokens: *mut c_void,
        position: *mut c_void,
        best: *const c_void,
        best_at: *const c_void,
        parts: c_int,
        batch: c_int,
        overlap: c_int,
        stream: *mut c_void,
    ) -> c_int;
    fn margay_decode_lolcats_split(
        batch: c_int,
        heads: c_int,
        dim: c_int,
        cols: c_int,
        activation: c_int,
        slots: c_int,
    ) -> c_int;
    fn margay_decode_lolcats(p: *const RawLolcats, overlap: c_int, stream: *mut c_void) -> c_int;
    fn margay_decode_cached(p: *const RawCached, overlap: c_int, stream: *mut c_void) -> c_int;
}

/// Where the attention of a token reads and writes, the same in every layer.
pub struct Token<'a> {
    pub device: &'a CudaDevice,
    /// f32 [B, H + 2 Hkv, D], not yet rotated.
    pub qkv: *const c_void,
    /// f32 [2, D / 2], cosines and sines of the position.
    pub table: *const c_void,
    /// i32, the tokens seen.
    pub position: *const c_void,
    /// f32 [B, E], the layer's input times the rows of [`Fixed::reads`].
    pub read: *const c_void,
    /// bf16 [B, H, D]
    pub y: *mut c_void,
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    /// Whether a kernel may start while the one before it drains.
    pub overlap: bool,
}

/// A mixer's state in fixed memory, and its one-token step.
pub trait Fixed {
    /// bf16 [E, N]: rows that the step wants multiplied with the layer's input.
    fn reads(&self) -> Option<&Tensor> {
        None
    }
    fn step(&self, token: &Token) -> Result<()>;
    /// Bytes of the state.
    fn bytes(&self) -> usize;
}

/// Address to write to.
pub fn writable(x: &Tensor) -> Result<*mut c_void> {
    Ok(pointer(x)?.cast_mut())
}

/// Whether kernels of this device may overlap.
pub fn overlaps(device: &CudaDevice) -> bool {
    capability(device).is_ok_and(|c| c >= (9, 0))
}

/// Rows of W per block, in tiles of 16, by what measured fastest: more reads x less often, fewer fills the chip better.
fn tall(mode: Mode) -> usize {
    match mode {
        Mode::Swiglu | Mode::Logits => 4,
        Mode::Plain => 2,
        Mode::Add => 1,
    }
}

/// Partial results per sequence, sums of squares or maxima, of a product of `rows` rows of W.
pub fn parts(mode: Mode, rows: usize) -> usize {
    rows.div_ceil(16 * tall(mode)) * tall(mode).div_ceil(2)
}

/// Partial sums of squares per sequence that [`embed`] leaves.
pub fn embed_parts(hidden: usize) -> usize {
    // SAFETY: arithmetic on the argument.
    unsafe { margay_decode_embed_parts(hidden as c_int) as usize }
}

/// # Safety
/// Every pointer that `mode` uses holds what the kernel file says, on `device`.
pub unsafe fn product(device: &CudaDevice, p: &Product, mode: Mode, overlap: bool) -> Result<()> {
    let tall = tall(mode) as c_int;
    // SAFETY: the caller's.
    launch(device, "decode_product", |s| unsafe { margay_decode_product(p, mode as c_int, tall, overlap as c_int, s) })
}

/// # Safety
/// As for [`product`].
pub unsafe fn embed(device: &CudaDevice, p: &Embed) -> Result<()> {
    // SAFETY: the caller's.
    launch(device, "decode_embed", |s| unsafe { margay_decode_embed(p, s) })
}

/// The largest of each sequence's `parts` maxima becomes its token; the position moves on.
///
/// # Safety
/// `tokens` u32 `[batch]`, `position` i32, `best` f32 and `best_at` u32 [batch, parts], on `device`.
pub unsafe fn choose(
    device: &CudaDevice,
    [tokens, position, best, best_at]: [*mut c_void; 4],
    parts: usize,
    batch: usize,
    overlap: bool,
) -> Result<()> {
    let (parts, batch, overlap) = (parts as c_int, batch as c_int, overlap as c_int);
    // SAFETY: the caller's.
    launch(device, "decode_choose", |s| unsafe {
        margay_decode_choose(tokens, position, best, best_at, parts, batch, overlap, s)
    })
}

/// Which features a key has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    SoftmaxDim = 0,
    ExpDim = 1,
    Relu = 2,
    /// elu(x) + 1 without weights.
    Elu = 3,
}

/// LoLCATs of one layer: maps and state.
///
/// State: `ring_k`, `ring_v` [B, slots, Hkv, D] the keys that the window may hold, rotated, position i in slot i % slots;
/// `s` [B, H, F, D] and `z` [B, H, split, F] in f32, the sums of φk v and φk over the keys that left it; every part of a
/// head's blocks keeps its own copy of z.
pub struct Lolcats {
    /// bf16 [H, D, C] of queries and keys; `None` for elu.
    pub maps: Option<[Tensor; 2]>,
    /// f32 [H, C]
    pub biases: Option<[Tensor; 2]>,
    /// f32 `[H]`, before the sigmoid.
    pub factors: Tensor,
    pub ring_k: Tensor,
    pub ring_v: Tensor,
    pub s: Tensor,
    pub z: Tensor,
    pub cols: usize,
    pub window: usize,
    pub terraced: bool,
    pub affine: bool,
    pub activation: Activation,
}

impl Lolcats {
    /// Blocks that share the value columns of a head: more of them where there are few sequences.
    pub fn split(batch: usize, heads: usize, dim: usize, cols: usize, activation: Activation, slots: usize) -> usize {
        let [batch, heads, dim, cols, slots] = [batch, heads, dim, cols, slots].map(|n| n as c_int);
        // SAFETY: arithmetic on the arguments.
        unsafe { margay_decode_lolcats_split(batch, heads, dim, cols, activation as c_int, slots) as usize }
    }
}

fn optional(pair: &Option<[Tensor; 2]>) -> Result<[*const c_void; 2]> {
    match pair {
        Some([q, k]) => Ok([pointer(q)?, pointer(k)?]),
        None => Ok([std::ptr::null(); 2]),
    }
}

impl Fixed for Lolcats {
    fn step(&self, t: &Token) -> Result<()> {
        let ([map_q, map_k], [bias_q, bias_k]) = (optional(&self.maps)?, optional(&self.biases)?);
        let raw = RawLolcats {
            qkv: t.qkv,
            table: t.table,
            position: t.position,
            map_q,
            map_k,
            bias_q,
            bias_k,
            factors: pointer(&self.factors)?,
            ring_k: writable(&self.ring_k)?,
            ring_v: writable(&self.ring_v)?,
            s: writable(&self.s)?,
            z: writable(&self.z)?,
            y: t.y,
            batch: t.batch as c_int,
            heads: t.heads as c_int,
            kv_heads: t.kv_heads as c_int,
            dim: t.dim as c_int,
            cols: self.cols as c_int,
            width: self.z.dim(3)? as c_int,
            split: self.z.dim(2)? as c_int,
            window: self.window as c_int,
            terraced: self.terraced as c_int,
            affine: self.affine as c_int,
            activation: self.activation as c_int,
        };
        // SAFETY: tensors of the shapes above on this device, alive with `self`; the token's pointers are its maker's.
        launch(t.device, "decode_lolcats", |s| unsafe { margay_decode_lolcats(&raw, t.overlap as c_int, s) })
    }

    fn bytes(&self) -> usize {
        [&self.ring_k, &self.ring_v, &self.s, &self.z].map(|t| t.elem_count() * t.dtype().size_in_bytes()).iter().sum()
    }
}

/// Softmax attention of one layer: a cache of rotated keys, position i in slot i % slots.
pub struct Cached {
    /// bf16 [B, slots, Hkv, D]
    pub k: Tensor,
    pub v: Tensor,
    /// f32 [B, H, splits, D + 2]
    pub partial: Tensor,
}

impl Cached {
    /// Blocks that share the keys of one head: enough to fill the chip.
    pub fn splits(batch: usize, kv_heads: usize, slots: usize) -> usize {
        (528 / (batch * kv_heads).max(1)).clamp(1, slots.div_ceil(64).max(1))
    }
}

impl Fixed for Cached {
    fn step(&self, t: &Token) -> Result<()> {
        let raw = RawCached {
            qkv: t.qkv,
            table: t.table,
            position: t.position,
            k: writable(&self.k)?,
            v: writable(&self.v)?,
            partial: writable(&self.partial)?,
            y: t.y,
            batch: t.batch as c_int,
            heads: t.heads as c_int,
            kv_heads: t.kv_heads as c_int,
            dim: t.dim as c_int,
            slots: self.k.dim(1)? as c_int,
            splits: self.partial.dim(2)? as c_int,
        };
        // SAFETY: tensors of the shapes above on this device, alive with `self`; the token's pointers are its maker's.
        launch(t.device, "decode_cached", |s| unsafe { margay_decode_cached(&raw, t.overlap as c_int, s) })
    }

    fn bytes(&self) -> usize {
        2 * self.k.elem_count() * self.k.dtype().size_in_bytes()
    }
}

/// A ring of `slots` rows from the last rows `held` [B, m, ..] of `seen` positions: position i in slot i % slots.
pub fn ring(held: Option<&Tensor>, seen: usize, slots: usize, row: &[usize]) -> Result<Tensor> {
    let (batch, rest) = (row[0], &row[1..]);
    let shape: Vec<usize> = [&[batch, slots.max(1)], rest].concat();
    let Some(held) = held else { candle_core::bail!("a state without keys") };
    let ring = Tensor::zeros(shape, held.dtype(), held.device())?;
    let m = held.dim(1)?.min(slots);
    if m > 0 {
        let (from, first) = (held.dim(1)? - m, (seen - m) % slots);
        let before = m.min(slots - first);
        ring.slice_set(&held.narrow(1, from, before)?.contiguous()?, 1, first)?;
        if before < m {
            ring.slice_set(&held.narrow(1, from + before, m - before)?.contiguous()?, 1, 0)?;
        }
    }
    Ok(ring)
}
