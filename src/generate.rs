//! Recurrent decoding: one token at a time from the state of each layer, greedy or sampled.

use candle_core::Tensor;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::Result;
use crate::evaluate::Subject;
use crate::model::Steps;

/// How the next token is chosen.
pub struct Sampler {
    /// 0 is greedy.
    pub temperature: f64,
    /// Only the most likely tokens that together reach this probability are drawn from.
    pub top_p: f64,
    rng: ChaCha8Rng,
}

impl Sampler {
    pub fn new(temperature: f64, top_p: f64, seed: u64) -> Self {
        Sampler { temperature, top_p, rng: ChaCha8Rng::seed_from_u64(seed) }
    }

    pub fn greedy() -> Self {
        Sampler::new(0.0, 1.0, 0)
    }

    pub fn is_greedy(&self) -> bool {
        self.temperature <= 0.0
    }

    /// Chooses from logits `[V]`.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        let best = |a: &(usize, f32), b: &(usize, f32)| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0));
        let (top, largest) = logits.iter().copied().enumerate().max_by(best).unwrap_or((0, 0.0));
        if self.is_greedy() {
            return top as u32;
        }
        let weight = |z: f32| ((z - largest) as f64 / self.temperature).exp();
        let mut tokens: Vec<(usize, f64)> = logits.iter().map(|z| weight(*z)).enumerate().collect();
        let mut total: f64 = tokens.iter().map(|t| t.1).sum();
        if self.top_p < 1.0 {
            tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let mut mass = 0.0;
            let kept = tokens.iter().position(|t| {
                mass += t.1;
                mass >= self.top_p * total
            });
            tokens.truncate(kept.map_or(tokens.len(), |k| k + 1));
            total = tokens.iter().map(|t| t.1).sum();
        }
        let mut draw = self.rng.random::<f64>() * total;
        for (token, w) in &tokens {
            draw -= w;
            if draw <= 0.0 {
                return *token as u32;
            }
        }
        top as u32
    }
}

/// What a generation did.
#[derive(Debug, Clone, Copy)]
pub struct Generated {
    pub tokens: usize,
    pub prefill_seconds: f64,
    pub decode_seconds: f64,
    /// Bytes of state at the end, all layers.
    pub state_bytes: usize,
}

/// Continues `prompt` by at most `most` tokens. `each` gets every new token and says whether to go on; a token of
/// `stops` ends the text and is not handed out.
pub fn generate(
    model: Subject,
    prompt: &[u32],
    sampler: &mut Sampler,
    most: usize,
    stops: &[u32],
    each: impl FnMut(u32) -> Result<bool>,
) -> Result<Generated> {
    Continuation::new(model, most).generate(prompt, sampler, most, stops, each)
}

/// A text that is continued more than once: all that was read and written is kept as the state of each layer.
pub struct Continuation<'a> {
    model: Subject<'a>,
    room: usize,
    steps: Option<Steps<'a>>,
    /// The last token handed out, where the state has not seen it.
    unread: Option<u32>,
}

impl<'a> Continuation<'a> {
    /// An empty text. Where decoding works in fixed memory, that holds `room` tokens behind the first prompt.
    pub fn new(model: Subject<'a>, room: usize) -> Self {
        Continuation { model, room, steps: None, unread: None }
    }

    /// Whether `tokens` more fit behind what was read; [`generate`](Self::generate) fails where its prompt and its tokens do not.
    pub fn fits(&self, tokens: usize) -> bool {
        let room = self.steps.as_ref().and_then(Steps::room);
        room.is_none_or(|room| tokens + self.unread.iter().len() <= room)
    }

    /// Reads `prompt`, which must hold a token, behind all that came before and goes on as [`generate`] does.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        sampler: &mut Sampler,
        most: usize,
        stops: &[u32],
        mut each: impl FnMut(u32) -> Result<bool>,
    ) -> Result<Generated> {
        let Subject { decoder, net } = self.model;
        let started = std::time::Instant::now();
        let (logits, steps) = match &mut self.steps {
            Some(steps) => {
                steps.feed(&[self.unread.as_slice(), prompt].concat())?;
                (steps.logits()?, steps)
            }
            none => {
                let mut states = net.states();
                let ids = Tensor::new(prompt, &decoder.device)?.unsqueeze(0)?;
                let hidden = decoder.extend(&ids, net, &mut states)?;
                let last = hidden.narrow(1, hidden.dim(1)? - 1, 1)?.flatten(0, 1)?.contiguous()?;
                let logits = decoder.logits(&last, net)?;
                (logits, none.insert(Steps::new(decoder, net, states, 1, self.room)))
            }
        };
        self.unread = None;
        let mut token = sampler.choose(&logits.squeeze(0)?.to_vec1()?);
        let prefill_seconds = started.elapsed().as_secs_f64();
        let started = std::time::Instant::now();
        let mut tokens = 0;
        while tokens < most {
            if stops.contains(&token) {
                break;
            }
            tokens += 1;
            self.unread = Some(token);
            if !each(token)? || tokens == most {
                break;
            }
            steps.step(&[token])?;
            self.unread = None;
            token = match sampler.is_greedy() {
                true => steps.greedy()?[0],
                false => sampler.choose(&steps.logits()?.squeeze(0)?.to_vec1()?),
            };
        }
        let decode_seconds = started.elapsed().as_secs_f64();
        Ok(Generated { tokens, prefill_seconds, decode_seconds, state_bytes: steps.state_bytes() })
    }
}
