//! `margay generate`: text to stdout as it comes.

use std::io::Read;

use clap::Args;
use margay::convert::load::Model;
use margay::convert::plan::bytes;
use margay::data::Tokenizer;
use margay::error::{Error, Kind, Result};
use margay::evaluate::Subject;
use margay::generate::{Sampler, generate};
use margay::progress::Progress;

use super::DeviceArg;
use super::output::Output;

#[derive(Args)]
pub struct Generate {
    /// A local Hugging Face folder, converted or not, or a hub id `org/name[@revision]`
    #[arg(value_name = "MODEL")]
    model: String,
    /// The text to continue; - reads it from stdin
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 200)]
    max_tokens: usize,
    /// Randomness: 0 always takes the most likely token
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = temperature)]
    temperature: f64,
    /// Draw only from the most likely tokens that together reach this probability
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = probability)]
    top_p: f64,
    /// Seed of the draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Go on after the token that ends a text
    #[arg(long)]
    ignore_eos: bool,
    #[command(flatten)]
    device: DeviceArg,
}

fn temperature(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|x: &f64| x.is_finite() && *x >= 0.0).ok_or_else(|| "not a number from 0 on".into())
}

fn probability(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|x: &f64| *x > 0.0 && *x <= 1.0).ok_or_else(|| "not above 0 and at most 1".into())
}

impl Generate {
    pub fn run(&self, out: &Output) -> Result<()> {
        let device = self.device.open()?;
        let model = Model::open(&self.model, out)?;
        let tokenizer = Tokenizer::open(model.checkpoint.dir())?;
        tokenizer.check_vocab(model.architecture().vocab)?;
        let prompt = tokenizer.encode_prompt(&self.text()?)?;
        if prompt.is_empty() {
            let error = Error::new(Kind::Usage, "the prompt is empty, and the tokenizer has no BOS to begin with");
            return Err(error.hint("give a text with `--prompt`"));
        }
        let (decoder, net) = (model.decoder(&device, out)?, model.net(&device)?);
        let mut sampler = Sampler::new(self.temperature, self.top_p, self.seed);
        let stops = if self.ignore_eos { &[] } else { tokenizer.stops() };
        let mut text = tokenizer.stream(&prompt)?;
        let subject = Subject { decoder: &decoder, net: &net };
        let done = generate(subject, &prompt, &mut sampler, self.max_tokens, stops, |id| {
            out.data(&text.push(id)?)?;
            Ok(!out.closed())
        })?;
        out.data(&format!("{}\n", text.finish()?))?;
        let rate = |tokens: usize, seconds: f64| tokens as f64 / seconds.max(1e-9);
        out.say(&format!(
            "prompt: {} tokens, {:.0} tokens/s; generated: {} tokens, {:.0} tokens/s; state: {}",
            prompt.len(),
            rate(prompt.len(), done.prefill_seconds),
            done.tokens,
            rate(done.tokens, done.decode_seconds),
            bytes(done.state_bytes as u64),
        ));
        Ok(())
    }

    fn text(&self) -> Result<String> {
        if self.prompt != "-" {
            return Ok(self.prompt.clone());
        }
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map_err(|e| Error::io("read the prompt from", "stdin", e))?;
        Ok(text)
    }
}
