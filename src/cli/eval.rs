//! `margay eval`: perplexity, agreement with a teacher, recall and multiple choice of any model.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use margay::checkpoint::writer::write_atomic;
use margay::convert::load::Model;
use margay::convert::plan::{Section, heads};
use margay::data::{ChoiceItem, Tokenizer, read_choices, read_recall};
use margay::error::{Error, Kind, Result};
use margay::evaluate::choice::{Choices, choices};
use margay::evaluate::position::{self, Bucket, by_position};
use margay::evaluate::recall::{Suite, suite};
use margay::evaluate::{Quality, Recall, Subject, quality, recall};
use margay::plot::{self, Figure};
use margay::progress::Progress;
use margay::recipe::{Data, Join};
use serde_json::{Map, Value, json};

use super::output::Output;
use super::{DeviceArg, SuiteArgs, TextArgs};

#[derive(Args)]
#[command(group(clap::ArgGroup::new("task").args(["data", "recall", "suite"]).required(true).multiple(true)))]
#[command(group(clap::ArgGroup::new("compared").args(["data", "suite"]).multiple(true)))]
pub struct Eval {
    /// A local Hugging Face folder, converted or not, or a hub id `org/name[@revision]`
    #[arg(value_name = "MODEL")]
    model: String,
    /// Questions of `--suite mc`: JSON lines with `context`, `choices` and `gold`
    #[arg(value_name = "FILE", requires = "suite")]
    questions: Option<PathBuf>,
    #[command(flatten)]
    text: TextArgs,
    /// Compare with this model: KL divergence and how often both find the same token most likely
    #[arg(long, value_name = "MODEL", requires = "compared")]
    teacher: Option<String>,
    /// Perplexity by position too, in buckets of doubling length
    #[arg(long, requires = "data")]
    by_position: bool,
    /// JSON lines with `pairs`, `prompt`, `answer` and `stop`: exact answers by number of pairs
    #[arg(long, value_name = "FILE")]
    recall: Option<PathBuf>,
    /// Tests made for any model
    #[arg(long, value_enum, value_name = "SUITE")]
    suite: Option<Tests>,
    #[command(flatten)]
    made: SuiteArgs,
    /// Answered questions before each: the first N of the file, or of `--shots`
    #[arg(long, value_name = "N", default_value_t = 0)]
    few_shot: usize,
    /// Take the answered questions from this file
    #[arg(long, value_name = "FILE", requires = "few_shot")]
    shots: Option<PathBuf>,
    /// Draw what was measured by position and by the recall suite
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Field of JSONL and Parquet rows that holds the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    field: String,
    /// Whether BOS begins each document of `--data`; auto does what the tokenizer does, as all prompts here do
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

/// Which tests are made.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Tests {
    /// Associative recall, passkey, copying, induction: exact answers to generated prompts
    Recall,
    /// Multiple choice by log-likelihood
    Mc,
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

/// What was measured.
#[derive(Default)]
struct Found {
    quality: Option<Quality>,
    positions: Vec<Bucket>,
    recall: Option<Recall>,
    suite: Option<Suite>,
    choices: Option<Choices>,
}

impl Eval {
    pub fn run(&self, out: &Output) -> Result<()> {
        let device = self.device.open()?;
        let items = self.recall.as_deref().map(read_recall).transpose()?;
        let questions = self.questions()?;
        let model = Model::open(&self.model, out)?;
        let positions = model.architecture().max_positions;
        let tokenizer = Tokenizer::open(model.checkpoint.dir())?;
        tokenizer.check_vocab(model.architecture().vocab)?;
        let settings =
            Data { field: self.field.clone(), bos: self.bos.into(), eos: self.eos.into(), ..Data::default() };
        let rows = self.text.rows(&settings, &tokenizer, positions, usize::MAX, out)?;
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
        let mut found = Found::default();
        match &rows {
            Some(rows) if self.by_position => {
                let (quality, buckets) = by_position(subject, teacher, rows, out)?;
                (found.quality, found.positions) = (Some(quality), buckets);
            }
            Some(rows) => found.quality = Some(quality(subject, teacher, rows, out)?),
            None => {}
        }
        found.recall = items.map(|items| recall(subject, &tokenizer, &items, out)).transpose()?;
        if self.suite == Some(Tests::Recall) {
            let settings = self.made.settings(self.text.row_len(positions).min(positions));
            found.suite = Some(suite(subject, teacher, &tokenizer, settings, out)?);
        }
        if let Some((items, shots)) = &questions {
            let longest = self.text.seq_len.map_or(positions, |n| n as usize).min(positions);
            let answers = choices(subject, teacher, &tokenizer, items, shots, longest, out)?;
            answers.warning().iter().for_each(|warning| out.warn(warning));
            found.choices = Some(answers);
        }
        if let Some(path) = &self.plot {
            found.draw(path)?;
        }
        match self.json {
            true => out.json(&found.json()),
            false => out.tables(&found.sections()),
        }
    }

    /// Questions and answered ones to put before them, for `--suite mc`.
    fn questions(&self) -> Result<Option<(Vec<ChoiceItem>, Vec<ChoiceItem>)>> {
        let path = match (self.suite, &self.questions) {
            (Some(Tests::Mc), Some(path)) => path,
            (Some(Tests::Mc), None) => {
                return Err(Error::new(Kind::Usage, "`--suite mc` needs a file of questions")
                    .hint("`margay eval MODEL --suite mc FILE.jsonl`"));
            }
            (_, Some(path)) => {
                return Err(Error::new(Kind::Usage, format!("`{}` is not needed here", path.display()))
                    .hint("only `--suite mc` reads a file of questions"));
            }
            (_, None) => return Ok(None),
        };
        let mut items = read_choices(path)?;
        let n = self.few_shot;
        let (from, mut shots) = match &self.shots {
            Some(path) => (path, read_choices(path)?),
            None if n < items.len() => (path, items.drain(..n).collect()),
            None => (path, Vec::new()),
        };
        if shots.len() < n {
            let message = format!("`{}` has too few questions for `--few-shot {n}`", from.display());
            return Err(Error::new(Kind::Data, message).hint("lower it, or name another file with `--shots`"));
        }
        shots.truncate(n);
        Ok(Some((items, shots)))
    }
}

impl Found {
    fn json(&self) -> Value {
        let mut value = self.quality.as_ref().map_or_else(|| json!({}), |q| json!(q));
        if !self.positions.is_empty() {
            value["positions"] = json!(self.positions);
        }
        if let Some(recall) = &self.recall {
            let entry = |(pairs, (right, asked)): (&usize, &(usize, usize))| {
                (pairs.to_string(), json!({ "right": right, "asked": asked, "accuracy": accuracy(*right, *asked) }))
            };
            value["recall"] = recall.by_pairs.iter().map(entry).collect::<Map<_, _>>().into();
        }
        if let Some(suite) = &self.suite {
            value["recall_suite"] = json!(suite);
        }
        if let Some(choices) = &self.choices {
            value["choices"] = json!(choices);
            value["choices"]["collapsed"] = json!(choices.collapsed(&choices.model));
        }
        value
    }

    fn sections(&self) -> Vec<Section> {
        let mut sections: Vec<Section> = self.quality.as_ref().map(quality_section).into_iter().collect();
        if !self.positions.is_empty() {
            sections.push(position::section(&self.positions));
        }
        sections.extend(self.recall.as_ref().map(recall_section));
        sections.extend(self.suite.iter().flat_map(|s| &s.grids).map(|grid| grid.section()));
        sections.extend(self.choices.iter().flat_map(Choices::sections));
        sections
    }

    fn draw(&self, path: &Path) -> Result<()> {
        let mut figures: Vec<Figure> = Vec::new();
        if !self.positions.is_empty() {
            figures.push(position::figure(&self.positions));
        }
        figures.extend(self.suite.iter().flat_map(|s| &s.grids).flat_map(|grid| grid.figures()));
        if figures.is_empty() {
            return Err(Error::new(Kind::Usage, "there is nothing to draw for `--plot`")
                .hint("measure with `--by-position` or `--suite recall`"));
        }
        write_atomic(path, plot::sheet(&figures).as_bytes())
    }
}

fn accuracy(right: usize, asked: usize) -> f64 {
    right as f64 / asked.max(1) as f64
}

fn quality_section(q: &Quality) -> Section {
    let mut rows = vec![
        ("tokens", q.tokens.to_string()),
        ("perplexity", format!("{:.4}", q.perplexity)),
        ("bits per byte", format!("{:.4}", q.bits_per_byte)),
    ];
    rows.extend(q.teacher_perplexity.map(|p| ("perplexity of the teacher", format!("{p:.4}"))));
    rows.extend(q.kl.map(|kl| ("KL to the teacher", format!("{kl:.4} nats per token"))));
    rows.extend(q.top1_agreement.map(|share| ("same top token", format!("{:.1} %", 100.0 * share))));
    let rows = rows.into_iter().map(|(name, value)| vec![name.to_string(), value]).collect();
    Section { title: "Quality", columns: Vec::new(), rows }
}

fn recall_section(recall: &Recall) -> Section {
    let row = |pairs: String, right: usize, asked: usize| {
        vec![pairs, right.to_string(), asked.to_string(), format!("{:.1} %", 100.0 * accuracy(right, asked))]
    };
    let mut rows: Vec<_> = recall.by_pairs.iter().map(|(n, (r, a))| row(n.to_string(), *r, *a)).collect();
    let (right, asked) = recall.by_pairs.values().fold((0, 0), |(r, a), (right, asked)| (r + right, a + asked));
    rows.push(row("all".into(), right, asked));
    Section { title: "Recall", columns: heads(["pairs", "right", "asked", "accuracy"]), rows }
}
