//! The command line: what each command takes, and one call into the library for each.

mod bench;
mod chat;
mod compare;
mod convert;
mod doctor;
mod eval;
mod export;
mod generate;
pub mod output;
mod plan;
mod recipe;
mod report;
mod verify;

use std::path::Path;

use candle_core::Device;
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use margay::convert::plan::PlanDevice;
use margay::data;
use margay::error::{Error, Kind, Result};
use margay::ops;
use margay::progress::{self, Progress};
use margay::recipe::Recipe;
use margay::run_dir;

use output::Output;

/// Linearizes pretrained language models: softmax attention in, learnable linear attention out.
#[derive(Parser)]
#[command(name = "margay", version, max_term_width = 100, after_help = ENVIRONMENT)]
pub struct Cli {
    #[command(flatten)]
    pub voice: Voice,
    #[command(subcommand)]
    pub command: Command,
}

const ENVIRONMENT: &str = "\
Environment:
  HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE  the hub, as everywhere
  MARGAY_CACHE       where tokenised text is kept between runs
  RAYON_NUM_THREADS  threads to compute with
  NO_COLOR           no colour

Exit code: 0 done, 1 refused or failed verification, 2 usage or unexpected failure, 130 interrupted.";

const EXPORTS: &str = "\
Formats:
  transformers  the whole model, as every conversion writes it: `AutoModelForCausalLM` loads it with
                `trust_remote_code=True`; needs PyTorch alone
  adapter       what changed of the base model: LoRA as a PEFT folder, the mixers' tensors beside it
  lolcats       `_distill.pt` and `_ft.pt` of the official LoLCATs code, with its configuration
  liger         a folder of the official Liger code
  gguf          one file for llama.cpp, of any model whose layers are all softmax: it knows no other mixers

From official LoLCATs checkpoints:
  margay export a_distill.pt a_ft.pt --base MODEL --recipe RECIPE --out DIR";

/// How much is said, and how.
#[derive(Args, Clone, Copy)]
#[command(next_help_heading = "Output")]
pub struct Voice {
    /// Errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Say more
    #[arg(short, long, global = true)]
    verbose: bool,
    /// One JSON object per line on stderr instead of text
    #[arg(long, global = true)]
    json_logs: bool,
    /// No progress bars
    #[arg(long, global = true)]
    no_progress: bool,
}

#[derive(Subcommand)]
pub enum Command {
    /// Convert a model: load, plan, swap, train by the recipe's stages, merge, export, verify
    #[command(after_help = "The same command continues a run that was stopped. Ctrl-C saves and stops.")]
    Convert(convert::Convert),
    /// Train the layer-wise first stage of several recipes over one teacher and compare them
    #[command(after_help = "With --out a comparison that is stopped goes on with the same command.")]
    Compare(compare::Compare),
    /// Show all that a conversion would do, without reading a weight
    Plan(plan::Plan),
    /// Show what a model is: layers and their attention, parameters, state against KV cache
    Inspect(plan::Inspect),
    /// Reopen an exported model and check it
    Verify(verify::Verify),
    /// Write a model for another program: transformers, PEFT, the official LoLCATs and Liger code, llama.cpp
    #[command(after_help = EXPORTS)]
    Export(export::Export),
    /// Measure perplexity, agreement with a teacher, recall and multiple choice
    Eval(eval::Eval),
    /// Show a conversion as one page of HTML
    Report(report::Report),
    /// Continue a text or hold a conversation, one token at a time
    Generate(generate::Generate),
    /// Shipped recipes and checks of your own
    #[command(subcommand)]
    Recipe(recipe::Command),
    /// Show program, machine and caches, what is wrong and what to do
    Doctor(doctor::Doctor),
    /// Measure kernels and stages on random weights of a named shape
    Bench(bench::Bench),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// Runs one command.
pub fn run(command: &Command, out: &'static Output) -> Result<()> {
    match command {
        Command::Convert(args) => args.run(out),
        Command::Compare(args) => args.run(out),
        Command::Plan(args) => args.run(out),
        Command::Inspect(args) => args.run(out),
        Command::Verify(args) => args.run(out),
        Command::Export(args) => args.run(out),
        Command::Eval(args) => args.run(out),
        Command::Report(args) => args.run(out),
        Command::Generate(args) => args.run(out),
        Command::Recipe(command) => command.run(out),
        Command::Doctor(args) => args.run(out),
        Command::Bench(args) => args.run(out),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "margay", &mut script);
            out.data(&String::from_utf8_lossy(&script))
        }
    }
}

/// The recipe and what the command line changes in it.
#[derive(Args)]
pub struct RecipeArgs {
    /// A shipped recipe by name (see `margay recipe list`) or a TOML file
    #[arg(long, value_name = "RECIPE")]
    recipe: Option<String>,
    #[command(flatten)]
    changes: Changes,
}

/// What the command line changes in a recipe.
#[derive(Args)]
pub struct Changes {
    /// Change a key of the recipe, such as stage.transfer.tokens=20000; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Text to train on, instead of the recipe's: file, glob, folder or hub data set; may be repeated
    #[arg(long, value_name = "SOURCE")]
    data: Vec<String>,
    /// Seed of everything random, instead of the recipe's
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

impl RecipeArgs {
    /// The recipe for `model`; where none is named, an error that lists those that fit.
    fn load(&self, model: &str) -> Result<margay::recipe::Loaded> {
        let Some(name) = &self.recipe else {
            let fitting: Vec<String> = recipe::fitting(model)?.into_iter().map(|r| r.name).collect();
            let error = Error::new(Kind::Usage, format!("`--recipe` is missing for `{model}`"));
            return Err(error.hint(format!("shipped recipes that fit: {}", fitting.join(", "))));
        };
        self.changes.load(name)
    }
}

impl Changes {
    /// The recipe of this name or file with these changes.
    fn load(&self, name: &str) -> Result<margay::recipe::Loaded> {
        let mut sets = self.set.clone();
        sets.extend(self.seed.map(|seed| format!("seed={seed}")));
        if !self.data.is_empty() {
            sets.push(format!("data.sources={}", serde_json::json!(self.data)));
        }
        Recipe::load(name, &sets)
    }
}

/// Where to compute.
#[derive(Args)]
pub struct DeviceArg {
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = Choice::parse)]
    device: Choice,
}

#[derive(Debug, Clone, Copy)]
enum Choice {
    Auto,
    Cpu,
    Cuda(usize),
}

impl Choice {
    fn parse(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Choice::Auto),
            None if text == "cpu" => Ok(Choice::Cpu),
            None if text == "cuda" => Ok(Choice::Cuda(0)),
            Some(("cuda", number)) if number.parse::<usize>().is_ok() => {
                Ok(Choice::Cuda(number.parse().unwrap_or_default()))
            }
            _ => Err("known: auto, cpu, cuda, cuda:N".into()),
        }
    }
}

impl DeviceArg {
    /// Opens the device. `auto` is the first GPU, where the program can use one, else the CPU.
    fn open(&self) -> Result<Device> {
        match self.device {
            Choice::Auto if cfg!(feature = "cuda") => Ok(ops::gpu(0).unwrap_or(Device::Cpu)),
            Choice::Auto | Choice::Cpu => Ok(Device::Cpu),
            Choice::Cuda(_) if !cfg!(feature = "cuda") => {
                Err(Error::new(Kind::Usage, "this build of margay cannot use NVIDIA GPUs")
                    .hint("build with `--features cuda`, or use `--device cpu`"))
            }
            Choice::Cuda(number) => ops::gpu(number).map_err(|e| {
                Error::new(Kind::Usage, format!("cannot open device `cuda:{number}`: {e}"))
                    .hint("`margay doctor` lists the devices; `--device cpu` works everywhere")
            }),
        }
    }

    /// The device to plan for, which need not be here.
    fn planned(&self) -> Result<PlanDevice> {
        match self.device {
            Choice::Cuda(_) => Ok(PlanDevice::Cuda),
            Choice::Auto | Choice::Cpu => Ok(PlanDevice::from(&self.open()?)),
        }
    }
}

/// Rows of text to measure a model on.
#[derive(Args)]
pub struct TextArgs {
    /// Text to measure on: file, glob, folder or hub data set; may be repeated
    #[arg(long, value_name = "SOURCE")]
    data: Vec<String>,
    /// Tokens of each row or longest prompt [default: what the model was made for, at most 1024]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    seq_len: Option<u32>,
    /// Use the first N tokens only
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tokens: Option<u32>,
}

impl TextArgs {
    /// Tokens of each row for a model of so many positions.
    fn row_len(&self, positions: usize) -> usize {
        self.seq_len.map_or(positions.min(1024), |n| n as usize)
    }

    /// The rows, `None` without `--data`.
    fn rows(
        &self,
        settings: &margay::recipe::Data,
        tokenizer: &data::Tokenizer,
        positions: usize,
        most: usize,
        out: &Output,
    ) -> Result<Option<data::Split>> {
        if self.data.is_empty() {
            return Ok(None);
        }
        let seq_len = self.row_len(positions);
        let cache = margay::convert::cache_dir();
        let rows = data::eval_rows(&self.data, settings, tokenizer, seq_len, &cache, out)?;
        Ok(Some(rows.limit(self.tokens.map_or(most, |n| n as usize))))
    }
}

/// The generated recall suite.
#[derive(Args)]
pub struct SuiteArgs {
    /// Prompts of each cell of the recall suite
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=4096))]
    samples: u16,
    /// Seed of the generated prompts
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

impl SuiteArgs {
    fn settings(&self, longest: usize) -> margay::evaluate::recall::Settings {
        margay::evaluate::recall::Settings { seed: self.seed, samples: self.samples.into(), longest }
    }
}

/// The first Ctrl-C says `line` and asks the work to stop, the second ends the program.
fn stop_on_ctrl_c(out: &'static Output, line: &'static str) -> Result<()> {
    let handler = move || {
        if progress::stop_requested() {
            std::process::exit(130);
        }
        progress::request_stop();
        out.say(&format!("{line} (Ctrl-C again stops at once)"));
    };
    ctrlc::set_handler(handler).map_err(|e| Error::new(Kind::Unexpected, format!("cannot listen to Ctrl-C: {e}")))
}

/// Says that there is progress towards the folder `dir` that is taken up.
fn announce(dir: &Path, out: &Output) {
    if let Ok(Some((work, _))) = run_dir::look(dir) {
        out.say(&format!("continuing the unfinished run in `{}`", work.display()));
    }
}

/// A path or name as a shell takes it.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "._/-+=:@~,".contains(c);
    if text.chars().all(plain) { text.into() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}
