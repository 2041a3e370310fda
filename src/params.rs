//! Named weights that train, and LoRA adapters on frozen ones.

use std::collections::BTreeMap;
use std::fmt;

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::families::{Architecture, Projection};
use crate::ops::linear::linear;

/// One trainable tensor: f32 whatever the model's precision, because low-precision updates vanish.
#[derive(Clone)]
pub struct Param {
    /// Name in the exported checkpoint.
    pub name: String,
    pub var: Var,
    /// Gates, factors and other scalars, which may have a learning rate of their own.
    pub scalar: bool,
}

/// How a new tensor starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    Constant(f64),
    /// Every matrix of the last two axes is the rectangular identity.
    Identity,
    /// U(-bound, bound); tensors of a layer with the same `stream` start alike.
    Uniform {
        bound: f64,
        stream: u64,
    },
    /// N(0, std²).
    Normal {
        std: f64,
        stream: u64,
    },
    /// Filters whose last tap is 1 and whose others are `others`.
    LastTap {
        others: f64,
    },
    /// 0, step, 2 step, ...
    Ramp {
        step: f64,
    },
    /// softplus⁻¹ of step sizes spread evenly over the logarithm of `low..high`: biases of step sizes.
    Steps {
        low: f64,
        high: f64,
        stream: u64,
    },
}

impl fmt::Display for Init {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Init::Identity => write!(f, "as the identity"),
            Init::Constant(value) => write!(f, "at {value:.4}"),
            Init::Uniform { bound, .. } => write!(f, "uniform in ±{bound:.4}"),
            Init::Normal { std, .. } => write!(f, "normal with deviation {std:.4}"),
            Init::LastTap { others } => write!(f, "at 1 in the last tap, {others:.4} in the others"),
            Init::Ramp { step } => write!(f, "at 0, {step}, {:.1}, ...", 2.0 * step),
            Init::Steps { low, high, .. } => write!(f, "at step sizes from {low} to {high}"),
        }
    }
}

impl Init {
    /// The start of a tensor of layer `layer`; the same seed gives the same values.
    pub fn tensor(self, shape: &[usize], seed: u64, layer: usize) -> Result<Tensor> {
        let count: usize = shape.iter().product();
        let data: Vec<f32> = match self {
            Init::Constant(value) => vec![value as f32; count],
            Init::Identity => {
                let (rows, cols) = (shape[shape.len() - 2], shape[shape.len() - 1]);
                (0..count).map(|i| ((i / cols) % rows == i % cols) as u8 as f32).collect()
            }
            Init::LastTap { others } => {
                let taps = shape[shape.len() - 1];
                (0..count).map(|i| if (i + 1) % taps == 0 { 1.0 } else { others as f32 }).collect()
            }
            Init::Ramp { step } => (0..count).map(|i| (step * i as f64) as f32).collect(),
            Init::Uniform { bound, stream } => {
                let mut rng = stream_of(seed, layer, stream);
                (0..count).map(|_| rng.random_range(-bound..=bound) as f32).collect()
            }
            Init::Normal { std, stream } => {
                let mut rng = stream_of(seed, layer, stream);
                // Box and Muller: one draw of a pair is enough.
                let mut normal = || {
                    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
                    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
                };
                (0..count).map(|_| (std * normal()) as f32).collect()
            }
            Init::Steps { low, high, stream } => {
                let mut rng = stream_of(seed, layer, stream);
                let step = |share: f64| (low.ln() + share * (high / low).ln()).exp();
                (0..count).map(|_| step(rng.random()).exp_m1().ln() as f32).collect()
            }
        };
        Tensor::from_vec(data, shape, &Device::Cpu)
    }
}

/// The random numbers of one tensor of a layer.
fn stream_of(seed: u64, layer: usize, stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream((layer as u64) << 16 | stream);
    rng
}

/// LoRA on projections of the decoder: `y += scale * (x Aᵀ) Bᵀ`.
pub struct Adapters {
    /// (A [rank, in], B [out, rank]) by layer and projection.
    pairs: BTreeMap<(usize, Projection), (Var, Var)>,
    pub rank: usize,
    pub alpha: f64,
    pub dropout: f64,
}

impl Adapters {
    /// A starts U(±1/√in), B at zero: the student starts unchanged.
    pub fn new(
        architecture: &Architecture,
        targets: &[Projection],
        settings: &crate::recipe::Lora,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let mut pairs = BTreeMap::new();
        for layer in 0..architecture.layers {
            for (n, target) in targets.iter().enumerate() {
                let [out, inner] = architecture.shape(*target);
                let init = Init::Uniform { bound: (inner as f64).powf(-0.5), stream: 0x100 + n as u64 };
                let a = init.tensor(&[settings.rank, inner], seed, layer)?.to_device(device)?;
                let b = Tensor::zeros((out, settings.rank), DType::F32, device)?;
                pairs.insert((layer, *target), (Var::from_tensor(&a)?, Var::from_tensor(&b)?));
            }
        }
        Ok(Adapters { pairs, rank: settings.rank, alpha: settings.alpha, dropout: settings.dropout })
    }

    fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// What the adapter of a projection adds for input `x` [.., in], where there is one. `noise` seeds dropout.
    pub fn apply(&self, layer: usize, p: Projection, x: &Tensor, noise: Option<u64>) -> Result<Option<Tensor>> {
        let Some((a, b)) = self.pairs.get(&(layer, p)) else { return Ok(None) };
        let mut shape = x.dims().to_vec();
        let inner = shape.pop().unwrap_or(0);
        let mut x = x.reshape((x.elem_count() / inner, inner))?;
        if let Some(seed) = noise.filter(|_| self.dropout > 0.0) {
            x = (&x * keep_mask(x.dims(), self.dropout, seed, (layer * 8 + p as usize) as u64, x.device())?)?;
        }
        let low = x.matmul(&a.to_dtype(x.dtype())?.t()?)?;
        let y = low.matmul(&(b.as_tensor() * self.scale())?.to_dtype(x.dtype())?.t()?)?;
        shape.push(y.dim(1)?);
        Ok(Some(y.reshape(shape)?))
    }

    /// `weight + scale * B A` in f32, cast once to the weight's own type; `None` where there is no adapter.
    pub fn merged(&self, layer: usize, p: Projection, weight: &Tensor) -> Result<Option<Tensor>> {
        let Some((a, b)) = self.pairs.get(&(layer, p)) else { return Ok(None) };
        let change = (b.matmul(a.as_tensor())? * self.scale())?;
        (weight.to_dtype(DType::F32)? + change)?.to_dtype(weight.dtype()).map(Some)
    }

    /// All A and B, by the names PEFT gives them.
    pub fn params(&self) -> Vec<Param> {
        let named = |((layer, p), (a, b)): (&(usize, Projection), &(Var, Var))| {
            let module = format!("model.layers.{layer}.{}", p.path());
            [("lora_A", a), ("lora_B", b)].map(|(side, var)| Param {
                name: format!("{module}.{side}.weight"),
                var: var.clone(),
                scalar: false,
            })
        };
        self.pairs.iter().flat_map(named).collect()
    }

    /// Layers and projections that carry an adapter.
    pub fn targets(&self) -> impl Iterator<Item = (usize, Projection)> + '_ {
        self.pairs.keys().copied()
    }
}

/// 1 / (1 - p) where an element is kept, else 0; the same seed and stream give the same mask, so that recomputation in
/// the backward pass sees what the forward pass saw.
fn keep_mask(shape: &[usize], p: f64, seed: u64, stream: u64, device: &Device) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    let kept = (1.0 / (1.0 - p)) as f32;
    let data: Vec<f32> =
        (0..shape.iter().product()).map(|_| if rng.random::<f64>() < p { 0.0 } else { kept }).collect();
    Tensor::from_vec(data, shape, device)
}

/// Frozen projections of one input, stacked so that one product serves them all: `x Wᵀ + b`.
pub struct Stack {
    /// Each projection with its first row and its row count.
    members: Vec<(Projection, usize, usize)>,
    /// [rows of all, in]
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Stack {
    /// Stacks weights [out, in] with their biases; zeros stand for a bias that is missing beside others.
    pub fn new(parts: Vec<(Projection, Tensor, Option<Tensor>)>) -> Result<Stack> {
        let mut members = Vec::with_capacity(parts.len());
        let mut start = 0;
        for (p, weight, _) in &parts {
            let rows = weight.dim(0)?;
            members.push((*p, start, rows));
            start += rows;
        }
        let bias = if parts.iter().any(|(_, _, bias)| bias.is_some()) {
            let of = |(_, weight, bias): &(Projection, Tensor, Option<Tensor>)| match bias {
                Some(bias) => Ok(bias.clone()),
                None => Tensor::zeros(weight.dim(0)?, weight.dtype(), weight.device()),
            };
            Some(Tensor::cat(&parts.iter().map(of).collect::<Result<Vec<_>>>()?, 0)?)
        } else {
            None
        };
        let weights: Vec<Tensor> = parts.into_iter().map(|(_, weight, _)| weight).collect();
        let weight = if let [one] = weights.as_slice() { one.clone() } else { Tensor::cat(&weights, 0)? };
        Ok(Stack { members, weight, bias })
    }

    fn member(&self, p: Projection) -> Option<(usize, usize)> {
        self.members.iter().find(|m| m.0 == p).map(|m| (m.1, m.2))
    }

    /// The weight [out, in] of a projection that is in here.
    pub fn weight(&self, p: Projection) -> Option<Result<Tensor>> {
        self.member(p).map(|(start, rows)| self.weight.narrow(0, start, rows))
    }

    /// The stacked weight [rows of all, in] and bias.
    pub fn whole(&self) -> (&Tensor, Option<&Tensor>) {
        (&self.weight, self.bias.as_ref())
    }

    /// Replaces the weight of a projection that is in here.
    pub fn set_weight(&mut self, p: Projection, weight: &Tensor) -> Result<()> {
        match self.member(p) {
            Some((start, _)) => self.weight.slice_set(&weight.contiguous()?, 0, start),
            None => candle_core::bail!("{} is not in this stack", p.name()),
        }
    }

    /// All projections of `x` [.., in] side by side, [.., rows of all], with what adapters of `layer` add.
    pub fn apply(&self, layer: usize, x: &Tensor, lora: Option<&Adapters>, noise: Option<u64>) -> Result<Tensor> {
        let mut y = linear(x, &self.weight)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        let Some(lora) = lora else { return Ok(y) };
        let changes = self.members.iter().map(|(p, ..)| lora.apply(layer, *p, x, noise));
        let changes = changes.collect::<Result<Vec<_>>>()?;
        if changes.iter().all(Option::is_none) {
            return Ok(y);
        }
        if let [Some(change)] = changes.as_slice() {
            return y + change;
        }
        let mut shape = x.dims().to_vec();
        let mut parts = Vec::with_capacity(changes.len());
        for (change, (_, _, rows)) in changes.into_iter().zip(&self.members) {
            if let Some(last) = shape.last_mut() {
                *last = *rows;
            }
            parts.push(change.map_or_else(|| Tensor::zeros(shape.as_slice(), y.dtype(), y.device()), Ok)?);
        }
        y + Tensor::cat(&parts, shape.len() - 1)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(x: Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn dropout_keeps_the_mean_and_repeats() {
        let mask = |seed, stream| values(keep_mask(&[100, 200], 0.25, seed, stream, &Device::Cpu).unwrap());
        let one = mask(1, 2);
        assert!(one.iter().all(|m| *m == 0.0 || (*m - 4.0 / 3.0).abs() < 1e-6));
        // 20,000 draws: the mean's standard deviation is sqrt(1 / 3 / 20,000) = 0.004.
        let mean = one.iter().sum::<f32>() / one.len() as f32;
        assert!((mean - 1.0).abs() < 0.016, "mean {mean}");
        assert_eq!(one, mask(1, 2));
        assert_ne!(one, mask(1, 3));
        assert_ne!(one, mask(2, 2));
    }

    #[test]
    fn starts_depend_on_seed_layer_and_stream() {
        let start =
            |seed, layer, stream| values(Init::Uniform { bound: 0.5, stream }.tensor(&[3, 40], seed, layer).unwrap());
        let one = start(1, 0, 7);
        assert!(one.iter().all(|x| x.abs() <= 0.5) && one.iter().any(|x| x.abs() > 0.45));
        assert_eq!(one, start(1, 0, 7));
        for other in [start(2, 0, 7), start(1, 1, 7), start(1, 0, 8)] {
            assert_ne!(one, other);
        }
        let eye = |shape: &[usize]| values(Init::Identity.tensor(shape, 1, 0).unwrap());
        assert_eq!(eye(&[2, 2, 3]), [1., 0., 0., 0., 1., 0., 1., 0., 0., 0., 1., 0.]);
        assert_eq!(eye(&[3, 2]), [1., 0., 0., 1., 0., 0.]);
    }
}
