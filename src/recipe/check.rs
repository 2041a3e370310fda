//! A merged recipe against its JSON Schema: every problem at once, each with its place.

use serde_json::{Map, Value as Json, json};

use super::load::{Entry, Node, Place, Value};
use super::{Best, RESERVED, Recipe, show};
use crate::checkpoint::writer::parse_size;
use crate::error::closest;

/// One thing wrong, and where.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Problem {
    pub place: Place,
    pub text: String,
}

/// The typed recipe, or these problems with all further ones.
pub(super) fn typed(root: &Node, problems: Vec<Problem>) -> Result<Recipe, Vec<Problem>> {
    let schema = show::generated();
    let mut check = Check { schema: &schema, root, problems };
    let mut json = check.value(&schema, root, "").unwrap_or_default();
    inherit_data(&mut json);
    // Keys with a problem fell out of `json`, so this is the recipe with defaults in their place.
    match serde_json::from_value::<Recipe>(json) {
        Ok(mut recipe) => {
            check.across(&recipe);
            recipe.stage.retain(|name, _| recipe.stages.contains(name));
            if check.problems.is_empty() { Ok(recipe) } else { Err(check.problems) }
        }
        Err(e) => {
            if check.problems.is_empty() {
                check.problems.push(Problem { place: root.place.clone(), text: e.to_string() });
            }
            Err(check.problems)
        }
    }
}

/// Text of a stage's own: what its table does not say is said by `[data]`.
fn inherit_data(json: &mut Json) {
    let Some(base) = json["data"].as_object().cloned() else { return };
    for stage in json["stage"].as_object_mut().into_iter().flat_map(Map::values_mut) {
        let Some(own) = stage.get_mut("data").and_then(Json::as_object_mut) else { continue };
        let mut data = base.clone();
        data.append(own);
        *own = data;
    }
}

struct Check<'a> {
    schema: &'a Json,
    root: &'a Node,
    problems: Vec<Problem>,
}

impl Check<'_> {
    fn problem(&mut self, place: &Place, text: String) -> Option<Json> {
        self.problems.push(Problem { place: place.clone(), text });
        None
    }

    /// `node` as JSON of the type `schema` wants; `None` where it is not that, which is then noted.
    fn value(&mut self, schema: &Json, node: &Node, path: &str) -> Option<Json> {
        let root = self.schema;
        let schema = resolve(root, schema);
        let Some(schema) = variant(root, schema, node) else {
            if let (Some(kind), kinds @ [_, ..]) = (node.get("kind"), &tags(schema)[..]) {
                return self.value(&json!({ "type": "string", "enum": kinds }), kind, &format!("{path}.kind"));
            }
            return self
                .problem(&node.place, format!("`{path}` must be {}, found {}", expected(root, schema), found(node)));
        };
        let allows = |kind: &str| match &schema["type"] {
            Json::Array(kinds) => kinds.iter().any(|k| k == kind),
            Json::Null => kind == "string" && !words(schema).is_empty(),
            one => one == kind,
        };
        match (&node.value, &node.raw) {
            (Value::Table(_), _) if allows("object") => return self.table(schema, node, path),
            (Value::Array(items), _) if allows("array") => {
                let checked = items.iter().enumerate();
                let checked = checked.map(|(i, item)| self.value(&schema["items"], item, &format!("{path}[{i}]")));
                return checked.collect::<Vec<_>>().into_iter().collect();
            }
            // On the command line one value may stand for a list of one, and needs no quotes to be a string.
            (Value::Scalar(_), Some(_)) if allows("array") => {
                return Some(Json::Array(vec![self.value(&schema["items"], node, path)?]));
            }
            (Value::Scalar(Json::Bool(_) | Json::Number(_)) | Value::Foreign(_), Some(raw)) if allows("string") => {
                return self.scalar(schema, &raw.as_str().into(), node, path);
            }
            (Value::Scalar(json), _) => {
                let whole = json.as_f64().filter(|x| x.fract() == 0.0 && x.abs() < 2f64.powi(53));
                match (json, whole) {
                    (Json::Bool(_), _) if allows("boolean") => return Some(json.clone()),
                    (Json::String(_), _) if allows("string") => return self.scalar(schema, json, node, path),
                    (Json::Number(_), _) if allows("number") || allows("integer") && !json.is_f64() => {
                        return self.scalar(schema, json, node, path);
                    }
                    (Json::Number(_), Some(whole)) if allows("integer") => {
                        return self.scalar(schema, &(whole as i64).into(), node, path);
                    }
                    _ => {}
                }
            }
            _ => {}
        }
        self.problem(&node.place, format!("`{path}` must be {}, found {}", expected(root, schema), found(node)))
    }

    /// A string or number of the right type, against its list, range and format.
    fn scalar(&mut self, schema: &Json, json: &Json, node: &Node, path: &str) -> Option<Json> {
        let names = words(schema);
        if let (Some(text), false) = (json.as_str(), names.is_empty()) {
            if names.contains(&text) {
                return Some(json.clone());
            }
            let near = closest(text, names.iter().copied()).map(|n| format!("did you mean `{n}`? "));
            let known = format!("{}known: {}", near.unwrap_or_default(), names.join(", "));
            return self.problem(&node.place, format!("`{path}` cannot be `{text}`; {known}"));
        }
        let limit = |key: &str| schema[key].as_f64();
        let over = |holds: fn(f64, f64) -> bool, key: &str, words: &str| match (json.as_f64(), limit(key)) {
            (Some(x), Some(limit)) if !holds(x, limit) => Some(format!("{words} {limit}, found `{json}`")),
            _ => None,
        };
        let wrong = over(|x, l| x >= l, "minimum", "at least")
            .or_else(|| over(|x, l| x > l, "exclusiveMinimum", "above"))
            .or_else(|| over(|x, l| x <= l, "maximum", "at most"))
            .or_else(|| over(|x, l| x < l, "exclusiveMaximum", "below"))
            .or_else(|| match json.as_str() {
                Some("") if schema["minLength"] == 1 => Some("a name, found an empty string".into()),
                Some(text) if schema["format"] == "bytes" && parse_size(text).is_err() => {
                    Some(format!("a size such as `5GB` or `500MB`, found `{text}`"))
                }
                _ => None,
            });
        match wrong {
            Some(wrong) => self.problem(&node.place, format!("`{path}` must be {wrong}")),
            None => Some(json.clone()),
        }
    }

    fn table(&mut self, schema: &Json, node: &Node, path: &str) -> Option<Json> {
        let Value::Table(entries) = &node.value else { return None };
        let before = self.problems.len();
        let join = |key: &str| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
        let mut json = Map::new();
        if let Some(each) = any_name(schema) {
            for Entry { key, node, .. } in entries {
                json.extend(self.value(each, node, &join(key)).map(|value| (key.clone(), value)));
            }
            return Some(Json::Object(json));
        }
        let (known, top) = (schema["properties"].as_object()?, path.is_empty());
        for entry in entries {
            let path = join(&entry.key);
            if let Some(property) = known.get(&entry.key) {
                json.extend(self.value(property, &entry.node, &path).map(|value| (entry.key.clone(), value)));
                continue;
            }
            let elsewhere = self.homes(&entry.key, top);
            let own = format!("`{path}`");
            let advice = match closest(&entry.key, known.keys().map(String::as_str)) {
                // A key of the same table of another kind.
                _ if elsewhere.contains(&own) => {
                    let kind = match node.get("kind").map(|kind| &kind.value) {
                        Some(Value::Scalar(Json::String(kind))) => format!(", this one is `{kind}`"),
                        _ => String::new(),
                    };
                    format!("it is a key of `kind` {}{kind}", self.kinds(&entry.key).join(", "))
                }
                Some(near) => format!("did you mean `{}`?", join(near)),
                None if !elsewhere.is_empty() => format!("did you mean {}?", elsewhere.join(" or ")),
                None => format!("known keys: {}", known.keys().map(String::as_str).collect::<Vec<_>>().join(", ")),
            };
            self.problem(&entry.place, format!("unknown key `{path}`; {advice}"));
        }
        let required = schema["required"].as_array().into_iter().flatten().filter_map(Json::as_str);
        let missing: Vec<&str> = required.filter(|key| !json.contains_key(*key)).collect();
        if missing.is_empty() {
            return Some(Json::Object(json));
        }
        if self.problems.len() == before {
            self.problem(&node.place, format!("`{path}` lacks `{}`", missing.join("`, `")));
        }
        None
    }

    /// The kinds of tables that have a key of this name.
    fn kinds(&self, key: &str) -> Vec<String> {
        let sections = self.schema["properties"].as_object().into_iter().flatten();
        let tables = sections.flat_map(|(_, property)| options(resolve(self.schema, property)));
        let with_key = tables.map(|table| &resolve(self.schema, table)["properties"]).filter(|p| p.get(key).is_some());
        with_key.filter_map(|p| p["kind"]["const"].as_str()).map(|kind| format!("`{kind}`")).collect()
    }

    /// Where else in a recipe a key of this name lives; at the `top` also as a named table, such as a stage.
    fn homes(&self, key: &str, top: bool) -> Vec<String> {
        let mut found = Vec::new();
        for (section, property) in self.schema["properties"].as_object().into_iter().flatten() {
            let property = resolve(self.schema, property);
            let (table, path) = match any_name(property) {
                Some(each) => (resolve(self.schema, each), format!("{section}.<name>")),
                None => (property, section.clone()),
            };
            if options(table).chain([table]).any(|table| table["properties"].get(key).is_some()) {
                found.push(format!("`{path}.{key}`"));
            }
            if top && any_name(property).is_some() && self.root.get(section).is_some_and(|t| t.get(key).is_some()) {
                found.push(format!("`{section}.{key}`"));
            }
        }
        found
    }

    /// What no single key can tell.
    fn across(&mut self, recipe: &Recipe) {
        let root = self.root;
        let place = |path: &[&str]| {
            let mut at = root;
            for key in path.iter().flat_map(|part| part.split('.')) {
                match at.get(key) {
                    Some(node) => at = node,
                    None => break,
                }
            }
            &at.place
        };
        for (n, name) in recipe.stages.iter().enumerate() {
            let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-".contains(c);
            let tables: Vec<&str> = recipe.stage.keys().map(String::as_str).collect();
            let wrong = match recipe.stage.get(name) {
                _ if name.is_empty() || !name.chars().all(letters) => {
                    Some("is no name; use small letters, digits, `_` and `-`".into())
                }
                None => Some(format!("has no table `[stage.{name}]`; tables there are: {}", tables.join(", "))),
                _ if RESERVED.contains(&name.as_str()) => Some("means something else; choose another name".into()),
                _ if recipe.stages[..n].contains(name) => Some("comes twice; let it be two tables of two names".into()),
                _ => None,
            };
            if let Some(wrong) = wrong {
                self.problem(place(&["stages"]), format!("stage `{name}` of `stages` {wrong}"));
            }
        }
        for (name, stage) in recipe.in_order() {
            for (key, text) in stage.problems() {
                self.problem(place(&["stage", name, key]), format!("`stage.{name}.{key}` {text}"));
            }
        }
        if let Some(text) = recipe.layers.best().and_then(Best::problem) {
            let node = root.get("layers").unwrap_or(root);
            self.problem(&node.place, format!("`layers.keep_best` {text}"));
        }
    }
}

/// Follows `$ref`, and a choice between something and nothing to the something.
pub(super) fn resolve<'a>(root: &'a Json, schema: &'a Json) -> &'a Json {
    if let Some(target) = schema["$ref"].as_str().and_then(|path| root.pointer(path.trim_start_matches('#'))) {
        return resolve(root, target);
    }
    match schema["anyOf"].as_array().map(Vec::as_slice) {
        Some([some, nothing]) if nothing["type"] == "null" => resolve(root, some),
        _ => schema,
    }
}

/// The schema of every entry of a table whose keys are names.
pub(super) fn any_name(schema: &Json) -> Option<&Json> {
    schema.get("additionalProperties").filter(|each| each.is_object())
}

fn options(schema: &Json) -> impl Iterator<Item = &Json> {
    ["oneOf", "anyOf"].into_iter().filter_map(|key| schema[key].as_array()).flatten()
}

/// The kinds of a choice between tables that is made by `kind`.
pub(super) fn tags(schema: &Json) -> Vec<&str> {
    options(schema).filter_map(|option| option["properties"]["kind"]["const"].as_str()).collect()
}

/// The option of a `oneOf` or `anyOf` that `node` is meant for: by its `kind`, else by its type, tables by the keys they
/// share. Lists of words are no choice: they stay whole.
fn variant<'a>(root: &'a Json, schema: &'a Json, node: &Node) -> Option<&'a Json> {
    if !words(schema).is_empty() || options(schema).next().is_none() {
        return Some(schema);
    }
    let fits = |option: &&Json| {
        let kind = &option["properties"]["kind"]["const"];
        match &node.value {
            Value::Table(_) if kind.is_string() => {
                node.get("kind").is_some_and(|n| matches!(&n.value, Value::Scalar(k) if k == kind))
            }
            Value::Table(_) => option["type"] == "object",
            Value::Array(_) => option["type"] == "array",
            Value::Scalar(Json::String(_)) => option["type"] == "string",
            _ => false,
        }
    };
    let near = |option: &&Json| match &node.value {
        Value::Table(entries) => {
            let keys = || option["properties"].as_object().into_iter().flat_map(Map::keys).map(String::as_str);
            let distance = |e: &Entry| match keys().any(|key| key == e.key) {
                true => 0,
                false if closest(&e.key, keys()).is_some() => 1,
                false => 2,
            };
            entries.iter().map(distance).min().unwrap_or(2)
        }
        _ => 0,
    };
    options(schema).map(|option| resolve(root, option)).filter(fits).min_by_key(near)
}

/// The known words of an enum, in whichever way the schema spells them.
pub(super) fn words(schema: &Json) -> Vec<&str> {
    let own = schema["enum"].as_array().into_iter().flatten().chain(schema.get("const"));
    let mut found: Vec<&str> = own.filter_map(Json::as_str).collect();
    if found.is_empty() && options(schema).all(|option| option["type"] == "string") {
        found = options(schema).flat_map(words).collect();
    }
    found
}

/// What a schema takes, in words.
fn expected(root: &Json, schema: &Json) -> String {
    match (&tags(schema)[..], &words(schema)[..]) {
        (kinds @ [_, ..], _) => return format!("a table with a `kind` of {}", kinds.join(", ")),
        (_, [word]) => return format!("`\"{word}\"`"),
        (_, known @ [_, ..]) => return format!("one of {}", known.join(", ")),
        _ => {}
    }
    let alternatives: Vec<String> = options(schema).map(|option| expected(root, resolve(root, option))).collect();
    if !alternatives.is_empty() {
        return alternatives.join(" or ");
    }
    let kind = schema["type"].as_array().and_then(|kinds| kinds.first()).unwrap_or(&schema["type"]);
    match kind.as_str() {
        Some("array") => format!("a list, each item {}", expected(root, resolve(root, &schema["items"]))),
        Some("object") => {
            let keys = schema["properties"].as_object().into_iter().flat_map(Map::keys);
            format!("a table of {}", keys.map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", "))
        }
        Some("integer") => "an integer".into(),
        Some("boolean") => "true or false".into(),
        Some(kind) => format!("a {kind}"),
        None => "something else".into(),
    }
}

/// What stands there, in words.
fn found(node: &Node) -> String {
    match &node.value {
        Value::Table(_) => "a table".into(),
        Value::Array(_) => "a list".into(),
        Value::Foreign(what) => (*what).into(),
        Value::Scalar(Json::String(text)) => format!("the string `\"{text}\"`"),
        Value::Scalar(other) => format!("`{other}`"),
    }
}
