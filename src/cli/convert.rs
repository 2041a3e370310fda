//! `margay convert`: the short plan before, progress, and the verify table after.

use std::path::{Path, PathBuf};

use clap::Args;
use margay::checkpoint::Headers;
use margay::convert::plan::{Plan, bytes, count, ranges};
use margay::convert::{self, Options, Until, verify};
use margay::error::Result;
use margay::progress::{Progress, duration};
use margay::run_dir::refuse_taken;

use super::output::Output;
use super::{DeviceArg, RecipeArgs, announce, quoted, stop_on_ctrl_c};

#[derive(Args)]
pub struct Convert {
    /// A local Hugging Face folder, or a hub id `org/name[@revision]`
    #[arg(value_name = "MODEL")]
    model: String,
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The folder to write, which must not exist yet
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    device: DeviceArg,
    /// Stop after plan, swap, a training stage of the recipe, merge or export; the same command without it continues
    #[arg(long, value_name = "STAGE")]
    until: Option<String>,
    /// Throw away the progress of an unfinished run
    #[arg(long)]
    restart: bool,
    /// Write losses, learning rate and tokens/s as TensorBoard event files; a folder for each run
    #[arg(long, value_name = "DIR")]
    tensorboard: Option<PathBuf>,
    /// On a GPU too, say what a stage's time went to: waits for the device at every span, which costs some speed
    #[arg(long)]
    timed: bool,
    /// Print the verification as JSON
    #[arg(long)]
    json: bool,
}

impl Convert {
    pub fn run(&self, out: &'static Output) -> Result<()> {
        refuse_taken(&self.out)?;
        let recipe = self.recipe.load(&self.model)?;
        let device = self.device.open()?;
        let until = self.until.as_deref().map(Until::from);
        let early = Plan::of(&Headers::open(&self.model)?, &recipe, (&device).into(), None)?;
        out.details(&early.sections());
        brief(&early).iter().for_each(|line| out.say(line));
        let work = PathBuf::from(format!("{}.margay", self.out.display()));
        if !self.restart && until != Some(Until::Plan) {
            announce(&self.out, out);
        }
        let wanted = early.disk.export + early.disk.run;
        let folder = self.out.ancestors().find(|p| p.is_dir()).unwrap_or(Path::new("."));
        if let Ok(free) = fs4::available_space(folder)
            && free < wanted
        {
            out.warn(&format!(
                "{} are free for `{}`, less than the {} above",
                bytes(free),
                self.out.display(),
                bytes(wanted)
            ));
        }
        stop_on_ctrl_c(out, "saving and stopping…")?;

        let model = self.model.clone();
        let (out_dir, tensorboard) = (self.out.clone(), self.tensorboard.clone());
        let (until_, restart, timed) = (until.clone(), self.restart, self.timed);
        let options = Options { model, recipe, out: out_dir, device, until: until_, restart, tensorboard, timed };
        let done = convert::convert(&options, out)?;

        let (folder, name) = (self.out.display(), quoted(&self.out.to_string_lossy()));
        let took = duration(std::time::Duration::from_secs_f64(done.seconds));
        let Some(report) = done.report else {
            out.say(&match until {
                Some(Until::Plan) => "stopped after the plan; nothing was written".to_string(),
                Some(Until::Export) => {
                    format!("exported to `{folder}` in {took}, not verified: `margay verify {name}`")
                }
                _ => format!("stopped in {took}; `{}` keeps the progress", work.display()),
            });
            return Ok(());
        };
        super::verify::print(&report, self.json, out)?;
        if !report.passed() {
            out.warn(&format!("`{folder}` was written and stays, so that it can be looked into"));
            return Err(verify::failure(&report, &self.out));
        }
        out.say(&format!("\nconverted in {took}: `{folder}`; next:"));
        out.say(&format!("  margay generate {name} --prompt 'Once upon a time'"));
        out.say(&format!("  margay verify {name} --teacher {}", quoted(&self.model)));
        Ok(())
    }
}

/// The plan in a few lines.
fn brief(plan: &Plan) -> Vec<String> {
    let model = &plan.model;
    let mut lines = vec![format!(
        "{}: {}, {} layers, {} parameters",
        model.id,
        model.family,
        model.layers,
        count(model.parameters)
    )];
    let mut line = |name: &str, text: String| lines.push(format!("  {name:<10}{text}"));
    line("recipe", plan.recipe.name.clone());
    let kept = match plan.layers.kept.as_slice() {
        [] => String::new(),
        kept => format!("; softmax stays in {}", ranges(kept)),
    };
    line(
        "layers",
        match plan.layers.converted.as_slice() {
            [] => "none is converted: all stay softmax".into(),
            converted => format!("{} in {}{kept}", plan.recipe.mixer.design().name(), ranges(converted)),
        },
    );
    if let Some(hybrid) = plan.hybrid() {
        line("", hybrid);
    }
    let fates = plan.fates.iter().map(|(fate, total)| format!("{} {}", total.tensors, fate.word()));
    line("tensors", fates.collect::<Vec<_>>().join(", "));
    for s in &plan.stages {
        let (trains, tokens, memory) = (count(s.trainable), count(s.tokens), bytes(s.memory.total));
        line(&s.name, format!("{trains} parameters, at most {tokens} tokens in {} steps, {memory} of memory", s.steps));
    }
    line("disk", format!("{} for the export, {} while it runs", bytes(plan.disk.export), bytes(plan.disk.run)));
    lines
}
