//! Layer-wise stages: each new layer learns what the attention it replaces puts out.
//!
//! The frozen teacher's hidden state runs through the layers. At each converted layer the students see that state; their
//! losses against the teacher's output are back-propagated at once and the graphs dropped, so no graph spans more than
//! one layer. Gradients equal those of a joint loss, because no layer's loss depends on what another layer trains. A
//! student whose projections and norms are as the teacher's takes its queries, keys and values from the teacher; one that
//! changes them computes its own.
//!
//! Several students may share one walk of the teacher, each with a stage of its own: they are groups of the training
//! loop, and each learns as it would alone.

use candle_core::{DType, Result as TensorResult, Tensor};

use super::trained::{Trained, trained};
use crate::data::{Batch, Split};
use crate::error::Result;
use crate::families::{Place, Projection, Role};
use crate::mixers::{Heads, Mixer};
use crate::model::{Decoder, Net, Tables};
use crate::ops::loss::{l2, mse};
use crate::params::{Adapters, Param};
use crate::recipe;
use crate::train::clock::{Clock, Span};
use crate::train::{Grads, Task, noise};

/// Projections of which one is changed, or a norm beside them, where a student sees other queries, keys and values than
/// the teacher.
const QKV: [Projection; 3] = [Projection::Q, Projection::K, Projection::V];

/// A student, [prepared](super::trained::prepare) for its stage.
#[derive(Clone, Copy)]
pub struct Student<'a> {
    /// Where there are several, this is said of what belongs to it.
    pub name: &'a str,
    pub net: &'a Net,
    pub stage: &'a recipe::Stage,
}

pub struct Transfer<'a> {
    decoder: &'a Decoder,
    teacher: &'a Net,
    students: Vec<Student<'a>>,
    micro_batch: usize,
    seed: u64,
    /// The parts of the loss, in the order of the walk.
    parts: Vec<Part>,
    trained: Vec<Trained>,
}

/// One converted layer of one student.
pub struct Part {
    pub student: usize,
    pub layer: usize,
    /// Weight of the part in the loss: a student's loss is the mean over its layers.
    share: f64,
    /// Slots of what trains there.
    slots: std::ops::Range<usize>,
}

/// What a converted layer meets: the stream and the teacher's attention of it.
pub(super) struct Meeting<'a> {
    /// [B, T, N]
    x: &'a Tensor,
    tables: &'a Tables,
    /// The teacher's queries, keys and values.
    pub heads: &'a Heads<'a>,
    /// The teacher's output [B, T, H, D].
    pub target: &'a Tensor,
}

impl<'a> Transfer<'a> {
    /// `seed` seeds dropout.
    pub fn new(
        decoder: &'a Decoder,
        teacher: &'a Net,
        students: &[Student<'a>],
        micro_batch: usize,
        seed: u64,
    ) -> Self {
        let converted: Vec<Vec<usize>> = students.iter().map(|s| s.net.converted()).collect();
        let mut waiting: Vec<Vec<Trained>> = students.iter().map(|s| trained(s.net, s.stage)).collect();
        let (mut parts, mut all) = (Vec::new(), Vec::new());
        for layer in 0..teacher.mixers.len() {
            for (student, layers) in converted.iter().enumerate().filter(|(_, layers)| layers.contains(&layer)) {
                let first = all.len();
                let left = std::mem::take(&mut waiting[student]);
                let (here, later): (Vec<_>, Vec<_>) = left.into_iter().partition(|t| t.layer == Some(layer));
                waiting[student] = later;
                for mut trained in here {
                    if students.len() > 1 {
                        trained.param.name = format!("{}: {}", students[student].name, trained.param.name);
                    }
                    all.push(trained);
                }
                parts.push(Part { student, layer, share: 1.0 / layers.len() as f64, slots: first..all.len() });
            }
        }
        Transfer { decoder, teacher, students: students.to_vec(), micro_batch, seed, parts, trained: all }
    }

    /// The parts of the loss, in the order of its values.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Runs the teacher over `ids` and hands each part what its layer meets.
    fn walk(&self, ids: &Tensor, mut visit: impl FnMut(&Part, &Meeting) -> Result<()>) -> Result<()> {
        let Some(last) = self.parts.last().map(|part| part.layer) else { return Ok(()) };
        let tables = self.decoder.tables(0, ids.dim(1)?)?;
        let mut x = self.decoder.embed(ids, None)?;
        let mut parts = self.parts.iter().peekable();
        for layer in 0..=last {
            let block = self.decoder.block(layer);
            let heads = block.heads(&x, &tables, None, None)?;
            let y = self.teacher.mixers[layer].forward(&heads)?; // [B, T, H, D]
            while let Some(part) = parts.next_if(|part| part.layer == layer) {
                visit(part, &Meeting { x: &x, tables: &tables, heads: &heads, target: &y })?;
            }
            if layer < last {
                x = block.finish(&x, &y, None, None)?;
            }
        }
        Ok(())
    }

    /// Means over `rows` of the figures [K] that `look` finds at each part: K for every part.
    pub(super) fn means(
        &self,
        rows: &Split,
        mut look: impl FnMut(&Part, &Meeting) -> Result<Tensor>,
    ) -> Result<Vec<Vec<f64>>> {
        let mut total: Option<Tensor> = None;
        let indices: Vec<usize> = (0..rows.len()).collect();
        for chunk in indices.chunks(self.micro_batch) {
            let batch = rows.batch(chunk, &self.decoder.device)?;
            let share = chunk.len() as f64 / rows.len() as f64;
            let mut found = Vec::with_capacity(self.parts.len());
            self.walk(&batch.inputs, |part, meeting| {
                found.push(look(part, meeting)?.detach());
                Ok(())
            })?;
            let found = (Tensor::stack(&found, 0)?.to_dtype(DType::F64)? * share)?; // [parts, K]
            total = Some(total.map_or(Ok(found.clone()), |sum| sum + &found)?);
        }
        Ok(total.map(|total| total.to_vec2::<f64>()).transpose()?.unwrap_or_default())
    }

    /// The attention of a part, and the queries, keys and values it sees where they are not the teacher's.
    pub(super) fn sees<'m>(
        &self,
        part: &Part,
        meeting: &'m Meeting,
        noise: Option<u64>,
    ) -> TensorResult<(&'a dyn Mixer, Option<Heads<'m>>)> {
        let (net, layer) = (self.students[part.student].net, part.layer);
        let norms = |role| match role {
            Role::Norm(l, place, _) => l == layer && place == Place::BeforeAttention,
            role => matches!(role, Role::HeadNorm(l, _) if l == layer),
        };
        let changed = |a: &&Adapters| QKV.iter().any(|p| a.changes(layer, *p)) || a.roles().any(norms);
        let adapters = net.adapters.as_ref().filter(changed);
        let block = self.decoder.block(layer);
        let own = adapters.map(|a| block.heads(meeting.x, meeting.tables, Some(a), noise)).transpose()?;
        Ok((net.mixers[layer].as_ref(), own))
    }

    /// Loss of one part.
    pub(super) fn loss(&self, part: &Part, meeting: &Meeting, noise: Option<u64>) -> TensorResult<Tensor> {
        let (Student { net, stage, .. }, layer) = (self.students[part.student], part.layer);
        let (block, weights, adapters) = (self.decoder.block(layer), &stage.loss, net.adapters.as_ref());
        let (mixer, own) = self.sees(part, meeting, noise)?;
        let (heads, target) = (own.as_ref().unwrap_or(meeting.heads), meeting.target);
        if weights.output_alone() {
            return mixer.output_mse(heads, target, weights.output_mse);
        }
        let mut terms = Vec::new();
        let y = if weights.attention_ce > 0.0 {
            let (y, student) = mixer.parallel(heads)?;
            let (_, teacher) = self.teacher.mixers[layer].parallel(meeting.heads)?;
            let log = student.all.to_dtype(DType::F32)?.maximum(1e-12)?.log()?;
            let rows = (log.elem_count() / log.dim(3)?) as f64;
            terms.push(((teacher.all.to_dtype(DType::F32)? * log)?.sum_all()? * (-weights.attention_ce / rows))?);
            y
        } else {
            mixer.forward(heads)?
        };
        if weights.output_mse > 0.0 {
            terms.push(mse(&y, target, weights.output_mse)?);
        }
        if weights.hidden() {
            let found = block.output(&y, adapters, noise)?; // [B, T, N]
            let wanted = block.output(target, None, None)?;
            if weights.hidden_mse > 0.0 {
                terms.push(mse(&found, &wanted, weights.hidden_mse)?);
            }
            if weights.hidden_l2 > 0.0 {
                terms.push(l2(&found, &wanted, weights.hidden_l2)?);
            }
        }
        terms[1..].iter().try_fold(terms[0].clone(), |sum, term| sum + term)
    }
}

impl Task for Transfer<'_> {
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
        let mut losses = Vec::with_capacity(self.parts.len());
        let noise = Some(noise(self.seed, position));
        self.walk(&batch.inputs, |part, meeting| {
            clock.lap(Span::Teacher)?;
            let loss = self.loss(part, meeting, noise)?;
            let store = loss.backward()?;
            for slot in part.slots.clone() {
                if let Some(gradient) = store.get(&self.trained[slot].param.var) {
                    grads.add(slot, gradient, share * part.share)?;
                }
            }
            losses.push(loss.detach());
            Ok(clock.lap(Span::Student(part.student))?)
        })?;
        Ok(Tensor::stack(&losses, 0)?)
    }

    fn evaluate(&mut self, valid: &Split) -> Result<Vec<f64>> {
        let losses = self.means(valid, |part, meeting| Ok(self.loss(part, meeting, None)?.reshape(1)?))?;
        Ok(losses.concat())
    }

    fn part(&self, param: usize) -> usize {
        self.parts.partition_point(|part| part.slots.end <= param)
    }

    fn part_name(&self, part: usize) -> String {
        let Part { student, layer, .. } = self.parts[part];
        match self.students.len() {
            1 => format!("layer {layer}"),
            _ => format!("layer {layer} of `{}`", self.students[student].name),
        }
    }

    fn group(&self, part: usize) -> usize {
        self.parts[part].student
    }
}
