//! `margay verify`, and the table that `convert` ends with too.

use std::path::PathBuf;

use clap::Args;
use margay::convert::export::Manifest;
use margay::convert::load::Model;
use margay::convert::plan::{Section, bytes, heads};
use margay::convert::trained;
use margay::convert::verify::{self, Against, Report, Stage};
use margay::data::Tokenizer;
use margay::error::{Error, Kind, Result};
use margay::evaluate::{Quality, Subject};
use margay::model::Net;
use serde_json::json;

use super::output::Output;
use super::{DeviceArg, TextArgs};

#[derive(Args)]
pub struct Verify {
    /// An exported folder
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// The model it was made from: compares kept tensors and, with --data, quality
    #[arg(long, value_name = "MODEL")]
    teacher: Option<String>,
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    device: DeviceArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Verify {
    pub fn run(&self, out: &Output) -> Result<()> {
        let manifest = Manifest::read(&self.dir)?.ok_or_else(|| self.foreign())?;
        let device = self.device.open()?;
        let recipe = &manifest.recipe;
        let model = Model::open(&self.dir.to_string_lossy(), out)?;
        let architecture = model.architecture();
        let rows = match self.text.data.is_empty() {
            true => None,
            false => {
                let tokenizer = Tokenizer::open(model.checkpoint.dir())?;
                let positions = architecture.max_positions;
                self.text.rows(&recipe.data, &tokenizer, positions, recipe.verify.tokens, out)?
            }
        };

        let teacher = self.teacher.as_ref().map(|id| Model::open(id, out)).transpose()?;
        let weights =
            teacher.as_ref().map(|t| Ok::<_, Error>((t.decoder(&device, out)?, t.net(&device)?))).transpose()?;
        let converted = model.description.linearization.as_ref().map_or(&[][..], |l| &l.layers);
        let changed = trained::merged(recipe, |name| manifest.stages.contains_key(name), architecture, converted);
        let mut merged: Vec<String> = changed.keys().map(|role| model.description.name(*role)).collect();
        merged.dedup();
        let against = Against {
            student: None,
            teacher: weights.as_ref().map(|(decoder, net): &(_, Net)| Subject { decoder, net }),
            source: teacher.as_ref().map(|t| &t.checkpoint),
            merged: &merged,
            valid: rows.as_ref(),
            stages: Vec::new(),
            contexts: &recipe.verify.contexts,
        };
        let report = verify::verify(&self.dir, &manifest, against, &device, out)?;
        print(&report, self.json, out)?;
        if report.passed() { Ok(()) } else { Err(verify::failure(&report, &self.dir)) }
    }

    fn foreign(&self) -> Error {
        let dir = self.dir.display();
        if !self.dir.is_dir() {
            return Error::new(Kind::Checkpoint, format!("there is no folder `{dir}`"))
                .hint("give a folder that `margay convert` wrote");
        }
        Error::new(Kind::Checkpoint, format!("`{dir}` is not an export of margay: it has no `{}`", Manifest::FILE))
            .hint("`margay inspect` shows what a model is, `margay eval` measures any model")
    }
}

/// Prints a report to stdout.
pub fn print(report: &Report, as_json: bool, out: &Output) -> Result<()> {
    if as_json {
        let mut value = json!(report);
        value["passed"] = json!(report.passed());
        return out.json(&value);
    }
    out.tables(&sections(report))
}

/// The tables of a report.
pub fn sections(report: &Report) -> Vec<Section> {
    let mut sections = Vec::new();
    if !report.stages.is_empty() {
        sections.push(quality(&report.stages));
    }
    let check = |c: &verify::Check| {
        let verdict = match c.passed {
            Some(true) => "ok",
            Some(false) => "FAILED",
            None => "–",
        };
        vec![c.name.clone(), c.value.clone(), c.limit.clone(), verdict.into()]
    };
    let rows = report.checks.iter().map(check).collect();
    sections.push(Section { title: "Checks", columns: heads(["check", "found", "wanted", ""]), rows });
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    if report.linear_shares.iter().any(Option::is_some) {
        let row = |(layer, share): (usize, &Option<f64>)| {
            let parts = match share {
                Some(linear) => [percent(*linear), percent(1.0 - linear)],
                None => ["–".into(), "softmax".into()],
            };
            [vec![layer.to_string()], parts.to_vec()].concat()
        };
        let rows = report.linear_shares.iter().enumerate().map(row).collect();
        sections.push(Section { title: "Share of the attention", columns: heads(["layer", "linear", "window"]), rows });
    }
    if !report.speeds.is_empty() {
        let row = |s: &verify::Speed| {
            let (state, cache) = (bytes(s.state_bytes as u64), bytes(s.teacher_cache_bytes as u64));
            vec![s.context.to_string(), format!("{:.0}", s.tokens_per_second), state, cache]
        };
        let columns = heads(["context", "tokens/s", "state", "KV cache of the teacher"]);
        sections.push(Section { title: "Decoding", columns, rows: report.speeds.iter().map(row).collect() });
    }
    sections
}

/// One row for each form of the model, the teacher first.
fn quality(stages: &[Stage]) -> Section {
    let of_teacher = stages.iter().find(|s| s.name == "teacher").map(|s| s.quality.perplexity);
    let told = stages.iter().find_map(|s| s.quality.teacher_perplexity);
    let teacher = of_teacher.or(told);
    let dash = || "–".to_string();
    let row = |stage: &Stage| {
        let q: &Quality = &stage.quality;
        vec![
            stage.name.clone(),
            format!("{:.4}", q.perplexity),
            teacher.map_or_else(dash, |t| format!("{:.3} ×", q.perplexity / t)),
            format!("{:.4}", q.bits_per_byte),
            q.kl.map_or_else(dash, |kl| format!("{kl:.4}")),
            q.top1_agreement.map_or_else(dash, |share| format!("{:.1} %", 100.0 * share)),
        ]
    };
    let mut rows: Vec<_> = stages.iter().map(row).collect();
    if let (None, Some(perplexity)) = (of_teacher, told) {
        let known = vec!["teacher".into(), format!("{perplexity:.4}"), "1.000 ×".into()];
        rows.insert(0, [known, vec![dash(), dash(), dash()]].concat());
    }
    let columns = heads(["stage", "perplexity", "to teacher", "bits/byte", "KL to teacher", "same top token"]);
    Section { title: "Quality on the validation text", columns, rows }
}
