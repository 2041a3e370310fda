//! What the layers of a converted model do, per head: which branch carries the attention, how far it looks, how fast it
//! forgets; and what is lost without either branch.

use std::collections::BTreeMap;

use candle_core::{D, DType, Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};

use super::Subject;
use crate::error::Result;
use crate::mixers::softmax::Softmax;
use crate::mixers::{Design, Heads, Mixer, Weights};

/// One figure per converted layer and head.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// Layers, ascending.
    pub layers: Vec<usize>,
    /// Per layer, per head.
    pub values: Vec<Vec<f64>>,
}

impl Metric {
    fn push(&mut self, layer: usize, values: Vec<f64>) {
        self.layers.push(layer);
        self.values.push(values);
    }
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Diagnostics {
    /// Per layer and head, by name.
    #[serde(flatten)]
    pub metrics: BTreeMap<String, Metric>,
}

/// Names of the metrics.
pub const LINEAR_SHARE: &str = "share of the linear branch";
pub const DISTANCE: &str = "mean attended distance (tokens)";
pub const TEACHER_DISTANCE: &str = "mean attended distance of softmax there (tokens)";
pub const ENTROPY: &str = "entropy of the attention (nats)";
pub const ROW_SUM: &str = "sum of a row of weights";
pub const HALF_LIFE: &str = "half-life of the state (tokens)";
pub const NORM: &str = "size of the output against softmax there";

/// Runs `ids` [1, T] through a converted model and looks at every layer whose attention was replaced.
pub fn diagnose(model: Subject, ids: &Tensor) -> Result<Diagnostics> {
    let mut found = Diagnostics::default();
    let a = &model.decoder.architecture;
    walk(model, ids, |layer, mixer, heads| {
        let (y, weights) = mixer.parallel(heads)?;
        let softmax = Softmax.build(a, layer, Vec::new());
        let (teacher, teacher_weights) = softmax.parallel(heads)?;
        let mut push = |name: &str, values: Vec<f64>| {
            found.metrics.entry(name.into()).or_default().push(layer, values);
        };
        push(LINEAR_SHARE, linear_share(&weights)?);
        push(DISTANCE, distance(&weights.all)?);
        push(TEACHER_DISTANCE, distance(&teacher_weights.all)?);
        push(ENTROPY, entropy(&weights.all)?);
        push(ROW_SUM, per_head(&weights.all.sum(D::Minus1)?)?);
        if let Some(gates) = mixer.decays(heads)? {
            let mean = gates.to_dtype(DType::F64)?.mean((0, 1))?.to_vec1::<f64>()?; // ln of the decay of each head
            push(HALF_LIFE, mean.into_iter().map(|g| (std::f64::consts::LN_2 / -g.min(-1e-9)).min(1e9)).collect());
        }
        let size = |y: &Tensor| y.to_dtype(DType::F64)?.sqr()?.sum((0, 1, 3))?.sqrt()?.to_vec1::<f64>();
        push(NORM, size(&y)?.iter().zip(size(&teacher)?).map(|(y, t)| y / t.max(1e-12)).collect());
        Ok(y)
    })?;
    Ok(found)
}

/// Which branch of a mixer is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Branch {
    Window,
    Linear,
}

/// Mean next-token loss in nats of `ids` [1, T] with one branch of every converted layer taken away, its weights given to
/// the other; `None` where no layer has both, or where an output is more than its weights times the values.
pub fn without(model: Subject, ids: &Tensor, left: Branch) -> Result<Option<f64>> {
    let mut split = false;
    let mut faithful = true;
    let hidden = walk(model, ids, |_, mixer, heads| {
        let (y, weights) = mixer.parallel(heads)?;
        let Some(window) = &weights.window else { return Ok(y) };
        let values = heads.values()?.transpose(1, 2)?.contiguous()?; // [B, H, T, D]
        let read = |w: &Tensor| w.matmul(&values)?.transpose(1, 2)?.contiguous();
        let scalar = |x: Tensor| x.to_dtype(DType::F64)?.to_scalar::<f64>();
        let gap = scalar((read(&weights.all)? - &y)?.sqr()?.sum_all()?)? / scalar(y.sqr()?.sum_all()?)?.max(1e-30);
        if gap > 1e-4 {
            faithful = false;
            return Ok(y);
        }
        split = true;
        let part = match left {
            Branch::Window => window.clone(),
            Branch::Linear => (&weights.all - window)?,
        };
        let size = |w: &Tensor| w.abs()?.sum_keepdim(D::Minus1);
        // A row with nothing left of a branch stays empty.
        let scale = (size(&weights.all)? / (size(&part)? + 1e-9)?)?.minimum(1e6)?;
        read(&part.broadcast_mul(&scale)?)
    })?;
    if !split || !faithful {
        return Ok(None);
    }
    nll(model, ids, &hidden).map(Some)
}

/// Mean next-token loss in nats of `ids` [1, T].
pub fn loss(model: Subject, ids: &Tensor) -> Result<f64> {
    let hidden = model.decoder.hidden(ids, model.net)?;
    nll(model, ids, &hidden)
}

fn nll(model: Subject, ids: &Tensor, hidden: &Tensor) -> Result<f64> {
    let time = ids.dim(1)?;
    let logits = model.decoder.logits(&hidden.narrow(1, 0, time - 1)?.contiguous()?, model.net)?.squeeze(0)?;
    let next = ids.squeeze(0)?.narrow(0, 1, time - 1)?.contiguous()?.unsqueeze(1)?;
    let top = logits.max_keepdim(D::Minus1)?;
    let total = (logits.broadcast_sub(&top)?.exp()?.sum_keepdim(D::Minus1)?.log()? + top)?;
    let losses = (total - logits.gather(&next, 1)?)?;
    Ok(losses.mean_all()?.to_dtype(DType::F64)?.to_scalar()?)
}

/// Runs the model layer by layer; converted layers give what `visit` returns. The normalised last hidden state.
fn walk(
    model: Subject,
    ids: &Tensor,
    mut visit: impl FnMut(usize, &dyn Mixer, &Heads) -> TensorResult<Tensor>,
) -> Result<Tensor> {
    let tables = model.decoder.tables(0, ids.dim(1)?)?;
    let lora = model.net.adapters.as_ref();
    let mut x = model.decoder.embed(ids, lora)?;
    for (layer, mixer) in model.net.mixers.iter().enumerate() {
        let block = model.decoder.block(layer);
        let heads = block.heads(&x, &tables, lora, None)?;
        let y = if mixer.is_softmax() { mixer.forward(&heads)? } else { visit(layer, mixer.as_ref(), &heads)? };
        x = block.finish(&x, &y.detach(), lora, None)?.detach();
    }
    Ok(model.decoder.final_norm(&x, lora)?)
}

/// Means over batch and rows of `x` [B, H, T].
fn per_head(x: &Tensor) -> TensorResult<Vec<f64>> {
    x.to_dtype(DType::F64)?.mean((0, 2))?.to_vec1()
}

/// Share of all weight that is not the window's, by head.
pub fn linear_share(weights: &Weights) -> TensorResult<Vec<f64>> {
    let mass = |w: &Tensor| w.to_dtype(DType::F64)?.abs()?.sum((0, 2, 3))?.to_vec1::<f64>();
    let all = mass(&weights.all)?;
    let window = match &weights.window {
        Some(window) => mass(window)?,
        None => vec![0.0; all.len()],
    };
    let linear = match &weights.window {
        Some(window) => mass(&(&weights.all - window)?)?,
        None => all,
    };
    Ok(linear.iter().zip(&window).map(|(l, w)| l / (l + w).max(1e-30)).collect())
}

/// Σ |a_ij| (i - j) / Σ |a_ij|, mean over rows.
fn distance(weights: &Tensor) -> TensorResult<Vec<f64>> {
    let (_, _, time, _) = weights.dims4()?;
    let gaps = (0..time * time).map(|n| (n / time).saturating_sub(n % time) as f32);
    let gaps = Tensor::from_iter(gaps, weights.device())?.reshape((time, time))?.to_dtype(DType::F32)?;
    let a = weights.to_dtype(DType::F32)?.abs()?;
    let far = a.broadcast_mul(&gaps)?.sum(D::Minus1)?;
    per_head(&(far / (a.sum(D::Minus1)? + 1e-9)?)?)
}

/// -Σ p ln p of p = |a| / Σ |a|, mean over rows.
fn entropy(weights: &Tensor) -> TensorResult<Vec<f64>> {
    let a = weights.to_dtype(DType::F32)?.abs()?;
    let p = a.broadcast_div(&(a.sum_keepdim(D::Minus1)? + 1e-9)?)?;
    per_head(&(&p * (&p + 1e-12)?.log()?)?.sum(D::Minus1)?.neg()?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn figures_of_a_hand_made_matrix() {
        // One head, three rows: all on itself; half on the one before; all on the first.
        let rows = [[1f32, 0., 0.], [0.5, 0.5, 0.], [1., 0., 0.]];
        let all = Tensor::new(&[[rows]], &Device::Cpu).unwrap();
        assert!((distance(&all).unwrap()[0] - (0.0 + 0.5 + 2.0) / 3.0).abs() < 1e-6);
        assert!((entropy(&all).unwrap()[0] - std::f64::consts::LN_2 / 3.0).abs() < 1e-5);
        let window = Tensor::new(&[[[[1f32, 0., 0.], [0., 0.5, 0.], [0., 0., 0.]]]], &Device::Cpu).unwrap();
        let share = linear_share(&Weights { all: all.clone(), window: Some(window) }).unwrap();
        assert!((share[0] - 0.5).abs() < 1e-9);
        assert_eq!(linear_share(&Weights { all, window: None }).unwrap(), [1.0]);
    }
}
