//! What all stages share: the loop over batches with accumulation, clipping, evaluation, best weights and resume.
//!
//! The step number alone decides the batch, the dropout masks and the learning rate of all schedules but the plateau;
//! with the saved weights, moments and scheduler a resumed run repeats the bits of an uninterrupted one.
//!
//! What trains may fall into groups, such as several students of one teacher: each has its own optimiser, clipping norm
//! and schedule, and gets what it would get alone.

pub mod adamw;
pub mod clock;
pub mod schedule;
pub mod tensorboard;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::convert::plan::bytes;
use crate::data::{Batch, Split};
use crate::error::{Error, Kind, Result};
use crate::ops::{forget_peak, peak};
use crate::params::Param;
use crate::progress::{self, Progress};
use crate::recipe;
use crate::run_dir::RunDir;

use adamw::AdamW;
use clock::{Clock, Span, Spent};
use schedule::Rate;

/// What a stage does with a batch.
pub trait Task {
    /// Everything that trains.
    fn params(&self) -> Vec<Param>;
    /// Learning rate of a parameter at peak.
    fn peak_lr(&self, param: usize) -> f64;
    /// Adds `share` times the gradient of the batch's loss to `grads` (one slot per parameter) and gives the losses of
    /// its parts (layers, or the whole model), `[parts]` in f32, on the device so that nothing waits for it. `position`
    /// counts the sequences drawn before this batch: what seeds dropout. `clock` is lapped for teacher and students.
    fn gradients(
        &mut self,
        batch: &Batch,
        position: u64,
        share: f64,
        grads: &mut Grads,
        clock: &mut Clock,
    ) -> Result<Tensor>;
    /// Gives up memory that only saved time; false where there is none to give.
    fn slim(&mut self) -> bool {
        false
    }
    /// Losses of the parts on validation data.
    fn evaluate(&mut self, valid: &Split) -> Result<Vec<f64>>;
    /// The part a parameter belongs to: best weights are kept per part, since parts that share no parameter improve on
    /// their own.
    fn part(&self, param: usize) -> usize;
    /// Name of a part in messages and logs.
    fn part_name(&self, part: usize) -> String;
    /// The group a part belongs to.
    fn group(&self, _part: usize) -> usize {
        0
    }
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
    /// For every group of the task the stage whose optimiser, schedule and peak learning rate it has.
    pub groups: &'a [&'a recipe::Stage],
    pub eval_every: usize,
    pub seed: u64,
    /// Whether a GPU is [timed](clock).
    pub timed: bool,
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
    /// All time of those runs by what it went to.
    #[serde(default)]
    pub spent: Spent,
    /// Most memory in use on a GPU, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
}

/// The part of the loop's state that is not a tensor.
#[derive(Serialize, Deserialize)]
struct Position {
    outcome: Outcome,
    /// Of every group.
    rates: Vec<Rate>,
}

/// What is clipped and updated together.
struct Group {
    /// Places among the parameters of the task.
    slots: Vec<usize>,
    params: Vec<Param>,
    /// Learning rates at peak.
    peaks: Vec<f64>,
    optimizer: AdamW,
}

impl Group {
    fn new(task: &dyn Task, params: &[Param], number: usize, stage: &recipe::Stage) -> Result<Self> {
        let slots: Vec<usize> = (0..params.len()).filter(|slot| task.group(task.part(*slot)) == number).collect();
        let params: Vec<Param> = slots.iter().map(|slot| params[*slot].clone()).collect();
        let optimizer = AdamW::new(&params, &stage.optimizer)?;
        Ok(Group { peaks: slots.iter().map(|slot| task.peak_lr(*slot)).collect(), slots, params, optimizer })
    }
}

/// Seconds between saves.
const SAVE_EVERY: Duration = Duration::from_secs(10);

/// Trains `task` to its last step and leaves the best weights in its parameters. Without a run folder nothing is logged,
/// saved or resumed.
pub fn run(
    task: &mut dyn Task,
    settings: &Settings,
    train: &Split,
    valid: &Split,
    run_dir: Option<&RunDir>,
    progress: &dyn Progress,
) -> Result<Outcome> {
    let params = task.params();
    let stage = settings.stage;
    let log = |line: Value| run_dir.map_or(Ok(()), |run| run.append_log(&line));
    let numbered = settings.groups.iter().enumerate();
    let mut groups = numbered.map(|(n, stage)| Group::new(task, &params, n, stage)).collect::<Result<Vec<_>>>()?;
    let mut best: Vec<Tensor> = params.iter().map(|p| p.var.copy()).collect::<candle_core::Result<_>>()?;
    let mut clock = Clock::new(Spent::default(), params_device(&params), settings.timed);
    forget_peak(params_device(&params));
    let saved = run_dir.map(|run| run.load_state(stage, progress)).transpose()?.flatten();
    // Groups have parameters of the same names.
    let key = |kind: &str, group: usize, param: &Param| match settings.groups.len() {
        1 => format!("{kind}.{}", param.name),
        _ => format!("{kind}.{group}.{}", param.name),
    };
    let group_of = |task: &dyn Task, slot: usize| task.group(task.part(slot));
    let (mut step, mut position) = match saved {
        Some(saved) => {
            let read = |kind: &str, group: usize, param: &Param| {
                let name = key(kind, group, param);
                let found = saved.tensors.get(&name).ok_or_else(|| {
                    Error::new(Kind::Output, format!("saved state of stage `{stage}` lacks `{name}`"))
                        .hint("start again with --restart")
                })?;
                Ok::<_, Error>(found.to_device(param.var.device())?)
            };
            for (slot, (best, param)) in best.iter_mut().zip(&params).enumerate() {
                let group = group_of(task, slot);
                param.var.set(&read("param", group, param)?)?;
                *best = read("best", group, param)?;
            }
            for (n, group) in groups.iter_mut().enumerate() {
                for (i, param) in group.params.iter().enumerate() {
                    group.optimizer.restore(i, &read("m", n, param)?, &read("v", n, param)?)?;
                }
                group.optimizer.steps = saved.step;
            }
            let position: Position = serde_json::from_value(saved.state).map_err(|e| {
                Error::new(Kind::Output, format!("saved state of stage `{stage}` cannot be read: {e}"))
                    .hint("start again with --restart")
            })?;
            clock.spent = position.outcome.spent.clone();
            clock.lap(Span::Saving)?;
            (saved.step, position)
        }
        None => {
            let first = task.evaluate(valid)?;
            check_finite(task, stage, 0, "validation loss", &first)?;
            clock.lap(Span::Evaluation)?;
            let parts: Vec<String> = (0..first.len()).map(|part| task.part_name(part)).collect();
            log(json!({"stage": stage, "step": 0, "valid": first, "parts": parts}))?;
            let outcome = Outcome { best_step: vec![0; first.len()], best: first.clone(), first, ..Outcome::default() };
            let rate = |stage: &&recipe::Stage| Rate::new(&stage.schedule, settings.steps, stage.lr);
            (0, Position { outcome, rates: settings.groups.iter().map(rate).collect() })
        }
    };
    let tokens = (settings.batch * train.seq_len()) as u64;
    progress.begin(stage, settings.steps * tokens, step * tokens, "tokens");
    let mut saved_at = Instant::now();
    let mut micro_batch = settings.micro_batch;
    while step < settings.steps {
        let started = Instant::now();
        let drawn = step * settings.batch as u64;
        let rows = train.draw(settings.seed, drawn, settings.batch);
        let (losses, mut grads) = loop {
            match accumulate(task, &params, train, &rows, drawn, micro_batch, &mut clock) {
                Err(e) if e.kind == Kind::Memory && task.slim() => progress.warn(&format!(
                    "`{stage}` ran out of memory (planned: {}); going on slower, with all graphs computed again",
                    bytes(settings.memory)
                )),
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
                    let kept = if run_dir.is_some() { "; progress is saved" } else { "" };
                    let hint = format!("lower `stage.{stage}.seq_len`, or use a device with more memory{kept}");
                    return Err(Error::new(Kind::Memory, message).hint(hint));
                }
                done => break done?,
            }
        };
        let mut updates = Vec::with_capacity(groups.len());
        let mut rates = Vec::with_capacity(groups.len());
        for (n, group) in groups.iter_mut().enumerate() {
            let lr = position.rates[n].at(step);
            let own: Vec<_> = group.slots.iter().map(|slot| grads.0[*slot].take()).collect();
            updates.push(group.optimizer.update(&group.params, &own, lr, &group.peaks)?);
            rates.push(lr * settings.groups[n].lr);
            clock.lap(Span::Optimizer(n))?;
        }
        // With the update the one place of a step that waits for the device.
        let losses = losses.to_vec1::<f64>()?;
        step += 1;
        check_finite(task, stage, step, "loss", &losses)?;
        for (group, update) in groups.iter().zip(&updates) {
            update.check(&group.params, stage, step)?;
        }
        position.outcome.seconds += started.elapsed().as_secs_f64();
        position.outcome.steps = step;
        position.outcome.tokens = step * tokens;
        let loss = mean(&losses);
        let norms = updates.iter().map(|update| update.gradient_norm()).collect();
        log(json!({
            "stage": stage, "step": step, "loss": loss, "losses": losses, "lr": one_or_all(rates),
            "grad_norm": one_or_all(norms), "tokens": position.outcome.tokens,
        }))?;
        progress.advance(tokens, &format!("loss {loss:.4}"));
        clock.lap(Span::Saving)?;

        if step.is_multiple_of(settings.eval_every.max(1) as u64) || step == settings.steps {
            let valid = task.evaluate(valid)?;
            check_finite(task, stage, step, "validation loss", &valid)?;
            log(json!({"stage": stage, "step": step, "valid": valid}))?;
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
            for (n, rate) in position.rates.iter_mut().enumerate() {
                let own = valid.iter().enumerate().filter(|(part, _)| task.group(*part) == n);
                rate.observe(mean(&own.map(|(_, loss)| *loss).collect::<Vec<_>>()));
            }
            clock.lap(Span::Evaluation)?;
        }
        position.outcome.spent = clock.spent.clone();
        let stop = progress::stop_requested();
        if let Some(run) = run_dir
            && (stop || saved_at.elapsed() >= SAVE_EVERY || step == settings.steps)
        {
            let mut tensors = BTreeMap::new();
            for (slot, (param, best)) in params.iter().zip(&best).enumerate() {
                let group = group_of(task, slot);
                tensors.insert(key("param", group, param), param.var.as_tensor().clone());
                tensors.insert(key("best", group, param), best.clone());
            }
            for (n, group) in groups.iter().enumerate() {
                for (i, param) in group.params.iter().enumerate() {
                    let (m, v) = group.optimizer.moments(i);
                    tensors.insert(key("m", n, param), m.clone());
                    tensors.insert(key("v", n, param), v.clone());
                }
            }
            let state = serde_json::to_value(&position).map_err(|e| Error::new(Kind::Unexpected, e.to_string()))?;
            run.save_state(stage, step, &tensors, &state)?;
            saved_at = Instant::now();
            clock.lap(Span::Saving)?;
        }
        if stop && step < settings.steps {
            let done = format!("stopped in stage `{stage}` after step {step} of {}", settings.steps);
            let (kept, hint) = match run_dir {
                Some(_) => ("; progress is saved", "the same command continues from here"),
                None => ("", "the same command begins anew"),
            };
            return Err(Error::new(Kind::Interrupted, done + kept).hint(hint));
        }
    }
    for (param, best) in params.iter().zip(&best) {
        param.var.set(best)?;
    }
    position.outcome.spent = clock.spent;
    position.outcome.peak_bytes = position.outcome.peak_bytes.max(peak(params_device(&params)));
    progress.end(&summary(&position.outcome));
    if position.outcome.tokens > 0 && mean(&position.outcome.best) >= mean(&position.outcome.first) {
        progress.warn(&format!(
            "nothing that `{stage}` reached was better than its start, whose weights stay: try a lower \
             `stage.{stage}.lr`, or more tokens"
        ));
    }
    if let Some(peak) = position.outcome.peak_bytes {
        progress.say(&format!("memory of `{stage}`: {} at most, planned {}", bytes(peak), bytes(settings.memory)));
    }
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
    clock: &mut Clock,
) -> Result<(Tensor, Grads)> {
    let mut grads = Grads(vec![None; params.len()]);
    let mut losses: Option<Tensor> = None;
    for (n, part) in rows.chunks(micro_batch).enumerate() {
        let share = part.len() as f64 / rows.len() as f64;
        let batch = train.batch(part, params_device(params))?;
        clock.lap(Span::Data)?;
        let micro = task.gradients(&batch, drawn + (n * micro_batch) as u64, share, &mut grads, clock)?;
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
    let time = progress::duration(Duration::from_secs_f64(outcome.seconds));
    let rate = outcome.tokens as f64 / outcome.seconds.max(1e-9);
    let (first, best) = (mean(&outcome.first), mean(&outcome.best));
    let shares = Some(outcome.spent.shares()).filter(|shares| !shares.is_empty());
    let shares = shares.map(|shares| format!(" ({shares})")).unwrap_or_default();
    format!("validation loss {first:.4} → {best:.4} in {time}, {rate:.0} tokens/s{shares}")
}

/// Mean of a list; 0 where it is empty.
pub fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len().max(1) as f64
}

/// The number of one group, the list of several.
fn one_or_all(list: Vec<f64>) -> Value {
    if let [one] = list[..] { json!(one) } else { json!(list) }
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
