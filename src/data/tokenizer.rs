//! `tokenizer.json` of a model folder: text to ids and back, and which tokens begin and end a document.

use std::fs;
use std::path::Path;

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::chat::ChatTemplate;
use super::hex;
use crate::error::{Error, Kind, Result};
use crate::recipe::{self, Join};

/// A model's tokenizer with what its configuration files say about special tokens.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// What the tokenizer puts before a prompt, usually BOS or nothing.
    lead: Vec<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    stops: Vec<u32>,
    /// `add_bos_token` of `tokenizer_config.json` is true.
    configured_bos: bool,
    adds_eos: bool,
    chat: Option<ChatTemplate>,
    largest_id: u32,
    digest: String,
}

/// The tokens put around documents; `None` puts nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Joins {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
}

impl Tokenizer {
    /// Opens the tokenizer of the model folder `dir`.
    ///
    /// BOS and EOS come from `tokenizer_config.json`, then `special_tokens_map.json`, then `config.json`, then from what
    /// the tokenizer itself puts around a text. Fails where `tokenizer.json` is missing or broken.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        if !path.exists() {
            let hint = match dir.join("tokenizer.model").exists() {
                true => {
                    "only `tokenizer.model` is there; save the tokenizer once with Hugging Face transformers \
                         (`AutoTokenizer.from_pretrained(...).save_pretrained(...)`), which writes `tokenizer.json`"
                }
                false => "copy `tokenizer.json` of the model into this folder",
            };
            return Err(Error::new(Kind::Checkpoint, format!("`{}` has no `tokenizer.json`", dir.display())).hint(hint));
        }
        let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        let broken = |e| Error::new(Kind::Checkpoint, format!("`{}` is no tokenizer: {e}", path.display()));
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(broken)?;
        inner.with_padding(None).with_truncation(None).map_err(broken)?;

        let [settings, map, config, generation] =
            ["tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json"]
                .map(|name| optional_json(&dir.join(name)));
        let (settings, map, config, generation) = (settings?, map?, config?, generation?);
        let special = |key: &str| {
            let named = [&settings, &map].into_iter().find_map(|file| {
                let token = &file[key];
                inner.token_to_id(token.as_str().or_else(|| token["content"].as_str())?)
            });
            named.or_else(|| ids(&config[format!("{key}_id")]).first().copied())
        };

        // What the tokenizer itself puts around a text.
        let encode = |specials| inner.encode("a", specials).map(|e| e.get_ids().to_vec()).map_err(broken);
        let (dressed, plain) = (encode(true)?, encode(false)?);
        let start = dressed.windows(plain.len().max(1)).position(|w| w == plain).unwrap_or(0);
        let tail = dressed.get(start + plain.len()..).unwrap_or(&[]);
        let mut lead = dressed[..start].to_vec();

        let bos = special("bos_token").or(lead.first().copied());
        let eos = special("eos_token").or(tail.last().copied());
        let adds_eos = settings["add_eos_token"].as_bool().unwrap_or(eos.is_some_and(|eos| tail.contains(&eos)));
        let configured_bos = settings["add_bos_token"].as_bool();
        if let (Some(bos), Some(wanted)) = (bos, configured_bos) {
            lead.retain(|id| *id != bos);
            lead.splice(0..0, wanted.then_some(bos));
        }

        let mut stops: Vec<u32> = eos.into_iter().collect();
        stops.extend(ids(&generation["eos_token_id"]).into_iter().chain(ids(&config["eos_token_id"])));
        stops.sort_unstable();
        stops.dedup();
        let largest_id = inner.get_vocab(true).into_values().max().unwrap_or(0);
        let digest = hex(&Sha256::digest(&bytes));
        let configured_bos = configured_bos == Some(true);
        let chat = ChatTemplate::open(dir)?;
        Ok(Tokenizer { inner, lead, bos, eos, stops, configured_bos, adds_eos, chat, largest_id, digest })
    }

    /// The token that begins a text, where there is one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text, where there is one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether the tokenizer ends a text with EOS itself.
    pub fn adds_eos(&self) -> bool {
        self.adds_eos
    }

    /// Every token at which generation stops, ascending: EOS and those that `config.json` and `generation_config.json`
    /// list.
    pub fn stops(&self) -> &[u32] {
        &self.stops
    }

    /// The chat template of the model's folder, where there is one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat.as_ref()
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// sha256 of `tokenizer.json`, hexadecimal.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The largest id this tokenizer can give.
    pub fn largest_id(&self) -> u32 {
        self.largest_id
    }

    /// Refuses a tokenizer whose ids do not all have a row in the embedding of a model of `model_vocab` tokens.
    pub fn check_vocab(&self, model_vocab: usize) -> Result<()> {
        if (self.largest_id as usize) < model_vocab {
            return Ok(());
        }
        let token = self.inner.id_to_token(self.largest_id).unwrap_or_default();
        let message = format!(
            "vocabulary mismatch: `tokenizer.json` has ids up to {} (`{token}`), but `vocab_size` of the model is {model_vocab}",
            self.largest_id
        );
        Err(Error::new(Kind::Checkpoint, message).hint("use the `tokenizer.json` that belongs to this checkpoint"))
    }

    /// The ids of `text` alone, nothing put around it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.inner.encode_fast(text, false).map(|e| e.get_ids().to_vec()).map_err(failed)
    }

    /// The ids of `text` as the start of a prompt: with BOS where the tokenizer puts one; an EOS is never appended.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        Ok([self.lead.as_slice(), &self.encode(text)?].concat())
    }

    /// The ids of `text` alone, each with the offset in bytes at which the token ends in the text.
    pub fn encode_with_ends(&self, text: &str) -> Result<Vec<(u32, usize)>> {
        let encoding = self.inner.encode(text, false).map_err(failed)?;
        let ends = encoding.get_offsets().iter().map(|(_, end)| *end);
        Ok(encoding.get_ids().iter().copied().zip(ends).collect())
    }

    /// For each text its ids, each with the offset in bytes at which the token ends in the text; in parallel.
    pub(super) fn encode_batch(&self, texts: Vec<&str>) -> Result<Vec<tokenizers::Encoding>> {
        self.inner.encode_batch(texts, false).map_err(failed)
    }

    /// What the tokenizer puts before a prompt, usually BOS or nothing.
    pub fn lead(&self) -> &[u32] {
        &self.lead
    }

    /// The ordinary tokens that stand for a text of their own, ascending, each with that text: no special or added
    /// token, no piece of a character, none that the tokenizer would not itself write for its text.
    pub fn words(&self) -> Result<Vec<(u32, String)>> {
        let added = self.inner.get_added_tokens_decoder();
        let mut words = Vec::new();
        for id in (0..=self.largest_id).filter(|id| !added.contains_key(id)) {
            let text = self.decode(&[id])?;
            if !text.is_empty() && !text.contains(char::REPLACEMENT_CHARACTER) {
                words.push((id, text));
            }
        }
        let again = self.encode_batch(words.iter().map(|(_, text)| text.as_str()).collect())?;
        let same = |((id, text), encoded): ((u32, String), tokenizers::Encoding)| {
            (encoded.get_ids() == [id]).then_some((id, text))
        };
        Ok(words.into_iter().zip(again).filter_map(same).collect())
    }

    /// The text of `ids` without special tokens; bytes that are not UTF-8 become `U+FFFD`.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(failed)
    }

    /// A decoder for ids that arrive one by one after `prompt`.
    pub fn stream(&self, prompt: &[u32]) -> Result<Stream<'_>> {
        let prefix = self.decode(prompt)?;
        Ok(Stream { tokenizer: self, ids: prompt.to_vec(), settled: prompt.len(), prefix })
    }

    /// The tokens around a plain document.
    ///
    /// `auto` follows the tokenizer: BOS where it puts one itself and either `add_bos_token` says so or there is no EOS;
    /// EOS where it puts one itself or where no BOS separates the documents.
    pub fn joins(&self, settings: &recipe::Data) -> Result<Joins> {
        let auto_bos = self.adds_bos() && (self.configured_bos || self.eos.is_none());
        let bos = self.join("bos", settings.bos, self.bos, auto_bos)?;
        let eos = self.join("eos", settings.eos, self.eos, self.adds_eos || bos.is_none())?;
        Ok(Joins { bos, eos })
    }

    /// The tokens around an Alpaca example: BOS before the prompt where the tokenizer puts one, EOS after the answer.
    pub fn alpaca_joins(&self, settings: &recipe::Data) -> Result<Joins> {
        let bos = self.join("bos", settings.bos, self.bos, self.adds_bos())?;
        Ok(Joins { bos, eos: self.join("eos", settings.eos, self.eos, true)? })
    }

    /// The tokens around a conversation: none, its template writes them.
    pub fn chat_joins(&self, settings: &recipe::Data) -> Result<Joins> {
        let bos = self.join("bos", settings.bos, self.bos, false)?;
        Ok(Joins { bos, eos: self.join("eos", settings.eos, self.eos, false)? })
    }

    /// Whether the tokenizer begins a text with BOS itself.
    pub fn adds_bos(&self) -> bool {
        self.bos.is_some_and(|bos| self.lead.contains(&bos))
    }

    fn join(&self, key: &str, wanted: Join, token: Option<u32>, auto: bool) -> Result<Option<u32>> {
        match (wanted, token) {
            (Join::Always, None) => Err(Error::new(
                Kind::Data,
                format!("`data.{key}` is `always`, but the tokenizer names no {}", key.to_uppercase()),
            )
            .hint(format!("name `{key}_token` in `tokenizer_config.json`, or set `data.{key}` to `never`"))),
            (Join::Always, token) => Ok(token),
            (Join::Never, _) => Ok(None),
            (Join::Auto, token) => Ok(token.filter(|_| auto)),
        }
    }
}

/// Turns ids into text as they arrive, only ever whole characters.
///
/// A token is decoded beside the ones before it, because decoders treat the first token of a text differently and one
/// character may take several tokens.
pub struct Stream<'a> {
    tokenizer: &'a Tokenizer,
    /// The last emitted stretch, then tokens not emitted yet.
    ids: Vec<u32>,
    /// How many of `ids` have been emitted, and their text.
    settled: usize,
    prefix: String,
}

impl Stream<'_> {
    /// No character takes this many tokens: what is still no text then will never be.
    const PENDING: usize = 16;

    /// Takes the next id and returns the text that is complete with it, possibly empty.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids)?;
        let pending = self.ids.len() - self.settled;
        if text.ends_with(char::REPLACEMENT_CHARACTER) && pending < Self::PENDING {
            return Ok(String::new());
        }
        self.settle(&text)
    }

    /// What is left at the end; an unfinished character comes as `U+FFFD`.
    pub fn finish(mut self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids)?;
        self.settle(&text)
    }

    fn settle(&mut self, text: &str) -> Result<String> {
        let pending = self.ids.split_off(self.settled);
        let alone = self.tokenizer.decode(&pending)?;
        // Invalid bytes can change how earlier ones decode; then the pending tokens stand for themselves.
        let new = text.strip_prefix(&self.prefix).map_or_else(|| alone.clone(), String::from);
        (self.settled, self.ids, self.prefix) = (pending.len(), pending, alone);
        Ok(new)
    }
}

fn failed(e: tokenizers::Error) -> Error {
    Error::new(Kind::Data, format!("the tokenizer failed: {e}"))
}

/// A JSON file that may be missing (`null` then).
pub(crate) fn optional_json(path: &Path) -> Result<Value> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|e| Error::new(Kind::Checkpoint, format!("`{}` is not JSON: {e}", path.display()))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(e) => Err(Error::io("read", path, e)),
    }
}

/// One id or a list of ids.
fn ids(value: &Value) -> Vec<u32> {
    let one = std::slice::from_ref(value);
    value.as_array().map_or(one, Vec::as_slice).iter().filter_map(|v| u32::try_from(v.as_u64()?).ok()).collect()
}
