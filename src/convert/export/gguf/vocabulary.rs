//! `tokenizer.json` as the metadata that llama.cpp makes its tokenizer of.
//!
//! It has two that matter here: `gpt2`, byte-level BPE by merges, which splits text first by one of the patterns built into
//! it, and `llama`, SentencePiece's BPE by scores with bytes for what has no token.

use std::collections::BTreeMap;

use serde_json::Value as Json;

use super::file::Value;
use crate::checkpoint::Checkpoint;
use crate::data::Tokenizer;
use crate::data::tokenizer::optional_json;
use crate::error::{Error, Kind, Result};

/// Types of tokens.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const ADDED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// How GPT-2 splits text, which byte-level tokenizers do where nothing else is said.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const DIGIT: &str = r"\p{N}";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What text is split by, one after the other; whether a word that is a token is taken whole; what `tokenizer.ggml.pre`
/// calls it.
const SPLITS: [(&[&str], bool, &str); 7] = [
    (&[GPT2], false, "gpt-2"),
    (&[DIGIT, GPT2], false, "starcoder"),
    (&[LLAMA3], true, "llama-bpe"),
    (&[LLAMA3], false, "dbrx"),
    (&[QWEN2], false, "qwen2"),
    (&[TEKKEN], true, "tekken"),
    (&[GPT4O], false, "gpt-4o"),
];

/// The keys of a checkpoint's tokenizer for its `vocab` tokens; one that llama.cpp would not follow is refused.
pub fn metadata(checkpoint: &Checkpoint, vocab: usize) -> Result<Vec<(String, Value)>> {
    let dir = checkpoint.dir();
    let tokenizer = Tokenizer::open(dir)?;
    tokenizer.check_vocab(vocab)?;
    let path = dir.join("tokenizer.json");
    let bytes = std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
    let json: Json = serde_json::from_slice(&bytes)
        .map_err(|e| Error::new(Kind::Checkpoint, format!("`{}` is not JSON: {e}", path.display())))?;
    let refuse = |what: String| {
        Error::new(Kind::Usage, format!("llama.cpp has no tokenizer like `{}`: {what}", path.display()))
            .hint("`--to transformers` keeps the tokenizer as it is")
    };
    let model = &json["model"];
    if model["type"] != "BPE" {
        return Err(refuse(format!("its model is {}, not BPE", model["type"])));
    }
    let dressed = ["continuing_subword_prefix", "end_of_word_suffix"];
    if let Some(key) = dressed.into_iter().find(|key| model[*key].as_str().is_some_and(|text| !text.is_empty())) {
        return Err(refuse(format!("it has `{key}`")));
    }
    let pieces = model["byte_fallback"] == true;
    let merges = merges(model).ok_or_else(|| refuse("its merges are no pairs".into()))?;

    let mut all = Vec::new();
    let mut key = |name: &str, value: Value| all.push((format!("tokenizer.{name}"), value));
    if pieces {
        let spaces = spaces(&json).ok_or_else(|| refuse("it does not treat spaces as SentencePiece does".into()))?;
        key("ggml.model", Value::Text("llama".into()));
        key("ggml.pre", Value::Text("default".into()));
        key("ggml.add_space_prefix", Value::Bool(spaces));
    } else {
        let whole = model["ignore_merges"] == true;
        let splits = splits(&json).ok_or_else(|| refuse("it prepares text in a way of its own".into()))?;
        let found = SPLITS.iter().find(|(known, ignore, _)| *known == splits && *ignore == whole);
        let (.., name) = found.ok_or_else(|| refuse(format!("it splits text by {splits:?}")))?;
        key("ggml.model", Value::Text("gpt2".into()));
        key("ggml.pre", Value::Text((*name).into()));
    }

    let (tokens, types) = tokens(&json, vocab, pieces);
    if pieces {
        key("ggml.scores", Value::F32s(scores(&tokens, &merges)));
    } else {
        key("ggml.merges", Value::Texts(merges.iter().map(|(a, b)| format!("{a} {b}")).collect()));
    }
    let id = |text: &Json| tokens.iter().position(|token| Some(token.as_str()) == text.as_str()).map(|id| id as u32);
    let pad = &optional_json(&dir.join("tokenizer_config.json"))?["pad_token"];
    let pad_id = || u32::try_from(checkpoint.config.get("pad_token_id")?.as_u64()?).ok();
    let special = [
        ("ggml.bos_token_id", tokenizer.bos()),
        ("ggml.eos_token_id", tokenizer.eos()),
        ("ggml.unknown_token_id", id(&model["unk_token"])),
        ("ggml.padding_token_id", id(pad).or_else(|| id(&pad["content"])).or_else(pad_id)),
    ];
    key("ggml.tokens", Value::Texts(tokens));
    key("ggml.token_type", Value::I32s(types));
    for (name, id) in special {
        if let Some(id) = id {
            key(name, Value::U32(id));
        }
    }
    key("ggml.add_bos_token", Value::Bool(tokenizer.adds_bos()));
    key("ggml.add_eos_token", Value::Bool(tokenizer.adds_eos()));
    if let Some(template) = tokenizer.chat_template() {
        key("chat_template", Value::Text(template.source().into()));
    }
    Ok(all)
}

/// Pairs that are merged, in their order: lists, or texts with a space between as older files have them.
fn merges(model: &Json) -> Option<Vec<(&str, &str)>> {
    fn pair(merge: &Json) -> Option<(&str, &str)> {
        match merge {
            Json::String(text) => text.split_once(' '),
            both => Some((both[0].as_str()?, both[1].as_str()?)),
        }
    }
    model["merges"].as_array()?.iter().map(pair).collect()
}

/// Text and type of every id.
fn tokens(json: &Json, vocab: usize, pieces: bool) -> (Vec<String>, Vec<i32>) {
    let mut tokens: Vec<String> = (0..vocab).map(|id| format!("[PAD{id}]")).collect();
    let mut types = vec![UNUSED; vocab];
    let mut put = |id: &Json, text: &str, kind: i32| {
        if let Some(id) = id.as_u64().map(|id| id as usize).filter(|id| *id < vocab) {
            (tokens[id], types[id]) = (text.into(), kind);
        }
    };
    let model = &json["model"];
    for (text, id) in model["vocab"].as_object().into_iter().flatten() {
        let byte = pieces && text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
        put(id, text, if byte { BYTE } else { NORMAL });
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let text = added["content"].as_str().unwrap_or_default();
        let kind = match added["special"] == true {
            _ if model["unk_token"].as_str() == Some(text) => UNKNOWN,
            true => CONTROL,
            false => ADDED,
        };
        // What is no control token is compared with the text as it was written.
        let written = if pieces && kind == ADDED { text.replace('▁', " ") } else { text.into() };
        put(&added["id"], &written, kind);
    }
    (tokens, types)
}

/// Of two neighbours SentencePiece merges those whose piece has the largest score: the merge that comes first.
fn scores(tokens: &[String], merges: &[(&str, &str)]) -> Vec<f32> {
    let mut first = BTreeMap::new();
    for (rank, (a, b)) in merges.iter().enumerate() {
        first.entry(format!("{a}{b}")).or_insert(rank);
    }
    tokens.iter().map(|token| first.get(token).map_or(0.0, |rank| -(*rank as f32))).collect()
}

/// Whether a space is put before a text, where spaces become `▁` and nothing else happens to a text before BPE.
fn spaces(json: &Json) -> Option<bool> {
    let mut prefix = false;
    let mut replaced = false;
    for step in steps(&json["normalizer"], "normalizers") {
        match step["type"].as_str()? {
            "Prepend" if step["prepend"] == "▁" => prefix = true,
            "Replace" if step["pattern"]["String"] == " " && step["content"] == "▁" => replaced = true,
            _ => return None,
        }
    }
    for step in steps(&json["pre_tokenizer"], "pretokenizers") {
        match step["type"].as_str()? {
            "Metaspace" if step["replacement"] == "▁" && step["split"] != true => {
                (prefix, replaced) = (step["prepend_scheme"] != "never", true);
            }
            // No space is left to split at.
            "Split" if step["pattern"]["String"] == " " && replaced => {}
            _ => return None,
        }
    }
    replaced.then_some(prefix)
}

/// What a byte-level tokenizer splits text by.
fn splits(json: &Json) -> Option<Vec<&str>> {
    // llama.cpp does not compose characters; text is mostly composed already.
    if steps(&json["normalizer"], "normalizers").any(|step| step["type"] != "NFC") {
        return None;
    }
    let mut all = Vec::new();
    let mut bytes = false;
    for step in steps(&json["pre_tokenizer"], "pretokenizers") {
        match step["type"].as_str()? {
            "Split" => {
                let how = (step["behavior"].as_str()?, step["invert"] == true);
                let whole = matches!(how, ("Isolated", false) | ("Removed", true));
                all.push(step["pattern"]["Regex"].as_str().filter(|_| whole)?);
            }
            "Digits" if step["individual_digits"] == true => all.push(DIGIT),
            "ByteLevel" if step["add_prefix_space"] != true => {
                bytes = true;
                all.extend((step["use_regex"] != false).then_some(GPT2));
            }
            _ => return None,
        }
    }
    bytes.then_some(all)
}

/// The steps of a normalizer or pre-tokenizer: none, one, or those of a `Sequence` under the key `list`.
fn steps<'a>(whole: &'a Json, list: &str) -> impl Iterator<Item = &'a Json> {
    let one = if whole.is_null() { &[] } else { std::slice::from_ref(whole) };
    whole[list].as_array().map_or(one, Vec::as_slice).iter()
}
