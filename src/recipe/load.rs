//! From a name or file to a checked recipe: defaults, then parents, then the file, then `--set`, each merged over the
//! one before. Every value keeps the place it was written, so that problems of the merged result name file and line.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Number, Value as Json};
use toml::de::{DeTable, DeValue};

use super::check::{self, Problem};
use super::source::Source;
use super::{Recipe, show};
use crate::error::{Error, Kind, Result};

/// A recipe ready to run.
#[derive(Debug, Clone)]
pub struct Loaded {
    pub recipe: Recipe,
    /// The shipped name or the path it was asked for by.
    pub origin: String,
    /// The full result as TOML: parents, file, `--set` and defaults merged; loads to the same recipe.
    pub text: String,
}

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    Default,
    File { file: Arc<str>, line: usize, column: usize },
    Set { key: String },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Default => f.write_str("defaults"),
            Place::File { file, line, column } => write!(f, "{file}:{line}:{column}"),
            Place::Set { key } => write!(f, "--set {key}"),
        }
    }
}

/// A TOML value that knows its place.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub value: Value,
    pub place: Place,
    /// What `--set` was given, for keys whose type decides how to read it.
    pub raw: Option<String>,
}

#[derive(Debug, Clone)]
pub(super) enum Value {
    Table(Vec<Entry>),
    Array(Vec<Node>),
    Scalar(Json),
    /// What TOML has and a recipe has not, in words.
    Foreign(&'static str),
}

#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub key: String,
    pub place: Place,
    pub node: Node,
}

/// The table whose `kind` says which other keys there are, each with defaults of its own.
const MIXER: &str = "mixer";
/// The key whose tables exclude each other: each holds one rule.
const LAYERS: &str = "layers";

impl Recipe {
    /// Loads a shipped recipe by name or a file by path, with what it extends, and applies `sets` (`key=value`, dotted
    /// keys, TOML values or bare words) last.
    ///
    /// Errors: an unknown name, an unreadable file, a cycle of `extends`, and all problems of the result in one error,
    /// one per line with file, line and column.
    pub fn load(name_or_file: &str, sets: &[String]) -> Result<Loaded> {
        let mut merged = Node::from_json(&show::without_nulls(&Recipe::default()), &Place::Default);
        let mut problems = Vec::new();
        for layer in chain(name_or_file)? {
            merged.merge(layer);
        }
        let mut overlay = Node::table(Place::Default);
        for set in sets {
            match parse_set(set) {
                Ok(layer) => overlay.merge(layer),
                Err(problem) => problems.push(problem),
            }
        }
        merged.merge(overlay);
        merged.complete_mixer();
        match check::typed(&merged, problems) {
            Ok(recipe) => Ok(Loaded { text: recipe.to_toml(), recipe, origin: name_or_file.into() }),
            Err(problems) => Err(refused(name_or_file, problems)),
        }
    }
}

fn refused(name: &str, mut problems: Vec<Problem>) -> Error {
    problems.sort();
    problems.dedup();
    let count = if problems.len() == 1 { "1 problem".into() } else { format!("{} problems", problems.len()) };
    let lines: String = problems.iter().map(|p| format!("\n  {}: {}", p.place, p.text)).collect();
    Error::new(Kind::Recipe, format!("recipe `{name}` has {count}:{lines}"))
        .hint("`margay recipe schema` describes every key; `margay recipe show llama/lolcats` shows them in use")
}

/// The layers of a recipe, furthest parent first.
fn chain(name: &str) -> Result<Vec<Node>> {
    let mut source = Source::find(name, Path::new(""))?;
    let mut seen = BTreeSet::from([identity(&source)]);
    let mut labels = vec![source.label.clone()];
    let mut layers = Vec::new();
    loop {
        let mut layer = parse(&source).map_err(|problems| refused(name, problems))?;
        let extends = layer.take("extends");
        layers.push(layer);
        let Some(Entry { node, .. }) = extends else { break };
        let Value::Scalar(Json::String(parent)) = &node.value else {
            let text = "`extends` must be a string: a recipe's name or file".into();
            return Err(refused(name, vec![Problem { place: node.place, text }]));
        };
        source = Source::find(parent, source.folder()).map_err(|mut e| {
            e.message = format!("{}: {}", node.place, e.message);
            e.kind = Kind::Recipe;
            e
        })?;
        labels.push(source.label.clone());
        if !seen.insert(identity(&source)) {
            let cycle: Vec<String> = labels.iter().map(|l| format!("`{l}`")).collect();
            let message = format!("{}: recipes extend each other in a circle: {}", node.place, cycle.join(" extends "));
            return Err(Error::new(Kind::Recipe, message).hint("take one `extends` out"));
        }
    }
    layers.reverse();
    Ok(layers)
}

fn identity(source: &Source) -> String {
    source.file.as_ref().map_or(source.label.to_string(), |file| file.display().to_string())
}

/// One file as a tree, or all its syntax errors.
fn parse(source: &Source) -> Result<Node, Vec<Problem>> {
    let text = source.text.as_str();
    let place = |offset: usize| {
        let before = &text[..text.floor_char_boundary(offset)];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        Place::File { file: source.label.clone(), line, column }
    };
    let (table, errors) = DeTable::parse_recoverable(text);
    if errors.is_empty() {
        return Ok(Node { value: Value::from_table(table.get_ref(), &place), place: place(0), raw: None });
    }
    let problem = |e: &toml::de::Error| Problem {
        place: place(e.span().map_or(0, |span| span.start)),
        text: format!("not TOML: {}", e.message().replace('\n', "; ")),
    };
    Err(errors.iter().map(problem).collect())
}

/// `a.b=value` as a tree of one leaf. A value that is not TOML is a string.
fn parse_set(set: &str) -> Result<Node, Problem> {
    let (key, raw) = set.split_once('=').map(|(k, v)| (k.trim(), v.trim())).unwrap_or((set, ""));
    let place = Place::Set { key: key.into() };
    if !set.contains('=') || key.split('.').any(|part| part.trim().is_empty()) {
        let text = format!("`{set}` is not `key=value`, such as `stage.transfer.tokens=20000`");
        return Err(Problem { place, text });
    }
    let value = match DeValue::parse(raw) {
        Ok(value) => Value::from_toml(value.get_ref(), &|_| place.clone()),
        Err(_) => Value::Scalar(raw.into()),
    };
    let leaf = Node { value, place: place.clone(), raw: Some(raw.into()) };
    Ok(key.rsplit('.').fold(leaf, |node, part| {
        let entry = Entry { key: part.trim().into(), place: place.clone(), node };
        Node { value: Value::Table(vec![entry]), place: place.clone(), raw: None }
    }))
}

impl Value {
    fn from_table(table: &DeTable, place: &dyn Fn(usize) -> Place) -> Value {
        let mut entries: Vec<(usize, Entry)> = table
            .iter()
            .map(|(key, value)| {
                let node = Node::from_toml(value, place);
                let start = key.span().start;
                (start, Entry { key: key.get_ref().to_string(), place: place(start), node })
            })
            .collect();
        entries.sort_by_key(|(start, _)| *start);
        Value::Table(entries.into_iter().map(|(_, entry)| entry).collect())
    }

    fn from_toml(value: &DeValue, place: &dyn Fn(usize) -> Place) -> Value {
        match value {
            DeValue::String(text) => Value::Scalar(text.as_ref().into()),
            DeValue::Boolean(yes) => Value::Scalar((*yes).into()),
            DeValue::Integer(n) => match i128::from_str_radix(n.as_str(), n.radix()).ok().and_then(Number::from_i128) {
                Some(number) => Value::Scalar(Json::Number(number)),
                None => Value::Foreign("an integer beyond 64 bits"),
            },
            DeValue::Float(x) => match x.as_str().parse().ok().and_then(Number::from_f64) {
                Some(number) => Value::Scalar(Json::Number(number)),
                None => Value::Foreign("a number that is not finite"),
            },
            DeValue::Datetime(_) => Value::Foreign("a date"),
            DeValue::Array(items) => Value::Array(items.iter().map(|item| Node::from_toml(item, place)).collect()),
            DeValue::Table(table) => Value::from_table(table, place),
        }
    }
}

impl Node {
    fn table(place: Place) -> Node {
        Node { value: Value::Table(Vec::new()), place, raw: None }
    }

    fn from_toml(value: &toml::Spanned<DeValue>, place: &dyn Fn(usize) -> Place) -> Node {
        let at = place(value.span().start);
        Node { value: Value::from_toml(value.get_ref(), place), place: at, raw: None }
    }

    /// A tree all of one place.
    pub fn from_json(json: &Json, place: &Place) -> Node {
        let value = match json {
            Json::Object(map) => Value::Table(
                map.iter()
                    .map(|(key, value)| Entry {
                        key: key.clone(),
                        place: place.clone(),
                        node: Node::from_json(value, place),
                    })
                    .collect(),
            ),
            Json::Array(items) => Value::Array(items.iter().map(|item| Node::from_json(item, place)).collect()),
            scalar => Value::Scalar(scalar.clone()),
        };
        Node { value, place: place.clone(), raw: None }
    }

    /// The value under a key of a table.
    pub fn get(&self, key: &str) -> Option<&Node> {
        match &self.value {
            Value::Table(entries) => entries.iter().find(|e| e.key == key).map(|e| &e.node),
            _ => None,
        }
    }

    /// Lays the mixer over the defaults of its kind, so that a part that is given in part keeps the rest of its mixer's own.
    fn complete_mixer(&mut self) {
        let Value::Table(entries) = &mut self.value else { return };
        let Some(entry) = entries.iter_mut().find(|e| e.key == MIXER) else { return };
        let Some(Value::Scalar(kind)) = entry.node.get("kind").map(|n| &n.value) else { return };
        // An unknown kind is told of where types are checked.
        let Ok(mixer) = serde_json::from_value(serde_json::json!({ "kind": kind })) else { return };
        let defaults = show::without_nulls(&Recipe { mixer, ..Recipe::default() });
        let given = std::mem::replace(&mut entry.node, Node::from_json(&defaults[MIXER], &Place::Default));
        entry.node.merge(given);
    }

    fn shares_key(&self, other: &Node) -> bool {
        matches!(&self.value, Value::Table(entries) if entries.iter().any(|e| other.get(&e.key).is_some()))
    }

    fn take(&mut self, key: &str) -> Option<Entry> {
        match &mut self.value {
            Value::Table(entries) => entries.iter().position(|e| e.key == key).map(|at| entries.remove(at)),
            _ => None,
        }
    }

    /// Lays `child` over this: tables merge key by key, everything else is replaced. So is a table of another `kind`,
    /// whose keys would mean nothing to the new one, and another rule for `layers`.
    fn merge(&mut self, child: Node) {
        let kind = |node: &Node| match node.get("kind").map(|n| &n.value) {
            Some(Value::Scalar(kind)) => Some(kind.clone()),
            _ => None,
        };
        let same_kind = kind(&child).is_none_or(|new| kind(self).is_none_or(|old| old == new));
        match (&mut self.value, child.value) {
            (Value::Table(old), Value::Table(new)) if same_kind => {
                self.place = child.place;
                for entry in new {
                    match old.iter_mut().find(|e| e.key == entry.key) {
                        Some(known) if entry.key == LAYERS && !known.node.shares_key(&entry.node) => *known = entry,
                        Some(known) => {
                            known.place = entry.place;
                            known.node.merge(entry.node);
                        }
                        None => old.push(entry),
                    }
                }
            }
            (_, value) => *self = Node { value, ..child },
        }
    }
}
