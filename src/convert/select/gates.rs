//! `gates`: one number r per layer between the teacher's attention and the new one, trained on the whole model while
//! everything else rests (selective transfer of LinVideo, arXiv 2510.08318).
//!
//! ```text
//! y    = r softmax + (1 - r) mixer                         r in [0, 1], 1 at first
//! loss = KL(r) / KL(0) + 10 ((Σ r - K) / L)² + t Σ (1 - |2r - 1|^p) / L
//! ```
//!
//! K of L layers shall stay softmax. The KL to the teacher's logits counts relative to that of the student without any
//! softmax, so that one weight of the budget serves all models. The last term is the paper's: as t goes from 0 to 1 and
//! p from 20 to 2 it leaves r alone early and drives it to 0 or 1 late. The paper rounds r before summing; the plain sum
//! has a gradient that tells layers apart before any of them crosses 1/2. The larger r, the more a layer needs softmax;
//! the order far from the K-th place says little.

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var, bail};

use super::Selection;
use crate::convert::recover::Recover;
use crate::data::{Batch, Split};
use crate::error::{Error, Kind, Result};
use crate::evaluate::{Subject, quality};
use crate::mixers::softmax::Softmax;
use crate::mixers::{Design, Heads, Mixer, State, Weights};
use crate::model::Net;
use crate::params::Param;
use crate::progress::{Progress, Silent};
use crate::recipe::{self, Optimizer, Schedule};
use crate::run_dir::RunDir;
use crate::train::clock::Clock;
use crate::train::{self, Grads, Outcome, Settings, Task};

/// Sequences per step.
const BATCH: usize = 8;
/// Weight of the budget.
const BUDGET: f64 = 10.0;
/// The exponent p, first and last.
const SHARPNESS: [f64; 2] = [20.0, 2.0];

/// The trained r of every layer.
pub(super) fn scores(s: &Selection, run: &mut RunDir, progress: &dyn Progress) -> Result<(Vec<f64>, Outcome)> {
    let decoder = s.student.decoder;
    let a = &decoder.architecture;
    let design = s.mixer.design();
    let gate = |(layer, mixer): (usize, &dyn Mixer)| -> TensorResult<Box<dyn Mixer>> {
        let r = Param {
            name: format!("layers.{layer}.gate"),
            var: Var::ones(1, DType::F32, &decoder.device)?,
            scalar: true,
        };
        Ok(Box::new(Gate {
            softmax: Softmax.build(a, layer, Vec::new()),
            mixer: design.build(a, layer, mixer.params().to_vec()),
            r: [r],
        }))
    };
    let mixers = s.student.net.mixers.iter().map(|m| m.as_ref()).enumerate().map(gate).collect::<TensorResult<_>>()?;
    if s.student.net.adapters.is_some() {
        let message = "gates cannot choose between layers whose projections a stage before them trained";
        return Err(Error::new(Kind::Recipe, message).hint("take `by = \"restore-one-kl\"`"));
    }
    let net = Net { mixers, adapters: None };

    let batch = BATCH.min(s.train.len());
    let steps = s.best.tokens().div_ceil((batch * s.train.seq_len()) as u64);
    // Far enough for every gate to cross from 1 to 0 and some way back.
    let lr = (5.0 / steps as f64).clamp(0.01, 0.1);
    let loss = recipe::Loss { logit_kl: 1.0, ..recipe::Loss::default() };
    let stage = recipe::Stage {
        train: vec!["mixer".into()],
        lr,
        loss,
        optimizer: Optimizer { beta2: 0.95, clip: 0.0, ..Optimizer::default() },
        schedule: Schedule::Cosine { warmup: 0.0, floor: 0.1 },
        ..recipe::Stage::default()
    };
    let kl = quality(s.student, Some(s.teacher), s.valid, &Silent)?.kl.unwrap_or_default();
    let mut task = Gates {
        inner: Recover::new(decoder, s.teacher.net, &net, &stage, (s.micro_batch, 0), s.seed),
        gated: Subject { decoder, net: &net },
        teacher: s.teacher,
        scale: 1.0 / kl.max(1e-9),
        kept: s.best.kept(a.layers).unwrap_or(1) as f64,
        sequences: steps * batch as u64,
        lr,
    };
    let settings = Settings {
        stage: "select",
        steps,
        batch,
        micro_batch: s.micro_batch,
        memory: s.memory,
        groups: &[&stage],
        eval_every: steps.div_ceil(4) as usize,
        seed: s.seed,
        timed: false,
    };
    let outcome = train::run(&mut task, &settings, s.train, s.valid, Some(run), progress)?;
    Ok((task.values()?, outcome))
}

/// The teacher's attention and the new one of a layer, mixed by one trained number.
struct Gate {
    softmax: Box<dyn Mixer>,
    mixer: Box<dyn Mixer>,
    r: [Param; 1],
}

impl Gate {
    /// r a + (1 - r) b in f32, cast back.
    fn mix(&self, a: &Tensor, b: &Tensor) -> TensorResult<Tensor> {
        let wide = b.to_dtype(DType::F32)?;
        let mixed = (&wide + (a.to_dtype(DType::F32)? - &wide)?.broadcast_mul(&self.r[0].var)?)?;
        mixed.to_dtype(b.dtype())
    }
}

impl Mixer for Gate {
    fn forward(&self, x: &Heads) -> TensorResult<Tensor> {
        self.mix(&self.softmax.forward(x)?, &self.mixer.forward(x)?)
    }

    fn parallel(&self, x: &Heads) -> TensorResult<(Tensor, Weights)> {
        let ((a, softmax), (b, mixer)) = (self.softmax.parallel(x)?, self.mixer.parallel(x)?);
        Ok((self.mix(&a, &b)?, Weights { all: self.mix(&softmax.all, &mixer.all)?, window: None }))
    }

    fn extend(&self, _: &Heads, _: &mut State) -> TensorResult<Tensor> {
        bail!("a gate between two kinds of attention is trained, not decoded with")
    }

    fn params(&self) -> &[Param] {
        &self.r
    }
}

/// The KL's gradient is that of recovery, block by block, with the gates as all that trains.
struct Gates<'a> {
    inner: Recover<'a>,
    gated: Subject<'a>,
    teacher: Subject<'a>,
    /// 1 / KL(0).
    scale: f64,
    /// K.
    kept: f64,
    /// Sequences of all steps.
    sequences: u64,
    lr: f64,
}

impl Gates<'_> {
    fn values(&self) -> Result<Vec<f64>> {
        let value = |p: Param| Ok(f64::from(p.var.to_device(&Device::Cpu)?.to_vec1::<f32>()?[0]));
        self.params().into_iter().map(value).collect()
    }

    /// r as it is, after a step that left [0, 1] is taken back to the edge.
    fn clip(&self) -> Result<Vec<f64>> {
        for p in self.params() {
            p.var.set(&p.var.clamp(0f32, 1f32)?.detach())?;
        }
        self.values()
    }
}

/// Budget and sharpness of gates `r` at `t` of 1: value and gradient.
fn penalty(r: &[f64], kept: f64, t: f64) -> (f64, Vec<f64>) {
    let count = r.len() as f64;
    let p = SHARPNESS[0] + t * (SHARPNESS[1] - SHARPNESS[0]);
    let over = (r.iter().sum::<f64>() - kept) / count;
    let blunt: f64 = r.iter().map(|r| 1.0 - (2.0 * r - 1.0).abs().powf(p)).sum();
    let slope = |r: &f64| {
        let u = 2.0 * r - 1.0;
        (2.0 * BUDGET * over - t * 2.0 * p * u.abs().powf(p - 1.0) * u.signum()) / count
    };
    (BUDGET * over * over + t * blunt / count, r.iter().map(slope).collect())
}

impl Task for Gates<'_> {
    fn params(&self) -> Vec<Param> {
        self.inner.params()
    }

    fn peak_lr(&self, _: usize) -> f64 {
        self.lr
    }

    fn gradients(
        &mut self,
        batch: &Batch,
        position: u64,
        share: f64,
        grads: &mut Grads,
        clock: &mut Clock,
    ) -> Result<Tensor> {
        let r = self.clip()?;
        let kl = self.inner.gradients(batch, position, share * self.scale, grads, clock)?;
        let (value, slopes) = penalty(&r, self.kept, position as f64 / self.sequences.max(1) as f64);
        for (i, slope) in slopes.iter().enumerate() {
            grads.add(i, &Tensor::new(&[*slope as f32], kl.device())?, share)?;
        }
        Ok(((kl * self.scale)? + value)?)
    }

    /// The loss as it is at the end, so that the best is what the gates were to become.
    fn evaluate(&mut self, valid: &Split) -> Result<Vec<f64>> {
        let r = self.clip()?;
        let kl = quality(self.gated, Some(self.teacher), valid, &Silent)?.kl.unwrap_or_default();
        Ok(vec![kl * self.scale + penalty(&r, self.kept, 1.0).0])
    }

    fn part(&self, _: usize) -> usize {
        0
    }

    fn part_name(&self, _: usize) -> String {
        "the gates".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_those_of_the_penalty() {
        let r = [0.9, 0.3, 0.55, 0.02];
        for t in [0.0, 0.4, 1.0] {
            let slopes = penalty(&r, 1.0, t).1;
            for (i, slope) in slopes.iter().enumerate() {
                let at = |step: f64| {
                    let mut r = r;
                    r[i] += step;
                    penalty(&r, 1.0, t).0
                };
                let wanted = (at(1e-6) - at(-1e-6)) / 2e-6;
                assert!((slope - wanted).abs() < 1e-6, "gate {i} at {t}: {slope}, not {wanted}");
            }
        }
    }
}
