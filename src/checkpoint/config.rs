//! `config.json`, kept whole, with typed reads that name the key.
//!
//! A key with the value `null` counts as absent, as it does in the reference implementation.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Kind, Result};

/// A JSON object together with the words that place it in error messages.
#[derive(Debug, Clone)]
pub struct Config {
    object: Map<String, Value>,
    /// The file, for messages: a path or `config.json` of a hub id.
    file: String,
    /// Dotted path of this object inside the file, ending in `.`; empty at the top.
    prefix: String,
}

impl Config {
    /// Reads a `config.json`.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
        Self::parse(&bytes, &path.display().to_string())
    }

    /// Parses the bytes of a `config.json`; `file` is what messages call it.
    pub fn parse(bytes: &[u8], file: &str) -> Result<Self> {
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|e| Error::new(Kind::Config, format!("`{file}` is not valid JSON: {e}")))?;
        match value {
            Value::Object(object) => Ok(Config { object, file: file.into(), prefix: String::new() }),
            other => Err(Error::new(Kind::Config, format!("`{file}` holds {}, wanted a JSON object", shown(&other)))),
        }
    }

    /// The object as it stands in the file, keys in file order.
    pub fn object(&self) -> &Map<String, Value> {
        &self.object
    }

    /// The file as messages call it.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The value of `key`; absent and `null` are `None`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.object.get(key).filter(|v| !v.is_null())
    }

    /// `model_type`.
    pub fn model_type(&self) -> Result<&str> {
        self.wanted("model_type", self.opt_str("model_type")?)
    }

    /// `architectures`; empty when absent.
    pub fn architectures(&self) -> Result<Vec<&str>> {
        Ok(self.strings("architectures")?.unwrap_or_default())
    }

    pub fn usize(&self, key: &str) -> Result<usize> {
        self.wanted(key, self.opt_usize(key)?)
    }

    pub fn opt_usize(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number from 0", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    pub fn f64(&self, key: &str) -> Result<f64> {
        self.wanted(key, self.opt_f64(key)?)
    }

    pub fn opt_f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.typed(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    pub fn str(&self, key: &str) -> Result<&str> {
        self.wanted(key, self.opt_str(key)?)
    }

    pub fn opt_str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A list of numbers.
    pub fn f64s(&self, key: &str) -> Result<Vec<f64>> {
        self.wanted(key, self.list(key, "a list of numbers", Value::as_f64)?)
    }

    /// A list of whole numbers, where it is there.
    pub fn usizes(&self, key: &str) -> Result<Option<Vec<usize>>> {
        self.list(key, "a list of whole numbers", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    /// A list of strings, where it is there.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.list(key, "a list of strings", Value::as_str)
    }

    fn list<'a, T>(&'a self, key: &str, wanted: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<Vec<T>>> {
        self.typed(key, wanted, |v| v.as_array().and_then(|list| list.iter().map(&read).collect()))
    }

    /// One token id or a list of them, as `eos_token_id` has both; empty when absent.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = self.typed(key, "a token id or a list of them", |v| match v {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|n| vec![n]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    /// A nested object such as `rope_scaling`, with the same reads; its messages say `rope_scaling.factor`.
    pub fn opt_object(&self, key: &str) -> Result<Option<Config>> {
        let object = self.typed(key, "an object", |v| v.as_object().cloned())?;
        let nest = |object| Config { object, file: self.file.clone(), prefix: format!("{}{key}.", self.prefix) };
        Ok(object.map(nest))
    }

    /// An error about the value of `key`: says where it is, what it is and what was wanted.
    pub fn wrong(&self, key: &str, found: &Value, wanted: &str) -> Error {
        let Config { file, prefix, .. } = self;
        Error::new(Kind::Config, format!("`{prefix}{key}` in `{file}` is {}, wanted {wanted}", shown(found)))
    }

    fn typed<'a, T>(&'a self, key: &str, wanted: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        self.get(key).map(|v| read(v).ok_or_else(|| self.wrong(key, v, wanted))).transpose()
    }

    fn wanted<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| {
            let near = crate::error::closest(key, self.object.keys().map(String::as_str));
            let error = Error::new(Kind::Config, format!("`{}{key}` is missing in `{}`", self.prefix, self.file));
            match near {
                Some(near) => error.hint(format!("did you mean `{near}`, which is there?")),
                None => error,
            }
        })
    }
}

/// A value in short, for messages.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("`{}…`", &text[..end]),
        None => format!("`{text}`"),
    }
}
