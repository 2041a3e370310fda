//! `margay generate`: text to stdout as it comes, one or a conversation.

use std::io::Read;

use clap::Args;
use margay::convert::load::Model;
use margay::convert::plan::bytes;
use margay::data::{ChatTemplate, Tokenizer};
use margay::error::{Error, Kind, Result};
use margay::evaluate::Subject;
use margay::generate::{Continuation, Generated, Sampler};
use margay::progress::Progress;

use super::DeviceArg;
use super::chat::Conversation;
use super::output::Output;

#[derive(Args)]
pub struct Generate {
    /// A local Hugging Face folder, converted or not, or a hub id `org/name[@revision]`
    #[arg(value_name = "MODEL")]
    model: String,
    /// The text to continue; - reads it from stdin
    #[arg(long, value_name = "TEXT", required_unless_present = "chat")]
    prompt: Option<String>,
    /// Answer by the model's chat template: the prompt, or without one each line of stdin as a turn
    #[arg(long)]
    chat: bool,
    /// What the conversation begins with
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
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
        let text = self.prompt.as_deref().map(text).transpose()?;
        let template = self.chat.then(|| template(&tokenizer)).transpose()?;
        let prompt = match (&text, template) {
            (Some(text), None) => tokenizer.encode_prompt(text)?,
            _ => Vec::new(),
        };
        if prompt.is_empty() && template.is_none() {
            let error = Error::new(Kind::Usage, "the prompt is empty, and the tokenizer has no BOS to begin with");
            return Err(error.hint("give a text with `--prompt`"));
        }
        let (decoder, net) = (model.decoder(&device, out)?, model.net(&device)?);
        let model = Subject { decoder: &decoder, net: &net };
        let mut writer = Writer {
            tokenizer: &tokenizer,
            sampler: Sampler::new(self.temperature, self.top_p, self.seed),
            most: self.max_tokens,
            stops: if self.ignore_eos { &[] } else { tokenizer.stops() },
        };
        let (read, done) = match template {
            None => (prompt.len(), writer.write(&mut Continuation::new(model, self.max_tokens), &prompt, out)?.1),
            Some(template) => {
                let mut conversation = Conversation::new(model, template, writer, self.system.as_deref());
                match text {
                    Some(text) => conversation.turn(&text, out)?,
                    None => return conversation.lines(out),
                }
            }
        };
        let rate = |tokens: usize, seconds: f64| tokens as f64 / seconds.max(1e-9);
        out.say(&format!(
            "prompt: {read} tokens, {:.0} tokens/s; generated: {} tokens, {:.0} tokens/s; state: {}",
            rate(read, done.prefill_seconds),
            done.tokens,
            rate(done.tokens, done.decode_seconds),
            bytes(done.state_bytes as u64),
        ));
        Ok(())
    }
}

/// The prompt as given, or stdin to its end.
fn text(prompt: &str) -> Result<String> {
    if prompt != "-" {
        return Ok(prompt.into());
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).map_err(|e| Error::io("read the prompt from", "stdin", e))?;
    Ok(text)
}

fn template(tokenizer: &Tokenizer) -> Result<&ChatTemplate> {
    tokenizer.chat_template().ok_or_else(|| {
        Error::new(Kind::Checkpoint, "the model has no chat template, so `--chat` cannot ask it").hint(
            "take an instruct model, put the `chat_template.jinja` that fits into its folder, or leave out `--chat`",
        )
    })
}

/// Writes what a model goes on with to stdout.
pub struct Writer<'a> {
    pub tokenizer: &'a Tokenizer,
    pub sampler: Sampler,
    /// Tokens at most, each time.
    pub most: usize,
    pub stops: &'a [u32],
}

impl Writer<'_> {
    /// Lets `continuation` read `prompt` and go on; the text it wrote.
    pub fn write(
        &mut self,
        continuation: &mut Continuation,
        prompt: &[u32],
        out: &Output,
    ) -> Result<(String, Generated)> {
        let (mut stream, mut text) = (self.tokenizer.stream(prompt)?, String::new());
        let done = continuation.generate(prompt, &mut self.sampler, self.most, self.stops, |id| {
            let piece = stream.push(id)?;
            out.data(&piece)?;
            text.push_str(&piece);
            Ok(!out.closed())
        })?;
        let rest = stream.finish()?;
        out.data(&format!("{rest}\n"))?;
        Ok((text + &rest, done))
    }
}
