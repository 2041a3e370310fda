//! Stage 1, attention transfer: each new layer learns the output of the attention it replaces.
//!
//! The frozen teacher's hidden state runs through the layers. At each converted layer the student sees the same queries,
//! keys and values; its loss against the teacher's per-head output is back-propagated at once and the graph dropped, so
//! no graph spans more than one layer. Gradients equal those of a joint loss, because no layer's loss depends on
//! another layer's new parameters.

use candle_core::{DType, Result as TensorResult, Tensor};

use crate::data::{Batch, Split};
use crate::error::Result;
use crate::mixers::Heads;
use crate::model::{Decoder, Net};
use crate::ops::loss::mse;
use crate::params::Param;
use crate::recipe;
use crate::train::{Grads, Task};

pub struct Transfer<'a> {
    decoder: &'a Decoder,
    teacher: &'a Net,
    student: &'a Net,
    settings: &'a recipe::Transfer,
    micro_batch: usize,
    /// Converted layers, ascending: the parts of the loss.
    layers: Vec<usize>,
    /// First parameter of each part, and the end.
    starts: Vec<usize>,
}

impl<'a> Transfer<'a> {
    pub fn new(
        decoder: &'a Decoder,
        teacher: &'a Net,
        student: &'a Net,
        settings: &'a recipe::Transfer,
        micro_batch: usize,
    ) -> Self {
        let layers: Vec<usize> = (0..student.mixers.len()).filter(|l| !student.mixers[*l].is_softmax()).collect();
        let mut starts = vec![0];
        for l in &layers {
            starts.push(starts[starts.len() - 1] + student.mixers[*l].params().len());
        }
        Transfer { decoder, teacher, student, settings, micro_batch, layers, starts }
    }

    /// Runs the teacher over `ids` and hands each converted layer's heads and the teacher's output to `visit`.
    fn walk(&self, ids: &Tensor, mut visit: impl FnMut(usize, &Heads, &Tensor) -> Result<()>) -> Result<()> {
        let Some(last) = self.layers.last() else { return Ok(()) };
        let tables = self.decoder.tables(0, ids.dim(1)?)?;
        let mut x = self.decoder.embed(ids)?;
        let mut parts = self.layers.iter().enumerate().peekable();
        for layer in 0..=*last {
            let block = self.decoder.block(layer);
            let heads = block.heads(&x, &tables, None, None)?;
            let y = self.teacher.mixers[layer].forward(&heads)?; // [B, T, H, D]
            if let Some((part, _)) = parts.next_if(|(_, l)| **l == layer) {
                visit(part, &heads, &y)?;
            }
            if layer < *last {
                x = block.finish(&x, &y, None, None)?;
            }
        }
        Ok(())
    }

    /// Loss of one layer.
    fn loss(&self, layer: usize, heads: &Heads, target: &Tensor) -> TensorResult<Tensor> {
        let mixer = &self.student.mixers[layer];
        let s = self.settings;
        if s.attention_ce_weight == 0.0 {
            return mixer.output_mse(heads, target, s.mse_weight);
        }
        let (y, student) = mixer.parallel(heads)?;
        let (_, teacher) = self.teacher.mixers[layer].parallel(heads)?;
        let log = student.all.to_dtype(DType::F32)?.maximum(1e-12)?.log()?;
        let rows = (log.elem_count() / log.dim(3)?) as f64;
        let ce = ((teacher.all.to_dtype(DType::F32)? * log)?.sum_all()? * (-s.attention_ce_weight / rows))?;
        mse(&y, target, s.mse_weight)? + ce
    }
}

impl Task for Transfer<'_> {
    fn params(&self) -> Vec<Param> {
        self.layers.iter().flat_map(|l| self.student.mixers[*l].params()).cloned().collect()
    }

    fn peak_lr(&self, param: &Param) -> f64 {
        if param.scalar { self.settings.lr_scalars.unwrap_or(self.settings.lr) } else { self.settings.lr }
    }

    fn gradients(&mut self, batch: &Batch, _: u64, share: f64, grads: &mut Grads) -> Result<Tensor> {
        let mut losses = Vec::with_capacity(self.layers.len());
        let share = share / self.layers.len() as f64; // the loss is the mean over layers
        self.walk(&batch.inputs, |part, heads, target| {
            let layer = self.layers[part];
            let loss = self.loss(layer, heads, target)?;
            let store = loss.backward()?;
            for (i, param) in self.student.mixers[layer].params().iter().enumerate() {
                if let Some(gradient) = store.get(&param.var) {
                    grads.add(self.starts[part] + i, gradient, share)?;
                }
            }
            losses.push(loss.detach());
            Ok(())
        })?;
        Ok(Tensor::stack(&losses, 0)?)
    }

    fn evaluate(&mut self, valid: &Split) -> Result<Vec<f64>> {
        let rows: Vec<usize> = (0..valid.len()).collect();
        let mut total = Tensor::zeros(self.layers.len(), DType::F64, &self.decoder.device)?;
        for part in rows.chunks(self.micro_batch) {
            let batch = valid.batch(part, &self.decoder.device)?;
            let share = part.len() as f64 / rows.len() as f64;
            let mut losses = Vec::with_capacity(self.layers.len());
            self.walk(&batch.inputs, |part, heads, target| {
                losses.push(self.loss(self.layers[part], heads, target)?.detach());
                Ok(())
            })?;
            total = (total + (Tensor::stack(&losses, 0)?.to_dtype(DType::F64)? * share)?)?;
        }
        Ok(total.to_vec1::<f64>()?)
    }

    fn part(&self, param: usize) -> usize {
        self.starts.partition_point(|start| *start <= param) - 1
    }

    fn part_name(&self, part: usize) -> String {
        format!("layer {}", self.layers[part])
    }
}
