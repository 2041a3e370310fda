//! `margay compare`: the first stage of several recipes beside each other.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use margay::checkpoint::writer::write_atomic;
use margay::convert::compare::{self, Comparison, Options, Variant};
use margay::convert::plan::{Section, bytes, count, heads};
use margay::error::Result;
use margay::plot::{self, number};
use margay::progress::{Progress, duration};
use margay::run_dir::refuse_taken;
use serde_json::json;

use super::output::Output;
use super::{Changes, DeviceArg, announce, stop_on_ctrl_c};

#[derive(Args)]
pub struct Compare {
    /// A local Hugging Face folder, or a hub id `org/name[@revision]`
    #[arg(value_name = "MODEL")]
    model: String,
    /// Recipes by name or TOML file, separated by commas; text, sequences and steps are the first one's
    #[arg(long, value_name = "RECIPE,..", value_delimiter = ',', required = true)]
    recipes: Vec<String>,
    /// Training tokens, instead of the first recipe's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    tokens: Option<u64>,
    #[command(flatten)]
    changes: Changes,
    #[command(flatten)]
    device: DeviceArg,
    /// Write compare.json and compare.svg into this folder, which must not exist yet
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Throw away the progress of an unfinished comparison
    #[arg(long, requires = "out")]
    restart: bool,
    /// Draw relative error and share of the linear branch by layer
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Compare {
    pub fn run(&self, out: &'static Output) -> Result<()> {
        self.out.as_deref().map_or(Ok(()), refuse_taken)?;
        let recipes = self.recipes.iter().map(|name| self.changes.load(name)).collect::<Result<_>>()?;
        let device = self.device.open()?;
        if let Some(dir) = self.out.as_deref().filter(|_| !self.restart) {
            announce(dir, out);
        }
        let (model, dir) = (self.model.clone(), self.out.clone());
        let options = Options { model, recipes, tokens: self.tokens, out: dir, restart: self.restart, device };
        stop_on_ctrl_c(out, "stopping…")?;
        let found = compare::compare(&options, out)?;

        if let Some(path) = &self.plot {
            write_atomic(path, plot::sheet(&found.figures()).as_bytes())?;
        }
        match self.json {
            true => out.json(&json!(found))?,
            false => out.tables(&sections(&found))?,
        }
        if !found.spent.shares().is_empty() {
            let took = duration(Duration::from_secs_f64(found.spent.total()));
            out.say(&format!("\n{} tokens in {took}: {}", count(found.tokens), found.spent.shares()));
        }
        Ok(())
    }
}

/// What each variant learnt, what it costs, and its layers.
fn sections(found: &Comparison) -> Vec<Section> {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let learnt = |v: &Variant| {
        vec![
            v.name.clone(),
            v.mixer.to_string(),
            count(v.trainable),
            number(v.loss.first),
            number(v.loss.best),
            percent(v.relative_error.first),
            percent(v.relative_error.best),
            percent(v.linear_share),
        ]
    };
    let columns = heads(["recipe", "mixer", "trained", "loss before", "best", "error before", "best", "linear share"]);
    let learnt = Section { title: "Validation", columns, rows: found.variants.iter().map(learnt).collect() };

    let dash = || "–".to_string();
    let cost = |v: &Variant| {
        let state = v.state_bytes.map(|size| bytes(size as u64));
        let own = match v.tokens_per_second {
            Some(_) => duration(Duration::from_secs_f64(v.seconds)),
            None => dash(),
        };
        let (rate, ratio) = (v.tokens_per_second, v.perplexity / found.teacher_perplexity);
        let quality = [own, rate.map_or_else(dash, |r| format!("{r:.0}")), format!("{:.4}", v.perplexity)];
        [vec![v.name.clone()], state.to_vec(), quality.to_vec(), vec![format!("{ratio:.3} ×")]].concat()
    };
    let mut rows: Vec<_> = found.variants.iter().map(cost).collect();
    let teacher = duration(Duration::from_secs_f64(found.spent.teacher));
    let perplexity = format!("{:.4}", found.teacher_perplexity);
    rows.push(vec!["teacher".into(), dash(), dash(), teacher, dash(), perplexity, "1.000 ×".into()]);
    let columns = heads(["recipe", "state at 1k", "at 32k", "own time", "tokens/s alone", "perplexity", "to teacher"]);
    let cost = Section { title: "Cost and quality", columns, rows };

    let mut layers: Vec<usize> = found.variants.iter().flat_map(|v| v.layers.iter().map(|l| l.layer)).collect();
    layers.sort_unstable();
    layers.dedup();
    let row = |layer: &usize| {
        let of = |v: &Variant| {
            let here = v.layers.iter().find(|l| l.layer == *layer);
            here.map_or_else(dash, |l| percent(l.relative_error.best))
        };
        std::iter::once(layer.to_string()).chain(found.variants.iter().map(of)).collect()
    };
    let names = found.variants.iter().map(|v| v.name.clone());
    let columns = std::iter::once("layer".to_string()).chain(names).collect();
    let by_layer = Section { title: "Relative error by layer", columns, rows: layers.iter().map(row).collect() };
    vec![learnt, cost, by_layer]
}
