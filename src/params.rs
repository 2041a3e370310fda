//! Named weights that train, and changes of frozen ones: LoRA, and tensors in full.

mod whole;

use std::collections::BTreeMap;
use std::fmt;

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::families::{Architecture, Projection, Role};
use crate::ops::linear::{linear, project};

/// One trainable tensor: f32 whatever the model's precision, because low-precision updates vanish.
#[derive(Clone)]
pub struct Param {
    /// Name in the exported checkpoint.
    pub name: String,
    pub var: Var,
    /// Gates, factors and other scalars, which may have a learning rate of their own.
    pub scalar: bool,
}

/// The parameter of a layer's `params` that the layer calls `name`.
pub fn named(params: &[Param], name: &str) -> Option<Param> {
    let fits = |p: &&Param| p.name.strip_suffix(name).is_some_and(|head| head.is_empty() || head.ends_with('.'));
    params.iter().find(fits).cloned()
}

/// How a new tensor starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    Constant(f64),
    /// Every matrix of the last two axes is the rectangular identity.
    Identity,
    /// The principal directions of what the layer sees of the training text, which are set once there is some; till then
    /// the identity.
    Principal,
    /// Forgetting at the distances that heads attend over, which is set once there is text; till then 4.
    Attended,
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
    /// The logit of l / `layers` in layer l, or of `least` where that is more.
    Depth {
        least: f64,
        layers: usize,
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
            Init::Principal => write!(f, "at principal directions of queries and keys"),
            Init::Attended => write!(f, "at the distances heads attend over"),
            Init::Constant(value) => write!(f, "at {value:.4}"),
            Init::Uniform { bound, .. } => write!(f, "uniform in ±{bound:.4}"),
            Init::Normal { std, .. } => write!(f, "normal with deviation {std:.4}"),
            Init::LastTap { others } => write!(f, "at 1 in the last tap, {others:.4} in the others"),
            Init::Ramp { step } => write!(f, "at 0, {step}, {:.1}, ...", 2.0 * step),
            Init::Depth { layers, .. } => write!(f, "at the logit of layer / {layers}"),
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
            Init::Attended => vec![4.0; count],
            Init::Identity | Init::Principal => {
                let (rows, cols) = (shape[shape.len() - 2], shape[shape.len() - 1]);
                (0..count).map(|i| ((i / cols) % rows == i % cols) as u8 as f32).collect()
            }
            Init::LastTap { others } => {
                let taps = shape[shape.len() - 1];
                (0..count).map(|i| if (i + 1) % taps == 0 { 1.0 } else { others as f32 }).collect()
            }
            Init::Ramp { step } => (0..count).map(|i| (step * i as f64) as f32).collect(),
            Init::Depth { least, layers } => {
                let share = (layer as f64 / layers as f64).max(least);
                vec![(share / (1.0 - share)).ln() as f32; count]
            }
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

/// Changes of frozen weights that train in their stead, so that teacher and student share the weights: of projections
/// LoRA, `y += scale * (x Aᵀ) Bᵀ`, and changes in full, `y += x Δᵀ`, which add up; of all else `w + Δ`. They start without
/// effect, train until they are put to rest, and are merged into their weights at the end.
#[derive(Default)]
pub struct Adapters {
    changes: BTreeMap<(usize, Projection), Vec<Change>>,
    whole: BTreeMap<Role, whole::Whole>,
}

struct Change {
    form: Form,
    trains: bool,
}

enum Form {
    /// A [rank, in] and B [out, rank].
    Lora { a: Var, b: Var, scale: f64, dropout: f64 },
    /// Δ [out, in].
    Full { delta: Var },
}

/// The LoRA of a projection: `y += alpha / rank * (x Aᵀ) Bᵀ`.
pub struct LowRank {
    pub layer: usize,
    pub projection: Projection,
    /// [rank, in]
    pub a: Tensor,
    /// [out, rank]
    pub b: Tensor,
    pub alpha: f64,
}

impl LowRank {
    pub fn rank(&self) -> Result<usize> {
        self.a.dim(0)
    }
}

/// Something of an adapter that trains.
pub struct Adapted {
    pub param: Param,
    /// Where it is in one.
    pub layer: Option<usize>,
    /// Of a change in full, not of LoRA.
    pub full: bool,
}

impl Adapters {
    /// Puts everything to rest: it goes on acting, without gradient and without dropout.
    pub fn rest(&mut self) {
        self.changes.values_mut().flatten().for_each(|change| change.trains = false);
        self.whole.values_mut().for_each(|change| change.trains = false);
    }

    /// LoRA beside what is there, training. A starts U(±1/√in), B at zero: nothing changes yet.
    pub fn add_lora(
        &mut self,
        architecture: &Architecture,
        places: &[(usize, Projection)],
        settings: &crate::recipe::Lora,
        seed: u64,
        device: &Device,
    ) -> Result<()> {
        let scale = settings.alpha / settings.rank as f64;
        for (layer, p) in places {
            let [out, inner] = architecture.shape(*p);
            let init = Init::Uniform { bound: (inner as f64).powf(-0.5), stream: 0x100 + *p as u64 };
            let a = Var::from_tensor(&init.tensor(&[settings.rank, inner], seed, *layer)?.to_device(device)?)?;
            let b = Var::zeros((out, settings.rank), DType::F32, device)?;
            let form = Form::Lora { a, b, scale, dropout: settings.dropout };
            self.changes.entry((*layer, *p)).or_default().push(Change { form, trains: true });
        }
        Ok(())
    }

    /// A change in full, training: the one that is there already, or a new one that starts at 0.
    pub fn add_full(
        &mut self,
        architecture: &Architecture,
        places: &[(usize, Projection)],
        device: &Device,
    ) -> Result<()> {
        for (layer, p) in places {
            let changes = self.changes.entry((*layer, *p)).or_default();
            match changes.iter_mut().find(|c| matches!(c.form, Form::Full { .. })) {
                Some(there) => there.trains = true,
                None => {
                    let [out, inner] = architecture.shape(*p);
                    let delta = Var::zeros((out, inner), DType::F32, device)?;
                    changes.push(Change { form: Form::Full { delta }, trains: true });
                }
            }
        }
        Ok(())
    }

    /// What the changes of a projection add for input `x` [rows, in], where there are any. `noise` seeds dropout.
    pub fn apply(&self, layer: usize, p: Projection, x: &Tensor, noise: Option<u64>) -> Result<Option<Tensor>> {
        let Some(changes) = self.changes.get(&(layer, p)) else { return Ok(None) };
        let stream = (layer * 8 + p as usize) as u64;
        let mut sum: Option<Tensor> = None;
        for change in changes {
            let y = change.apply(x, noise.filter(|_| change.trains).map(|seed| (seed, stream)))?;
            sum = Some(match sum {
                Some(sum) => (sum + y)?,
                None => y,
            });
        }
        Ok(sum)
    }

    /// A [R, in] and B [rows of all, R] of all changes of a stack's projections together, in f32, where they are LoRA and
    /// nothing is dropped; each of B's columns belongs to one projection and is zero in the rows of the others.
    fn stacked(&self, layer: usize, stack: &Stack, drops: bool) -> Result<Option<(Tensor, Tensor)>> {
        let total = stack.weight.dim(0)?;
        let (mut all_a, mut all_b) = (Vec::new(), Vec::new());
        for (p, start, rows) in &stack.members {
            for change in self.changes.get(&(layer, *p)).into_iter().flatten() {
                match &change.form {
                    Form::Lora { a, b, scale, dropout } if !(drops && change.trains && *dropout > 0.0) => {
                        let b = (change.part(b) * *scale)?.pad_with_zeros(0, *start, total - start - rows)?;
                        all_a.push(change.part(a));
                        all_b.push(b);
                    }
                    _ => return Ok(None),
                }
            }
        }
        if all_a.is_empty() {
            return Ok(None);
        }
        Ok(Some((Tensor::cat(&all_a, 0)?, Tensor::cat(&all_b, 1)?)))
    }

    /// `weight` with all its changes in f32, cast once to the weight's own type; `None` where there are none.
    pub fn merged(&self, layer: usize, p: Projection, weight: &Tensor) -> Result<Option<Tensor>> {
        let Some(changes) = self.changes.get(&(layer, p)) else { return Ok(None) };
        let mut sum = weight.to_dtype(DType::F32)?;
        for change in changes {
            sum = match &change.form {
                Form::Lora { a, b, scale, .. } => (sum + (b.matmul(a.as_tensor())? * *scale)?)?,
                Form::Full { delta } => (sum + delta.as_tensor())?,
            };
        }
        sum.detach().to_dtype(weight.dtype()).map(Some)
    }

    /// All that trains: A and B by the names PEFT gives them, Δ as `delta`.
    pub fn trained(&self) -> Vec<Adapted> {
        let mut found = Vec::new();
        for ((layer, projection), changes) in &self.changes {
            for change in changes.iter().filter(|c| c.trains) {
                let vars: &[(&str, &Var)] = match &change.form {
                    Form::Lora { a, b, .. } => &[("lora_A.weight", a), ("lora_B.weight", b)],
                    Form::Full { delta } => &[("delta", delta)],
                };
                found.extend(vars.iter().map(|(end, var)| Adapted {
                    param: Param {
                        name: format!("model.layers.{layer}.{}.{end}", projection.path()),
                        var: (*var).clone(),
                        scalar: false,
                    },
                    layer: Some(*layer),
                    full: matches!(change.form, Form::Full { .. }),
                }));
            }
        }
        found.extend(self.trained_whole());
        found
    }

    /// Adapters that were trained elsewhere, at rest.
    pub fn of(trained: Vec<LowRank>) -> Result<Adapters> {
        let mut adapters = Adapters::default();
        for LowRank { layer, projection, a, b, alpha } in trained {
            let scale = alpha / a.dim(0)? as f64;
            let form = Form::Lora { a: Var::from_tensor(&a)?, b: Var::from_tensor(&b)?, scale, dropout: 0.0 };
            adapters.changes.entry((layer, projection)).or_default().push(Change { form, trains: false });
        }
        Ok(adapters)
    }

    /// The LoRA of every projection that has one; where several stages added theirs, they stand side by side in one of
    /// the sum of their ranks, which weighs 1.
    pub fn low_rank(&self) -> Result<Vec<LowRank>> {
        let mut found = Vec::new();
        for ((layer, projection), changes) in &self.changes {
            let parts: Vec<(&Var, &Var, f64)> = changes
                .iter()
                .filter_map(|change| match &change.form {
                    Form::Lora { a, b, scale, .. } => Some((a, b, *scale)),
                    Form::Full { .. } => None,
                })
                .collect();
            let (a, b, alpha) = match parts.as_slice() {
                [] => continue,
                [(a, b, scale)] => (a.as_detached_tensor(), b.as_detached_tensor(), scale * a.dim(0)? as f64),
                several => {
                    let a = several.iter().map(|(a, ..)| a.as_detached_tensor()).collect::<Vec<_>>();
                    let b = several.iter().map(|(_, b, scale)| b.as_detached_tensor() * *scale);
                    let (a, b) = (Tensor::cat(&a, 0)?, Tensor::cat(&b.collect::<Result<Vec<_>>>()?, 1)?);
                    let rank = a.dim(0)? as f64;
                    (a, b, rank)
                }
            };
            found.push(LowRank { layer: *layer, projection: *projection, a, b, alpha });
        }
        Ok(found)
    }

    /// Projections changed in full, with the change [out, in].
    pub fn full(&self) -> impl Iterator<Item = (usize, Projection, Tensor)> + '_ {
        self.changes.iter().flat_map(|((layer, projection), changes)| {
            changes.iter().filter_map(|change| match &change.form {
                Form::Full { delta } => Some((*layer, *projection, delta.as_detached_tensor())),
                Form::Lora { .. } => None,
            })
        })
    }

    /// Drops the changes of a layer: its weights are the frozen ones again.
    pub fn forget(&mut self, layer: usize) {
        self.changes.retain(|(l, _), _| *l != layer);
        self.whole.retain(|role, _| role.layer() != Some(layer));
    }

    /// Whether a projection of a layer is changed.
    pub fn changes(&self, layer: usize, p: Projection) -> bool {
        self.changes.contains_key(&(layer, p))
    }

    /// Layers and projections that are changed.
    pub fn targets(&self) -> impl Iterator<Item = (usize, Projection)> + '_ {
        self.changes.keys().copied()
    }
}

impl Change {
    /// A side of it, without gradient where it rests.
    fn part(&self, var: &Var) -> Tensor {
        if self.trains { var.as_tensor().clone() } else { var.as_detached_tensor() }
    }

    /// What this adds for `x` [rows, in]: [rows, out]. `noise` is seed and stream of dropout.
    fn apply(&self, x: &Tensor, noise: Option<(u64, u64)>) -> Result<Tensor> {
        match &self.form {
            Form::Lora { a, b, scale, dropout } => {
                let x = match noise.filter(|_| *dropout > 0.0) {
                    Some((seed, stream)) => {
                        (x * keep_mask(x.dims(), *dropout, seed, stream, x.device())?.to_dtype(x.dtype())?)?
                    }
                    None => x.clone(),
                };
                let low = x.matmul(&self.part(a).to_dtype(x.dtype())?.t()?)?;
                low.matmul(&(self.part(b) * *scale)?.to_dtype(x.dtype())?.t()?)
            }
            Form::Full { delta } if self.trains => x.matmul(&delta.as_tensor().to_dtype(x.dtype())?.t()?),
            Form::Full { delta } => linear(x, &self.part(delta).to_dtype(x.dtype())?),
        }
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
    /// Channels of a head, where the result is heads.
    head_dim: Option<usize>,
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
        Ok(Stack { members, weight, bias, head_dim: None })
    }

    /// The same whose results are heads of `dim` channels: [.., heads of all, dim].
    pub fn in_heads(self, dim: usize) -> Stack {
        Stack { head_dim: Some(dim), ..self }
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

    /// The gradient [B, T, in] of the input of the unchanged products from that of their results, [B, T, rows of all].
    pub fn pull_back(&self, gradient: &Tensor) -> Result<Tensor> {
        let (b, t, _) = gradient.dims3()?;
        gradient.flatten(0, 1)?.matmul(&self.weight)?.reshape((b, t, ()))
    }

    /// All projections of `x` [.., in] side by side, [.., rows of all] or as heads, with what adapters of `layer` add.
    pub fn apply(&self, layer: usize, x: &Tensor, lora: Option<&Adapters>, noise: Option<u64>) -> Result<Tensor> {
        let stacked = lora.map(|lora| lora.stacked(layer, self, noise.is_some())).transpose()?.flatten();
        let stacked = match &stacked {
            Some((a, b)) => Some((a.to_dtype(x.dtype())?, b.to_dtype(x.dtype())?)),
            None => None,
        };
        let mut y = project(x, &self.weight, stacked.as_ref().map(|(a, b)| [a, b]), self.head_dim)?;
        if let Some(bias) = &self.bias {
            let bias = self.head_dim.map_or_else(|| Ok(bias.clone()), |dim| bias.reshape(((), dim)))?;
            y = y.broadcast_add(&bias)?;
        }
        let Some(lora) = lora.filter(|_| stacked.is_none()) else { return Ok(y) };
        let x = &x.reshape(((), self.weight.dim(1)?))?;
        let changes = self.members.iter().map(|(p, ..)| lora.apply(layer, *p, x, noise));
        let changes = changes.collect::<Result<Vec<_>>>()?;
        if changes.iter().all(Option::is_none) {
            return Ok(y);
        }
        let none = |rows: usize| Tensor::zeros((x.dim(0)?, rows), y.dtype(), y.device());
        let parts = changes.into_iter().zip(&self.members);
        let parts = parts.map(|(change, (_, _, rows))| change.map_or_else(|| none(*rows), Ok));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let all = if let [one] = parts.as_slice() { one.clone() } else { Tensor::cat(&parts, 1)? };
        let all = all.reshape(y.shape())?;
        y + all
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
        let depth = |layer| values(Init::Depth { least: 0.02, layers: 8 }.tensor(&[2], 1, layer).unwrap());
        for (layer, share) in [(0, 0.02), (1, 0.125), (7, 0.875)] {
            assert!(depth(layer).iter().all(|x| (1.0 / (1.0 + (-x).exp()) - share).abs() < 1e-6), "layer {layer}");
        }
        let eye = |shape: &[usize]| values(Init::Identity.tensor(shape, 1, 0).unwrap());
        assert_eq!(eye(&[2, 2, 3]), [1., 0., 0., 0., 1., 0., 1., 0., 0., 0., 1., 0.]);
        assert_eq!(eye(&[3, 2]), [1., 0., 0., 1., 0., 0.]);
    }
}
