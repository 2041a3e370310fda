//! LoLCATs: learned feature maps beside a softmax window, one shared denominator (arXiv 2410.10254), and with other
//! maps and windows Hedgehog (2402.04347) and T2R (2103.13076).
//!
//! Features are taken of *rotated* queries and keys, one map per query head for both. The formula is that of
//! [`crate::ops::hybrid_attn`].
//!
//! State: `k`, `v` [B, n, Hkv, D] the keys the next token's window may need, rotated; `s` [B, H, F, D] and `z` [B, H, F]
//! the sums of φk v and φk over all keys before them, in f32. While decoding on a GPU, the same in fixed memory, the keys as
//! a ring (`ops/decode.rs`).

use candle_core::{D, DType, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use super::parts::maps::{Bias, FeatureMap};
use super::parts::maps::{Form, Maps, Start};
use super::{Design, Heads, Mixer, MixerDef, PIECE, Spec, State, Weights};
use crate::families::Architecture;
use crate::ops::hybrid_attn::{HybridAttn, MIN_DENOMINATOR, Window, sigmoid};
use crate::ops::softmax_attn::repeat_kv;
use crate::params::{Init, Param, named};

/// Keys folded at once behind a prompt.
#[cfg(feature = "cuda")]
const PREFILL: usize = 1024;

pub const DEF: MixerDef =
    MixerDef { name: "lolcats", about: "learned feature maps beside a softmax window, one denominator", variants };

/// Keys of `[mixer]` with `kind = "lolcats"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Softmax keys beside the linear part; 0 is linear only.
    pub window: usize,
    /// `sliding`: the last `window` keys; `terraced`: own block and the whole previous one.
    pub window_kind: WindowKind,
    pub feature_map: FeatureMap,
    /// Columns of each feature-map weight; 0 takes `min(64, head_dim)`. Two-sided maps give twice as many features.
    pub feature_dim: usize,
    /// Start of the window factor before the sigmoid (-2.197 is sigmoid 0.1).
    pub window_factor: f64,
    /// The linear part weighs 1 - sigmoid(window factor) instead of 1.
    pub affine: bool,
    /// Bias of the maps: `none`, `head` one number per head (as T2R checkpoints have it), `full` one per column.
    pub bias: Bias,
    /// One map for queries and keys.
    pub tie_qk: bool,
    /// Identity start; otherwise Kaiming uniform.
    pub identity_init: bool,
    /// Instead, start at the leading principal directions of each head's rotated queries and keys on a few sequences of the
    /// training text.
    pub principal_init: bool,
    /// Features see x + xW with W started at 0 (needs `feature_dim` = head_dim).
    pub skip_connection: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WindowKind {
    Sliding,
    Terraced,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            window: 64,
            window_kind: WindowKind::Sliding,
            feature_map: FeatureMap::SoftmaxDim,
            feature_dim: 0,
            window_factor: -2.197_224_577_336_219_6,
            affine: false,
            bias: Bias::None,
            tie_qk: false,
            identity_init: true,
            principal_init: false,
            skip_connection: false,
        }
    }
}

fn variants() -> Vec<Box<dyn Design>> {
    let base = Config { window: 8, ..Config::default() };
    let linear = Config { window: 0, ..base.clone() };
    let list = [
        base.clone(),
        Config { window_kind: WindowKind::Terraced, ..base.clone() },
        Config { affine: true, ..base.clone() },
        Config { feature_map: FeatureMap::ExpDim, feature_dim: 4, ..base.clone() },
        Config { feature_map: FeatureMap::Elu, ..base.clone() },
        Config { feature_map: FeatureMap::Taylor, feature_dim: 3, ..base.clone() },
        Config { tie_qk: true, identity_init: false, ..base.clone() },
        Config { skip_connection: true, ..base },
        Config {
            feature_map: FeatureMap::Relu,
            bias: Bias::Head,
            identity_init: false,
            feature_dim: 12,
            ..linear.clone()
        },
        Config { bias: Bias::Full, ..linear },
    ];
    list.into_iter().map(|c| Box::new(c) as Box<dyn Design>).collect()
}

impl Config {
    fn form(&self, a: &Architecture) -> Form {
        let cols = self.feature_map.cols(self.feature_dim, a.head_dim, a.head_dim.min(64));
        Form {
            kind: self.feature_map,
            cols,
            bias: self.bias,
            tie_qk: self.tie_qk,
            start: match (self.principal_init, self.identity_init) {
                (true, _) => Start::Principal,
                (false, true) => Start::Identity,
                (false, false) => Start::Random,
            },
            skip_connection: self.skip_connection,
        }
    }

    fn op_window(&self) -> Window {
        match self.window_kind {
            WindowKind::Terraced if self.window > 0 => Window::Terraced(self.window),
            _ => Window::Sliding(self.window),
        }
    }
}

impl Design for Config {
    fn name(&self) -> &'static str {
        DEF.name
    }

    fn check(&self, a: &Architecture) -> std::result::Result<(), String> {
        self.form(a).check_positive(a)
    }

    fn specs(&self, a: &Architecture) -> Vec<Spec> {
        let mut specs = self.form(a).specs(a);
        if self.window > 0 {
            let init = Init::Constant(self.window_factor);
            specs.push(Spec { name: "window_factors", shape: vec![1, a.heads, 1, 1], init, scalar: true });
        }
        specs
    }

    fn measures(&self, _: &Architecture) -> bool {
        self.principal_init
    }

    fn measure(&self, a: &Architecture, x: &Heads, _: &Tensor) -> Result<Vec<(&'static str, Tensor)>> {
        if self.principal_init { self.form(a).principal(a, x.rotated()?) } else { Ok(Vec::new()) }
    }

    fn build(&self, a: &Architecture, _: usize, params: Vec<Param>) -> Box<dyn Mixer> {
        let affine = self.affine && self.window > 0;
        let softcap = a.softcap.map(|cap| cap as f32);
        let attn = HybridAttn { heads: a.heads, kv_heads: a.kv_heads, window: self.op_window(), affine, softcap };
        Box::new(Lolcats { attn, maps: self.form(a).build(a, &params), params })
    }

    fn state_bytes(&self, a: &Architecture, context: usize, element: usize) -> usize {
        let window = self.op_window().capacity().min(context);
        2 * window * a.kv_heads * a.head_dim * element + 4 * a.heads * self.form(a).width() * (a.head_dim + 1)
    }

    fn flops_per_token(&self, a: &Architecture, seq_len: usize) -> f64 {
        let (d, f) = (a.head_dim as f64, self.form(a).width() as f64);
        let window = (self.op_window().capacity() as f64).min(seq_len as f64);
        a.heads as f64 * (self.form(a).flops(a) + 4.0 * window * d + 2.0 * window * f + 4.0 * f * (d + 1.0))
    }
}

struct Lolcats {
    attn: HybridAttn,
    maps: Maps,
    params: Vec<Param>,
}

impl Lolcats {
    /// Window factors before the sigmoid, [H], in their own precision.
    fn factors(&self, like: &Tensor) -> Result<Tensor> {
        match named(&self.params, "window_factors") {
            Some(f) => f.var.flatten_all(),
            None => Tensor::zeros(self.attn.heads, like.dtype(), like.device()),
        }
    }

    /// φk [B, H, n, F] of rotated keys [B, n, Hkv, D].
    fn key_features(&self, k: &Tensor) -> Result<Tensor> {
        self.maps.keys(k)?.transpose(1, 2)?.contiguous()
    }

    /// The state after the first `T` tokens from their features [B, T, 2 H, F].
    #[cfg(feature = "cuda")]
    fn begin(&self, qkv: &Tensor, features: &Tensor, state: &mut State) -> Result<()> {
        let (b, time, _, d) = qkv.dims4()?;
        let (h, g) = (self.attn.heads, self.attn.kv_heads);
        let base = self.attn.window.start(time).min(time);
        let wide = |x: Tensor| x.transpose(1, 2)?.to_dtype(DType::F32)?.contiguous();
        let (mut s, mut z) = (None, None);
        for from in (0..base).step_by(PREFILL) {
            let n = PREFILL.min(base - from);
            let phi = wide(features.narrow(1, from, n)?.narrow(2, h, h)?)?; // [B, H, n, F]
            let v = wide(qkv.narrow(1, from, n)?.narrow(2, h + g, g)?)?; // [B, Hkv, n, D]
            // The query heads of a group share its values: their features side by side are one product.
            let f = phi.dim(3)?;
            let phi_of_group = phi.reshape((b, g, h / g, n, f))?.transpose(2, 3)?.reshape((b, g, n, h / g * f))?;
            let add = phi_of_group.t()?.contiguous()?.matmul(&v)?.reshape((b, h, f, d))?;
            let count = phi.sum(2)?;
            s = Some(match s {
                Some(s) => (s + add)?,
                None => add,
            });
            z = Some(match z {
                Some(z) => (z + count)?,
                None => count,
            });
        }
        if let (Some(s), Some(z)) = (s, z) {
            state.tensors.insert("s", s);
            state.tensors.insert("z", z);
        }
        for (name, from) in [("k", h), ("v", h + g)] {
            state.tensors.insert(name, qkv.narrow(2, from, g)?.narrow(1, base, time - base)?.contiguous()?);
        }
        state.seen = time;
        Ok(())
    }

    fn piece(&self, qkv: &Tensor, state: &mut State) -> Result<Tensor> {
        let (b, n, _, d) = qkv.dims4()?;
        let (h, g, window) = (self.attn.heads, self.attn.kv_heads, self.attn.window);
        let wide = |x: &Tensor| x.to_dtype(DType::F32);
        let join = |name: &'static str, new: Tensor, state: &State| match state.tensors.get(name) {
            Some(old) => Tensor::cat(&[old, &new], 1),
            None => new.contiguous(),
        };
        let k = join("k", qkv.narrow(2, h, g)?, state)?; // [B, m, Hkv, D]
        let v = join("v", qkv.narrow(2, h + g, g)?, state)?;
        let m = k.dim(1)?;
        let base = state.seen + n - m; // position of the first key at hand; earlier ones are in the state
        let heads = |x: &Tensor| repeat_kv(&wide(x)?.transpose(1, 2)?.contiguous()?, h / g);
        let (keys, values) = (heads(&k)?, heads(&v)?); // [B, H, m, D]
        let q = wide(&qkv.narrow(2, 0, h)?)?.transpose(1, 2)?.contiguous()?; // [B, H, n, D]
        let fq = wide(&self.maps.queries(qkv)?)?.transpose(1, 2)?.contiguous()?;
        let sigma = sigmoid(&self.factors(&q)?.to_dtype(q.dtype())?)?.reshape((1, h, 1, 1))?;
        let lambda = if self.attn.affine { (1.0 - &sigma)? } else { sigma.ones_like()? };

        let cell = |inside: &dyn Fn(usize, usize) -> bool| {
            let cells = (0..n * m).map(|c| inside(state.seen + c / m, base + c % m) as u8 as f32);
            Tensor::from_iter(cells, qkv.device())?.reshape((n, m))
        };
        let mask = cell(&|i, j| j <= i && j >= window.start(i))?;
        let scores = self.attn.bend((q.matmul(&keys.t()?)? * (d as f64).powf(-0.5))?)?;
        let scores = scores.broadcast_mul(&mask)?.broadcast_add(&((&mask - 1.0)? * 1e30)?)?;
        let top = scores.max_keepdim(D::Minus1)?.maximum(-1e29)?;
        let mut weights = scores.broadcast_sub(&top)?.exp()?.broadcast_mul(&mask)?.broadcast_mul(&sigma)?;
        if window.start(state.seen + n - 1) > base {
            let before = cell(&|i, j| j < window.start(i))?;
            let products = fq.matmul(&wide(&self.key_features(&k)?)?.t()?)?;
            weights = (weights + products.broadcast_mul(&before)?.broadcast_mul(&lambda)?)?;
        }
        let mut num = weights.matmul(&values)?;
        let mut den = weights.sum_keepdim(D::Minus1)?;
        if let (Some(s), Some(z)) = (state.tensors.get("s"), state.tensors.get("z")) {
            num = (num + fq.matmul(s)?.broadcast_mul(&lambda)?)?;
            den = (den + fq.matmul(&z.unsqueeze(3)?)?.broadcast_mul(&lambda)?)?;
        }
        let y = num.broadcast_div(&den.maximum(MIN_DENOMINATOR)?)?;

        // Fold what the next token's window no longer holds.
        state.seen += n;
        let leaving = window.start(state.seen).min(state.seen) - base;
        if leaving > 0 {
            let fk = wide(&self.key_features(&k.narrow(1, 0, leaving)?.contiguous()?)?)?; // [B, H, leaving, F]
            let add_s = fk.t()?.matmul(&values.narrow(2, 0, leaving)?.contiguous()?)?;
            let add_z = fk.sum(2)?;
            let (s, z) = match (state.tensors.get("s"), state.tensors.get("z")) {
                (Some(s), Some(z)) => ((s + add_s)?, (z + add_z)?),
                _ => (add_s, add_z),
            };
            state.tensors.insert("s", s);
            state.tensors.insert("z", z);
        }
        state.tensors.insert("k", k.narrow(1, leaving, m - leaving)?.contiguous()?);
        state.tensors.insert("v", v.narrow(1, leaving, m - leaving)?.contiguous()?);
        y.transpose(1, 2)?.contiguous()?.reshape((b, n, h, d))?.to_dtype(qkv.dtype())
    }
}

impl Mixer for Lolcats {
    fn forward(&self, x: &Heads) -> Result<Tensor> {
        let qkv = x.rotated()?;
        let factors = self.factors(qkv)?;
        if let Some(weight) = self.maps.fusible_weights()?
            && let Some(y) = self.attn.with_maps(qkv, &weight, &factors)?
        {
            return Ok(y);
        }
        self.attn.forward(qkv, &self.maps.features(qkv)?, &factors)
    }

    fn output_mse(&self, x: &Heads, target: &Tensor, weight: f64) -> Result<Tensor> {
        let qkv = x.rotated()?;
        let factors = self.factors(qkv)?;
        if let Some(maps) = self.maps.fusible_weights()?
            && let Some(loss) = self.attn.mse_with_maps(qkv, &maps, &factors, target, weight)?
        {
            return Ok(loss);
        }
        self.attn.mse(qkv, &self.maps.features(qkv)?, &factors, target, weight)
    }

    fn parallel(&self, x: &Heads) -> Result<(Tensor, Weights)> {
        let qkv = x.rotated()?;
        let (y, all) = self.attn.parallel(qkv, &self.maps.features(qkv)?, &self.factors(qkv)?)?;
        let inside = self.attn.window_mask(qkv.dim(1)?, qkv.dtype(), qkv.device())?;
        let window = if self.window() > 0 { Some(all.broadcast_mul(&inside)?) } else { None };
        Ok((y, Weights { all, window }))
    }

    fn extend(&self, x: &Heads, state: &mut State) -> Result<Tensor> {
        let qkv = x.rotated()?;
        let time = qkv.dim(1)?;
        #[cfg(feature = "cuda")]
        if state.seen == 0 {
            let features = self.maps.features(qkv)?.detach();
            if let Some(y) = self.attn.on_gpu(qkv, &features, &self.factors(qkv)?)? {
                self.begin(qkv, &features, state)?;
                return Ok(y);
            }
        }
        let pieces = (0..time).step_by(PIECE).map(|from| {
            let piece = qkv.narrow(1, from, PIECE.min(time - from))?.contiguous()?;
            self.piece(&piece, state)
        });
        Tensor::cat(&pieces.collect::<Result<Vec<_>>>()?, 1)
    }

    #[cfg(feature = "cuda")]
    fn fixed(
        &self,
        state: &State,
        batch: usize,
        a: &Architecture,
        _room: usize,
        device: &candle_core::Device,
    ) -> Result<Box<dyn crate::ops::decode::Fixed>> {
        use crate::ops::decode::{Activation, Lolcats as Fixed, ring};
        if self.attn.softcap.is_some() {
            candle_core::bail!("the one-token window has no soft-cap");
        }
        let (h, d, width) = (self.attn.heads, a.head_dim, self.maps.form.width());
        let halves = |x: Tensor, dtype: DType| -> Result<[Tensor; 2]> {
            let part = |from| x.narrow(0, from, h)?.to_dtype(dtype)?.copy();
            Ok([part(0)?, part(h)?])
        };
        let maps = match self.maps.weights()? {
            Some(weight) => Some(halves(weight, DType::BF16)?),
            None => None,
        };
        let biases = match self.maps.both("bias")? {
            Some(bias) => Some(halves(bias.broadcast_as((2 * h, self.maps.form.cols))?.contiguous()?, DType::F32)?),
            None => None,
        };
        let sum = |name, shape: &[usize]| match state.tensors.get(name) {
            Some(t) => t.contiguous()?.copy(),
            None => Tensor::zeros(shape, DType::F32, device),
        };
        let row = [batch, self.attn.kv_heads, d];
        let slots = self.attn.window.capacity();
        let (window, terraced) = match self.attn.window {
            Window::Sliding(n) => (n, false),
            Window::Terraced(n) => (n, true),
        };
        let activation = match self.maps.form.kind {
            FeatureMap::SoftmaxDim => Activation::SoftmaxDim,
            FeatureMap::ExpDim => Activation::ExpDim,
            FeatureMap::Relu => Activation::Relu,
            FeatureMap::Elu => Activation::Elu,
            other => candle_core::bail!("the map {other:?} has no one-token kernel"),
        };
        let split = Fixed::split(batch, h, d, self.maps.form.cols, activation, slots);
        let z = sum("z", &[batch, h, width])?.unsqueeze(2)?.broadcast_as((batch, h, split, width))?.contiguous()?;
        Ok(Box::new(Fixed {
            maps,
            biases,
            factors: self.factors(&Tensor::zeros(1, DType::F32, device)?)?,
            ring_k: ring(state.tensors.get("k"), state.seen, slots, &row)?,
            ring_v: ring(state.tensors.get("v"), state.seen, slots, &row)?,
            s: sum("s", &[batch, h, width, d])?,
            z,
            cols: self.maps.form.cols,
            window,
            terraced,
            affine: self.attn.affine,
            activation,
        }))
    }

    fn params(&self) -> &[Param] {
        &self.params
    }

    fn window(&self) -> usize {
        self.attn.window.capacity()
    }
}
