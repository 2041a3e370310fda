//! `margay eval`: perplexity, agreement with a teacher, and recall of any model.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use margay::convert::load::Model;
use margay::convert::plan::{Section, heads};
use margay::data::{Tokenizer, read_recall};
use margay::error::{Error, Kind, Result};
use margay::evaluate::{Quality, Recall, Subject, quality, recall};
use margay::recipe::{Data, Join};
use serde_json::{Map, Value, json};

use super::output::Output;
use super::{DeviceArg, TextArgs};

#[derive(Args)]
#[command(group(clap::ArgGroup::new("task").args(["data", "recall"]).required(true).multiple(true)))]
pub struct Eval {
    /// A local Hugging Face folder, converted or not, or a hub id `org/name[@revision]`
    #[arg(value_name = "MODEL")]
    model: String,
    #[command(flatten)]
    text: TextArgs,
    /// Compare with this model: KL divergence and how often both find the same token most likely
    #[arg(long, value_name = "MODEL", requires = "data")]
    teacher: Option<String>,
    /// JSON lines with `pairs`, `prompt`, `answer` and `stop`: exact answers by number of pairs
    #[arg(long, value_name = "FILE")]
    recall: Option<PathBuf>,
    /// Field of JSONL and Parquet rows that holds the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    field: String,
    /// Whether BOS begins each document; auto does what the tokenizer does
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto")]
    bos: When,
    /// Whether EOS ends each document; auto adds it where no BOS separates documents
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto")]
    eos: When,
    #[command(flatten)]
    device: DeviceArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum When {
    Auto,
    Always,
    Never,
}

impl From<When> for Join {
    fn from(when: When) -> Join {
        match when {
            When::Auto => Join::Auto,
            When::Always => Join::Always,
            When::Never => Join::Never,
        }
    }
}

impl Eval {
    pub fn run(&self, out: &Output) -> Result<()> {
        let device = self.device.open()?;
        let items = self.recall.as_deref().map(read_recall).transpose()?;
        let model = Model::open(&self.model, out)?;
        let tokenizer = Tokenizer::open(model.checkpoint.dir())?;
        tokenizer.check_vocab(model.architecture().vocab)?;
        let settings =
            Data { field: self.field.clone(), bos: self.bos.into(), eos: self.eos.into(), ..Data::default() };
        let rows = self.text.rows(&settings, &tokenizer, model.architecture().max_positions, usize::MAX, out)?;
        let teacher = self.teacher.as_ref().map(|id| Model::open(id, out)).transpose()?;
        if let Some(teacher) = &teacher {
            let (own, other) = (model.architecture().vocab, teacher.architecture().vocab);
            if own != other {
                let message = format!("`{}` has {own} tokens and its teacher {other}", self.model);
                return Err(Error::new(Kind::Checkpoint, message).hint("a teacher shares the vocabulary"));
            }
        }

        let weights = |m: &Model| Ok::<_, Error>((m.decoder(&device, out)?, m.net(&device)?));
        let (decoder, net) = weights(&model)?;
        let teacher = teacher.as_ref().map(weights).transpose()?;
        let subject = Subject { decoder: &decoder, net: &net };
        let teacher = teacher.as_ref().map(|(decoder, net)| Subject { decoder, net });
        let found = rows.map(|rows| quality(subject, teacher, &rows, out)).transpose()?;
        let answers = items.map(|items| recall(subject, &tokenizer, &items, out)).transpose()?;
        match self.json {
            true => out.json(&as_json(found.as_ref(), answers.as_ref())),
            false => out.tables(&sections(found.as_ref(), answers.as_ref())),
        }
    }
}

fn accuracy(right: usize, asked: usize) -> f64 {
    right as f64 / asked.max(1) as f64
}

fn as_json(quality: Option<&Quality>, recall: Option<&Recall>) -> Value {
    let mut value = quality.map_or_else(|| json!({}), |q| json!(q));
    if let Some(recall) = recall {
        let entry = |(pairs, (right, asked)): (&usize, &(usize, usize))| {
            (pairs.to_string(), json!({ "right": right, "asked": asked, "accuracy": accuracy(*right, *asked) }))
        };
        value["recall"] = recall.by_pairs.iter().map(entry).collect::<Map<_, _>>().into();
    }
    value
}

fn sections(quality: Option<&Quality>, recall: Option<&Recall>) -> Vec<Section> {
    let mut sections = Vec::new();
    if let Some(q) = quality {
        let mut rows = vec![
            ("tokens", q.tokens.to_string()),
            ("perplexity", format!("{:.4}", q.perplexity)),
            ("bits per byte", format!("{:.4}", q.bits_per_byte)),
        ];
        rows.extend(q.teacher_perplexity.map(|p| ("perplexity of the teacher", format!("{p:.4}"))));
        rows.extend(q.kl.map(|kl| ("KL to the teacher", format!("{kl:.4} nats per token"))));
        rows.extend(q.top1_agreement.map(|share| ("same top token", format!("{:.1} %", 100.0 * share))));
        let rows = rows.into_iter().map(|(name, value)| vec![name.to_string(), value]).collect();
        sections.push(Section { title: "Quality", columns: Vec::new(), rows });
    }
    if let Some(recall) = recall {
        let row = |pairs: String, right: usize, asked: usize| {
            vec![pairs, right.to_string(), asked.to_string(), format!("{:.1} %", 100.0 * accuracy(right, asked))]
        };
        let mut rows: Vec<_> = recall.by_pairs.iter().map(|(n, (r, a))| row(n.to_string(), *r, *a)).collect();
        let (right, asked) = recall.by_pairs.values().fold((0, 0), |(r, a), (right, asked)| (r + right, a + asked));
        rows.push(row("all".into(), right, asked));
        sections.push(Section { title: "Recall", columns: heads(["pairs", "right", "asked", "accuracy"]), rows });
    }
    sections
}
