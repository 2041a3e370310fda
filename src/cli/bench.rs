//! `margay bench`: how fast kernels and stages run here, on random weights of a named shape.

use clap::{Args, ValueEnum};
use margay::bench::{self, Bench as Run, Row, shapes};
use margay::convert::load::compute_dtype;
use margay::convert::plan::{Section, bytes, heads};
use margay::error::Result;
use margay::recipe::Recipe;
use serde_json::json;

use super::DeviceArg;
use super::output::Output;

#[derive(Args)]
pub struct Bench {
    /// What to measure; all but decode and prefill where none is named
    #[arg(value_enum, value_name = "WHAT")]
    what: Vec<What>,
    /// A published model's shape
    #[arg(long, value_name = "NAME", default_value = "llama-3.2-1b")]
    shape: String,
    /// A shipped recipe by name or a TOML file: the student and its stages
    #[arg(long, value_name = "RECIPE", default_value = "llama/lolcats")]
    recipe: String,
    /// Change a key of the recipe, such as mixer.window=16; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Sequences of a training step, or decoded at once
    #[arg(long, value_name = "N", default_value_t = 8)]
    batch: usize,
    /// Sequences at once within a step; 0 fits them to the device
    #[arg(long, value_name = "N", default_value_t = 0)]
    micro_batch: usize,
    #[arg(long, value_name = "N", default_value_t = 1024)]
    seq_len: usize,
    /// Layers, where fewer than the shape's are wanted
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Timed repetitions; the median counts
    #[arg(long, value_name = "N", default_value_t = 7)]
    repeats: usize,
    #[command(flatten)]
    device: DeviceArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Ops one by one, forward and backward
    Kernels,
    /// The frozen teacher's forward pass
    Teacher,
    /// One step of the recipe's first layer-wise stage
    Transfer,
    /// One step of the recipe's first stage on the whole student
    Recover,
    /// One-token steps of the converted model
    Decode,
    /// A prompt into an empty state
    Prefill,
}

impl Bench {
    pub fn run(&self, out: &'static Output) -> Result<()> {
        let mut architecture = shapes::architecture(&self.shape)?;
        architecture.layers = self.layers.unwrap_or(architecture.layers).clamp(1, architecture.layers);
        let device = self.device.open()?;
        let dtype = compute_dtype(&device);
        let ceilings = bench::ceilings(&device, dtype)?;
        let run = Run {
            micro_batch: self.micro_batch,
            architecture,
            recipe: Recipe::load(&self.recipe, &self.set)?.recipe,
            device,
            dtype,
            batch: self.batch.max(1),
            seq_len: self.seq_len.max(1),
            repeats: self.repeats.max(1),
            ceilings,
            progress: out,
        };
        let all = [What::Kernels, What::Teacher, What::Transfer, What::Recover];
        let mut rows: Vec<Row> = Vec::new();
        for what in if self.what.is_empty() { &all[..] } else { &self.what } {
            match what {
                What::Kernels => rows.extend(bench::kernels(&run)?),
                What::Teacher => rows.push(bench::teacher(&run)?),
                What::Transfer => rows.push(bench::transfer(&run)?),
                What::Recover => rows.push(bench::recover(&run)?),
                What::Decode => rows.push(bench::decode(&run)?),
                What::Prefill => rows.push(bench::prefill(&run)?),
            }
        }
        if self.json {
            return out.json(&json!({
                "shape": self.shape, "recipe": self.recipe, "layers": run.architecture.layers, "batch": run.batch, "seq_len": run.seq_len,
                "micro_batch": run.micro_batch, "dtype": dtype.as_str(),
                "device": format!("{:?}", run.device.location()), "ceilings": ceilings, "rows": rows,
            }));
        }
        let optional = |x: Option<f64>, digits: usize| x.map_or_else(|| "–".into(), |x| format!("{x:.digits$}"));
        let line = |r: &Row| {
            vec![
                r.what.clone(),
                format!("{:.3}", r.milliseconds),
                optional(r.tokens_per_second, 0),
                optional(r.tflops, 1),
                optional(r.gb_s, 0),
                r.share.map_or_else(|| "–".into(), |s| format!("{:.0} %", s * 100.0)),
                r.peak_bytes.map_or_else(|| "–".into(), bytes),
            ]
        };
        let list = Section::list(
            "Measured on",
            [
                ("shape", format!("{}, {} layers", self.shape, run.architecture.layers)),
                ("recipe", self.recipe.clone()),
                ("step", format!("{} sequences of {}", run.batch, run.seq_len)),
                ("device", format!("{:?}, {}", run.device.location(), dtype.as_str())),
                ("copy", format!("{:.0} GB/s", ceilings.copy_gb_s)),
                ("products", format!("{:.1} TFLOP/s", ceilings.matmul_tflops)),
            ],
        );
        let columns = heads(["what", "ms", "tokens/s", "TFLOP/s", "GB/s", "of ceiling", "peak memory"]);
        out.tables(&[list, Section { title: "Speed", columns, rows: rows.iter().map(line).collect() }])
    }
}
