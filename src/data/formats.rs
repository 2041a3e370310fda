//! The file formats text is read from, the Alpaca prompt, and the two ways conversations are kept.

use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;
use serde_json::{Map, Value};

use super::chat::{ASSISTANT, Chat};
use super::sources::open;
use crate::error::{Error, Kind, Result, closest};
use crate::recipe::{self, Format};

/// File endings with a known format.
pub const EXTENSIONS: &[&str] = &[".txt", ".md", ".jsonl", ".json", ".parquet"];

/// One text of a source.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    pub content: Content,
    pub origin: Origin,
    /// Bytes of the file this document took up, for progress.
    pub size: u64,
}

/// What a row holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    Text(String),
    /// An Alpaca row: the prompt is the template filled in.
    Answer {
        prompt: String,
        answer: String,
    },
    Chat(Chat),
}

/// Where a document came from; displays as `` `file` line 3 ``.
#[derive(Debug, Clone, PartialEq)]
pub struct Origin {
    pub file: Arc<Path>,
    /// `line` or `row` with its number from 1; `None` for the whole file.
    pub position: Option<(&'static str, usize)>,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`", self.file.display())?;
        self.position.map_or(Ok(()), |(unit, number)| write!(f, " {unit} {number}"))
    }
}

type Documents<'a> = Box<dyn Iterator<Item = Result<Document>> + 'a>;

/// The documents of one file, by its ending.
pub(super) fn read<'a>(path: &Path, settings: &'a recipe::Data) -> Result<Documents<'a>> {
    let name = path.to_string_lossy();
    let ending = EXTENSIONS.iter().find(|e| name.ends_with(**e)).copied();
    match ending {
        Some(".jsonl") => json_lines(path, settings),
        Some(".json") => json(path, settings),
        Some(".parquet") => parquet(path, settings),
        Some(_) if matches!(settings.format, Format::Auto | Format::Text) => text(path),
        None if settings.format == Format::Text => text(path),
        Some(_) => {
            let format = if settings.format == Format::Chat { "chat" } else { "alpaca" };
            Err(Error::new(Kind::Data, format!("`{name}` is plain text, but `data.format` is `{format}`"))
                .hint("such rows come from .jsonl, .json and .parquet"))
        }
        None => Err(Error::new(Kind::Data, format!("`{name}` has no known format")).hint(format!(
            "known formats: {}; to read it as plain text: `--set data.format=text`",
            EXTENSIONS.join(", ")
        ))),
    }
}

/// A whole file as UTF-8 text, without a byte order mark.
fn read_text(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let line = 1 + e.as_bytes()[..at].iter().filter(|b| **b == b'\n').count();
        not_utf8(path, at as u64, line)
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

fn not_utf8(path: &Path, offset: u64, line: usize) -> Error {
    let message = format!("`{}` is not UTF-8 text: bad byte at offset {offset} (line {line})", path.display());
    Error::new(Kind::Data, message).hint("convert it first, for example `iconv -f latin1 -t utf8`")
}

fn text<'a>(path: &Path) -> Result<Documents<'a>> {
    let text = read_text(path)?;
    let origin = Origin { file: path.into(), position: None };
    let size = text.len() as u64;
    let document = (!text.is_empty()).then_some(Document { content: Content::Text(text), origin, size });
    Ok(Box::new(document.map(Ok).into_iter()))
}

fn json_lines<'a>(path: &Path, settings: &'a recipe::Data) -> Result<Documents<'a>> {
    let file: Arc<Path> = path.into();
    let mut reader = BufReader::new(open(path)?);
    let (mut offset, mut number, mut line) = (0u64, 0, Vec::new());
    let mut next = move || -> Result<Option<Document>> {
        loop {
            offset += line.len() as u64;
            line.clear();
            number += 1;
            if reader.read_until(b'\n', &mut line).map_err(|e| Error::io("read", &file, e))? == 0 {
                return Ok(None);
            }
            let text = str::from_utf8(&line).map_err(|e| not_utf8(&file, offset + e.valid_up_to() as u64, number))?;
            let text = text.trim_start_matches('\u{feff}').trim();
            if text.is_empty() {
                continue;
            }
            let origin = Origin { file: file.clone(), position: Some(("line", number)) };
            let row = serde_json::from_str(text).map_err(|e| {
                let what = e.to_string();
                let what = what.split(" at line ").next().unwrap_or(&what);
                Error::new(Kind::Data, format!("{origin} column {} is not JSON: {what}", e.column()))
                    .hint("each line of a .jsonl file holds one JSON object")
            })?;
            if let Some(document) = document(row, origin, line.len() as u64, settings)? {
                return Ok(Some(document));
            }
        }
    };
    Ok(Box::new(std::iter::from_fn(move || next().transpose())))
}

/// An array of rows; a file that does not begin with `[` is read as JSON lines.
fn json<'a>(path: &Path, settings: &'a recipe::Data) -> Result<Documents<'a>> {
    let text = read_text(path)?;
    if !text.trim_start().starts_with('[') {
        return json_lines(path, settings);
    }
    let rows: Vec<Value> = serde_json::from_str(&text)
        .map_err(|e| Error::new(Kind::Data, format!("`{}` is not a JSON array: {e}", path.display())))?;
    let (file, size) = (Arc::<Path>::from(path), (text.len() / rows.len().max(1)) as u64);
    let read = move |(i, row)| {
        let origin = Origin { file: file.clone(), position: Some(("row", i + 1)) };
        document(row, origin, size, settings).transpose()
    };
    Ok(Box::new(rows.into_iter().enumerate().filter_map(read)))
}

fn parquet<'a>(path: &Path, settings: &'a recipe::Data) -> Result<Documents<'a>> {
    let file: Arc<Path> = path.into();
    let broken = |e| Error::new(Kind::Data, format!("`{}` is not a readable parquet file: {e}", path.display()));
    let handle = open(path)?;
    let bytes = handle.metadata().map_err(|e| Error::io("read", path, e))?.len();
    let reader = SerializedFileReader::new(handle).map_err(broken)?;
    let metadata = reader.metadata().file_metadata();
    let size = bytes / (metadata.num_rows().max(1) as u64);
    let columns = metadata.schema().get_fields();
    let names: Vec<&str> = columns.iter().map(|c| c.name()).collect();
    let shape = Shape::of(&names, settings).map_err(|e| e.at(&Origin { file: file.clone(), position: None }))?;
    let wanted: &[&str] = match shape {
        Shape::Text => &[&settings.field],
        Shape::Alpaca => &ALPACA,
        Shape::Chat(field) => &[field, TOOLS],
    };
    let fields = columns.iter().filter(|c| wanted.contains(&c.name())).cloned().collect();
    let projection = Type::group_type_builder(metadata.schema().name()).with_fields(fields).build().map_err(broken)?;
    let rows = RowIter::from_file_into(Box::new(reader)).project(Some(projection)).map_err(broken)?;
    let read = move |(i, row): (usize, parquet::errors::Result<parquet::record::Row>)| {
        let origin = Origin { file: file.clone(), position: Some(("row", i + 1)) };
        let row = row.map_err(|e| Error::new(Kind::Data, format!("{origin} cannot be read: {e}")));
        row.and_then(|row| {
            let mut map = Map::new();
            for (name, field) in row.into_columns() {
                let value =
                    value(field).map_err(|what| Error::new(Kind::Data, format!("{origin}: column `{name}` {what}")))?;
                map.insert(name, value);
            }
            document(Value::Object(map), origin, size, settings)
        })
        .transpose()
    };
    Ok(Box::new(rows.enumerate().filter_map(read)))
}

/// A parquet field as JSON; the error says what it holds instead.
fn value(field: Field) -> Result<Value, &'static str> {
    Ok(match field {
        Field::Str(text) => Value::String(text),
        // Strings of writers that do not annotate them.
        Field::Bytes(bytes) => str::from_utf8(bytes.data()).map_err(|_| "is not UTF-8 text")?.into(),
        Field::Null => Value::Null,
        Field::Bool(flag) => flag.into(),
        Field::Int(number) => number.into(),
        Field::Long(number) => number.into(),
        Field::Double(number) => number.into(),
        Field::ListInternal(list) => list.elements().iter().cloned().map(value).collect::<Result<_, _>>()?,
        Field::Group(row) => {
            let columns = row.into_columns().into_iter().map(|(name, field)| value(field).map(|v| (name, v)));
            Value::Object(columns.collect::<Result<_, _>>()?)
        }
        _ => return Err("does not hold strings"),
    })
}

const ALPACA: [&str; 3] = ["instruction", "input", "output"];

/// Where rows keep conversations: OpenAI's name and ShareGPT's.
const CHAT: [&str; 2] = ["messages", "conversations"];
const TOOLS: &str = "tools";

/// How a row becomes text.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Shape<'a> {
    Text,
    Alpaca,
    /// With the field of the conversation.
    Chat(&'a str),
}

/// A field that is not there; becomes an error once the place is known.
struct Missing {
    field: String,
    present: Vec<String>,
}

impl Missing {
    fn at(self, origin: &Origin) -> Error {
        let present = match self.present.is_empty() {
            true => "none".into(),
            false => self.present.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "),
        };
        let message = format!("{origin} has no field `{}`; fields there: {present}", self.field);
        let hint = match closest(&self.field, self.present.iter().map(String::as_str)) {
            Some(name) => format!("did you mean `{name}`? `--set data.field={name}`"),
            None => "name the field that holds the text: `--set data.field=NAME`".into(),
        };
        Error::new(Kind::Data, message).hint(hint)
    }
}

impl<'a> Shape<'a> {
    /// What a row with these fields is: `auto` takes rows with `instruction` and `output` as Alpaca, then those with
    /// `messages` or `conversations` as conversations; `chat` takes them from `data.field` too.
    fn of(names: &[&str], settings: &'a recipe::Data) -> Result<Self, Missing> {
        let lacking = |wanted: &[&str]| wanted.iter().find(|w| !names.contains(w)).map(|w| w.to_string());
        let alpaca = lacking(&["instruction", "output"]);
        let chat = CHAT.into_iter().find(|field| names.contains(field)).map(Shape::Chat);
        let (shape, missing) = match (settings.format, chat) {
            (Format::Alpaca, _) => (Shape::Alpaca, alpaca),
            (Format::Auto, _) if alpaca.is_none() => (Shape::Alpaca, None),
            (Format::Auto | Format::Chat, Some(chat)) => (chat, None),
            (Format::Chat, None) => {
                (Shape::Chat(&settings.field), lacking(&[&settings.field]).map(|_| CHAT[0].to_string()))
            }
            (Format::Auto | Format::Text, _) => (Shape::Text, lacking(&[&settings.field])),
        };
        match missing {
            None => Ok(shape),
            Some(field) => Err(Missing { field, present: names.iter().map(|n| n.to_string()).collect() }),
        }
    }
}

/// The document of one row; `None` where its text is empty. A bare string is text.
fn document(row: Value, origin: Origin, size: u64, settings: &recipe::Data) -> Result<Option<Document>> {
    let mut row = match row {
        Value::Object(row) => row,
        Value::String(text) => Map::from_iter([(settings.field.clone(), Value::String(text))]),
        other => {
            let message = format!("{origin} holds {}, not an object with a field `{}`", kind(&other), settings.field);
            return Err(Error::new(Kind::Data, message));
        }
    };
    let names: Vec<&str> = row.keys().map(String::as_str).collect();
    let shape = Shape::of(&names, settings).map_err(|e| e.at(&origin))?;
    let mut take = |name: &str| match row.remove(name) {
        Some(Value::String(text)) => Ok(text),
        other => {
            let found = kind(&other.unwrap_or(Value::Null));
            Err(Error::new(Kind::Data, format!("{origin}: `{name}` is {found}, not a string")))
        }
    };
    let content = match shape {
        Shape::Text => Content::Text(take(&settings.field)?),
        Shape::Alpaca => {
            let (instruction, answer) = (take("instruction")?, take("output")?);
            let input = row.get("input").and_then(Value::as_str).unwrap_or("");
            Content::Answer { prompt: alpaca_prompt(&instruction, input), answer }
        }
        Shape::Chat(field) => {
            let messages = messages(row.remove(field).unwrap_or_default())
                .map_err(|what| Error::new(Kind::Data, format!("{origin}: `{field}` {what}")))?;
            Content::Chat(Chat { messages, tools: row.remove(TOOLS).filter(Value::is_array).unwrap_or_default() })
        }
    };
    let empty = match &content {
        Content::Text(text) => text.is_empty(),
        Content::Answer { .. } => false,
        Content::Chat(chat) => chat.messages.is_empty(),
    };
    Ok((!empty).then_some(Document { content, origin, size }))
}

/// The messages of a conversation, ShareGPT's `from` and `value` under the names that templates read. The error says
/// what is wrong.
fn messages(conversation: Value) -> Result<Vec<Value>, String> {
    let Value::Array(messages) = conversation else {
        return Err(format!("is {}, not a list of messages", kind(&conversation)));
    };
    let named = |(i, message): (usize, Value)| {
        let Value::Object(mut message) = message else {
            return Err(format!("has {} as message {}", kind(&message), i + 1));
        };
        if let (Some(Value::String(from)), None) = (message.get("from"), message.get("role")) {
            let role = match from.as_str() {
                "human" => "user",
                "gpt" | "chatgpt" | "model" => ASSISTANT,
                other => other,
            };
            message.insert("role".into(), role.into());
            message.remove("from");
            if let Some(value) = message.remove("value") {
                message.insert("content".into(), value);
            }
        }
        match message.get("role") {
            Some(Value::String(_)) => Ok(Value::Object(message)),
            _ => Err(format!("has no `role` (or `from`) in message {}", i + 1)),
        }
    };
    messages.into_iter().enumerate().map(named).collect()
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The two-variant Stanford Alpaca prompt, ending after the response header.
///
/// ```
/// let prompt = margay::data::alpaca_prompt("Add the numbers.", "1 2");
/// assert!(prompt.ends_with("### Instruction:\nAdd the numbers.\n\n### Input:\n1 2\n\n### Response:\n"));
/// ```
pub fn alpaca_prompt(instruction: &str, input: &str) -> String {
    let (context, input) = match input.is_empty() {
        true => ("", String::new()),
        false => (", paired with an input that provides further context", format!("### Input:\n{input}\n\n")),
    };
    format!(
        "Below is an instruction that describes a task{context}. Write a response that appropriately completes the \
         request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
    )
}
