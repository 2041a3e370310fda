//! Stage 2, recovery: LoRA on the whole student, on next-token loss and, where asked for, KL to the teacher's logits.
//!
//! The forward pass keeps only the input of each block. The backward pass rebuilds one block's graph at a time from that
//! input, so one block's graph is alive at once. Teacher and student share the frozen weights; logits are never kept.

use candle_core::{DType, Tensor, Var};

use crate::data::{Batch, Split};
use crate::error::Result;
use crate::model::{Decoder, Net};
use crate::ops::head_loss::{Sums, Target, head_loss, measure};
use crate::params::Param;
use crate::recipe;
use crate::train::{Grads, Task};

pub struct Recover<'a> {
    decoder: &'a Decoder,
    teacher: &'a Net,
    student: &'a Net,
    settings: &'a recipe::Recover,
    micro_batch: usize,
    seed: u64,
    params: Vec<Param>,
}

impl<'a> Recover<'a> {
    pub fn new(
        decoder: &'a Decoder,
        teacher: &'a Net,
        student: &'a Net,
        settings: &'a recipe::Recover,
        micro_batch: usize,
        seed: u64,
    ) -> Self {
        let mut params: Vec<Param> = student.adapters.iter().flat_map(|a| a.params()).collect();
        if settings.lr_mixer > 0.0 {
            params.extend(student.mixers.iter().flat_map(|m| m.params()).cloned());
        }
        Recover { decoder, teacher, student, settings, micro_batch, seed, params }
    }

    /// The teacher's last hidden state, where the loss or the measure needs it.
    fn teacher_hidden(&self, ids: &Tensor) -> Result<Option<Tensor>> {
        if self.settings.kl_weight == 0.0 {
            return Ok(None);
        }
        let hidden = self.decoder.hidden(ids, self.teacher)?;
        Ok(Some(hidden.flatten(0, 1)?))
    }
}

impl Task for Recover<'_> {
    fn params(&self) -> Vec<Param> {
        self.params.clone()
    }

    fn peak_lr(&self, param: &Param) -> f64 {
        if param.name.contains(".lora_") { self.settings.lr } else { self.settings.lr_mixer }
    }

    fn gradients(&mut self, batch: &Batch, position: u64, share: f64, grads: &mut Grads) -> Result<Tensor> {
        let (decoder, student) = (self.decoder, self.student);
        let lora = student.adapters.as_ref();
        let noise = Some(self.seed.wrapping_add(position.wrapping_mul(0x9E37_79B9_7F4A_7C15)));
        let ids = &batch.inputs;
        let tables = decoder.tables(0, ids.dim(1)?)?;
        let teacher = self.teacher_hidden(ids)?;

        let layers = student.mixers.len();
        let mut inputs = vec![decoder.embed(ids)?]; // of every block, and the last output: [B, T, N]
        for (layer, mixer) in student.mixers.iter().enumerate() {
            let y = decoder.block(layer).forward(&inputs[layer], mixer.as_ref(), &tables, lora, noise)?;
            inputs.push(y.detach());
        }

        let last = Var::from_tensor(&inputs[layers])?;
        let hidden = decoder.final_norm(&last)?.flatten(0, 1)?;
        let mask = batch.mask.as_ref().map(|m| m.flatten_all()).transpose()?;
        let target = Target {
            tokens: &batch.targets.flatten_all()?,
            mask: mask.as_ref(),
            teacher: teacher.as_ref(),
            ce_weight: self.settings.ce_weight,
            kl_weight: self.settings.kl_weight,
        };
        let loss = head_loss(&hidden, &decoder.head, &target)?;
        let value = loss.detach().to_dtype(DType::F32)?.reshape(1)?;
        let mut store = loss.backward()?;
        let mut gradient = store.remove(&last);

        for layer in (0..layers).rev() {
            let Some(from_above) = gradient.take() else { break };
            let x = Var::from_tensor(&inputs[layer])?;
            // Nothing before the first block trains: its input needs no gradient.
            let input = if layer == 0 { inputs[0].clone() } else { x.as_tensor().clone() };
            let mixer = student.mixers[layer].as_ref();
            let mut store =
                decoder.block(layer).pull_back(&input, mixer, &tables, lora, noise, &from_above)?.backward()?;
            gradient = store.remove(&x);
            for (i, param) in self.params.iter().enumerate() {
                if let Some(g) = store.get(&param.var) {
                    grads.add(i, g, share)?;
                }
            }
            inputs.truncate(layer + 1);
        }
        Ok(value)
    }

    fn evaluate(&mut self, valid: &Split) -> Result<Vec<f64>> {
        let rows: Vec<usize> = (0..valid.len()).collect();
        let mut sums = Sums::default();
        for part in rows.chunks(self.micro_batch) {
            let batch = valid.batch(part, &self.decoder.device)?;
            let hidden = self.decoder.hidden(&batch.inputs, self.student)?.flatten(0, 1)?;
            let mask = batch.mask.as_ref().map(|m| m.flatten_all()).transpose()?;
            let tokens = batch.targets.flatten_all()?;
            let target = Target { tokens: &tokens, mask: mask.as_ref(), teacher: None, ce_weight: 1.0, kl_weight: 0.0 };
            sums += measure(&hidden, &self.decoder.head, &target)?;
        }
        Ok(vec![sums.nll / sums.rows.max(1.0)])
    }

    fn part(&self, _: usize) -> usize {
        0
    }

    fn part_name(&self, _: usize) -> String {
        "the model".into()
    }
}
