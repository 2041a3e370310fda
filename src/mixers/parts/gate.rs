//! What a state forgets: natural logarithms of decays, at most 0, in at least f32.

use candle_core::{D, DType, Device, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::families::Architecture;
use crate::mixers::linear::project;
use crate::mixers::pass::wide_of;
use crate::mixers::{Heads, Spec};
use crate::ops::gate::{self, Curve};
use crate::ops::gated_linear_attn::Exponents;
use crate::params::{Init, Param, named};

/// Where the decay comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Gate {
    /// Which gate.
    pub kind: GateKind,
    /// Log decays of the sigmoid kinds are divided by this.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub normaliser: f64,
    /// Start of the bias of the sigmoid kinds that have one: larger forgets less.
    pub bias: f64,
    /// Inner width of `low_rank`.
    #[schemars(range(min = 1))]
    pub rank: usize,
    /// Start the bias at the distances that the teacher's heads attend over on a few sequences of the training text: half
    /// of the state is forgotten after the mean one. For kinds that have a bias.
    pub attended: bool,
}

/// Kinds of gates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GateKind {
    /// Nothing is forgotten.
    None,
    /// ln σ(w·x + b), one number per token for all heads.
    ScalarToken,
    /// ln σ(W x + b), one number per token and head.
    ScalarHead,
    /// -e^A softplus(W x + dt), one number per token and head, as in Mamba-2 and gated delta.
    Mamba2,
    /// ln σ(W2 W1 x + b), one number per key channel, as in GLA.
    LowRank,
    /// ln σ(k), one number per key channel, read off the keys themselves: no parameters, as in Liger.
    Pooled,
    /// ln(1 - 2^(-5 - h)) of head h, fixed, as in RetNet.
    Retention,
    /// -(8 / H)(1 - layer / layers) h of head h, fixed, as in lightning attention.
    Lightning,
}

impl Default for Gate {
    fn default() -> Self {
        Gate { kind: GateKind::ScalarHead, normaliser: 1.0, bias: 4.0, rank: 16, attended: false }
    }
}

/// Names of the tensors of a gate.
const SCALAR: [&str; 2] = ["g_proj_decay.weight", "g_proj_decay.bias"];
const LOW_RANK: [&str; 3] = ["gk_proj.0.weight", "gk_proj.1.weight", "gk_proj.1.bias"];
const MAMBA: [&str; 3] = ["a_proj.weight", "A_log", "dt_bias"];

impl Gate {
    pub fn of(kind: GateKind) -> Gate {
        Gate { kind, ..Gate::default() }
    }

    /// Whether it has one number per key channel.
    pub fn per_channel(&self) -> bool {
        matches!(self.kind, GateKind::LowRank | GateKind::Pooled)
    }

    /// Says what cannot be, if so.
    pub fn check(&self) -> std::result::Result<(), String> {
        match self.kind {
            GateKind::None | GateKind::Pooled | GateKind::Retention | GateKind::Lightning if self.attended => {
                Err("`mixer.gate.attended` starts a bias, which this `mixer.gate.kind` has not".into())
            }
            _ => Ok(()),
        }
    }

    /// Its tensors, for keys of `width` channels.
    pub fn specs(&self, a: &Architecture, width: usize) -> Vec<Spec> {
        let bias = |init| if self.attended { Init::Attended } else { init };
        let new = |name, shape: &[usize], init, scalar| Spec { name, shape: shape.to_vec(), init, scalar };
        let scalars = |count: usize| {
            vec![
                new(SCALAR[0], &[count, a.hidden], Init::Constant(0.0), true),
                new(SCALAR[1], &[count], bias(Init::Constant(self.bias)), true),
            ]
        };
        match self.kind {
            GateKind::None | GateKind::Pooled | GateKind::Retention | GateKind::Lightning => Vec::new(),
            GateKind::ScalarToken => scalars(1),
            GateKind::ScalarHead => scalars(a.heads),
            GateKind::Mamba2 => vec![
                new(MAMBA[0], &[a.heads, a.hidden], Init::Constant(0.0), true),
                new(MAMBA[1], &[a.heads], Init::Constant(0.0), true),
                new(MAMBA[2], &[a.heads], bias(Init::Steps { low: 1e-3, high: 0.1, stream: 0x20 }), true),
            ],
            GateKind::LowRank => {
                let channels = a.kv_heads * width;
                let narrow = Init::Normal { std: 0.006, stream: 0x21 };
                vec![
                    new(LOW_RANK[0], &[self.rank, a.hidden], narrow, true),
                    new(LOW_RANK[1], &[channels, self.rank], Init::Normal { std: 0.006, stream: 0x22 }, true),
                    new(LOW_RANK[2], &[channels], bias(Init::Constant(self.bias)), true),
                ]
            }
        }
    }

    /// The start of the bias where it is that of `attended`, for the teacher's attention `weights` [B, H, T, T] (Taylor-Calibrate,
    /// arXiv 2606.16429): a head that attends over d positions in the mean keeps e^-r, r = ln 2 / d, between 1e-3 and 5. A
    /// bias that several heads share gets their mean r.
    pub fn measure(&self, a: &Architecture, width: usize, weights: &Tensor) -> Result<Vec<(&'static str, Tensor)>> {
        let (name, groups, channels) = match self.kind {
            GateKind::ScalarToken => (SCALAR[1], 1, 1),
            GateKind::ScalarHead => (SCALAR[1], a.heads, 1),
            GateKind::Mamba2 => (MAMBA[2], a.heads, 1),
            GateKind::LowRank => (LOW_RANK[2], a.kv_heads, width),
            _ => return Ok(Vec::new()),
        };
        let time = weights.dim(2)?;
        let places = Tensor::arange(0f32, time as f32, weights.device())?;
        let seen = weights.to_dtype(DType::F32)?.broadcast_mul(&places)?.sum(3)?; // [B, H, T]
        let distances = places.broadcast_sub(&seen)?.mean((0, 2))?.to_vec1::<f32>()?;
        let rates = distances.iter().map(|d| (std::f64::consts::LN_2 / f64::from(*d)).clamp(1e-3, 5.0));
        let rates: Vec<f64> = rates.collect();
        let of = |r: f64| match self.kind {
            GateKind::Mamba2 => r.exp_m1().ln(),
            _ => -(r * self.normaliser).exp_m1().ln(), // ln σ(b) = -r τ
        };
        let bias = |shared: &[f64]| of(shared.iter().sum::<f64>() / shared.len() as f64) as f32;
        let bias = rates.chunks(a.heads / groups).flat_map(|shared| std::iter::repeat_n(bias(shared), channels));
        Ok(vec![(name, Tensor::from_iter(bias, &Device::Cpu)?)])
    }

    /// The gate with its tensors, which are among `params`, for keys of `width` channels in `layer`.
    pub fn build(&self, a: &Architecture, layer: usize, width: usize, params: &[Param]) -> Decays {
        let names: &[&str] = match self.kind {
            GateKind::ScalarToken | GateKind::ScalarHead => &SCALAR,
            GateKind::Mamba2 => &MAMBA,
            GateKind::LowRank => &LOW_RANK,
            _ => &[],
        };
        let find = |name: &&str| named(params, name);
        let h = a.heads as f64;
        let by_head = |f: &dyn Fn(f64) -> f64| (0..a.heads).map(|i| f(i as f64)).collect();
        let fixed = match self.kind {
            GateKind::Retention => by_head(&|i| (-(-5.0 - i).exp2()).ln_1p()),
            GateKind::Lightning => by_head(&|i| -8.0 / h * (1.0 - layer as f64 / a.layers as f64) * i),
            _ => Vec::new(),
        };
        let pool = (self.kind == GateKind::Pooled && width != a.head_dim).then_some(width);
        Decays { gate: self.clone(), tensors: names.iter().filter_map(find).collect(), fixed, width, pool, floor: None }
    }

    /// Multiply-adds times two per token.
    pub fn flops(&self, a: &Architecture, width: usize) -> f64 {
        let products: usize =
            self.specs(a, width).iter().filter(|s| s.shape.len() == 2).map(|s| s.shape.iter().product::<usize>()).sum();
        2.0 * products as f64
    }
}

/// [`Gate`] with its tensors.
pub struct Decays {
    gate: Gate,
    tensors: Vec<Param>,
    /// Log decays of the heads where they are fixed.
    fixed: Vec<f64>,
    width: usize,
    /// Channels per key head that keys are averaged to, where not their own.
    pool: Option<usize>,
    /// Log decays below it count as that, without gradient.
    floor: Option<f64>,
}

impl Decays {
    /// The same with log decays that `exponents` can be formed of.
    pub fn raised(self, exponents: Exponents) -> Decays {
        let floor = (exponents == Exponents::Recentred).then(|| exponents.floor());
        Decays { floor, ..self }
    }

    /// Log decays: [B, T, H], [B, T, H, width] where they are per channel.
    pub fn log(&self, x: &Heads) -> Result<Tensor> {
        let g = self.unbounded(x)?;
        self.floor.map_or(Ok(g.clone()), |floor| g.maximum(floor))
    }

    fn unbounded(&self, x: &Heads) -> Result<Tensor> {
        let (b, t, _, _) = x.qkv.dims4()?;
        let h = x.heads;
        // ln σ / τ of as many groups of heads.
        let sigmoid = |groups: usize| gate::Gate {
            curve: Curve::LogSigmoid,
            scale: 1.0 / self.gate.normaliser,
            group: h / groups,
        };
        match (self.gate.kind, self.tensors.as_slice()) {
            (GateKind::ScalarToken | GateKind::ScalarHead, [weight, bias]) => {
                let logits = project(&x.x, weight)?.unsqueeze(3)?; // [B, T, 1 or H, 1]
                sigmoid(logits.dim(2)?).forward(&logits, Some(&bias.var), None)?.squeeze(3)
            }
            (GateKind::Mamba2, [weight, a_log, dt_bias]) => {
                let rate = a_log.var.exp()?.neg()?;
                let logits = project(&x.x, weight)?.unsqueeze(3)?;
                gate::Gate::of(Curve::Softplus).forward(&logits, Some(&dt_bias.var), Some(&rate))?.squeeze(3)
            }
            (GateKind::LowRank, [first, second, bias]) => {
                let logits = project(&project(&x.x, first)?, second)?.reshape((b, t, x.kv_heads, self.width))?;
                sigmoid(x.kv_heads).forward(&logits, Some(&bias.var), None)
            }
            (GateKind::Pooled, _) => sigmoid(x.kv_heads).forward(&self.pooled(x)?, None, None),
            (GateKind::Retention | GateKind::Lightning, _) => {
                let g =
                    Tensor::new(self.fixed.as_slice(), x.qkv.device())?.to_dtype(crate::ops::wide(x.qkv.dtype()))?;
                g.reshape((1, 1, h))?.broadcast_as((b, t, h))?.contiguous()
            }
            _ => Tensor::zeros((b, t, h), crate::ops::wide(x.qkv.dtype()), x.qkv.device()),
        }
    }

    /// Log decays below it count as that.
    #[cfg(feature = "cuda")]
    pub fn lowest(&self) -> f64 {
        self.floor.unwrap_or(crate::ops::gated_linear_attn::LOWEST)
    }

    /// Channels per key.
    #[cfg(feature = "cuda")]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Whether every channel has a decay of its own.
    #[cfg(feature = "cuda")]
    pub fn per_channel(&self) -> bool {
        self.gate.per_channel()
    }

    /// The same in a one-token step, and what logarithms of sigmoids are multiplied by.
    #[cfg(feature = "cuda")]
    pub fn fixed(
        &self,
        at: crate::ops::decode::linear::Frame,
        reads: &mut crate::ops::decode::linear::Reads,
    ) -> Result<(crate::ops::decode::linear::Decay, f64)> {
        use crate::ops::decode::linear::Decay;
        let decay = match (self.gate.kind, self.tensors.as_slice()) {
            (GateKind::ScalarToken | GateKind::ScalarHead, [weight, bias]) => {
                Decay::Scalar(at.flat(&bias.var)?, reads.fine(&weight.var)?)
            }
            (GateKind::Mamba2, [weight, a_log, dt_bias]) => {
                Decay::StepSize(at.flat(&dt_bias.var)?, at.flat(&a_log.var)?.exp()?.neg()?, reads.fine(&weight.var)?)
            }
            (GateKind::LowRank, [first, second, bias]) => {
                let second = at.flat(&second.var)?.reshape(second.var.shape())?;
                Decay::LowRank(at.flat(&bias.var)?, second, reads.fine(&first.var)?)
            }
            (GateKind::Pooled, _) => Decay::Pooled,
            (GateKind::Retention | GateKind::Lightning, _) => {
                Decay::Fixed(at.flat(&Tensor::new(self.fixed.as_slice(), at.device)?)?)
            }
            _ => Decay::Keep,
        };
        Ok((decay, 1.0 / self.gate.normaliser))
    }

    /// The keys' channels, averaged over neighbours where fewer are wanted: [B, T, Hkv, width].
    fn pooled(&self, x: &Heads) -> Result<Tensor> {
        match self.pool {
            Some(width) => pool(&wide_of(&x.keys()?)?, Some(width)),
            None => x.keys(),
        }
    }
}

/// Adaptive average pooling of the channels of all heads of `x` [B, T, Hkv, D] to `width` per head.
pub fn pool(x: &Tensor, width: Option<usize>) -> Result<Tensor> {
    let (b, t, g, d) = x.dims4()?;
    let Some(width) = width.filter(|w| *w != d) else { return Ok(x.clone()) };
    if d % width == 0 {
        return x.reshape((b, t, g, width, d / width))?.mean(D::Minus1);
    }
    let (from, to) = (g * d, g * width);
    let cells = (0..from * to).map(|n| {
        let (row, col) = (n / to, n % to);
        let (start, end) = (col * from / to, ((col + 1) * from).div_ceil(to));
        if (start..end).contains(&row) { 1.0 / (end - start) as f64 } else { 0.0 }
    });
    let average = Tensor::from_iter(cells, x.device())?.reshape((from, to))?.to_dtype(x.dtype())?;
    x.reshape((b * t, from))?.matmul(&average)?.reshape((b, t, g, width))
}
