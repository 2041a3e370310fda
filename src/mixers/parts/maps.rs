//! Learned feature maps of queries and keys, one per query head for both (LoLCATs, Hedgehog, T2R, Lizard, LAWCAT, BASED).

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::families::Architecture;
use crate::mixers::Spec;
use crate::mixers::pass::wide_of;
use crate::ops::feature_map;
use crate::ops::softmax::softmax;
use crate::ops::taylor;
use crate::params::{Init, Param, named};

use super::principal::directions;

/// Names of the weights of maps.
const WEIGHTS: [&str; 2] = ["feature_map_q.mlp.layer", "feature_map_k.mlp.layer"];

/// Feature maps by the names of section 2 of the method papers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FeatureMap {
    /// softmax(xW) and softmax(-xW) side by side.
    SoftmaxDim,
    /// exp(u - max u) and exp(min u - u) side by side, u = xW.
    ExpDim,
    /// exp(u) and exp(-u) side by side, u = xW: no shift, so that tokens keep the sizes they have to each other.
    Exp,
    /// relu(xW + b), the map of T2R.
    Relu,
    /// elu(x) + 1, without parameters.
    Elu,
    /// softmax(x), without parameters: the map of Liger.
    Softmax,
    /// x itself: weights may be negative.
    Identity,
    /// x σ(x), without parameters: weights may be negative.
    Silu,
    /// 1, u, u_i², u_i u_j of u = xW, so that products are 1 + s + s²/2 with s = u·u' / sqrt(columns): the map of BASED.
    Taylor,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    None,
    Head,
    Full,
}

impl FeatureMap {
    /// Whether it is a product with a weight first.
    pub fn learned(self) -> bool {
        !matches!(self, FeatureMap::Elu | FeatureMap::Softmax | FeatureMap::Identity | FeatureMap::Silu)
    }

    /// Whether no product of features is negative.
    pub fn positive(self) -> bool {
        !matches!(self, FeatureMap::Identity | FeatureMap::Silu)
    }

    /// Columns of its weight where `asked` is 0, for heads of `dim` channels.
    pub fn cols(self, asked: usize, dim: usize, default: usize) -> usize {
        match (self.learned(), asked) {
            (false, _) => dim,
            (true, 0) if self == FeatureMap::Taylor => dim.min(16),
            (true, 0) => default,
            (true, cols) => cols,
        }
    }
}

/// Where the weights of maps start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    Identity,
    /// Kaiming uniform.
    Random,
    /// The leading principal directions of what the maps read.
    Principal,
}

/// Everything that shapes a pair of maps.
#[derive(Debug, Clone, Copy)]
pub struct Form {
    pub kind: FeatureMap,
    /// Columns of each weight.
    pub cols: usize,
    pub bias: Bias,
    /// One map for queries and keys.
    pub tie_qk: bool,
    pub start: Start,
    /// Features see x + xW with W started at 0.
    pub skip_connection: bool,
}

impl Form {
    /// Untied maps that start as identities.
    pub fn new(kind: FeatureMap, cols: usize) -> Form {
        Form { kind, cols, bias: Bias::None, tie_qk: false, start: Start::Identity, skip_connection: false }
    }

    /// Features per head.
    pub fn width(&self) -> usize {
        match self.kind {
            FeatureMap::SoftmaxDim | FeatureMap::ExpDim | FeatureMap::Exp => 2 * self.cols,
            FeatureMap::Relu => self.cols,
            FeatureMap::Elu | FeatureMap::Softmax | FeatureMap::Identity | FeatureMap::Silu => self.cols,
            FeatureMap::Taylor => taylor::width(self.cols),
        }
    }

    /// Multiply-adds times two per token and head, queries and keys.
    pub fn flops(&self, a: &Architecture) -> f64 {
        if self.kind.learned() { 4.0 * (a.head_dim * self.cols) as f64 } else { 0.0 }
    }

    /// The same for mixers that divide weights by their sum.
    pub fn check_positive(&self, a: &Architecture) -> std::result::Result<(), String> {
        if !self.kind.positive() {
            return Err(
                "`mixer.feature_map` must have features that are never negative here, since weights are divided \
                        by their sum"
                    .into(),
            );
        }
        self.check(a)
    }

    /// Says what cannot be, if so.
    pub fn check(&self, a: &Architecture) -> std::result::Result<(), String> {
        if self.skip_connection && self.cols != a.head_dim {
            let cols = self.cols;
            return Err(format!("`mixer.skip_connection` needs `feature_dim` = head_dim {}, not {cols}", a.head_dim));
        }
        if self.start == Start::Principal && (self.skip_connection || !self.kind.learned()) {
            return Err(
                "`mixer.principal_init` starts weights that features are made with: it needs a `feature_map` that has \
                        them, without `skip_connection`"
                    .into(),
            );
        }
        if self.bias == Bias::Head && matches!(self.kind, FeatureMap::SoftmaxDim | FeatureMap::ExpDim) {
            return Err("`mixer.bias` = \"head\" shifts all columns alike, which this `feature_map` cancels; \
                        take \"full\" or \"none\""
                .into());
        }
        Ok(())
    }

    /// `feature_map_{q,k}.mlp.layer` [H, D, C] and their biases, as LoLCATs checkpoints name them.
    pub fn specs(&self, a: &Architecture) -> Vec<Spec> {
        let (h, d, cols) = (a.heads, a.head_dim, self.cols);
        let init = match (self.start, self.skip_connection) {
            (Start::Identity, false) => Init::Identity,
            (Start::Identity, true) => Init::Constant(0.0),
            (Start::Random, _) => Init::Uniform { bound: (6.0 / (d * cols) as f64).sqrt(), stream: 0 },
            (Start::Principal, _) => Init::Principal,
        };
        let names = WEIGHTS.into_iter().zip(["feature_map_q.mlp.bias", "feature_map_k.mlp.bias"]);
        let mut specs = Vec::new();
        if !self.kind.learned() {
            return specs;
        }
        for (weight, bias) in names.take(if self.tie_qk { 1 } else { 2 }) {
            specs.push(Spec { name: weight, shape: vec![h, d, cols], init, scalar: false });
            // As the official code initialises it: Kaiming uniform with a fan-in of H.
            let bias_init = Init::Uniform { bound: (6.0 / h as f64).sqrt(), stream: 1 };
            match self.bias {
                Bias::None => {}
                Bias::Head => specs.push(Spec { name: bias, shape: vec![1, h, 1, 1], init: bias_init, scalar: true }),
                Bias::Full => {
                    specs.push(Spec { name: bias, shape: vec![h, cols], init: Init::Constant(0.0), scalar: true })
                }
            }
        }
        specs
    }

    /// The principal directions of each head's queries and keys in `qkv` [B, T, H + 2 Hkv, D], the leading ones as columns of
    /// its weights [H, D, C]; scaled so that in them u·u' / sqrt(C) is the score q·k / sqrt(D).
    pub fn principal(&self, a: &Architecture, qkv: &Tensor) -> Result<Vec<(&'static str, Tensor)>> {
        let (d, cols) = (a.head_dim, self.cols);
        let rows =
            |head: usize| qkv.narrow(2, head, 1)?.to_dtype(DType::F64)?.to_device(&Device::Cpu)?.reshape(((), d));
        let covariance = |head: usize| -> Result<Vec<f64>> {
            let x = Tensor::cat(&[rows(head)?, rows(a.heads + head / (a.heads / a.kv_heads))?], 0)?; // [2 B T, D]
            let centred = x.broadcast_sub(&x.mean_keepdim(0)?)?;
            centred.t()?.matmul(&centred)?.flatten_all()?.to_vec1()
        };
        let moments = (0..a.heads).map(covariance).collect::<Result<Vec<_>>>()?;
        let scale = (cols as f64 / d as f64).powf(0.25);
        let weight = |moment: Vec<f64>| {
            let found = directions(moment, d);
            let cell = |at: usize| found.get(at % cols).map_or(0.0, |direction| (scale * direction[at / cols]) as f32);
            (0..d * cols).map(cell).collect::<Vec<f32>>()
        };
        let cells: Vec<f32> = moments.into_par_iter().flat_map_iter(weight).collect();
        let weight = Tensor::from_vec(cells, (a.heads, d, cols), &Device::Cpu)?;
        Ok(WEIGHTS.into_iter().take(if self.tie_qk { 1 } else { 2 }).map(|name| (name, weight.clone())).collect())
    }

    /// The maps with their tensors, which are among `params`.
    pub fn build(&self, a: &Architecture, params: &[Param]) -> Maps {
        let group = a.heads / a.kv_heads;
        let sources = (0..a.heads).chain((0..a.heads).map(|h| a.heads + h / group)).collect();
        let ours = |p: &&Param| p.name.contains("feature_map_");
        Maps { form: *self, heads: a.heads, sources, params: params.iter().filter(ours).cloned().collect() }
    }
}

/// The maps of a layer.
pub struct Maps {
    pub form: Form,
    heads: usize,
    /// Head of packed queries, keys and values that each map reads: queries, then for every query head its key head.
    pub sources: Vec<usize>,
    params: Vec<Param>,
}

impl Maps {
    /// One tensor for the query and key maps: [2 H, ..].
    pub fn both(&self, part: &str) -> Result<Option<Tensor>> {
        let of = |which| named(&self.params, &format!("feature_map_{which}.mlp.{part}")).map(|p| p.var);
        let Some(q) = of("q") else { return Ok(None) };
        let k = of("k").unwrap_or_else(|| q.clone());
        let flat = |x: &Tensor| if part == "bias" { x.reshape((self.heads, ())) } else { Ok(x.clone()) };
        Tensor::cat(&[flat(&q)?, flat(&k)?], 0).map(Some)
    }

    /// Weights of the maps of queries and keys, [2 H, D, C]; `None` for maps without weights.
    pub fn weights(&self) -> Result<Option<Tensor>> {
        let Some(weight) = self.both("layer")? else { return Ok(None) };
        if self.form.skip_connection {
            return weight.broadcast_add(&Tensor::eye(self.form.cols, weight.dtype(), weight.device())?).map(Some);
        }
        Ok(Some(weight))
    }

    /// The same where attention and maps may run as one op.
    pub fn fusible_weights(&self) -> Result<Option<Tensor>> {
        let fusible = self.form.kind == FeatureMap::SoftmaxDim && self.form.bias == Bias::None;
        if fusible { self.weights() } else { Ok(None) }
    }

    /// Their kinds and weights bf16 [H, D, C] in a one-token step.
    #[cfg(feature = "cuda")]
    pub fn fixed(&self) -> Result<([crate::ops::decode::linear::Map; 2], Option<[Tensor; 2]>)> {
        use crate::ops::decode::linear::Map;
        let kind = match self.form.kind {
            FeatureMap::SoftmaxDim => Map::SoftmaxDim,
            FeatureMap::ExpDim => Map::ExpDim,
            FeatureMap::Exp => Map::Exp,
            FeatureMap::Relu => Map::Relu,
            FeatureMap::Elu => Map::Elu,
            FeatureMap::Softmax => Map::Softmax,
            FeatureMap::Identity => Map::Identity,
            FeatureMap::Silu => Map::Silu,
            FeatureMap::Taylor => candle_core::bail!("the map Taylor has no one-token kernel"),
        };
        if self.both("bias")?.is_some() || self.form.cols > 256 {
            candle_core::bail!("maps with biases or more than 256 columns have no one-token kernel")
        }
        let halves = |w: Tensor| -> Result<[Tensor; 2]> {
            let part = |from| w.narrow(0, from, self.heads)?.to_dtype(candle_core::DType::BF16)?.copy();
            Ok([part(0)?, part(self.heads)?])
        };
        Ok(([kind; 2], self.weights()?.map(halves).transpose()?))
    }

    /// φ [B, T, maps, F] of packed heads by the maps that read `sources`, which are `from..` of all maps.
    fn apply(&self, packed: &Tensor, from: usize, sources: &[usize]) -> Result<Tensor> {
        let Some(weight) = self.weights()? else {
            let index = Tensor::from_iter(sources.iter().map(|s| *s as u32), packed.device())?;
            let heads = packed.contiguous()?.index_select(&index, 2)?;
            return match self.form.kind {
                FeatureMap::Softmax => softmax(&heads),
                FeatureMap::Silu => heads.silu(),
                FeatureMap::Elu => heads.elu(1.0)? + 1.0,
                _ => Ok(heads),
            };
        };
        let (maps, cols) = (self.sources.len(), self.form.cols);
        let bias = match self.both("bias")? {
            Some(bias) => bias.broadcast_as((maps, cols))?.contiguous()?,
            None => Tensor::zeros((maps, cols), weight.dtype(), weight.device())?,
        };
        let cut = |x: Tensor| if sources.len() == maps { Ok(x) } else { x.narrow(0, from, sources.len()) };
        let (weight, bias) = (cut(weight)?.to_dtype(packed.dtype())?, cut(bias)?.to_dtype(packed.dtype())?);
        let activation = match self.form.kind {
            FeatureMap::SoftmaxDim => feature_map::Activation::SoftmaxDim,
            FeatureMap::ExpDim => feature_map::Activation::ExpDim,
            FeatureMap::Relu => feature_map::Activation::Relu,
            FeatureMap::Exp => return exponentials(&projected(packed, sources, &weight, &bias)?),
            FeatureMap::Taylor => return taylor::taylor(&projected(packed, sources, &weight, &bias)?),
            FeatureMap::Elu | FeatureMap::Softmax | FeatureMap::Identity | FeatureMap::Silu => {
                candle_core::bail!("a map without weights has none")
            }
        };
        feature_map::FeatureMap { activation, sources: sources.to_vec() }.forward(packed, &weight, &bias)
    }

    /// φ of queries and of keys, side by side [B, T, 2 H, F], of packed heads [B, T, H + 2 Hkv, D].
    pub fn features(&self, packed: &Tensor) -> Result<Tensor> {
        self.apply(packed, 0, &self.sources)
    }

    /// The same apart, φq and φk [B, T, H, F]: their gradients then meet in nothing that is as large as both.
    pub fn apart(&self, packed: &Tensor) -> Result<(Tensor, Tensor)> {
        let (of_queries, of_keys) = self.sources.split_at(self.heads);
        Ok((self.apply(packed, 0, of_queries)?, self.apply(packed, self.heads, of_keys)?))
    }

    /// φq [B, T, H, F] of heads [B, T, H or more, D] whose first are queries.
    pub fn queries(&self, packed: &Tensor) -> Result<Tensor> {
        self.apply(packed, 0, &self.sources[..self.heads])
    }

    /// φk [B, T, H, F] of keys [B, T, Hkv, D].
    pub fn keys(&self, k: &Tensor) -> Result<Tensor> {
        let sources: Vec<usize> = self.sources[self.heads..].iter().map(|s| s - self.heads).collect();
        self.apply(k, self.heads, &sources)
    }

    /// φk [B, T, H, F] of keys that every query head has its own of, [B, T, H, D].
    pub fn own_keys(&self, k: &Tensor) -> Result<Tensor> {
        self.apply(k, self.heads, &self.sources[..self.heads])
    }
}

/// x W + b of heads `sources`, [B, T, maps, C].
fn projected(packed: &Tensor, sources: &[usize], weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let index = Tensor::from_iter(sources.iter().map(|s| *s as u32), packed.device())?;
    let x = packed.contiguous()?.index_select(&index, 2)?.transpose(1, 2)?.contiguous()?;
    x.broadcast_matmul(weight)?.transpose(1, 2)?.broadcast_add(bias)?.contiguous()
}

/// e^u and e^-u of `u` [B, T, H, C]: [B, T, H, 2 C].
fn exponentials(u: &Tensor) -> Result<Tensor> {
    let wide = wide_of(u)?;
    Tensor::cat(&[&wide, &wide.neg()?], 3)?.exp()?.maximum(1e-12)?.to_dtype(u.dtype())
}
