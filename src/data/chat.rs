//! Conversations as text: the chat template of a model folder, rendered as transformers renders it.
//!
//! A template is a Jinja program over `messages`. minijinja runs it with what transformers puts around one: blocks
//! trimmed, Python's methods of strings and dictionaries, `raise_exception`, `strftime_now`, a `tojson` that writes as
//! Python does, and `{% generation %}` around what the assistant wrote.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter};
use serde_json::{Map, Value, json};

use super::tokenizer::optional_json;
use crate::error::{Error, Kind, Result};

/// The role of the messages that a model learns to write.
pub const ASSISTANT: &str = "assistant";
/// Stand around the text of a `{% generation %}` block while it is rendered: characters that Unicode keeps from text.
const MARKS: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];

/// Messages, and the tools offered in them where a row names any.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Chat {
    /// Objects with a `role` and mostly a `content`.
    pub messages: Vec<Value>,
    /// `null` where there are none.
    pub tools: Value,
}

impl Chat {
    /// Appends a message.
    pub fn push(&mut self, role: &str, content: &str) {
        self.messages.push(json!({"role": role, "content": content}));
    }
}

/// A conversation as text.
#[derive(Debug, Clone, PartialEq)]
pub struct Rendered {
    pub text: String,
    /// The bytes the assistant wrote, ascending, the tokens that end its turns included.
    pub answers: Vec<Range<usize>>,
}

/// The chat template of a model.
pub struct ChatTemplate {
    file: PathBuf,
    source: String,
    /// `bos_token`, `eos_token` and the like, as templates read them.
    tokens: Map<String, Value>,
    /// What is wrong with the template; only those who use it need to know.
    environment: Result<Environment<'static>, String>,
}

impl ChatTemplate {
    const NAME: &str = "chat";

    /// The default template of the folder `dir`: `chat_template.jinja`, else that of `tokenizer_config.json`, one or
    /// several by name, else `chat_template.json`. `None` where there is none; a template with an error is refused by
    /// [`render`](Self::render) only.
    pub fn open(dir: &Path) -> Result<Option<Self>> {
        let settings = optional_json(&dir.join("tokenizer_config.json"))?;
        let path = dir.join("chat_template.jinja");
        let (file, template) = match fs::read_to_string(&path) {
            Ok(text) => (path, Value::String(text)),
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io("read", path, e)),
            Err(_) if !settings["chat_template"].is_null() => {
                (dir.join("tokenizer_config.json"), settings["chat_template"].clone())
            }
            Err(_) => {
                let path = dir.join("chat_template.json");
                let template = optional_json(&path)?["chat_template"].take();
                (path, template)
            }
        };
        let source = match template {
            Value::Null => return Ok(None),
            Value::String(text) => Ok(text),
            Value::Array(named) => named
                .iter()
                .find(|t| t["name"] == "default")
                .and_then(|t| t["template"].as_str())
                .map(String::from)
                .ok_or("none of its templates is named `default`"),
            _ => Err("`chat_template` is neither a text nor a list of named texts"),
        };
        let map = optional_json(&dir.join("special_tokens_map.json"))?;
        let mut tokens = Map::new();
        for (name, token) in [&map, &settings].into_iter().filter_map(Value::as_object).flatten() {
            if let (true, Some(text)) = (name.ends_with("_token"), token.as_str().or_else(|| token["content"].as_str()))
            {
                tokens.insert(name.clone(), text.into());
            }
        }
        let environment = source.as_ref().map_err(|e| e.to_string()).and_then(|source| environment(source));
        Ok(Some(ChatTemplate { file, source: source.unwrap_or_default(), tokens, environment }))
    }

    /// The template itself.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// What the text of a conversation depends on beside its messages.
    pub fn identity(&self) -> String {
        format!("{:?} {:?}", self.source, self.tokens)
    }

    /// The text of `chat`; `prompt` ends it with what begins the assistant's turn.
    ///
    /// Fails with the template's own words where it refuses the messages.
    pub fn render(&self, chat: &Chat, prompt: bool) -> Result<String> {
        Ok(self.marked(&chat.messages, &chat.tools, prompt)?.text)
    }

    /// The text of `chat` and which of it the assistant wrote.
    ///
    /// Where the template has no `{% generation %}`, a turn of the assistant is what follows the text of the messages
    /// before it. Fails where that text is not how the whole conversation begins.
    pub fn conversation(&self, chat: &Chat) -> Result<Rendered> {
        let Chat { messages, tools } = chat;
        let mut whole = self.marked(messages, tools, false)?;
        if replaced(&self.source).is_some() {
            return Ok(whole);
        }
        for (i, message) in messages.iter().enumerate().filter(|(_, m)| m["role"] == ASSISTANT) {
            let seen = whole.answers.last().map_or(0, |last| last.end);
            let answer = self.turn(&whole.text, &messages[..i], message, tools)?.filter(|turn| turn.start >= seen);
            whole.answers.push(answer.ok_or_else(|| {
                let message = format!(
                    "message {} cannot be told from what stands before it: the chat template of `{}` writes that \
                     otherwise when it stands alone",
                    i + 1,
                    self.file.display()
                );
                Error::new(Kind::Data, message).hint(
                    "put `{% generation %}` and `{% endgeneration %}` around the assistant's text in the template, or \
                     learn from all of it: `--set data.mask_prompt=false`",
                )
            })?);
        }
        Ok(whole)
    }

    /// Where the assistant's `message` stands in the text `whole` of a conversation that begins with `before`.
    fn turn(&self, whole: &str, before: &[Value], message: &Value, tools: &Value) -> Result<Option<Range<usize>>> {
        let prompt = self.marked(before, tools, true)?.text;
        let start = match whole.starts_with(&prompt) {
            true => prompt.len(),
            // The prompt may open what only the last turn has, such as a thought; the turn begins where they part.
            false if whole.starts_with(&self.marked(before, tools, false)?.text) => common(whole, &prompt),
            false => return Ok(None),
        };
        let until = |message: Value| self.marked(&[before, &[message]].concat(), tools, false);
        let text = until(message.clone())?.text;
        // Some templates end every text with EOS, whichever turn that leaves last.
        let eos = self.tokens.get("eos_token").and_then(Value::as_str).unwrap_or_default();
        let ends = [text.as_str(), text.strip_suffix(eos).unwrap_or(&text)];
        if let Some(text) = ends.into_iter().find(|text| text.len() >= start && whole.starts_with(*text)) {
            return Ok(Some(start..text.len()));
        }
        // The last turn may be written otherwise than those before it. How turns end, a made-up one shows.
        const WORD: &str = "margay";
        let made_up = until(json!({"role": ASSISTANT, "content": WORD}))?.text;
        let tail = made_up.rsplit_once(WORD).map_or("", |(_, tail)| tail);
        let at = whole[start..].find(tail).filter(|_| !tail.trim().is_empty());
        Ok(at.map(|at| start..start + at + tail.len()))
    }

    fn marked(&self, messages: &[Value], tools: &Value, prompt: bool) -> Result<Rendered> {
        let failed = |what: &dyn std::fmt::Display| {
            Error::new(Kind::Data, format!("the chat template of `{}`: {what}", self.file.display()))
        };
        let environment = self.environment.as_ref().map_err(|e| failed(e))?;
        let messages: Vec<Value> = messages.iter().map(tidied).collect();
        let variables = context! {
            messages => Serde(messages), tools => Serde(tools), documents => (), add_generation_prompt => prompt,
            ..Serde(&self.tokens)
        };
        let text = environment.get_template(Self::NAME).and_then(|t| t.render(variables)).map_err(|e| {
            // `raise_exception` speaks for itself.
            let line = e.line().filter(|_| e.kind() != ErrorKind::InvalidOperation);
            let line = line.map_or(String::new(), |line| format!(" (line {line})"));
            failed(&format!("{}{line}", e.detail().map_or_else(|| e.kind().to_string(), String::from)))
        })?;
        let mut rendered = Rendered { text: String::with_capacity(text.len()), answers: Vec::new() };
        let mut begun = None;
        for piece in text.split_inclusive(MARKS) {
            let at = rendered.text.len();
            rendered.text.push_str(piece.trim_end_matches(MARKS));
            match (piece.ends_with(MARKS[0]), piece.ends_with(MARKS[1]), begun) {
                (true, _, None) => begun = Some(rendered.text.len()),
                (_, true, Some(start)) => {
                    rendered.answers.push(start..rendered.text.len());
                    begun = None;
                }
                (false, false, _) => {}
                _ => return Err(failed(&format!("unpaired {} near byte {at}", MARKS[0].escape_unicode()))),
            }
        }
        Ok(rendered)
    }
}

/// A message without what is null; a thought under each of the names that templates read.
fn tidied(message: &Value) -> Value {
    let Value::Object(message) = message else { return message.clone() };
    let mut message: Map<_, _> = message.clone().into_iter().filter(|(_, value)| !value.is_null()).collect();
    if let Some(thought) = ["reasoning_content", "thinking", "reasoning"].iter().find_map(|k| message.get(*k)).cloned()
    {
        message.entry("thinking").or_insert_with(|| thought.clone());
        message.insert("reasoning_content".into(), thought);
    }
    Value::Object(message)
}

/// Bytes that two texts begin with alike, whole characters only.
fn common(a: &str, b: &str) -> usize {
    a.floor_char_boundary(a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count())
}

/// The compiled template and all it may call.
fn environment(source: &str) -> Result<Environment<'static>, String> {
    let refused = |message: String| minijinja::Error::new(ErrorKind::InvalidOperation, message);
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|e| e.to_string())?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    // Python cannot iterate over none, which templates use to ask for tools.
    environment.add_test("iterable", |value: &minijinja::Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_filter("generation", |text: &str| format!("{}{text}{}", MARKS[0], MARKS[1]));
    environment.add_function("raise_exception", move |message: String| -> Result<(), _> { Err(refused(message)) });
    environment.add_function("strftime_now", move |format: &str| {
        let mut text = String::new();
        write!(text, "{}", chrono::Local::now().format(format))
            .map_err(|_| refused(format!("`{format}` is no date format")))?;
        Ok::<_, minijinja::Error>(text)
    });
    let source = replaced(source).unwrap_or_else(|| source.into());
    match environment.add_template_owned(ChatTemplate::NAME, source) {
        Ok(()) => Ok(environment),
        Err(e) => Err(e.to_string()),
    }
}

/// The template with its `{% generation %}` blocks as filters, which see the rendered text; `None` where it has none.
fn replaced(source: &str) -> Option<String> {
    let (mut text, mut rest, mut found) = (String::with_capacity(source.len()), source, false);
    while let Some(at) = rest.find("{%") {
        let (before, block) = rest.split_at(at + 2);
        text.push_str(before);
        rest = block;
        let Some(end) = block.find("%}") else { break };
        let filter = match block[..end].trim_matches(['-', '+', ' ', '\t', '\r', '\n']) {
            "generation" => "filter generation",
            "endgeneration" => "endfilter",
            _ => continue,
        };
        let sign =
            |at_edge: Option<char>| at_edge.filter(|c| ['-', '+'].contains(c)).map_or(String::new(), String::from);
        let (open, close) = (sign(block.chars().next()), sign(block[..end].chars().next_back()));
        _ = write!(text, "{open} {filter} {close}");
        (rest, found) = (&block[end..], true);
    }
    text.push_str(rest);
    found.then_some(text)
}

/// Python's `json.dumps`, characters beyond ASCII as they are unless `ensure_ascii` is given.
fn tojson(value: &minijinja::Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let (indent, ascii) = (options.get::<Option<usize>>("indent")?, options.get::<Option<bool>>("ensure_ascii")?);
    options.assert_all_used()?;
    let mut bytes = Vec::new();
    let indent = indent.map(|n| " ".repeat(n));
    let written = match &indent {
        Some(indent) => {
            let pretty = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, pretty))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, Spaced)),
    };
    let failed = |e: &dyn std::fmt::Display| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    written.map_err(|e| failed(&e))?;
    let text = String::from_utf8(bytes).map_err(|e| failed(&e))?;
    if ascii != Some(true) {
        return Ok(text);
    }
    let mut escaped = String::with_capacity(text.len());
    for unit in text.encode_utf16() {
        match u8::try_from(unit).ok().filter(u8::is_ascii) {
            Some(byte) => escaped.push(byte.into()),
            None => _ = write!(escaped, "\\u{unit:04x}"),
        }
    }
    Ok(escaped)
}

/// JSON on one line with a space behind each comma and colon, as Python writes it.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}
