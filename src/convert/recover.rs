//! Whole-model stages: the student at its end, on next-token loss and, where asked for, the divergence from the teacher's
//! logits.
//!
//! The forward pass keeps the graphs of as many of the last blocks as the plan has room for, of the others only the input.
//! The backward pass rebuilds their graphs from it, one at a time. Teacher and student share the frozen weights; logits
//! are never kept.

use candle_core::{DType, Tensor, Var};

use super::trained::{Trained, trained};
use crate::data::{Batch, Split};
use crate::error::Result;
use crate::model::{Decoder, Net, Opened};
use crate::ops::head_loss::{Sums, Target, head_loss, measure};
use crate::params::Param;
use crate::recipe;
use crate::train::clock::{Clock, Span};
use crate::train::{Grads, Task, noise};

pub struct Recover<'a> {
    decoder: &'a Decoder,
    teacher: &'a Net,
    student: &'a Net,
    stage: &'a recipe::Stage,
    micro_batch: usize,
    /// Blocks, the last ones, whose graphs are kept.
    kept: usize,
    seed: u64,
    trained: Vec<Trained>,
}

/// A block's input [B, T, N], and its forward pass where that is kept.
struct Passed {
    x: Var,
    opened: Option<Opened>,
}

impl<'a> Recover<'a> {
    /// `student` was [prepared](super::trained::prepare) for `stage`. `kept` counts the blocks whose graphs are kept;
    /// `seed` seeds dropout.
    pub fn new(
        decoder: &'a Decoder,
        teacher: &'a Net,
        student: &'a Net,
        stage: &'a recipe::Stage,
        (micro_batch, kept): (usize, usize),
        seed: u64,
    ) -> Self {
        Recover { decoder, teacher, student, stage, micro_batch, kept, seed, trained: trained(student, stage) }
    }

    /// The last hidden state of the teacher, where the loss needs it.
    fn teacher_hidden(&self, ids: &Tensor) -> Result<Option<Tensor>> {
        if self.stage.loss.logit_kl == 0.0 {
            return Ok(None);
        }
        let hidden = self.decoder.hidden(ids, self.teacher)?;
        Ok(Some(hidden.flatten(0, 1)?))
    }

    /// What the head learns from: the next tokens of `batch` and the teacher.
    fn target<'t>(&self, tokens: &'t Tensor, mask: Option<&'t Tensor>, teacher: Option<&'t Tensor>) -> Target<'t> {
        let recipe::Loss { next_token, logit_kl, .. } = self.stage.loss;
        Target { tokens, mask, teacher, ce_weight: next_token, kl_weight: logit_kl, kl: self.stage.kl }
    }
}

impl Task for Recover<'_> {
    fn params(&self) -> Vec<Param> {
        self.trained.iter().map(|t| t.param.clone()).collect()
    }

    fn peak_lr(&self, param: usize) -> f64 {
        self.trained[param].peak
    }

    fn gradients(
        &mut self,
        batch: &Batch,
        position: u64,
        share: f64,
        grads: &mut Grads,
        clock: &mut Clock,
    ) -> Result<Tensor> {
        let (decoder, student) = (self.decoder, self.student);
        let lora = student.adapters.as_ref();
        let noise = Some(noise(self.seed, position));
        let ids = &batch.inputs;
        let tables = decoder.tables(0, ids.dim(1)?)?;
        let teacher = self.teacher_hidden(ids)?;
        if teacher.is_some() {
            clock.lap(Span::Teacher)?;
        }

        let layers = student.mixers.len();
        let mut passed = Vec::with_capacity(layers);
        let mut stream = decoder.embed(ids)?; // [B, T, N]
        for (layer, mixer) in student.mixers.iter().enumerate() {
            let x = Var::from_tensor(&stream)?;
            // Nothing before the first block trains: its input needs no gradient.
            let input = if layer == 0 { stream } else { x.as_tensor().clone() };
            let opened = decoder.block(layer).open(&input, mixer.as_ref(), &tables, lora, noise)?;
            stream = decoder.block(layer).close(&opened)?;
            passed.push(Passed { x, opened: (layer + self.kept >= layers).then_some(opened) });
        }

        let last = Var::from_tensor(&stream)?;
        drop(stream);
        let hidden = decoder.final_norm(&last)?.flatten(0, 1)?;
        let mask = batch.mask.as_ref().map(|m| m.flatten_all()).transpose()?;
        let tokens = batch.targets.flatten_all()?;
        let target = self.target(&tokens, mask.as_ref(), teacher.as_ref());
        let loss = head_loss(&hidden, decoder.head(), &target)?;
        let value = loss.detach().to_dtype(DType::F32)?.reshape(1)?;
        let mut gradient = loss.backward()?.remove(&last);

        while let (Some(Passed { x, opened }), Some(from_above)) = (passed.pop(), gradient.take()) {
            let layer = passed.len();
            let block = decoder.block(layer);
            let opened = match opened {
                Some(opened) => opened,
                None => {
                    let input = if layer == 0 { x.as_detached_tensor() } else { x.as_tensor().clone() };
                    block.open(&input, student.mixers[layer].as_ref(), &tables, lora, noise)?
                }
            };
            let pulled = block.pull_back(opened, &from_above)?;
            let mut store = pulled.backward()?;
            gradient = store.remove(&x);
            for (slot, trained) in self.trained.iter().enumerate().filter(|(_, t)| t.layer == layer) {
                if let Some(g) = store.get(&trained.param.var) {
                    grads.add(slot, g, share)?;
                }
            }
        }
        clock.lap(Span::Student(0))?;
        Ok(value)
    }

    fn slim(&mut self) -> bool {
        std::mem::take(&mut self.kept) > 0
    }

    fn evaluate(&mut self, valid: &Split) -> Result<Vec<f64>> {
        let rows: Vec<usize> = (0..valid.len()).collect();
        let mut sums = Sums::default();
        for part in rows.chunks(self.micro_batch) {
            let batch = valid.batch(part, &self.decoder.device)?;
            let hidden = self.decoder.hidden(&batch.inputs, self.student)?.flatten(0, 1)?;
            let mask = batch.mask.as_ref().map(|m| m.flatten_all()).transpose()?;
            let tokens = batch.targets.flatten_all()?;
            let teacher = self.teacher_hidden(&batch.inputs)?;
            sums += measure(&hidden, self.decoder.head(), &self.target(&tokens, mask.as_ref(), teacher.as_ref()))?;
        }
        let recipe::Loss { next_token, logit_kl, .. } = self.stage.loss;
        Ok(vec![(next_token * sums.nll + logit_kl * sums.kl) / sums.rows.max(1.0)])
    }

    fn part(&self, _: usize) -> usize {
        0
    }

    fn part_name(&self, _: usize) -> String {
        "the model".into()
    }
}
