//! The stages of a conversion and decoding, on random weights: real losses, real optimiser steps.

use candle_core::{DType, Tensor};

use super::{Bench, Row, Work, time};
use crate::convert::plan::{self, PlanDevice};
use crate::convert::recover::Recover;
use crate::convert::swap::swap;
use crate::convert::trained::prepare;
use crate::convert::transfer::{Student, Transfer};
use crate::data::Batch;
use crate::error::{Error, Kind, Result};
use crate::model::{Decoder, Net, Steps};
use crate::ops::{forget_peak, peak};
use crate::recipe::Stage;
use crate::train::adamw::AdamW;
use crate::train::clock::{Clock, Spent};
use crate::train::{Grads, Task};

/// Tokens that fill the state before decoding is timed.
const PROMPT: usize = 128;

impl Bench<'_> {
    fn decoder(&self) -> Result<Decoder> {
        Decoder::random(&self.architecture, self.dtype, &self.device, self.progress)
    }

    fn tokens(&self) -> f64 {
        (self.batch * self.seq_len) as f64
    }

    /// Operations of the blocks' products, forward, per token.
    fn block_flops(&self) -> f64 {
        2.0 * (self.architecture.layers * self.architecture.block_parameters()) as f64
    }

    /// The recipe's mixer in every layer.
    fn student(&self) -> Result<Net> {
        let all: Vec<usize> = (0..self.architecture.layers).collect();
        swap(&self.architecture, self.recipe.mixer.design(), &all, 0, &self.device)
    }

    /// The recipe's first stage of a kind, in steps of this size, and its plan.
    fn stage(&self, kind: &str, fits: fn(&Stage) -> bool) -> Result<(Stage, plan::Stage)> {
        let mut recipe = self.recipe.clone();
        for stage in recipe.stage.values_mut() {
            (stage.batch, stage.seq_len, stage.micro_batch) = (self.batch, self.seq_len, self.micro_batch);
        }
        let all: Vec<usize> = (0..self.architecture.layers).collect();
        let planned = plan::stages(&self.architecture, &recipe, &all, PlanDevice::from(&self.device));
        let found = recipe.in_order().find(|(_, stage)| fits(stage));
        let found =
            found.and_then(|(name, stage)| Some((stage.clone(), planned.into_iter().find(|p| p.name == name)?)));
        found.ok_or_else(|| {
            let listed = self.recipe.stages.join(", ");
            Error::new(Kind::Usage, format!("no stage of the recipe ({listed}) trains on {kind}"))
                .hint("leave this measurement out, or name another recipe")
        })
    }

    /// Random token ids with their targets, `rows` sequences.
    fn random_batch(&self, rows: usize) -> Result<Batch> {
        let ids = |seed: u32| {
            let vocab = self.architecture.vocab as u32;
            // A linear congruential walk: any ids do.
            let mut x = seed;
            let cells = (0..rows * self.seq_len).map(move |_| {
                x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (x >> 8) % vocab
            });
            Tensor::from_vec(cells.collect::<Vec<u32>>(), (rows, self.seq_len), &self.device)
        };
        Ok(Batch { inputs: ids(1)?, targets: ids(2)?, mask: None })
    }

    /// Median time of one optimiser step of `task`.
    fn step(
        &self,
        what: &str,
        task: &mut dyn Task,
        (stage, planned): (&Stage, &plan::Stage),
        work: Work,
    ) -> Result<Row> {
        let params = task.params();
        let mut optimizer = AdamW::new(&params, &stage.optimizer)?;
        let peaks = vec![1.0; params.len()];
        let (micro, what) = (planned.micro_batch, format!("step of `{}`, {what}", planned.name));
        let mut clock = Clock::new(Spent::default(), &self.device, false);
        let mut run = || -> Result<()> {
            let mut grads = Grads(vec![None; params.len()]);
            let mut last = None;
            let mut from = 0;
            while from < self.batch {
                let rows = micro.min(self.batch - from);
                let batch = self.random_batch(rows)?;
                let share = rows as f64 / self.batch as f64;
                last = Some(task.gradients(&batch, from as u64, share, &mut grads, &mut clock)?);
                from += rows;
            }
            if let Some(i) = grads.0.iter().position(Option::is_none) {
                let message = format!("`{}` has no gradient", params[i].name);
                return Err(Error::new(Kind::Unexpected, message));
            }
            let update = optimizer.update(&params, &grads.0, stage.lr, &peaks)?;
            update.check(&params, &what, optimizer.steps)?;
            if let Some(losses) = last
                && let Some(bad) = losses.to_dtype(DType::F32)?.to_vec1::<f32>()?.iter().find(|l| !l.is_finite())
            {
                return Err(Error::new(Kind::Training, format!("a loss of `{what}` is {bad}")));
            }
            Ok(())
        };
        forget_peak(&self.device);
        let seconds = time(&self.device, self.repeats, 1, &mut run)?;
        let mut row = Row::new(what, seconds, work, self.ceilings);
        row.peak_bytes = peak(&self.device);
        Ok(row)
    }
}

/// The frozen teacher's forward pass without its head: what transfer cannot avoid.
pub fn teacher(b: &Bench) -> Result<Row> {
    let decoder = b.decoder()?;
    let net = Net::teacher(&b.architecture);
    forget_peak(&b.device);
    let seconds = time(&b.device, b.repeats, 1, || {
        let micro = plan::micro_batch(b.batch, b.micro_batch, b.seq_len, PlanDevice::from(&b.device));
        for from in (0..b.batch).step_by(micro) {
            let batch = b.random_batch(micro.min(b.batch - from))?;
            decoder.hidden(&batch.inputs, &net)?;
        }
        Ok(())
    })?;
    let work = Work { flops: b.block_flops() * b.tokens(), bytes: 0.0, tokens: b.tokens() };
    let mut row = Row::new("teacher forward", seconds, work, b.ceilings);
    row.peak_bytes = peak(&b.device);
    Ok(row)
}

/// One optimiser step of the recipe's first layer-wise stage, every layer converted.
pub fn transfer(b: &Bench) -> Result<Row> {
    let (stage, planned) = b.stage("a layer-wise loss", |s| s.loss.layer_wise())?;
    let (decoder, mut student, a) = (b.decoder()?, b.student()?, &b.architecture);
    prepare(&mut student, &stage, a, 0, &b.device)?;
    let teacher = Net::teacher(a);
    let alone = Student { name: "", net: &student, stage: &stage };
    let mut task = Transfer::new(&decoder, &teacher, &[alone], planned.micro_batch, 0);
    let work = Work { flops: b.block_flops() * b.tokens(), bytes: 0.0, tokens: b.tokens() };
    b.step("layer by layer", &mut task, (&stage, &planned), work)
}

/// One optimiser step of the recipe's first stage on the whole student.
pub fn recover(b: &Bench) -> Result<Row> {
    let (stage, planned) = b.stage("the whole student's loss", |s| s.loss.whole_model())?;
    let (decoder, mut student, a) = (b.decoder()?, b.student()?, &b.architecture);
    prepare(&mut student, &stage, a, 0, &b.device)?;
    let teacher = Net::teacher(a);
    let memory = (planned.micro_batch, planned.kept);
    let mut task = Recover::new(&decoder, &teacher, &student, &stage, memory, 0);
    // What cannot be avoided: forward and the gradient of every activation, and the teacher's forward where it is asked.
    let head = 2.0 * (a.vocab * a.hidden) as f64;
    let passes = if stage.loss.logit_kl > 0.0 { 3.0 } else { 2.0 };
    let work = Work { flops: passes * (b.block_flops() + head) * b.tokens(), bytes: 0.0, tokens: b.tokens() };
    let what = format!("whole student, {} of {} graphs kept", planned.kept, a.layers);
    b.step(&what, &mut task, (&stage, &planned), work)
}

/// One-token steps of the converted model, a batch of sequences at once. The state does not grow, so a short prompt
/// stands for any context.
pub fn decode(b: &Bench) -> Result<Row> {
    let (decoder, net, a) = (b.decoder()?, b.student()?, &b.architecture);
    let mut states = net.states();
    let prompt = Tensor::zeros((b.batch, PROMPT), DType::U32, &b.device)?;
    decoder.extend(&prompt, &net, &mut states)?;
    let calls = 32;
    let mut steps = Steps::new(&decoder, &net, states, b.batch, (b.repeats + 2) * calls);
    let mut tokens = vec![0; b.batch];
    forget_peak(&b.device);
    let seconds = time(&b.device, b.repeats, calls, || {
        // The next step waits for the choice of a token.
        steps.step(&tokens)?;
        tokens = steps.greedy()?;
        Ok(())
    })?;
    let weights = a.layers * a.block_parameters() + a.vocab * a.hidden;
    let bytes = (weights * b.dtype.size_in_bytes() + 2 * steps.state_bytes()) as f64;
    let work = Work { flops: 0.0, bytes, tokens: b.batch as f64 };
    let how = if steps.is_fixed() { "" } else { ", op by op" };
    let mut row = Row::new(format!("decode, batch {}{how}", b.batch), seconds, work, b.ceilings);
    row.peak_bytes = peak(&b.device);
    Ok(row)
}

/// A prompt of `seq_len` tokens into an empty state.
pub fn prefill(b: &Bench) -> Result<Row> {
    let (decoder, net) = (b.decoder()?, b.student()?);
    let batch = b.random_batch(b.batch)?;
    let seconds = time(&b.device, b.repeats, 1, || {
        decoder.extend(&batch.inputs, &net, &mut net.states())?;
        Ok(())
    })?;
    let work = Work { flops: b.block_flops() * b.tokens(), bytes: 0.0, tokens: b.tokens() };
    Ok(Row::new(format!("prefill, batch {}", b.batch), seconds, work, b.ceilings))
}
