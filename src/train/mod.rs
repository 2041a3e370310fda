//! What all stages share: the loop over batches with accumulation, clipping, evaluation, best weights and resume.
//!
//! The step number alone decides the batch, the dropout masks and the learning rate of all schedules but the plateau;
//! with the saved weights, moments and scheduler a resumed run repeats the bits of an uninterrupted one.

pub mod adamw;
pub mod schedule;
pub mod tensorboard;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::convert::plan::bytes;
use crate::data::{Batch, Split};
use crate::error::{Error, Kind, Result};
use crate::params::Param;
use crate::progress::{self, Progress};
use crate::recipe::{Optimizer, Schedule};
use crate::run_dir::RunDir;

use adamw::AdamW;
use schedule::Rate;

/// What a stage does with a batch.
pub trait Task {
    /// Everything that trains.
    fn params(&self) -> Vec<Param>;
    /// Learning rate of a parameter at peak.
    fn peak_lr(&self, param: usize) -> f64;
    /// Adds `share` times the gradient of the batch's loss to `grads` (one slot per parameter) and gives the losses of
    /// its parts (layers, or the whole model), `[parts]` in f32, on the device so that nothing waits for it. `position`
    /// counts the sequences drawn before this batch: what seeds dropout.
    fn gradients(&mut self, batch: &Batch, position: u64, share: f64, grads: &mut Grads) -> Result<Tensor>;
    /// Losses of the parts on validation data.
    fn evaluate(&mut self, valid: &Split) -> Result<Vec<f64>>;
    /// The part a parameter belongs to: best weights are kept per part, since parts that share no parameter improve on
    /// their own.
    fn part(&self, param: usize) -> usize;
    /// Name of a part in messages and logs.
    fn part_name(&self, part: usize) -> String;
}

/// Seed of the dropout masks of a batch behind `position` sequences of a stage.
pub fn noise(seed: u64, position: u64) -> u64 {
    seed.wrapping_add(position.wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

/// Sums of gradients, one per parameter.
pub struct Grads(pub Vec<Option<Tensor>>);

impl Grads {
    /// Adds `share * gradient` to a slot.
    pub fn add(&mut self, slot: usize, gradient: &Tensor, share: f64) -> Result<()> {
        let gradient = (gradient.to_dtype(DType::F32)? * share)?;
        self.0[slot] = Some(match &self.0[slot] {
            Some(sum) => (sum + gradient)?,
            None => gradient,
        });
        Ok(())
    }
}

/// The numbers of one stage.
pub struct Settings<'a> {
    pub stage: &'a str,
    /// Optimiser steps in all.
    pub steps: u64,
    /// Sequences per step, and at once; fewer at once where the device runs out of memory.
    pub batch: usize,
    pub micro_batch: usize,
    /// Bytes of memory the plan expects.
    pub memory: u64,
    pub optimizer: &'a Optimizer,
    pub schedule: &'a Schedule,
    pub eval_every: usize,
    /// Peak learning rate of the stage.
    pub lr: f64,
    pub seed: u64,
}

/// What a stage reached.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Outcome {
    pub steps: u64,
    pub tokens: u64,
    /// Validation losses of the parts: before, best, and the step of the best.
    pub first: Vec<f64>,
    pub best: Vec<f64>,
    pub best_step: Vec<u64>,
    /// Training time over all runs of the stage, seconds.
    pub seconds: f64,
}

/// The part of the loop's state that is not a tensor.
#[derive(Serialize, Deserialize)]
struct Position {
    outcome: Outcome,
    rate: Rate,
}

/// Seconds between saves.
const SAVE_EVERY: Duration = Duration::from_secs(10);

/// Trains `task` to its last step and leaves the best weights in its parameters.
pub fn run(
    task: &mut dyn Task,
    settings: &Settings,
    train: &Split,
    valid: &Split,
    run_dir: &mut RunDir,
    progress: &dyn Progress,
) -> Result<Outcome> {
    let params = task.params();
    let stage = settings.stage;
    let mut optimizer = AdamW::new(&params, settings.optimizer)?;
    let peaks: Vec<f64> = (0..params.len()).map(|i| task.peak_lr(i)).collect();
    let mut best: Vec<Tensor> = params.iter().map(|p| p.var.copy()).collect::<candle_core::Result<_>>()?;
    let (mut step, mut position) = match run_dir.load_state(stage, progress)? {
        Some(saved) => {
            let read = |group: &str, i: usize| {
                let name = format!("{group}.{}", params[i].name);
                saved.tensors.get(&name).cloned().ok_or_else(|| {
                    Error::new(Kind::Output, format!("saved state of stage `{stage}` lacks `{name}`"))
                        .hint("start again with --restart")
                })
            };
            for (i, param) in params.iter().enumerate() {
                let device = param.var.device();
                param.var.set(&read("param", i)?.to_device(device)?)?;
                best[i] = read("best", i)?.to_device(device)?;
                optimizer.restore(i, &read("m", i)?.to_device(device)?, &read("v", i)?.to_device(device)?)?;
            }
            let position: Position = serde_json::from_value(saved.state).map_err(|e| {
                Error::new(Kind::Output, format!("saved state of stage `{stage}` cannot be read: {e}"))
                    .hint("start again with --restart")
            })?;
            optimizer.steps = saved.step;
            (saved.step, position)
        }
        None => {
            let first = task.evaluate(valid)?;
            check_finite(task, stage, 0, "validation loss", &first)?;
            let parts: Vec<String> = (0..first.len()).map(|part| task.part_name(part)).collect();
            run_dir.append_log(&json!({"stage": stage, "step": 0, "valid": first, "parts": parts}))?;
            let outcome = Outcome { best_step: vec![0; first.len()], best: first.clone(), first, ..Outcome::default() };
            (0, Position { outcome, rate: Rate::new(settings.schedule, settings.steps, settings.lr) })
        }
    };

    let tokens = (settings.batch * train.seq_len()) as u64;
    progress.begin(stage, settings.steps * tokens, step * tokens, "tokens");
    let mut saved_at = Instant::now();
    let mut micro_batch = settings.micro_batch;
    while step < settings.steps {
        let started = Instant::now();
        let rows = train.draw(settings.seed, step * settings.batch as u64, settings.batch);
        let drawn = step * settings.batch as u64;
        let (losses, grads) = loop {
            match accumulate(task, &params, train, &rows, drawn, micro_batch) {
                Err(e) if e.kind == Kind::Memory && micro_batch > 1 => {
                    micro_batch = micro_batch.div_ceil(2);
                    progress.warn(&format!(
                        "`{stage}` ran out of memory (planned: {}); going on with {micro_batch} of {} sequences at once",
                        bytes(settings.memory),
                        settings.batch
                    ));
                }
                Err(e) if e.kind == Kind::Memory => {
                    let message = format!("{} in stage `{stage}`, planned: {}", e.message, bytes(settings.memory));
                    let hint =
                        format!("lower `stage.{stage}.seq_len`, or use a device with more memory; progress is saved");
                    return Err(Error::new(Kind::Memory, message).hint(hint));
                }
                done => break done?,
            }
        };
        let lr = position.rate.at(step);
        let update = optimizer.update(&params, &grads.0, lr, &peaks)?;
        drop(grads);
        // The one place of a step that waits for the device.
        let losses = losses.to_vec1::<f64>()?;
        step += 1;
        check_finite(task, stage, step, "loss", &losses)?;
        update.check(&params, stage, step)?;
        position.outcome.seconds += started.elapsed().as_secs_f64();
        position.outcome.steps = step;
        position.outcome.tokens = step * tokens;
        let loss = losses.iter().sum::<f64>() / losses.len().max(1) as f64;
        run_dir.append_log(
            &json!({"stage": stage, "step": step, "loss": loss, "losses": losses, "lr": lr * settings.lr, "grad_norm": update.gradient_norm(), "tokens": position.outcome.tokens}),
        )?;
        progress.advance(tokens, &format!("loss {loss:.4}"));

        if step.is_multiple_of(settings.eval_every.max(1) as u64) || step == settings.steps {
            let valid = task.evaluate(valid)?;
            check_finite(task, stage, step, "validation loss", &valid)?;
            run_dir.append_log(&json!({"stage": stage, "step": step, "valid": valid}))?;
            let outcome = &mut position.outcome;
            for (part, loss) in valid.iter().enumerate() {
                if *loss >= outcome.best[part] {
                    continue;
                }
                outcome.best[part] = *loss;
                outcome.best_step[part] = step;
                for (i, param) in params.iter().enumerate().filter(|(i, _)| task.part(*i) == part) {
                    best[i] = param.var.copy()?;
                }
            }
            position.rate.observe(valid.iter().sum::<f64>() / valid.len().max(1) as f64);
        }
        let stop = progress::stop_requested();
        if stop || saved_at.elapsed() >= SAVE_EVERY || step == settings.steps {
            let mut tensors = BTreeMap::new();
            for (i, param) in params.iter().enumerate() {
                let (m, v) = optimizer.moments(i);
                tensors.insert(format!("param.{}", param.name), param.var.as_tensor().clone());
                tensors.insert(format!("best.{}", param.name), best[i].clone());
                tensors.insert(format!("m.{}", param.name), m.clone());
                tensors.insert(format!("v.{}", param.name), v.clone());
            }
            let state = serde_json::to_value(&position).map_err(|e| Error::new(Kind::Unexpected, e.to_string()))?;
            run_dir.save_state(stage, step, &tensors, &state)?;
            saved_at = Instant::now();
        }
        if stop && step < settings.steps {
            let message =
                format!("stopped in stage `{stage}` after step {step} of {}; progress is saved", settings.steps);
            return Err(Error::new(Kind::Interrupted, message).hint("the same command continues from here"));
        }
    }
    for (param, best) in params.iter().zip(&best) {
        param.var.set(best)?;
    }
    progress.end(&summary(&position.outcome));
    Ok(position.outcome)
}

/// Losses of the parts and gradients of one step's sequences, `micro_batch` at once; `drawn` came before them.
fn accumulate(
    task: &mut dyn Task,
    params: &[Param],
    train: &Split,
    rows: &[usize],
    drawn: u64,
    micro_batch: usize,
) -> Result<(Tensor, Grads)> {
    let mut grads = Grads(vec![None; params.len()]);
    let mut losses: Option<Tensor> = None;
    for (n, part) in rows.chunks(micro_batch).enumerate() {
        let share = part.len() as f64 / rows.len() as f64;
        let batch = train.batch(part, params_device(params))?;
        let micro = task.gradients(&batch, drawn + (n * micro_batch) as u64, share, &mut grads)?;
        let micro = (micro.to_dtype(DType::F64)? * share)?;
        losses = Some(match losses {
            Some(sum) => (sum + micro)?,
            None => micro,
        });
    }
    let losses = losses.map_or_else(|| Tensor::zeros(0, DType::F64, params_device(params)), Ok)?;
    Ok((losses, grads))
}

fn summary(outcome: &Outcome) -> String {
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len().max(1) as f64;
    let time = progress::duration(Duration::from_secs_f64(outcome.seconds));
    let rate = outcome.tokens as f64 / outcome.seconds.max(1e-9);
    let (first, best) = (mean(&outcome.first), mean(&outcome.best));
    format!("validation loss {first:.4} → {best:.4} in {time}, {rate:.0} tokens/s")
}

fn params_device(params: &[Param]) -> &candle_core::Device {
    params.first().map_or(&candle_core::Device::Cpu, |p| p.var.device())
}

fn check_finite(task: &dyn Task, stage: &str, step: u64, what: &str, losses: &[f64]) -> Result<()> {
    let Some(part) = losses.iter().position(|l| !l.is_finite()) else { return Ok(()) };
    let mut message =
        format!("{what} of {} is {} at step {step} of stage `{stage}`", task.part_name(part), losses[part]);
    let mut sizes = Vec::new();
    for (_, param) in task.params().iter().enumerate().filter(|(i, _)| task.part(*i) == part) {
        sizes.push((norm(param)?, param.name.clone()));
    }
    if let Some((size, name)) = sizes.into_iter().max_by(|a, b| a.0.total_cmp(&b.0)) {
        message += &format!("; the largest tensor that trains there, `{name}`, has norm {size:.1e}");
    }
    Err(exploded(stage, message))
}

fn norm(param: &Param) -> candle_core::Result<f64> {
    Ok(param.var.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?.sqrt())
}

fn exploded(stage: &str, message: String) -> Error {
    let hint =
        format!("lower `stage.{stage}.lr` or set `stage.{stage}.optimizer.clip`; the last good checkpoint is kept");
    Error::new(Kind::Training, message).hint(hint)
}
