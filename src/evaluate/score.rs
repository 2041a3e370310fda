//! What a model gives to the tokens of given texts: the log-likelihood of each, and whether it was the most likely.

use std::ops::Range;

use candle_core::Tensor;

use super::Subject;
use crate::error::Result;
use crate::ops::head_loss::block_rows;
use crate::progress::Progress;

/// A text and the spans of it that are scored; no span holds token 0, which nothing precedes.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    pub ids: Vec<u32>,
    pub spans: Vec<Range<usize>>,
}

impl Asked {
    /// A text that is scored from token `start` to its end.
    pub fn end(ids: Vec<u32>, start: usize) -> Asked {
        let span = start..ids.len();
        Asked { ids, spans: vec![span] }
    }
}

/// The tokens of one span, given all before them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Log-likelihood of all its tokens together, nats.
    pub log_likelihood: f64,
    /// Every token was the most likely one: greedy decoding from the text before the span writes exactly this span,
    /// since each token it chooses leaves it before the next with the very text that is scored.
    pub greedy: bool,
}

/// Tokens of a batch, padding included.
fn batch_tokens(model: Subject) -> usize {
    if model.decoder.device.is_cpu() { 4096 } else { 32_768 }
}

/// Scores every span of every text, in batches of texts of near length; `progress` counts texts.
pub fn score(model: Subject, texts: &[Asked], progress: &dyn Progress) -> Result<Vec<Vec<Score>>> {
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by_key(|i| texts[*i].ids.len());
    let mut scores = vec![Vec::new(); texts.len()];
    let mut rest = order.as_slice();
    while !rest.is_empty() {
        let fits = |n: &usize| n * texts[rest[n - 1]].ids.len() <= batch_tokens(model);
        let count = (2..=rest.len()).take_while(fits).last().unwrap_or(1);
        let (batch, later) = rest.split_at(count);
        rest = later;
        let found = score_batch(model, &batch.iter().map(|i| &texts[*i]).collect::<Vec<_>>())?;
        batch.iter().zip(found).for_each(|(i, found)| scores[*i] = found);
        progress.advance(count as u64, "");
    }
    Ok(scores)
}

/// Shorter texts are padded behind their end, where no scored token looks.
fn score_batch(model: Subject, texts: &[&Asked]) -> Result<Vec<Vec<Score>>> {
    let device = &model.decoder.device;
    let width = texts.iter().map(|t| t.ids.len().saturating_sub(1)).max().unwrap_or(0);
    let inputs = texts.iter().flat_map(|t| {
        let (_, seen) = t.ids.split_last().unwrap_or((&0, &[]));
        seen.iter().copied().chain(std::iter::repeat_n(0, width - seen.len()))
    });
    let inputs = Tensor::from_vec(inputs.collect::<Vec<u32>>(), (texts.len(), width), device)?;
    let hidden = model.hidden(&inputs)?; // [B * T, N]

    let positions = |(row, text): (usize, &&Asked)| {
        let ids = text.ids.clone();
        text.spans.iter().cloned().flatten().map(move |p| ((row * width + p - 1) as u32, ids[p])).collect::<Vec<_>>()
    };
    let wanted: Vec<(u32, u32)> = texts.iter().enumerate().flat_map(positions).collect();
    let mut tokens = Vec::with_capacity(wanted.len());
    for block in wanted.chunks(block_rows(model.decoder.architecture.vocab, !device.is_cpu())) {
        let (rows, targets): (Vec<u32>, Vec<u32>) = block.iter().copied().unzip();
        let rows = Tensor::from_vec(rows, block.len(), device)?;
        let logits = model.decoder.logits(&hidden.index_select(&rows, 0)?, model.net)?; // [M, V]
        let best = logits.argmax(1)?.to_vec1::<u32>()?;
        let wanted = Tensor::from_vec(targets.clone(), (block.len(), 1), device)?;
        let log_p = (logits.gather(&wanted, 1)?.squeeze(1)? - logits.log_sum_exp(1)?)?.to_vec1::<f32>()?;
        let both = best.into_iter().zip(targets).zip(log_p);
        tokens.extend(both.map(|((best, target), log_p)| (log_p as f64, best == target)));
    }

    let mut tokens = tokens.into_iter();
    let mut sum = |span: &Range<usize>| {
        let all = Score { log_likelihood: 0.0, greedy: true };
        let add = |s: Score, (log_p, top)| Score { log_likelihood: s.log_likelihood + log_p, greedy: s.greedy && top };
        tokens.by_ref().take(span.len()).fold(all, add)
    };
    Ok(texts.iter().map(|text| text.spans.iter().map(&mut sum).collect()).collect())
}
