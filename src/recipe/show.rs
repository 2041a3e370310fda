//! A recipe as commented TOML, and its JSON Schema.

use std::fmt::Write;

use serde_json::{Map, Value as Json, json};

use super::Recipe;
use super::check::{any_name, resolve, tags, words};

/// The schema of a whole recipe, without `extends`: that key is gone once files are merged.
pub(super) fn generated() -> Json {
    schemars::schema_for!(Recipe).to_value()
}

/// JSON Schema of a recipe file, for editors and other programs.
pub fn schema() -> Json {
    let mut schema = generated();
    if let Some(properties) = schema["properties"].as_object_mut() {
        let text = "Recipe that this one builds on: a shipped name, or a file relative to this one. Tables merge key by \
                    key; a table of another `kind` replaces the parent's.";
        properties.shift_insert(0, "extends".into(), json!({ "description": text, "type": "string" }));
    }
    // A file may leave `kind` to its parent, and then its keys may fit more than one kind.
    for definition in schema["$defs"].as_object_mut().into_iter().flat_map(Map::values_mut) {
        if tags(definition).is_empty() {
            continue;
        }
        if let Some(mut options) = definition.as_object_mut().and_then(|d| d.remove("oneOf")) {
            for option in options.as_array_mut().into_iter().flatten().filter_map(Json::as_object_mut) {
                option.remove("required");
            }
            definition["anyOf"] = options;
        }
    }
    schema
}

/// The recipe as JSON; keys that are not set are left out, as TOML does.
pub(super) fn without_nulls(recipe: &Recipe) -> Json {
    fn strip(json: Json) -> Json {
        match json {
            Json::Object(map) => {
                map.into_iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k, strip(v))).collect::<Map<_, _>>().into()
            }
            other => other,
        }
    }
    serde_json::to_value(recipe).map(strip).unwrap_or_default()
}

impl Recipe {
    /// Every key with its value, and above it what it means; a key that is not set stands commented out. Loading the
    /// text gives the same recipe.
    pub fn to_toml(&self) -> String {
        let schema = generated();
        let mut json = without_nulls(self);
        // Stages in the order they run; tables that are not used come last.
        if let Some(stages) = json["stage"].as_object_mut() {
            let order = |name: &str| self.stages.iter().position(|s| s == name).unwrap_or(usize::MAX);
            let mut sorted: Vec<_> = std::mem::take(stages).into_iter().collect();
            sorted.sort_by_key(|(name, _)| order(name));
            stages.extend(sorted);
        }
        let mut text = String::new();
        write_table(&mut text, &schema, &schema, &json, "");
        text
    }
}

/// One table: its plain keys in the order of the schema, then its sub-tables under their headers.
fn write_table(out: &mut String, root: &Json, schema: &Json, table: &Json, path: &str) {
    let schema = resolve(root, schema);
    let is_kind = |option: &&Json| table.get("kind").is_some_and(|kind| option["properties"]["kind"]["const"] == *kind);
    let schema = schema["oneOf"].as_array().and_then(|options| options.iter().find(is_kind)).unwrap_or(schema);
    let Some(properties) = schema["properties"].as_object() else { return };
    let mut tables = Vec::new();
    for (key, property) in properties {
        let shape = resolve(root, property);
        match table.get(key) {
            // A choice between a word, a list and a table stands in one line.
            Some(Json::Object(_)) if shape.get("anyOf").is_none() => tables.push((key, property)),
            value => {
                write_comment(out, root, property);
                match value {
                    Some(value) => _ = writeln!(out, "{key} = {}", inline(value)),
                    None => _ = writeln!(out, "# {key} ="),
                }
            }
        }
    }
    for (key, property) in tables {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        out.push('\n');
        write_comment(out, root, property);
        match any_name(resolve(root, property)) {
            None => write_section(out, root, property, &table[key], &path),
            Some(each) => {
                for (n, (name, entry)) in table[key].as_object().into_iter().flatten().enumerate() {
                    out.push_str(if n > 0 { "\n" } else { "" });
                    write_section(out, root, each, entry, &format!("{path}.{name}"));
                }
            }
        }
    }
}

fn write_section(out: &mut String, root: &Json, schema: &Json, table: &Json, path: &str) {
    _ = writeln!(out, "[{path}]");
    write_table(out, root, schema, table, path);
}

fn write_comment(out: &mut String, root: &Json, property: &Json) {
    let target = resolve(root, property);
    let described = property["description"].as_str().or(target["description"].as_str());
    for line in described.unwrap_or_default().lines() {
        _ = writeln!(out, "# {line}");
    }
    let words = words(target);
    if words.len() > 1 {
        _ = writeln!(out, "# One of: {}.", words.join(", "));
    }
}

/// A value as TOML in one line.
fn inline(value: &Json) -> String {
    // Shortest form that reads back as the same number.
    if let Some(small) = value.as_f64().filter(|x| *x != 0.0 && x.abs() < 1e-3) {
        return format!("{small:e}");
    }
    toml::Value::try_from(value).map_or_else(|_| value.to_string(), |value| value.to_string())
}
