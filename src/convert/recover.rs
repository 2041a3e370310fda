//! Whole-model stages: the student at its end, on next-token loss and, where asked for, the divergence from the teacher's
//! logits.
//!
//! The forward pass keeps the graphs of as many of the last blocks as the plan has room for, of the others only the input.
//! The backward pass rebuilds their graphs from it, one at a time. Teacher and student share the frozen weights; logits
//! are never kept. What trains of embeddings, final norm and head gets its gradient at either end.

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};

use super::trained::{Trained, trained};
use crate::data::{Batch, Split};
use crate::error::Result;
use crate::families::Role;
use crate::model::{Decoder, Net, Opened};
use crate::ops::head_loss::{Head, Sums, Target, head_loss, measure};
use crate::ops::loss::with_gradient;
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

    /// The last hidden state of the teacher and its head, where the loss needs them.
    fn taught(&self, ids: &Tensor) -> Result<Option<(Tensor, Head)>> {
        if self.stage.loss.logit_kl == 0.0 {
            return Ok(None);
        }
        let hidden = self.decoder.hidden(ids, self.teacher)?;
        Ok(Some((hidden.flatten(0, 1)?, self.decoder.head(None)?)))
    }

    /// What the head learns from: the next tokens of `batch` and the teacher.
    fn target<'t>(
        &self,
        tokens: &'t Tensor,
        mask: Option<&'t Tensor>,
        taught: Option<&'t (Tensor, Head)>,
    ) -> Target<'t> {
        let recipe::Loss { next_token, logit_kl, .. } = self.stage.loss;
        Target {
            tokens,
            mask,
            teacher: taught.map(|(hidden, _)| hidden),
            teacher_head: taught.map(|(_, head)| head),
            ce_weight: next_token,
            kl_weight: logit_kl,
            kl: self.stage.kl,
        }
    }

    /// Adds the gradients of a graph to those of the step.
    fn collect(&self, store: &GradStore, share: f64, grads: &mut Grads) -> Result<()> {
        for (slot, trained) in self.trained.iter().enumerate() {
            if let Some(gradient) = store.get(&trained.param.var) {
                grads.add(slot, gradient, share)?;
            }
        }
        Ok(())
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
        let taught = self.taught(ids)?;
        if taught.is_some() {
            clock.lap(Span::Teacher)?;
        }

        let layers = student.mixers.len();
        let mut passed = Vec::with_capacity(layers);
        // Where nothing before the first block trains its input needs no gradient.
        let embeds = lora.is_some_and(|lora| [Role::Embedding, Role::Positions].iter().any(|role| lora.trains(*role)));
        let input = |layer: usize, x: &Var| match layer > 0 || embeds {
            true => x.as_tensor().clone(),
            false => x.as_detached_tensor(),
        };
        let mut stream = decoder.embed(ids, lora)?.detach(); // [B, T, N]
        for (layer, mixer) in student.mixers.iter().enumerate() {
            let x = Var::from_tensor(&stream)?;
            let opened = decoder.block(layer).open(&input(layer, &x), mixer.as_ref(), &tables, lora, noise)?;
            stream = decoder.block(layer).close(&opened, lora)?;
            passed.push(Passed { x, opened: (layer + self.kept >= layers).then_some(opened) });
        }

        let last = Var::from_tensor(&stream)?;
        drop(stream);
        let hidden = decoder.final_norm(&last, lora)?.flatten(0, 1)?;
        let mask = batch.mask.as_ref().map(|m| m.flatten_all()).transpose()?;
        let tokens = batch.targets.flatten_all()?;
        let target = self.target(&tokens, mask.as_ref(), taught.as_ref());
        let loss = head_loss(&hidden, decoder.head(lora)?, &target)?;
        let value = loss.detach().to_dtype(DType::F32)?.reshape(1)?;
        let mut store = loss.backward()?;
        self.collect(&store, share, grads)?;
        let mut gradient = store.remove(&last);
        drop((store, loss, hidden)); // and with them the head's gradient

        while let Some(Passed { x, opened }) = passed.pop() {
            let Some(from_above) = gradient.take() else { break };
            let layer = passed.len();
            let block = decoder.block(layer);
            let opened = match opened {
                Some(opened) => opened,
                None => block.open(&input(layer, &x), student.mixers[layer].as_ref(), &tables, lora, noise)?,
            };
            let pulled = block.pull_back(opened, &from_above, lora)?;
            let mut store = pulled.backward()?;
            gradient = store.remove(&x);
            self.collect(&store, share, grads)?;
        }
        if let Some(from_above) = gradient {
            let zero = Tensor::zeros((), DType::F32, from_above.device())?;
            let store = with_gradient(&decoder.embed(ids, lora)?, zero, from_above)?.backward()?;
            self.collect(&store, share, grads)?;
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
            let taught = self.taught(&batch.inputs)?;
            let head = self.decoder.head(self.student.adapters.as_ref())?;
            sums += measure(&hidden, head, &self.target(&tokens, mask.as_ref(), taught.as_ref()))?;
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
