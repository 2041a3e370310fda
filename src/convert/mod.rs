//! A conversion, readable top to bottom: load → plan → swap → the recipe's training stages → merge → export → verify.
//! Where the recipe asks for it, the layers that stay softmax are selected between the stages.

pub mod card;
pub mod compare;
pub mod export;
pub mod inspect;
pub mod liger;
pub mod load;
pub mod merge;
pub mod plan;
pub mod recover;
pub mod select;
pub mod start;
pub mod swap;
mod texts;
pub mod trained;
pub mod transfer;
pub mod verify;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Device;
use serde_json::json;

use crate::checkpoint::writer::write_atomic;
use crate::data::Split;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Kind, Result};
use crate::evaluate::{Quality, Subject, quality};
use crate::model::{Decoder, Net};
use crate::progress::Progress;
use crate::recipe::{self, Layers, Loaded, Recipe};
use crate::run_dir::{Fingerprint, RunDir, refuse_taken};
use crate::train::{self, Outcome, Settings, Task};

use export::Manifest;
use export::adapter::Adapter;
use load::{Linearization, Model};
use plan::Plan;
use recover::Recover;
use select::{Ranking, Selection};
use texts::Texts;
use transfer::{Student, Transfer};
use verify::{Against, Report, Stage};

/// What to convert, how, and where to.
pub struct Options {
    /// Folder or hub id.
    pub model: String,
    pub recipe: Loaded,
    pub out: PathBuf,
    pub device: Device,
    /// Stop after this stage and keep the progress.
    pub until: Option<Until>,
    /// Forget an unfinished run.
    pub restart: bool,
    /// Write TensorBoard event files here too.
    pub tensorboard: Option<PathBuf>,
    /// [Time](train::clock) a GPU too.
    pub timed: bool,
}

/// What to stop after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Until {
    Plan,
    Swap,
    /// A training stage by its name in the recipe.
    Stage(String),
    Merge,
    Export,
}

impl From<&str> for Until {
    fn from(name: &str) -> Until {
        match name {
            "plan" => Until::Plan,
            "swap" => Until::Swap,
            "merge" => Until::Merge,
            "export" => Until::Export,
            stage => Until::Stage(stage.into()),
        }
    }
}

/// What a conversion came to.
pub struct Converted {
    pub plan: Plan,
    /// `None` where `until` stopped it before verification.
    pub report: Option<Report>,
    pub seconds: f64,
}

/// Converts a model. The same call continues an unfinished run; a finished one is refused.
pub fn convert(options: &Options, progress: &dyn Progress) -> Result<Converted> {
    let started = Instant::now();
    let (device, out) = (&options.device, options.out.as_path());
    refuse_taken(out)?;
    if let Some(Until::Stage(name)) = &options.until
        && !options.recipe.recipe.stages.contains(name)
    {
        let known = options.recipe.recipe.stages.join(", ");
        return Err(Error::new(Kind::Usage, format!("there is no stage `{name}` to stop after"))
            .hint(format!("stages of `{}`: plan, swap, {known}, merge, export", options.recipe.origin)));
    }
    if options.until != Some(Until::Plan) {
        require_text(&options.recipe)?;
    }
    let model = Model::open(&options.model, progress)?;
    let recipe = &options.recipe.recipe.within(model.architecture().max_positions);
    let headers = model.checkpoint.headers();
    let early = Plan::of(headers, &options.recipe, device.into(), None)?;
    let stopped = |plan: Plan, seconds: f64| Ok(Converted { plan, report: None, seconds });
    if options.until == Some(Until::Plan) {
        return stopped(early, started.elapsed().as_secs_f64());
    }

    let tokenizer = Tokenizer::open(model.checkpoint.dir())?;
    tokenizer.check_vocab(model.architecture().vocab)?;
    let running: Vec<_> = recipe.in_order().filter(|(name, _)| early.stage(name).is_some()).collect();
    let texts = Texts::prepare(recipe, &running, &tokenizer, early.row_len, progress)?;
    let mut train_tokens = BTreeMap::new();
    for (name, _) in &running {
        train_tokens.insert(name.to_string(), (texts.of(name).1.train(early.row_len)?.len() * early.row_len) as u64);
    }
    let mut plan = Plan::of(headers, &options.recipe, device.into(), Some(&train_tokens))?;
    for warning in &plan.warnings {
        progress.warn(warning);
    }

    let best = recipe.layers.best();
    let layers = model.architecture().layers;
    let identity = select::identity(&model.checkpoint)?;
    let named = best.map(|best| Ranking::named(best, &identity, &recipe.mixer, layers)).transpose()?.flatten();

    let fingerprint = Fingerprint {
        recipe: recipe.to_toml(),
        source: headers.digest(),
        data: texts.digest(),
        seed: recipe.seed,
        program: env!("CARGO_PKG_VERSION").into(),
    };
    let mut run = RunDir::open(out, &fingerprint, options.restart)?;
    if let Some(dir) = &options.tensorboard {
        run.tensorboard(dir)?;
    }
    let mut decoder = model.decoder(device, progress)?;
    let teacher = Net::teacher(model.architecture());
    let design = recipe.mixer.design();
    let mut student = swap::swap(model.architecture(), design, &plan.layers.converted, recipe.seed, device)?;

    start::measure(&decoder, &teacher, &student, design, &texts.main.train(early.row_len)?, recipe.seed)?;

    let valid = texts.main.valid(early.row_len)?.limit(recipe.verify.tokens);
    let mut stages = vec![measure("teacher", &decoder, &teacher, None, &valid, &mut run, progress)?];
    if !plan.layers.converted.is_empty() {
        stages.push(measure("swapped", &decoder, &student, Some(&teacher), &valid, &mut run, progress)?);
    }
    if options.until == Some(Until::Swap) {
        return stopped(plan, started.elapsed().as_secs_f64());
    }

    let mut outcomes: Vec<(&str, Outcome)> = Vec::new();
    let order: Vec<_> = recipe.in_order().collect();
    let mut ranking = None;
    for place in 0..=order.len() {
        // Layers are chosen behind the last stage that trains them one by one.
        let whole = !order[place..].iter().any(|(_, stage)| stage.loss.layer_wise());
        if let (Some(best), None, true) = (best, &ranking, whole) {
            let selection = Selection {
                student: Subject { decoder: &decoder, net: &student },
                teacher: Subject { decoder: &decoder, net: &teacher },
                best,
                mixer: &recipe.mixer,
                model: identity.clone(),
                named: named.clone(),
                losses: outcomes.last().map_or(&[], |(_, outcome)| &outcome.best),
                train: &texts.main.train(early.row_len)?,
                valid: &texts.main.valid(early.row_len)?.limit(recipe.data.validation_tokens),
                micro_batch: plan::micro_batch(usize::MAX, 0, early.row_len, device.into()),
                memory: plan.stages.iter().map(|s| s.memory.total).max().unwrap_or(plan.verify.total),
                seed: recipe.seed.wrapping_add(order.len() as u64), // other rows than the stages begin with
            };
            let selected = selection.run(&mut run, progress)?;
            let count = plan.layers.chosen.unwrap_or_default();
            let kept = selected.ranking.best(count);
            selected.ranking.lines(count).iter().for_each(|line| progress.say(line));
            // What follows is the conversion of a recipe that names these layers.
            let named = Recipe { layers: Layers::keep(kept.clone()), ..options.recipe.recipe.clone() };
            let loaded = Loaded { recipe: named, ..options.recipe.clone() };
            plan = Plan::of(headers, &loaded, device.into(), Some(&train_tokens))?;
            plan.hybrid().iter().for_each(|line| progress.say(line));
            select::restore(&mut student, model.architecture(), &kept);
            stages.push(measure("selected", &decoder, &student, Some(&teacher), &valid, &mut run, progress)?);
            if selected.outcome.tokens > 0 {
                outcomes.push(("select", selected.outcome));
            }
            ranking = Some(selected.ranking);
        }
        let Some((name, stage)) = order.get(place) else { break };
        if let Some(planned) = plan.stage(name) {
            // Stages differ in their seeds: other rows, other order, another start of what is new.
            let seed = stage.seed.unwrap_or(recipe.seed.wrapping_add(place as u64));
            trained::prepare(&mut student, stage, model.architecture(), seed, device)?;
            let micro_batch = planned.micro_batch;
            let mut task: Box<dyn Task> = match stage.loss.layer_wise() {
                true => {
                    let alone = Student { name, net: &student, stage };
                    Box::new(Transfer::new(&decoder, &teacher, &[alone], micro_batch, seed))
                }
                false => {
                    let memory = (micro_batch, planned.kept);
                    Box::new(Recover::new(&decoder, &teacher, &student, stage, memory, seed))
                }
            };
            let training = Training { planned, groups: &[stage], seed, timed: options.timed };
            outcomes.push((*name, training.run(task.as_mut(), &texts, Some(&run), progress)?));
            drop(task);
            stages.push(measure(name, &decoder, &student, Some(&teacher), &valid, &mut run, progress)?);
        }
        if options.until == Some(Until::Stage(name.to_string())) {
            return stopped(plan, started.elapsed().as_secs_f64());
        }
    }
    let adapter = student.adapters.as_ref().map(|a| Adapter::of(a, &decoder, &model.description)).transpose()?;
    // The teacher shares the weights that merging changes: from here on it is read again where it is needed.
    let (merged, merged_names) = merge::merge(&mut decoder, &mut student, &model, &valid)?;
    if merged.weights > 0 {
        progress.say(&format!(
            "merged into {} tensors; largest change of a logit {:.1e} (largest logit {:.1})",
            merged.weights, merged.max_logit_difference, merged.max_logit
        ));
    }
    if options.until == Some(Until::Merge) {
        return stopped(plan, started.elapsed().as_secs_f64());
    }

    let linearization = (!plan.layers.converted.is_empty()).then(|| Linearization {
        format_version: Linearization::FORMAT,
        base_model_type: headers.config.model_type().unwrap_or_default().to_string(),
        base_architectures: headers.config.architectures().unwrap_or_default().iter().map(|a| a.to_string()).collect(),
        layers: plan.layers.converted.clone(),
        mixer: recipe.mixer.clone(),
        teacher: headers.source.repo.clone().unwrap_or_else(|| base_name(&options.model)),
        teacher_revision: headers.source.revision.clone(),
    });
    let dir = run.fresh_export()?;
    let shape = export::Shape { dtype: None, max_shard_bytes: recipe.export.max_shard_bytes()? };
    let parts = export::Parts { model: &model, decoder: &decoder, student: &student, merged: &merged_names };
    let mut files = export::export(&parts, linearization.as_ref(), &shape, &dir, progress)?;
    if let Some(adapter) = adapter {
        let base = headers.source.repo.clone().unwrap_or_else(|| base_name(&options.model));
        let stored = |name: &str| headers.info(name).map(|i| i.dtype);
        files.extend(adapter.write(&base, model.architecture().layers, stored, &dir, progress)?);
    }
    files.extend(ranking.map(|ranking| select::export(&ranking, &dir)).transpose()?);
    let ids = valid.sequence(0).ids;
    let tensors = plan.exported().into_iter().map(|(name, (shape, dtype))| (name, (format!("{dtype:?}"), shape)));
    let mut manifest = Manifest {
        margay: env!("CARGO_PKG_VERSION").into(),
        source: headers.source.repo.clone().unwrap_or_else(|| base_name(&options.model)),
        revision: headers.source.revision.clone(),
        recipe: recipe.clone(),
        recipe_origin: options.recipe.origin.clone(),
        data: texts.describe(valid.len() * valid.seq_len()),
        plan: json!({
            "layers": plan.layers,
            "fates": plan.fates,
            "dropped": plan.tensors.iter().filter(|t| t.fate == plan::Fate::Dropped).collect::<Vec<_>>(),
        }),
        seconds: outcomes.iter().map(|(_, o)| o.seconds).sum(),
        stages: outcomes.iter().map(|(name, o)| (name.to_string(), json!(o))).collect(),
        merged: Some(merged),
        tensors: tensors.collect(),
        files,
        reference: Some(export::reference(&decoder, &student, &ids[..ids.len().min(32)])?),
        verify: None,
    };
    if options.until == Some(Until::Export) {
        manifest.write(&dir)?;
        run.finish()?;
        return stopped(plan, started.elapsed().as_secs_f64());
    }

    let original = model.decoder(device, progress)?;
    let against = Against {
        student: Some(Subject { decoder: &decoder, net: &student }),
        teacher: Some(Subject { decoder: &original, net: &teacher }),
        source: Some(&model.checkpoint),
        merged: &merged_names,
        valid: Some(&valid),
        stages,
        contexts: &recipe.verify.contexts,
    };
    let report = verify::verify(&dir, &manifest, against, device, progress)?;
    manifest.verify = Some(json!(report));
    let card = card::card(&manifest, &report, linearization.as_ref());
    write_atomic(&dir.join("README.md"), card.as_bytes())?;
    manifest.files.push(export::describe("README.md", card.as_bytes()));
    if let Some(log) = run.log()? {
        write_atomic(&dir.join("training.jsonl"), &log)?;
        manifest.files.push(export::describe("training.jsonl", &log));
    }
    manifest.write(&dir)?;
    run.finish()?;
    Ok(Converted { plan, report: Some(report), seconds: started.elapsed().as_secs_f64() })
}

/// Fails where a recipe names no text.
fn require_text(loaded: &Loaded) -> Result<()> {
    if !loaded.recipe.data.sources.is_empty() {
        return Ok(());
    }
    Err(Error::new(Kind::Data, format!("recipe `{}` names no text to train on", loaded.origin))
        .hint("give `--data FILE` (text, JSONL, Alpaca, chats, Parquet, a folder or a data set id)"))
}

/// One stage to train.
struct Training<'a> {
    planned: &'a plan::Stage,
    /// One for each [group](train::Task::group); what they share is read of the first.
    groups: &'a [&'a recipe::Stage],
    seed: u64,
    timed: bool,
}

impl Training<'_> {
    /// Trains on the text of the stage.
    fn run(
        &self,
        task: &mut dyn Task,
        texts: &Texts,
        run: Option<&RunDir>,
        progress: &dyn Progress,
    ) -> Result<Outcome> {
        let planned = self.planned;
        let train = texts.of(&planned.name).1.train(planned.seq_len)?;
        train.require(planned.batch)?;
        let valid = texts.valid(&planned.name, planned.seq_len)?;
        let settings = Settings {
            stage: &planned.name,
            steps: planned.steps,
            batch: planned.batch,
            micro_batch: planned.micro_batch,
            memory: planned.memory.total,
            groups: self.groups,
            eval_every: self.groups.first().map_or(usize::MAX, |stage| stage.eval_every),
            seed: self.seed,
            timed: self.timed,
        };
        train::run(task, &settings, &train, &valid, run, progress)
    }
}

/// Quality of one form of the model; measured once per run, remembered over restarts.
fn measure(
    name: &str,
    decoder: &Decoder,
    net: &Net,
    teacher: Option<&Net>,
    valid: &Split,
    run: &mut RunDir,
    progress: &dyn Progress,
) -> Result<Stage> {
    let key = format!("measure.{name}");
    if let Some(known) = run.done(&key)
        && let Ok(quality) = serde_json::from_value::<Quality>(known.clone())
    {
        return Ok(Stage { name: name.into(), quality });
    }
    let teacher = teacher.map(|net| Subject { decoder, net });
    let quality = quality(Subject { decoder, net }, teacher, valid, progress)?;
    progress.say(&format!("{name}: perplexity {:.4}", quality.perplexity));
    run.mark_done(&key, &json!(quality))?;
    Ok(Stage { name: name.into(), quality })
}

/// Where tokenised text is kept between runs: `$MARGAY_CACHE`, else `margay` in the user's cache folder.
pub fn cache_dir() -> PathBuf {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("MARGAY_CACHE").unwrap_or_else(|| {
        let cache = var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|home| home.join(".cache")));
        cache.unwrap_or_else(std::env::temp_dir).join("margay")
    })
}

/// The last part of a path: exports name no folder of the machine they were made on.
pub(crate) fn base_name(path: &str) -> String {
    let local = Path::new(path);
    let absolute = std::path::absolute(local).unwrap_or_else(|_| local.into());
    match local.exists() {
        true => absolute.file_name().map_or_else(|| path.to_string(), |n| n.to_string_lossy().into_owned()),
        false => path.to_string(),
    }
}
