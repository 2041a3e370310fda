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

use super::{Design, Heads, Mixer, MixerDef, PIECE, Spec, State, Weights};
use crate::families::Architecture;
use crate::ops::feature_map;
use crate::ops::hybrid_attn::{HybridAttn, MIN_DENOMINATOR, Window, sigmoid};
use crate::ops::softmax_attn::repeat_kv;
use crate::params::{Init, Param};

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
    /// Features see x + xW with W started at 0 (needs `feature_dim` = head_dim).
    pub skip_connection: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WindowKind {
    Sliding,
    Terraced,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    None,
    Head,
    Full,
}

/// Feature maps by the names of section 2 of the method papers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FeatureMap {
    /// softmax(xW) and softmax(-xW) side by side.
    SoftmaxDim,
    /// exp(u - max u) and exp(min u - u) side by side, u = xW.
    ExpDim,
    /// relu(xW + b), the map of T2R.
    Relu,
    /// elu(x) + 1, without parameters.
    Elu,
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
    fn cols(&self, a: &Architecture) -> usize {
        match (self.feature_map, self.feature_dim) {
            (FeatureMap::Elu, _) => a.head_dim,
            (_, 0) => a.head_dim.min(64),
            (_, cols) => cols,
        }
    }

    /// Features per head.
    fn width(&self, a: &Architecture) -> usize {
        let sides = if matches!(self.feature_map, FeatureMap::SoftmaxDim | FeatureMap::ExpDim) { 2 } else { 1 };
        sides * self.cols(a)
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
        if self.skip_connection && self.cols(a) != a.head_dim {
            let cols = self.cols(a);
            return Err(format!("`mixer.skip_connection` needs `feature_dim` = head_dim {}, not {cols}", a.head_dim));
        }
        if self.bias == Bias::Head && matches!(self.feature_map, FeatureMap::SoftmaxDim | FeatureMap::ExpDim) {
            return Err("`mixer.bias` = \"head\" shifts all columns alike, which this `feature_map` cancels; \
                        take \"full\" or \"none\""
                .into());
        }
        Ok(())
    }

    fn specs(&self, a: &Architecture) -> Vec<Spec> {
        let (h, d, cols) = (a.heads, a.head_dim, self.cols(a));
        let init = match (self.identity_init, self.skip_connection) {
            (true, false) => Init::Identity,
            (true, true) => Init::Constant(0.0),
            (false, _) => Init::Uniform { bound: (6.0 / (d * cols) as f64).sqrt(), stream: 0 },
        };
        let mut specs = Vec::new();
        let names = [
            ("feature_map_q.mlp.layer", "feature_map_q.mlp.bias"),
            ("feature_map_k.mlp.layer", "feature_map_k.mlp.bias"),
        ];
        if self.feature_map != FeatureMap::Elu {
            for (weight, bias) in names.into_iter().take(if self.tie_qk { 1 } else { 2 }) {
                specs.push(Spec { name: weight, shape: vec![h, d, cols], init, scalar: false });
                // As the official code initialises it: Kaiming uniform with a fan-in of H.
                let bias_init = Init::Uniform { bound: (6.0 / h as f64).sqrt(), stream: 1 };
                match self.bias {
                    Bias::None => {}
                    Bias::Head => {
                        specs.push(Spec { name: bias, shape: vec![1, h, 1, 1], init: bias_init, scalar: true })
                    }
                    Bias::Full => {
                        specs.push(Spec { name: bias, shape: vec![h, cols], init: Init::Constant(0.0), scalar: true })
                    }
                }
            }
        }
        if self.window > 0 {
            let init = Init::Constant(self.window_factor);
            specs.push(Spec { name: "window_factors", shape: vec![1, h, 1, 1], init, scalar: true });
        }
        specs
    }

    fn build(&self, a: &Architecture, params: Vec<Param>) -> Box<dyn Mixer> {
        let group = a.heads / a.kv_heads;
        let sources = (0..a.heads).chain((0..a.heads).map(|h| a.heads + h / group)).collect();
        let affine = self.affine && self.window > 0;
        let attn = HybridAttn { heads: a.heads, kv_heads: a.kv_heads, window: self.op_window(), affine };
        Box::new(Lolcats { config: self.clone(), attn, sources, cols: self.cols(a), params })
    }

    fn state_bytes(&self, a: &Architecture, context: usize, element: usize) -> usize {
        let window = self.op_window().capacity().min(context);
        2 * window * a.kv_heads * a.head_dim * element + 4 * a.heads * self.width(a) * (a.head_dim + 1)
    }

    fn flops_per_token(&self, a: &Architecture, seq_len: usize) -> f64 {
        let (d, f, cols) = (a.head_dim as f64, self.width(a) as f64, self.cols(a) as f64);
        let window = (self.op_window().capacity() as f64).min(seq_len as f64);
        let maps = if self.feature_map == FeatureMap::Elu { 0.0 } else { 4.0 * d * cols };
        a.heads as f64 * (maps + 4.0 * window * d + 2.0 * window * f + 4.0 * f * (d + 1.0))
    }
}

struct Lolcats {
    config: Config,
    attn: HybridAttn,
    /// Head that each map reads: queries, then for every query head its key head.
    sources: Vec<usize>,
    cols: usize,
    params: Vec<Param>,
}

impl Lolcats {
    fn param(&self, suffix: &str) -> Option<&Tensor> {
        self.params.iter().find(|p| p.name.ends_with(suffix)).map(|p| p.var.as_tensor())
    }

    /// One tensor for the query and key maps: [2 H, ..].
    fn both(&self, part: &str) -> Result<Option<Tensor>> {
        let Some(q) = self.param(&format!("feature_map_q.mlp.{part}")) else { return Ok(None) };
        let k = self.param(&format!("feature_map_k.mlp.{part}")).unwrap_or(q);
        let flat = |x: &Tensor| if part == "bias" { x.reshape((self.attn.heads, ())) } else { Ok(x.clone()) };
        Tensor::cat(&[flat(q)?, flat(k)?], 0).map(Some)
    }

    /// Weights of the maps of queries and keys, [2 H, D, C]; `None` for maps without weights.
    fn map_weights(&self) -> Result<Option<Tensor>> {
        let Some(weight) = self.both("layer")? else { return Ok(None) };
        if self.config.skip_connection {
            return weight.broadcast_add(&Tensor::eye(self.cols, weight.dtype(), weight.device())?).map(Some);
        }
        Ok(Some(weight))
    }

    /// The same where attention and maps may run as one op.
    fn fusible_weights(&self) -> Result<Option<Tensor>> {
        let fusible = self.config.feature_map == FeatureMap::SoftmaxDim && self.config.bias == Bias::None;
        if fusible { self.map_weights() } else { Ok(None) }
    }

    /// φ [B, T, maps, F] of packed rotated heads by the maps that read `sources`, the last `sources.len()` of all maps.
    fn features(&self, packed: &Tensor, sources: &[usize]) -> Result<Tensor> {
        let from = self.sources.len() - sources.len();
        let Some(weight) = self.map_weights()? else {
            let index = Tensor::from_iter(sources.iter().map(|s| *s as u32), packed.device())?;
            return packed.contiguous()?.index_select(&index, 2)?.elu(1.0)? + 1.0;
        };
        let bias = match self.both("bias")? {
            Some(bias) => bias.broadcast_as((self.sources.len(), self.cols))?.contiguous()?,
            None => Tensor::zeros((self.sources.len(), self.cols), weight.dtype(), weight.device())?,
        };
        let activation = match self.config.feature_map {
            FeatureMap::SoftmaxDim => feature_map::Activation::SoftmaxDim,
            FeatureMap::ExpDim => feature_map::Activation::ExpDim,
            FeatureMap::Relu | FeatureMap::Elu => feature_map::Activation::Relu,
        };
        let maps = feature_map::FeatureMap { activation, sources: sources.to_vec() };
        let cut = |x: Tensor| if from == 0 { Ok(x) } else { x.narrow(0, from, sources.len()) };
        maps.forward(packed, &cut(weight)?.to_dtype(packed.dtype())?, &cut(bias)?.to_dtype(packed.dtype())?)
    }

    /// Window factors before the sigmoid, [H], in their own precision.
    fn factors(&self, like: &Tensor) -> Result<Tensor> {
        match self.param("window_factors") {
            Some(f) => f.flatten_all(),
            None => Tensor::zeros(self.attn.heads, like.dtype(), like.device()),
        }
    }

    /// φk [B, H, n, F] of rotated keys [B, n, Hkv, D].
    fn key_features(&self, k: &Tensor) -> Result<Tensor> {
        let sources: Vec<usize> = self.sources[self.attn.heads..].iter().map(|s| s - self.attn.heads).collect();
        self.features(k, &sources)?.transpose(1, 2)?.contiguous()
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
        let fq = wide(&self.features(qkv, &self.sources)?.narrow(2, 0, h)?)?.transpose(1, 2)?.contiguous()?;
        let sigma = sigmoid(&self.factors(&q)?.to_dtype(q.dtype())?)?.reshape((1, h, 1, 1))?;
        let lambda = if self.attn.affine { (1.0 - &sigma)? } else { sigma.ones_like()? };

        let cell = |inside: &dyn Fn(usize, usize) -> bool| {
            let cells = (0..n * m).map(|c| inside(state.seen + c / m, base + c % m) as u8 as f32);
            Tensor::from_iter(cells, qkv.device())?.reshape((n, m))
        };
        let mask = cell(&|i, j| j <= i && j >= window.start(i))?;
        let scores = (q.matmul(&keys.t()?)? * (d as f64).powf(-0.5))?;
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
        if let Some(weight) = self.fusible_weights()?
            && let Some(y) = self.attn.with_maps(qkv, &weight, &factors)?
        {
            return Ok(y);
        }
        self.attn.forward(qkv, &self.features(qkv, &self.sources)?, &factors)
    }

    fn output_mse(&self, x: &Heads, target: &Tensor, weight: f64) -> Result<Tensor> {
        let qkv = x.rotated()?;
        let factors = self.factors(qkv)?;
        if let Some(maps) = self.fusible_weights()?
            && let Some(loss) = self.attn.mse_with_maps(qkv, &maps, &factors, target, weight)?
        {
            return Ok(loss);
        }
        self.attn.mse(qkv, &self.features(qkv, &self.sources)?, &factors, target, weight)
    }

    fn parallel(&self, x: &Heads) -> Result<(Tensor, Weights)> {
        let qkv = x.rotated()?;
        let (y, all) = self.attn.parallel(qkv, &self.features(qkv, &self.sources)?, &self.factors(qkv)?)?;
        let window = self.attn.window_mask(qkv.dim(1)?, qkv.dtype(), qkv.device())?;
        Ok((y, Weights { all, window: Some(window) }))
    }

    fn extend(&self, x: &Heads, state: &mut State) -> Result<Tensor> {
        let qkv = x.rotated()?;
        let time = qkv.dim(1)?;
        #[cfg(feature = "cuda")]
        if state.seen == 0 {
            let features = self.features(qkv, &self.sources)?.detach();
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
        let (h, d, width) = (self.attn.heads, a.head_dim, self.config.width(a));
        let halves = |x: Tensor, dtype: DType| -> Result<[Tensor; 2]> {
            let part = |from| x.narrow(0, from, h)?.to_dtype(dtype)?.copy();
            Ok([part(0)?, part(h)?])
        };
        let maps = match self.map_weights()? {
            Some(weight) => Some(halves(weight, DType::BF16)?),
            None => None,
        };
        let biases = match self.both("bias")? {
            Some(bias) => Some(halves(bias.broadcast_as((2 * h, self.cols))?.contiguous()?, DType::F32)?),
            None => None,
        };
        let sum = |name, shape: &[usize]| match state.tensors.get(name) {
            Some(t) => t.contiguous()?.copy(),
            None => Tensor::zeros(shape, DType::F32, device),
        };
        let row = [batch, self.attn.kv_heads, d];
        let slots = self.attn.window.capacity();
        let activation = match self.config.feature_map {
            FeatureMap::SoftmaxDim => Activation::SoftmaxDim,
            FeatureMap::ExpDim => Activation::ExpDim,
            FeatureMap::Relu => Activation::Relu,
            FeatureMap::Elu => Activation::Elu,
        };
        let split = Fixed::split(batch, h, d, self.cols, activation, slots);
        let z = sum("z", &[batch, h, width])?.unsqueeze(2)?.broadcast_as((batch, h, split, width))?.contiguous()?;
        Ok(Box::new(Fixed {
            maps,
            biases,
            factors: self.factors(&Tensor::zeros(1, DType::F32, device)?)?,
            ring_k: ring(state.tensors.get("k"), state.seen, slots, &row)?,
            ring_v: ring(state.tensors.get("v"), state.seen, slots, &row)?,
            s: sum("s", &[batch, h, width, d])?,
            z,
            cols: self.cols,
            window: self.config.window,
            terraced: matches!(self.attn.window, Window::Terraced(_)),
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
