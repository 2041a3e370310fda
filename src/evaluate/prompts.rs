//! Prompts of the recall suite, made for any tokenizer: the same seed gives the same prompts.
//!
//! What asks for a value is a table in plain text, of invented words, so that no model can know the answer:
//!
//! ```text
//! Names:
//! lozu -> reheke
//! poje -> vesu
//! The river runs down to the sea.
//! Ask:
//! poje -> vesu
//! ```
//!
//! What is to be repeated are random words of the vocabulary, and no special token among them.
//!
//! Each prompt has its own random stream, named by its task, place in the grid and number, so that a prompt does not
//! depend on which others are made.

use std::collections::HashSet;
use std::ops::Range;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::recall::Task;
use super::score::Asked;
use crate::data::Tokenizer;
use crate::error::{Error, Kind, Result};

/// Queries of one associative-recall prompt, at most.
const QUERIES: usize = 8;
/// Tokens of a copy or of a span that occurs again which are given as the cue.
const CUE: usize = 4;
/// Fewest words of letters to draw from; below, any ordinary token will do.
const WORDS: usize = 256;
const HAYSTACK: [&str; 4] = [
    "The river runs down to the sea.\n",
    "A small wind moves the leaves.\n",
    "There is snow on the far hills.\n",
    "The road goes on and on.\n",
];

/// Makes prompts.
pub struct Prompts<'a> {
    tokenizer: &'a Tokenizer,
    seed: u64,
    /// Ordinary tokens, words of letters where there are enough of them.
    words: Vec<u32>,
    line_end: Vec<u32>,
    /// Tokens of a line of the haystack, on average.
    hay: f64,
}

impl<'a> Prompts<'a> {
    /// Fails where the tokenizer has too few ordinary tokens to tell keys apart.
    pub fn new(tokenizer: &'a Tokenizer, seed: u64) -> Result<Self> {
        let all = tokenizer.words()?;
        let letters = |text: &str| text.chars().count() > 2 && text.trim_start().chars().all(char::is_alphabetic);
        let ids = |wanted: &dyn Fn(&str) -> bool| -> Vec<u32> {
            all.iter().filter(|(_, text)| wanted(text)).map(|(id, _)| *id).collect()
        };
        let mut words = ids(&letters);
        if words.len() < WORDS {
            words = ids(&|text| !text.trim().is_empty());
        }
        if words.len() < 64 {
            let message = format!("`tokenizer.json` has {} ordinary tokens, too few for random prompts", words.len());
            return Err(Error::new(Kind::Data, message).hint("give prompts of your own with `--recall FILE`"));
        }
        let hay = tokenizer.encode(&HAYSTACK.concat())?.len() as f64 / HAYSTACK.len() as f64;
        Ok(Prompts { tokenizer, seed, words, line_end: tokenizer.encode("\n")?, hay })
    }

    /// Prompt `number` of a cell of the grid, at most `limit` tokens with its answers; `None` where it cannot be that
    /// short or needs more different tokens than there are.
    pub fn make(&self, task: Task, row: usize, column: usize, number: u64, limit: usize) -> Result<Option<Asked>> {
        if column > limit {
            return Ok(None); // a length or a distance: no need to make the text
        }
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream((task as u64) << 60 | (row as u64) << 36 | (column as u64) << 12 | number);
        let made = match task {
            Task::Associative => self.associative(row, column, &mut rng)?,
            Task::Passkey => self.passkey(row, column, &mut rng)?,
            Task::Copy => self.copy(row, column, &mut rng),
            Task::Induction => self.induction(row, column, &mut rng),
        };
        Ok(made.filter(|asked| asked.ids.len() <= limit))
    }

    /// `pairs` lines of key and value, lines of other text of near `distance` tokens, and up to [`QUERIES`] of the keys
    /// again, in another order: multi-query associative recall. Every value asked for is an answer, its line end included.
    fn associative(&self, pairs: usize, distance: usize, rng: &mut ChaCha8Rng) -> Result<Option<Asked>> {
        let words = invented(2 * pairs, rng);
        let (keys, values) = words.split_at(pairs);
        let mut text = Text::begin();
        (0..pairs).for_each(|i| text.pair(&keys[i], &values[i], false));
        text.filler((distance as f64 / self.hay).round() as usize);
        text.0 += "Ask:\n";
        below_distinct(pairs, pairs.min(QUERIES), rng).into_iter().for_each(|i| text.pair(&keys[i], &values[i], true));
        text.encode(self.tokenizer).map(Some)
    }

    /// One pair `depth` per cent into lines of other text, asked for at the end of at most `length` tokens.
    fn passkey(&self, depth: usize, length: usize, rng: &mut ChaCha8Rng) -> Result<Option<Asked>> {
        let value = invented(1, rng).remove(0);
        let of = |lines: usize| {
            let mut text = Text::begin();
            let before = lines * depth / 100;
            text.filler(before);
            text.pair("passkey", &value, false);
            text.filler(lines - before);
            text.0 += "Ask:\n";
            text.pair("passkey", &value, true);
            text.encode(self.tokenizer)
        };
        let bare = of(0)?.ids.len();
        let Some(room) = length.checked_sub(bare) else { return Ok(None) };
        let mut lines = (room as f64 / self.hay).ceil() as usize;
        let mut asked = of(lines)?;
        while asked.ids.len() > length {
            lines -= 1;
            asked = of(lines)?;
        }
        Ok(Some(asked))
    }

    /// A line of `length` random tokens, `distance` others, and the line again: all of it after its cue is the answer.
    fn copy(&self, length: usize, distance: usize, rng: &mut ChaCha8Rng) -> Option<Asked> {
        let line = self.distinct(length, rng)?;
        let mut prompt = Prompt::after(self.tokenizer.lead());
        prompt.push(&self.line_end);
        prompt.push(&line);
        prompt.push(&self.line_end);
        self.filler(&mut prompt, distance, &line, rng);
        prompt.push(&line[..CUE]);
        prompt.answer(&line[CUE..]);
        Some(prompt.0)
    }

    /// `length` random tokens, of which [`CUE`] stand `depth` per cent into the text and again at its end: the token that
    /// followed them is the answer.
    fn induction(&self, depth: usize, length: usize, rng: &mut ChaCha8Rng) -> Option<Asked> {
        let span = self.distinct(CUE + 1, rng)?;
        let lead = self.tokenizer.lead();
        let room = length.checked_sub(lead.len() + 2 * span.len())?;
        let before = room * depth / 100;
        let mut prompt = Prompt::after(lead);
        let mut random = |prompt: &mut Prompt, n: usize| {
            (0..n).for_each(|_| prompt.push(&[self.other_than(&span, rng)]));
        };
        random(&mut prompt, before);
        prompt.push(&span);
        random(&mut prompt, room - before);
        prompt.push(&span[..CUE]);
        prompt.answer(&span[CUE..]);
        Some(prompt.0)
    }

    /// `n` different words; `None` where that would use more than half of them.
    fn distinct(&self, n: usize, rng: &mut ChaCha8Rng) -> Option<Vec<u32>> {
        (2 * n <= self.words.len())
            .then(|| below_distinct(self.words.len(), n, rng).into_iter().map(|i| self.words[i]).collect())
    }

    fn other_than(&self, taken: &[u32], rng: &mut ChaCha8Rng) -> u32 {
        loop {
            let word = self.words[below(self.words.len(), rng)];
            if !taken.contains(&word) {
                return word;
            }
        }
    }

    /// A line of `n` random words, none of `taken`.
    fn filler(&self, prompt: &mut Prompt, n: usize, taken: &[u32], rng: &mut ChaCha8Rng) {
        (0..n).for_each(|_| prompt.push(&[self.other_than(taken, rng)]));
        if n > 0 {
            prompt.push(&self.line_end);
        }
    }
}

/// A prompt in text, and the bytes of its answers.
struct Text(String, Vec<Range<usize>>);

impl Text {
    fn begin() -> Self {
        Text("Names:\n".into(), Vec::new())
    }

    fn filler(&mut self, lines: usize) {
        HAYSTACK.iter().cycle().take(lines).for_each(|line| self.0 += line);
    }

    fn pair(&mut self, key: &str, value: &str, asked: bool) {
        self.0 += &format!("{key} ->");
        let start = self.0.len();
        self.0 += &format!(" {value}\n");
        if asked {
            self.1.push(start..self.0.len());
        }
    }

    /// The whole text in tokens; an answer has those that end in it.
    fn encode(self, tokenizer: &Tokenizer) -> Result<Asked> {
        let lead = tokenizer.lead();
        let (ids, ends): (Vec<u32>, Vec<usize>) = tokenizer.encode_with_ends(&self.0)?.into_iter().unzip();
        let token = |byte: usize| lead.len() + ends.partition_point(|end| *end <= byte);
        let spans = self.1.iter().map(|bytes| token(bytes.start)..token(bytes.end)).collect();
        Ok(Asked { ids: [lead, &ids].concat(), spans })
    }
}

/// A prompt of tokens as it grows.
struct Prompt(Asked);

impl Prompt {
    fn after(lead: &[u32]) -> Self {
        Prompt(Asked { ids: lead.to_vec(), spans: Vec::new() })
    }

    fn push(&mut self, ids: &[u32]) {
        self.0.ids.extend_from_slice(ids);
    }

    fn answer(&mut self, ids: &[u32]) {
        let start = self.0.ids.len();
        self.push(ids);
        self.0.spans.push(start..self.0.ids.len());
    }
}

/// A number below `n`. Written out because a library's may change between versions, and with it every prompt.
fn below(n: usize, rng: &mut ChaCha8Rng) -> usize {
    ((rng.next_u64() as u128 * n as u128) >> 64) as usize
}

/// `count` different numbers below `n`.
fn below_distinct(n: usize, count: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let mut seen = HashSet::new();
    std::iter::repeat_with(|| below(n, rng)).filter(|i| seen.insert(*i)).take(count).collect()
}

/// `count` different words of two or three syllables that no language has a meaning for.
fn invented(count: usize, rng: &mut ChaCha8Rng) -> Vec<String> {
    let (consonants, vowels) = (b"bcdfghjklmnprstvz", b"aeiou");
    let mut seen = HashSet::new();
    let word = || {
        let letters = (0..2 + below(2, rng))
            .flat_map(|_| [consonants[below(consonants.len(), rng)], vowels[below(vowels.len(), rng)]].map(char::from));
        letters.collect::<String>()
    };
    std::iter::repeat_with(word).filter(|w| seen.insert(w.clone())).take(count).collect()
}
