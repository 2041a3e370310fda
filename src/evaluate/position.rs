//! Quality by position: what a model that forgets loses first is what lies far behind.

use serde::{Deserialize, Serialize};

use super::{Quality, Subject, measure_spans};
use crate::convert::plan::{Section, heads};
use crate::data::Split;
use crate::error::Result;
use crate::ops::head_loss::Sums;
use crate::plot::{Figure, Lines, Scale, Series};
use crate::progress::Progress;

/// Targets of the first bucket; each later bucket ends where twice as many lie behind it.
const FIRST: usize = 64;

/// Quality at the positions `from..=to` of every row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bucket {
    pub from: usize,
    pub to: usize,
    pub tokens: u64,
    /// exp of the mean negative log-likelihood per token.
    pub perplexity: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher_perplexity: Option<f64>,
    /// Mean KL(teacher || model) per token, nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    /// Share of positions where both find the same token most likely.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1_agreement: Option<f64>,
}

/// Quality in buckets of doubling length (0–63, 64–127, 128–255, …), and of all together.
///
/// Position p has p + 1 tokens of its row before it. A teacher must share the output head's vocabulary.
pub fn by_position(
    model: Subject,
    teacher: Option<Subject>,
    rows: &Split,
    progress: &dyn Progress,
) -> Result<(Quality, Vec<Bucket>)> {
    let bounds = bounds(rows.seq_len());
    let (sums, bytes) = measure_spans(model, teacher, rows, &bounds, progress)?;
    let bucket = |(span, sums): (&std::ops::Range<usize>, &Sums)| {
        let q = Quality::of(*sums, 0, teacher.is_some());
        Bucket {
            from: span.start,
            to: span.end - 1,
            tokens: q.tokens,
            perplexity: q.perplexity,
            teacher_perplexity: q.teacher_perplexity,
            kl: q.kl,
            top1_agreement: q.top1_agreement,
        }
    };
    let buckets = bounds.iter().zip(&sums).filter(|(_, sums)| sums.rows > 0.0).map(bucket).collect();
    let mut all = Sums::default();
    sums.into_iter().for_each(|s| all += s);
    Ok((Quality::of(all, bytes, teacher.is_some()), buckets))
}

/// `0..64`, `64..128`, `128..256`, …, the last cut at `seq_len`.
fn bounds(seq_len: usize) -> Vec<std::ops::Range<usize>> {
    let mut start = 0;
    let next = || {
        let span = start..(2 * start).max(FIRST).min(seq_len);
        start = span.end;
        (!span.is_empty()).then_some(span)
    };
    std::iter::from_fn(next).collect()
}

/// The buckets as a table.
pub fn section(buckets: &[Bucket]) -> Section {
    let mut columns = heads(["positions", "tokens", "perplexity"]);
    if buckets.iter().any(|b| b.teacher_perplexity.is_some()) {
        columns.extend(heads(["teacher", "to teacher", "KL to teacher", "same top token"]));
    }
    let row = |b: &Bucket| {
        let mut row = vec![format!("{}–{}", b.from, b.to), b.tokens.to_string(), format!("{:.4}", b.perplexity)];
        if let (Some(teacher), Some(kl), Some(same)) = (b.teacher_perplexity, b.kl, b.top1_agreement) {
            let ratio = format!("{:.3} ×", b.perplexity / teacher);
            row.extend([format!("{teacher:.4}"), ratio, format!("{kl:.4}"), format!("{:.1} %", 100.0 * same)]);
        }
        row
    };
    Section { title: "Perplexity by position", columns, rows: buckets.iter().map(row).collect() }
}

/// The buckets as curves, each point in the middle of its bucket.
pub fn figure(buckets: &[Bucket]) -> Figure {
    let curve = |name: &str, of: &dyn Fn(&Bucket) -> Option<f64>| {
        let middle = |b: &Bucket| (b.from + b.to + 1) as f64 / 2.0;
        Series::new(name, buckets.iter().filter_map(|b| Some((middle(b), of(b)?))).collect())
    };
    let mut series = vec![curve("model", &|b| Some(b.perplexity))];
    series.extend(Some(curve("teacher", &|b| b.teacher_perplexity)).filter(|s| !s.points.is_empty()));
    Lines { title: "Perplexity by position", x: ("position", Scale::Log), y: Scale::Log, series }.figure()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_double_and_cover_every_position() {
        assert_eq!(bounds(10).last(), Some(&(0..10)));
        assert_eq!(bounds(64).last(), Some(&(0..64)));
        assert_eq!(bounds(65), [0..64, 64..65]);
        assert_eq!(bounds(300), [0..64, 64..128, 128..256, 256..300]);
    }
}
