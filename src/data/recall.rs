//! Recall tests: prompts with key–value pairs and the one right answer.

use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Kind, Result};

/// One prompt of a recall file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct RecallItem {
    /// Key–value pairs in the prompt.
    pub pairs: usize,
    pub prompt: String,
    /// What must follow the prompt, exactly.
    pub answer: String,
    /// The answer ends before this text; empty: at EOS.
    #[serde(default)]
    pub stop: String,
}

/// Reads a recall file: one JSON object with `pairs`, `prompt`, `answer` and `stop` a line.
pub fn read_recall(path: &Path) -> Result<Vec<RecallItem>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let items: Vec<RecallItem> = lines
        .map(|(i, line)| {
            serde_json::from_str(line).map_err(|e| {
                Error::new(Kind::Data, format!("`{}` line {}: {e}", path.display(), i + 1))
                    .hint("each line holds an object with `pairs`, `prompt`, `answer` and `stop`")
            })
        })
        .collect::<Result<_>>()?;
    if items.is_empty() {
        return Err(Error::new(Kind::Data, format!("`{}` holds no recall prompt", path.display())));
    }
    Ok(items)
}
