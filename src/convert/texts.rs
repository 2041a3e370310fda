//! The text of a conversion: that of `[data]`, and of the stages that have their own.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{base_name, cache_dir};
use crate::data::{Corpus, Split, Tokenizer};
use crate::error::{Error, Kind, Result};
use crate::progress::Progress;
use crate::recipe::{Data, Recipe, Stage};

/// Packed text, all in rows of one length: two stages that read the same text alike hold back the same of it.
pub struct Texts<'a> {
    data: &'a Data,
    /// What the model is measured on, and what stages without a text of their own train on.
    pub main: Corpus,
    own: BTreeMap<&'a str, (&'a Data, Corpus)>,
}

impl<'a> Texts<'a> {
    /// Tokenises the text of `[data]` and of those `stages` that have their own, or finds it in the cache.
    pub fn prepare(
        recipe: &'a Recipe,
        stages: &[(&'a str, &'a Stage)],
        tokenizer: &Tokenizer,
        row_len: usize,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let corpus =
            |data: &Data| Corpus::prepare(&data.sources, data, recipe.seed, tokenizer, row_len, &cache_dir(), progress);
        let mut own = BTreeMap::new();
        for (name, stage) in stages {
            if let Some(data) = &stage.data {
                own.insert(*name, (data, corpus(data)?));
            }
        }
        Ok(Texts { data: &recipe.data, main: corpus(&recipe.data)?, own })
    }

    /// What a stage trains on, and how it is read.
    pub fn of(&self, stage: &str) -> (&Data, &Corpus) {
        self.own.get(stage).map_or((self.data, &self.main), |(data, corpus)| (*data, corpus))
    }

    /// What a stage is validated on, in sequences of `seq_len`.
    pub fn valid(&self, stage: &str, seq_len: usize) -> Result<Split> {
        let (data, corpus) = self.of(stage);
        let valid = corpus.valid(seq_len)?.limit(data.validation_tokens);
        if valid.is_empty() {
            let message =
                format!("no validation sequence of `stage.{stage}.seq_len` = {seq_len} has a token that counts");
            return Err(Error::new(Kind::Data, message).hint("give more text, or raise `data.validation`"));
        }
        Ok(valid)
    }

    /// Identifies rows and split of all texts.
    pub fn digest(&self) -> String {
        let own = self.own.iter().map(|(name, (_, corpus))| format!(" {name} {}", corpus.digest()));
        self.main.digest().to_string() + &own.collect::<String>()
    }

    /// What the manifest says of the texts; names no folder of this machine.
    pub fn describe(&self, validation_tokens: usize) -> Value {
        let one = |data: &Data, corpus: &Corpus| {
            let names = |sources: &[String]| sources.iter().map(|s| base_name(s)).collect::<Vec<_>>();
            json!({
                "sources": names(&data.sources),
                "held_out": names(&data.held_out),
                "documents": corpus.documents(),
                "tokens": corpus.tokens(),
                "digest": corpus.digest(),
            })
        };
        let mut all = one(self.data, &self.main);
        all["validation_tokens"] = validation_tokens.into();
        if !self.own.is_empty() {
            let own = self.own.iter().map(|(name, (data, corpus))| (name.to_string(), one(data, corpus)));
            all["stages"] = own.collect::<Map<_, _>>().into();
        }
        all
    }
}
