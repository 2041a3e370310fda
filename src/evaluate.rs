//! Measures of a model: perplexity, bits per byte, agreement with its teacher, exact recall.

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::data::tokenizer::Tokenizer;
use crate::data::{RecallItem, Split};
use crate::error::{Error, Kind, Result};
use crate::generate::{Sampler, generate};
use crate::model::{Decoder, Net};
use crate::ops::head_loss::{Sums, Target, measure};
use crate::progress::{Progress, stop_requested};
use crate::recipe::Kl;

/// Perplexity over the rows of a split, and the distance to a teacher where one was given.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    pub tokens: u64,
    /// exp of the mean negative log-likelihood per token.
    pub perplexity: f64,
    /// Negative log-likelihood in bits over the bytes of the text of the predicted tokens.
    pub bits_per_byte: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher_perplexity: Option<f64>,
    /// Mean KL(teacher || model) per token, nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    /// Share of positions where both find the same token most likely.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1_agreement: Option<f64>,
}

/// A model to measure: weights and what runs over them.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    pub decoder: &'a Decoder,
    pub net: &'a Net,
}

impl Subject<'_> {
    /// Normalised hidden states [B * T, N].
    fn hidden(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(self.decoder.hidden(ids, self.net)?.flatten(0, 1)?)
    }
}

/// Measures `model` on every row of `rows`. A teacher must share the output head's vocabulary.
pub fn quality(model: Subject, teacher: Option<Subject>, rows: &Split, progress: &dyn Progress) -> Result<Quality> {
    let device = &model.decoder.device;
    let (mut sums, mut bytes) = (Sums::default(), 0u64);
    let tokens = rows.seq_len() as u64;
    progress.begin("measure", rows.len() as u64 * tokens, 0, "tokens");
    for index in 0..rows.len() {
        if stop_requested() {
            return Err(Error::new(Kind::Interrupted, "stopped while the model was measured; progress is saved")
                .hint("the same command continues from here"));
        }
        let batch = rows.batch(&[index], device)?;
        let hidden = model.hidden(&batch.inputs)?;
        let mask = batch.mask.as_ref().map(|m| m.flatten_all()).transpose()?;
        let targets = batch.targets.flatten_all()?;
        let taught = teacher.map(|t| Ok::<_, crate::Error>((t, t.hidden(&batch.inputs)?))).transpose()?;
        let target = Target {
            tokens: &targets,
            mask: mask.as_ref(),
            teacher: None,
            ce_weight: 1.0,
            kl_weight: 1.0,
            kl: Kl::default(),
        };
        sums += match &taught {
            None => measure(&hidden, &model.decoder.head, &target)?,
            Some((t, other)) => {
                let target = Target { teacher: Some(other), ..target };
                crate::ops::head_loss::measure_between(&hidden, &model.decoder.head, &t.decoder.head, &target)?
            }
        };
        bytes += rows.text_bytes(index) as u64;
        let so_far = (sums.nll / sums.rows.max(1.0)).exp();
        progress.advance(tokens, &format!("perplexity {so_far:.4}"));
    }
    let n = sums.rows.max(1.0);
    let quality = Quality {
        tokens: sums.rows as u64,
        perplexity: (sums.nll / n).exp(),
        bits_per_byte: sums.nll / std::f64::consts::LN_2 / bytes.max(1) as f64,
        teacher_perplexity: teacher.map(|_| (sums.teacher_nll / n).exp()),
        kl: teacher.map(|_| sums.kl / n),
        top1_agreement: teacher.map(|_| sums.agree / n),
    };
    progress.end("");
    Ok(quality)
}

/// Exact answers by number of pairs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Recall {
    /// Pairs → (right, asked).
    pub by_pairs: BTreeMap<usize, (usize, usize)>,
}

impl Recall {
    /// Share of right answers over all prompts.
    pub fn total(&self) -> f64 {
        let (right, asked) = self.by_pairs.values().fold((0, 0), |(r, a), (right, asked)| (r + right, a + asked));
        right as f64 / asked.max(1) as f64
    }
}

/// Greedy answers to recall prompts; an answer counts when it equals the wanted one up to its stop text.
pub fn recall(model: Subject, tokenizer: &Tokenizer, items: &[RecallItem], progress: &dyn Progress) -> Result<Recall> {
    let mut recall = Recall::default();
    progress.begin("recall", items.len() as u64, 0, "prompts");
    for item in items {
        let wanted = format!("{}{}", item.answer, item.stop);
        let longest = tokenizer.encode(&wanted)?.len() + 4;
        let prompt = tokenizer.encode_prompt(&item.prompt)?;
        let mut answer = String::new();
        let mut text = tokenizer.stream(&prompt)?;
        generate(model, &prompt, &mut Sampler::greedy(), longest, tokenizer.stops(), |id| {
            answer.push_str(&text.push(id)?);
            Ok(!answer.contains(&item.stop) || item.stop.is_empty())
        })?;
        let given = answer.split(item.stop.as_str()).next().filter(|_| !item.stop.is_empty()).unwrap_or(&answer);
        let (right, asked) = recall.by_pairs.entry(item.pairs).or_default();
        *right += (given == item.answer) as usize;
        *asked += 1;
        progress.advance(1, &format!("{:.0} % right", 100.0 * recall.total()));
    }
    progress.end("");
    Ok(recall)
}

/// Share of the attention that each layer's linear part carries, mean over heads and positions, on one sequence [1, T]:
/// `None` for softmax layers.
pub fn linear_shares(model: Subject, ids: &Tensor) -> Result<Vec<Option<f64>>> {
    let tables = model.decoder.tables(0, ids.dim(1)?)?;
    let mut x = model.decoder.embed(ids)?;
    let mut shares = Vec::with_capacity(model.net.mixers.len());
    for (layer, mixer) in model.net.mixers.iter().enumerate() {
        let block = model.decoder.block(layer);
        let heads = block.heads(&x, &tables, model.net.adapters.as_ref(), None)?;
        if mixer.is_softmax() {
            shares.push(None);
            x = block.finish(&x, &mixer.forward(&heads)?, model.net.adapters.as_ref(), None)?.detach();
            continue;
        }
        let (y, weights) = mixer.parallel(&heads)?;
        let inside = match &weights.window {
            Some(window) => weights.all.broadcast_mul(window)?.sum_all()?,
            None => weights.all.sum_all()?,
        };
        let total = weights.all.sum_all()?;
        let scalar = |x: Tensor| x.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>();
        shares.push(Some(1.0 - scalar(inside)? / scalar(total)?));
        x = block.finish(&x, &y, model.net.adapters.as_ref(), None)?.detach();
    }
    Ok(shares)
}
