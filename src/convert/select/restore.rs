//! `restore-one-kl`: KL(teacher ‖ student) on training text when one layer of the converted student is softmax again, for
//! every layer (KL-guided layer selection, arXiv 2512.20569, which trains each such student for a while; here it is
//! measured as it is).
//!
//! All these students share their blocks below the restored layer, and that input of it is computed once; the teacher
//! runs once for all of them. With L layers a batch takes L (L + 3) / 2 blocks of the student instead of L², and L
//! heads.

use std::time::{Duration, Instant};

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Selection;
use crate::data::Batch;
use crate::error::{Error, Kind, Result};
use crate::evaluate::Subject;
use crate::ops::head_loss::{Target, measure};
use crate::progress::{Progress, stop_requested};
use crate::recipe::Kl;
use crate::run_dir::RunDir;
use crate::train::Outcome;

/// What is measured so far.
#[derive(Default, Serialize, Deserialize)]
struct Partial {
    /// Sequences.
    done: usize,
    /// Targets that counted.
    targets: f64,
    /// Sums of KL over these by restored layer, nats.
    kl: Vec<f64>,
    seconds: f64,
}

/// Seconds between saves.
const SAVE_EVERY: Duration = Duration::from_secs(10);

/// Mean KL in nats per token by restored layer. Continues where an earlier run stopped, with the same result.
pub(super) fn scores(s: &Selection, run: &mut RunDir, progress: &dyn Progress) -> Result<(Vec<f64>, Outcome)> {
    const PART: &str = "select.restore-one-kl";
    let rows = s.train.sample(s.seed, s.best.tokens());
    let known = run.done(PART).cloned().and_then(|known| serde_json::from_value(known).ok());
    let mut part: Partial =
        known.unwrap_or_else(|| Partial { kl: vec![0.0; s.student.net.mixers.len()], ..Partial::default() });
    let tokens = rows.seq_len() as u64;
    progress.begin("select", rows.len() as u64 * tokens, part.done as u64 * tokens, "tokens");
    let mut saved_at = Instant::now();
    while part.done < rows.len() {
        let started = Instant::now();
        let indices: Vec<usize> = (part.done..rows.len()).take(s.micro_batch).collect();
        let batch = rows.batch(&indices, &s.student.decoder.device)?;
        let (kl, targets) = restored(s.student, s.teacher, &batch)?;
        part.kl.iter_mut().zip(&kl).for_each(|(sum, kl)| *sum += kl);
        part.targets += targets;
        part.done += indices.len();
        part.seconds += started.elapsed().as_secs_f64();
        let least = part.kl.iter().copied().fold(f64::INFINITY, f64::min) / part.targets.max(1.0);
        progress.advance(indices.len() as u64 * tokens, &format!("least KL {least:.4}"));
        let stop = stop_requested();
        if stop || saved_at.elapsed() >= SAVE_EVERY {
            run.mark_done(PART, &json!(part))?;
            saved_at = Instant::now();
        }
        if stop {
            let done = part.done;
            let message = format!(
                "stopped while layers were ranked, after {done} of {} sequences; progress is saved",
                rows.len()
            );
            return Err(Error::new(Kind::Interrupted, message).hint("the same command continues from here"));
        }
    }
    progress.end("");
    let scores = part.kl.iter().map(|kl| kl / part.targets.max(1.0)).collect();
    Ok((scores, Outcome { tokens: rows.len() as u64 * tokens, seconds: part.seconds, ..Outcome::default() }))
}

/// Sums of KL over the targets of a batch by restored layer, and how many targets counted. Teacher and student share the
/// frozen weights.
fn restored(student: Subject, teacher: Subject, batch: &Batch) -> Result<(Vec<f64>, f64)> {
    let decoder = student.decoder;
    let tables = decoder.tables(0, batch.inputs.dim(1)?)?;
    let wanted = decoder.hidden(&batch.inputs, teacher.net)?.flatten(0, 1)?; // [B T, N]
    let (tokens, mask) = (batch.targets.flatten_all()?, batch.mask.as_ref().map(Tensor::flatten_all).transpose()?);
    let (mixers, lora) = (&student.net.mixers, student.net.adapters.as_ref());
    let (head, teacher_head) = (decoder.head(lora)?, decoder.head(None)?);
    let target = Target {
        tokens: &tokens,
        mask: mask.as_ref(),
        teacher: Some(&wanted),
        teacher_head: Some(&teacher_head),
        ce_weight: 1.0,
        kl_weight: 1.0,
        kl: Kl::default(),
    };
    let above = |x: Tensor, from: usize| -> TensorResult<Tensor> {
        (from..mixers.len()).try_fold(x, |x, layer| {
            Ok(decoder.block(layer).forward(&x, mixers[layer].as_ref(), &tables, lora, None)?.detach())
        })
    };
    let (mut kl, mut targets) = (Vec::with_capacity(mixers.len()), 0.0);
    let mut x = decoder.embed(&batch.inputs, lora)?.detach(); // [B, T, N], below this layer all are converted
    for (layer, mixer) in mixers.iter().enumerate() {
        let block = decoder.block(layer);
        // A restored layer is the teacher's, without what the stages before changed in it.
        let heads = block.heads(&x, &tables, None, None)?;
        let softmax = block.finish(&x, &teacher.net.mixers[layer].forward(&heads)?, None, None)?.detach();
        let last = above(softmax, layer + 1)?;
        let sums = measure(&decoder.final_norm(&last, lora)?.flatten(0, 1)?, head.clone(), &target)?;
        kl.push(sums.kl);
        targets = sums.rows;
        if layer + 1 < mixers.len() {
            x = block.forward(&x, mixer.as_ref(), &tables, lora, None)?.detach();
        }
    }
    Ok((kl, targets))
}
