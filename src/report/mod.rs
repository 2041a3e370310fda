//! One page of HTML that tells a conversion: what was made, how it was trained, what it lost.
//!
//! It reads a finished export or the work folder of a run, loads nothing from anywhere and runs no script. Parts whose
//! numbers do not exist are left out.

mod page;
mod training;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::checkpoint::Headers;
use crate::convert::export::Manifest;
use crate::convert::inspect::Inspection;
use crate::convert::plan::{Section, count, heads, ranges};
use crate::convert::verify::{Report, Stage};
use crate::error::{Error, Kind, Result};
use crate::evaluate::position::{self, Bucket};
use crate::evaluate::recall::Suite;
use crate::plot::{Figure, Heat, Lines, Scale, Series, number};
use crate::progress::duration;
use crate::run_dir::{self, Record};
use crate::train::clock::Spent;

use page::{Page, figures, table, verbatim};

/// A folder that a report is made of.
pub struct Folder {
    pub dir: PathBuf,
    source: Source,
    /// Lines of JSON.
    log: String,
}

enum Source {
    Export { manifest: Box<Manifest>, inspection: Box<Inspection> },
    Run(Record),
}

/// What was measured for the report and is not in its folder.
#[derive(Default)]
pub struct Measured {
    pub positions: Vec<Bucket>,
    pub suite: Option<Suite>,
}

impl Folder {
    /// Opens an export, the work folder of a run, or the output folder that an unfinished run has yet to make.
    pub fn open(dir: &Path) -> Result<Folder> {
        if let Some(manifest) = Some(dir).filter(|dir| dir.is_dir()).map(Manifest::read).transpose()?.flatten() {
            let mut inspection = Inspection::of(&Headers::open(&dir.to_string_lossy())?)?;
            inspection.id = name(dir); // a page names no folder of the machine it was made on
            let path = dir.join("training.jsonl");
            let log = match std::fs::read_to_string(&path) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
                read => read.map_err(|e| Error::io("read", &path, e))?,
            };
            let source = Source::Export { manifest: Box::new(manifest), inspection: Box::new(inspection) };
            return Ok(Folder { dir: dir.into(), source, log });
        }
        let Some((dir, mut record)) = run_dir::look(dir)? else {
            let message = format!("`{}` is neither an export of margay nor the folder of a run", dir.display());
            return Err(Error::new(Kind::Output, message)
                .hint("give a folder that `margay convert` wrote, or the `--out` of an unfinished conversion"));
        };
        let log = std::mem::take(&mut record.log);
        Ok(Folder { dir, source: Source::Run(record), log })
    }

    /// What verification found, or so far the stages of an unfinished run.
    pub fn verification(&self) -> Result<Report> {
        let broken = |e: serde_json::Error| {
            Error::new(Kind::Output, format!("the results in `{}` cannot be read: {e}", self.dir.display()))
                .hint("written by another version?")
        };
        match &self.source {
            Source::Export { manifest, .. } => {
                manifest.verify.clone().map_or_else(|| Ok(Report::default()), serde_json::from_value).map_err(broken)
            }
            Source::Run(record) => {
                let measured =
                    record.done.iter().filter_map(|(key, value)| Some((key.strip_prefix("measure.")?, value)));
                let stage = |(name, value): (&str, &Value)| {
                    Ok(Stage { name: name.into(), quality: serde_json::from_value(value.clone())? })
                };
                let stages = measured.map(stage).collect::<serde_json::Result<_>>().map_err(broken)?;
                Ok(Report { stages, ..Report::default() })
            }
        }
    }

    /// The page. `verified` are the tables of [`verification`](Self::verification).
    pub fn html(&self, report: &Report, verified: &[Section], measured: &Measured) -> String {
        let mut page = Page::new(&self.title());
        self.summary(&mut page, report);
        let (quality, checks): (Vec<_>, Vec<_>) = verified.iter().partition(|s| s.title.starts_with("Quality"));
        page.part("quality", "Quality", tables(&quality));
        page.part("training", "Training", self.training());
        let stored = |key: &str| self.manifest().and_then(|m| m.verify.as_ref()?.get(key)).cloned();
        let suite = measured.suite.clone().or_else(|| serde_json::from_value(stored("recall_suite")?).ok());
        page.part("recall", "Recall", suite.map_or_else(String::new, |suite| recall(&suite)));
        let positions = match measured.positions.is_empty() {
            true => stored("positions").and_then(|p| serde_json::from_value(p).ok()).unwrap_or_default(),
            false => measured.positions.clone(),
        };
        page.part("position", "Perplexity by position", by_position(&positions));
        page.part("verification", "Verification", tables(&checks));
        page.part("attention", "Attention", stored("diagnostics").map_or_else(String::new, |d| diagnostics(&d)));
        page.part("memory", "Memory and speed", self.memory(report));
        page.part("plan", "Plan", self.plan());
        page.part("data", "Data", self.data());
        page.part("recipe", "Recipe", self.recipe());
        page.html()
    }

    fn manifest(&self) -> Option<&Manifest> {
        match &self.source {
            Source::Export { manifest, .. } => Some(manifest),
            Source::Run(_) => None,
        }
    }

    fn title(&self) -> String {
        match &self.source {
            Source::Export { manifest, .. } => {
                format!("{}, linearized", manifest.source.rsplit('/').next().unwrap_or_default())
            }
            Source::Run(_) => format!("Unfinished conversion {}", name(&self.dir).trim_end_matches(".margay")),
        }
    }

    fn summary(&self, page: &mut Page, report: &Report) {
        let mut facts = Vec::new();
        let teacher = report.stages.iter().find(|s| s.name == "teacher").map(|s| s.quality.perplexity);
        facts.extend(teacher.map(|p| ("perplexity of the teacher", format!("{p:.4}"))));
        if let Some(last) = report.stages.last().filter(|s| s.name != "teacher") {
            facts.push(("perplexity", format!("{:.4}", last.quality.perplexity)));
            let teacher = teacher.or(last.quality.teacher_perplexity);
            facts.extend(teacher.map(|t| ("to the teacher", format!("{:.3} ×", last.quality.perplexity / t))));
            facts.extend(last.quality.kl.map(|kl| ("KL to the teacher", format!("{kl:.4}"))));
            facts.extend(last.quality.top1_agreement.map(|s| ("same top token", format!("{:.1} %", 100.0 * s))));
        }
        let judged = report.checks.iter().filter_map(|c| c.passed);
        let (passed, all) = judged.fold((0, 0), |(passed, all), ok| (passed + ok as usize, all + 1));
        if all > 0 {
            facts.push(("checks passed", format!("{passed} of {all}")));
        }
        match &self.source {
            Source::Export { manifest, inspection } => {
                let revision = manifest.revision.as_ref().map(|r| format!(" at {r}")).unwrap_or_default();
                let how = inspection.linearization.as_ref().map_or("every layer kept".into(), |l| {
                    format!("{} in layers {}", l.mixer.design().name(), ranges(&l.layers))
                });
                page.lead(&format!("{}{revision}: {how}, by margay {}", manifest.source, manifest.margay));
                page.lead(&format!("Recipe {}. {}", manifest.recipe_origin, manifest.recipe.about));
                if manifest.seconds > 0.0 {
                    facts.push(("training time", duration(Duration::from_secs_f64(manifest.seconds))));
                }
            }
            Source::Run(record) => page.lead(&format!("margay {}, not exported yet", record.fingerprint.program)),
        }
        page.facts(&facts);
    }

    /// Outcome and curves of every stage in the order of the log.
    fn training(&self) -> String {
        let stages = training::stages(&self.log);
        let row = |stage: &training::Stage| {
            let outcome = self.manifest()?.stages.get(&stage.name)?;
            let mean = |key: &str| {
                let losses: Vec<f64> = outcome[key].as_array()?.iter().filter_map(Value::as_f64).collect();
                Some(number(losses.iter().sum::<f64>() / losses.len().max(1) as f64))
            };
            let (steps, tokens, seconds) =
                (outcome["steps"].as_u64()?, outcome["tokens"].as_u64()?, outcome["seconds"].as_f64()?);
            let rate = format!("{:.0}", tokens as f64 / seconds.max(1e-9));
            let took = duration(Duration::from_secs_f64(seconds));
            let spent: Spent = serde_json::from_value(outcome["spent"].clone()).unwrap_or_default();
            let figures = [count(tokens), took, rate, mean("first")?, mean("best")?, spent.shares()];
            Some([vec![stage.name.clone(), steps.to_string()], figures.to_vec()].concat())
        };
        let columns =
            heads(["stage", "steps", "tokens", "time", "tokens/s", "validation before", "best", "time went to"]);
        let outcomes = Section { title: "", columns, rows: stages.iter().filter_map(row).collect() };
        let curves: String = stages.iter().map(|stage| figures(&stage.figures())).collect();
        table(&outcomes) + &curves
    }

    fn memory(&self, report: &Report) -> String {
        let Source::Export { inspection, .. } = &self.source else { return String::new() };
        let curve = |name: &str, of: fn(&crate::convert::inspect::Size) -> usize| {
            Series::new(name, inspection.state.sizes.iter().map(|s| (s.context as f64, of(s) as f64 / 1e6)).collect())
        };
        let x = ("context in tokens", Scale::Log);
        let series = vec![curve("this model", |s| s.state), curve("softmax", |s| s.cache)];
        let mut all = vec![Lines { title: "Memory of one sequence in MB", x, y: Scale::Log, series }.figure()];
        if report.speeds.len() > 1 {
            let points = report.speeds.iter().map(|s| (s.context as f64, s.tokens_per_second)).collect();
            let series = vec![Series::new("tokens/s", points)];
            all.push(Lines { title: "Decoding in tokens/s", x, y: Scale::Linear, series }.figure());
        }
        figures(&all)
    }

    /// The model and the fate of its tensors.
    fn plan(&self) -> String {
        let Source::Export { manifest, inspection } = &self.source else { return String::new() };
        let model: String = inspection.sections().iter().map(table).collect();
        let total = |(fate, total): (&String, &Value)| {
            vec![
                fate.clone(),
                total["tensors"].to_string(),
                crate::convert::plan::bytes(total["bytes"].as_u64().unwrap_or(0)),
            ]
        };
        let fates = manifest.plan["fates"].as_object().into_iter().flatten().map(total).collect();
        let fates = Section { title: "Fates of the tensors", columns: heads(["fate", "tensors", "size"]), rows: fates };
        let dropped = |t: &Value| vec![text(&t["name"]), text(&t["note"])];
        let dropped = manifest.plan["dropped"].as_array().into_iter().flatten().map(dropped).collect();
        let dropped = Section { title: "Dropped tensors", columns: heads(["tensor", "why"]), rows: dropped };
        model + &table(&fates) + &table(&dropped)
    }

    fn data(&self) -> String {
        let Some(data) = self.manifest().and_then(|m| m.data.as_object()) else { return String::new() };
        let value = |value: &Value| match value {
            Value::Array(list) => list.iter().map(text).collect::<Vec<_>>().join(", "),
            value => text(value),
        };
        let rows = data.iter().map(|(key, v)| vec![key.replace('_', " "), value(v)]).collect();
        table(&Section { title: "", columns: Vec::new(), rows })
    }

    fn recipe(&self) -> String {
        match &self.source {
            Source::Export { manifest, .. } => verbatim(&manifest.recipe.to_toml()),
            Source::Run(record) => verbatim(&record.fingerprint.recipe),
        }
    }
}

fn tables(sections: &[&Section]) -> String {
    sections.iter().map(|section| table(section)).collect()
}

fn recall(suite: &Suite) -> String {
    let grid = |grid: &crate::evaluate::recall::Grid| figures(&grid.figures());
    let maps: String = suite.grids.iter().map(grid).collect();
    format!("<p class=\"quiet\">Share of answers that greedy decoding writes exactly; seed {}.</p>\n{maps}", suite.seed)
}

fn by_position(buckets: &[Bucket]) -> String {
    if buckets.is_empty() {
        return String::new();
    }
    let numbers = Section { title: "", ..position::section(buckets) };
    figures(&[position::figure(buckets)]) + &table(&numbers)
}

/// Heat maps layer by head of `{metric: {"layers": […], "values": [[per head] per layer]}}`.
fn diagnostics(metrics: &Value) -> String {
    let map = |(name, metric): (&String, &Value)| -> Option<Figure> {
        let rows: Vec<String> = metric["layers"].as_array()?.iter().map(text).collect();
        let values = |row: &Value| row.as_array().into_iter().flatten().map(Value::as_f64).collect::<Vec<_>>();
        let cells: Vec<Vec<Option<f64>>> = metric["values"].as_array()?.iter().map(values).collect();
        let heads = cells.iter().map(Vec::len).max().filter(|_| cells.len() == rows.len())?;
        let title = name.replace('_', " ");
        let columns = (0..heads).map(|h| h.to_string()).collect();
        let (scale, text) = (Scale::Linear, &number);
        Some(
            Heat {
                title: &title,
                row_label: "layer",
                column_label: "head",
                rows,
                columns,
                cells,
                scale,
                range: None,
                text,
            }
            .figure(),
        )
    };
    figures(&metrics.as_object().into_iter().flatten().filter_map(map).collect::<Vec<_>>())
}

/// The last part of a path.
fn name(dir: &Path) -> String {
    let absolute = std::path::absolute(dir).unwrap_or_else(|_| dir.into());
    absolute.file_name().unwrap_or(dir.as_os_str()).to_string_lossy().into_owned()
}

/// A value as people write it: text without quotes, null as nothing.
fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn diagnostics_are_maps_of_layer_and_head() {
        let html = diagnostics(&json!({
            "linear_share": { "layers": [0, 7], "values": [[0.1, 0.2], [0.3, 0.45]] },
            "effective_window": { "layers": [0, 7], "values": [[12.0, null], [40.0, 64.0]] },
            "not_a_grid": { "layers": [0], "values": [] },
        }));
        assert_eq!(html.matches("<svg").count(), 2);
        assert!(html.contains("linear share") && html.contains("layer 7, head 1: 0.45"), "{html}");
        assert_eq!(diagnostics(&json!({})), "");
    }

    #[test]
    fn a_run_is_told_as_far_as_it_came() {
        let fingerprint = run_dir::Fingerprint {
            recipe: "seed = 0 # <one>\n".into(),
            source: String::new(),
            data: String::new(),
            seed: 0,
            program: "0.1.0".into(),
        };
        let quality = json!({"tokens": 10, "perplexity": 4.5, "bits_per_byte": 0.7});
        let done = json!({"measure.teacher": quality}).as_object().cloned().unwrap();
        let log =
            "{\"stage\":\"transfer\",\"step\":1,\"loss\":2.0}\n{\"stage\":\"transfer\",\"step\":2,\"loss\":1.0}\n";
        let record = Record { fingerprint, done, log: log.into() };
        let folder = Folder { dir: "x/out.margay".into(), log: log.into(), source: Source::Run(record) };
        let report = folder.verification().unwrap();
        assert_eq!(report.stages[0].quality.perplexity, 4.5);
        let html = folder.html(&report, &[], &Measured::default());
        assert!(html.contains("<h1>Unfinished conversion out</h1>") && html.contains("4.5000"), "{html}");
        assert!(html.contains("id=\"training\"") && html.contains("seed = 0 # &lt;one&gt;"));
        assert!(!html.contains("id=\"plan\"") && !html.contains("id=\"recall\""));
    }
}
