//! Measures of a model: perplexity, bits per byte, agreement with its teacher, and what perplexity hides.
//!
//! | where | what |
//! |---|---|
//! | here | quality on a text, answers to recall prompts of a file, share of the linear part |
//! | [`position`] | quality by position: does the model still use what lies far behind |
//! | [`recall`](mod@recall) | the generated recall suite, its prompts in `prompts` |
//! | [`choice`] | multiple choice by log-likelihood |
//! | [`score`](mod@score) | what a model gives to tokens of given texts, in batches |

pub mod choice;
pub mod position;
mod prompts;
pub mod recall;
pub mod score;

pub mod diagnose;

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::data::tokenizer::Tokenizer;
use crate::data::{RecallItem, Split};
use crate::error::{Error, Kind, Result};
use crate::generate::{Sampler, generate};
use crate::model::{Decoder, Net};
use crate::ops::head_loss::{Head, Sums, Target, measure};
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

    fn head(&self) -> Result<Head> {
        Ok(self.decoder.head(self.net.adapters.as_ref())?)
    }
}

/// Measures `model` on every row of `rows`. A teacher must share the output head's vocabulary.
pub fn quality(model: Subject, teacher: Option<Subject>, rows: &Split, progress: &dyn Progress) -> Result<Quality> {
    let whole = 0..rows.seq_len();
    let (sums, bytes) = measure_spans(model, teacher, rows, std::slice::from_ref(&whole), progress)?;
    Ok(Quality::of(sums[0], bytes, teacher.is_some()))
}

impl Quality {
    /// `bytes` of text behind the tokens that `sums` counts.
    fn of(sums: Sums, bytes: u64, taught: bool) -> Quality {
        let n = sums.rows.max(1.0);
        Quality {
            tokens: sums.rows as u64,
            perplexity: (sums.nll / n).exp(),
            bits_per_byte: sums.nll / std::f64::consts::LN_2 / bytes.max(1) as f64,
            teacher_perplexity: taught.then(|| (sums.teacher_nll / n).exp()),
            kl: taught.then(|| sums.kl / n),
            top1_agreement: taught.then(|| sums.agree / n),
        }
    }
}

/// Sums over all rows for each of `spans` of target positions, and the bytes of text behind all targets.
fn measure_spans(
    model: Subject,
    teacher: Option<Subject>,
    rows: &Split,
    spans: &[Range<usize>],
    progress: &dyn Progress,
) -> Result<(Vec<Sums>, u64)> {
    let device = &model.decoder.device;
    let (mut sums, mut bytes) = (vec![Sums::default(); spans.len()], 0u64);
    let tokens = rows.seq_len() as u64;
    let (head, teacher_head) = (model.head()?, teacher.map(|t| t.head()).transpose()?);
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
        let taught = teacher.map(|t| t.hidden(&batch.inputs)).transpose()?;
        for (span, sums) in spans.iter().zip(&mut sums) {
            let part = |x: &Tensor| x.narrow(0, span.start, span.len());
            let (hidden, targets, mask) = (part(&hidden)?, part(&targets)?, mask.as_ref().map(part).transpose()?);
            let taught = taught.as_ref().map(part).transpose()?;
            let target = Target {
                tokens: &targets,
                mask: mask.as_ref(),
                teacher: taught.as_ref(),
                teacher_head: teacher_head.as_ref(),
                ce_weight: 1.0,
                kl_weight: 1.0,
                kl: Kl::default(),
            };
            *sums += measure(&hidden, head.clone(), &target)?;
        }
        bytes += rows.text_bytes(index) as u64;
        let (nll, n) = sums.iter().fold((0.0, 0.0), |(nll, n), s| (nll + s.nll, n + s.rows));
        progress.advance(tokens, &format!("perplexity {:.4}", (nll / n.max(1.0)).exp()));
    }
    progress.end("");
    Ok((sums, bytes))
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
