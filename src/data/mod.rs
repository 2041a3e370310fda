//! Text to packed token rows.
//!
//! ```text
//! sources → documents → tokens (BOS/EOS between them) → rows of row_len + 1 tokens → train / validation
//! ```
//!
//! [`sources`] finds the files and reads documents, [`chat`] writes conversations as the model's template does,
//! [`tokenizer`] turns text into ids, a memory-mapped cache keeps those.
//! A [`Corpus`] cuts the token stream into rows and splits the rows by a seeded shuffle; a [`Split`] hands out
//! sequences, whole rows or equal pieces of them. Order and batches depend on seed and position alone, so that a
//! resumed run sees exactly the data an uninterrupted one would.

mod cache;
pub mod chat;
mod choice;
mod formats;
mod recall;
pub mod sources;
pub mod tokenizer;

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};

pub use chat::{Chat, ChatTemplate};
pub use choice::{ChoiceItem, read_choices};
pub use formats::alpaca_prompt;
pub use recall::{RecallItem, read_recall};
pub use tokenizer::Tokenizer;

use crate::error::{Error, Kind, Result};
use crate::progress::Progress;
use crate::recipe;
use cache::{Counts, Tokens};

/// The packed rows of a set of sources, split into training and validation.
pub struct Corpus {
    tokens: Arc<Tokens>,
    /// What the validation rows are of: the same tokens, or those of a text of their own.
    held_out: Arc<Tokens>,
    row_len: usize,
    /// First token of each row.
    train: Vec<usize>,
    valid: Vec<usize>,
    digest: String,
}

impl Corpus {
    /// Tokenises `sources` (or finds them in `cache_dir`), cuts the tokens into rows of `row_len + 1` without overlap
    /// and holds back a share of `settings.validation` of the rows, at least one and never all. Where `settings.held_out`
    /// names a text, its rows are for validation and all rows of `sources` for training.
    ///
    /// The remainder after the last whole row is dropped, and so are rows whose targets are all masked. The split
    /// depends on `settings.seed`, or `seed` where that is not set. Fails, with the counts, where either side has no row.
    pub fn prepare(
        sources: &[String],
        settings: &recipe::Data,
        seed: u64,
        tokenizer: &Tokenizer,
        row_len: usize,
        cache_dir: &Path,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let open = |sources: &[String]| -> Result<(Arc<Tokens>, Vec<usize>)> {
            let files = sources::resolve(sources, progress)?;
            let tokens = Tokens::open(&files, settings, tokenizer, cache_dir, progress)?;
            let rows = starts(&tokens, row_len)?;
            Ok((Arc::new(tokens), rows))
        };
        let seed = settings.seed.unwrap_or(seed);
        let shuffled = |rows: &[usize]| -> Vec<usize> {
            permutation(rows.len(), seed, 0).into_iter().map(|i| rows[i as usize]).collect()
        };
        let (tokens, rows) = open(sources)?;
        let (held_out, valid, train, identity) = if settings.held_out.is_empty() {
            if rows.len() < 2 {
                return Err(too_little(
                    sources,
                    &tokens.counts,
                    2 * (row_len + 1),
                    "one training and one validation row",
                ));
            }
            let held_back = ((rows.len() as f64 * settings.validation).round() as usize).clamp(1, rows.len() - 1);
            let mut valid = shuffled(&rows);
            let mut train = valid.split_off(held_back);
            train.sort_unstable();
            (tokens.clone(), valid, train, format!("{} {row_len} {seed} {held_back}", tokens.key))
        } else {
            let (held_out, held_rows) = open(&settings.held_out)?;
            for (sources, tokens, rows) in [(sources, &tokens, &rows), (&settings.held_out, &held_out, &held_rows)] {
                if rows.is_empty() {
                    return Err(too_little(sources, &tokens.counts, row_len + 1, "one row"));
                }
            }
            let identity = format!("{} {row_len} {seed} {}", tokens.key, held_out.key);
            (held_out, shuffled(&held_rows), rows, identity)
        };
        let digest = hex(&Sha256::digest(identity));
        Ok(Corpus { tokens, held_out, row_len, train, valid, digest })
    }

    /// The training rows in sequences of `seq_len` targets; a row gives `row_len / seq_len` of them.
    pub fn train(&self, seq_len: usize) -> Result<Split> {
        self.split(&self.tokens, &self.train, seq_len)
    }

    /// The validation rows in sequences of `seq_len` targets, in shuffled order: the first few are a fair sample.
    pub fn valid(&self, seq_len: usize) -> Result<Split> {
        self.split(&self.held_out, &self.valid, seq_len)
    }

    /// Tokens of all training sources, those between documents included.
    pub fn tokens(&self) -> u64 {
        self.tokens.counts.tokens
    }

    /// Documents of all training sources.
    pub fn documents(&self) -> u64 {
        self.tokens.counts.documents
    }

    /// Bytes of text a token stands for, on average over what the validation rows are of.
    pub fn bytes_per_token(&self) -> f64 {
        self.held_out.counts.bytes as f64 / self.held_out.counts.tokens.max(1) as f64
    }

    /// Identifies rows and split: the same digest means the same sequences.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    fn split(&self, tokens: &Arc<Tokens>, rows: &[usize], seq_len: usize) -> Result<Split> {
        if seq_len == 0 || seq_len > self.row_len {
            let message = format!("`seq_len` is {seq_len}, but the rows hold 1 to {} tokens", self.row_len);
            return Err(Error::new(Kind::Data, message));
        }
        let pieces = |row: usize| (0..self.row_len / seq_len).map(move |k| row + k * seq_len);
        Ok(Split::new(tokens.clone(), rows.iter().copied().flat_map(pieces).collect(), seq_len))
    }
}

/// All rows of `sources` in order, nothing held back, for evaluation: `seq_len + 1` tokens each, without overlap.
///
/// The remainder after the last whole row is dropped. Fails, with the counts, where there is not one row.
pub fn eval_rows(
    sources: &[String],
    settings: &recipe::Data,
    tokenizer: &Tokenizer,
    seq_len: usize,
    cache_dir: &Path,
    progress: &dyn Progress,
) -> Result<Split> {
    let files = sources::resolve(sources, progress)?;
    let tokens = Tokens::open(&files, settings, tokenizer, cache_dir, progress)?;
    let rows = starts(&tokens, seq_len)?;
    match rows.is_empty() {
        true => Err(too_little(sources, &tokens.counts, seq_len + 1, "one row")),
        false => Ok(Split::new(Arc::new(tokens), rows, seq_len)),
    }
}

/// Sequences of equal length.
#[derive(Clone)]
pub struct Split {
    tokens: Arc<Tokens>,
    /// First token of each sequence.
    starts: Vec<usize>,
    seq_len: usize,
}

/// One sequence: targets are `ids[1..]`, inputs `ids[..seq_len]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    /// `seq_len + 1` ids.
    pub ids: Vec<u32>,
    /// For each target whether the loss counts it; `None` counts all.
    pub mask: Option<Vec<bool>>,
}

/// Sequences side by side.
pub struct Batch {
    /// `[batch, seq_len]`, u32.
    pub inputs: Tensor,
    /// `[batch, seq_len]`, u32: the inputs one position on.
    pub targets: Tensor,
    /// `[batch, seq_len]`, f32: 1 where the loss counts the target; `None` counts all.
    pub mask: Option<Tensor>,
}

impl Split {
    /// Sequences without a single counted target are left out.
    fn new(tokens: Arc<Tokens>, mut starts: Vec<usize>, seq_len: usize) -> Self {
        starts.retain(|start| counted(&tokens, *start, seq_len));
        Split { tokens, starts, seq_len }
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// Targets of a sequence.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// The first sequences, as many as hold at most `tokens` targets, at least one.
    pub fn limit(mut self, tokens: usize) -> Self {
        self.starts.truncate((tokens / self.seq_len).max(1));
        self
    }

    /// Sequences at random, as many as hold at most `tokens` targets, at least one; `seed` alone decides which.
    pub fn sample(&self, seed: u64, tokens: u64) -> Self {
        let count = ((tokens / self.seq_len as u64) as usize).max(1);
        let starts = self.order(seed, 0).into_iter().take(count).map(|i| self.starts[i as usize]).collect();
        Split { starts, ..self.clone() }
    }

    /// Fails, with the counts, where there are fewer than `sequences`: too little for one batch.
    pub fn require(&self, sequences: usize) -> Result<()> {
        if self.len() >= sequences {
            return Ok(());
        }
        let Counts { documents, tokens, .. } = self.tokens.counts;
        let message = format!(
            "too little text: a batch needs {sequences} sequences of {0} tokens, the training split has {1} \
             ({documents} documents, {tokens} tokens in all)",
            self.seq_len,
            self.len()
        );
        Err(Error::new(Kind::Data, message).hint("give more text, or lower `batch` or `seq_len` of the stage"))
    }

    /// Sequence `index`; panics past [`len`](Self::len).
    pub fn sequence(&self, index: usize) -> Sequence {
        let mut ids = Vec::with_capacity(self.seq_len + 1);
        let mut mask = Vec::with_capacity(self.seq_len + 1);
        for token in self.span(index) {
            ids.push(token.id());
            mask.push(!token.masked());
        }
        let mask = (self.tokens.counts.masked > 0).then(|| mask.split_off(1));
        Sequence { ids, mask }
    }

    /// Bytes of the text behind the counted targets of sequence `index`, for bits per byte.
    pub fn text_bytes(&self, index: usize) -> usize {
        self.span(index).skip(1).filter(|t| !t.masked()).map(|t| t.bytes()).sum()
    }

    /// The sequences `indices` side by side on `device`; panics past [`len`](Self::len).
    pub fn batch(&self, indices: &[usize], device: &Device) -> Result<Batch> {
        let shape = (indices.len(), self.seq_len);
        let (mut inputs, mut targets, mut mask) = (Vec::new(), Vec::new(), Vec::new());
        for &index in indices {
            let sequence = self.sequence(index);
            inputs.extend_from_slice(&sequence.ids[..self.seq_len]);
            targets.extend_from_slice(&sequence.ids[1..]);
            mask.extend(sequence.mask.into_iter().flatten().map(|counted| f32::from(u8::from(counted))));
        }
        let mask = if mask.is_empty() { None } else { Some(Tensor::from_vec(mask, shape, device)?) };
        let (inputs, targets) = (Tensor::from_vec(inputs, shape, device)?, Tensor::from_vec(targets, shape, device)?);
        Ok(Batch { inputs, targets, mask })
    }

    /// The order of the sequences in `epoch`: a permutation that depends on `seed` and `epoch` alone.
    pub fn order(&self, seed: u64, epoch: u64) -> Vec<u32> {
        permutation(self.len(), seed, 1 + epoch)
    }

    /// Sequences `start..start + count` of the endless run through epoch after epoch, each in its own [`order`].
    ///
    /// Training step `n` of `batch` sequences is `draw(seed, n * batch, batch)`. Empty where the split is.
    ///
    /// [`order`]: Self::order
    pub fn draw(&self, seed: u64, start: u64, count: usize) -> Vec<usize> {
        let Some(len) = std::num::NonZeroU64::new(self.len() as u64) else { return Vec::new() };
        let end = start + count as u64;
        let mut drawn = Vec::with_capacity(count);
        for epoch in start / len..end.div_ceil(len.get()) {
            let (first, past) = (start.max(epoch * len.get()), end.min((epoch + 1) * len.get()));
            let order = self.order(seed, epoch);
            drawn.extend((first..past).map(|i| order[(i % len) as usize] as usize));
        }
        drawn
    }

    fn span(&self, index: usize) -> impl Iterator<Item = cache::Token> + '_ {
        let start = self.starts[index];
        self.tokens.slice(start..start + self.seq_len + 1)
    }
}

/// First tokens of the rows of `row_len + 1` tokens that have a target to learn.
fn starts(tokens: &Tokens, row_len: usize) -> Result<Vec<usize>> {
    if row_len == 0 {
        return Err(Error::new(Kind::Data, "`seq_len` must be at least 1"));
    }
    let rows = (0..tokens.counts.tokens as usize / (row_len + 1)).map(|i| i * (row_len + 1));
    Ok(rows.filter(|start| counted(tokens, *start, row_len)).collect())
}

/// Whether the loss counts any target of the sequence at `start`.
fn counted(tokens: &Tokens, start: usize, seq_len: usize) -> bool {
    tokens.counts.masked == 0 || tokens.slice(start + 1..start + seq_len + 1).any(|t| !t.masked())
}

fn too_little(sources: &[String], counts: &Counts, needed: usize, what: &str) -> Error {
    let names: Vec<_> = sources.iter().map(|s| format!("`{s}`")).collect();
    let message = format!(
        "too little text: {} gave {} documents, {} tokens ({} of them to learn from); {what} needs {needed}",
        names.join(", "),
        counts.documents,
        counts.tokens,
        counts.tokens - counts.masked,
    );
    Error::new(Kind::Data, message).hint("give more text or lower `seq_len`")
}

/// A permutation of `0..n` by Fisher and Yates. Written out because the library's shuffle may change between versions.
fn permutation(n: usize, seed: u64, stream: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    let mut order: Vec<u32> = (0..n as u32).collect();
    for i in (1..n).rev() {
        let j = (rng.next_u64() as u128 * (i as u128 + 1)) >> 64;
        order.swap(i, j as usize);
    }
    order
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
