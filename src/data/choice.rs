//! Multiple-choice questions: a context, its possible continuations, and the right one.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Kind, Result};

/// One question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChoiceItem {
    pub context: String,
    pub choices: Vec<String>,
    /// Index of the right choice.
    pub gold: usize,
}

/// Reads a file of multiple-choice questions, one JSON object a line:
///
/// - `context`, `query` or `question`: the text before the choice;
/// - `choices`: a list of at least two texts;
/// - `gold`, `answer` or `label`: the right one, by its text, its index from 0, or its letter from A.
pub fn read_choices(path: &Path) -> Result<Vec<ChoiceItem>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let item = |(i, line): (usize, &str)| {
        let row: Result<Value, String> = serde_json::from_str(line).map_err(|e| e.to_string());
        row.and_then(|row| parse(&row)).map_err(|why| {
            Error::new(Kind::Data, format!("`{}` line {}: {why}", path.display(), i + 1))
                .hint("each line holds an object with `context` (or `query`), `choices` and `gold` (or `answer`)")
        })
    };
    let items = lines.map(item).collect::<Result<Vec<_>>>()?;
    if items.is_empty() {
        return Err(Error::new(Kind::Data, format!("`{}` holds no question", path.display())));
    }
    Ok(items)
}

fn parse(row: &Value) -> Result<ChoiceItem, String> {
    let first = |keys: [&str; 3]| keys.iter().map(|key| &row[*key]).find(|v| !v.is_null()).unwrap_or(&Value::Null);
    let context = first(["context", "query", "question"]).as_str().ok_or("it has no text `context` or `query`")?;
    let choices = row["choices"].as_array().ok_or("it has no list `choices`")?;
    let choices: Option<Vec<String>> = choices.iter().map(|c| c.as_str().map(String::from)).collect();
    let choices = choices.filter(|c| c.len() > 1).ok_or("`choices` must hold at least two texts")?;
    let gold = first(["gold", "answer", "label"]);
    let index = match gold.as_str() {
        None => gold.as_u64().map(|i| i as usize),
        Some(text) => choices.iter().position(|c| c == text).or_else(|| match text.as_bytes() {
            [letter @ b'A'..=b'Z'] => Some((letter - b'A') as usize),
            _ => text.parse().ok(),
        }),
    };
    let gold = index.filter(|i| *i < choices.len()).ok_or_else(|| match gold {
        Value::Null => "it has no `gold` or `answer`".to_string(),
        gold => format!("answer {gold} is none of its {} choices", choices.len()),
    })?;
    Ok(ChoiceItem { context: context.into(), choices, gold })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_right_choice_by_text_index_or_letter() {
        let gold = |row: Value| parse(&row).map(|item| item.gold);
        assert_eq!(gold(json!({"context": "x", "choices": ["a", "b"], "gold": 1})), Ok(1));
        assert_eq!(gold(json!({"query": "x", "choices": ["a", "b"], "answer": "B"})), Ok(1));
        assert_eq!(gold(json!({"question": "x", "choices": ["B", "A"], "label": "A"})), Ok(1));
        assert_eq!(gold(json!({"query": "x", "choices": ["7", "0"], "answer": "0"})), Ok(1));
        assert_eq!(gold(json!({"query": "x", "choices": ["a", "b"], "answer": "1"})), Ok(1));
        let refused = |row: Value, why: &str| assert!(gold(row).unwrap_err().contains(why));
        refused(json!({"query": "x", "choices": ["a", "b"], "answer": 2}), "none of its 2 choices");
        refused(json!({"query": "x", "choices": ["a", "b"]}), "no `gold`");
        refused(json!({"query": "x", "choices": ["a"], "gold": 0}), "at least two");
        refused(json!({"choices": ["a", "b"], "gold": 0}), "`context`");
    }
}
