//! Several recipes side by side: the layer-wise first stage of each, in one run over one walk of the teacher.
//!
//! Layers are taught one by one from the teacher's own hidden state, so all variants meet the same and the teacher is
//! paid once. Text, sequences and steps are [shared](frame); mixer, loss, learning rates, optimiser and schedule are each
//! recipe's own, and each variant comes to what it would alone.

pub mod frame;

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use serde_json::{Value, json};

use super::load::Model;
use super::plan::{self, Plan};
use super::start;
use super::swap::swap;
use super::texts::Texts;
use super::trained::prepare;
use super::transfer::{Meeting, Part, Student, Transfer};
use super::{Training, base_name, require_text};
use crate::checkpoint::writer::write_atomic;
use crate::data::Tokenizer;
use crate::error::{Error, Kind, Result};
use crate::evaluate::diagnose::linear_share;
use crate::evaluate::{Subject, quality};
use crate::model::Net;
use crate::ops::loss::mse;
use crate::plot::{self, Figure, Lines, Scale, Series};
use crate::progress::{Progress, stop_requested};
use crate::recipe::{self, Loaded, Recipe};
use crate::run_dir::{Fingerprint, RunDir, refuse_taken};
use crate::train::clock::Spent;
use crate::train::{Outcome, mean};

/// What to compare, and on how much text.
pub struct Options {
    /// Folder or hub id.
    pub model: String,
    /// The first one's text, sequences and steps are those of all.
    pub recipes: Vec<Loaded>,
    /// Training tokens, instead of the first recipe's.
    pub tokens: Option<u64>,
    /// The folder of `compare.json` and `compare.svg`; beside it lies the progress of a comparison that was stopped.
    pub out: Option<PathBuf>,
    /// Forget an unfinished comparison.
    pub restart: bool,
    pub device: Device,
}

/// Contexts at which states are sized, in tokens.
pub const CONTEXTS: [usize; 2] = [1024, 32_768];

/// Tokens of the sequence that shares are measured on, at most: its weights are T x T.
const LOOK: usize = 512;

/// What came of it.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    pub margay: &'static str,
    pub model: String,
    pub device: plan::PlanDevice,
    pub data: Value,
    /// Training tokens of each variant that trains.
    pub tokens: u64,
    pub steps: u64,
    pub seq_len: usize,
    pub batch: usize,
    pub teacher_perplexity: f64,
    pub variants: Vec<Variant>,
    /// Time of the shared stage; students in the order of the variants that train.
    pub spent: Spent,
    /// Everything since the comparison was begun or went on, seconds.
    pub seconds: f64,
}

/// One recipe's result.
#[derive(Debug, Clone, Serialize)]
pub struct Variant {
    pub name: String,
    pub mixer: &'static str,
    /// Parameters that train; 0 where the mixer has none.
    pub trainable: u64,
    /// Mean over layers, before training and at each layer's best.
    pub loss: Change,
    pub relative_error: Change,
    /// Mean over layers, after training.
    pub linear_share: f64,
    pub layers: Vec<Layer>,
    /// Bytes of one sequence's state at [`CONTEXTS`], all layers.
    pub state_bytes: [usize; 2],
    /// Forward and backward pass and update of this variant, seconds.
    pub seconds: f64,
    /// Training tokens in a second as if it were alone: with the teacher, without the other variants.
    pub tokens_per_second: Option<f64>,
    /// After the stage.
    pub perplexity: f64,
    pub recipe: Recipe,
}

/// A figure before training and at its end.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Change {
    pub first: f64,
    pub best: f64,
}

/// One converted layer on validation text.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Layer {
    pub layer: usize,
    /// In the unit of the recipe's own loss.
    pub loss: Change,
    /// ‖ŷ - y‖² / ‖y‖² of the heads' outputs y: comparable between recipes and models.
    pub relative_error: Change,
    /// Share of all weight that is not a softmax window's, mean over heads, on one sequence.
    pub linear_share: f64,
}

/// Compares recipes. With [`Options::out`] the same call continues a comparison that was stopped, and comes to the same.
///
/// Errors: the folder is taken; recipes that [cannot be compared](frame::frame) or do not fit the model; too little text; training that
/// explodes, whichever variant's.
pub fn compare(options: &Options, progress: &dyn Progress) -> Result<Comparison> {
    let started = Instant::now();
    let device = &options.device;
    options.out.as_deref().map_or(Ok(()), refuse_taken)?;
    let model = Model::open(&options.model, progress)?;
    let (headers, a) = (model.checkpoint.headers(), model.architecture());
    let frame::Framed { stage, recipes, warnings } = frame::frame(&options.recipes, a, options.tokens)?;
    warnings.iter().for_each(|warning| progress.warn(warning));

    let lead = &recipes[0];
    require_text(&lead.loaded)?;
    let shared = lead.stage();
    let tokenizer = Tokenizer::open(model.checkpoint.dir())?;
    tokenizer.check_vocab(a.vocab)?;
    let texts = Texts::prepare(&lead.loaded.recipe, &[(&stage, shared)], &tokenizer, shared.seq_len, progress)?;
    let train = texts.of(&stage).1.train(shared.seq_len)?;
    let train_tokens = [(stage.clone(), (train.len() * shared.seq_len) as u64)].into();
    let seed = shared.seed.unwrap_or(lead.loaded.recipe.seed);

    let mut plans = Vec::with_capacity(recipes.len());
    let mut nets = Vec::with_capacity(recipes.len());
    for framed in &recipes {
        let plan = Plan::of(headers, &framed.loaded, device.into(), Some(&train_tokens))?;
        plan.warnings.iter().for_each(|warning| progress.warn(&format!("`{}`: {warning}", framed.name)));
        let recipe = &framed.loaded.recipe;
        let mut net = swap(a, recipe.mixer.design(), &plan.layers.converted, recipe.seed, device)?;
        prepare(&mut net, framed.stage(), a, seed, device)?;
        plans.push(plan);
        nets.push(net);
    }
    let fingerprint = || Fingerprint {
        recipe: recipes.iter().map(|r| format!("# {}\n{}\n", r.name, r.loaded.recipe.to_toml())).collect(),
        source: headers.digest(),
        data: texts.digest(),
        seed,
        program: env!("CARGO_PKG_VERSION").into(),
    };
    let run = options.out.as_deref().map(|out| RunDir::open(out, &fingerprint(), options.restart)).transpose()?;
    let stopped = || {
        let hint = if run.is_some() { "the same command continues" } else { "the same command begins anew" };
        Error::new(Kind::Interrupted, "stopped while the variants were measured").hint(hint)
    };
    let decoder = model.decoder(device, progress)?;
    let teacher = Net::teacher(a);
    for (framed, net) in recipes.iter().zip(&nets) {
        let recipe = &framed.loaded.recipe;
        start::measure(&decoder, &teacher, net, recipe.mixer.design(), &train, recipe.seed)?;
    }
    let named = recipes.iter().zip(&nets);
    let students: Vec<_> = named.map(|(r, net)| Student { name: &r.name, net, stage: r.stage() }).collect();
    let valid = texts.valid(&stage, shared.seq_len)?;
    let micro_batch = plan::micro_batch(shared.batch, shared.micro_batch, shared.seq_len, device.into());
    let watched = Transfer::new(&decoder, &teacher, &students, micro_batch, seed);
    let measure = |part: &Part, meeting: &Meeting| match stop_requested() {
        true => Err(stopped()),
        false => figures(&watched, &students[part.student].stage.loss, part, meeting),
    };
    let before = watched.means(&valid, measure)?;

    let learning: Vec<usize> = (0..plans.len()).filter(|n| plans[*n].stage(&stage).is_some()).collect();
    let mut outcome = Outcome::default();
    if let Some(planned) = together(&plans, &stage) {
        let students: Vec<Student> = learning.iter().map(|n| students[*n]).collect();
        let groups: Vec<_> = students.iter().map(|s| s.stage).collect();
        let mut task = Transfer::new(&decoder, &teacher, &students, micro_batch, seed);
        let training = Training { planned: &planned, groups: &groups, seed, timed: true };
        outcome = training.run(&mut task, &texts, run.as_ref(), progress)?;
    }

    let after = watched.means(&valid, measure)?;
    let look = texts.valid(&stage, shared.seq_len.min(LOOK))?.limit(1);
    let shares = watched.means(&look, |part, meeting| {
        let (mixer, own) = watched.sees(part, meeting, None)?;
        let (_, weights) = mixer.parallel(own.as_ref().unwrap_or(meeting.heads))?;
        Ok(Tensor::new(&[mean(&linear_share(&weights)?)], &Device::Cpu)?)
    })?;
    let rows = texts.main.valid(shared.seq_len)?.limit(lead.loaded.recipe.verify.tokens);
    let perplexity = |name: &str, net| {
        let found = quality(Subject { decoder: &decoder, net }, None, &rows, progress);
        let found = found.map_err(|e| if e.kind == Kind::Interrupted { stopped() } else { e })?.perplexity;
        progress.say(&format!("{name}: perplexity {found:.4}"));
        Ok::<_, Error>(found)
    };
    let teacher_perplexity = perplexity("teacher", &teacher)?;

    let mut variants = Vec::with_capacity(plans.len());
    for (n, ((framed, plan), net)) in recipes.iter().zip(&plans).zip(&nets).enumerate() {
        let own = watched.parts().iter().enumerate().filter(|(_, part)| part.student == n);
        let layer = |(i, part): (usize, &Part)| {
            let change = |of: fn(&[f64]) -> f64| Change { first: of(&before[i]), best: of(&after[i]) };
            Layer {
                layer: part.layer,
                loss: change(|f| f[0]),
                relative_error: change(|f| f[1] / f[2].max(f64::MIN_POSITIVE)),
                linear_share: shares[i][0],
            }
        };
        let layers: Vec<Layer> = own.map(layer).collect();
        let place = learning.iter().position(|learns| *learns == n);
        variants.push(Variant {
            name: framed.name.clone(),
            mixer: plan.recipe.mixer.design().name(),
            trainable: plan.stage(&stage).map_or(0, |s| s.trainable),
            loss: Change::mean(&layers, |layer| layer.loss),
            relative_error: Change::mean(&layers, |layer| layer.relative_error),
            linear_share: mean(&layers.iter().map(|layer| layer.linear_share).collect::<Vec<_>>()),
            layers,
            state_bytes: CONTEXTS.map(|context| plan.state_bytes(a, context)),
            seconds: place.map_or(0.0, |place| outcome.spent.own(place)),
            tokens_per_second: place.map(|place| outcome.tokens as f64 / outcome.spent.alone(place).max(1e-9)),
            perplexity: perplexity(&framed.name, net)?,
            recipe: framed.loaded.recipe.clone(),
        });
    }
    let found = Comparison {
        margay: env!("CARGO_PKG_VERSION"),
        model: headers.source.repo.clone().unwrap_or_else(|| base_name(&options.model)),
        device: device.into(),
        data: texts.describe(rows.len() * rows.seq_len()),
        tokens: outcome.tokens,
        steps: outcome.steps,
        seq_len: shared.seq_len,
        batch: shared.batch,
        teacher_perplexity,
        variants,
        spent: outcome.spent,
        seconds: started.elapsed().as_secs_f64(),
    };
    if let Some(run) = run {
        found.write(&run.fresh_export()?)?;
        run.finish()?;
    }
    Ok(found)
}

/// Loss of a part by these weights, mean square of its error and of the teacher's output: [3].
fn figures(walk: &Transfer, weights: &recipe::Loss, part: &Part, meeting: &Meeting) -> Result<Tensor> {
    let loss = walk.loss(part, meeting, None)?;
    let error = match weights.output_alone() {
        true => (&loss / weights.output_mse)?,
        false => {
            let (mixer, own) = walk.sees(part, meeting, None)?;
            mse(&mixer.forward(own.as_ref().unwrap_or(meeting.heads))?, meeting.target, 1.0)?
        }
    };
    let size = meeting.target.to_dtype(DType::F32)?.sqr()?.mean_all()?;
    Ok(Tensor::stack(&[loss, error, size], 0)?)
}

/// The stage of all variants that train: the steps of one, the memory of all. `None` where none trains.
fn together(plans: &[Plan], stage: &str) -> Option<plan::Stage> {
    let stages: Vec<&plan::Stage> = plans.iter().filter_map(|plan| plan.stage(stage)).collect();
    let mut all = (*stages.first()?).clone();
    all.trainable = stages.iter().map(|s| s.trainable).sum();
    all.flops = stages.iter().map(|s| s.flops).sum();
    let optimizer: u64 = stages.iter().map(|s| s.memory.optimizer).sum();
    let working = stages.iter().map(|s| s.memory.working).max().unwrap_or_default();
    all.memory = plan::Memory::new(all.memory.weights, optimizer, all.memory.inputs, working);
    Some(all)
}

impl Change {
    fn mean(layers: &[Layer], of: fn(&Layer) -> Change) -> Change {
        let over = |end: fn(Change) -> f64| mean(&layers.iter().map(|layer| end(of(layer))).collect::<Vec<_>>());
        Change { first: over(|c| c.first), best: over(|c| c.best) }
    }
}

impl Comparison {
    /// Writes `compare.json` and `compare.svg`.
    fn write(&self, dir: &Path) -> Result<()> {
        write_atomic(&dir.join("compare.svg"), plot::sheet(&self.figures()).as_bytes())?;
        write_atomic(&dir.join("compare.json"), format!("{:#}\n", json!(self)).as_bytes())
    }

    /// Relative error and share of the linear branch by layer, a curve for each variant.
    pub fn figures(&self) -> Vec<Figure> {
        let curves = |title: &str, y: Scale, of: fn(&Layer) -> f64| {
            let curve = |v: &Variant| Series::new(&v.name, v.layers.iter().map(|l| (l.layer as f64, of(l))).collect());
            Lines { title, x: ("layer", Scale::Linear), y, series: self.variants.iter().map(curve).collect() }.figure()
        };
        vec![
            curves("Relative error of the attention's output", Scale::Log, |layer| layer.relative_error.best),
            curves("Share of the linear branch", Scale::Linear, |layer| layer.linear_share),
        ]
    }
}
